// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/loaded_kernels.h"

#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "backend/cuda/dispatch.h"
#include "core/log.h"
#include "fsa/error.h"
#include "jit/store.h"

namespace fsa::cuda {
namespace {

constexpr int kMaxDynamicSharedBytes = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

struct Key {
  KernelConfig config;
  int device;
  friend bool operator==(const Key&, const Key&) = default;
};

struct KeyHash {
  std::size_t operator()(const Key& key) const {
    return std::hash<KernelConfig>()(key.config) + static_cast<std::size_t>(key.device);
  }
};

// Never destroyed: at the end of the process the driver may go before static objects do.
struct Table {
  std::shared_mutex mutex;
  std::unordered_map<Key, LoadedKernel, KeyHash> kernels;  // entries keep their addresses
};

Table& table() {
  static Table& kernels = *new Table;
  return kernels;
}

void refuse_while_capturing(const jit::KernelSource& source, Stream stream) {
  int status = 0;
  require_success(driver().call.stream_is_capturing(stream, &status), "cuStreamIsCapturing");
  if (status != 0)
    throw Error(ErrorCode::device,
                source.name +
                    ": its first use falls into the capture of a CUDA graph, during which no kernel can be "
                    "loaded; make one call like this before the capture. To also save its compilation, " +
                    jit::prefill_hint(source));
}

LoadedKernel load(const KernelConfig& config, const jit::KernelSource& source, int device) {
  static const jit::Stores stores = jit::Stores::from_environment();
  const jit::Found found = jit::find_or_compile(source, stores);
  if (logs_dispatch())
    write_log(source.name + ": " + found.origin +
              (found.warning.empty() ? "" : ", not kept: " + found.warning));

  const Functions& f = driver().call;
  LoadedKernel loaded;
  loaded.threads = threads_of(config);
  loaded.shared_bytes = shared_bytes_of(config);
  Library library = nullptr;
  require_success(f.load_library(&library, found.file.cubin.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
                  "cuLibraryLoadData");
  try {
    DeviceHandle handle = 0;
    void* function = nullptr;
    require_success(f.device(&handle, device), "cuDeviceGet");
    require_success(f.library_kernel(&loaded.kernel, library, source.entry.c_str()), "cuLibraryGetKernel");
    require_success(f.set_kernel_attribute(kMaxDynamicSharedBytes, static_cast<int>(loaded.shared_bytes),
                                           loaded.kernel, handle),
                    "cuKernelSetAttribute");
    // Loads it into the context now: by itself the driver would at the first launch, perhaps in a capture.
    require_success(f.kernel_function(&function, loaded.kernel), "cuKernelGetFunction");
  } catch (...) {
    f.unload_library(library);
    throw;
  }
  return loaded;
}

}  // namespace

const LoadedKernel& loaded_kernel(const KernelConfig& config, int device, Stream stream) {
  const Key key{config, device};
  {
    const std::shared_lock lock(table().mutex);
    const auto entry = table().kernels.find(key);
    if (entry != table().kernels.end()) return entry->second;
  }
  const jit::KernelSource source = source_of(config);
  refuse_while_capturing(source, stream);
  const LoadedKernel loaded = load(config, source, device);
  // Whether a forward call needs this one, too, its sizes say, which may grow from one call to a captured one.
  if (config.kind == KernelKind::forward) loaded_kernel(clear_counters_kernel(), device, stream);
  const std::lock_guard lock(table().mutex);
  return table().kernels.try_emplace(key, loaded).first->second;
}

}  // namespace fsa::cuda

// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>

#include "fsa/error.h"

namespace fsa::cuda {
namespace {

constexpr Result kSuccess = 0;
constexpr int kProcessorCount = 16;
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;
constexpr int kMaxSharedBytes = 97;

// False, with the reason in `error`, when the symbol is missing.
template <class Function>
bool find(void* library, const char* symbol, Function& function, std::string& error) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
  if (function != nullptr) return true;
  error = std::string("libcuda.so.1 has no symbol ") + symbol + "; a driver of CUDA 12 or newer is needed";
  return false;
}

bool find_questions(void* library, Functions& f, std::string& error) {
  return find(library, "cuInit", f.initialize, error) &&
         find(library, "cuDriverGetVersion", f.driver_version, error) &&
         find(library, "cuDeviceGetCount", f.device_count, error) &&
         find(library, "cuDeviceGet", f.device, error) &&
         find(library, "cuDeviceGetName", f.device_name, error) &&
         find(library, "cuDeviceGetAttribute", f.device_attribute, error) &&
         find(library, "cuGetErrorString", f.error_string, error);
}

bool find_actions(void* library, Functions& f, std::string& error) {
  return find(library, "cuCtxGetDevice", f.context_device, error) &&
         find(library, "cuDevicePrimaryCtxRetain", f.primary_context, error) &&
         find(library, "cuCtxPushCurrent_v2", f.push_context, error) &&
         find(library, "cuCtxPopCurrent_v2", f.pop_context, error) &&
         find(library, "cuStreamIsCapturing", f.stream_is_capturing, error) &&
         find(library, "cuLibraryLoadData", f.load_library, error) &&
         find(library, "cuLibraryGetKernel", f.library_kernel, error) &&
         find(library, "cuLibraryUnload", f.unload_library, error) &&
         find(library, "cuKernelGetFunction", f.kernel_function, error) &&
         find(library, "cuKernelSetAttribute", f.set_kernel_attribute, error) &&
         find(library, "cuMemsetD8Async", f.fill_bytes, error) &&
         find(library, "cuTensorMapEncodeTiled", f.encode_tensor_map, error) &&
         find(library, "cuLaunchKernel", f.launch, error) &&
         find(library, "cuLaunchKernelEx", f.launch_with, error);
}

std::string text_of(const Functions& f, Result result, const char* call) {
  const char* text = nullptr;
  if (f.error_string(result, &text) != kSuccess || text == nullptr) text = "unknown error";
  return std::string(call) + " failed with error " + std::to_string(result) + ": " + text;
}

bool succeeded(const Functions& f, Result result, const char* call, std::string& error) {
  if (result == kSuccess) return true;
  error = text_of(f, result, call);
  return false;
}

bool read_device(const Functions& f, int ordinal, DeviceInfo& info, std::string& error) {
  DeviceHandle device = 0;
  char name[256] = {};
  const auto read = [&](int attribute, int& value) {
    return succeeded(f, f.device_attribute(&value, attribute, device), "cuDeviceGetAttribute", error);
  };
  const bool ok = succeeded(f, f.device(&device, ordinal), "cuDeviceGet", error) &&
                  succeeded(f, f.device_name(name, sizeof(name), device), "cuDeviceGetName", error) &&
                  read(kComputeCapabilityMajor, info.major) && read(kComputeCapabilityMinor, info.minor) &&
                  read(kProcessorCount, info.processors) && read(kMaxSharedBytes, info.shared_bytes);
  name[sizeof(name) - 1] = '\0';
  info.name = name;
  return ok;
}

// The library stays loaded: unloading a driver under other users of the process is not safe.
DriverInfo discover() {
  DriverInfo info;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    info.error = reason == nullptr ? "libcuda.so.1 cannot be loaded" : reason;
    return info;
  }
  const Functions& f = info.call;
  int version = 0, count = 0;
  if (!find_questions(library, info.call, info.error) ||
      !succeeded(f, f.initialize(0), "cuInit", info.error) ||
      !succeeded(f, f.driver_version(&version), "cuDriverGetVersion", info.error) ||
      !succeeded(f, f.device_count(&count), "cuDeviceGetCount", info.error))
    return info;
  info.version = version;
  if (count == 0) info.error = "the CUDA driver reports no device";
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    DeviceInfo device;
    if (!read_device(f, ordinal, device, info.error)) break;
    info.devices.push_back(device);
  }
  if (info.error.empty()) find_actions(library, info.call, info.error);
  return info;
}

// Retained once per process: it is every user's context of that device.
Context primary_context(DeviceHandle device) {
  static std::mutex mutex;
  static std::map<DeviceHandle, Context> contexts;
  const std::lock_guard lock(mutex);
  Context& context = contexts[device];
  if (context == nullptr)
    require_success(driver().call.primary_context(&context, device), "cuDevicePrimaryCtxRetain");
  return context;
}

}  // namespace

const DriverInfo& driver() {
  static const DriverInfo info = discover();
  return info;
}

void require_success(Result result, const char* call) {
  if (result != kSuccess) throw Error(ErrorCode::device, text_of(driver().call, result, call));
}

// The context of the device that is current stays: the caller's stream may belong to it.
DeviceGuard::DeviceGuard(int device) {
  const Functions& f = driver().call;
  DeviceHandle current = 0, wanted = 0;
  require_success(f.device(&wanted, device), "cuDeviceGet");
  if (f.context_device(&current) == kSuccess && current == wanted) return;
  require_success(f.push_context(primary_context(wanted)), "cuCtxPushCurrent");
  pushed_ = true;
}

DeviceGuard::~DeviceGuard() {
  Context context = nullptr;
  if (pushed_) driver().call.pop_context(&context);
}

}  // namespace fsa::cuda

// SPDX-License-Identifier: Apache-2.0
#include "jit/store.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>

#include "core/env.h"
#include "fsa/error.h"
#include "jit/file_lock.h"
#include "jit/nvrtc.h"

namespace fsa::jit {
namespace {

std::string folder_of_this_library() {
  Dl_info info = {};
  if (dladdr(reinterpret_cast<const void*>(&folder_of_this_library), &info) == 0 || info.dli_fname == nullptr)
    return "";
  return std::filesystem::path(info.dli_fname).parent_path().string();
}

std::string default_cache() {
  for (const auto& [variable, below] : {std::pair{"XDG_CACHE_HOME", ""}, {"HOME", "/.cache"}}) {
    const char* value = std::getenv(variable);
    if (value != nullptr && value[0] == '/') return std::string(value) + below + "/flash_sparse_attention";
  }
  return "";
}

// One mutex per kernel that somebody is waiting for.
class Turns {
 public:
  std::shared_ptr<std::mutex> of(const std::string& path) {
    const std::lock_guard lock(mutex_);
    std::weak_ptr<std::mutex>& entry = turns_[path];
    std::shared_ptr<std::mutex> turn = entry.lock();
    if (turn == nullptr) entry = turn = std::make_shared<std::mutex>();
    return turn;
  }

 private:
  std::mutex mutex_;
  std::map<std::string, std::weak_ptr<std::mutex>> turns_;
};

}  // namespace

Stores Stores::from_environment() {
  Stores stores;
  std::istringstream paths{std::string(env::kernel_path())};
  for (std::string path; std::getline(paths, path, ':');)
    if (!path.empty()) stores.packs.push_back(path);
  if (const std::string folder = folder_of_this_library(); !folder.empty())
    stores.packs.push_back(folder + "/fsa_kernels");
  stores.cache = env::cache_dir().empty() ? default_cache() : std::string(env::cache_dir());
  stores.may_compile = env::jit();
  return stores;
}

std::string path_in(const std::string& store, const KernelSource& source) {
  return store + "/" + std::string(source_bundle_hash()) + "/" + source.arch + "/" + source.file_name();
}

std::optional<Found> find(const KernelSource& source, const Stores& stores) {
  const auto look = [&](const std::string& store) -> std::optional<Found> {
    const std::string path = path_in(store, source);
    if (auto file = read_cubin(path, source.identity())) return Found{*std::move(file), path, ""};
    return std::nullopt;
  };
  for (const std::string& pack : stores.packs)
    if (auto found = look(pack)) return found;
  return stores.cache.empty() ? std::nullopt : look(stores.cache);
}

std::string prefill_hint(const KernelSource& source) {
  return "fill the cache beforehand with: fsa-kernels prefill " + source.name;
}

Found compile_into(const KernelSource& source, const std::string& store) {
  Compilation compiled = compile(source);
  Found found{{std::move(compiled.cubin), std::move(compiled.log), nvrtc().version, compiled.seconds},
              "compiled",
              ""};
  if (store.empty()) return found;
  const std::string path = path_in(store, source);
  found.warning = write_whole(path, encode(found.file, source.identity()));
  if (found.warning.empty())
    found.warning = write_whole(std::filesystem::path(path).replace_extension(".cu").string(), source.text);
  return found;
}

Found find_or_compile(const KernelSource& source, const Stores& stores) {
  if (auto found = find(source, stores)) return *std::move(found);
  if (!stores.may_compile)
    throw Error(ErrorCode::device,
                source.name + ": not in a pack or in the cache, and FSA_JIT is off; " + prefill_hint(source));
  static Turns turns;
  const std::string path = path_in(stores.cache, source);
  const std::shared_ptr<std::mutex> turn = turns.of(path);
  const std::lock_guard mine(*turn);
  if (stores.cache.empty()) return compile_into(source, "");
  const FileLock lock(path + ".lock");
  if (auto found = find(source, stores)) return *std::move(found);  // somebody else was first
  return compile_into(source, stores.cache);
}

}  // namespace fsa::jit

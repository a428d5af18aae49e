// SPDX-License-Identifier: Apache-2.0
#include "jit/nvrtc.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <string_view>
#include <vector>

#include "core/env.h"
#include "fsa/error.h"

namespace fsa::jit {
namespace {

namespace fs = std::filesystem;

using Result = int;  // as documented; 0 is success
using Program = void*;
constexpr int kOldestVersion = 12000;  // the first with C++20 and sm_90a

struct Functions {
  Result (*version)(int* major, int* minor) = nullptr;
  Result (*create)(Program* program, const char* text, const char* name, int headers,
                   const char* const* header_texts, const char* const* header_names) = nullptr;
  Result (*destroy)(Program* program) = nullptr;
  Result (*compile)(Program program, int options, const char* const* option) = nullptr;
  Result (*log_size)(Program program, std::size_t* bytes) = nullptr;
  Result (*log)(Program program, char* text) = nullptr;
  Result (*cubin_size)(Program program, std::size_t* bytes) = nullptr;
  Result (*cubin)(Program program, char* bytes) = nullptr;
  const char* (*error_string)(Result result) = nullptr;

  bool find_in(void* library) {
    return find(library, "nvrtcVersion", version) && find(library, "nvrtcCreateProgram", create) &&
           find(library, "nvrtcDestroyProgram", destroy) && find(library, "nvrtcCompileProgram", compile) &&
           find(library, "nvrtcGetProgramLogSize", log_size) && find(library, "nvrtcGetProgramLog", log) &&
           find(library, "nvrtcGetCUBINSize", cubin_size) && find(library, "nvrtcGetCUBIN", cubin) &&
           find(library, "nvrtcGetErrorString", error_string);
  }

 private:
  template <class Function>
  static bool find(void* library, const char* symbol, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, symbol));
    return function != nullptr;
  }
};

struct Library {
  Functions call;
  NvrtcInfo info;
};

std::vector<std::string> loaded_libraries() {
  std::vector<std::string> paths;
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* into) {
        if (info->dlpi_name != nullptr && info->dlpi_name[0] == '/')
          static_cast<std::vector<std::string>*>(into)->push_back(info->dlpi_name);
        return 0;
      },
      &paths);
  return paths;
}

// Files of the folder whose names start so; the newest version last.
std::vector<std::string> files_in(const fs::path& folder, std::string_view prefix) {
  std::vector<std::string> paths;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error))
    if (entry->path().filename().string().starts_with(prefix)) paths.push_back(entry->path().string());
  std::sort(paths.begin(), paths.end());
  return paths;
}

// The site-packages folder that the path lies in, with its slash; empty when there is none.
std::string packages_folder(const std::string& path) {
  for (const std::string_view name : {"/site-packages/", "/dist-packages/"})
    if (const std::size_t at = path.rfind(name); at != std::string::npos)
      return path.substr(0, at + name.size());
  return "";
}

void add_folder(std::vector<std::string>& candidates, const fs::path& folder) {
  std::vector<std::string> found = files_in(folder, "libnvrtc.so");
  candidates.insert(candidates.end(), found.rbegin(), found.rend());
}

std::vector<std::string> candidates() {
  std::vector<std::string> paths;
  if (const std::string given(env::nvrtc_path()); !given.empty()) {
    std::error_code error;
    if (fs::is_directory(given, error))
      add_folder(paths, given);
    else
      paths.push_back(given);
    return paths;
  }
  const std::vector<std::string> loaded = loaded_libraries();
  for (const std::string& path : loaded)
    if (fs::path(path).filename().string().starts_with("libnvrtc.so")) paths.push_back(path);
  std::vector<std::string> folders;
  for (const std::string& path : loaded) {
    const std::string folder = packages_folder(path);
    if (!folder.empty() && std::find(folders.begin(), folders.end(), folder) == folders.end())
      folders.push_back(folder);
  }
  for (const std::string& folder : folders) {
    add_folder(paths, folder + "nvidia/cu13/lib");
    add_folder(paths, folder + "nvidia/cuda_nvrtc/lib");
  }
  for (const char* name : {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"}) paths.push_back(name);
  add_folder(paths, "/usr/local/cuda/lib64");
  return paths;
}

// False when the file is no usable NVRTC; `why` then says so.
bool open(const std::string& path, Library& library, std::string& why) {
  // NVRTC opens its builtins by bare name, which finds them anywhere once they are loaded.
  if (path.find('/') != std::string::npos)
    for (const std::string& builtins : files_in(fs::path(path).parent_path(), "libnvrtc-builtins.so"))
      dlopen(builtins.c_str(), RTLD_NOW | RTLD_LOCAL);
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* reason = dlerror();
    why = reason != nullptr ? reason : path + " cannot be loaded";
    return false;
  }
  int major = 0, minor = 0;
  if (!library.call.find_in(handle) || library.call.version(&major, &minor) != 0) {
    why = path + " is no NVRTC";
    return false;
  }
  library.info.version = major * 1000 + minor * 10;
  library.info.path = path;
  if (library.info.version < kOldestVersion) {
    why = path + " is NVRTC " + std::to_string(major) + "." + std::to_string(minor) +
          ", but 12.0 or newer is needed";
    return false;
  }
  return true;
}

Library discover() {
  Library library;
  std::string first_reason;
  for (const std::string& path : candidates()) {
    std::string why;
    if (open(path, library, why)) return library;
    if (first_reason.empty()) first_reason = why;
  }
  library = {};
  library.info.error = "the compiler NVRTC was not found (" +
                       (first_reason.empty() ? "no libnvrtc.so in FSA_NVRTC_PATH" : first_reason) +
                       "); pip install nvidia-cuda-nvrtc, or set FSA_NVRTC_PATH to the library";
  return library;
}

const Library& library() {
  static const Library found = discover();
  return found;
}

class ProgramOwner {
 public:
  ProgramOwner(const Functions& call, Program program) : call_(call), program_(program) {}
  ~ProgramOwner() { call_.destroy(&program_); }
  ProgramOwner(const ProgramOwner&) = delete;
  ProgramOwner& operator=(const ProgramOwner&) = delete;

 private:
  const Functions& call_;
  Program program_;
};

void require_success(const Functions& call, Result result, const char* what, const std::string& kernel,
                     const std::string& log) {
  if (result == 0) return;
  const char* reason = call.error_string(result);
  throw Error(ErrorCode::internal, std::string(what) + " of " + kernel + ": error " + std::to_string(result) +
                                       " (" + (reason != nullptr ? reason : "unknown") + ")" +
                                       (log.empty() ? "" : "\n" + log));
}

}  // namespace

const NvrtcInfo& nvrtc() { return library().info; }

Compilation compile(const KernelSource& source) {
  if (!nvrtc().error.empty()) throw Error(ErrorCode::device, source.name + ": " + nvrtc().error);
  const Functions& call = library().call;
  std::vector<const char*> texts, names;
  for (const SourceFile& file : source_bundle()) {
    texts.push_back(file.text);
    names.push_back(file.name);
  }
  Program program = nullptr;
  require_success(call,
                  call.create(&program, source.text.c_str(), (source.name + ".cu").c_str(),
                              static_cast<int>(texts.size()), texts.data(), names.data()),
                  "nvrtcCreateProgram", source.name, "");
  const ProgramOwner owner(call, program);

  const std::string arch = "--gpu-architecture=" + source.arch;
  const char* options[] = {arch.c_str(), "--std=c++20", "-default-device", "-lineinfo", "--ptxas-options=-v"};
  const auto start = std::chrono::steady_clock::now();
  const Result result = call.compile(program, std::size(options), options);
  Compilation compiled;
  compiled.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

  std::size_t bytes = 0;
  if (call.log_size(program, &bytes) == 0 && bytes > 1) {
    compiled.log.resize(bytes);
    if (call.log(program, compiled.log.data()) != 0) compiled.log.clear();
    compiled.log.resize(std::min(compiled.log.size(), compiled.log.find('\0')));
  }
  require_success(call, result, "compilation", source.name, compiled.log);
  require_success(call, call.cubin_size(program, &bytes), "nvrtcGetCUBINSize", source.name, "");
  compiled.cubin.resize(bytes);
  require_success(call, call.cubin(program, compiled.cubin.data()), "nvrtcGetCUBIN", source.name, "");
  return compiled;
}

}  // namespace fsa::jit

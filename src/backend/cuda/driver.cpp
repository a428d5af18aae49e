// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/driver.h"

#include <dlfcn.h>

namespace fsa::cuda {
namespace {

// Of the driver API, as documented: results, devices and attributes are ints.
using Result = int;
using DeviceHandle = int;
constexpr Result kSuccess = 0;
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;

struct Functions {
  Result (*initialize)(unsigned flags) = nullptr;
  Result (*driver_version)(int* version) = nullptr;
  Result (*device_count)(int* count) = nullptr;
  Result (*device)(DeviceHandle* device, int ordinal) = nullptr;
  Result (*device_name)(char* name, int bytes, DeviceHandle device) = nullptr;
  Result (*device_attribute)(int* value, int attribute, DeviceHandle device) = nullptr;
  Result (*error_string)(Result result, const char** text) = nullptr;
};

// False, with the reason in `error`, when the symbol is missing.
template <class Function>
bool find(void* library, const char* symbol, Function& function, std::string& error) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
  if (function != nullptr) return true;
  error = std::string("libcuda.so.1 has no symbol ") + symbol;
  return false;
}

bool find_all(void* library, Functions& f, std::string& error) {
  return find(library, "cuInit", f.initialize, error) &&
         find(library, "cuDriverGetVersion", f.driver_version, error) &&
         find(library, "cuDeviceGetCount", f.device_count, error) &&
         find(library, "cuDeviceGet", f.device, error) &&
         find(library, "cuDeviceGetName", f.device_name, error) &&
         find(library, "cuDeviceGetAttribute", f.device_attribute, error) &&
         find(library, "cuGetErrorString", f.error_string, error);
}

bool succeeded(const Functions& f, Result result, const char* call, std::string& error) {
  if (result == kSuccess) return true;
  const char* text = nullptr;
  if (f.error_string(result, &text) != kSuccess || text == nullptr) text = "unknown error";
  error = std::string(call) + " failed with error " + std::to_string(result) + ": " + text;
  return false;
}

bool read_device(const Functions& f, int ordinal, DeviceInfo& info, std::string& error) {
  DeviceHandle device = 0;
  char name[256] = {};
  const bool ok = succeeded(f, f.device(&device, ordinal), "cuDeviceGet", error) &&
                  succeeded(f, f.device_name(name, sizeof(name), device), "cuDeviceGetName", error) &&
                  succeeded(f, f.device_attribute(&info.major, kComputeCapabilityMajor, device),
                            "cuDeviceGetAttribute", error) &&
                  succeeded(f, f.device_attribute(&info.minor, kComputeCapabilityMinor, device),
                            "cuDeviceGetAttribute", error);
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
  Functions f;
  int version = 0, count = 0;
  if (!find_all(library, f, info.error) || !succeeded(f, f.initialize(0), "cuInit", info.error) ||
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
  return info;
}

}  // namespace

const DriverInfo& driver() {
  static const DriverInfo info = discover();
  return info;
}

}  // namespace fsa::cuda

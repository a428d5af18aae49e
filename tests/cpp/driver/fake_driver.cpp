// SPDX-License-Identifier: Apache-2.0
#include "driver/fake_driver.h"

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <set>

#include "backend/cuda/driver.h"

#define FAKE_CUDA extern "C" __attribute__((visibility("default"))) int

namespace fsa::test {

__attribute__((visibility("default"))) FakeDriver& fake_driver() {
  static FakeDriver driver;
  return driver;
}

namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kNotPermittedInCapture = 900;
constexpr int kProgrammaticStreamSerialization = 6;

// Names that stay where they are: the handles of kernels.
void* handle_of(const char* name) {
  static std::set<std::string> names;
  return const_cast<std::string*>(&*names.insert(name).first);
}

int add_launch(const void* kernel, unsigned blocks, unsigned threads, bool early, void** parameters) {
  DriverCall call;
  call.kernel = *static_cast<const std::string*>(kernel);
  call.blocks = blocks;
  call.threads = threads;
  call.early = early;
  // Other kernels have structures, which would have to be told apart.
  if (call.kernel.starts_with("clear_counters"))
    std::memcpy(&call.parameter, parameters[0], sizeof(call.parameter));
  fake_driver().calls.push_back(call);
  return kSuccess;
}

}  // namespace
}  // namespace fsa::test

using namespace fsa::test;
using fsa::cuda::LaunchConfig;

FAKE_CUDA cuInit(unsigned) { return kSuccess; }
FAKE_CUDA cuDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
FAKE_CUDA cuDeviceGetCount(int* count) { return *count = 1, kSuccess; }
FAKE_CUDA cuDeviceGet(int* device, int ordinal) { return *device = ordinal, kSuccess; }
FAKE_CUDA cuDeviceGetName(char* name, int bytes, int) {
  std::snprintf(name, static_cast<std::size_t>(bytes), "no GPU");
  return kSuccess;
}
FAKE_CUDA cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 16:  // processors
      *value = 132;
      return kSuccess;
    case 75:  // compute capability
      *value = 9;
      return kSuccess;
    case 76:
      *value = 0;
      return kSuccess;
    case 97:  // most shared memory of a block
      *value = 227 * 1024;
      return kSuccess;
    default:
      return kInvalidValue;
  }
}
FAKE_CUDA cuGetErrorString(int, const char** text) { return *text = "an error of the fake driver", kSuccess; }
FAKE_CUDA cuCtxGetDevice(int* device) { return *device = 0, kSuccess; }
FAKE_CUDA cuDevicePrimaryCtxRetain(void**, int) { return kSuccess; }
FAKE_CUDA cuCtxPushCurrent_v2(void*) { return kSuccess; }
FAKE_CUDA cuCtxPopCurrent_v2(void**) { return kSuccess; }
FAKE_CUDA cuStreamIsCapturing(void*, int* status) { return *status = fake_driver().capturing, kSuccess; }
FAKE_CUDA cuLibraryLoadData(void** library, const void* image, int*, void**, unsigned, int*, void**,
                            unsigned) {
  if (fake_driver().capturing) return kNotPermittedInCapture;
  const char* name = static_cast<const char*>(image);
  fake_driver().loaded.push_back(name);
  return *library = handle_of(name), kSuccess;
}
FAKE_CUDA cuLibraryGetKernel(void** kernel, void* library, const char*) {
  return *kernel = library, kSuccess;
}
FAKE_CUDA cuLibraryUnload(void*) { return kSuccess; }
FAKE_CUDA cuKernelGetFunction(void** function, void* kernel) { return *function = kernel, kSuccess; }
FAKE_CUDA cuKernelSetAttribute(int, int, void*, int) { return kSuccess; }
FAKE_CUDA cuMemsetD8Async(std::uint64_t address, unsigned char, std::size_t count, void*) {
  DriverCall call;
  call.parameter = reinterpret_cast<const void*>(address);
  call.bytes = count;
  fake_driver().calls.push_back(call);
  return kSuccess;
}
FAKE_CUDA cuTensorMapEncodeTiled(void*, int, unsigned, void*, const std::uint64_t*, const std::uint64_t*,
                                 const std::uint32_t*, const std::uint32_t*, int, int, int, int) {
  return kSuccess;
}
FAKE_CUDA cuLaunchKernel(void* kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned,
                         unsigned, unsigned, void*, void** parameters, void**) {
  return add_launch(kernel, x * y * z, threads, false, parameters);
}
FAKE_CUDA cuLaunchKernelEx(const LaunchConfig* config, void* kernel, void** parameters, void**) {
  bool early = false;
  for (unsigned i = 0; i < config->attribute_count; ++i)
    early = early || (config->attributes[i].kind == kProgrammaticStreamSerialization &&
                      config->attributes[i].value[0] == 1);
  return add_launch(kernel, config->grid[0] * config->grid[1] * config->grid[2], config->block[0], early,
                    parameters);
}

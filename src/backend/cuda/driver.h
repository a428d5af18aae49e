// SPDX-License-Identifier: Apache-2.0
// The CUDA driver, found at run time: no CUDA header or library is needed to build, nor to run without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fsa::cuda {

// Of the driver API, as documented. Results, devices and attributes are ints there; handles are pointers.
using Result = int;
using DeviceHandle = int;
using Context = void*;
using Stream = void*;
using Library = void*;
using Kernel = void*;  // CUkernel: of no context; a launch takes it where a CUfunction is meant
using Address = std::uint64_t;

struct LaunchAttribute {
  int kind;
  int reserved;
  alignas(8) unsigned char value[64];
};
struct LaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

struct Functions {
  Result (*initialize)(unsigned flags) = nullptr;
  Result (*driver_version)(int* version) = nullptr;
  Result (*device_count)(int* count) = nullptr;
  Result (*device)(DeviceHandle* device, int ordinal) = nullptr;
  Result (*device_name)(char* name, int bytes, DeviceHandle device) = nullptr;
  Result (*device_attribute)(int* value, int attribute, DeviceHandle device) = nullptr;
  Result (*error_string)(Result result, const char** text) = nullptr;

  Result (*context_device)(DeviceHandle* device) = nullptr;
  Result (*primary_context)(Context* context, DeviceHandle device) = nullptr;
  Result (*push_context)(Context context) = nullptr;
  Result (*pop_context)(Context* context) = nullptr;
  Result (*stream_is_capturing)(Stream stream, int* status) = nullptr;

  Result (*load_library)(Library* library, const void* image, int* jit_options, void** jit_values,
                         unsigned jit_count, int* options, void** values, unsigned count) = nullptr;
  Result (*library_kernel)(Kernel* kernel, Library library, const char* name) = nullptr;
  Result (*unload_library)(Library library) = nullptr;
  Result (*kernel_function)(void** function, Kernel kernel) = nullptr;
  Result (*set_kernel_attribute)(int attribute, int value, Kernel kernel, DeviceHandle device) = nullptr;

  Result (*fill_bytes)(Address address, unsigned char value, std::size_t count, Stream stream) = nullptr;
  Result (*encode_tensor_map)(void* map, int type, unsigned rank, void* address, const std::uint64_t* extents,
                              const std::uint64_t* pitches, const std::uint32_t* box,
                              const std::uint32_t* element_strides, int interleave, int swizzle,
                              int promotion, int fill) = nullptr;
  Result (*launch)(Kernel kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream stream,
                   void** parameters, void** extra) = nullptr;
  Result (*launch_with)(const LaunchConfig* config, Kernel kernel, void** parameters, void** extra) = nullptr;
};

struct DeviceInfo {
  std::string name;
  int major = 0;  // compute capability
  int minor = 0;
  int processors = 0;
  int shared_bytes = 0;  // most that one block may ask for
};

struct DriverInfo {
  int version = 0;  // 13000 for 13.0; 0 when there is no usable driver
  std::vector<DeviceInfo> devices;
  std::string error;  // why there is no usable device; empty when there is one
  Functions call;     // complete when `error` is empty
};

// Loads and initialises the driver on the first call, so only calls that ask about CUDA pay for it.
const DriverInfo& driver();

// Throws fsa::Error unless the result is success.
void require_success(Result result, const char* call);

// Makes a device current for as long as it lives, and does nothing when its context is current already.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  bool pushed_ = false;
};

}  // namespace fsa::cuda

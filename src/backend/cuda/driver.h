// SPDX-License-Identifier: Apache-2.0
// The CUDA driver, found at run time: no CUDA header or library is needed to build, nor to run without a GPU.
#pragma once

#include <string>
#include <vector>

namespace fsa::cuda {

struct DeviceInfo {
  std::string name;
  int major = 0;  // compute capability
  int minor = 0;
};

struct DriverInfo {
  int version = 0;  // 13000 for 13.0; 0 when there is no usable driver
  std::vector<DeviceInfo> devices;
  std::string error;  // why there is no usable device; empty when there is one
};

// Loads and initialises the driver on the first call, so only calls that ask about CUDA pay for it.
const DriverInfo& driver();

}  // namespace fsa::cuda

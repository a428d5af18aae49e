// SPDX-License-Identifier: Apache-2.0
// Kernels that are ready to launch, per device.
#pragma once

#include "backend/cuda/driver.h"
#include "backend/cuda/kernel_config.h"

namespace fsa::cuda {

struct LoadedKernel {
  Kernel kernel = nullptr;
  unsigned threads = 0;
  unsigned shared_bytes = 0;
};

// The first call for a kernel and device gets it from a pack, the disk cache or the compiler and loads it, which
// a stream that is being captured into a graph forbids: then, fsa::Error names the kernel and what to do. The
// device must be current. Later calls are a lookup.
const LoadedKernel& loaded_kernel(const KernelConfig& config, int device, Stream stream);

}  // namespace fsa::cuda

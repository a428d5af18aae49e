// SPDX-License-Identifier: Apache-2.0
// NVRTC, found at run time. No CUDA header or toolkit is needed to build; without the library, kernels come from
// packs and the disk cache.
//
// Where it is looked for, in this order:
//   1. FSA_NVRTC_PATH: the library, or the folder that holds it; nothing else is tried then;
//   2. a libnvrtc that the process has already loaded;
//   3. nvidia/cu13/lib and nvidia/cuda_nvrtc/lib of every site-packages folder from which the process has loaded
//      a library: the CUDA packages that PyTorch depends on;
//   4. the system: the dynamic linker's own search, then /usr/local/cuda.
#pragma once

#include <string>

#include "jit/kernel_source.h"

namespace fsa::jit {

struct NvrtcInfo {
  std::string path;
  int version = 0;    // 13000 for 13.0
  std::string error;  // why there is none, and what to do; empty when there is one
};

// Loads the library on the first call.
const NvrtcInfo& nvrtc();

struct Compilation {
  std::string cubin;
  std::string log;  // ends with the assembler's resource report
  double seconds = 0;
};

// Needs no GPU. Throws fsa::Error: with nvrtc().error, or with the compiler's whole log.
Compilation compile(const KernelSource& source);

}  // namespace fsa::jit

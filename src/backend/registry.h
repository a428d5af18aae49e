// SPDX-License-Identifier: Apache-2.0
// The backends of this build. Only registry.cpp names them one by one.
#pragma once

#include "backend/backend.h"

namespace fsa {

const Backend& cuda_backend();       // src/backend/cuda/cuda_backend.cpp, with FSA_WITH_CUDA
const Backend& cpu_backend();        // src/backend/cpu/cpu_backend.cpp
const Backend& reference_backend();  // src/backend/cpu/reference.cpp

}  // namespace fsa

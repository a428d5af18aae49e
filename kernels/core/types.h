// SPDX-License-Identifier: Apache-2.0
// Fixed-width names for code that NVRTC compiles without any system header.
#pragma once

namespace fsa::kernels {

using int32 = int;
using int64 = long long;
using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

static_assert(sizeof(int32) == 4 && sizeof(int64) == 8, "fixed-width aliases must have their width");

}  // namespace fsa::kernels

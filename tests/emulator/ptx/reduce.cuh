// SPDX-License-Identifier: Apache-2.0
// kernels/ptx/reduce.cuh on the CPU.
#pragma once

#include "core/base.cuh"

namespace fsa::kernels::ptx {

inline void add_bytes(float* to, const void* shared, int32 bytes) {
  const std::lock_guard lock(emulator::memory);
  for (int32 i = 0; i < bytes / 4; ++i) to[i] += static_cast<const float*>(shared)[i];
}
inline void add_four(float* to, float a, float b, float c, float d) {
  const float values[4] = {a, b, c, d};
  add_bytes(to, values, 16);
}
inline void fence_async_global() {}
inline void fence_global() {}
inline int32 load_relaxed(const int32* from) {
  const std::lock_guard lock(emulator::memory);
  return *from;
}
inline int32 load_acquire(const int32* from) { return load_relaxed(from); }
inline void wait_until_equal(const int32* counter, int32 value) {
  emulator::poll([&] { return *counter == value; });
}
inline void add_release(int32* counter, int32 value) { atomicAdd(counter, value); }

}  // namespace fsa::kernels::ptx

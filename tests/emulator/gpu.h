// SPDX-License-Identifier: Apache-2.0
// Runs the device code of kernels/ on the CPU: a thread for each thread of a block, blocks one after the other.
// This file comes first (-include), then the headers of kernels/ as they are, with FSA_EMULATED; only those of
// kernels/ptx/ give way to the ones beside this file (-iquote).
//
// It shows that the arithmetic, the layouts and the order of barriers are right, and that what a kernel launched early
// needs of the one before is waited for. Asynchronous instructions are done at once, so it does not show a missing wait
// for one.
#pragma once

#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __shared__ static

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline thread_local Dim3 threadIdx, blockIdx;
inline Dim3 gridDim, blockDim;

namespace fsa::emulator {

inline constexpr int kWarp = 32;
inline constexpr int kMaxWarps = 32;

// Dynamic shared memory; shared addresses count from its start.
alignas(1024) inline unsigned char shared_memory[256 * 1024];

// What lanes of a warp exchange, and where they meet.
struct Warp {
  std::unique_ptr<std::barrier<>> meet;
  unsigned long long slot[kWarp];
  unsigned registers[4][kWarp];
};
inline Warp warps[kMaxWarps];
inline std::unique_ptr<std::barrier<>> block_meet;
inline std::mutex memory;  // of everything that is atomic

inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
inline Warp& warp() { return warps[threadIdx.x / kWarp]; }
inline void sync_warp() { warp().meet->arrive_and_wait(); }

// The value of another lane.
template <class T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(&warp().slot[lane()], &value, sizeof(T));
  sync_warp();
  T other;
  std::memcpy(&other, &warp().slot[from], sizeof(T));
  sync_warp();
  return other;
}

struct NamedBarrier {
  std::mutex mutex;
  std::condition_variable open;
  int arrived = 0;
  std::atomic<bool> any = false;  // of those who vote
  unsigned generation = 0;

  void sync(int threads) {
    std::unique_lock lock(mutex);
    const unsigned mine = generation;
    if (++arrived == threads) {
      arrived = 0;
      ++generation;
      open.notify_all();
    } else {
      open.wait(lock, [&] { return generation != mine; });
    }
  }
};
inline NamedBarrier named_barriers[16];

// Waits for a condition that is checked under the lock of atomics; a wait that lasts is a deadlock.
template <class Condition>
void poll(Condition condition) {
  for (int i = 0; i < 2'000'000; ++i) {
    {
      const std::lock_guard lock(memory);
      if (condition()) return;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  std::abort();
}

inline void launch(Dim3 grid, int threads, const std::function<void()>& kernel) {
  gridDim = grid;
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        for (int w = 0; w < threads / kWarp; ++w) warps[w].meet = std::make_unique<std::barrier<>>(kWarp);
        block_meet = std::make_unique<std::barrier<>>(threads);
        std::vector<std::jthread> running;
        for (int t = 0; t < threads; ++t)
          running.emplace_back([&, t, x, y, z] {
            threadIdx = {static_cast<unsigned>(t), 0, 0};
            blockIdx = {x, y, z};
            kernel();
            block_meet->arrive_and_drop();  // who has left is not waited for
            warp().meet->arrive_and_drop();
          });
      }
}

// Of one block, whose threads do not meet. As late as can be: it runs when a thread first waits for it.
struct KernelBefore {
  int threads;
  std::function<void()> kernel;
  std::set<unsigned> waited;  // blocks (x) of the kernel after it
};
inline KernelBefore* kernel_before = nullptr;  // of a kernel that was launched early

inline void wait_for_kernel_before() {
  if (kernel_before == nullptr) return;
  const std::lock_guard lock(memory);
  const bool first = kernel_before->waited.empty();
  kernel_before->waited.insert(blockIdx.x);
  if (!first) return;
  const Dim3 mine = threadIdx;
  for (int t = 0; t < kernel_before->threads; ++t) {
    threadIdx = {static_cast<unsigned>(t), 0, 0};
    kernel_before->kernel();
  }
  threadIdx = mine;
}

inline void launch_early(Dim3 grid, int threads, const std::function<void()>& kernel, KernelBefore& before) {
  kernel_before = &before;
  launch(grid, threads, kernel);
  kernel_before = nullptr;
}

}  // namespace fsa::emulator

inline void __syncwarp() { fsa::emulator::sync_warp(); }
inline void __syncthreads() { fsa::emulator::block_meet->arrive_and_wait(); }
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return fsa::emulator::exchange(value, from % fsa::emulator::kWarp);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return fsa::emulator::exchange(value, fsa::emulator::lane() ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  using namespace fsa::emulator;
  warp().slot[lane()] = vote;
  sync_warp();
  unsigned votes = 0;
  for (int i = 0; i < kWarp; ++i) votes |= static_cast<unsigned>(warp().slot[i]) << i;
  sync_warp();
  return votes;
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned by) {
  const int from = fsa::emulator::lane() + static_cast<int>(by);
  return fsa::emulator::exchange(value, from < fsa::emulator::kWarp ? from : fsa::emulator::lane());
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == ~0u; }
template <class Combine>
int reduce_warp(int value, Combine combine) {
  for (int distance = 1; distance < fsa::emulator::kWarp; distance *= 2)
    value = combine(value, __shfl_xor_sync(~0u, value, distance));
  return value;
}
inline int __reduce_add_sync(unsigned, int value) {
  return reduce_warp(value, [](int a, int b) { return a + b; });
}
inline int __reduce_max_sync(unsigned, int value) {
  return reduce_warp(value, [](int a, int b) { return a < b ? b : a; });
}
template <class T>
T atomicAdd(T* to, T value) {
  const std::lock_guard lock(fsa::emulator::memory);
  const T before = *to;
  *to += value;
  return before;
}
inline int atomicOr(int* to, int value) {
  const std::lock_guard lock(fsa::emulator::memory);
  const int before = *to;
  *to |= value;
  return before;
}
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1; }
inline unsigned long long __cvta_generic_to_shared(const void* pointer) {
  return static_cast<unsigned long long>(static_cast<const unsigned char*>(pointer) -
                                         fsa::emulator::shared_memory);
}

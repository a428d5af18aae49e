// SPDX-License-Identifier: Apache-2.0
// kernels/ptx/tma.cuh on the CPU: boxes of 64 columns of 2-byte elements, 128-byte swizzle.
#pragma once

#include "core/params.h"
#include "ptx/mbarrier.cuh"

namespace fsa::kernels::ptx {

struct BoxOrigin {
  int32 column;
  int32 row;
  int32 head;
  int32 batch;
};

// What the emulator keeps in a TensorMap: column, row, head, batch.
struct TensorShape {
  uint16* data;
  int64 size[4];
  int64 stride[4];
  int32 box_rows;
};
static_assert(sizeof(TensorShape) <= sizeof(TensorMap));

inline TensorMap tensor_map(const TensorShape& shape) {
  TensorMap map = {};
  std::memcpy(&map, &shape, sizeof(shape));
  return map;
}

// f(element in global memory or null, element in shared memory). Returns the bytes of the box.
template <class Function>
int32 each_element(const TensorMap& map, const BoxOrigin& origin, const void* shared, Function f) {
  TensorShape shape;
  std::memcpy(&shape, &map, sizeof(shape));
  const int64 base = static_cast<const uint8*>(shared) - emulator::shared_memory;
  for (int32 row = 0; row < shape.box_rows; ++row)
    for (int32 column = 0; column < 64; ++column) {
      const int64 index[4] = {origin.column + column, origin.row + row, origin.head, origin.batch};
      uint16* element = shape.data;
      for (int32 i = 0; i < 4 && element; ++i)
        element = index[i] >= 0 && index[i] < shape.size[i] ? element + index[i] * shape.stride[i] : nullptr;
      const int64 address = base + row * 128 + column * 2;
      f(element, emulator::shared_memory + (address ^ (address >> 7 & 7) << 4));
    }
  return shape.box_rows * 64 * 2;
}

inline void prefetch(const TensorMap&) {}
inline void load_box(void* shared, const TensorMap& map, const BoxOrigin& origin, Mbarrier& full) {
  const int32 bytes = each_element(map, origin, shared, [](const uint16* from, uint8* to) {
    const uint16 value = from ? *from : 0;
    std::memcpy(to, &value, 2);
  });
  bytes_arrived(full, bytes);
}
inline void load_bytes(void* shared, const void* global, int32 bytes, Mbarrier& full) {
  std::memcpy(shared, global, static_cast<std::size_t>(bytes));
  bytes_arrived(full, bytes);
}
inline void store_box(const TensorMap& map, const BoxOrigin& origin, const void* shared) {
  each_element(map, origin, shared, [](uint16* to, const uint8* from) {
    if (to) std::memcpy(to, from, 2);
  });
}
inline void store_bytes(void* to, const void* shared, int32 bytes) {
  const std::lock_guard lock(emulator::memory);
  std::memcpy(to, shared, static_cast<std::size_t>(bytes));
}
inline void commit_stores() {}
inline void wait_stores() {}
inline void wait_stores_read() {}

}  // namespace fsa::kernels::ptx

// SPDX-License-Identifier: Apache-2.0
// The copy engine: boxes of a four-dimensional tensor to and from shared memory.
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

FSA_DEVICE void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

FSA_DEVICE void load_box(void* shared, const TensorMap& map, const BoxOrigin& origin, Mbarrier& full) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(origin.column), "r"(origin.row), "r"(origin.head), "r"(origin.batch),
      "r"(shared_address(&full))
      : "memory");
}

// Contiguous bytes; both addresses and the size are multiples of 16.
FSA_DEVICE void load_bytes(void* shared, const void* global, int32 bytes, Mbarrier& full) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(&full))
      : "memory");
}

FSA_DEVICE void store_box(const TensorMap& map, const BoxOrigin& origin, const void* shared) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
      "r"(origin.column), "r"(origin.row), "r"(origin.head), "r"(origin.batch), "r"(shared_address(shared))
      : "memory");
}

// Contiguous bytes; addresses and size are multiples of 16. Part of the thread's next group of stores.
FSA_DEVICE void store_bytes(void* to, const void* shared, int32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

FSA_DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until this thread's stores are complete.
FSA_DEVICE void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Until the copy engine has read the shared memory of this thread's stores.
FSA_DEVICE void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

}  // namespace fsa::kernels::ptx

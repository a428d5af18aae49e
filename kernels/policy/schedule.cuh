// SPDX-License-Identifier: Apache-2.0
// Which CTA computes which work tile: a counter in global memory hands them out, longest first. Without a
// counter each CTA takes every gridDim.x-th: for calls that have hardly more tiles than CTAs.
//
// The first work tile of a CTA is its own number. The counter may still be on its way to zero then: the kernel that
// clears it (common/clear_counters.cuh) is waited for before the second, by the thread that takes it. Every CTA takes a
// second one, if only to learn that there is none, so that none touches the counters without having waited.
//
// Heads are taken in waves whose keys and values fit the L2 together; within a wave row tiles run from the
// last (the longest when causal) to the first, and heads fastest, so CTAs that run at one time share what
// they read.
#pragma once

#include "policy/work_tile.cuh"
#include "ptx/sync.cuh"

namespace fsa::kernels {

// All of a work tile but its rows and segments.
FSA_DEVICE void describe_sequence(const ForwardParams& params, int32 sequence, int32 head, WorkTile& work) {
  work.sequence = sequence;
  work.head = head;
  work.kv_head = head / params.group_size;
  work.q_map_batch = params.cu_seqlens_q ? 0 : sequence;
  work.k_map_batch = params.cu_seqlens_k ? 0 : sequence;
  work.q_begin = params.cu_seqlens_q ? params.cu_seqlens_q[sequence] : 0;
  work.k_begin = params.cu_seqlens_k ? params.cu_seqlens_k[sequence] : 0;
  work.rows = params.cu_seqlens_q ? params.cu_seqlens_q[sequence + 1] - work.q_begin : params.max_seqlen_q;
  const int32 keys =
      params.cu_seqlens_k ? params.cu_seqlens_k[sequence + 1] - work.k_begin : params.max_seqlen_k;
  work.seqlen_q = params.seqused_q ? params.seqused_q[sequence] : work.rows;
  work.seqlen_k = params.seqused_k ? params.seqused_k[sequence] : keys;
}

template <int32 kBlockM>
class LongestFirst {
 public:
  static constexpr bool kByWarp = false;  // next() is for one thread

  FSA_DEVICE explicit LongestFirst(const ForwardParams&) {}

  // False when there is no more; otherwise everything but the segments is filled in.
  FSA_DEVICE bool next(const ForwardParams& params, WorkTile& work) {
    do {
      take(params);
      if (index_ >= count(params)) return false;
    } while (!describe(params, index_, work));
    return true;
  }

  // The last CTA leaves the counters as it found them: zero.
  FSA_DEVICE static void finish(const ForwardParams& params) {
    if (params.work_counter == nullptr) return;
    if (atomicAdd(params.work_counter + 1, 1) == static_cast<int32>(gridDim.x) - 1) {
      params.work_counter[0] = 0;
      params.work_counter[1] = 0;
    }
  }

 protected:
  FSA_DEVICE void take(const ForwardParams& params) {
    const int32 ctas = static_cast<int32>(gridDim.x);
    if (index_ < 0) {
      index_ = static_cast<int32>(blockIdx.x);
    } else if (params.work_counter == nullptr) {
      index_ += ctas;
    } else {
      if (index_ < ctas) ptx::wait_for_kernel_before();  // no later index is one of the first
      index_ = ctas + atomicAdd(params.work_counter, 1);
    }
  }

  // Recomputed, not kept: the producer has few registers.
  FSA_DEVICE static int32 blocks(const ForwardParams& params) {
    return ceil_div(params.max_seqlen_q, kBlockM);
  }
  FSA_DEVICE static int32 heads(const ForwardParams& params) { return params.batch * params.num_heads; }

  FSA_DEVICE static int32 count(const ForwardParams& params) { return blocks(params) * heads(params); }

  // Of the batch's heads, and the tile's first row.
  FSA_DEVICE static int32 head_of(const ForwardParams& params, int32 index, int32& m_begin) {
    const int32 wave = index / (params.heads_per_wave * blocks(params));
    const int32 first_head = wave * params.heads_per_wave;
    const int32 wave_heads = min_of(params.heads_per_wave, heads(params) - first_head);
    const int32 in_wave = index - first_head * blocks(params);
    m_begin = (blocks(params) - 1 - in_wave / wave_heads) * kBlockM;
    return first_head + in_wave % wave_heads;
  }

  FSA_DEVICE static bool describe(const ForwardParams& params, int32 index, WorkTile& work) {
    const int32 batch_head = head_of(params, index, work.m_begin);
    const int32 sequence = batch_head / params.num_heads;
    describe_sequence(params, sequence, batch_head - sequence * params.num_heads, work);
    return work.m_begin < work.rows;
  }

  int32 index_ = -1;
};

}  // namespace fsa::kernels

// SPDX-License-Identifier: Apache-2.0
// Output tile and lse of one warpgroup: 64 rows.
#pragma once

#include "policy/online_softmax.cuh"
#include "policy/scalar.cuh"
#include "policy/work_tile.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"
#include "tile/swizzle.cuh"

namespace fsa::kernels {

struct NoSink {
  FSA_DEVICE static void absorb(const ForwardParams&, const WorkTile&, OnlineSoftmax&, float) {}
  FSA_DEVICE static float empty_lse(const ForwardParams&, const WorkTile&) { return -kInfinity; }
};

// One more logit per head that no value belongs to: a term of the denominator, so of lse too.
struct LearnableSink {
  FSA_DEVICE static void absorb(const ForwardParams& params, const WorkTile& work, OnlineSoftmax& softmax,
                                float scale) {
    softmax.add_term(load_scalar(params.sink, 0, 0, work.head) / kLn2, scale);
  }
  FSA_DEVICE static float empty_lse(const ForwardParams& params, const WorkTile& work) {
    return load_scalar(params.sink, 0, 0, work.head);
  }
};

inline constexpr int32 kLineUnits = kLineBytes / kUnitBytes;

template <class Sink>
struct StoreOutput {
  // What the thread's two rows of O are multiplied by; negative for a row that is zero whatever O holds.
  struct Factors {
    float of[kRowsPerThread];
  };

  // Writes lse, with which the softmax ends.
  FSA_DEVICE static Factors close(const ForwardParams& params, const WorkTile& work, int32 row_begin,
                                  OnlineSoftmax& softmax, float scale) {
    const int32 thread = warpgroup_thread();
    softmax.finish();
    Sink::absorb(params, work, softmax, scale);
    write_lse(params, work, row_begin, thread, softmax, scale);
    Factors factors;
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
      const bool empty = softmax.row_sum[slot] == 0 || !used(work, row_begin + fragment_row(thread, slot));
      factors.of[slot] = empty ? -1.0f : softmax.factor[slot] * ptx::reciprocal_approx(softmax.row_sum[slot]);
    }
    return factors;
  }

  // The same with these sums of the keys' p in place of the float32 ones.
  FSA_DEVICE static void divide_by(Factors& factors, const OnlineSoftmax& softmax,
                                   const OnlineSoftmax::RowPair& sums) {
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
      const float sum = softmax.factor[slot] * sums.of[slot] + softmax.added[slot];
      if (factors.of[slot] >= 0) factors.of[slot] = softmax.factor[slot] * ptx::reciprocal_approx(sum);
    }
  }

  // Where a warpgroup stages its rows: `shared` is the first of its rows in a tile of kTileRows rows. It may
  // be overwritten after wait_staging().
  template <ElementType kElement, int32 kTileRows, int32 kColumns>
  FSA_DEVICE static void store(const ForwardParams& params, const WorkTile& work, int32 row_begin,
                               uint8* shared, int32 barrier, float (&rO)[kColumns / 2],
                               const Factors& factors) {
    using Tile = SwizzledTile<kTileRows, round_up(kColumns, kChunkColumns)>;
    const int32 thread = warpgroup_thread();
    if (__any_sync(0xffffffffu, factors.of[0] < 0 || factors.of[1] < 0)) {  // unused query rows may hold NaN
#pragma unroll
      for (int32 i = 0; i < kColumns / 2; ++i) rO[i] = factors.of[fragment_slot(i)] < 0 ? 0.0f : rO[i];
    }
#pragma unroll
    for (int32 i = 0; i < kColumns / 2; ++i) rO[i] *= factors.of[fragment_slot(i)];

    // No thread may overwrite query rows that another warp's multiply still reads.
    ptx::barrier_sync(barrier, kWarpgroupThreads);
    const int32 lane = thread % kWarpThreads;
    const int32 row = thread / kWarpThreads * 16 + lane % 16;
    // Two units further is a flipped bit of the address, as chunks start at multiples of their lines.
    const uint32 first = shared_address(shared) + Tile::unit_offset(row, lane / 16);
#pragma unroll
    for (int32 i = 0; i < kColumns / 2; i += 8)
      ptx::store_matrices((first ^ i / 4 % kLineUnits * kUnitBytes) + i / 4 / kLineUnits * Tile::kChunkBytes,
                          ptx::pack<kElement>(rO[i], rO[i + 1]), ptx::pack<kElement>(rO[i + 2], rO[i + 3]),
                          ptx::pack<kElement>(rO[i + 4], rO[i + 5]),
                          ptx::pack<kElement>(rO[i + 6], rO[i + 7]));
    ptx::fence_shared_for_async();
    ptx::barrier_sync(barrier, kWarpgroupThreads);

    const int32 rows = work.rows - (work.m_begin + row_begin);
    if (rows >= kRowsPerWarpgroup) {
      if (thread == 0) {
#pragma unroll
        for (int32 chunk = 0; chunk < Tile::kChunks; ++chunk)
          ptx::store_box(
              params.out_map,
              {chunk * kChunkColumns, work.q_begin + work.m_begin + row_begin, work.head, work.q_map_batch},
              shared + chunk * Tile::kChunkBytes);
        ptx::commit_stores();
      }
    } else {  // a box would overrun into the next sequence
      constexpr int32 kUnits = kColumns / 8;
      const int32 units = params.head_dim_v / 8;
      for (int32 item = thread; item < rows * kUnits; item += kWarpgroupThreads) {
        const int32 unit = item % kUnits;
        if (unit >= units) continue;
        *reinterpret_cast<uint4*>(out_row(params, work, row_begin + item / kUnits) + unit * 8) =
            *reinterpret_cast<const uint4*>(shared + Tile::unit_offset(item / kUnits, unit));
      }
      ptx::fence_shared_for_async();
      ptx::barrier_sync(barrier, kWarpgroupThreads);
    }
  }

  // The thread that issued the stores.
  FSA_DEVICE static void wait_staging() { ptx::wait_stores_read(); }

  // A tile in which no row sees a key: out 0, lse -inf or the sink.
  FSA_DEVICE static void finish_empty(const ForwardParams& params, const WorkTile& work, int32 row_begin) {
    const int32 thread = warpgroup_thread();
    const int32 rows = min_of(work.rows - (work.m_begin + row_begin), kRowsPerWarpgroup);
    const int32 units = params.head_dim_v / 8;
    for (int32 item = thread; item < rows * units; item += kWarpgroupThreads)
      *reinterpret_cast<uint4*>(out_row(params, work, row_begin + item / units) + item % units * 8) =
          make_uint4(0, 0, 0, 0);
    if (thread < rows && params.lse != nullptr)
      *lse_row(params, work, row_begin + thread) =
          used(work, row_begin + thread) ? Sink::empty_lse(params, work) : -kInfinity;
  }

  // Rows of a packed tensor behind its last sequence. One warp of each CTA.
  FSA_DEVICE static void clear_tail(const ForwardParams& params) {
    if (params.cu_seqlens_q == nullptr) return;
    const int32 units = params.head_dim_v / 8;
    for (int32 row = params.cu_seqlens_q[params.batch] + static_cast<int32>(blockIdx.x);
         row < params.total_rows_q; row += static_cast<int32>(gridDim.x))
      for (int32 head = 0; head < params.num_heads; ++head) {
        uint16* const out = static_cast<uint16*>(params.out) +
                            static_cast<int64>(row) * params.out_stride_row + head * params.out_stride_head;
        for (int32 unit = lane_id(); unit < units; unit += kWarpThreads)
          *reinterpret_cast<uint4*>(out + unit * 8) = make_uint4(0, 0, 0, 0);
        if (lane_id() == 0 && params.lse != nullptr)
          params.lse[head * params.lse_stride_head + row] = -kInfinity;
      }
  }

 private:
  // Rows beyond the used length are written too, as rows without a key.
  FSA_DEVICE static bool used(const WorkTile& work, int32 row) { return work.m_begin + row < work.seqlen_q; }

  FSA_DEVICE static void write_lse(const ForwardParams& params, const WorkTile& work, int32 row_begin,
                                   int32 thread, const OnlineSoftmax& softmax, float scale) {
    const int32 first = row_begin + fragment_row(thread, 0);
    float values[kRowsPerThread];
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot)
      values[slot] = used(work, first + 8 * slot) ? softmax.lse(slot, scale) : -kInfinity;
    if (thread % 4 != 0 || params.lse == nullptr) return;
    float* const lse = lse_row(params, work, first);
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot)
      if (work.m_begin + first + 8 * slot < work.rows) lse[8 * slot] = values[slot];
  }

  FSA_DEVICE static uint16* out_row(const ForwardParams& params, const WorkTile& work, int32 row) {
    return static_cast<uint16*>(params.out) + work.q_map_batch * params.out_stride_batch +
           (static_cast<int64>(work.q_begin) + work.m_begin + row) * params.out_stride_row +
           work.head * params.out_stride_head;
  }

  FSA_DEVICE static float* lse_row(const ForwardParams& params, const WorkTile& work, int32 row) {
    return params.lse + work.q_map_batch * params.lse_stride_batch + work.head * params.lse_stride_head +
           work.q_begin + work.m_begin + row;
  }
};

}  // namespace fsa::kernels

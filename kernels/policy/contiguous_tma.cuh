// SPDX-License-Identifier: Apache-2.0
// Tiles of tensors whose rows lie at a constant stride (batched or packed), fetched by the copy engine.
#pragma once

#include "policy/gate_terms.cuh"
#include "policy/work_tile.cuh"
#include "ptx/tma.cuh"
#include "tile/swizzle.cuh"

namespace fsa::kernels {

struct ContiguousTma {
  static constexpr bool kUsesTma = true;

  FSA_DEVICE static void prefetch(const ForwardParams& params) {
    ptx::prefetch(params.query_map);
    ptx::prefetch(params.key_map);
    ptx::prefetch(params.value_map);
    ptx::prefetch(params.out_map);
  }

  // The bytes that arrive on `full` are announced by the caller. Query boxes have 64 rows, so that one map
  // serves every block_m.
  template <int32 kRows, int32 kColumns>
  FSA_DEVICE static void load_query(const ForwardParams& params, const WorkTile& work, uint8* shared,
                                    ptx::Mbarrier& full) {
    using Tile = SwizzledTile<kRows, kColumns>;
#pragma unroll
    for (int32 row = 0; row < kRows; row += kRowsPerWarpgroup)
#pragma unroll
      for (int32 chunk = 0; chunk < Tile::kChunks; ++chunk)
        ptx::load_box(shared + chunk * Tile::kChunkBytes + row * kLineBytes, params.query_map,
                      {chunk * kChunkColumns, work.q_begin + work.m_begin + row, work.head, work.q_map_batch},
                      full);
  }

  template <int32 kRows, int32 kColumns>
  FSA_DEVICE static void load_key(const ForwardParams& params, const WorkTile& work, int32 tile,
                                  uint8* shared, ptx::Mbarrier& full) {
    load<SwizzledTile<kRows, kColumns>>(params.key_map, work, tile * kRows, shared, full);
  }

  template <int32 kRows, int32 kColumns>
  FSA_DEVICE static void load_value(const ForwardParams& params, const WorkTile& work, int32 tile,
                                    uint8* shared, ptx::Mbarrier& full) {
    load<SwizzledTile<kRows, kColumns>>(params.value_map, work, tile * kRows, shared, full);
  }

  // One float per key of the tile, as gate_prepare laid them out.
  template <int32 kRows>
  FSA_DEVICE static void load_key_scalars(const ForwardParams& params, const WorkTile& work, int32 tile,
                                          float* shared, ptx::Mbarrier& full) {
    ptx::load_bytes(shared, params.gate_delta + first_scalar<kRows>(params, work, tile), kRows * 4, full);
  }

  template <int32 kRows>
  FSA_DEVICE static void load_gate_terms(const ForwardParams& params, const WorkTile& work, int32 tile,
                                         GateTermTile<kRows>& shared, ptx::Mbarrier& full) {
    ptx::load_bytes(
        &shared, params.gate_terms + first_scalar<kRows>(params, work, tile) / kRows * gate_term_bytes(kRows),
        gate_term_bytes(kRows), full);
  }

 private:
  // Where a key tile begins in gate_delta.
  template <int32 kRows>
  FSA_DEVICE static int64 first_scalar(const ForwardParams& params, const WorkTile& work, int32 tile) {
    const int64 first = params.cu_seqlens_k ? work.k_begin / kRows + work.sequence : 0;
    return work.k_map_batch * params.gate_delta_stride_batch + work.kv_head * params.gate_delta_stride_head +
           (first + tile) * kRows;
  }

  template <class Tile>
  FSA_DEVICE static void load(const TensorMap& map, const WorkTile& work, int32 key, uint8* shared,
                              ptx::Mbarrier& full) {
#pragma unroll
    for (int32 chunk = 0; chunk < Tile::kChunks; ++chunk)
      ptx::load_box(shared + chunk * Tile::kChunkBytes, map,
                    {chunk * kChunkColumns, work.k_begin + key, work.kv_head, work.k_map_batch}, full);
  }
};

}  // namespace fsa::kernels

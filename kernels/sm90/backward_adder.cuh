// SPDX-License-Identifier: Apache-2.0
// Sums of dQ on their way from shared to global memory: one warp for each consumer warpgroup. Consumers wait only
// until the sums of the tile before have been read, and not for the L2, nor for other CTAs.
#pragma once

#include "ptx/mbarrier.cuh"
#include "ptx/reduce.cuh"
#include "ptx/tma.cuh"
#include "sm90/backward_clear.cuh"
#include "sm90/backward_gate.cuh"
#include "sm90/backward_types.cuh"
#include "tile/ring.cuh"

namespace fsa::kernels::sm90 {

// The counter of a row tile's turns, read before that is wanted: most often it is the next one, and its turn has come.
struct EarlyTurn {
  int32 number = -1;  // of the row tile
  int32 seen;
};

// Sums of one row tile from shared to global memory; true after the last of a work unit. Deterministic: key tiles add to a
// row tile in the order in which they were issued.
template <class Types>
FSA_DEVICE bool add_row_tile(const BackwardParams& params, BackwardStorage<Types>& storage, int32 index,
                             uint32 handover, EarlyTurn& early) {
  constexpr int32 kFloats = Types::kQueryColumns * kRowsPerWarpgroup;  // half of the row tile
  const bool leads = own_lane() == 0;
  if (leads) ptx::wait(storage.handed_full[index], handover & 1);
  __syncwarp();
  const StagedSums sums = storage.handed.sums[index];
  // Whoever adds whole row tiles counts them at the first warp's place.
  const int32 part = Types::kAlternates ? 0 : index;
  const int64 counter = static_cast<int64>(sums.number) * kBackwardWarps + part * (kBackwardWarps / 2);
  const bool some = !Types::kAlternates || sums.number >= 0;
  if (leads && some) {
    const int32 rank = sums.order >> RowTileBrief::kOrderRankShift;
    float* const to =
        params.grad_query_sum + (static_cast<int64>(sums.number) * kBackwardConsumers + part) * kFloats;
    const uint8* const staged = storage.grad_query.of_warp(index * (kBackwardWarps / 2));
    if constexpr (Types::kDeterministic)
      if (early.number != sums.number || early.seen != rank)
        ptx::wait_until_equal(params.turns + counter, rank);
    const auto add = [&](float* sum, const uint8* from) {
      if (Types::kFirstStores && rank == 0)
        ptx::store_bytes(sum, from, kFloats * 4);
      else
        ptx::add_bytes(sum, from, kFloats * 4);
    };
    add(to, staged);
    if constexpr (Types::kAlternates) add(to + kFloats, storage.scores[sums.stage][0]);
    ptx::commit_stores();
  }
  __syncwarp();  // all lanes have read what the leader is about to give up
  if constexpr (kAdderReadsAlpha<Types>) {
    if (index == 0) {
      GateGradients<Types>::template add_alpha<kWarpThreads>(params, storage, sums.number, sums.stage,
                                                             own_lane());
      if (leads) ptx::arrive(storage.scores_empty[sums.stage]);
    }
  }
  if (leads) {
    ptx::wait_stores_read();
    if (Types::kAlternates && some) ptx::arrive(storage.scores_empty[sums.stage]);
    ptx::arrive(storage.handed_empty[index]);
    if (Types::kDeterministic && some) {
      ptx::wait_stores();
      ptx::fence_async_global();
      ptx::add_release(params.turns + counter, 1);
      if (!Types::kSplits && (sums.order & RowTileBrief::kOrderLast) == 0) {
        constexpr int32 kNext = Types::kAlternates ? 2 : 1;  // row tiles on
        early.number = sums.number + kNext;
        early.seen = ptx::load_acquire(params.turns + counter + kNext * kBackwardWarps);
      }
    }
  }
  __syncwarp();
  return (sums.order & RowTileBrief::kOrderLast) != 0;
}

// Walks the work as the consumers do, and says of each key tile when nothing more of it will be added: backward_finish
// begins with the heads whose key tiles are all done.
template <class Types>
FSA_DEVICE void add_staged_sums(const BackwardParams& params, BackwardStorage<Types>& storage, int32 index) {
  uint32 tile = 0;
  EarlyTurn early;
  for (uint32 unit = 0;; ++unit) {
    const Ring<kWorkSlots> slot = {unit};
    ptx::wait(storage.work_full[slot.stage()], slot.phase());
    const KeyWork& work = storage.work[slot.stage()];
    if (work.sequence < 0) return;
    if constexpr (Types::kClearsSums)
      if (own_lane() == 0) wait_cleared<Types>(params, work);
    if (work.num_segments > 0)
      while (!add_row_tile<Types>(params, storage, index, tile++, early)) {
      }
    if constexpr (kAdderReadsAlpha<Types>) ptx::fence_global();  // which all lanes have added to
    __syncwarp();
    if (own_lane() == 0) {
      ptx::wait_stores();
      ptx::fence_async_global();
      ptx::add_release(params.sums_done + work.sequence * params.forward.num_heads + work.head, 1);
      ptx::arrive(storage.work_empty[slot.stage()]);
    }
    __syncwarp();
  }
}

// The turns of one consumer warpgroup, whose warps add dQ from their registers: a lane for each. A fence that waits for
// additions to be seen takes 700 clocks and more; taken by the warp itself it made head_dim 256 13 to 15 % slower.
template <class Types>
FSA_DEVICE void pass_turns(const BackwardParams& params, BackwardStorage<Types>& storage, int32 index) {
  constexpr int32 kWarps = kBackwardWarps / kBackwardConsumers;
  const int32 warp = index * kWarps + own_lane() % kWarps;
  bool more = own_lane() < kWarps;
  for (uint32 tile = 0; __any_sync(0xffffffffu, more);) {
    if (!more || !ptx::try_wait(storage.handed_full[warp], tile & 1)) continue;
    const int32 number = storage.handed.row_tiles[warp];
    ptx::arrive(storage.handed_empty[warp]);
    ++tile;
    more = number >= 0;
    if (!more) continue;
    ptx::fence_global();
    ptx::add_release(params.turns + static_cast<int64>(number) * kBackwardWarps + warp, 1);
  }
}

}  // namespace fsa::kernels::sm90

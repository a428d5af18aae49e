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

// The counter of a row tile, read before that is wanted: most often it is the next one, and may be added to.
struct EarlyTurn {
  int32 number = -1;  // of the row tile
  int32 seen;         // deterministic: what it was; otherwise first sums are there, or number is -1
};

// Not deterministic, a row tile's counter: somebody stores its first sums; they are there.
inline constexpr int32 kSumsClaimed = 1, kSumsStored = 3;

// Waits until sums may go to a row tile; true if they are the first, which are stored, not added. Whoever waits waits for
// sums that were taken up before: by key tiles issued before (deterministic), or by an adder that waits for nobody.
template <class Types>
FSA_DEVICE bool wait_for_turn(int32* counter, int32 number, int32 rank, const EarlyTurn& early) {
  if constexpr (Types::kDeterministic) {
    if (early.number != number || early.seen != rank) ptx::wait_until_equal(counter, rank);
    return rank == 0;
  } else if constexpr (!Types::kFirstStores) {
    return false;
  } else {
    if (early.number == number) return false;
    if (atomicOr(counter, kSumsClaimed) == 0) return true;
    ptx::wait_until_equal(counter, kSumsStored);
    return false;
  }
}

template <class Types>
FSA_DEVICE void look_for_turn(const int32* counter, int32 number, EarlyTurn& early) {
  const int32 seen = ptx::load_acquire(counter);
  if constexpr (Types::kDeterministic) early.seen = seen;
  early.number = Types::kDeterministic || seen == kSumsStored ? number : -1;
}

// Sums of one row tile from shared to global memory; true after the last of a work unit. Deterministic: key tiles add to a
// row tile in the order in which they were issued.
template <class Types>
FSA_DEVICE bool add_row_tile(const BackwardParams& params, BackwardStorage<Types>& storage, int32 index,
                             uint32 handover, EarlyTurn& early) {
  constexpr int32 kFloats = Types::kQueryColumns * kRowsPerWarpgroup;  // half of the row tile
  const bool leads = own_lane() == 0;
  if (leads) ptx::wait(storage.handed_full[index], handover & 1);
  __syncwarp();
  const int32 number = storage.handed.sums[index].number, order = storage.handed.sums[index].order;
  const bool last = (order & RowTileBrief::kOrderLast) != 0;
  // Whoever adds whole row tiles counts them at the first warp's place. Counters of 2^28 row tiles fit 32 bits.
  const int32 part = Types::kAlternates ? 0 : index;
  const auto counter_of = [&](int32 row_tile) {
    return params.turns + static_cast<uint32>(row_tile * kBackwardWarps + part * (kBackwardWarps / 2));
  };
  int32* const counter = counter_of(number);
  const bool some = !Types::kAlternates || number >= 0;
  bool first = false;
  if (leads && some) {
    float* const to =
        params.grad_query_sum + static_cast<int64>(number * kBackwardConsumers + part) * kFloats;
    const uint8* const staged = storage.grad_query.of_warp(index * (kBackwardWarps / 2));
    first = wait_for_turn<Types>(counter, number, order >> RowTileBrief::kOrderRankShift, early);
    const auto add = [&](float* sum, const uint8* from) {
      if (first)
        ptx::store_bytes(sum, from, kFloats * 4);
      else
        ptx::add_bytes(sum, from, kFloats * 4);
    };
    add(to, staged);
    if constexpr (Types::kAlternates) add(to + kFloats, storage.scores[storage.handed.sums[index].stage][0]);
    ptx::commit_stores();
  }
  __syncwarp();  // all lanes have read what the leader is about to give up
  if constexpr (kAdderReadsAlpha<Types>) {
    if (index == 0) {
      GateGradients<Types>::template add_alpha<kWarpThreads>(params, storage, number,
                                                             storage.handed.sums[index].stage, own_lane());
      if (leads) ptx::arrive(storage.scores_empty[storage.handed.sums[index].stage]);
    }
  }
  if (leads) {
    ptx::wait_stores_read();
    if (Types::kAlternates && some) ptx::arrive(storage.scores_empty[storage.handed.sums[index].stage]);
    const int32 next = Types::kSaysNext         ? storage.handed.sums[index].next
                       : Types::kSplits || last ? -1
                                                : number + 1;
    ptx::arrive(storage.handed_empty[index]);
    if ((Types::kDeterministic && some) || first) {
      ptx::wait_stores();
      ptx::fence_async_global();
      ptx::add_release(counter, Types::kDeterministic ? 1 : kSumsStored - kSumsClaimed);
    }
    if (Types::kFirstStores && next >= 0) look_for_turn<Types>(counter_of(next), next, early);
  }
  __syncwarp();
  return last;
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

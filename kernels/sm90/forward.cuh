// SPDX-License-Identifier: Apache-2.0
// Attention forward for Hopper: out = softmax(scale Q K^T + mask) V, lse = log sum exp, one pass over the
// keys.
//
// A CTA holds block_m query rows, 64 in each consumer warpgroup, and walks key tiles from right to left. CTAs
// are persistent and take work tiles from a counter. Two threads of the producer warpgroup drive the copy
// engine: one takes work tiles and loads their queries as soon as a query stage is free, the other feeds rings
// of K and V stages, so the next tile's Q and first K arrive under the tail of the current one. With one thread
// for both, the next Q came late, behind K and V in the queue: -6 % for windows of 1024 keys, -8 % for 512,
// -10 % for lists of 8 tiles (H200, 2026-11).
//
//   announcer    Q0                    Q1 ...
//   producer     K0 K1 V0  K2 V1  K3 V2 ...
//   consumer A   S0 softmax | S1 PV0 | softmax ...... | S2 PV1 | softmax ......
//   consumer B        S0 softmax ... | S1 PV0 | softmax ...... | S2 PV1 |
//
// Within a warpgroup, S of tile j + 1 and P V of tile j are issued together, and the softmax of tile j + 1
// runs while P V of tile j is in flight. Between warpgroups nothing is ordered: they drift into alternation
// by themselves, and passing a turn by named barriers measured 0 to 2 % slower (H200, every head_dim,
// 2026-11).
//
// Invariants. Stage s of K is free when every consumer warp has arrived on key_empty[s], which it does once
// its S is complete; V likewise once P V is. A query stage also stages the output rows: it is free when each
// warpgroup has arrived on query_empty, after its output has been read out of it.
#pragma once

#include "ptx/mbarrier.cuh"
#include "ptx/sync.cuh"
#include "sm90/forward_consumer.cuh"
#include "sm90/forward_types.cuh"
#include "sm90/forward_votes.cuh"
#include "tile/ring.cuh"

namespace fsa::kernels::sm90 {

template <class Types>
FSA_DEVICE void init_barriers(ForwardStorage<Types>& storage) {
  for (int32 i = 0; i < Types::kQueryStages; ++i) {
    ptx::init(storage.query_full[i], 1);
    ptx::init(storage.query_empty[i], Types::kNumConsumers);
  }
  for (int32 i = 0; i < Types::kKeyStages; ++i) {
    ptx::init(storage.key_full[i], 1);
    ptx::init(storage.key_empty[i], Types::kConsumerWarps);
  }
  for (int32 i = 0; i < Types::kValueStages; ++i) {
    ptx::init(storage.value_full[i], 1);
    ptx::init(storage.value_empty[i], Types::kConsumerWarps);
  }
  for (int32 i = 0; i < kWorkSlots; ++i) {
    ptx::init(storage.work_full[i], 1);
    ptx::init(storage.work_empty[i], Types::kConsumerWarps + 1);
  }
  if constexpr (Types::kPrivateValues)
    for (int32 i = 0; i < Types::kValueStages; ++i) ptx::init(storage.own_value_full.of[i], 1);
  ptx::fence_init();
}

// Before the first work tile. A threshold this low will hardly skip anything.
template <class Types>
FSA_DEVICE void init_votes(const ForwardParams& params, ForwardStorage<Types>& storage) {
  constexpr float kLowThreshold = 1e-3f;
  for (int32 i = 0; i < Types::kNumConsumers; ++i) {
    storage.votes.ballots[i].clear();
    storage.votes.rejected[i] = 0;
    storage.votes.keeps_most[i] = params.threshold < kLowThreshold;
    storage.votes.places[i][0] = {0, 0, 0};
  }
}

// By what the warpgroups have kept lately. `most_kept`: the way of the work tile before.
template <class Types>
FSA_DEVICE void choose_way(ForwardStorage<Types>& storage, int32 slot, bool& most_kept) {
  bool now = true;
  for (int32 i = 0; i < Types::kNumConsumers; ++i) now = now && storage.votes.keeps_most[i] != 0;
  storage.votes.ways[slot] = {(now ? VoteWay::kMostKept : 0) | (now != most_kept ? VoteWay::kChanges : 0)};
  most_kept = now;
}

// One thread takes and describes work tiles and loads their queries, as far ahead as slots and query stages allow.
// Where a schedule looks far ahead, its warp helps it to choose.
template <class Types>
FSA_DEVICE void announce(const ForwardParams& params, ForwardStorage<Types>& storage) {
  using Schedule = typename Types::Schedule;
  Schedule schedule(params);
  Ring<kWorkSlots> slot;
  Ring<Types::kQueryStages> query;
  bool most_kept = false;
  for (;; slot.advance()) {
    ListedWorkTile& work = storage.work[slot.stage()];
    ptx::wait(storage.work_empty[slot.stage()], slot.phase() ^ 1);
    const bool more = schedule.next(params, work);
    if (!Schedule::kByWarp || lane_id() == 0) {
      if (more)
        Types::Tiles::describe(params, work);
      else
        work.sequence = -1;
      if constexpr (Types::kChoosesWay)
        if (more && work.num_segments > 0) choose_way<Types>(storage, slot.stage(), most_kept);
      ptx::arrive(storage.work_full[slot.stage()]);
    }
    if (!more) break;
    if constexpr (Schedule::kByWarp) __syncwarp();
    if (work.num_segments == 0) continue;
    if (!Schedule::kByWarp || lane_id() == 0) {
      ptx::wait(storage.query_empty[query.stage()], query.phase() ^ 1);
      ptx::arrive_expect_bytes(storage.query_full[query.stage()], Types::QueryTile::kBytes);
      Types::Source::template load_query<Types::kBlockM, Types::kPaddedDim>(
          params, work, storage.query[query.stage()], storage.query_full[query.stage()]);
    }
    query.advance();
  }
  if (!Schedule::kByWarp || lane_id() == 0) Schedule::finish(params);
}

// One thread: keys and values, ahead of the consumers by the depth of the rings, across work tiles. With the
// keys of a listed tile goes which tile is next, so that the consumers know it a tile ahead.
template <class Types>
FSA_DEVICE void produce(const ForwardParams& params, ForwardStorage<Types>& storage) {
  using Source = typename Types::Source;
  constexpr bool kListed = Types::Tiles::kListed;
  constexpr int32 kKeyBytes = Types::KeyTile::kBytes + Types::kKeyScalarBytes +
                              (Types::kGateTerms ? gate_term_bytes(Types::kBlockN) : 0);
  Ring<kWorkSlots> slot;
  Ring<Types::kKeyStages> key;
  Ring<Types::kValueStages> value;

  const auto load_value = [&](const WorkTile& work, int32 tile) {
    if constexpr (Types::kPrivateValues) {
      if constexpr (!Types::kChoosesWay) return;  // the consumers fetch what they want
      const VoteWay way = storage.votes.ways[slot.stage()];
      if (!way.most_kept()) return;
      if (way.changes()) wait_work_tile_done<Types>(storage, slot.position - 1);
    }
    ptx::wait(storage.value_empty[value.stage()], value.phase() ^ 1);
    ptx::arrive_expect_bytes(storage.value_full[value.stage()], Types::ValueTile::kBytes);
    Source::template load_value<Types::kBlockN, Types::kPaddedDimV>(
        params, work, tile, storage.value[value.stage()], storage.value_full[value.stage()]);
    value.advance();
  };
  const auto load_key = [&](const WorkTile& work, int32 tile) {
    ptx::Mbarrier& full = storage.key_full[key.stage()];
    ptx::wait(storage.key_empty[key.stage()], key.phase() ^ 1);
    if constexpr (!kListed) ptx::arrive_expect_bytes(full, kKeyBytes);
    Source::template load_key<Types::kBlockN, Types::kPaddedDim>(params, work, tile, storage.key[key.stage()],
                                                                 full);
    if constexpr (Types::kKeyScalars)
      Source::template load_key_scalars<Types::kBlockN>(params, work, tile,
                                                        storage.key_scalars.of(key.stage()), full);
    if constexpr (Types::kGateTerms)
      Source::template load_gate_terms<Types::kBlockN>(params, work, tile, storage.gate.keys[key.stage()],
                                                       full);
  };
  const auto finish_key = [&](const TileInfo& next) {
    if constexpr (kListed) {
      storage.following[key.stage()] = next;
      ptx::arrive_expect_bytes(storage.key_full[key.stage()], kKeyBytes);
    }
    key.advance();
  };

  for (;; slot.advance()) {
    ptx::wait(storage.work_full[slot.stage()], slot.phase());
    const ListedWorkTile& work = storage.work[slot.stage()];
    if (work.sequence < 0) break;
    if (work.num_segments > 0) {
      // To look up a list takes as long as to copy a tile: the first is known, and each further one is looked up while
      // the one before is copied. +4 % for lists of 8 tiles (H200, 2026-11).
      typename Types::Tiles::Walk walk(params, work);
      TileInfo info, next;
      if constexpr (kListed)
        info = work.first.info();
      else
        walk.next(info);
      for (int32 previous = -1;; previous = info.tile, info = next) {
        load_key(work, info.tile);
        if (kListed && previous < 0) walk.next(info);
        const bool more = walk.next(next);
        if (!more) next = {-1, 0, -1, 0};
        finish_key(next);
        if (previous >= 0) load_value(work, previous);
        if (!more) break;
      }
      load_value(work, info.tile);
    }
    ptx::arrive(storage.work_empty[slot.stage()]);
  }
}

template <class Config>
FSA_DEVICE void forward(const ForwardParams& params) {
  using Types = ForwardTypes<Config>;
  using Storage = ForwardStorage<Types>;
  static_assert(sizeof(Storage) == forward_shared_bytes(Types::kTile),
                "the host must know the shared memory size");
  Storage& storage = *reinterpret_cast<Storage*>(dynamic_shared());

  const int32 warpgroup = warp_uniform(static_cast<int32>(threadIdx.x) / kWarpgroupThreads);
  if (threadIdx.x == 0) {
    Types::Source::prefetch(params);
    init_barriers(storage);
    storage.ones.fill();
    if constexpr (Types::kChoosesWay) init_votes<Types>(params, storage);
    if constexpr (Types::kGateTerms) storage.gate.zeros.fill();
  }
  __syncthreads();

  if (warpgroup == 0) {
    ptx::shrink_registers<Types::kProducerRegisters>();
    if (threadIdx.x == 0) produce<Types>(params, storage);
    if (threadIdx.x == kWarpThreads || (Types::Schedule::kByWarp && threadIdx.x / kWarpThreads == 1))
      announce<Types>(params, storage);
    if (threadIdx.x / kWarpThreads == 2) Types::Epilogue::clear_tail(params);
  } else {
    ptx::grow_registers<Types::kConsumerRegisters>();
    Consumer<Types>(params, storage, warpgroup - 1).run();
  }
}

}  // namespace fsa::kernels::sm90

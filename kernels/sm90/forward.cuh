// SPDX-License-Identifier: Apache-2.0
// Attention forward for Hopper: out = softmax(scale Q K^T + mask) V, lse = log sum exp, one pass over the
// keys.
//
// A CTA holds block_m query rows, 64 in each consumer warpgroup, and walks key tiles from right to left. One
// thread of the producer warpgroup feeds rings of K and V stages with the copy engine; CTAs are persistent
// and take work tiles from a counter, so the next tile's Q and first K arrive under the tail of the current
// one.
//
//   producer     K0 Q  K1 V0  K2 V1  K3 V2 ...
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
    ptx::init(storage.work_empty[i], Types::kConsumerWarps);
  }
  ptx::fence_init();
}

// One thread. Loads run ahead of the consumers by the depth of the rings, across work tiles.
template <class Types>
FSA_DEVICE void produce(const ForwardParams& params, ForwardStorage<Types>& storage) {
  using Source = typename Types::Source;
  typename Types::Schedule schedule(params);
  Ring<kWorkSlots> slot;
  Ring<Types::kQueryStages> query;
  Ring<Types::kKeyStages> key;
  Ring<Types::kConsumerValueStages> value;

  const auto load_value = [&](const WorkTile& work, int32 tile) {
    if constexpr (Types::kPrivateValues) return;  // the consumers fetch what they want
    ptx::wait(storage.value_empty[value.stage()], value.phase() ^ 1);
    ptx::arrive_expect_bytes(storage.value_full[value.stage()], Types::ValueTile::kBytes);
    Source::template load_value<Types::kBlockN, Types::kPaddedDimV>(
        params, work, tile, storage.value[value.stage()], storage.value_full[value.stage()]);
    value.advance();
  };
  const auto load_key = [&](const WorkTile& work, const TileInfo& info) {
    ptx::Mbarrier& full = storage.key_full[key.stage()];
    ptx::wait(storage.key_empty[key.stage()], key.phase() ^ 1);
    if constexpr (Types::Tiles::kListed) storage.info[key.stage()] = info;
    ptx::arrive_expect_bytes(full, Types::KeyTile::kBytes + Types::kKeyScalarBytes);
    Source::template load_key<Types::kBlockN, Types::kPaddedDim>(params, work, info.tile,
                                                                 storage.key[key.stage()], full);
    if constexpr (Types::kKeyScalars)
      Source::template load_key_scalars<Types::kBlockN>(params, work, info.tile,
                                                        storage.key_scalars.of(key.stage()), full);
    key.advance();
  };

  for (bool more = true; more; slot.advance()) {
    ptx::wait(storage.work_empty[slot.stage()], slot.phase() ^ 1);
    WorkTile& work = storage.work[slot.stage()];
    more = schedule.next(params, work);
    if (more)
      Types::Tiles::describe(params, work);
    else
      work.sequence = -1;
    ptx::arrive(storage.work_full[slot.stage()]);
    if (!more || work.num_segments == 0) continue;

    typename Types::Tiles::Walk walk(params, work);
    TileInfo next;
    int32 previous = -1;
    for (bool last = !walk.next(next); !last;) {
      TileInfo info = next;
      last = !walk.next(next);
      if (last) info.flags |= TileInfo::kLast;
      load_key(work, info);
      if (previous >= 0) {
        load_value(work, previous);
      } else {
        ptx::wait(storage.query_empty[query.stage()], query.phase() ^ 1);
        ptx::arrive_expect_bytes(storage.query_full[query.stage()], Types::QueryTile::kBytes);
        Source::template load_query<Types::kBlockM, Types::kPaddedDim>(
            params, work, storage.query[query.stage()], storage.query_full[query.stage()]);
        query.advance();
      }
      previous = info.tile;
    }
    load_value(work, previous);
  }
  Types::Schedule::finish(params);
}

template <class Config>
FSA_DEVICE void forward(const ForwardParams& params) {
  using Types = ForwardTypes<Config>;
  using Storage = ForwardStorage<Types>;
  static_assert(sizeof(Storage) == forward_shared_bytes(Types::kTile),
                "the host must know the shared memory size");
  extern __shared__ uint8 shared[];
  Storage& storage = *reinterpret_cast<Storage*>(shared);

  const int32 warpgroup = warp_uniform(static_cast<int32>(threadIdx.x) / kWarpgroupThreads);
  if (threadIdx.x == 0) {
    Types::Source::prefetch(params);
    init_barriers(storage);
  }
  __syncthreads();

  if (warpgroup == 0) {
    ptx::shrink_registers<Types::kProducerRegisters>();
    if (threadIdx.x == 0) produce<Types>(params, storage);
    if (threadIdx.x / kWarpThreads == 1) Types::Epilogue::clear_tail(params);
  } else {
    ptx::grow_registers<Types::kConsumerRegisters>();
    Consumer<Types>(params, storage, warpgroup - 1).run();
  }
}

}  // namespace fsa::kernels::sm90

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

#include "core/config.h"
#include "core/params.h"
#include "policy/online_softmax.cuh"
#include "policy/skip.cuh"
#include "policy/work_tile.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/sync.cuh"
#include "ptx/wgmma.cuh"
#include "tile/fragment.cuh"
#include "tile/ring.cuh"
#include "tile/swizzle.cuh"

namespace fsa::kernels::sm90 {

template <class Config>
struct ForwardTypes {
  static constexpr ElementType kElement = Config::kElement;
  static constexpr ForwardTile kTile = Config::kTile;
  static constexpr int32 kHeadDim = kTile.head_dim;
  static constexpr int32 kHeadDimV = kTile.head_dim_v;
  static constexpr int32 kBlockM = kTile.block_m;
  static constexpr int32 kBlockN = kTile.block_n;
  static constexpr int32 kKeyStages = kTile.key_stages;
  static constexpr int32 kValueStages = kTile.value_stages;
  static constexpr int32 kQueryStages = kTile.query_stages;
  static constexpr int32 kNumConsumers = kBlockM / kRowsPerWarpgroup;
  static constexpr int32 kConsumerThreads = kNumConsumers * kWarpgroupThreads;
  static constexpr int32 kConsumerWarps = kConsumerThreads / kWarpThreads;

  using Skip = typename Config::Skip;
  // Without a vote, all consumers share each V stage. With one, they want different tiles: each has stages of
  // its own.
  static constexpr int32 kConsumerValueStages = Skip::kVotes ? kValueStages / kNumConsumers : kValueStages;

  using Source = typename Config::KvSource;
  using Mask = typename Config::Mask;
  using Tiles = typename Config::TileIterator;
  using Schedule = typename Config::Schedule;
  using Logit = typename Config::Logit;
  using Epilogue = typename Config::Epilogue;
  using QueryTile = SwizzledTile<kBlockM, kHeadDim>;
  using KeyTile = SwizzledTile<kBlockN, kHeadDim>;
  using ValueTile = SwizzledTile<kBlockN, kHeadDimV>;

  // 64 K registers: a launch gives each of the warpgroups the same share, setmaxnreg moves it to the
  // consumers.
  static constexpr int32 kConsumerRegisters = kNumConsumers == 2 ? 232 : 160;
  static constexpr int32 kProducerRegisters = kNumConsumers == 2 ? 40 : 32;

  static_assert(kNumConsumers == 2 || kNumConsumers == 3,
                "block_m is 128 or 192: two or three consumer warpgroups");
  static_assert(kHeadDimV <= kHeadDim, "the output is staged in the query's shared memory");
  static_assert(kBlockN % 16 == 0, "P V takes 16 keys at a time");
  static_assert(!Skip::kVotes || kConsumerValueStages == 2,
                "V of a kept tile loads beside P V of the one before");
  static_assert(!Skip::kVotes || kBlockN == skip_tile_keys(kHeadDim), "one vote decides one skip tile");
  static_assert(kBlockN <= 256, "a TMA box has at most 256 rows");
  static_assert(KeyTile::kBytes % kSharedAlignment == 0 && ValueTile::kBytes % kSharedAlignment == 0,
                "every stage must start on a swizzle period");
};

template <class Types>
struct alignas(kSharedAlignment) ForwardStorage {
  uint8 query[Types::kQueryStages][Types::QueryTile::kBytes];
  uint8 key[Types::kKeyStages][Types::KeyTile::kBytes];
  uint8 value[Types::kValueStages][Types::ValueTile::kBytes];
  WorkTile work[kWorkSlots];
  ptx::Mbarrier query_full[Types::kQueryStages];
  ptx::Mbarrier query_empty[Types::kQueryStages];
  ptx::Mbarrier key_full[Types::kKeyStages];
  ptx::Mbarrier key_empty[Types::kKeyStages];
  ptx::Mbarrier value_full[Types::kValueStages];
  ptx::Mbarrier value_empty[Types::kValueStages];
  ptx::Mbarrier work_full[kWorkSlots];
  ptx::Mbarrier work_empty[kWorkSlots];
};

// Named barrier of the first consumer warpgroup; the others follow.
inline constexpr int32 kWarpgroupBarrier = 1;

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
  Ring<Types::kValueStages> value;

  const auto load_value = [&](const WorkTile& work, int32 tile) {
    if constexpr (Types::Skip::kVotes) return;  // the consumers fetch what they want
    ptx::wait(storage.value_empty[value.stage()], value.phase() ^ 1);
    Source::template load_value<Types::kBlockN, Types::kHeadDimV>(
        params, work, tile, storage.value[value.stage()], storage.value_full[value.stage()]);
    value.advance();
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

    int32 previous = -1;
    for (int32 s = 0; s < work.num_segments; ++s) {
      const Segment segment = work.segments[s];
      for (int32 tile = segment.first; tile > segment.first - segment.count; --tile) {
        ptx::wait(storage.key_empty[key.stage()], key.phase() ^ 1);
        Source::template load_key<Types::kBlockN, Types::kHeadDim>(
            params, work, tile, storage.key[key.stage()], storage.key_full[key.stage()]);
        key.advance();
        if (previous >= 0) {
          load_value(work, previous);
        } else {
          ptx::wait(storage.query_empty[query.stage()], query.phase() ^ 1);
          Source::template load_query<Types::kBlockM, Types::kHeadDim>(
              params, work, storage.query[query.stage()], storage.query_full[query.stage()]);
          query.advance();
        }
        previous = tile;
      }
    }
    load_value(work, previous);
  }
  Types::Schedule::finish(params);
}

// One consumer warpgroup: what it keeps in registers from tile to tile.
template <class Types>
struct Consumer {
  const ForwardParams& params;
  ForwardStorage<Types>& storage;
  const int32 index;  // which consumer
  const int32 row;    // first of the thread's rows in the work tile
  const float scale;
  uint32 query_address;  // of the warpgroup's rows

  Ring<kWorkSlots> slot;
  Ring<Types::kQueryStages> query;
  Ring<Types::kKeyStages> key;
  Ring<Types::kConsumerValueStages> value;

  float rS[Types::kBlockN / 2];
  float rO[Types::kHeadDimV / 2];
  uint32 rP[Types::kBlockN / 4];
  OnlineSoftmax softmax;
  bool output_staged = false;  // the previous query stage still holds output rows

  FSA_DEVICE Consumer(const ForwardParams& params_, ForwardStorage<Types>& storage_, int32 index_)
      : params(params_),
        storage(storage_),
        index(index_),
        row(index_ * kRowsPerWarpgroup + fragment_row(warpgroup_thread(), 0)),
        scale(Types::Logit::exponent_scale(params_)) {}

  // Warps arrive one by one: each knows only its own share of a multiply to be complete.
  FSA_DEVICE static void release(ptx::Mbarrier& empty) {
    if (lane_id() == 0) ptx::arrive(empty);
  }

  FSA_DEVICE int32 value_stage() const {
    return Types::Skip::kVotes ? index * Types::kConsumerValueStages + value.stage() : value.stage();
  }

  // With two query stages the wait for the copy engine falls into the next work tile, after its first
  // multiply was issued: +3 % at seqlen 2048, +2 % at 16384 (H200, head_dim 128 causal, 2026-11).
  FSA_DEVICE void release_query() {
    if (!output_staged) return;
    if (warpgroup_thread() == 0) {
      Types::Epilogue::wait_staging();
      ptx::arrive(storage.query_empty[(query.position - 1) % Types::kQueryStages]);
    }
    output_staged = false;
  }

  // S = Q K^T
  FSA_DEVICE void issue_scores() {
    using QueryTile = typename Types::QueryTile;
    using KeyTile = typename Types::KeyTile;
    ptx::wgmma_fence();
    const uint64 a = QueryTile::inner_columns(query_address);
    const uint64 b = KeyTile::inner_columns(shared_address(storage.key[key.stage()]));
#pragma unroll
    for (int32 step = 0; step < Types::kHeadDim / 16; ++step)
      ptx::multiply_shared<Types::kElement, Types::kBlockN>(
          rS, QueryTile::advance(a, QueryTile::inner_columns_offset(step)),
          KeyTile::advance(b, KeyTile::inner_columns_offset(step)), step != 0);
    ptx::wgmma_commit();
  }

  // O += P V
  FSA_DEVICE void issue_output() {
    using ValueTile = typename Types::ValueTile;
    ptx::wgmma_fence();
    const uint64 b = ValueTile::inner_rows(shared_address(storage.value[value_stage()]));
#pragma unroll
    for (int32 step = 0; step < Types::kBlockN / 16; ++step)
      ptx::multiply_registers<Types::kElement, Types::kHeadDimV>(
          rO, rP[4 * step], rP[4 * step + 1], rP[4 * step + 2], rP[4 * step + 3],
          ValueTile::advance(b, ValueTile::inner_rows_offset(step)));
    ptx::wgmma_commit();
  }

  FSA_DEVICE void pack_probabilities() {
#pragma unroll
    for (int32 i = 0; i < Types::kBlockN / 4; ++i)
      rP[i] = ptx::pack<Types::kElement>(rS[2 * i], rS[2 * i + 1]);
  }

  // Keys beyond the used length have p = 0, but 0 * NaN is NaN: their values must not be what memory holds.
  // Both warpgroups write the same zeros, each before its own multiply.
  FSA_DEVICE void clear_unused_values(const WorkTile& work, int32 tile) {
    const int32 used = work.seqlen_k - tile * Types::kBlockN;
    if (used >= Types::kBlockN) return;
    ptx::wait(storage.value_full[value_stage()], value.phase());
    constexpr int32 kUnits = Types::kHeadDimV * kElementBytes / kUnitBytes;
    for (int32 item = warpgroup_thread(); item < (Types::kBlockN - used) * kUnits; item += kWarpgroupThreads)
      *reinterpret_cast<uint4*>(storage.value[value_stage()] +
                                Types::ValueTile::unit_offset(used + item / kUnits, item % kUnits)) =
          make_uint4(0, 0, 0, 0);
    ptx::fence_shared_for_async();
    ptx::barrier_sync(kWarpgroupBarrier + index, kWarpgroupThreads);
  }

  FSA_DEVICE void first_step(const WorkTile& work, const Segment& segment) {
    ptx::wait(storage.key_full[key.stage()], key.phase());
    issue_scores();
    ptx::wgmma_wait<0>();
    ptx::settle(rS);
    release(storage.key_empty[key.stage()]);
    key.advance();

    Types::Logit::apply(params, work, rS);
    if (segment.masked)
      Types::Mask::apply(params, work, rS, work.m_begin + row, segment.first * Types::kBlockN);
    clear_unused_values(work, segment.first);
    softmax.update(rS, scale);
    pack_probabilities();
  }

  template <bool kMasked>
  FSA_DEVICE void step(const WorkTile& work, int32 tile) {
    ptx::wait(storage.key_full[key.stage()], key.phase());
    issue_scores();
    ptx::wait(storage.value_full[value_stage()], value.phase());
    issue_output();
    ptx::wgmma_wait<1>();
    ptx::settle(rS);
    release(storage.key_empty[key.stage()]);
    key.advance();

    Types::Logit::apply(params, work, rS);
    if constexpr (kMasked) Types::Mask::apply(params, work, rS, work.m_begin + row, tile * Types::kBlockN);
    softmax.update(rS, scale);

    // ptxas moves a wait up through straight-line code, here to before the exponentials, which would then no
    // longer run beside P V. It does not move one across the branch.
    ptx::settle(rS);
    if (softmax.grown) {
      ptx::wgmma_wait<0>();
      ptx::settle(rO);
      softmax.rescale(rO);
    }
    ptx::wgmma_wait<0>();
    ptx::settle(rO);
    ptx::settle(rP);
    release(storage.value_empty[value_stage()]);
    value.advance();
    pack_probabilities();
  }

  FSA_DEVICE void last_output() {
    ptx::wait(storage.value_full[value_stage()], value.phase());
    issue_output();
    ptx::wgmma_wait<0>();
    ptx::settle(rO);
    release(storage.value_empty[value_stage()]);
    value.advance();
  }

  // Every tile counts.
  FSA_DEVICE void sweep(const WorkTile& work) {
    first_step(work, work.segments[0]);
    if constexpr (Types::kQueryStages > 1) release_query();
    for (int32 s = 0; s < work.num_segments; ++s) {
      const Segment segment = work.segments[s];
      const int32 end = segment.first - segment.count;
      int32 tile = segment.first - (s == 0);
      if (segment.masked)
        for (; tile > end; --tile) step<true>(work, tile);
      else
        for (; tile > end; --tile) step<false>(work, tile);
    }
    last_output();
  }

  // Tiles are voted on. At the start S of this tile is complete, and P V of an earlier one may be in flight.
  // The two outcomes are two whole arms, each issuing its own next multiplies: a branch around P V alone,
  // with S in flight, would make ptxas serialise every multiply of the kernel.
  //
  // V is fetched once it is wanted, by the warpgroup that wants it, into stages that nobody else touches: its
  // own multiplies are all there is to wait for, and a skipped V costs no bandwidth.
  template <bool kMasked>
  FSA_DEVICE void vote_step(const WorkTile& work, typename Types::Skip& skip, int32 tile, bool more) {
    Types::Logit::apply(params, work, rS);
    if constexpr (kMasked) Types::Mask::apply(params, work, rS, work.m_begin + row, tile * Types::kBlockN);
    const auto top = OnlineSoftmax::row_maximum(rS, [](float a, float b) { return ptx::max_nan(a, b); });
    if (ptx::barrier_any(kWarpgroupBarrier + index, kWarpgroupThreads, skip.wants(top, scale))) {
      // Every warp has completed the P V before the last, which read this stage.
      if (warpgroup_thread() == 0) {
        Types::Source::template load_value<Types::kBlockN, Types::kHeadDimV>(
            params, work, tile, storage.value[value_stage()], storage.value_full[value_stage()]);
        Types::Skip::record(params, work, work.m_begin + row, tile);
      }
      softmax.update(rS, top, scale);
      ptx::settle(rS);
      ptx::wgmma_wait<0>();
      ptx::settle(rO);
      ptx::settle(rP);
      pack_probabilities();
      if (softmax.grown) softmax.rescale(rO);
      if constexpr (kMasked) clear_unused_values(work, tile);
      if (more) {
        ptx::wait(storage.key_full[key.stage()], key.phase());
        issue_scores();
        ptx::wait(storage.value_full[value_stage()], value.phase());
        issue_output();
        skip.raise(softmax, scale);
        ptx::wgmma_wait<1>();
        ptx::settle(rS);
        release(storage.key_empty[key.stage()]);
        key.advance();
      } else {
        ptx::wait(storage.value_full[value_stage()], value.phase());
        issue_output();
      }
      value.advance();
    } else if (more) {
      ptx::wait(storage.key_full[key.stage()], key.phase());
      issue_scores();
      ptx::wgmma_wait<0>();
      ptx::settle(rS);
      ptx::settle(rO);
      ptx::settle(rP);
      release(storage.key_empty[key.stage()]);
      key.advance();
    }
  }

  FSA_DEVICE void sweep_voting(const WorkTile& work) {
    typename Types::Skip skip(params, work, work.m_begin + row);
    ptx::wait(storage.key_full[key.stage()], key.phase());
    issue_scores();
    ptx::wgmma_wait<0>();
    ptx::settle(rS);
    release(storage.key_empty[key.stage()]);
    key.advance();
    if constexpr (Types::kQueryStages > 1) release_query();

    for (int32 s = 0; s < work.num_segments; ++s) {
      const Segment segment = work.segments[s];
      const int32 last = segment.first - segment.count + 1;
      const bool more = s + 1 < work.num_segments;
      if (segment.masked)
        for (int32 tile = segment.first; tile >= last; --tile)
          vote_step<true>(work, skip, tile, more || tile > last);
      else
        for (int32 tile = segment.first; tile >= last; --tile)
          vote_step<false>(work, skip, tile, more || tile > last);
    }
    ptx::wgmma_wait<0>();
    ptx::settle(rO);
  }

  FSA_DEVICE void attend(const WorkTile& work) {
    uint8* const sQ = storage.query[query.stage()] + index * (kRowsPerWarpgroup * kLineBytes);
    query_address = shared_address(sQ);
    softmax = OnlineSoftmax();
#pragma unroll
    for (int32 i = 0; i < Types::kHeadDimV / 2; ++i) rO[i] = 0;
    ptx::wait(storage.query_full[query.stage()], query.phase());

    if constexpr (Types::Skip::kVotes)
      sweep_voting(work);
    else
      sweep(work);

    Types::Epilogue::template finish<Types::kElement, Types::kBlockM, Types::kHeadDimV>(
        params, work, index * kRowsPerWarpgroup, sQ, kWarpgroupBarrier + index, rO, softmax, scale);
    query.advance();
    output_staged = true;
    if constexpr (Types::kQueryStages == 1) release_query();
  }

  FSA_DEVICE void run() {
    for (;; slot.advance()) {
      ptx::wait(storage.work_full[slot.stage()], slot.phase());
      const WorkTile& work = storage.work[slot.stage()];
      if (work.sequence < 0) break;
      if (work.num_segments > 0)
        attend(work);
      else
        Types::Epilogue::finish_empty(params, work, index * kRowsPerWarpgroup);
      __syncwarp();
      release(storage.work_empty[slot.stage()]);
    }
    release_query();  // shared memory must outlive the stores that read it
  }
};

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
  } else {
    ptx::grow_registers<Types::kConsumerRegisters>();
    Consumer<Types>(params, storage, warpgroup - 1).run();
  }
}

}  // namespace fsa::kernels::sm90

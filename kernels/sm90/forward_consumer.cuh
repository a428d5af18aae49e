// SPDX-License-Identifier: Apache-2.0
// One consumer warpgroup of the forward kernel: 64 query rows, S and O in registers.
//
// Two ways through the key tiles of a work tile, and three more where tiles are voted on (forward_votes.cuh):
//
//   sweep          every tile counts: S(j + 1) and P V(j) in flight together, softmax(j + 1) under P V(j)
//   sweep_listed   tiles of a list: the same, but a tile of other warpgroups' ends the pipeline, and its V is
//                  passed over
//
// ptxas serialises every multiply of a kernel where a multiply is issued in one arm of a branch with another
// in flight (C7511, C7520). So arms are whole steps, and loops begin with nothing or just one P V in flight.
#pragma once

#include "ptx/sync.cuh"
#include "sm90/forward_types.cuh"
#include "tile/fragment.cuh"
#include "tile/ring.cuh"

namespace fsa::kernels::sm90 {

// Named barrier of the first consumer warpgroup; the others follow.
inline constexpr int32 kWarpgroupBarrier = 1;

template <class Types>
struct Voter;

// What it keeps in registers from tile to tile.
template <class Types>
struct Consumer {
  using Scores = float[Types::kBlockN / 2];
  using HalfScores = float[Types::kBlockN / 4];
  using LogitChain = typename Types::LogitChain;
  using Skip = typename Types::Skip;
  static constexpr bool kListed = Types::Tiles::kListed;

  const ForwardParams& params;
  ForwardStorage<Types>& storage;
  const int32 index;     // which consumer
  const int32 row;       // first of the thread's rows in the work tile
  uint32 query_address;  // of the warpgroup's rows

  Ring<kWorkSlots> slot;
  Ring<Types::kQueryStages> query;
  Ring<Types::kKeyStages> key;
  Ring<Types::kValueStages> value;         // loaded for all
  Ring<Types::kOwnValueStages> own_value;  // fetched by this warpgroup

  Scores rS;
  float rO[Types::kHeadDimV / 2];
  uint32 rP[Types::kBlockN / 4];
  // P times ones: row sums of P as the multiply with V sees it, two copies of each. P of a row's only key need not be
  // 1 where there is no row maximum, and O must be V even so, or the row would get a gradient: its dP - sum(dO O) is
  // then what rounding left.
  float rounded_sums[4];
  OnlineSoftmax softmax;
  Extremes alpha_extremes;     // of the warpgroup's rows; gate terms only
  bool output_staged = false;  // the previous query stage still holds output rows
  bool pending = false;        // rP waits for its multiply
  TileInfo following;          // the tile that the next keys belong to; lists only
  uint32 round = 0;            // of votes without a barrier

  FSA_DEVICE Consumer(const ForwardParams& params_, ForwardStorage<Types>& storage_, int32 index_)
      : params(params_),
        storage(storage_),
        index(index_),
        row(index_ * kRowsPerWarpgroup + fragment_row(warpgroup_thread(), 0)) {}

  // ---- Stages ----

  // Warps arrive one by one: each knows only its own share of a multiply to be complete.
  FSA_DEVICE static void release(ptx::Mbarrier& empty) {
    if (lane_id() == 0) ptx::arrive(empty);
  }

  FSA_DEVICE void wait_key() { ptx::wait(storage.key_full[key.stage()], key.phase()); }

  FSA_DEVICE void release_key(int32 stage) { release(storage.key_empty[stage]); }

  // kOwn: of values that this warpgroup has fetched for itself.
  template <bool kOwn = false>
  FSA_DEVICE int32 value_stage() const {
    if constexpr (kOwn) return index * Types::kOwnValueStages + own_value.stage();
    return value.stage();
  }

  template <bool kOwn = false>
  FSA_DEVICE void wait_value() {
    if constexpr (kOwn)
      ptx::wait(storage.own_value_full.of[value_stage<true>()], own_value.phase());
    else
      ptx::wait(storage.value_full[value_stage()], value.phase());
  }

  template <bool kOwn = false>
  FSA_DEVICE void release_value() {
    if constexpr (kOwn) {
      own_value.advance();
    } else {
      release(storage.value_empty[value_stage()]);
      value.advance();
    }
  }

  FSA_DEVICE void release_work(int32 stage) {
    __syncwarp();
    release(storage.work_empty[stage]);
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

  // ---- Multiplies ----

  // In a loop that a vote ends ring positions are not in uniform registers, and each descriptor is copied into two.
  // With 32-bit arithmetic ptxas does so between the multiplies, in their shadow, and not before the second: voting
  // kernels -2 to -6 %, at head_dim 64 -5 to -12 % of time; others would take 2 to 3 % more (H200, 2026-11).
  template <class Tile, bool kOwn>
  FSA_DEVICE static uint64 advance(uint64 descriptor, int32 bytes) {
    return kOwn ? Tile::advance_low(descriptor, bytes) : Tile::advance(descriptor, bytes);
  }

  // S = Q K^T; all columns of a tile, or as many as `r` has from column kBegin.
  template <int32 kBegin = 0, bool kOwn = false, int32 kCount>
  FSA_DEVICE void issue_scores(float (&r)[kCount]) {
    using QueryTile = typename Types::QueryTile;
    using KeyTile = typename Types::KeyTile;
    ptx::wgmma_fence();
    const uint64 a = QueryTile::inner_columns(query_address);
    const uint64 b = KeyTile::inner_columns(shared_address(storage.key[key.stage()]) + kBegin * kLineBytes);
#pragma unroll
    for (int32 step = 0; step < Types::kHeadDim / 16; ++step)
      ptx::multiply_shared<Types::kElement, 2 * kCount>(
          r, advance<QueryTile, kOwn>(a, QueryTile::inner_columns_offset(step)),
          advance<KeyTile, kOwn>(b, KeyTile::inner_columns_offset(step)), step != 0);
    if constexpr (Types::kGateTerms) issue_gate_terms<kBegin>(r);
    ptx::wgmma_commit();
  }

  // ---- The pair gate in Q K^T ----

  FSA_DEVICE GateRange gate_range(int32 stage) const {
    if constexpr (Types::kGateTerms)
      return kernels::gate_range<Types::kLogGate>(alpha_extremes, storage.gate.keys[stage].extremes);
    else
      return GateRange::any;
  }

  // Zeros where the terms do not hold: ptxas allows no branch around a multiply.
  template <int32 kBegin, int32 kCount>
  FSA_DEVICE void issue_gate_terms(float (&r)[kCount]) {
    using RowTerms = GateTermRows<kRowsPerWarpgroup>;
    using KeyTerms = GateTermRows<Types::kBlockN>;
    const bool near = gate_range(key.stage()) == GateRange::near;
    const uint64 zeros = storage.gate.zeros.inner_columns();
    const uint32 rows = shared_address(storage.gate.rows[index].terms);
    const uint32 keys =
        shared_address(storage.gate.keys[key.stage()].terms + KeyTerms::unit_offset(kBegin, 0));
#pragma unroll
    for (int32 step = 0; step < kGateSteps<Types::kLogGate>; ++step)
      ptx::multiply_shared<ElementType::bf16, 2 * kCount>(
          r, RowTerms::inner_columns(rows, step), near ? KeyTerms::inner_columns(keys, step) : zeros, 1);
  }

  // Of the warpgroup's rows. The last multiply that read the terms before is complete.
  FSA_DEVICE void make_row_terms(const WorkTile& work) {
    static_assert(kRowsPerWarpgroup == 2 * kWarpThreads);
    const int32 first = work.m_begin + index * kRowsPerWarpgroup;
    const auto load = [&](int32 in_tile) {
      const int32 row = min_of(first + in_tile, work.seqlen_q - 1);
      return load_scalar(params.alpha, work.q_map_batch, static_cast<int64>(work.q_begin) + row, work.head);
    };
    const float alpha[2] = {load(lane_id()), load(lane_id() + kWarpThreads)};  // every warp all rows
    alpha_extremes = {ptx::min_nan(alpha[0], alpha[1]), ptx::max_nan(alpha[0], alpha[1])};
    alpha_extremes.reduce_warp();
    const int32 in_tile = warpgroup_thread();
    if (in_tile < kRowsPerWarpgroup)
      store_gate_terms<Types::kLogGate, false, kRowsPerWarpgroup>(
          storage.gate.rows[index].terms, in_tile, in_tile < kWarpThreads ? alpha[0] : alpha[1], true,
          alpha_extremes);
    ptx::fence_shared_for_async();
    ptx::barrier_sync(kWarpgroupBarrier + index, kWarpgroupThreads);
  }

  // O += P V
  template <bool kOwn = false>
  FSA_DEVICE void issue_output() {
    using ValueTile = typename Types::ValueTile;
    ptx::wgmma_fence();
    const uint64 b = ValueTile::inner_rows(shared_address(storage.value[value_stage<kOwn>()]));
#pragma unroll
    for (int32 step = 0; step < Types::kBlockN / 16; ++step)
      ptx::multiply_registers<Types::kElement, Types::kHeadDimV>(
          rO, rP[4 * step], rP[4 * step + 1], rP[4 * step + 2], rP[4 * step + 3],
          advance<ValueTile, kOwn>(b, ValueTile::inner_rows_offset(step)));
    if constexpr (Types::kRoundedSums) {
      const uint64 ones = repeated_rows(shared_address(storage.ones.values));
#pragma unroll
      for (int32 step = 0; step < Types::kBlockN / 16; ++step)
        ptx::multiply_registers_columns<Types::kElement, 8, true>(
            rounded_sums, rP[4 * step], rP[4 * step + 1], rP[4 * step + 2], rP[4 * step + 3], ones);
    }
    ptx::wgmma_commit();
  }

  FSA_DEVICE void wait_output() {
    ptx::wgmma_wait<0>();
    ptx::settle(rO);
    ptx::settle(rP);
    if constexpr (Types::kRoundedSums) ptx::settle(rounded_sums);
  }

  // Behind the exponentials: ptxas moves a wait up through straight-line code, to before them, which would then
  // no longer run beside P V. It does not move one across a branch. All take this one, for the whole warpgroup
  // has to execute a wait together, but ptxas cannot know that.
  template <int32 kCount>
  FSA_DEVICE void wait_output_late(float (&r)[kCount]) {
    ptx::settle(r);
    if (params.batch > 0) ptx::wgmma_wait<0>();
    wait_output();
  }

  // Once the next keys are there. Returns their stage, for take_scores.
  template <int32 kBegin = 0, bool kOwn = false, int32 kCount>
  FSA_DEVICE int32 start_scores(float (&r)[kCount]) {
    wait_key();
    issue_scores<kBegin, kOwn>(r);
    const int32 stage = key.stage();
    if constexpr (kListed) following = storage.following[stage].info();
    key.advance();
    return stage;
  }

  // The stage of a complete S is free once the logits have read its key scalars.
  template <int32 kBegin = 0, int32 kCount>
  FSA_DEVICE void take_scores(const LogitChain& logit, float (&r)[kCount], int32 tile, int32 stage) {
    ptx::settle(r);
    if constexpr (Types::kKeyScalars) {
      logit.apply({tile * Types::kBlockN + kBegin, storage.key_scalars.of(stage) + kBegin, gate_range(stage)},
                  r);
      __syncwarp();
      release_key(stage);
    } else {
      if constexpr (kListed) __syncwarp();  // every lane has read what follows
      release_key(stage);
      logit.apply({tile * Types::kBlockN + kBegin, nullptr, GateRange::any}, r);
    }
  }

  // Which keys of a tile the thread's rows see, of its columns from kBegin. Asked for while S is in flight, where the
  // 50 instructions cost nothing; the vote of all() keeps ptxas from moving them behind the wait.
  template <int32 kCount, int32 kBegin = 0>
  FSA_DEVICE auto seen_keys(const WorkTile& work, const TileInfo& info) const {
    return Types::Mask::template seen<kCount>(params, work, info, work.m_begin + row,
                                              info.tile * Types::kBlockN + kBegin);
  }

  FSA_DEVICE void mask(const WorkTile& work, const TileInfo& info, Scores& r) {
    seen_keys<Types::kBlockN / 2>(work, info).hide_others(r);
  }

  template <int32 kCount>
  FSA_DEVICE void update_softmax(const LogitChain& logit, float (&r)[kCount]) {
    if constexpr (LogitChain::kBounded)
      softmax.update_bounded(r, logit.scale());
    else
      softmax.template update<Types::kIntegerMaxima>(r, logit.scale());
  }

  template <int32 kBegin = 0, int32 kCount>
  FSA_DEVICE void pack_probabilities(const float (&r)[kCount]) {
#pragma unroll
    for (int32 i = 0; i < Types::kBlockN / 4; ++i) {
      const int32 from = 2 * i - kBegin / 2;
      rP[i] = from >= 0 && from < kCount ? ptx::pack<Types::kElement>(r[from], r[from + 1]) : 0;
    }
  }

  // Keys beyond the used length have p = 0, but 0 * NaN is NaN: their values must not be what memory holds.
  // All warpgroups write the same zeros, each before its own multiply.
  template <bool kOwn = false>
  FSA_DEVICE void clear_unused_values(const WorkTile& work, int32 tile) {
    const int32 used = work.seqlen_k - tile * Types::kBlockN;
    if (used >= Types::kBlockN) return;
    wait_value<kOwn>();
    constexpr int32 kUnits = Types::kHeadDimV * kElementBytes / kUnitBytes;
    for (int32 item = warpgroup_thread(); item < (Types::kBlockN - used) * kUnits; item += kWarpgroupThreads)
      *reinterpret_cast<uint4*>(storage.value[value_stage<kOwn>()] +
                                Types::ValueTile::unit_offset(used + item / kUnits, item % kUnits)) =
          make_uint4(0, 0, 0, 0);
    ptx::fence_shared_for_async();
    ptx::barrier_sync(kWarpgroupBarrier + index, kWarpgroupThreads);
  }

  // ---- Every tile counts ----

  // With nothing in flight.
  template <int32 kBegin, int32 kCount>
  FSA_DEVICE void first_step(const WorkTile& work, const LogitChain& logit, TileInfo info,
                             float (&r)[kCount]) {
    const int32 stage = start_scores<kBegin>(r);
    const auto seen = seen_keys<kCount, kBegin>(work, info);
    const bool all_seen = seen.all();
    if (params.batch > 0) ptx::wgmma_wait<0>();  // a branch, as in wait_output_late
    ptx::wgmma_wait<0>();
    take_scores<kBegin>(logit, r, info.tile, stage);
    if (!all_seen) seen.hide_others(r);
    clear_unused_values(work, info.tile);
    update_softmax(logit, r);
    if constexpr (kListed) {  // O may hold earlier tiles
      if (softmax.grown) softmax.rescale(rO);
    }
    pack_probabilities<kBegin>(r);
    pending = true;
  }

  template <bool kMasked, int32 kBegin, int32 kCount>
  FSA_DEVICE void step(const WorkTile& work, const LogitChain& logit, TileInfo info, float (&r)[kCount]) {
    const int32 stage = start_scores<kBegin>(r);
    wait_value();
    issue_output();
    const auto seen = seen_keys<kCount, kBegin>(work, info);
    const bool all_seen = !kMasked || seen.all();
    ptx::wgmma_wait<1>();
    take_scores<kBegin>(logit, r, info.tile, stage);
    if (!all_seen) seen.hide_others(r);
    update_softmax(logit, r);
    wait_output_late(r);
    if (softmax.grown) softmax.rescale(rO);
    release_value();
    pack_probabilities<kBegin>(r);
    if constexpr (kMasked && kListed) clear_unused_values(work, info.tile);
  }

  template <bool kOwn = false>
  FSA_DEVICE void last_output() {
    wait_value<kOwn>();
    issue_output<kOwn>();
    wait_output();
    release_value<kOwn>();
    pending = false;
  }

  // The last P V remains, as wherever values are loaded for all.
  FSA_DEVICE void sweep(const WorkTile& work, const LogitChain& logit) {
    const Segment& first = work.segments[0];
    const TileInfo info = {first.first, first.masked != 0 ? TileInfo::kMasked : 0, -1, 0};
    if constexpr (Types::Tiles::kHalfFirst) {
      HalfScores r;
      if (first.sees_half(index))
        first_step<0>(work, logit, info, r);
      else
        first_step<0>(work, logit, info, rS);
    } else {
      first_step<0>(work, logit, info, rS);
    }
    release_query();
    for (int32 s = 0; s < work.num_segments; ++s) {
      const Segment segment = work.segments[s];
      const int32 end = segment.first - segment.count;
      int32 tile = segment.first - (s == 0);
      bool half = false;
      if constexpr (Types::Tiles::kHalfLast) half = s > 0 && segment.sees_half(index);
      if (half) {
        if constexpr (Types::Tiles::kHalfLast) {
          HalfScores r;
          step<true, Types::kBlockN / 2>(work, logit, {tile, TileInfo::kMasked, -1, 0}, r);
        }
      } else if (segment.masked) {
        for (; tile > end; --tile) step<true, 0>(work, logit, {tile, TileInfo::kMasked, -1, 0}, rS);
      } else {
        for (; tile > end; --tile) step<false, 0>(work, logit, {tile, 0, -1, 0}, rS);
      }
    }
  }

  // ---- Tiles of a list ----

  FSA_DEVICE void pass_over_key() {
    release_query();  // it may be long until a multiply of its own does
    wait_key();
    following = storage.following[key.stage()].info();
    __syncwarp();
    release_key(key.stage());
    key.advance();
  }

  FSA_DEVICE void pass_over_value() {
    wait_value();
    __syncwarp();
    release_value();
  }

  FSA_DEVICE void sweep_listed(const WorkTile& work, const LogitChain& logit) {
    while (following.exists()) {
      const TileInfo info = following;
      if (!info.belongs_to(index)) {
        pass_over_key();
        if (pending) last_output();
        pass_over_value();
      } else if (!pending) {
        first_step<0>(work, logit, info, rS);
        release_query();
      } else if (info.masked()) {
        step<true, 0>(work, logit, info, rS);
      } else {  // a loop of its own, where registers keep their places
        do {
          step<false, 0>(work, logit, following, rS);
        } while (following.belongs_to(index) && !following.masked());
      }
    }
  }

  // ---- A work tile ----

  FSA_DEVICE void clear_output() {
#pragma unroll
    for (int32 i = 0; i < Types::kHeadDimV / 2; ++i) rO[i] = 0;
    if constexpr (Types::kRoundedSums) {
#pragma unroll
      for (int32 i = 0; i < 4; ++i) rounded_sums[i] = 0;
    }
  }

  // The last P V, lse beside it, and the output, for which the queries make room.
  FSA_DEVICE void finish(const WorkTile& work, float scale) {
    using Epilogue = typename Types::Epilogue;
    constexpr bool kAlwaysPending = !Skip::kVotes && !kListed;
    const int32 row_begin = index * kRowsPerWarpgroup;
    typename Epilogue::Factors factors;
    if (kAlwaysPending || pending) {
      wait_value();
      issue_output();
      factors = Epilogue::close(params, work, row_begin, softmax, scale);
      wait_output();
      release_value();
    } else {
      factors = Epilogue::close(params, work, row_begin, softmax, scale);
    }
    if constexpr (Types::kRoundedSums)
      Epilogue::divide_by(factors, softmax, {rounded_sums[0], rounded_sums[2]});
    Epilogue::template store<Types::kElement, Types::kBlockM, Types::kHeadDimV>(
        params, work, row_begin,
        storage.query[(query.position - 1) % Types::kQueryStages] + index * (kRowsPerWarpgroup * kLineBytes),
        kWarpgroupBarrier + index, rO, factors);
    output_staged = true;
    release_work(slot.stage());
  }

  FSA_DEVICE void attend(const ListedWorkTile& work) {
    query_address = shared_address(storage.query[query.stage()] + index * (kRowsPerWarpgroup * kLineBytes));
    if constexpr (kListed) following = work.first.info();
    const LogitChain logit(params, work, work.m_begin + row, params.softmax_scale_log2);
    if constexpr (Types::kGateTerms) make_row_terms(work);
    ptx::wait(storage.query_full[query.stage()], query.phase());

    pending = false;
    softmax = OnlineSoftmax();
    clear_output();
    if constexpr (Skip::kVotes)
      Voter<Types>{*this, work, logit}.sweep();
    else if constexpr (kListed)
      sweep_listed(work, logit);
    else
      sweep(work, logit);
    release_query();  // where no multiply of its own did it
    query.advance();
    finish(work, logit.scale());
    if constexpr (Types::kQueryStages == 1) release_query();
  }

  FSA_DEVICE void run() {
    for (;; slot.advance()) {
      ptx::wait(storage.work_full[slot.stage()], slot.phase());
      const ListedWorkTile& work = storage.work[slot.stage()];
      if (work.sequence < 0) break;
      if (work.num_segments > 0) {
        attend(work);
      } else {
        Types::Epilogue::finish_empty(params, work, index * kRowsPerWarpgroup);
        release_work(slot.stage());
      }
    }
    release_query();  // shared memory must outlive the stores that read it
  }
};

}  // namespace fsa::kernels::sm90

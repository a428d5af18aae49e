// SPDX-License-Identifier: Apache-2.0
// One consumer warpgroup of the backward kernel: S, P, dS of its share of a tile, its share of dK and dV in
// registers, its share of dQ handed to an adder or added from registers.
#pragma once

#include "policy/column_parts.cuh"
#include "policy/store_gradient.cuh"
#include "ptx/reduce.cuh"
#include "ptx/sync.cuh"
#include "sm90/backward_alternate.cuh"
#include "sm90/backward_gate.cuh"
#include "sm90/backward_multiplies.cuh"
#include "sm90/backward_types.cuh"
#include "tile/fragment.cuh"
#include "tile/ring.cuh"

namespace fsa::kernels::sm90 {

// Named barriers: of all consumers, and of the first warpgroup (the other follows).
inline constexpr int32 kConsumersBarrier = 1;
inline constexpr int32 kBackwardGroupBarrier = 2;

template <class Types>
struct BackwardConsumer {
  using KeyRows = typename Types::KeyRows;
  using ValueRows = typename Types::ValueRows;
  using QueryRows = typename Types::QueryRows;
  using GradOutRows = typename Types::GradOutRows;
  using ScoreTile = typename Types::Scores;
  using Logits = typename Types::Logits;
  static constexpr ElementType kElement = Types::kElement;
  static constexpr bool kSplitKeys = Types::kSplitKeys;
  static constexpr int32 kScoreCount = Types::kScoreRows / 2;
  static constexpr int32 kQueryCount = Types::kQueryColumns / 2;
  // dQ in the registers of dP. Apart from each other ptxas spills; but with a quarter of them (head_dim 64 by
  // 64 rows) it serialises every multiply instead (C7511).
  static constexpr bool kQuerySharesProducts = kQueryCount == kScoreCount;
  using GradQuery = float[kQueryCount];
  static_assert(!Types::kFolded || Logits::kPlain,
                "lse is folded into S only where the logit is S and what is added");
  static constexpr int32 kConsumerWarps = Types::kConsumerThreads / kWarpThreads;

  const BackwardParams& params;
  BackwardStorage<Types>& storage;

  const int32 index;    // which consumer
  int32 thread;         // of the warpgroup
  uint32 tiles = 0;     // row tiles before this one: its place in all three rings
  uint32 loads = 0;     // of keys, before these
  RowTileBrief brief;   // of the tile whose S was issued last
  RowTileBrief before;  // of the one before it, where dQ follows a tile behind

  // Of the row vector that is wanted next, read while multiplies run.
  float4 ahead[Types::kUnitsAhead];  // not where they are folded

  // The terms of the warpgroup's keys as A, and the extremes of their delta.
  uint32 rGate[Types::kGateTerms ? 4 * kGateSteps<Types::kLogGate> : 1];
  Extremes delta_extremes;

  uint32 rHeld[Types::kHeldSteps > 0 ? 4 * Types::kHeldSteps : 1];  // V
  float rS[kScoreCount];                                            // S, then P
  float rD[kScoreCount];                                            // dP, then dS, then dQ
  float separate[kQuerySharesProducts ? 1 : kQueryCount];           // dQ, where it does not fit there
  uint32 rP[kScoreCount / 2];
  uint32 rdS[kScoreCount / 2];
  float rK[Types::kGradDim / 2];
  float rV[Types::kGradDimV / 2];

  FSA_DEVICE BackwardConsumer(const BackwardParams& params_, BackwardStorage<Types>& storage_, int32 index_)
      : params(params_),
        storage(storage_),
        index(index_ & 1),  // known not to be negative
        thread(own_thread()) {}

  FSA_DEVICE GradQuery& grad_query() {
    if constexpr (kQuerySharesProducts)
      return reinterpret_cast<GradQuery&>(rD);
    else
      return separate;
  }

  // Of the warpgroup's S: its first key and its first query row in the tile.
  FSA_DEVICE int32 first_key() const { return kSplitKeys ? index * kRowsPerWarpgroup : 0; }
  FSA_DEVICE int32 first_row() const { return kSplitKeys ? 0 : index * Types::kScoreRows; }

  FSA_DEVICE static Ring<Types::kQueryStages> query(uint32 tile) { return {tile}; }
  FSA_DEVICE static Ring<Types::kGradOutStages> grad_out(uint32 tile) { return {tile}; }
  FSA_DEVICE static int32 score_stage(uint32 tile) { return static_cast<int32>(tile % Types::kScoreStages); }
  FSA_DEVICE static uint32 score_phase(uint32 tile) { return tile / Types::kScoreStages & 1; }
  FSA_DEVICE const RowTileInfo& info(uint32 tile) const { return storage.info[tile % Types::kInfoStages]; }

  FSA_DEVICE int32 lane() const { return static_cast<int32>(static_cast<uint32>(thread) % kWarpThreads); }
  FSA_DEVICE int32 warp() const {
    return index * 4 + static_cast<int32>(static_cast<uint32>(thread) / kWarpThreads);
  }
  FSA_DEVICE void release(ptx::Mbarrier& empty) const {
    __syncwarp();  // all lanes have read what it speaks of, or written it
    if (lane() == 0) ptx::arrive(empty);
  }
  FSA_DEVICE static void sync_consumers() { ptx::barrier_sync(kConsumersBarrier, Types::kConsumerThreads); }
  FSA_DEVICE void sync_warpgroup() const {
    ptx::barrier_sync(kBackwardGroupBarrier + index, kWarpgroupThreads);
  }
  FSA_DEVICE int32 consumer_thread() const { return index * kWarpgroupThreads + thread; }
  FSA_DEVICE BackwardMultiplies<Types> multiplies() { return {*this}; }

  // ---- Between multiplies ----

  // The thread's values of a row vector: four of every 16 query rows.
  FSA_DEVICE const float* row_vector(int32 stage, int32 vector) const {
    return storage.row_vectors[stage][vector] + first_row() + lane() % 4 * 4;
  }
  FSA_DEVICE static const float4& unit(const float* vector, int32 i) {
    return *reinterpret_cast<const float4*>(vector + 16 * i);
  }
  FSA_DEVICE void read_ahead(int32 stage, int32 vector) {
    const float* const from = row_vector(stage, vector);
#pragma unroll
    for (int32 i = 0; i < Types::kUnitsAhead; ++i) ahead[i] = unit(from, i);
  }

  // f(value, value of its query row) for elements [kBegin, kEnd); the first kAhead units have been read.
  template <int32 kAhead, int32 kBegin = 0, int32 kEnd = kScoreCount, class Function>
  FSA_DEVICE void with_rows(float (&r)[kScoreCount], const float* vector, Function f) const {
#pragma unroll
    for (int32 i = kBegin; i < kEnd; i += 8) {
      const float4 v = i / 8 < kAhead ? ahead[min_of(i / 8, Types::kUnitsAhead - 1)] : unit(vector, i / 8);
      r[i] = f(i, r[i], v.x);
      r[i + 1] = f(i + 1, r[i + 1], v.y);
      r[i + 2] = f(i + 2, r[i + 2], v.x);
      r[i + 3] = f(i + 3, r[i + 3], v.y);
      r[i + 4] = f(i + 4, r[i + 4], v.z);
      r[i + 5] = f(i + 5, r[i + 5], v.w);
      r[i + 6] = f(i + 6, r[i + 6], v.z);
      r[i + 7] = f(i + 7, r[i + 7], v.w);
    }
  }

  FSA_DEVICE LogitRows logit_rows(const KeyWork& work, const RowTileInfo& info, int32 stage) const {
    const int32 row = info.tile * Types::kBlockM + first_row() + fragment_column(lane(), 0);
    const int32 key = work.n_begin + first_key() + fragment_row(thread, 0);
    return {work.sequence,
            info.head,
            row + work.offset() - key,
            Types::kPairGate ? row_vector(stage, Types::kAlphaVector) : nullptr,
            GateTerms<Types>::alpha_extremes(storage, stage),
            delta_extremes};
  }

  // S becomes the logits.
  FSA_DEVICE void apply_logits(const KeyWork& work, const Logits& logits) {
    logits.apply(params, logit_rows(work, info(tiles), query(tiles).stage()), rS);
  }

  // P of what is not visible becomes 0. Not S before: dP waits for the first exponentials.
  FSA_DEVICE void apply_mask(const KeyWork& work) {
    if (brief.masked())
      Types::Mask::apply(params, work, info(tiles), rS, work.n_begin + first_key() + fragment_row(thread, 0),
                         brief.tile * Types::kBlockM + first_row());
  }

  // Logits become P, in two halves.
  static constexpr int32 kHalf = kScoreCount / 2;

  template <int32 kBegin>
  FSA_DEVICE void exponentiate(const Logits& logits) {
    const float scale = logits.scale();
    if constexpr (Types::kFolded) {
#pragma unroll
      for (int32 i = kBegin; i < kBegin + kHalf; ++i) rS[i] *= scale;
    } else {
      const int32 stage = query(tiles).stage();
      with_rows<Types::kUnitsAhead, kBegin, kBegin + kHalf>(
          rS, row_vector(stage, 0), [&](int32, float s, float lse) { return s * scale - lse; });
      if constexpr (kBegin != 0) read_ahead(stage, 1);
    }
#pragma unroll
    for (int32 i = kBegin; i < kBegin + kHalf; ++i) rS[i] = ptx::exp2_approx(rS[i]);
  }

  // dP becomes dS, and P is used up.
  FSA_DEVICE void differentiate(const KeyWork& work, Logits& logits, int32 stage) {
    if constexpr (Types::kFolded) {
#pragma unroll
      for (int32 i = 0; i < kScoreCount; ++i) rD[i] *= rS[i];
    } else {
      with_rows<Types::kUnitsAhead>(rD, row_vector(stage, 1),
                                    [&](int32 i, float d, float mean) { return rS[i] * (d - mean); });
    }
#pragma unroll
    for (int32 i = 0; i < kScoreCount / 2; ++i) rP[i] = ptx::pack<kElement>(rS[2 * i], rS[2 * i + 1]);
    if constexpr (Logits::kNeedsValue) {
      const float inverse = 1 / logits.scale();
      with_rows<0>(rS, row_vector(stage, 0),
                   [&](int32, float p, float lse) { return (ptx::log2_approx(p) + lse) * inverse; });
    }
    logits.derive(params, logit_rows(work, info(tiles), stage), rS, rD);
    if constexpr (!kSplitKeys) GateGradients<Types>::sum(*this, work, logits, stage);
#pragma unroll
    for (int32 i = 0; i < kScoreCount / 2; ++i) rdS[i] = ptx::pack<kElement>(rD[2 * i], rD[2 * i + 1]);
  }

  // The warpgroup's share of P^T or dS^T, a line per key.
  FSA_DEVICE void store_scores(const uint32 (&r)[kScoreCount / 2], uint8* scores) {
    const int32 key = first_key() + thread / kWarpThreads * 16 + lane() % 16;
    const uint32 base = shared_address(scores);
#pragma unroll
    for (int32 i = 0; i < kScoreCount / 2; i += 4)
      ptx::store_matrices(base + ScoreTile::unit_offset(key, first_row() / 8 + i / 2 + lane() / 16), r[i],
                          r[i + 1], r[i + 2], r[i + 3]);
  }

  // Sums of dQ lie in the order in which warps hold them: for each warp kQueryCount / 4 times 32 lanes by four
  // floats. Staged in shared memory they are added by the copy engine; 16 bytes a lane at a time straight from
  // the registers cost 20 % (H200, head_dim 128), but need no room.
  static constexpr int32 kWarpFloats = kQueryCount * kWarpThreads;

  // Room for the sums of this CTA's row tile number `tile`; wait for it while multiplies are in flight.
  FSA_DEVICE void wait_room(uint32 tile) {
    if constexpr (Types::kStagedGradQuery) ptx::wait(storage.handed_empty[index], (tile & 1) ^ 1);
  }

  // After this the registers of dQ are free.
  FSA_DEVICE void stage_grad_query(const GradQuery& rQ) {
    float4* const staged = reinterpret_cast<float4*>(storage.grad_query.of_warp(warp())) + lane();
#pragma unroll
    for (int32 i = 0; i < kQueryCount; i += 4)
      staged[i / 4 * kWarpThreads] = make_float4(rQ[i], rQ[i + 1], rQ[i + 2], rQ[i + 3]);
  }

  // What has been staged. The adder's alone until it says so.
  FSA_DEVICE void hand_over(const StagedSums& sums) {
    ptx::fence_shared_for_async();
    if (thread == 0) storage.handed.sums[index] = sums;
    release(storage.handed_full[index]);
  }

  FSA_DEVICE int64 turn_of(int32 number) const {
    return static_cast<int64>(number) * kConsumerWarps + warp();
  }
  // Deterministic: key tiles add to a row tile in the order in which they were issued. Looked for under multiplies: it
  // takes 700 clocks. Not an acquire, which would hold up what comes between: additions are behind a branch on it.
  FSA_DEVICE int32 look_for_turn() const {
    if constexpr (Types::kDeterministic) return ptx::load_relaxed(params.turns + turn_of(brief.number));
    return -1;
  }
  FSA_DEVICE void wait_turn(int32 seen) {
    if constexpr (Types::kDeterministic) {
      if (warp_uniform(seen) == brief.rank()) return;
      if (lane() == 0) ptx::wait_until_equal(params.turns + turn_of(brief.number), brief.rank());
      __syncwarp();
    }
  }
  // A branch that whole warps take, not a choice at each addition: what ptxas makes of the loop round it stays.
  FSA_DEVICE void add_from_registers() {
    const GradQuery& rQ = grad_query();
    float* const to = params.grad_query_sum + turn_of(brief.number) * kWarpFloats + lane() * 4;
    if (Types::kFirstStores && warp_uniform(brief.rank()) == 0) {
#pragma unroll
      for (int32 i = 0; i < kQueryCount; i += 4)
        *reinterpret_cast<float4*>(to + i * kWarpThreads) =
            make_float4(rQ[i], rQ[i + 1], rQ[i + 2], rQ[i + 3]);
    } else {
#pragma unroll
      for (int32 i = 0; i < kQueryCount; i += 4)
        ptx::add_four(to + i * kWarpThreads, rQ[i], rQ[i + 1], rQ[i + 2], rQ[i + 3]);
    }
    GateGradients<Types>::template add_alpha<Types::kConsumerThreads>(params, storage, brief.number,
                                                                      score_stage(tiles), consumer_thread());
  }
  // Of row tile `number`, this CTA's number `tile`; -1: there will be no more.
  FSA_DEVICE void pass_turn(int32 number, uint32 tile) {
    if constexpr (Types::kPassesTurns) {
      ptx::wait(storage.handed_empty[warp()], (tile & 1) ^ 1);
      if (lane() == 0) storage.handed.row_tiles[warp()] = number;
      release(storage.handed_full[warp()]);
    }
  }

  // Rows beyond the used length would meet factors of 0, but 0 * NaN is NaN. All consumers call it.
  template <class Rows, int32 kRows>
  FSA_DEVICE void clear_rows(uint8* shared, int32 used) {
    constexpr int32 kUnits = Rows::kChunks * (kLineBytes / kUnitBytes);
#pragma unroll 1
    for (int32 item = consumer_thread(); item < (kRows - used) * kUnits; item += Types::kConsumerThreads)
      *reinterpret_cast<uint4*>(shared + Rows::unit_offset(used + item / kUnits, item % kUnits)) =
          make_uint4(0, 0, 0, 0);
    ptx::fence_shared_for_async();
    // Of one row tile either step may be the other warpgroup's.
    if constexpr (Types::kAlternates)
      ptx::barrier_sync_anywhere(kConsumersBarrier, Types::kConsumerThreads);
    else
      sync_consumers();
  }

  // Row tile number `tile` of this CTA, as soon as its Q is there.
  FSA_DEVICE RowTileBrief find(uint32 tile) {
    ptx::wait(storage.query_full[query(tile).stage()], query(tile).phase());
    return info(tile);
  }

  // S of a tile that has been found, and its lse.
  FSA_DEVICE void start_scores(uint32 tile, const RowTileBrief& of) {
    const int32 stage = query(tile).stage();
    if (of.used < Types::kBlockM) clear_rows<QueryRows, Types::kBlockM>(storage.query[stage], of.used);
    multiplies().issue_scores(tile);
    if constexpr (!Types::kFolded) read_ahead(stage, 0);
  }

  // Once dO is there.
  FSA_DEVICE void start_products(uint32 tile, const RowTileBrief& of) {
    const int32 stage = grad_out(tile).stage();
    ptx::wait(storage.grad_out_full[stage], grad_out(tile).phase());
    if (of.used < Types::kBlockM) clear_rows<GradOutRows, Types::kBlockM>(storage.grad_out[stage], of.used);
    multiplies().issue_products(tile);
  }

  // ---- One row tile ----

  // P and dP of the tile are in registers and nothing is in flight, before and after: ptxas follows groups in
  // flight along straight lines, not round a loop.
  template <bool kLast>
  FSA_DEVICE void step(const KeyWork& work, Logits& logits, bool first) {
    thread = opaque(thread);
    if constexpr (kLast && Types::kStageInScores) release(storage.value_empty[0]);
    if constexpr (kSplitKeys) ptx::wait(storage.scores_empty[score_stage(tiles)], score_phase(tiles) ^ 1);
    differentiate(work, logits, query(tiles).stage());
    if constexpr (kSplitKeys)
      multiply_split_keys<kLast>(work, logits, first);
    else
      multiply_split_columns<kLast>(work, logits, first);
    if constexpr (!kLast) finish_products();
  }

  // dV and dK need nothing of the other warpgroup; dQ needs its dS, and follows a tile behind. So the two can
  // be up to a tile apart, and one's multiplies run beside the other's arithmetic. Whatever waits, for memory
  // or for others, does so while this warpgroup's multiplies run.
  template <bool kLast>
  FSA_DEVICE void multiply_split_keys(const KeyWork& work, Logits& logits, bool first) {
    const int32 stage = query(tiles).stage(), grad_out_stage = grad_out(tiles).stage();
    store_scores(rdS, storage.scores[score_stage(tiles)][0]);
    multiplies().template issue_gradient<GradOutRows, Types::kGradDimV>(rV, rP, nullptr,
                                                                        storage.grad_out[grad_out_stage]);
    multiplies().template issue_gradient<QueryRows, Types::kGradDim>(rK, rdS, nullptr, storage.query[stage]);
    GateGradients<Types>::sum(*this, work, logits, stage);
    ptx::fence_shared_for_async();
    release(storage.scores_full[score_stage(tiles)]);
    RowTileBrief next;
    if (!first) {
      wait_room(tiles - 1);
      ptx::wait(storage.scores_full[score_stage(tiles - 1)], score_phase(tiles - 1));
    }
    ptx::wgmma_wait<0>();  // frees the registers of P and dS
    ptx::settle(rV);
    ptx::settle(rP);
    ptx::settle(rK);
    ptx::settle(rdS);
    release(storage.grad_out_empty[grad_out_stage]);
    release(storage.query_empty[stage]);
    // Of the first tile something that nobody will look at.
    multiplies().issue_grad_query(tiles - 1, grad_query());
    if constexpr (kLast) {
      if constexpr (kLastTogether) issue_last_grad_query();
    } else {
      next = find(tiles + 1);  // sooner, it waits for a Q that has just been asked for
      start_scores(tiles + 1, next);
    }
    constexpr int32 kInFlight = kLast && !kLastTogether ? 0 : 1;
    ptx::wgmma_wait<kInFlight>();
    ptx::settle(grad_query());
    if (!first) stage_grad_query(grad_query());
    if constexpr (kLast) {
      if (!first) finish_grad_query(tiles - 1, before, brief.number);
      before = brief;
      if constexpr (!kLastTogether) issue_last_grad_query();
      ptx::wgmma_wait<0>();
      ptx::settle(last_grad_query());
      if constexpr (Types::kStageInScores) release(storage.key_empty[0]);  // sooner than there is room
      wait_room(tiles);
      stage_grad_query(last_grad_query());
      finish_grad_query(tiles, before, -1);
      ++tiles;
    } else {
      // dP has to wait until dQ has left its registers, which takes longer than S.
      const RowTileBrief added = before;
      before = brief;
      brief = next;
      ++tiles;
      ptx::wgmma_wait<0>();
      ptx::settle(rS);
      if constexpr (Logits::kPlain) {
        apply_logits(work, logits);
        exponentiate<0>(logits);
        ptx::settle(reinterpret_cast<float (&)[kHalf]>(rS[0]));  // or ptxas would move them behind dP
        start_products(tiles, brief);
      } else {  // a chain takes longer than that
        start_products(tiles, brief);
        if (!first) finish_grad_query(tiles - 2, added, before.number);
        apply_logits(work, logits);
        exponentiate<0>(logits);
      }
      exponentiate<kHalf>(logits);
      apply_mask(work);
      if (Logits::kPlain && !first) finish_grad_query(tiles - 2, added, before.number);
    }
  }

  // dQ of the last row tile takes the registers of S, of which none will come, so that it need not wait until the one
  // before has left. That one leaves later, when the other warpgroup's dS is there: lists, whose warpgroups are further
  // apart, and deterministic sums, whose turns wait for it, lose 0.7 %; others gain 0.5 to 1.5.
  static constexpr bool kLastTogether = !Types::kSplits && !Types::kDeterministic;

  FSA_DEVICE GradQuery& last_grad_query() {
    static_assert(kQueryCount <= kScoreCount);
    return reinterpret_cast<GradQuery&>(rS);
  }
  FSA_DEVICE void issue_last_grad_query() {
    ptx::wait(storage.scores_full[score_stage(tiles)], score_phase(tiles));
    multiplies().issue_grad_query(tiles, last_grad_query());
  }

  FSA_DEVICE void finish_grad_query(uint32 tile, const RowTileBrief& of, int32 next) {
    hand_over({of.number, of.order(), score_stage(tile), Types::kSaysNext ? next : -1});
    release(storage.scores_empty[score_stage(tile)]);
  }

  // All three products need the other warpgroup's half of P and dS.
  template <bool kLast>
  FSA_DEVICE void multiply_split_columns(const KeyWork& work, const Logits& logits, bool first) {
    const int32 stage = query(tiles).stage(), grad_out_stage = grad_out(tiles).stage();
    uint8* const scores = storage.scores[score_stage(tiles)][0];
    store_scores(rdS, scores);
    store_scores(rP, scores + ScoreTile::kBytes);
    ptx::fence_shared_for_async();
    sync_consumers();
    multiplies().template issue_gradient<GradOutRows, Types::kGradDimV>(rV, rP, scores + ScoreTile::kBytes,
                                                                        storage.grad_out[grad_out_stage]);
    multiplies().issue_grad_query(tiles, grad_query());
    multiplies().template issue_gradient<QueryRows, Types::kGradDim>(rK, rdS, scores, storage.query[stage]);
    const int32 seen = look_for_turn();
    RowTileBrief next;
    if constexpr (!kLast) next = find(tiles + 1);
    wait_turn(seen);
    ptx::wgmma_wait<1>();
    ptx::settle(rV);
    ptx::settle(grad_query());
    release(storage.grad_out_empty[grad_out_stage]);
    add_from_registers();
    pass_turn(brief.number, tiles);
    ++tiles;
    if constexpr (kLast) {
      ptx::wgmma_wait<0>();
    } else {
      brief = next;
      start_scores(tiles, brief);
      start_products(tiles, brief);
      ptx::wgmma_wait<1>();
      ptx::settle(rS);
    }
    ptx::settle(rK);
    release(storage.query_empty[stage]);
    if constexpr (!kLast) {
      apply_logits(work, logits);
      exponentiate<0>(logits);
      exponentiate<kHalf>(logits);
      apply_mask(work);
    }
  }

  // S has become P and dP is in flight.
  FSA_DEVICE void finish_products() {
    ptx::settle(rS);
    // Behind the exponentials, not before them: ptxas moves a wait up through straight-line code, but not
    // across a branch. All take it.
    if (params.forward.batch > 0) ptx::wgmma_wait<0>();
    ptx::wgmma_wait<0>();
    ptx::settle(rD);
  }

  // ---- A work unit ----

  // K or V: the warpgroup's keys, or all where some are to be cleared.
  FSA_DEVICE void wait_keys(ptx::Mbarrier (&full)[Types::kKeyLoads], const KeyWork& work) const {
    ptx::wait(full[Types::kKeyLoads > 1 ? index : 0], work.loads & 1);
    if constexpr (Types::kKeyLoads > 1)
      if (work.partial(Types::kBlockN)) ptx::wait(full[index ^ 1], work.loads & 1);
  }

  FSA_DEVICE void differentiate_keys(const KeyWork& work) {
#pragma unroll
    for (int32 i = 0; i < Types::kGradDim / 2; ++i) rK[i] = 0;
#pragma unroll
    for (int32 i = 0; i < Types::kGradDimV / 2; ++i) rV[i] = 0;
    Logits logits(params, work, work.n_begin + first_key() + fragment_row(thread, 0),
                  params.forward.softmax_scale_log2);
    if constexpr (Types::kPassesOver) {
      const bool passes = warp_any(index != 0 && (find(tiles).flags & RowTileBrief::kSecondPasses) != 0);
      if (passes) AlternatingSteps<Types>{*this}.pass_over(tiles);
      tiles += passes ? 1 : 0;
    }
    wait_keys(storage.key_full, work);
    if (work.partial(Types::kBlockN))
      clear_rows<KeyRows, Types::kBlockN>(storage.key(loads), work.seqlen_k - work.n_begin);
    GateTerms<Types>::make(*this, work, logits);
    brief = find(tiles);
    start_scores(tiles, brief);
    wait_keys(storage.value_full, work);
    if (work.partial(Types::kBlockN))
      clear_rows<ValueRows, Types::kBlockN>(storage.value(loads), work.seqlen_k - work.n_begin);
    multiplies().hold_values();
    start_products(tiles, brief);
    if constexpr (Types::kKeyLoads > 1) {  // for dQ. Not before all have seen it may it be filled again
      ptx::wait(storage.key_full[index ^ 1], work.loads & 1);
      release(storage.value_empty[index ^ 1]);
    }
    ptx::wgmma_wait<1>();
    ptx::settle(rS);
    apply_logits(work, logits);
    exponentiate<0>(logits);
    exponentiate<kHalf>(logits);
    apply_mask(work);
    finish_products();
    if constexpr (Types::kStageInScores && !Types::kAlternates) finish_store();  // of the work before

    if constexpr (Types::kAlternates) {
      AlternatingSteps<Types>{*this}.run(work, logits);
    } else {
      bool first = true;
      for (; !brief.last(); first = false) step<false>(work, logits, first);
      step<true>(work, logits, first);
      sync_consumers();  // the other warpgroup, too, has finished with K, V and dS
    }
    GateGradients<Types>::store_delta(*this, work, logits);
    if constexpr (Types::kAlternates) {
      if (is_part(work)) store_part<Types>(params, work.part.slot, first_key(), 0, rK, rV);
      AlternatingSteps<Types>{*this}.store(grad_key_rows(params), work, rK, params.softmax_scale);
    } else if (is_part(work)) {
      store_part<Types>(params, work.part.slot, first_key(), kSplitKeys ? 0 : index, rK, rV);
      if constexpr (!Types::kStageInScores)
        if (thread == 0) release_keys();  // all have finished with them
    } else {
      store(work);
    }
  }

  FSA_DEVICE static bool is_part(const KeyWork& work) { return Types::kSplits && work.part.slot >= 0; }

  // Nobody sees them.
  FSA_DEVICE void clear_keys(const KeyWork& work) {
    const int32 count = min_of(Types::kBlockN, work.keys - work.n_begin);
    clear_gradient<Types::kConsumerThreads>(grad_key_rows(params), work, count, consumer_thread());
    clear_gradient<Types::kConsumerThreads>(grad_value_rows(params), work, count, consumer_thread());
    GateGradients<Types>::clear_delta(*this, work, count);
  }

  // Gradients leave through shared memory: the warpgroup's own lines of the stages of dS, or of K and V.
  FSA_DEVICE void store(const KeyWork& work) {
    const int32 half = kSplitKeys ? 0 : index;  // of the columns
    uint8* const keys = Types::kStageInScores ? storage.scores[0][0] : storage.key(loads);
    uint8* const values = Types::kStageInScores ? keys + KeyRows::kBytes : storage.value(loads);
    uint8* const shared_key =
        keys + first_key() * kLineBytes + half * (Types::kGradDim / kChunkColumns) * KeyRows::kChunkBytes;
    uint8* const shared_value = values + first_key() * kLineBytes +
                                half * (Types::kGradDimV / kChunkColumns) * ValueRows::kChunkBytes;
    stage_gradient<kElement, Types::kBlockN, Types::kGradDim>(shared_key, rK, params.softmax_scale);
    stage_gradient<kElement, Types::kBlockN, Types::kGradDimV>(shared_value, rV, 1.0f);
    ptx::fence_shared_for_async();
    sync_warpgroup();
    const int32 key = work.n_begin + first_key();
    if (key < work.keys) {
      store_gradient<Types::kBlockN, Types::kGradDim>(grad_key_rows(params), work, key,
                                                      half * Types::kGradDim, shared_key);
      store_gradient<Types::kBlockN, Types::kGradDimV>(grad_value_rows(params), work, key,
                                                       half * Types::kGradDimV, shared_value);
    }
    if (thread == 0) ptx::commit_stores();
    if constexpr (!Types::kStageInScores) {
      ptx::fence_shared_for_async();
      finish_store();
      if (thread == 0) release_keys();
    }
  }

  FSA_DEVICE void release_keys() const {
    ptx::arrive(storage.value_empty[0]);
    ptx::arrive(storage.key_empty[0]);
  }

  // The shared memory that gradients left through is free.
  FSA_DEVICE void finish_store() {
    if (thread == 0) ptx::wait_stores_read();
    sync_warpgroup();
  }

  FSA_DEVICE void run() {
    for (uint32 unit = 0;;) {
      const Ring<kWorkSlots> slot = {unit};
      ptx::wait(storage.work_full[slot.stage()], slot.phase());
      const KeyWork& work = storage.work[slot.stage()];
      if (work.sequence < 0) break;
      if (work.num_segments > 0) {
        differentiate_keys(work);
        ++loads;
      } else if (is_part(work)) {
        clear_part<Types>(params, work.part.slot, consumer_thread());
      } else {
        clear_keys(work);
      }
      unit = static_cast<uint32>(work.number) + 1;
      release(storage.work_empty[unit % kWorkSlots ^ 1]);
    }
    pass_turn(-1, tiles);
    if (thread == 0) ptx::wait_stores_read();  // shared memory must outlive the stores that read it
    // Nobody wants it; but without it ptxas serialises every multiply of a deterministic kernel of head_dim 64.
    if constexpr (Types::kStagedGradQuery && !Types::kAlternates) wait_room(tiles);
  }
};

}  // namespace fsa::kernels::sm90

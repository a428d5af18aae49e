// SPDX-License-Identifier: Apache-2.0
// Row tiles of a consumer warpgroup where the two alternate: dQ of even row tiles is the first's, of odd ones the
// second's.
//
//   tensor   dV(j) dK(j) ... | dQ(j-1) | S(j+1) dP(j+1) ... | dV(j+1) dK(j+1) ... | S(j+2) dP(j+2) ...
//   others   publish dS(j)   | find j+1, take dQ(j-1)       | publish dS(j+1)     | find j+2 ...
//
// dQ takes the registers of S and dP, half of its columns each, and leaves in two halves of 16 KB: one through memory of
// its own, the other through the stage of the dS that it was computed from, which is the warpgroup's until its adder
// gives it back. A warpgroup hands over each of its row tiles, the last of them when the work ends. dV is stored while the
// last dQ is in flight, dK behind it.
//
// Of a window the second half of the keys may see nothing of a column's first row tile, and the first half nothing of the
// last. Then that warpgroup passes over the row tile, with zeros as its dS, or, of the last, with K of the other half. So
// the first warpgroup ends a unit of work a row tile before the second, and begins the next one sooner; that takes K and V
// that are loaded by halves: one row tile of ten less (windows of 512: 7 % of the time; with K and V whole 2 %).
//
// ptxas keeps what follows from the number of the row tile in uniform registers as long as nothing unlikely happens round
// the loop; else every multiply costs an R2UR (4 % of the time). It does not bear: values that were selected by address, a
// wait with dQ in flight, gradients that leave through a stage of dS, a first step without the release of V. A number that
// depends on a condition has to depend on a vote (warp_any), even where all lanes have read the same.
#pragma once

#include "policy/store_gradient.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/sync.cuh"
#include "sm90/backward_types.cuh"

namespace fsa::kernels::sm90 {

template <class Types>
struct BackwardConsumer;

template <class Types>
struct AlternatingSteps {
  using Logits = typename Types::Logits;
  static constexpr int32 kScoreCount = Types::kScoreRows / 2;

  BackwardConsumer<Types>& c;

  // All row tiles of the work, when P and dP of the first are in registers.
  FSA_DEVICE void run(const KeyWork& work, Logits& logits) {
    bool first = true;
    for (; !ends(); first = false) {
      if (!first && owns(c.tiles - 1))
        step<true>(work, logits);
      else
        step<false>(work, logits);
    }
    last_step(work, logits, first);
  }

  // A gradient of keys or values, through the warp's 2 KB of a slot that is no stage of dS; not of a part.
  FSA_DEVICE void store(const GradientRows& to, const KeyWork& work, const float (&r)[2 * kScoreCount],
                        float factor) {
    const int32 first_row = c.warp() * kWarpRows, key = work.n_begin + first_row;
    store_warp_gradient<Types::kElement, 4 * kScoreCount>(
        to, work, key, c.is_part(work) ? 0 : work.keys - key, r, factor,
        c.storage.scores[Types::kScoreStages][0] + first_row * kLineBytes);
  }

  // A row tile that the warpgroup's keys do not see: zeros as its dS.
  FSA_DEVICE void pass_over(uint32 tile) const {
    const int32 scores = c.score_stage(tile);
    c.find(tile);
    ptx::wait(c.storage.grad_out_full[c.grad_out(tile).stage()], c.grad_out(tile).phase());
    c.release(c.storage.query_empty[c.query(tile).stage()]);
    c.release(c.storage.grad_out_empty[c.grad_out(tile).stage()]);
    ptx::wait(c.storage.scores_empty[scores], c.score_phase(tile) ^ 1);
    uint4* const own = reinterpret_cast<uint4*>(c.storage.scores[scores][0] + c.first_key() * kLineBytes);
#pragma unroll
    for (int32 i = 0; i < kRowsPerWarpgroup * kLineBytes / kUnitBytes; i += kWarpgroupThreads)
      own[i + c.thread] = make_uint4(0, 0, 0, 0);
    ptx::fence_shared_for_async();
    c.release(c.storage.scores_full[scores]);
  }

 private:
  FSA_DEVICE bool ends() const {
    if constexpr (Types::kPassesOver)
      return (c.brief.flags & (RowTileBrief::kLast | (c.index == 0 ? RowTileBrief::kFirstEnds : 0))) != 0;
    return c.brief.last();
  }
  FSA_DEVICE bool owns(uint32 tile) const { return ((tile ^ static_cast<uint32>(c.index)) & 1) == 0; }

  FSA_DEVICE static int32 order(const RowTileBrief& of) { return Types::kDeterministic ? of.order() : 0; }

  // A row tile that is not the last; kAdds: dQ of the one before is this warpgroup's.
  template <bool kAdds>
  FSA_DEVICE void step(const KeyWork& work, Logits& logits) {
    start_gradients(work, logits);
    if constexpr (kAdds) {
      const uint32 tile = c.tiles - 1;
      c.wait_room(tile / 2);
      wait_scores(tile);
      finish_gradients();
      c.multiplies().issue_whole_grad_query(tile, false);
    } else {
      finish_gradients();
    }
    const RowTileBrief next = c.find(c.tiles + 1);
    if constexpr (kAdds) {
      take_grad_query();
      stage_left_half();
      c.multiplies().forget(c.rS);
    }
    c.start_scores(c.tiles + 1, next);
    if constexpr (kAdds) stage_right_half(c.tiles - 1);
    c.multiplies().forget(c.rD);
    const StagedSums sums = {c.before.number, order(c.before), c.score_stage(c.tiles - 1), next.number};
    c.before = c.brief;
    c.brief = next;
    ++c.tiles;
    c.start_products(c.tiles, c.brief);
    if constexpr (kAdds) c.hand_over(sums);
    ptx::wgmma_wait<1>();
    ptx::settle(c.rS);
    c.template exponentiate<0>(logits);
    c.template exponentiate<BackwardConsumer<Types>::kHalf>(logits);
    c.apply_mask(work);
    c.finish_products();
  }

  // Of the last two row tiles one is this warpgroup's. Where there is but one, and not its own, it hands over nothing,
  // and twice, so that the phase of a handover follows from the number of the row tile.
  FSA_DEVICE void last_step(const KeyWork& work, Logits& logits, bool first) {
    c.release(c.storage.value_empty[Types::kKeyLoads > 1 ? c.index : 0]);
    // Of this row tile the first half of the keys sees nothing, and the next V may take its place.
    const bool half =
        Types::kPassesOver && warp_any(c.index != 0 && (c.brief.flags & RowTileBrief::kFirstEnds) != 0);
    if (half) c.release(c.storage.key_empty[0]);
    start_gradients(work, logits);
    const bool own = owns(c.tiles), none = first && !own;
    const uint32 tile = own ? c.tiles : c.tiles - 1;
    uint32 handover = tile / 2 + (none ? 1 : 0);
    c.wait_room(handover);
    if (!none) wait_scores(tile);
    finish_gradients();
    const bool passes = Types::kPassesOver && warp_any(!c.brief.last());
    if (passes) pass_over(c.tiles + 1);
    c.multiplies().issue_whole_grad_query(tile, half);
    store(grad_value_rows(c.params), work, c.rV, 1.0f);
    take_grad_query();
    if (!half) c.release(c.storage.key_empty[0]);
    if constexpr (Types::kKeyLoads > 1) c.release(c.storage.key_empty[1]);
    if (none) {
      c.hand_over({-1, 0, 0, -1});
      c.wait_room(++handover);
    } else {
      stage_left_half();
      stage_right_half(tile);
    }
    const int32 number = own ? c.brief.number : c.before.number;
    const int32 order_of = own ? order(c.brief) : order(c.before);
    c.hand_over({none ? -1 : number, order_of | RowTileBrief::kOrderLast, c.score_stage(tile), -1});
    c.multiplies().forget(c.rS);
    c.multiplies().forget(c.rD);
    c.tiles += passes ? 2 : 1;
  }

  // dS leaves for shared memory, dV and dK begin.
  FSA_DEVICE void start_gradients(const KeyWork& work, Logits& logits) {
    using Consumer = BackwardConsumer<Types>;
    c.thread = opaque(c.thread);
    const int32 query = c.query(c.tiles).stage(), scores = c.score_stage(c.tiles);
    ptx::wait(c.storage.scores_empty[scores], c.score_phase(c.tiles) ^ 1);
    c.differentiate(work, logits, query);
    c.store_scores(c.rdS, c.storage.scores[scores][0]);
    c.multiplies().template issue_gradient<typename Consumer::GradOutRows, Types::kGradDimV>(
        c.rV, c.rP, nullptr, c.storage.grad_out[c.grad_out(c.tiles).stage()]);
    c.multiplies().template issue_gradient<typename Consumer::QueryRows, Types::kGradDim>(
        c.rK, c.rdS, nullptr, c.storage.query[query]);
    ptx::fence_shared_for_async();
    c.release(c.storage.scores_full[scores]);
  }

  // Which frees the registers of P and dS.
  FSA_DEVICE void finish_gradients() {
    ptx::wgmma_wait<0>();
    ptx::settle(c.rV);
    ptx::settle(c.rP);
    ptx::settle(c.rK);
    ptx::settle(c.rdS);
    c.release(c.storage.grad_out_empty[c.grad_out(c.tiles).stage()]);
    c.release(c.storage.query_empty[c.query(c.tiles).stage()]);
  }

  // dS of both warpgroups.
  FSA_DEVICE void wait_scores(uint32 tile) const {
    ptx::wait(c.storage.scores_full[c.score_stage(tile)], c.score_phase(tile));
  }

  FSA_DEVICE void take_grad_query() {
    ptx::wgmma_wait<0>();
    ptx::settle(c.rS);
    ptx::settle(c.rD);
  }
  FSA_DEVICE void stage_left_half() {
    stage_half(c.storage.grad_query.of_warp(c.index * kWarpsOfGroup), c.rS);
  }
  FSA_DEVICE void stage_right_half(uint32 tile) {
    c.sync_warpgroup();  // all warps have read dS
    stage_half(c.storage.scores[c.score_stage(tile)][0], c.rD);
  }
  FSA_DEVICE void stage_half(uint8* staged, const float (&r)[kScoreCount]) const {
    constexpr int32 kWarpBytes = kScoreCount * kWarpThreads * 4;
    float4* const to = reinterpret_cast<float4*>(staged + c.thread / kWarpThreads * kWarpBytes) + c.lane();
#pragma unroll
    for (int32 i = 0; i < kScoreCount; i += 4)
      to[i / 4 * kWarpThreads] = make_float4(r[i], r[i + 1], r[i + 2], r[i + 3]);
  }

  static constexpr int32 kWarpRows = 16;
  static constexpr int32 kWarpsOfGroup = kWarpgroupThreads / kWarpThreads;
};

}  // namespace fsa::kernels::sm90

// SPDX-License-Identifier: Apache-2.0
// The pair gate in the backward kernel: its terms in S, and the gradients of alpha and delta. Nothing in kernels without
// it. The gate itself and its slopes are LogitBackward's.
#pragma once

#include "policy/column_parts.cuh"
#include "policy/gate_terms.cuh"
#include "policy/scalar.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/reduce.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/backward_types.cuh"
#include "tile/fragment.cuh"

namespace fsa::kernels::sm90 {

template <class Types>
struct BackwardConsumer;

// The adder takes alpha's sums to global memory, too, and then frees the stage of dS.
template <class Types>
inline constexpr bool kAdderReadsAlpha = Types::kPairGate && Types::kStagedGradQuery;

// FoldedPairGate: the gate in S. The terms of a warpgroup's keys are an A operand in its registers, those of query rows
// come with Q.
template <class Types, bool kThere = Types::kGateTerms>
struct GateTerms {
  using Consumer = BackwardConsumer<Types>;
  static constexpr int32 kSteps = kGateSteps<Types::kLogGate>;

  // Of the warpgroup's 64 keys; every warp finds the extremes of all.
  FSA_DEVICE static void make(Consumer& c, const KeyWork& work, const typename Types::Logits& logits) {
    const int32 first = work.n_begin + c.first_key();
    c.delta_extremes = Extremes();
#pragma unroll
    for (int32 i = 0; i < kRowsPerWarpgroup / kWarpThreads; ++i) {
      const int32 key = min_of(first + c.lane() + i * kWarpThreads, work.seqlen_k - 1);
      const float delta = load_scalar(c.params.forward.delta, work.k_map_batch,
                                      static_cast<int64>(work.k_begin) + key, work.kv_head);
      c.delta_extremes.include({delta, delta});
    }
    c.delta_extremes.reduce_warp();
#pragma unroll
    for (int32 row = 0; row < kRowsPerThread; ++row) {
      uint32 terms[kGateTerms / 2];
      make_gate_terms<Types::kLogGate, true>(
          has_gate_terms<Types::kLogGate>(c.delta_extremes) ? logits.first.delta[row] : 0.0f, terms);
      const int32 pair = c.lane() % 4;
#pragma unroll
      for (int32 unit = 0; unit < 2 * kSteps; ++unit) {
        const uint32* const of = terms + 4 * unit;
        c.rGate[2 * unit + row] = pair == 0 ? of[0] : pair == 1 ? of[1] : pair == 2 ? of[2] : of[3];
      }
    }
  }

  // Zeros where the terms do not hold: ptxas allows no branch around a multiply.
  FSA_DEVICE static void issue(Consumer& c, int32 stage) {
    using RowTerms = GateTermRows<Types::kBlockM>;
    const auto& rows = c.storage.gate.rows[stage];
    const bool near = gate_range<Types::kLogGate>(rows.extremes, c.delta_extremes) == GateRange::near;
    const uint64 zeros = c.storage.gate.zeros.inner_columns();
    const uint32 base = shared_address(rows.terms + RowTerms::unit_offset(c.first_row(), 0));
#pragma unroll
    for (int32 step = 0; step < kSteps; ++step)
      ptx::multiply_registers_columns<ElementType::bf16, Types::kScoreRows, true>(
          c.rS, c.rGate[4 * step], c.rGate[4 * step + 1], c.rGate[4 * step + 2], c.rGate[4 * step + 3],
          near ? RowTerms::inner_columns(base, step) : zeros);
  }

  FSA_DEVICE static Extremes alpha_extremes(const BackwardStorage<Types>& storage, int32 stage) {
    return storage.gate.rows[stage].extremes;
  }
};

template <class Types>
struct GateTerms<Types, false> {
  using Consumer = BackwardConsumer<Types>;
  FSA_DEVICE static void make(const Consumer&, const KeyWork&, const typename Types::Logits&) {}
  FSA_DEVICE static void issue(const Consumer&, int32) {}
  FSA_DEVICE static Extremes alpha_extremes(const BackwardStorage<Types>&, int32) { return {}; }
};

// Gradients of alpha and delta, from dS: delta's are summed in registers, alpha's row tile by row tile, through a line of
// shared memory a warp.
template <class Types, bool kThere = Types::kPairGate>
struct GateGradients {
  using Consumer = BackwardConsumer<Types>;
  using Logits = typename Types::Logits;
  static constexpr bool kSplitKeys = Types::kSplitKeys;

  FSA_DEVICE static void sum(Consumer& c, const KeyWork& work, Logits& logits, int32 stage) {
    if (c.params.forward.batch > 0)  // all: among what is around it ptxas spills
      logits.first.template sum<Types::kElement == ElementType::bf16>(
          c.logit_rows(work, c.info(c.tiles), stage), c.rD,
          c.storage.alpha_sums.line(c.score_stage(c.tiles), line_of(c)) + c.first_row());
  }

  // What both warpgroups have summed over their keys; by kThreads threads, of which this is `thread`.
  template <int32 kThreads>
  FSA_DEVICE static void add_alpha(const BackwardParams& params, BackwardStorage<Types>& storage,
                                   int32 number, int32 stage, int32 thread) {
    for (int32 row = thread; row < Types::kBlockM; row += kThreads) {
      float sum = 0;
#pragma unroll
      for (int32 line = 0; line < kAlphaLines<Types>; ++line)
        sum += storage.alpha_sums.line(stage, line)[row];
      atomicAdd(params.grad_alpha_sum + static_cast<int64>(number) * Types::kBlockM + row, sum);
    }
    if constexpr (Types::kDeterministic) ptx::fence_global();
    __syncwarp();
  }

  // After the last row tile: through the lines of alpha's sums, which nobody reads any more.
  FSA_DEVICE static void store_delta(const Consumer& c, const KeyWork& work, const Logits& logits) {
    if constexpr (kAdderReadsAlpha<Types>)
      ptx::wait(c.storage.scores_empty[c.score_stage(c.tiles - 1)], c.score_phase(c.tiles - 1));
    auto& sums = c.storage.alpha_sums;
#pragma unroll
    for (int32 row = 0; row < kRowsPerThread; ++row) {
      const float sum =
          0.5f * reduce_row(logits.first.doubled_delta_sum[row], [](float a, float b) { return a + b; });
      if (c.lane() % 4 == 0) sums.line(0, c.index)[fragment_row(c.thread, row)] = sum;
    }
    c.sync_consumers();
    const int32 in_tile = c.consumer_thread(), key = work.n_begin + in_tile;
    if (in_tile < Types::kBlockN && key < work.keys) {
      const float sum = kSplitKeys ? sums.line(0, in_tile / kRowsPerWarpgroup)[in_tile % kRowsPerWarpgroup]
                                   : sums.line(0, 0)[in_tile] + sums.line(0, 1)[in_tile];
      if (c.is_part(work))
        partial_deltas<Types>(c.params, work.part.slot)[in_tile] = sum;
      else
        store_scalar(c.params.grad_delta, work.k_map_batch, static_cast<int64>(work.k_begin) + key,
                     work.kv_head, key < work.seqlen_k ? sum * c.params.softmax_scale : 0.0f);
    }
    c.sync_consumers();  // the next keys' sums go to the same lines
  }

  // Of keys that nobody sees.
  FSA_DEVICE static void clear_delta(const Consumer& c, const KeyWork& work, int32 count) {
    if (c.consumer_thread() < count)
      store_scalar(c.params.grad_delta, work.k_map_batch,
                   static_cast<int64>(work.k_begin) + work.n_begin + c.consumer_thread(), work.kv_head, 0.0f);
  }

 private:
  // Warps with other query rows share a line of sums.
  FSA_DEVICE static int32 line_of(const Consumer& c) {
    return (kSplitKeys ? c.consumer_thread() : c.thread) / kWarpThreads;
  }
};

template <class Types>
struct GateGradients<Types, false> {
  using Consumer = BackwardConsumer<Types>;
  using Logits = typename Types::Logits;

  FSA_DEVICE static void sum(const Consumer&, const KeyWork&, const Logits&, int32) {}
  template <int32 kThreads>
  FSA_DEVICE static void add_alpha(const BackwardParams&, const BackwardStorage<Types>&, int32, int32,
                                   int32) {}
  FSA_DEVICE static void store_delta(const Consumer&, const KeyWork&, const Logits&) {}
  FSA_DEVICE static void clear_delta(const Consumer&, const KeyWork&, int32) {}
};

}  // namespace fsa::kernels::sm90

// SPDX-License-Identifier: Apache-2.0
// The multiplies of one consumer warpgroup of the backward kernel. Each is issued as a group of its own; whoever wants
// the result waits for it.
#pragma once

#include "ptx/sync.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/backward_gate.cuh"
#include "sm90/backward_types.cuh"
#include "tile/swizzle.cuh"

namespace fsa::kernels::sm90 {

template <class Types>
struct BackwardMultiplies {
  using KeyRows = typename Types::KeyRows;
  using ValueRows = typename Types::ValueRows;
  using QueryRows = typename Types::QueryRows;
  using GradOutRows = typename Types::GradOutRows;
  using ScoreTile = typename Types::Scores;
  static constexpr ElementType kElement = Types::kElement;
  static constexpr int32 kScoreCount = Types::kScoreRows / 2;

  BackwardConsumer<Types>& c;

  // S^T = K Q^T
  FSA_DEVICE void issue_scores(uint32 tile) {
    ptx::wgmma_fence();
    if constexpr (Types::kFolded) issue_row_values(c.rS, tile, false);
    const uint64 a = KeyRows::inner_columns(
        opaque_address(shared_address(c.storage.key(c.loads)) + c.first_key() * kLineBytes));
    const uint64 b = QueryRows::inner_columns(shared_address(c.storage.query[c.query(tile).stage()]) +
                                              c.first_row() * kLineBytes);
#pragma unroll
    for (int32 step = 0; step < Types::kDim / 16; ++step)
      ptx::multiply_shared<kElement, Types::kScoreRows>(
          c.rS, KeyRows::advance(a, KeyRows::inner_columns_offset(step)),
          QueryRows::advance(b, QueryRows::inner_columns_offset(step)), Types::kFolded || step != 0);
    GateTerms<Types>::issue(c, c.query(tile).stage());
    ptx::wgmma_commit();
  }

  // The first columns of the warpgroup's V, as A.
  FSA_DEVICE void hold_values() {
    const int32 key = c.first_key() + c.thread / kWarpThreads * 16 + c.lane() % 16;
    const uint32 base = shared_address(c.storage.value(c.loads));
#pragma unroll
    for (int32 step = 0; step < Types::kHeldSteps; ++step)
      ptx::load_matrices(base + ValueRows::unit_offset(key, 2 * step + c.lane() / 16), c.rHeld[4 * step],
                         c.rHeld[4 * step + 1], c.rHeld[4 * step + 2], c.rHeld[4 * step + 3]);
  }

  // dP^T = V dO^T
  FSA_DEVICE void issue_products(uint32 tile) {
    ptx::wgmma_fence();
    if constexpr (Types::kFolded) issue_row_values(c.rD, tile, true);
    const uint64 a = ValueRows::inner_columns(
        opaque_address(shared_address(c.storage.value(c.loads)) + c.first_key() * kLineBytes));
    const uint64 b = GradOutRows::inner_columns(shared_address(c.storage.grad_out[c.grad_out(tile).stage()]) +
                                                c.first_row() * kLineBytes);
#pragma unroll
    for (int32 step = 0; step < Types::kHeldSteps; ++step)
      ptx::multiply_registers_columns<kElement, Types::kScoreRows, true>(
          c.rD, c.rHeld[4 * step], c.rHeld[4 * step + 1], c.rHeld[4 * step + 2], c.rHeld[4 * step + 3],
          GradOutRows::advance(b, GradOutRows::inner_columns_offset(step)));
#pragma unroll
    for (int32 step = Types::kHeldSteps; step < Types::kDimV / 16; ++step)
      ptx::multiply_shared<kElement, Types::kScoreRows>(
          c.rD, ValueRows::advance(a, ValueRows::inner_columns_offset(step)),
          GradOutRows::advance(b, GradOutRows::inner_columns_offset(step)), Types::kFolded || step != 0);
    ptx::wgmma_commit();
  }

  // r += A B with A = P^T or dS^T, B = dO or Q: 64 keys by the warpgroup's columns, over the query rows.
  template <class Rows, int32 kColumns>
  FSA_DEVICE void issue_gradient(float (&r)[kColumns / 2], const uint32 (&registers)[kScoreCount / 2],
                                 const uint8* scores, const uint8* rows) {
    ptx::wgmma_fence();
    if constexpr (Types::kSplitKeys) {
      const uint64 b = Rows::inner_rows(shared_address(rows));
#pragma unroll
      for (int32 step = 0; step < Types::kBlockM / 16; ++step)
        ptx::multiply_registers<kElement, kColumns>(r, registers[4 * step], registers[4 * step + 1],
                                                    registers[4 * step + 2], registers[4 * step + 3],
                                                    Rows::advance(b, Rows::inner_rows_offset(step)));
    } else {
      const uint64 a = ScoreTile::inner_columns(shared_address(scores));
      const uint64 b =
          Rows::inner_rows(shared_address(rows) + c.index * (kColumns / kChunkColumns) * Rows::kChunkBytes);
#pragma unroll
      for (int32 step = 0; step < Types::kBlockM / 16; ++step)
        ptx::multiply_shared_rows<kElement, kColumns, false>(
            r, ScoreTile::advance(a, ScoreTile::inner_columns_offset(step)),
            Rows::advance(b, Rows::inner_rows_offset(step)), 1);
    }
    ptx::wgmma_commit();
  }

  // dQ = dS K: 64 query rows by the warpgroup's columns, over all keys of the tile.
  FSA_DEVICE void issue_grad_query(uint32 tile, float (&rQ)[Types::kQueryColumns / 2]) {
    constexpr bool kSplitRows = Types::kBlockM == 128;
    ptx::wgmma_fence();
    const uint64 a = ScoreTile::inner_rows(shared_address(c.storage.scores[c.score_stage(tile)][0]) +
                                           (kSplitRows ? c.index * ScoreTile::kChunkBytes : 0));
    const int32 column = kSplitRows ? 0 : c.index * Types::kQueryColumns;
    const uint64 b = KeyRows::inner_rows(shared_address(c.storage.key(c.loads)) +
                                         column / kChunkColumns * KeyRows::kChunkBytes +
                                         column % kChunkColumns * kElementBytes);
#pragma unroll
    for (int32 step = 0; step < Types::kBlockN / 16; ++step)
      ptx::multiply_shared_rows<kElement, Types::kQueryColumns, true>(
          rQ, ScoreTile::advance(a, ScoreTile::inner_rows_offset(step)),
          KeyRows::advance(b, KeyRows::inner_rows_offset(step)), step != 0);
    ptx::wgmma_commit();
  }

  // dQ of the whole row tile, its columns' halves in the registers of S and dP. `half`: dS of the first half of the keys is
  // zero, whose K has left; the second half is read in its place.
  FSA_DEVICE void issue_whole_grad_query(uint32 tile, bool half) {
    forget(c.rS);
    forget(c.rD);
    ptx::wgmma_fence();
    const uint64 a = ScoreTile::inner_rows(shared_address(c.storage.scores[c.score_stage(tile)][0]));
    const uint64 b = KeyRows::inner_rows(opaque_address(shared_address(c.storage.key(c.loads))));
    constexpr int32 kHalfSteps = Types::kBlockN / 32;
#pragma unroll
    for (int32 step = 0; step < Types::kBlockN / 16; ++step)
      ptx::multiply_shared_rows_halves<kElement>(
          c.rS, c.rD, ScoreTile::advance(a, ScoreTile::inner_rows_offset(step)),
          KeyRows::advance(b, KeyRows::inner_rows_offset(half ? step | kHalfSteps : step)), step != 0);
    ptx::wgmma_commit();
  }

  // What registers held does not matter any more, whatever ptxas sees in the operands of the next multiply: else it
  // serialises every multiply (C7511). The zeros are never written.
  FSA_DEVICE static void forget(float (&r)[kScoreCount]) {
#pragma unroll
    for (int32 i = 0; i < kScoreCount; ++i) r[i] = 0;
  }

 private:
  // Descriptors of K and V do not change, but kept over the loop they take ten registers.
  FSA_DEVICE static uint32 opaque_address(uint32 address) {
    return static_cast<uint32>(opaque(static_cast<int32>(address)));
  }

  // Minus lse / scale, or minus the sum, of its query row to each element: ones times their three parts. Read
  // by the threads instead, the two take 32 bytes a thread and 16 rows, 9 % of what shared memory delivers at
  // head_dim 128. Ones meet inner values 0, 1, 2, or 3, 4, 5.
  FSA_DEVICE void issue_row_values(float (&r)[kScoreCount], uint32 tile, bool sums) {
    constexpr uint32 kOne = 0x3f80, kOnes = kOne << 16 | kOne;
    const int32 pair = c.lane() % 4;
    const uint32 ones = sums ? (pair == 1   ? kOne << 16
                                : pair == 2 ? kOnes
                                            : 0)
                             : (pair == 0   ? kOnes
                                : pair == 1 ? kOne
                                            : 0);
    const uint64 b = repeated_rows(shared_address(
        reinterpret_cast<const uint4*>(c.storage.row_vectors[c.query(tile).stage()]) + c.first_row()));
    ptx::multiply_registers_columns<ElementType::bf16, Types::kScoreRows, false>(r, ones, ones, 0, 0, b);
  }
};

}  // namespace fsa::kernels::sm90

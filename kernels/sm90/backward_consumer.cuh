// SPDX-License-Identifier: Apache-2.0
// One consumer warpgroup of the backward kernel: S, P, dS of its share of a tile, its share of dK and dV in
// registers, its share of dQ added to global memory.
#pragma once

#include "policy/store_gradient.cuh"
#include "ptx/reduce.cuh"
#include "ptx/sync.cuh"
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
  static constexpr int32 kConsumerWarps = Types::kConsumerThreads / kWarpThreads;

  const BackwardParams& params;
  BackwardStorage<Types>& storage;

  const int32 index;  // which consumer
  uint32 tiles = 0;   // row tiles before this one: its place in all three rings
  int32 turn = -1;    // to be passed on; deterministic

  float rS[kScoreCount];                                   // S, then P
  float rD[kScoreCount];                                   // dP, then dS, then dQ
  float separate[kQuerySharesProducts ? 1 : kQueryCount];  // dQ, where it does not fit there
  uint32 rP[kScoreCount / 2];
  uint32 rdS[kScoreCount / 2];
  float rK[Types::kGradDim / 2];
  float rV[Types::kGradDimV / 2];

  FSA_DEVICE BackwardConsumer(const BackwardParams& params_, BackwardStorage<Types>& storage_, int32 index_)
      : params(params_), storage(storage_), index(index_ & 1) {}  // known not to be negative

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

  FSA_DEVICE static void release(ptx::Mbarrier& empty) {
    if (own_lane() == 0) ptx::arrive(empty);
  }
  FSA_DEVICE static void sync_consumers() { ptx::barrier_sync(kConsumersBarrier, Types::kConsumerThreads); }
  FSA_DEVICE void sync_warpgroup() const {
    ptx::barrier_sync(kBackwardGroupBarrier + index, kWarpgroupThreads);
  }
  FSA_DEVICE int32 consumer_thread() const { return index * kWarpgroupThreads + own_thread(); }
  // Warps with other query rows share a line of sums.
  FSA_DEVICE int32 alpha_line() const {
    return (kSplitKeys ? consumer_thread() : own_thread()) / kWarpThreads;
  }

  // ---- Multiplies ----

  // S^T = K Q^T
  FSA_DEVICE void issue_scores(uint32 tile) {
    ptx::wgmma_fence();
    const uint64 a = KeyRows::inner_columns(shared_address(storage.key) + first_key() * kLineBytes);
    const uint64 b = QueryRows::inner_columns(shared_address(storage.query[query(tile).stage()]) +
                                              first_row() * kLineBytes);
#pragma unroll
    for (int32 step = 0; step < Types::kDim / 16; ++step)
      ptx::multiply_shared<kElement, Types::kScoreRows>(
          rS, KeyRows::advance(a, KeyRows::inner_columns_offset(step)),
          QueryRows::advance(b, QueryRows::inner_columns_offset(step)), step != 0);
    ptx::wgmma_commit();
  }

  // dP^T = V dO^T
  FSA_DEVICE void issue_products(uint32 tile) {
    ptx::wgmma_fence();
    const uint64 a = ValueRows::inner_columns(shared_address(storage.value) + first_key() * kLineBytes);
    const uint64 b = GradOutRows::inner_columns(shared_address(storage.grad_out[grad_out(tile).stage()]) +
                                                first_row() * kLineBytes);
#pragma unroll
    for (int32 step = 0; step < Types::kDimV / 16; ++step)
      ptx::multiply_shared<kElement, Types::kScoreRows>(
          rD, ValueRows::advance(a, ValueRows::inner_columns_offset(step)),
          GradOutRows::advance(b, GradOutRows::inner_columns_offset(step)), step != 0);
    ptx::wgmma_commit();
  }

  // r += A B with A = P^T or dS^T, B = dO or Q: 64 keys by the warpgroup's columns, over the query rows.
  template <class Rows, int32 kColumns>
  FSA_DEVICE void issue_gradient(float (&r)[kColumns / 2], const uint32 (&registers)[kScoreCount / 2],
                                 const uint8* scores, const uint8* rows) {
    ptx::wgmma_fence();
    if constexpr (kSplitKeys) {
      const uint64 b = Rows::inner_rows(shared_address(rows));
#pragma unroll
      for (int32 step = 0; step < Types::kBlockM / 16; ++step)
        ptx::multiply_registers<kElement, kColumns>(r, registers[4 * step], registers[4 * step + 1],
                                                    registers[4 * step + 2], registers[4 * step + 3],
                                                    Rows::advance(b, Rows::inner_rows_offset(step)));
    } else {
      const uint64 a = ScoreTile::inner_columns(shared_address(scores));
      const uint64 b =
          Rows::inner_rows(shared_address(rows) + index * (kColumns / kChunkColumns) * Rows::kChunkBytes);
#pragma unroll
      for (int32 step = 0; step < Types::kBlockM / 16; ++step)
        ptx::multiply_shared_rows<kElement, kColumns, false>(
            r, ScoreTile::advance(a, ScoreTile::inner_columns_offset(step)),
            Rows::advance(b, Rows::inner_rows_offset(step)), 1);
    }
    ptx::wgmma_commit();
  }

  // dQ = dS K: 64 query rows by the warpgroup's columns, over all keys of the tile.
  FSA_DEVICE void issue_grad_query(uint32 tile) {
    constexpr bool kSplitRows = Types::kBlockM == 128;
    ptx::wgmma_fence();
    const uint64 a = ScoreTile::inner_rows(shared_address(storage.scores[score_stage(tile)][0]) +
                                           (kSplitRows ? index * ScoreTile::kChunkBytes : 0));
    const int32 column = kSplitRows ? 0 : index * Types::kQueryColumns;
    const uint64 b =
        KeyRows::inner_rows(shared_address(storage.key) + column / kChunkColumns * KeyRows::kChunkBytes +
                            column % kChunkColumns * kElementBytes);
#pragma unroll
    for (int32 step = 0; step < Types::kBlockN / 16; ++step)
      ptx::multiply_shared_rows<kElement, Types::kQueryColumns, true>(
          grad_query(), ScoreTile::advance(a, ScoreTile::inner_rows_offset(step)),
          KeyRows::advance(b, KeyRows::inner_rows_offset(step)), step != 0);
    ptx::wgmma_commit();
  }

  // ---- Between multiplies ----

  // The thread's values of a row vector: four of every 16 query rows.
  FSA_DEVICE const float* row_vector(int32 stage, int32 vector) const {
    return storage.row_vectors[stage][vector] + first_row() + own_lane() % 4 * 4;
  }

  // f(value, value of its query row) for each element.
  template <class Function>
  FSA_DEVICE static void with_rows(float (&r)[kScoreCount], const float* vector, Function f) {
#pragma unroll
    for (int32 i = 0; i < kScoreCount; i += 8) {
      const float4 v = *reinterpret_cast<const float4*>(vector + 2 * i);
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
    const int32 row = info.tile * Types::kBlockM + first_row() + fragment_column(own_lane(), 0);
    const int32 key = work.n_begin + first_key() + fragment_row(own_thread(), 0);
    return {work.sequence, info.head, row + work.offset() - key,
            Types::kPairGate ? row_vector(stage, 2) : nullptr};
  }

  // S becomes P.
  FSA_DEVICE void exponentiate(const KeyWork& work, const RowTileInfo& info, const Logits& logits,
                               int32 stage) {
    logits.apply(params, logit_rows(work, info, stage), rS);
    if (info.masked())
      Types::Mask::apply(params, work, info, rS, work.n_begin + first_key() + fragment_row(own_thread(), 0),
                         info.tile * Types::kBlockM + first_row());
    const float scale = logits.scale();
    with_rows(rS, row_vector(stage, 0),
              [&](int32, float s, float lse) { return ptx::exp2_approx(s * scale - lse); });
  }

  // dP becomes dS, and P is used up.
  FSA_DEVICE void differentiate(const KeyWork& work, const RowTileInfo& info, Logits& logits, int32 stage) {
    with_rows(rD, row_vector(stage, 1), [&](int32 i, float d, float mean) { return rS[i] * (d - mean); });
#pragma unroll
    for (int32 i = 0; i < kScoreCount / 2; ++i) rP[i] = ptx::pack<kElement>(rS[2 * i], rS[2 * i + 1]);
    if constexpr (Logits::kNeedsValue) {
      const float inverse = 1 / logits.scale();
      with_rows(rS, row_vector(stage, 0),
                [&](int32, float p, float lse) { return (ptx::log2_approx(p) + lse) * inverse; });
    }
    logits.derive(params, logit_rows(work, info, stage), rS, rD);
    if constexpr (Types::kPairGate)
      logits.first.sum(logit_rows(work, info, stage), rD,
                       storage.alpha_sums.line(score_stage(tiles), alpha_line()) + first_row());
#pragma unroll
    for (int32 i = 0; i < kScoreCount / 2; ++i) rdS[i] = ptx::pack<kElement>(rD[2 * i], rD[2 * i + 1]);
  }

  // The warpgroup's share of P^T or dS^T, a line per key.
  FSA_DEVICE void store_scores(const uint32 (&r)[kScoreCount / 2], uint8* scores) {
    const int32 thread = own_thread();
    const int32 lane = thread % kWarpThreads, key = first_key() + thread / kWarpThreads * 16 + lane % 16;
    const uint32 base = shared_address(scores);
#pragma unroll
    for (int32 i = 0; i < kScoreCount / 2; i += 4)
      ptx::store_matrices(base + ScoreTile::unit_offset(key, first_row() / 8 + i / 2 + lane / 16), r[i],
                          r[i + 1], r[i + 2], r[i + 3]);
  }

  // Sums of dQ lie in the order in which warps hold them: for each warp kQueryCount / 4 times 32 lanes by four
  // floats. Staged in shared memory, a warp's share is one addition of the copy engine; 16 bytes a lane at a
  // time straight from the registers cost 20 % (H200, head_dim 128), but need no room.
  FSA_DEVICE void add_grad_query(const KeyWork& work, uint32 number) {
    constexpr int32 kWarpFloats = kQueryCount * kWarpThreads;
    const GradQuery& rQ = grad_query();
    const int32 warp = index * 4 + own_thread() / kWarpThreads;
    const RowTileInfo& of = info(number);
    const int64 tile = row_tile_number<Types::kBlockM>(params, work, of.head, of.tile);
    float* const to = params.grad_query_sum + (tile * kConsumerWarps + warp) * kWarpFloats;
    if constexpr (Types::kStagedGradQuery) {
      if constexpr (!Types::kDeterministic) {
        finish_addition();
        __syncwarp();
      }
      float4* const staged = reinterpret_cast<float4*>(storage.grad_query.of_warp(warp)) + own_lane();
#pragma unroll
      for (int32 i = 0; i < kQueryCount; i += 4)
        staged[i / 4 * kWarpThreads] = make_float4(rQ[i], rQ[i + 1], rQ[i + 2], rQ[i + 3]);
      ptx::fence_shared_for_async();
      __syncwarp();
      if (own_lane() == 0) {
        ptx::add_bytes(to, staged, kWarpFloats * 4);
        ptx::commit_stores();
      }
    } else {
      if constexpr (Types::kDeterministic) {
        if (own_lane() == 0) wait_turn(tile * kConsumerWarps + warp, of.rank);
        __syncwarp();
      }
#pragma unroll
      for (int32 i = 0; i < kQueryCount; i += 4)
        ptx::add_four(to + i * kWarpThreads + own_lane() * 4, rQ[i], rQ[i + 1], rQ[i + 2], rQ[i + 3]);
    }
    if constexpr (Types::kPairGate) {
      add_grad_alpha(tile, score_stage(number));
      if constexpr (Types::kDeterministic) ptx::fence_global();
      __syncwarp();
    }
    if constexpr (Types::kDeterministic && !Types::kStagedGradQuery) {
      ptx::fence_global();
      __syncwarp();
      if (own_lane() == 0) ptx::add_release(params.turns + tile * kConsumerWarps + warp, 1);
    }
  }

  // Until the staged sums of the tile before have been read; deterministic: until they have been added.
  FSA_DEVICE void finish_addition() {
    if constexpr (Types::kStagedGradQuery) {
      if (own_lane() != 0) return;
      if constexpr (Types::kDeterministic) {
        ptx::wait_stores();
        ptx::fence_async_global();
        if (turn >= 0) ptx::add_release(params.turns + turn, 1);
        turn = -1;
      } else {
        ptx::wait_stores_read();
      }
    }
  }

  // Deterministic: passes on the turn of the addition before and waits for that of `number`. Two times the way
  // to the L2 and back, so while multiplies are in flight.
  FSA_DEVICE void take_turn(const KeyWork& work, uint32 number) {
    finish_addition();
    const RowTileInfo& of = info(number);
    const int64 tile = row_tile_number<Types::kBlockM>(params, work, of.head, of.tile);
    if (own_lane() == 0) wait_turn(tile * kConsumerWarps + index * 4 + own_thread() / kWarpThreads, of.rank);
    __syncwarp();
  }

  // Key tiles add to a row tile in the order in which they were issued.
  FSA_DEVICE void wait_turn(int64 number, int32 rank) {
    ptx::wait_until_equal(params.turns + number, rank);
    turn = static_cast<int32>(number);
  }

  // By the first warpgroup: what both have summed over their keys.
  FSA_DEVICE void add_grad_alpha(int64 tile, int32 stage) {
    const int32 row = consumer_thread();
    if (row >= Types::kBlockM) return;
    float sum = 0;
#pragma unroll
    for (int32 line = 0; line < kAlphaLines<Types>; ++line) sum += storage.alpha_sums.line(stage, line)[row];
    atomicAdd(params.grad_alpha_sum + tile * Types::kBlockM + row, sum);
  }

  // Through the lines of alpha's sums, which nobody reads any more.
  FSA_DEVICE void store_grad_delta(const KeyWork& work, const Logits& logits) {
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
      const float sum = reduce_row(logits.first.delta_sum[slot], [](float a, float b) { return a + b; });
      if (own_lane() % 4 == 0) storage.alpha_sums.line(0, index)[fragment_row(own_thread(), slot)] = sum;
    }
    sync_consumers();
    const int32 in_tile = consumer_thread(), key = work.n_begin + in_tile;
    if (in_tile >= Types::kBlockN || key >= work.keys) return;
    const float sum =
        kSplitKeys ? storage.alpha_sums.line(0, in_tile / kRowsPerWarpgroup)[in_tile % kRowsPerWarpgroup]
                   : storage.alpha_sums.line(0, 0)[in_tile] + storage.alpha_sums.line(0, 1)[in_tile];
    store_scalar(params.grad_delta, work.k_map_batch, static_cast<int64>(work.k_begin) + key, work.kv_head,
                 key < work.seqlen_k ? sum * params.softmax_scale : 0.0f);
  }

  // Rows beyond the used length would meet factors of 0, but 0 * NaN is NaN. All consumers call it.
  template <class Rows, int32 kRows>
  FSA_DEVICE void clear_rows(uint8* shared, int32 used) {
    constexpr int32 kUnits = Rows::kChunks * (kLineBytes / kUnitBytes);
    for (int32 item = consumer_thread(); item < (kRows - used) * kUnits; item += Types::kConsumerThreads)
      *reinterpret_cast<uint4*>(shared + Rows::unit_offset(used + item / kUnits, item % kUnits)) =
          make_uint4(0, 0, 0, 0);
    ptx::fence_shared_for_async();
    sync_consumers();
  }
  FSA_DEVICE int32 used_rows(const KeyWork& work, const RowTileInfo& info) const {
    return work.seqlen_q - info.tile * Types::kBlockM;
  }

  // Once Q of tile number `tile` is there.
  FSA_DEVICE void start_scores(const KeyWork& work, uint32 tile) {
    const int32 stage = query(tile).stage();
    ptx::wait(storage.query_full[stage], query(tile).phase());
    const int32 used = used_rows(work, info(tile));
    if (used < Types::kBlockM) clear_rows<QueryRows, Types::kBlockM>(storage.query[stage], used);
    issue_scores(tile);
  }

  // Once dO is there.
  FSA_DEVICE void start_products(const KeyWork& work, uint32 tile) {
    const int32 stage = grad_out(tile).stage();
    ptx::wait(storage.grad_out_full[stage], grad_out(tile).phase());
    const int32 used = used_rows(work, info(tile));
    if (used < Types::kBlockM) clear_rows<GradOutRows, Types::kBlockM>(storage.grad_out[stage], used);
    issue_products(tile);
  }

  // ---- One row tile ----

  // P and dP of the tile are in registers and nothing is in flight, before and after: ptxas follows groups in
  // flight along straight lines, not round a loop.
  template <bool kLast>
  FSA_DEVICE void step(const KeyWork& work, Logits& logits, bool first) {
    const int32 stage = query(tiles).stage();
    const int32 grad_out_stage = grad_out(tiles).stage();
    uint8* const scores = storage.scores[score_stage(tiles)][0];
    if constexpr (kSplitKeys) ptx::wait(storage.scores_empty[score_stage(tiles)], score_phase(tiles) ^ 1);
    differentiate(work, info(tiles), logits, stage);
    store_scores(rdS, scores);
    if constexpr (!kSplitKeys) store_scores(rP, scores + ScoreTile::kBytes);
    ptx::fence_shared_for_async();
    if constexpr (kSplitKeys)
      multiply_split_keys<kLast>(work, stage, grad_out_stage, first);
    else
      multiply_split_columns<kLast>(work, stage, grad_out_stage);
    if constexpr (!kLast) finish_products(work, logits);
  }

  // dV and dK need nothing of the other warpgroup; dQ needs its dS, and follows a tile behind. So the two can
  // be up to a tile apart, and one's multiplies run beside the other's arithmetic.
  template <bool kLast>
  FSA_DEVICE void multiply_split_keys(const KeyWork& work, int32 stage, int32 grad_out_stage, bool first) {
    __syncwarp();
    release(storage.scores_full[score_stage(tiles)]);
    issue_gradient<GradOutRows, Types::kGradDimV>(rV, rP, nullptr, storage.grad_out[grad_out_stage]);
    issue_gradient<QueryRows, Types::kGradDim>(rK, rdS, nullptr, storage.query[stage]);
    if (Types::kDeterministic && !first) take_turn(work, tiles - 1);
    ptx::wgmma_wait<0>();  // frees the registers of P and dS
    ptx::settle(rV);
    ptx::settle(rP);
    ptx::settle(rK);
    ptx::settle(rdS);
    release(storage.grad_out_empty[grad_out_stage]);
    release(storage.query_empty[stage]);
    if (!first) ptx::wait(storage.scores_full[score_stage(tiles - 1)], score_phase(tiles - 1));
    issue_grad_query(tiles - 1);  // of the first tile something that nobody will look at
    if constexpr (kLast) {
      ptx::wgmma_wait<0>();
    } else {
      start_scores(work, tiles + 1);
      ptx::wgmma_wait<1>();
    }
    ptx::settle(grad_query());
    if (!first) finish_grad_query(work, tiles - 1);
    ++tiles;
    if constexpr (kLast) {
      ptx::wait(storage.scores_full[score_stage(tiles - 1)], score_phase(tiles - 1));
      issue_grad_query(tiles - 1);
      if constexpr (Types::kDeterministic) take_turn(work, tiles - 1);
      ptx::wgmma_wait<0>();
      ptx::settle(grad_query());
      finish_grad_query(work, tiles - 1);
    } else {
      start_products(work, tiles);
      ptx::wgmma_wait<1>();
      ptx::settle(rS);
    }
  }

  FSA_DEVICE void finish_grad_query(const KeyWork& work, uint32 tile) {
    add_grad_query(work, tile);
    release(storage.scores_empty[score_stage(tile)]);
  }

  // All three products need the other warpgroup's half of P and dS.
  template <bool kLast>
  FSA_DEVICE void multiply_split_columns(const KeyWork& work, int32 stage, int32 grad_out_stage) {
    const uint8* const scores = storage.scores[score_stage(tiles)][0];
    sync_consumers();
    issue_gradient<GradOutRows, Types::kGradDimV>(rV, rP, scores + ScoreTile::kBytes,
                                                  storage.grad_out[grad_out_stage]);
    issue_grad_query(tiles);
    issue_gradient<QueryRows, Types::kGradDim>(rK, rdS, scores, storage.query[stage]);
    ptx::wgmma_wait<1>();
    ptx::settle(rV);
    ptx::settle(grad_query());
    release(storage.grad_out_empty[grad_out_stage]);
    add_grad_query(work, tiles);
    ++tiles;
    if constexpr (kLast) {
      ptx::wgmma_wait<0>();
    } else {
      start_scores(work, tiles);
      start_products(work, tiles);
      ptx::wgmma_wait<1>();
      ptx::settle(rS);
    }
    ptx::settle(rK);
    release(storage.query_empty[stage]);
  }

  // S is complete and dP in flight.
  FSA_DEVICE void finish_products(const KeyWork& work, const Logits& logits) {
    const int32 stage = query(tiles).stage();
    exponentiate(work, info(tiles), logits, stage);
    ptx::wgmma_wait<0>();
    ptx::settle(rD);
  }

  // ---- A work unit ----

  FSA_DEVICE void differentiate_keys(const KeyWork& work) {
#pragma unroll
    for (int32 i = 0; i < Types::kGradDim / 2; ++i) rK[i] = 0;
#pragma unroll
    for (int32 i = 0; i < Types::kGradDimV / 2; ++i) rV[i] = 0;
    Logits logits(params, work, work.n_begin + first_key() + fragment_row(own_thread(), 0),
                  params.forward.softmax_scale_log2);
    ptx::wait(storage.key_full, work.loads & 1);
    if (work.partial(Types::kBlockN))
      clear_rows<KeyRows, Types::kBlockN>(storage.key, work.seqlen_k - work.n_begin);
    start_scores(work, tiles);
    ptx::wait(storage.value_full, work.loads & 1);
    if (work.partial(Types::kBlockN))
      clear_rows<ValueRows, Types::kBlockN>(storage.value, work.seqlen_k - work.n_begin);
    start_products(work, tiles);
    ptx::wgmma_wait<1>();
    ptx::settle(rS);
    finish_products(work, logits);

    bool first = true;
    for (; !info(tiles).last(); first = false) step<false>(work, logits, first);
    step<true>(work, logits, first);
    if constexpr (Types::kDeterministic) finish_addition();
    sync_consumers();  // the other warpgroup, too, has finished with K and V
    if constexpr (Types::kPairGate) store_grad_delta(work, logits);
    store(work);
  }

  // Gradients leave through the shared memory of K and V.
  FSA_DEVICE void store(const KeyWork& work) {
    const int32 half = kSplitKeys ? 0 : index;  // of the columns
    uint8* const shared_key = storage.key + first_key() * kLineBytes +
                              half * (Types::kGradDim / kChunkColumns) * KeyRows::kChunkBytes;
    uint8* const shared_value = storage.value + first_key() * kLineBytes +
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
    ptx::fence_shared_for_async();
    sync_warpgroup();
    if (own_thread() == 0) {
      ptx::commit_stores();
      ptx::wait_stores_read();
      ptx::arrive(storage.keys_empty);
    }
  }

  FSA_DEVICE void run() {
    for (uint32 unit = 0;;) {
      const Ring<kWorkSlots> slot = {unit};
      ptx::wait(storage.work_full[slot.stage()], slot.phase());
      const KeyWork& work = storage.work[slot.stage()];
      if (work.sequence < 0) break;
      if (work.num_segments > 0) {
        differentiate_keys(work);
      } else {
        const int32 count = min_of(Types::kBlockN, work.keys - work.n_begin);
        clear_gradient<Types::kConsumerThreads>(grad_key_rows(params), work, count, consumer_thread());
        clear_gradient<Types::kConsumerThreads>(grad_value_rows(params), work, count, consumer_thread());
        if constexpr (Types::kPairGate)
          if (consumer_thread() < count)
            store_scalar(params.grad_delta, work.k_map_batch,
                         static_cast<int64>(work.k_begin) + work.n_begin + consumer_thread(), work.kv_head,
                         0.0f);
      }
      unit = static_cast<uint32>(work.number) + 1;
      __syncwarp();
      release(storage.work_empty[unit % kWorkSlots ^ 1]);
    }
    finish_addition();  // shared memory must outlive the stores that read it
  }
};

}  // namespace fsa::kernels::sm90

// SPDX-License-Identifier: Apache-2.0
// Attention backward for Hopper: dQ, dK, dV from one pass over the tiles that the forward computed, five
// multiplies a tile.
//
//   S^T = K Q^T,  P^T = 2^(scale S^T - lse),  dP^T = V dO^T,  dS^T = P^T (dP^T - out_dot_grad)
//   dV += P^T dO,  dK += dS^T Q,  dQ += dS K
//
// A CTA keeps block_n keys and their gradients and streams row tiles of Q and dO past them, of every query
// head of the group: dK and dV are sums in registers from the first to the last. S is computed transposed, so
// that P and dS are where the next multiplies want them. dQ is added to float32 sums in global memory, in the
// order of accumulator fragments.
//
// With 128 keys each of two warpgroups has 64 (backward_types.cuh says what happens with 64):
//
//   tensor   ... dV(j) dK(j) ........... | dQ(j-1) S(j+1) ............ | dP(j+1) .......... | dV(j+1) ...
//   others   ... publish dS(j), find room | find Q(j+1), take dQ(j-1) | P(j+1), give up dQ | dS(j+1) ...
//
// At head_dim 128 the two alternate: dQ of a whole row tile is one warpgroup's (backward_alternate.cuh). Multiplies then
// take 2690 of 3250 clocks a tile of 64 by 128.
//
// Invariants. Stage s of Q is free when every consumer warp has arrived on query_empty[s], which it does once
// its dK is complete; dO likewise once dV is. A stage of dS is full when the warps of both warpgroups have
// stored their share and empty when both have their dQ of it; where they alternate, when dQ has left through it.
// dQ is staged in shared memory, a warpgroup's share at a time, and added by a warp of the producer's warpgroup,
// which may have to wait for its turn. Gradients of keys and values leave through the stages of dS, where these are
// large enough, or a slot beside them: then V is free when both warpgroups have their last dP, and K when they have
// their last dQ; of windows each half of the keys is loaded by itself, V's as soon as its warpgroup has its last dP. Else
// they leave through K and V, which are free once that has happened. Warpgroups that share every multiply (64 keys) meet
// at a named barrier once a tile instead; two stages of P and dS keep the faster one from overwriting what the other reads.
#pragma once

#include "ptx/mbarrier.cuh"
#include "ptx/sync.cuh"
#include "sm90/backward_adder.cuh"
#include "sm90/backward_clear.cuh"
#include "sm90/backward_consumer.cuh"
#include "sm90/backward_types.cuh"
#include "tile/ring.cuh"

namespace fsa::kernels::sm90 {

template <class Types>
FSA_DEVICE void init_barriers(BackwardStorage<Types>& storage) {
  constexpr int32 kWarps = Types::kConsumerThreads / kWarpThreads;
  constexpr int32 kReaders = Types::kStageInScores ? kWarps : kBackwardConsumers;
  for (int32 i = 0; i < Types::kKeyLoads; ++i) {
    ptx::init(storage.key_full[i], 1);
    ptx::init(storage.value_full[i], 1);
    ptx::init(storage.key_empty[i], kReaders);
    ptx::init(storage.value_empty[i], kReaders);
  }
  for (int32 i = 0; i < Types::kQueryStages; ++i) {
    ptx::init(storage.query_full[i], 1);
    ptx::init(storage.query_empty[i], kWarps);
  }
  for (int32 i = 0; i < Types::kGradOutStages; ++i) {
    ptx::init(storage.grad_out_full[i], 1);
    ptx::init(storage.grad_out_empty[i], kWarps);
  }
  for (int32 i = 0; i < Types::kScoreStages; ++i) {
    ptx::init(storage.scores_full[i], kWarps);
    ptx::init(storage.scores_empty[i], Types::kAlternates ? 1 : kWarps + (kAdderReadsAlpha<Types> ? 1 : 0));
  }
  constexpr int32 kHandovers = backward_handovers(Types::kTile);
  for (int32 i = 0; i < kHandovers; ++i) {
    ptx::init(storage.handed_full[i], kWarps / kHandovers);
    ptx::init(storage.handed_empty[i], 1);
  }
  for (int32 i = 0; i < kWorkSlots; ++i) {
    ptx::init(storage.work_full[i], 1);
    ptx::init(storage.work_empty[i],
              kWarps + (Types::kDescribesAhead ? 1 : 0) + (Types::kStagedGradQuery ? kBackwardConsumers : 0));
  }
  ptx::fence_init();
}

// `kRows` rows from `row` on, in boxes of 64 by 64.
template <class Tile, int32 kRows>
FSA_DEVICE void load_rows(const TensorMap& map, int32 row, int32 head, int32 batch, uint8* shared,
                          ptx::Mbarrier& full) {
#pragma unroll
  for (int32 first = 0; first < kRows; first += kRowsPerWarpgroup)
#pragma unroll
    for (int32 chunk = 0; chunk < Tile::kChunks; ++chunk)
      ptx::load_box(shared + chunk * Tile::kChunkBytes + first * kLineBytes, map,
                    {chunk * kChunkColumns, row + first, head, batch}, full);
}

// K or V, or half of its rows, as soon as `empty` says so.
template <class Types, class Tile>
FSA_DEVICE void load_keys(const TensorMap& map, const KeyWork& work, int32 half, uint8* shared,
                          ptx::Mbarrier& empty, ptx::Mbarrier& full) {
  constexpr int32 kRows = Types::kBlockN / Types::kKeyLoads;
  const int32 row = work.k_begin + work.n_begin + half * kRows, head = work.kv_head, batch = work.k_map_batch;
  ptx::wait(empty, (work.loads & 1) ^ 1);
  ptx::arrive_expect_bytes(full, Tile::kBytes / Types::kKeyLoads);
  load_rows<Tile, kRows>(map, row, head, batch, shared + half * kRows * kLineBytes, full);
}

// Where K goes where V was, V must be free for K, and K for V.
template <class Types>
FSA_DEVICE void load_keys_and_values(const BackwardParams& params, BackwardStorage<Types>& storage,
                                     const KeyWork& work) {
  const auto load_key = [&](ptx::Mbarrier(&empty)[Types::kKeyLoads]) {
    for (int32 i = 0; i < Types::kKeyLoads; ++i)
      load_keys<Types, typename Types::KeyRows>(params.forward.key_map, work, i, storage.key(work.loads),
                                                empty[i], storage.key_full[i]);
  };
  const auto load_value = [&](ptx::Mbarrier(&empty)[Types::kKeyLoads]) {
    for (int32 i = 0; i < Types::kKeyLoads; ++i)
      load_keys<Types, typename Types::ValueRows>(params.forward.value_map, work, i,
                                                  storage.value(work.loads), empty[i], storage.value_full[i]);
  };
  if constexpr (Types::kSwapsKeys) {
    load_key(storage.value_empty);
    load_value(storage.key_empty);
  } else {
    load_value(storage.value_empty);
    load_key(storage.key_empty);
  }
}

template <class Types>
FSA_DEVICE bool next_row_tile(const BackwardParams& params, Column<Types>& column, const KeyWork& work) {
  if constexpr (Types::kSplits)
    if (column.ends.remaining-- == 0) return false;
  return column.walk.next(params, work, column.next);
}

// So many row tiles before the end of a unit the next one is asked for.
inline constexpr int32 kAskedBefore = 32;

// What a unit's row tiles are, but for their loads. False where there are none.
template <class Types>
FSA_DEVICE bool describe_rows(const BackwardParams& params, KeyWork& work, Column<Types>& column) {
  Types::Rows::describe(params, work);
  column.walk.start(params, work);
  if constexpr (Types::kSplits) {
    if (work.num_segments > 0) column.walk.skip(params, work, work.part.skip);
    column.ends.remaining = work.part.count;
  } else if constexpr (!Types::kDeterministic) {
    column.ends.wanted_after = max_of(Types::Rows::count(params, work) - kAskedBefore, 0);
  }
  if (work.num_segments > 0 && next_row_tile<Types>(params, column, work)) {
    if constexpr (Types::kPassesOver) column.ends.unseen = Types::Rows::unseen_ends(params, work);
    return true;
  }
  work.num_segments = 0;
  return false;
}

// Which warpgroup passes over row tile number `number` of this CTA, or over the next, see backward_alternate.cuh. The dQ of
// what one passes over is the other's, and even row tiles are the first's.
template <class Types>
FSA_DEVICE int32 end_flags(const BackwardParams& params, const Column<Types>& column, const KeyWork& work,
                           uint32 number, bool first, bool last) {
  const int32 unseen = column.ends.unseen;
  if (unseen == 0) return 0;
  if (number % 2 != 0) return last && !first ? unseen & RowTileInfo::kFirstEnds : 0;
  if (last) return 0;
  return (first ? unseen & RowTileInfo::kSecondPasses : 0) |
         (column.walk.ended(params, work) ? unseen & RowTileInfo::kFirstEnds : 0);
}

// Two jobs, of one thread each or of one for both. Who describes takes units of work and finds their first row tile, and
// loads their keys. Who loads runs ahead of the consumers by the depth of the rings, across units. What they walk through is
// kept in shared memory: they have 24 registers.
template <class Types, bool kDescribes, bool kLoads>
FSA_DEVICE void produce(const BackwardParams& params, BackwardStorage<Types>& storage) {
  ProducerState<Types>& state = storage.producer;
  int32& units = kDescribes ? state.units : state.loaded;
  if constexpr (kDescribes) {
    state.schedule.start(params);
    state.loads = 0;
  }
  units = 0;
  uint32 tiles = 0;

  for (;; ++units) {
    const Ring<kWorkSlots> slot = {static_cast<uint32>(units)};
    if constexpr (kDescribes)
      ptx::wait(storage.work_empty[slot.stage()], slot.phase() ^ 1);
    else
      ptx::wait(storage.work_full[slot.stage()], slot.phase());
    KeyWork& work = storage.work[slot.stage()];
    Column<Types>& column = state.column(slot.stage());
    bool found;
    if constexpr (kDescribes) {
      work.number = units;
      work.loads = state.loads;
      if (!state.schedule.next(params, work)) {
        work.sequence = -1;
        ptx::arrive(storage.work_full[slot.stage()]);
        break;
      }
      found = describe_rows<Types>(params, work, column);
      ptx::arrive(storage.work_full[slot.stage()]);
      if (!found) continue;
      ++state.loads;
      if constexpr (!kLoads) load_keys_and_values<Types>(params, storage, work);
    } else {
      if (work.sequence < 0) break;
      found = work.num_segments > 0;
    }
    if constexpr (!kLoads) continue;

    // The slot of the unit before becomes that of the next.
    const auto want_next_unit = [&] {
      if constexpr (Types::kAsksEarly)
        state.schedule.ask(params);
      else if (Types::kDescribesAhead && units > 0)
        ptx::arrive(storage.work_empty[slot.stage() ^ 1]);
    };
    if (Types::kDescribesAhead && (Types::kSplits || !found)) want_next_unit();
    state.first_tile = tiles;
    for (; found; ++tiles) {
      // All but the loads before the wait: it takes 1500 clocks through busy shared memory.
      RowTileInfo& info = storage.info[tiles % Types::kInfoStages];
      info = column.next;
      found = next_row_tile<Types>(params, column, work);
      if (!found) info.flags |= RowTileInfo::kLast;
      if constexpr (Types::kPassesOver)
        info.flags |= end_flags<Types>(params, column, work, tiles, tiles == state.first_tile, !found);
      if constexpr (Types::kSplits) {
        if (Types::kAsksEarly && !found) want_next_unit();
      } else if constexpr (!Types::kDeterministic) {
        if (tiles - state.first_tile == static_cast<uint32>(column.ends.wanted_after)) want_next_unit();
      }
      const int32 head = info.head, row = work.q_begin + info.tile * Types::kBlockM;
      const int32 number = static_cast<int32>(row_tile_number<Types::kBlockM>(params, work, head, info.tile));
      info.used = work.seqlen_q - info.tile * Types::kBlockM;
      info.number = number;
      if constexpr (Types::kDeterministic)
        info.flags |= Types::Rows::rank(params, work, info) << RowTileBrief::kRankShift;
      const int32 batch = work.q_map_batch;

      const Ring<Types::kQueryStages> query = {tiles};
      ptx::wait(storage.query_empty[query.stage()], query.phase() ^ 1);
      ptx::Mbarrier& query_full = storage.query_full[query.stage()];
      constexpr int32 kTermBytes = Types::kGateTerms ? gate_term_bytes(Types::kBlockM) : 0;
      ptx::arrive_expect_bytes(query_full, Types::QueryRows::kBytes + Types::kRowVectorBytes + kTermBytes);
      load_rows<typename Types::QueryRows, Types::kBlockM>(params.forward.query_map, row, head, batch,
                                                           storage.query[query.stage()], query_full);
      ptx::load_bytes(storage.row_vectors[query.stage()],
                      params.row_vectors + static_cast<int64>(number) * (Types::kRowVectorBytes / 4),
                      Types::kRowVectorBytes, query_full);
      if constexpr (Types::kGateTerms)
        ptx::load_bytes(&storage.gate.rows[query.stage()],
                        params.gate_row_terms + static_cast<int64>(number) * kTermBytes, kTermBytes,
                        query_full);

      const Ring<Types::kGradOutStages> grad_out = {tiles};
      ptx::wait(storage.grad_out_empty[grad_out.stage()], grad_out.phase() ^ 1);
      ptx::Mbarrier& grad_out_full = storage.grad_out_full[grad_out.stage()];
      ptx::arrive_expect_bytes(grad_out_full, Types::GradOutRows::kBytes);
      load_rows<typename Types::GradOutRows, Types::kBlockM>(
          params.grad_out_map, row, head, batch, storage.grad_out[grad_out.stage()], grad_out_full);

      if constexpr (kDescribes)  // after Q and dO, which need not wait for the keys before
        if (tiles == state.first_tile) load_keys_and_values<Types>(params, storage, work);
    }
  }
  if constexpr (kDescribes) Types::Schedule::finish(params);
}

template <class Config>
FSA_DEVICE void backward(const BackwardParams& params) {
  using Types = BackwardTypes<Config>;
  using Storage = BackwardStorage<Types>;
  static_assert(sizeof(Storage) == backward_shared_bytes(Types::kTile),
                "the host must know the shared memory size");
  Storage& storage = *reinterpret_cast<Storage*>(dynamic_shared());

  const int32 warpgroup = warp_uniform(static_cast<int32>(threadIdx.x) / kWarpgroupThreads);
  if (threadIdx.x == 0) {
    ptx::prefetch(params.forward.query_map);
    ptx::prefetch(params.forward.key_map);
    ptx::prefetch(params.forward.value_map);
    ptx::prefetch(params.grad_out_map);
    init_barriers(storage);
    if constexpr (Types::kGateTerms) storage.gate.zeros.fill();
  }
  __syncthreads();

  if (warpgroup == 0) {
    ptx::shrink_registers<Types::kProducerRegisters>();
    // Consumers touch nothing before what the producer loads.
    ptx::wait_for_kernel_before();
    ptx::admit_next_kernel();
    const int32 warp = static_cast<int32>(threadIdx.x) / kWarpThreads;
    if (threadIdx.x == 0) produce<Types, !Types::kDescribesAhead, true>(params, storage);
    if constexpr (Types::kStagedGradQuery)
      if (warp == 1 || warp == 2) add_staged_sums<Types>(params, storage, warp - 1);
    if constexpr (Types::kPassesTurns)
      if (warp == 1 || warp == 2) pass_turns<Types>(params, storage, warp - 1);
    if constexpr (Types::kDescribesAhead)
      if (threadIdx.x == 3 * kWarpThreads) produce<Types, true, false>(params, storage);
    if (warp == 3) {
      __syncwarp();
      clear_gradient_tail(params, grad_key_rows(params));
      clear_gradient_tail(params, grad_value_rows(params));
      if constexpr (Types::kPairGate) clear_grad_delta_tail(params);
      if constexpr (Types::kClearsSums)
        if (params.clears != nullptr) clear_sums<Types>(params);
    }
  } else {
    ptx::grow_registers<Types::kConsumerRegisters>();
    BackwardConsumer<Types>(params, storage, warpgroup - 1).run();
  }
}

}  // namespace fsa::kernels::sm90

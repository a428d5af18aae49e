// SPDX-License-Identifier: Apache-2.0
// What the backward kernel derives from its Config at compile time, and its shared memory.
#pragma once

#include "policy/key_work.cuh"
#include "policy/logit_backward.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/wgmma.cuh"
#include "tile/swizzle.cuh"

namespace fsa::kernels::sm90 {

template <class Config>
struct BackwardTypes {
  static constexpr ElementType kElement = Config::kElement;
  static constexpr BackwardTile kTile = Config::kTile;
  static constexpr bool kDeterministic = Config::kDeterministic;
  static constexpr bool kSink = Config::kSink;
  static constexpr int32 kDim = kTile.head_dim;
  static constexpr int32 kDimV = kTile.head_dim_v;
  static constexpr int32 kBlockM = kTile.block_m;
  static constexpr int32 kBlockN = kTile.block_n;
  static constexpr int32 kQueryStages = kTile.query_stages;
  static constexpr int32 kGradOutStages = kTile.grad_out_stages;
  static constexpr int32 kScoreStages = kTile.score_stages;
  static constexpr int32 kInfoStages = 2 * kQueryStages;  // dQ follows a tile behind
  static constexpr int32 kConsumerThreads = kBackwardConsumers * kWarpgroupThreads;

  using Mask = KeyMask<typename Config::Mask>;
  using Rows = typename Config::RowIterator;
  static constexpr bool kSplits = Rows::kSplits;
  // A column of a map or a list takes reads of global memory to describe, one behind the other: 8500 clocks where a range
  // takes 3300. A thread of its own does it a unit ahead. Deterministic units must not be taken ahead of time; at
  // head_dim 64 ptxas would serialise every multiply (C7511). It loads K and V, too, so that neither waits for the other.
  static constexpr bool kDescribesAhead =
      !kDeterministic && (kSplits ? kDim >= 128 : Rows::kShortColumns && backward_alternates(kTile));
  // Others ask for a unit before they want it. Deterministic ones must not: it would start late, and later units wait for it.
  static constexpr bool kAsksEarly = !kDeterministic && !kDescribesAhead;
  using Schedule = KeySchedule<kBlockN, kDeterministic, kSplits>;
  using Logits = LogitBackward<typename Config::LogitChain>;
  static constexpr bool kPairGate = Config::LogitChain::kKeyScalars;
  static constexpr bool kGateTerms = Config::LogitChain::kGateTerms;
  static constexpr bool kLogGate = Config::LogitChain::kLogGate;
  static constexpr bool kFolded = kTile.row_vectors >= kFoldedVectors;

  // Two ways to share a tile between two warpgroups. With 128 keys each has 64: P and dS stay in its registers
  // for dV and dK, and only dS goes to shared memory, for dQ. With 64 keys (head_dim 256, where gradients of 64
  // keys fill the registers of both) each computes S for half of the query rows and the gradients for half of
  // the columns, and P too goes to shared memory.
  static constexpr bool kSplitKeys = kBlockN == 128;
  static constexpr int32 kScoreRows = kSplitKeys ? kBlockM : kBlockM / 2;  // query rows of a warpgroup's S
  static constexpr int32 kGradDim = kSplitKeys ? kDim : kDim / 2;          // columns of its dK
  static constexpr int32 kGradDimV = kSplitKeys ? kDimV : kDimV / 2;       // and of its dV
  // dQ: 64 rows of the tile each, or half of the columns.
  static constexpr int32 kQueryColumns = kBlockM == 128 ? kDim : kDim / 2;
  // Units of four query rows whose lse, or sum, is read ahead.
  static constexpr int32 kUnitsAhead = kScoreRows / 16;
  static constexpr bool kStagedGradQuery = kTile.stage_grad_query != 0;
  // dQ of even row tiles is the first warpgroup's, of odd ones the second's, instead of half of the columns each: dS is
  // read once, 128 of 2950 wavefronts of shared memory less, and every second row tile needs not wait for the other
  // warpgroup. Half of the sums is staged where dS was.
  static constexpr bool kAlternates = backward_alternates(kTile);
  static_assert(!kAlternates || (kFolded && Logits::kPlain && !kPairGate));
  // Of windows, whose first and last row tile of a column half of the keys do not see, the warpgroup that has that half
  // leaves out the tile.
  static constexpr bool kPassesOver = kAlternates && kDescribesAhead && !kSplits;
  // Then one is a row tile ahead of the other where a unit ends, and its half of K and V is loaded as soon as it can be.
  static constexpr int32 kKeyLoads = kPassesOver ? 2 : 1;
  // K of the next work goes where V was, and V where K was: V is free as soon as the last dP is there, and K is wanted first.
  static constexpr bool kSwapsKeys = kAlternates;
  // The first to come to a row tile stores what others add to, and nobody clears the sums: lists and maps +1 to +4 %, windows
  // of 512 +1 %. Where columns are long that is not worth a look at each row tile's counter (causal -1 %), nor where an adder
  // has half of the time (head_dim 64).
  static constexpr bool kFirstStores =
      kDeterministic || (backward_first_stores(kTile) && Config::RowIterator::kShortColumns);
  // Whoever hands sums over says which row tile it has next, so that an adder can look at it early. Elsewhere the adder
  // takes the next of a range: told by warpgroups at head_dim 64, ptxas arranged a deterministic loop anew (-23 %).
  static constexpr bool kSaysNext = kAlternates || (kFirstStores && kSplits && !kDeterministic);
  // The main kernel clears them. Where columns may be cut, units come in another order than waves of heads.
  static constexpr bool kClearsSums = kStagedGradQuery && !kFirstStores && !kSplits;
  // Without room to stage dQ warps add it; then a thread of an idle warp passes on their turn.
  static constexpr bool kPassesTurns = kDeterministic && !kStagedGradQuery;
  static constexpr bool kStageInScores = backward_stages_in_scores(kTile);

  // Of dP's A operand, steps of 16 columns that stay in registers: 128 of 3070 wavefronts of shared memory a tile.
  // At head_dim 128 there are 20 registers left.
  static constexpr int32 kHeldSteps =
      kSplitKeys && kFolded && !kPairGate && kDim == 128 ? (kAlternates ? 3 : 4) : 0;

  using KeyRows = SwizzledTile<kBlockN, kDim>;
  using ValueRows = SwizzledTile<kBlockN, kDimV>;
  using QueryRows = SwizzledTile<kBlockM, kDim>;
  using GradOutRows = SwizzledTile<kBlockM, kDimV>;
  using Scores = SwizzledTile<kBlockN, kBlockM>;  // a line per key
  static constexpr int32 kRowVectorBytes = kTile.row_vectors * kBlockM * 4;

  static constexpr int32 kConsumerRegisters = 240;
  static constexpr int32 kProducerRegisters = 24;

  static_assert(kBlockN == 128 || kBlockN == 64, "64 keys for each warpgroup, or 64 for both");
  static_assert(kBlockM == 64 || (kBlockM == 128 && kSplitKeys), "row tiles of 64 or 128 rows");
  static_assert(kDim % kChunkColumns == 0 && kDimV % kChunkColumns == 0,
                "pad head dimensions to whole chunks");
  static_assert(kSplitKeys || (kDim % 128 == 0 && kDimV % 128 == 0), "half of the columns are whole chunks");
  static constexpr int32 kAlphaVector = kFolded ? kFoldedVectors : 2;
  static_assert(kTile.row_vectors == kAlphaVector + kPairGate,
                "lse, out_dot_grad, and alpha for the pair gate");
  static_assert((kTile.gate_terms != 0) == kGateTerms, "FoldedPairGate needs its terms beside Q");
};

// Sums of alpha's gradient over the keys of a warp, per stage of dS: a line of block_m floats for each warp,
// or each two with different query rows.
template <class Types>
inline constexpr int32 kAlphaLines = Types::kSplitKeys ? 8 : 4;

template <int32 kStages, int32 kLines, int32 kRows>
struct AlphaSums {
  float values[kStages][kLines][kRows];
  FSA_DEVICE float* line(int32 stage, int32 line) { return values[stage][line]; }
};
template <int32 kLines, int32 kRows>
struct AlphaSums<0, kLines, kRows> {};

// Terms of the pair gate of row tiles; nothing when kThere is false.
template <class Types, bool kThere>
struct RowTermStages {
  GateTermTile<Types::kBlockM> rows[Types::kQueryStages];
  ZeroTerms zeros;
};
template <class Types>
struct RowTermStages<Types, false> {};

// dQ of one row tile on its way to global memory; nothing where it goes straight from registers.
template <int32 kWarpBytes>
struct StagedGradQuery {
  alignas(128) uint8 bytes[kBackwardConsumers * 4][kWarpBytes];
  FSA_DEVICE uint8* of_warp(int32 warp) { return bytes[warp]; }
};
template <>
struct StagedGradQuery<0> {};

// Which row tile a warpgroup's staged sums belong to.
struct StagedSums {
  int32 number;  // row_tile_number
  int32 order;   // RowTileBrief's
  int32 stage;   // of dS
  int32 next;    // row_tile_number of the warpgroup's next row tile, -1: it does not say
};
static_assert(sizeof(StagedSums) == kStagedSumsBytes, "backward.h must know the size of a StagedSums");

// What goes with a handover, see backward_handovers().
template <bool kStaged>
struct Handovers {
  StagedSums sums[kBackwardConsumers];
};
template <>
struct Handovers<false> {
  int32 row_tiles[kBackwardWarps];  // row_tile_number; -1: the last
};
static_assert(sizeof(Handovers<false>) <= sizeof(Handovers<true>));

template <bool kSplits>
struct ColumnEnds {
  int32 remaining;  // row tiles of a part
};
template <>
struct ColumnEnds<false> {
  int32 wanted_after;  // row tiles after which the next unit is wanted
  int32 unseen;        // of RowTileInfo's flags, those that its first row tile and the one before its last may have
};

// The row tiles of a unit of work that have not been asked for.
template <class Types>
struct Column {
  RowTileInfo next;
  typename Types::Rows::Walk walk;
  ColumnEnds<Types::kSplits> ends;
};

// In shared memory, because the producer has 24 registers.
template <class Types>
struct ProducerState {
  // Of who describes them.
  typename Types::Schedule schedule;
  int32 units;  // of work so far
  int32 loads;  // of keys so far
  // Of who loads them.
  int32 loaded;       // units of work so far
  uint32 first_tile;  // of this unit
  Column<Types> columns[Types::kDescribesAhead ? kWorkSlots : 1];

  FSA_DEVICE Column<Types>& column(int32 slot) { return columns[Types::kDescribesAhead ? slot : 0]; }
};

template <class Types>
struct alignas(kSharedAlignment) BackwardStorage {
  uint8 keys_and_values[Types::KeyRows::kBytes + Types::ValueRows::kBytes];
  uint8 query[Types::kQueryStages][Types::QueryRows::kBytes];
  uint8 grad_out[Types::kGradOutStages][Types::GradOutRows::kBytes];
  uint8 scores[backward_score_slots(Types::kTile)][backward_shared_operands(Types::kTile)]
              [Types::Scores::kBytes];  // dS; P
  // Before what follows: checkers take the repeated rows of issue_row_values for 4 KB side by side.
  alignas(128) float row_vectors[Types::kQueryStages][Types::kTile.row_vectors][Types::kBlockM];
  [[no_unique_address]] RowTermStages<Types, Types::kGateTerms> gate;
  [[no_unique_address]] StagedGradQuery<Types::kStagedGradQuery ? Types::kQueryColumns * 64 : 0> grad_query;
  [[no_unique_address]] AlphaSums<Types::kPairGate ? Types::kScoreStages : 0, kAlphaLines<Types>,
                                  Types::kBlockM> alpha_sums;
  KeyWork work[kWorkSlots];
  RowTileInfo info[Types::kInfoStages];
  union {
    Handovers<Types::kStagedGradQuery> handed;
    uint8 handed_bytes[sizeof(Handovers<true>)];
  };
  union {
    ProducerState<Types> producer;
    uint64 producer_bytes[kProducerBytes / 8];
  };
  ptx::Mbarrier key_full[Types::kKeyLoads];
  ptx::Mbarrier value_full[Types::kKeyLoads];
  ptx::Mbarrier key_empty[Types::kKeyLoads];
  ptx::Mbarrier value_empty[Types::kKeyLoads];
  ptx::Mbarrier query_full[Types::kQueryStages];
  ptx::Mbarrier query_empty[Types::kQueryStages];
  ptx::Mbarrier grad_out_full[Types::kGradOutStages];
  ptx::Mbarrier grad_out_empty[Types::kGradOutStages];
  ptx::Mbarrier scores_full[Types::kScoreStages];  // the stages of dS, where keys are split
  ptx::Mbarrier scores_empty[Types::kScoreStages];
  ptx::Mbarrier handed_full[backward_handovers(Types::kTile)];
  ptx::Mbarrier handed_empty[backward_handovers(Types::kTile)];
  ptx::Mbarrier work_full[kWorkSlots];
  ptx::Mbarrier work_empty[kWorkSlots];

  // Of load number `load`.
  FSA_DEVICE uint8* key(uint32 load) {
    return keys_and_values + (Types::kSwapsKeys ? (load & 1) * Types::KeyRows::kBytes : 0);
  }
  FSA_DEVICE uint8* value(uint32 load) {
    return keys_and_values +
           (Types::kSwapsKeys ? (~load & 1) * Types::KeyRows::kBytes : Types::KeyRows::kBytes);
  }
};

}  // namespace fsa::kernels::sm90

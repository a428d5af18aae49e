// SPDX-License-Identifier: Apache-2.0
// What the forward kernel derives from its Config at compile time, and its shared memory.
#pragma once

#include "core/config.h"
#include "core/params.h"
#include "policy/ballot.cuh"
#include "policy/gate_terms.cuh"
#include "policy/work_tile.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/sync.cuh"
#include "ptx/wgmma.cuh"
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
  // Without a vote all consumers share each V stage. With one they want different tiles: where they fit, each has
  // stages of its own, and in a work tile of which most will be kept all share the same memory.
  static constexpr bool kPrivateValues = kTile.private_values != 0;
  static constexpr int32 kOwnValueStages = kPrivateValues ? kValueStages / kNumConsumers : 1;

  using Source = typename Config::KvSource;
  using Mask = typename Config::Mask;
  using Tiles = typename Config::TileIterator;
  using Schedule = typename Config::Schedule;
  using LogitChain = typename Config::LogitChain;
  using Epilogue = typename Config::Epilogue;
  // At head_dim 128 1 to 3 % less time, with lists 3 %; at 256, which multiplies limit, and with three warpgroups,
  // which hide each other's maxima, 1 to 2 % more at seqlen 2048 (H200, 2026-11).
  static constexpr bool kIntegerMaxima = kNumConsumers == 2 && kHeadDim <= 128;
  static constexpr int32 kPaddedDim = round_up(kHeadDim, kChunkColumns);
  static constexpr int32 kPaddedDimV = round_up(kHeadDimV, kChunkColumns);
  using QueryTile = SwizzledTile<kBlockM, kPaddedDim>;
  using KeyTile = SwizzledTile<kBlockN, kPaddedDim>;
  using ValueTile = SwizzledTile<kBlockN, kPaddedDimV>;
  static constexpr bool kKeyScalars = LogitChain::kKeyScalars;
  // Votes have a way for work tiles of which most is kept and another for the others; not for lists, nor where registers
  // do not hold both: with three warpgroups 272 bytes of spills, at head_dim 192 40, with the pair gate 116.
  static constexpr bool kChoosesWay =
      kPrivateValues && !Tiles::kListed && kNumConsumers == 2 && kHeadDim <= 128 && !kKeyScalars;
  static constexpr bool kRoundedSums = LogitChain::kBounded;
  static constexpr int32 kKeyScalarBytes = kKeyScalars ? kBlockN * 4 : 0;
  static constexpr bool kGateTerms = LogitChain::kGateTerms;
  static constexpr bool kLogGate = LogitChain::kLogGate;

  // 64 K registers: a launch gives each of the warpgroups the same share, setmaxnreg moves it to the
  // consumers.
  static constexpr int32 kConsumerRegisters = kNumConsumers == 3 ? 160 : Schedule::kByWarp ? 224 : 232;
  static constexpr int32 kProducerRegisters = kNumConsumers == 3 ? 32 : Schedule::kByWarp ? 56 : 40;

  static_assert(kNumConsumers == 2 || kNumConsumers == 3,
                "block_m is 128 or 192: two or three consumer warpgroups");
  static_assert(kHeadDimV <= kHeadDim, "the output is staged in the query's shared memory");
  static_assert(kBlockN % 16 == 0, "P V takes 16 keys at a time");
  static_assert(kHeadDim % 16 == 0 && kHeadDimV % 16 == 0, "multiplies take 16 columns at a time");
  static_assert(!kPrivateValues || (Skip::kVotes && kOwnValueStages == 2),
                "V of a kept tile loads beside P V of the one before");
  static_assert(!Skip::kVotes || kBlockN == skip_tile_keys(kHeadDim), "one vote decides one skip tile");
  static_assert(!Skip::kVotes || Tiles::kInOrder, "votes are taken from right to left");
  static_assert(!(kKeyScalars && Skip::kVotes && kNumConsumers == 3),
                "160 registers do not hold the pair gate beside a vote: use block_m 128");
  static_assert(kKeyStages < kBallotRounds, "a warp may be as many votes ahead of another as there are keys");
  static_assert((kTile.key_scalars != 0) == kKeyScalars, "the pair gate needs delta beside K");
  static_assert((kTile.gate_terms != 0) == kGateTerms, "FoldedPairGate needs its terms beside K");
  static_assert((kTile.rounded_sums != 0) == kRoundedSums,
                "without row maxima O is divided by sums of rounded P");
  static_assert(!(LogitChain::kBounded && (Skip::kVotes || kElement != ElementType::bf16)),
                "a vote needs row maxima, and fp16 holds too few powers of two to do without");
  static_assert(kBlockN <= 256, "a TMA box has at most 256 rows");
  static_assert(KeyTile::kBytes % kSharedAlignment == 0 && ValueTile::kBytes % kSharedAlignment == 0,
                "every stage must start on a swizzle period");
};

// [stages][count] floats; nothing when count is 0.
template <int32 kStages, int32 kCount>
struct KeyScalarStages {
  alignas(16) float values[kStages][kCount];
  FSA_DEVICE float* of(int32 stage) { return values[stage]; }
};
template <int32 kStages>
struct KeyScalarStages<kStages, 0> {};

// Terms of the pair gate, of key tiles and of each warpgroup's rows; nothing when kThere is false.
template <class Types, bool kThere>
struct GateTermStages {
  GateTermTile<Types::kBlockN> keys[Types::kKeyStages];
  GateTermTile<kRowsPerWarpgroup> rows[Types::kNumConsumers];
  ZeroTerms zeros;
};
template <class Types>
struct GateTermStages<Types, false> {};

// B of the multiply that adds up P; nothing when kThere is false.
template <ElementType kElement, bool kThere>
struct Ones {
  alignas(128) uint16 values[kOnesBytes / kElementBytes];
  FSA_DEVICE void fill() {
#pragma unroll
    for (int32 i = 0; i < kOnesBytes / kElementBytes; ++i)
      values[i] = kElement == ElementType::bf16 ? 0x3f80 : 0x3c00;
    ptx::fence_shared_for_async();
  }
};
template <ElementType kElement>
struct Ones<kElement, false> {
  FSA_DEVICE void fill() {}
};

// The way through a work tile that is voted on, in one word (see ListedTile).
struct VoteWay {
  int32 bits;
  static constexpr int32 kMostKept = 1;  // values are loaded for all
  static constexpr int32 kChanges = 2;  // the other one in the work tile before: its values may still be read
  FSA_DEVICE bool most_kept() const { return (bits & kMostKept) != 0; }
  FSA_DEVICE bool changes() const { return (bits & kChanges) != 0; }
};

template <int32 kCount>
struct Barriers {
  ptx::Mbarrier of[kCount];
};
template <>
struct Barriers<0> {};

// Where a warpgroup stands in its rings and votes when a work tile begins.
struct VotePlace {
  uint32 key;
  uint32 own_value;
  uint32 round;
};

// What the choice of a way needs, of each consumer but for the last; nothing where consumers fetch no values of their own.
template <int32 kConsumers>
struct VoteStorage {
  Ballots ballots[kConsumers];
  uint32 rejected[kConsumers];      // the round in which nobody wanted the tile; the last one
  int32 keeps_most[kConsumers];     // of the tiles of its last work tile
  VotePlace places[kConsumers][2];  // written by each warp, which meets the others once a work tile
  VoteWay ways[kWorkSlots];
};
template <>
struct VoteStorage<0> {};

template <class Types>
struct alignas(kSharedAlignment) ForwardStorage {
  uint8 query[Types::kQueryStages][Types::QueryTile::kBytes];
  uint8 key[Types::kKeyStages][Types::KeyTile::kBytes];
  uint8 value[Types::kValueStages][Types::ValueTile::kBytes];
  [[no_unique_address]] Ones<Types::kElement, Types::kRoundedSums> ones;
  [[no_unique_address]] GateTermStages<Types, Types::kGateTerms> gate;
  [[no_unique_address]] KeyScalarStages<Types::kKeyStages, Types::kKeyScalarBytes / 4> key_scalars;
  ListedTile following[Types::kKeyStages];  // the listed tile after the one whose keys are there
  ListedWorkTile work[kWorkSlots];
  [[no_unique_address]] VoteStorage<Types::kPrivateValues ? Types::kNumConsumers : 0> votes;
  ptx::Mbarrier query_full[Types::kQueryStages];
  ptx::Mbarrier query_empty[Types::kQueryStages];
  ptx::Mbarrier key_full[Types::kKeyStages];
  ptx::Mbarrier key_empty[Types::kKeyStages];
  ptx::Mbarrier value_full[Types::kValueStages];
  ptx::Mbarrier value_empty[Types::kValueStages];
  [[no_unique_address]] Barriers<Types::kPrivateValues ? Types::kValueStages : 0> own_value_full;
  ptx::Mbarrier work_full[kWorkSlots];
  ptx::Mbarrier work_empty[kWorkSlots];
};

// Until all have done with the work tile of that position, where the one after it is still under way.
template <class Types>
FSA_DEVICE void wait_work_tile_done(ForwardStorage<Types>& storage, uint32 position) {
  const Ring<kWorkSlots> slot = {position};
  ptx::wait(storage.work_empty[slot.stage()], slot.phase());
}

}  // namespace fsa::kernels::sm90

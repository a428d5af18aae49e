// SPDX-License-Identifier: Apache-2.0
// A vote of the four warps of a warpgroup without a barrier: yes when one of them says so, so that who does goes on
// at once, and only who does not waits for the others.
#pragma once

#include "core/config.h"
#include "ptx/sync.cuh"

namespace fsa::kernels {

class Ballots {
 public:
  FSA_DEVICE void clear() {
#pragma unroll
    for (int32 i = 0; i < kBallotRounds; ++i) words_[i] = 0;
  }

  // By all lanes of `warp`; rounds count up from 1.
  FSA_DEVICE void cast(uint32 round, int32 warp, bool yes) {
    if (lane_id() == 0)
      ptx::store_byte(reinterpret_cast<uint8*>(words_ + round % kBallotRounds) + warp,
                      (round << 1 | static_cast<uint32>(yes)) & 0xffu);
  }

  // What all four together say.
  FSA_DEVICE bool outcome(uint32 round) const {
    constexpr uint32 kVotes = 0x01010101u;
    return (ptx::wait_masked(words_ + round % kBallotRounds, ~kVotes, (round << 1 & 0xffu) * kVotes) &
            kVotes) != 0;
  }

 private:
  uint32 words_[kBallotRounds];  // a byte a warp: seven bits of the round, and its vote
};

}  // namespace fsa::kernels

// SPDX-License-Identifier: Apache-2.0
// The key tiles of a work tile's segments, one after the other.
#pragma once

#include "policy/work_tile.cuh"

namespace fsa::kernels {

class SegmentWalk {
 public:
  FSA_DEVICE SegmentWalk(const ForwardParams&, const WorkTile& work) : work_(work) {}

  FSA_DEVICE bool next(TileInfo& info) {
    if (remaining_ == 0) {
      if (segment_ == work_.num_segments) return false;
      const Segment& segment = work_.segments[segment_++];
      tile_ = segment.first;
      remaining_ = segment.count;
      masked_ = segment.masked;
    }
    info = {tile_, masked_ ? TileInfo::kMasked : 0, -1, 0};
    --tile_;
    --remaining_;
    return true;
  }

 private:
  const WorkTile& work_;
  int32 segment_ = 0;
  int32 tile_ = 0;
  int32 remaining_ = 0;
  int32 masked_ = 0;
};

}  // namespace fsa::kernels

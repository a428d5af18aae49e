// SPDX-License-Identifier: Apache-2.0
// One consumer warpgroup of the forward kernel where it votes on key tiles: three ways through those of a work tile.
//
//   sweep_kept     V loaded for all, most tiles kept: as Consumer::sweep, the vote beside it. A tile that nobody wants
//                  costs its exponentials and ends the pipeline
//   sweep_shared   V loaded for all: the vote is taken before the exponentials
//   sweep_private  V fetched on demand, most tiles skipped. A loop while they are: S, row maxima, vote. Another while
//                  tiles are kept: S(j + 1) and P V(j) in flight together, the vote on j + 1 and its softmax under P V(j)
//
// Where registers allow it (kChoosesWay) sweep_kept and one of the others are compiled, and the announcer chooses for each
// work tile by what the CTA has kept of an earlier one. Against no vote, with nothing skipped sweep_kept takes 1.17,
// sweep_private 1.32 times as long; with everything skipped 1.17 and 0.57 (H200, head_dim 128, 2026-11). Both give the same
// bits.
#pragma once

#include "policy/skip.cuh"
#include "sm90/forward_consumer.cuh"

namespace fsa::kernels::sm90 {

template <class Types>
struct Voter {
  using LogitChain = typename Types::LogitChain;
  using Skip = typename Types::Skip;
  using Walk = typename Types::Tiles::Walk;
  static constexpr bool kListed = Types::Tiles::kListed;

  Consumer<Types>& c;
  const WorkTile& work;
  const LogitChain& logit;

  // The last P V remains, but after sweep_private.
  FSA_DEVICE void sweep() {
    if constexpr (!Types::kChoosesWay) {
      sweep_voting();
    } else {
      // What the other ways count is not in uniform registers, and would not be in sweep_kept either, at 26 instead of 2
      // R2UR a step; so it goes through shared memory.
      auto& votes = c.storage.votes;
      const uint32 number = c.query.position;
      const VotePlace place = votes.places[c.index][number % 2];
      const VoteWay way = votes.ways[c.slot.stage()];
      c.key.position = place.key;
      c.own_value.position = place.own_value;
      c.round = place.round;
      int32 kept;
      if (way.most_kept()) {
        kept = sweep_kept();
      } else {
        if (way.changes()) wait_work_tile_done<Types>(c.storage, c.slot.position - 1);
        kept = sweep_voting();
      }
      if (lane_id() == 0)
        votes.places[c.index][(number + 1) % 2] = {c.key.position, c.own_value.position, c.round};
      __syncwarp();
      if (warpgroup_thread() == 0) votes.keeps_most[c.index] = 4 * kept >= 3 * tiles();
    }
  }

 private:
  FSA_DEVICE Skip new_skip() const { return Skip(c.params, work, work.m_begin + c.row); }

  FSA_DEVICE int32 tiles() const {
    int32 count = 0;
    for (int32 s = 0; s < work.num_segments; ++s) count += work.segments[s].count;
    return count;
  }

  FSA_DEVICE void mask(const TileInfo& info) {
    c.template seen_keys<Types::kBlockN / 2>(work, info).hide_others(c.rS);
  }

  // ---- Most tiles kept ----

  // False when nobody wants the tile: then O, m and l are what they were, and its V is to be passed over. Whether is read
  // from shared memory, as ptxas wants it (ListedTile): at a uniform address, all of a warpgroup the same.
  template <bool kFirst, bool kMasked>
  FSA_DEVICE bool kept_step(Skip& skip, int32 tile) {
    const TileInfo info = {tile, kMasked ? TileInfo::kMasked : 0, -1, 0};
    const float scale = logit.scale();
    const int32 stage = c.start_scores(c.rS);
    if constexpr (!kFirst) {
      c.wait_value();
      c.issue_output();
      skip.raise(c.softmax, scale);
    }
    const auto seen = c.template seen_keys<Types::kBlockN / 2>(work, info);
    const bool all_seen = !kMasked || seen.all();
    if constexpr (kFirst) {
      if (c.params.batch > 0) ptx::wgmma_wait<0>();  // a branch, as in wait_output_late
      ptx::wgmma_wait<0>();
    } else {
      ptx::wgmma_wait<1>();
    }
    c.take_scores(logit, c.rS, tile, stage);
    if (!all_seen) seen.hide_others(c.rS);

    const OnlineSoftmax before = c.softmax;
    const OnlineSoftmax::RowPair top = c.softmax.template tile_maximum<Types::kIntegerMaxima>(c.rS);
    vote(skip, top);
    const bool keep = c.storage.votes.rejected[c.index] != c.round;
    c.softmax.update(c.rS, top, scale);
    if constexpr (!kFirst) c.wait_output_late(c.rS);
    if (!keep) {
      c.softmax.go_back(before);
    } else if (c.softmax.grown) {
      c.softmax.rescale(c.rO);
    }
    if constexpr (!kFirst) c.release_value();
    c.pack_probabilities(c.rS);
    if (keep) {
      if constexpr (kMasked) c.clear_unused_values(work, tile);
      if (warpgroup_thread() == kWarpgroupThreads - 1) record(tile);
    }
    return keep;
  }

  // Most often a warp wants the tile, and then does not need the others.
  FSA_DEVICE void vote(const Skip& skip, const OnlineSoftmax::RowPair& top) {
    ++c.round;
    const int32 warp = warpgroup_thread() / kWarpThreads;
    Ballots& ballots = c.storage.votes.ballots[c.index];
    const float scale = logit.scale();
    if (__any_sync(0xffffffffu, skip.surely_wants(c.softmax, top, scale))) {
      ballots.cast(c.round, warp, true);
      return;
    }
    const auto max = [](float a, float b) { return ptx::max_nan(a, b); };
    const OnlineSoftmax::RowPair exact = OnlineSoftmax::row_maximum(c.rS, max);
    ballots.cast(c.round, warp, __any_sync(0xffffffffu, skip.wants(exact, scale)));
    if (!ballots.outcome(c.round) && lane_id() == 0) c.storage.votes.rejected[c.index] = c.round;
    __syncwarp();
  }

  // All sweeps return how many tiles were kept.
  FSA_DEVICE int32 sweep_voting() {
    if constexpr (Types::kPrivateValues) return sweep_private();
    return sweep_shared();
  }

  FSA_DEVICE int32 sweep_kept() {
    Skip skip = new_skip();
    int32 kept = tiles();
    for (int32 s = 0; s < work.num_segments; ++s) {
      const Segment segment = work.segments[s];
      const int32 end = segment.first - segment.count;
      int32 tile = segment.first;
      while (tile > end) {
        bool keep;
        if (!c.pending) {
          keep = kept_step<true, true>(skip, tile);
          --tile;
          c.release_query();
        } else if (segment.masked) {
          do keep = kept_step<false, true>(skip, tile);
          while (--tile > end && keep);
        } else {
          do keep = kept_step<false, false>(skip, tile);
          while (--tile > end && keep);
        }
        c.pending = keep;
        if (!keep) {
          c.pass_over_value();
          --kept;
        }
      }
    }
    return kept;
  }

  // ---- By a barrier ----

  // Votes on a tile whose S is in rS; if it is kept, `top` gets its row maxima, or 0 where they are less and `positive`
  // says that no row wants a tile for that and that no m is less. A row wants it when one of its threads does, so where
  // most tiles are skipped the threads compare notes only about a kept one: 6 % less time at head_dim 64 and 4 % at 128
  // when nine tenths are skipped. Where most are kept it would cost 3 %.
  template <bool kSkipping>
  FSA_DEVICE bool barrier_vote(const Skip& skip, OnlineSoftmax::RowPair& top, bool positive = false) {
    const auto max = [](float a, float b) { return ptx::max_nan(a, b); };
    if (kSkipping && positive)
      top = OnlineSoftmax::maximum_above({0, 0}, c.rS);
    else
      top = OnlineSoftmax::thread_maximum(c.rS, max);
    if constexpr (!kSkipping) top = OnlineSoftmax::over_quad(top, max);
    const bool keep =
        ptx::barrier_any(kWarpgroupBarrier + c.index, kWarpgroupThreads, skip.wants(top, logit.scale()));
    if constexpr (kSkipping) {
      if (keep) top = OnlineSoftmax::over_quad(top, max);
    }
    return keep;
  }

  // By one thread: tile `tile` is kept.
  FSA_DEVICE void record(int32 tile) {
    Skip::record(c.params, work, work.m_begin + c.index * kRowsPerWarpgroup, tile);
  }

  // A step that ends in a vote; true when the tile is kept.
  template <bool kPending>
  FSA_DEVICE bool shared_step(Skip& skip, const TileInfo& info) {
    const int32 stage = c.start_scores(c.rS);
    if constexpr (kPending) {
      c.wait_value();
      c.issue_output();
      ptx::wgmma_wait<1>();
    } else {
      ptx::wgmma_wait<0>();
    }
    c.take_scores(logit, c.rS, info.tile, stage);
    if (info.masked()) mask(info);
    OnlineSoftmax::RowPair top;
    const bool keep = barrier_vote<false>(skip, top);
    if (keep) {
      if (warpgroup_thread() == 0) record(info.tile);
      c.softmax.update(c.rS, top, logit.scale());
    }
    c.wait_output_late(c.rS);
    if (keep && c.softmax.grown) c.softmax.rescale(c.rO);
    if constexpr (kPending) c.release_value();
    if (keep) {
      c.pack_probabilities(c.rS);
      skip.raise(c.softmax, logit.scale());
      if (info.masked()) c.clear_unused_values(work, info.tile);
    }
    return keep;
  }

  // The warpgroup's own next tile; keys and values of the others' are passed over, which ends the pipeline.
  FSA_DEVICE bool next_shared(Walk& walk, TileInfo& info) {
    if constexpr (!kListed) {
      return walk.next(info);
    } else {
      while (c.following.exists()) {
        info = c.following;
        if (info.belongs_to(c.index)) return true;
        c.pass_over_key();
        if (c.pending) c.last_output();
        c.pass_over_value();
      }
      return false;
    }
  }

  FSA_DEVICE int32 sweep_shared() {
    Skip skip = new_skip();
    Walk walk(c.params, work);
    TileInfo info;
    int32 kept = 0;
    for (bool more = next_shared(walk, info); more; more = next_shared(walk, info)) {
      c.pending = c.pending ? shared_step<true>(skip, info) : shared_step<false>(skip, info);
      kept += c.pending;
      if (!c.pending) c.pass_over_value();
    }
    return kept;
  }

  // ---- V on demand ----

  // The warpgroup's own next tile; keys of the others' are passed over.
  FSA_DEVICE bool next_tile(Walk& walk, TileInfo& info) {
    if constexpr (!kListed) {
      return walk.next(info);
    } else {
      for (; c.following.exists(); c.pass_over_key()) {
        info = c.following;
        if (info.belongs_to(c.index)) return true;
      }
      return false;
    }
  }

  // The next tile is looked up in the shadow of a multiply, where that is arithmetic. In a list, other
  // warpgroups' tiles may come before it, which need stages: not while this one holds one.
  FSA_DEVICE bool next_early(Walk& walk, TileInfo& info) {
    if constexpr (kListed) return false;
    return next_tile(walk, info);
  }
  FSA_DEVICE bool next_late(Walk& walk, TileInfo& info, bool early) {
    if constexpr (kListed) return next_tile(walk, info);
    return early;
  }

  // V of a kept tile loads under its softmax. Every warp has completed the P V that last read this stage.
  FSA_DEVICE void fetch_value(int32 tile) {
    if (warpgroup_thread() == 0) {
      const int32 stage = c.template value_stage<true>();
      ptx::Mbarrier& full = c.storage.own_value_full.of[stage];
      ptx::arrive_expect_bytes(full, Types::ValueTile::kBytes);
      Types::Source::template load_value<Types::kBlockN, Types::kPaddedDimV>(c.params, work, tile,
                                                                             c.storage.value[stage], full);
    }
    if (warpgroup_thread() == kWarpgroupThreads - 1) record(tile);  // of another warp: this takes its time
  }

  FSA_DEVICE int32 start_scores() { return c.template start_scores<0, true>(c.rS); }

  enum class Skipped { until_kept, other_mask, all };

  // A loop for masked tiles and one for the others: the vote's latency is that of its instructions.
  template <bool kMasked>
  FSA_DEVICE Skipped skip_run(const Skip& skip, Walk& walk, TileInfo& tile, TileInfo& ahead, bool& more,
                              OnlineSoftmax::RowPair& top) {
    const bool positive = skip.positive(c.softmax);
    do {
      if constexpr (kMasked) mask(tile);
      if (barrier_vote<true>(skip, top, positive)) return Skipped::until_kept;
      if (!more) return Skipped::all;
      tile = ahead;
      const int32 stage = start_scores();
      more = next_early(walk, ahead);
      ptx::wgmma_wait<0>();
      c.take_scores(logit, c.rS, tile.tile, stage);
      more = next_late(walk, ahead, more);
    } while (tile.masked() == kMasked);
    return Skipped::other_mask;
  }

  FSA_DEVICE int32 sweep_private() {
    Skip skip = new_skip();
    Walk walk(c.params, work);
    TileInfo tile, ahead;
    int32 kept = 0;
    if (!next_tile(walk, tile)) return kept;
    int32 stage = start_scores();
    bool more = next_early(walk, ahead);
    ptx::wgmma_wait<0>();
    c.take_scores(logit, c.rS, tile.tile, stage);
    more = next_late(walk, ahead, more);
    c.release_query();

    OnlineSoftmax::RowPair top;
    for (;;) {
      // Skipping. S of `tile` is in rS, nothing in flight.
      Skipped end;
      do {
        end = tile.masked() ? skip_run<true>(skip, walk, tile, ahead, more, top)
                            : skip_run<false>(skip, walk, tile, ahead, more, top);
      } while (end == Skipped::other_mask);
      if (end == Skipped::all) return kept;
      fetch_value(tile.tile);
      c.softmax.update(c.rS, top, logit.scale());
      if (c.softmax.grown) c.softmax.rescale(c.rO);
      c.pack_probabilities(c.rS);

      // Keeping. P of `tile` is in rP, nothing in flight.
      for (;;) {
        ++kept;
        if (tile.masked()) c.template clear_unused_values<true>(work, tile.tile);
        if (!more) {
          c.template last_output<true>();
          return kept;
        }
        tile = ahead;
        stage = start_scores();
        c.template wait_value<true>();
        c.template issue_output<true>();
        c.own_value.advance();
        skip.raise(c.softmax, logit.scale());
        more = next_early(walk, ahead);
        ptx::wgmma_wait<1>();
        c.take_scores(logit, c.rS, tile.tile, stage);
        more = next_late(walk, ahead, more);
        if (tile.masked()) mask(tile);
        if (!barrier_vote<false>(skip, top)) break;
        fetch_value(tile.tile);
        c.softmax.update(c.rS, top, logit.scale());
        c.wait_output_late(c.rS);
        if (c.softmax.grown) c.softmax.rescale(c.rO);
        c.pack_probabilities(c.rS);
      }
      if (!more) {
        c.wait_output();
        return kept;
      }
      tile = ahead;
      stage = start_scores();
      more = next_early(walk, ahead);
      c.wait_output();
      c.take_scores(logit, c.rS, tile.tile, stage);
      more = next_late(walk, ahead, more);
    }
  }
};

}  // namespace fsa::kernels::sm90

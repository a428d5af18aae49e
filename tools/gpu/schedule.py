# SPDX-License-Identifier: Apache-2.0
"""Simulates who computes which key tile of a causal backward, and when: what an order of key tiles costs.

    python3 tools/gpu/schedule.py                   the rows of the benchmark
    python3 tools/gpu/schedule.py --processors 114  of another GPU

A CTA on each processor takes units, a key tile each, in their order, and walks the row tiles that see it from top to
bottom. Times are in row tiles of one CTA: a unit takes START and END beside its own, 11 us together
(docs/performance_log_gpu_notes_backward.md), a row tile 1 +- JITTER. Deterministic: the sum of a row tile may be added
TURN after that of the unit before, and a CTA may be as far ahead of its additions as ``ahead`` says (1 where dQ is
staged in shared memory). Printed: the time of the whole call over the mean of the processors' own work.
"""

from __future__ import annotations

import argparse
import heapq
import random
from dataclasses import dataclass

START, END, JITTER, TURN = 2.5, 2.0, 0.15, 0.12
L2_BYTES = 40 << 20
BUSY = 128  # key tiles, for 132 processors

Unit = tuple[int, int]  # key head, key tile


def even_wave(heads: int, fit: int, key_tiles: int) -> int:
    """Heads of a wave where ``fit`` fit the L2, as key_heads_per_wave of the library: as many as have BUSY key tiles or
    more; of the upper half of what may be the largest that leaves the fewest out of the last wave."""
    most = max(1, min(heads, max(fit, -(-BUSY // key_tiles))))
    return min(range(most, most // 2, -1), key=lambda wave: -heads % wave)


@dataclass(frozen=True)
class Call:
    """A causal backward of ``heads`` (sequence, key head) pairs with as many keys as rows."""

    name: str
    heads: int
    seqlen: int
    head_dim: int
    group: int = 1  # query heads of a key head

    @property
    def key_tiles(self) -> int:
        return self.seqlen // (64 if self.head_dim > 128 else 128)

    @property
    def row_tiles(self) -> int:
        return self.seqlen // (64 if self.head_dim > 64 else 128)

    @property
    def fit(self) -> int:
        """Heads of which Q, dO and the sums of dQ fit the L2."""
        return max(1, min(self.heads, L2_BYTES // (self.seqlen * self.group * 8 * self.head_dim)))


def last_wave(heads: int, per_wave: int) -> int:
    """How many of the last heads may go from the first key tile to the last, as ascending_key_heads of the library:
    fewer than four wait for each other, more than half would, too."""
    return 0 if heads < 4 else min(heads // 2, max(per_wave, 4))


def default_order(call: Call, per_wave: int) -> list[Unit]:
    """Waves of heads, each from the first key tile to the last."""
    return _waves(per_wave, 0, call.heads, range(call.key_tiles))


def deterministic_order(call: Call, per_wave: int, ascending: int) -> list[Unit]:
    """Waves from the last key tile to the first, then one of the last ``ascending`` heads the other way."""
    others = call.heads - ascending
    last = [(head, tile) for tile in range(call.key_tiles) for head in range(others, call.heads)]
    return _waves(per_wave, 0, others, range(call.key_tiles - 1, -1, -1)) + last


def _waves(per_wave: int, begin: int, end: int, tiles: range) -> list[Unit]:
    units: list[Unit] = []
    for first in range(begin, end, per_wave):
        heads = range(first, min(end, first + per_wave))
        units += [(head, tile) for tile in tiles for head in heads]
    return units


def simulate(call: Call, units: list[Unit], in_turn: bool, processors: int, seed: int) -> float:
    """Time of the call over the mean of the processors' work."""
    draw = random.Random(seed).random
    ahead = 1.0 if call.head_dim <= 128 else 0.0
    added: dict[tuple[int, int], list[float]] = {}  # per query head, when each row tile was last added to
    free = [draw() / 2 for _ in range(processors)]
    heapq.heapify(free)
    work = 0.0
    for head, tile in units:
        time = heapq.heappop(free) + START
        first_row = tile * call.row_tiles // call.key_tiles
        for member in range(call.group):
            rows = added.setdefault((head, member), [-TURN] * call.row_tiles)
            for row in range(first_row, call.row_tiles):
                time += 1 + JITTER * (2 * draw() - 1)
                if in_turn:
                    rows[row] = max(time, rows[row] + TURN)
                    time = max(time, rows[row] - ahead)
        work += START + END + (call.row_tiles - first_row) * call.group
        heapq.heappush(free, time + END)
    return max(free) / (work / processors)


ROWS = [
    *(
        Call(f"d{d} {s // 1024}k", 16384 // s * 2048 // d, s, d)
        for d in (64, 128, 256)
        for s in (2048, 8192, 16384)
    ),
    Call("d128 16k, 4 heads", 4, 16384, 128),
    Call("d128 4k, 16 heads", 16, 4096, 128),
    Call("d128 8k, 4 query heads a key head", 8, 8192, 128, 4),
    Call("d128 4k, 8 query heads a key head", 16, 4096, 128, 8),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processors", type=int, default=132, help="CTAs that run together (default 132)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    titles = ("what fits", "even waves", "deterministic", "even waves", "last wave the other way")
    print("".join(f"{title:>{len(title) + 3}}" for title in (f"{'causal':33}", *titles)))
    for call in ROWS:
        fit, even = call.fit, even_wave(call.heads, call.fit, call.key_tiles)
        orders = (
            (default_order(call, fit), False),
            (default_order(call, even), False),
            (deterministic_order(call, fit, 0), True),
            (deterministic_order(call, even, 0), True),
            (deterministic_order(call, even, last_wave(call.heads, even)), True),
        )
        times = [
            simulate(call, units, in_turn, arguments.processors, arguments.seed) for units, in_turn in orders
        ]
        columns = (f"{time:{len(title) + 3}.3f}" for time, title in zip(times, titles, strict=True))
        print(f"{call.name:36}", *columns, sep="")


if __name__ == "__main__":
    main()

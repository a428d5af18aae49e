# SPDX-License-Identifier: Apache-2.0
"""Draws docs/native_sparse.svg: native sparse attention of one query, and what every query sees in each branch.

    python tools/draw_native_sparse.py

Sizes are small ones that can be drawn: 96 tokens, windows of 8 every 4, blocks of 16, top 3 (1 initial, 1 local),
window_left 12. The probabilities are made up; the rules are those of docs/native_sparse.md.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

TOKENS, WINDOW, STRIDE, BLOCK, TOP_K, LEFT = 96, 8, 4, 16, 3, 12
QUERY = 85  # the one that is drawn
OUT = Path(__file__).resolve().parent.parent / "docs" / "native_sparse.svg"
BLUE, PURPLE, GREEN, PALE, GREY = "#0072b2", "#a3428f", "#009e73", "#e9eef3", "#777777"
ENTRIES = (TOKENS - WINDOW) // STRIDE + 1
BLOCKS = TOKENS // BLOCK


def probabilities() -> np.ndarray:
    """Made up, [TOKENS, ENTRIES]; a row sums to 1 over its visible entries."""
    entry, token = np.arange(ENTRIES), np.arange(TOKENS)[:, None]
    wishes = 2.0 * np.exp(-(((entry - 9.3 - token / 40) / 1.1) ** 2)) + 1.2 * np.exp(
        -(((entry - 4) / 1.4) ** 2)
    )
    exponent = np.exp(2.0 * wishes + 0.7 * np.sin(1.7 * entry + 0.02 * token))
    visible = token >= entry * STRIDE + WINDOW - 1
    weights = exponent * visible
    return weights / np.maximum(weights.sum(1, keepdims=True), 1e-30)


def block_scores(rows: np.ndarray) -> np.ndarray:
    """[..., ENTRIES] -> [..., BLOCKS]: probability times the strides of the window that lie in the block."""
    scores = np.zeros((*rows.shape[:-1], BLOCKS))
    for entry in range(ENTRIES):
        for part in range(WINDOW // STRIDE):
            scores[..., (entry + part) * STRIDE // BLOCK] += rows[..., entry]
    return scores


def select(scores: np.ndarray, token: int) -> list[int]:
    own = token // BLOCK
    forced = {0, own}
    others = sorted(set(range(own)) - forced, key=lambda block: (-scores[block], block))
    return sorted(forced | set(others[: max(0, TOP_K - len(forced))]))


def strip(axes: Axes, title: str) -> None:
    axes.set(xlim=(-0.5, TOKENS + 0.5), yticks=[], xticks=[])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(title, loc="left", fontsize=9)


def draw_one_query(axes: list[Axes]) -> None:
    row = probabilities()[QUERY]
    scores = block_scores(row)
    blocks = select(scores, QUERY)

    windows, bars, scored, chosen, sliding = axes
    strip(windows, f"compression: entry i stands for tokens {STRIDE}i … {STRIDE}i + {WINDOW - 1}; query {QUERY} sees "
          f"the entries that end at or before it")  # fmt: skip
    windows.set_ylim(-0.2, 2.1)
    for entry in range(ENTRIES):
        visible = entry * STRIDE + WINDOW - 1 <= QUERY
        windows.add_patch(
            Rectangle(
                (entry * STRIDE + 0.25, entry % 2),
                WINDOW - 0.5,
                0.8,
                facecolor=BLUE if visible else PALE,
                alpha=0.75 if visible else 1,
            )
        )
    strip(bars, "probability of each entry (summed over the query heads of the group)")
    centre = np.arange(ENTRIES) * STRIDE + WINDOW / 2
    bars.bar(centre, row, width=3, color=BLUE)

    strip(scored, "score of each block: probabilities times the strides inside the block, here 1, 2, 2, 2, 1")
    highest = scores.max()
    scored.set_ylim(0, 1.45 * highest)
    for block in range(BLOCKS):
        forced = block in (0, QUERY // BLOCK)
        if block > QUERY // BLOCK:
            continue
        scored.add_patch(
            Rectangle(
                (block * BLOCK + 0.5, 0),
                BLOCK - 1,
                scores[block],
                facecolor=GREY if forced else PURPLE,
                alpha=0.7,
            )
        )
        label = f"{scores[block]:.2f}" + (", forced" if forced else "")
        scored.text(block * BLOCK + BLOCK / 2, scores[block] + 0.06 * highest, label, ha="center", fontsize=8)

    strip(
        chosen,
        f"selected branch: the tokens of the top {TOP_K} blocks, the first and the query's own among them",
    )
    strip(sliding, f"sliding branch: the query and {LEFT} tokens before it")
    for token in range(TOKENS):
        seen = token // BLOCK in blocks and token <= QUERY
        chosen.add_patch(Rectangle((token + 0.1, 0), 0.8, 1, facecolor=PURPLE if seen else PALE))
        near = QUERY - LEFT <= token <= QUERY
        sliding.add_patch(Rectangle((token + 0.1, 0), 0.8, 1, facecolor=GREEN if near else PALE))
    for one in axes:
        one.axvline(QUERY + 0.5, color="#cc0000", linewidth=1, linestyle=":")
        for block in range(BLOCKS + 1):
            one.axvline(block * BLOCK, color="#bbbbbb", linewidth=0.6, zorder=0)
    sliding.set_xticks(range(0, TOKENS + 1, BLOCK))
    sliding.set_xlabel("token", fontsize=9)
    sliding.tick_params(labelsize=8)


def draw_masks(axes: list[Axes]) -> None:
    token, key = np.arange(TOKENS)[:, None], np.arange(TOKENS)
    compressed = token >= np.arange(ENTRIES) * STRIDE + WINDOW - 1
    rows = block_scores(probabilities())
    selected = np.zeros((TOKENS, TOKENS), dtype=bool)
    for query in range(TOKENS):
        for block in select(rows[query], query):
            selected[query, block * BLOCK : (block + 1) * BLOCK] = True
    selected &= key <= token
    sliding = (key <= token) & (key >= token - LEFT)
    for one, mask, color, title, label in (
        (axes[0], compressed, BLUE, "compressed", "entry"),
        (axes[1], selected, PURPLE, "selected", "token"),
        (axes[2], sliding, GREEN, "sliding", "token"),
    ):
        one.imshow(
            mask,
            cmap=ListedColormap([PALE, color]),
            aspect="auto",
            interpolation="nearest",
            extent=(0, mask.shape[1], TOKENS, 0),
        )
        one.axhline(QUERY + 0.5, color="#cc0000", linewidth=1, linestyle=":")
        one.set_title(title, fontsize=9)
        one.set_xlabel(label, fontsize=9)
        one.tick_params(labelsize=8)
    axes[0].set_ylabel("query", fontsize=9)


def main() -> None:
    plt.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "native_sparse", "font.family": "sans-serif"}
    )
    figure = plt.figure(figsize=(9, 9.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.35, 1))
    draw_one_query(list(above.subplots(5, 1, height_ratios=(1, 1, 1, 0.4, 0.4))))
    draw_masks(list(below.subplots(1, 3)))
    figure.savefig(OUT, metadata={"Date": None})
    print(OUT)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The pictures of the report, each an SVG string."""

from __future__ import annotations

import io

import matplotlib
import torch

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap, ListedColormap  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

COLORS = {
    "torch": "#8a8a8a",
    "dense": "#0072b2",
    "threshold": "#d55e00",
    "gated": "#009e73",
    "nsa": "#a3428f",
}
LINES = {"torch": "-", "dense": "-", "threshold": (0, (5, 2)), "gated": (0, (1.5, 1.5)), "nsa": "-"}
MARKERS = {"torch": "o", "dense": "o", "threshold": "x", "gated": "+", "nsa": "s"}
HIGHEST_LOSS = 6.0  # nats; a uniform guess has 5.5, the first steps are worse
WIDTH = 8.4  # inches; the page's column
plt.rcParams.update(
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
        "axes.edgecolor": "#777777",
        "legend.frameon": False,
        "svg.hashsalt": "byte_lm",
    }
)


def to_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()


def smoothed(values: list[float], window: int = 20) -> list[float]:
    """Mean over the last `window` values."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def loss_curves(runs: dict[str, dict]) -> str:
    """runs: name -> {"losses": per step, "curve": [{"step", "loss"}]}."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.8))
    for name, run in runs.items():
        values = smoothed(run["losses"])
        # torch lies under dense, which hides it where they agree.
        wide = name == "torch"
        axes.plot(
            range(1, len(values) + 1),
            values,
            color=COLORS[name],
            linestyle=LINES[name],
            linewidth=5 if wide else 1.6,
            alpha=0.45 if wide else 1,
            label=name,
            zorder=1 if wide else 2,
        )
        steps = [point["step"] for point in run["curve"]]
        losses = [point["loss"] for point in run["curve"]]
        axes.plot(
            steps, losses, MARKERS[name], color=COLORS[name], markersize=5 if name == "dense" else 9, zorder=3
        )
    axes.set(
        xlabel="step",
        ylabel="nats per byte",
        title="lines: training loss (mean of 20 steps); marks: held-out loss",
    )
    axes.set_ylim(top=min(axes.get_ylim()[1], HIGHEST_LOSS))
    axes.legend()
    return to_svg(figure)


def loss_difference(torch_losses: list[float], dense_losses: list[float], steps: int, limit: float) -> str:
    """|dense - torch| per step on a logarithmic scale; the first `steps` must stay under `limit`."""
    figure, axes = plt.subplots(figsize=(WIDTH, 2.8))
    floor = 1e-8  # below what float32 losses can show; zeros are drawn there
    differences = [max(abs(d - t), floor) for t, d in zip(torch_losses, dense_losses, strict=True)]
    axes.semilogy(range(1, len(differences) + 1), differences, ".", color=COLORS["dense"], markersize=3)
    axes.hlines(limit, 0.5, steps + 0.5, color="#cc0000", linewidth=2)
    axes.annotate(
        f"limit {limit:g}\nfor {steps} steps", (steps + 1, limit), va="center", color="#cc0000", fontsize=9
    )
    axes.set(xlabel="step", ylabel="nats per byte", title="|training loss of dense − training loss of torch|")
    axes.set_ylim(floor / 2, max(10 * limit, 2 * max(differences)))
    return to_svg(figure)


def quality_and_work(rows: list[dict], dense_loss: float, trained: list[dict]) -> str:
    """rows: {"threshold", "held_out", "kept"} of the sweep; trained: {"name", "held_out", "kept"} of the
    kinds that were trained sparse."""
    figure, axes = plt.subplots(figsize=(WIDTH, 4.0))
    axes.axhline(dense_loss, color=COLORS["dense"], linewidth=1.2, linestyle="--")
    kept = [100 * row["kept"] for row in rows]
    losses = [row["held_out"] for row in rows]
    axes.plot(
        kept, losses, "o-", color=COLORS["dense"], markersize=4, label="dense-trained model under thresholds"
    )
    labelled = -float("inf")
    for index in reversed(range(len(rows))):
        row = rows[index]
        if kept[index] - labelled < 6:
            continue  # labels would overlap
        labelled = kept[index]
        axes.annotate(
            f"τ={row['threshold']:g}",
            (kept[index], losses[index]),
            xytext=(0, -15),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color="#555555",
        )
    for point in trained:
        axes.plot(
            100 * point["kept"],
            point["held_out"],
            "D",
            color=COLORS[point["name"]],
            markersize=8,
            label=f"trained with {point['name']}",
        )
    axes.axvspan(0, 50, color="#0072b2", alpha=0.06, linewidth=0)
    # At least two percent from edge to edge, so that a flat line looks flat.
    everything = losses + [dense_loss] + [point["held_out"] for point in trained]
    middle = (max(everything) + min(everything)) / 2
    half = max(0.7 * (max(everything) - min(everything)), 0.02 * dense_loss)
    axes.set_ylim(middle - half, middle + half)
    axes.set_xlim(100, 0)
    axes.annotate("dense", (99, dense_loss), xytext=(0, 4), textcoords="offset points", color=COLORS["dense"])
    axes.set(
        xlabel="kept tiles, % of the visible ones (less work to the right)",
        ylabel="held-out loss, nats per byte",
        title="quality against work",
    )
    axes.legend(loc="upper right" if losses[-1] <= middle else "lower left", fontsize=9)
    return to_svg(figure)


def bars(axes: Axes, names: list[str], values: list[float], colors: list[str], unit: str) -> None:
    places = range(len(names))
    axes.barh(places, values, color=colors, height=0.62)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.18 * max(values))
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            f"{value:.0f}" if value >= 10 else f"{value:.1f}",
            (value, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_xlabel(unit)


def step_times(steps: dict[str, float], attention: list[dict]) -> str:
    """steps: kind -> ms per training step; attention: {"label", "kind", "forward_ms", "backward_ms"}."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 0.42 * max(len(attention), len(steps)) + 1.2))
    bars(left, list(steps), list(steps.values()), [COLORS[name] for name in steps], "ms per step")
    left.set_title("whole training step")
    labels = [row["label"] for row in attention]
    totals = [row["forward_ms"] + row["backward_ms"] for row in attention]
    colors = [COLORS[row["kind"]] for row in attention]
    bars(right, labels, totals, colors, "ms, forward (dark) and backward, all layers")
    right.barh(
        range(len(labels)), [row["forward_ms"] for row in attention], color="black", alpha=0.3, height=0.62
    )
    right.set_title("attention alone")
    figure.tight_layout()
    return to_svg(figure)


def kept_heat_map(kept_by_head: list[list[float]], title: str) -> str:
    """Kept fraction of every layer (rows) and head (columns)."""
    layers, heads = len(kept_by_head), len(kept_by_head[0])
    figure, axes = plt.subplots(figsize=(0.42 * WIDTH, 0.36 * layers + 1.0))
    axes.imshow(kept_by_head, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for layer, row in enumerate(kept_by_head):
        for head, kept in enumerate(row):
            axes.text(
                head,
                layer,
                f"{100 * kept:.0f} %",
                ha="center",
                va="center",
                color="white" if kept > 0.6 else "black",
                fontsize=9,
            )
    axes.grid(visible=False)
    axes.set_xticks(range(heads), [f"head {head}" for head in range(heads)])
    axes.set_yticks(range(layers), [f"layer {layer}" for layer in range(layers)])
    axes.set_title(title, fontsize=10)
    return to_svg(figure)


def skip_maps(tiles: list, title: str) -> str:
    """tiles: per layer, bool [num_heads, row_tiles, key_tiles]; one small picture per layer and head."""
    layers, heads = len(tiles), tiles[0].shape[0]
    figure, grid = plt.subplots(
        layers, heads, figsize=(0.56 * WIDTH, 0.56 * WIDTH * layers / heads), squeeze=False
    )
    colors = ListedColormap(["#ffffff", "#d9e6f0", "#d55e00"])  # beyond the diagonal, skipped, kept
    row_tiles, key_tiles = tiles[0].shape[1:]
    keys_per_row = key_tiles / row_tiles
    for layer in range(layers):
        for head in range(heads):
            axes, picture = grid[layer][head], tiles[layer][head].float() + 1
            for row in range(row_tiles):
                for column in range(key_tiles):
                    if column >= (row + 1) * keys_per_row and not tiles[layer][head][row, column]:
                        picture[row, column] = 0
            axes.imshow(
                picture,
                cmap=colors,
                vmin=0,
                vmax=2,
                aspect=keys_per_row,
                interpolation="nearest",
                rasterized=False,
            )
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
            if head == 0:
                axes.set_ylabel(f"layer {layer}", fontsize=8)
            if layer == 0:
                axes.set_title(f"head {head}", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return to_svg(figure)


def selected_blocks(tables: list, block_size: int, title: str, strip: int = 16) -> str:
    """tables: per layer, bool [num_kv_heads, seqlen, blocks]; one small picture per layer and key head, in which
    a dot is the share of `strip` neighbouring queries that select a block."""
    layers, heads = len(tables), tables[0].shape[0]
    figure, grid = plt.subplots(
        heads, layers, figsize=(WIDTH, 1.06 * WIDTH * heads / layers), squeeze=False, layout="constrained"
    )
    colors = LinearSegmentedColormap.from_list("chosen", ["#e9eef3", COLORS["nsa"]])
    colors.set_bad("#ffffff")  # beyond the diagonal
    for layer in range(layers):
        for head in range(heads):
            axes, table = grid[head][layer], tables[layer][head].float()
            seqlen, blocks = table.shape
            shares = torch.stack([queries.mean(0) for queries in table.split(strip)])
            last = (torch.arange(len(shares)) + 1) * strip - 1  # query of each strip
            shares[torch.arange(blocks) * block_size > last[:, None]] = torch.nan
            axes.imshow(
                shares,
                cmap=colors,
                vmin=0,
                vmax=1,
                aspect="auto",
                interpolation="nearest",
                extent=(0, blocks, seqlen, 0),
            )
            axes.grid(visible=False)
            axes.tick_params(labelsize=7)
            if layer > 0:
                axes.set_yticklabels([])
            if head < heads - 1:
                axes.set_xticklabels([])
            axes.set_title(f"layer {layer}, key head {head}", fontsize=8)
    figure.supxlabel("block of keys", fontsize=9)
    figure.supylabel("query", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return to_svg(figure)

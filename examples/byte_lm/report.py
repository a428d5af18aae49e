# SPDX-License-Identifier: Apache-2.0
"""The page runs/<name>/index.html and the table on the terminal, both from the numbers of metrics.json.

No sentence claims what a number could contradict: where wording depends on a result, the result chooses it.
"""

from __future__ import annotations

from .checks import relative
from .page_parts import STYLE, escape, listed, paragraph, percent, picture, readable, small, table

STATUS_CLASS = {"PASS": "ok", "FAIL": "bad", "NOT RUN": "none"}
FLAT = 0.001  # relative; loss changes below it are called small
PROMPT_SHOWN = 320  # bytes


def half_row(metrics: dict) -> int | None:
    """Index of the first row of the sweep that keeps half of the tiles or fewer."""
    limit = metrics["limits"]["enough_kept"]
    return next((index for index, row in enumerate(metrics["sweep"]["rows"]) if row["kept"] <= limit), None)


def verdict(metrics: dict) -> tuple[str, str]:
    """(style, sentence)"""
    names: dict[str, list[str]] = {status: [] for status in STATUS_CLASS}
    for check in metrics["checks"]:
        names[check["status"]].append(check["name"])
    if names["FAIL"]:
        return "fail", "FAIL: " + "; ".join(names["FAIL"])
    if names["NOT RUN"]:
        return "partly", f"{len(names['PASS'])} checks passed, {len(names['NOT RUN'])} could not be run"
    return "pass", f"All {len(names['PASS'])} checks passed"


def summary_words(metrics: dict) -> str:
    kinds, sweep = metrics["kinds"], metrics["sweep"]
    losses = {name: kind["held_out"] for name, kind in kinds.items()}
    best, worst = min(losses.values()), max(losses.values())
    if len(losses) > 1:
        words = (
            f"Trained with {listed(list(losses))} attention, the same model ends between {best:.3f} and "
            f"{worst:.3f} nats per byte on text that it has not seen ({worst / best - 1:.1%} apart)."
        )
    else:
        words = f"Trained with {next(iter(losses))} attention, the model ends at {best:.3f} nats per byte on "
        words += "text that it has not seen."
    sparse = [f"{name} {percent(kind['kept'])}" for name, kind in kinds.items() if kind["kept"] is not None]
    if sparse:
        words += f" Tiles computed, of those that the causal mask leaves visible: {listed(sparse)}."
    index = half_row(metrics)
    if index is not None:
        row = sweep["rows"][index]
        words += (
            f" The {sweep['trained_with']}-trained model, evaluated with threshold {row['threshold']:g}, "
            f"keeps {percent(row['kept'])} of the tiles and has a held-out loss of {row['held_out']:.4f} "
            f"({relative(row['held_out'], sweep['dense_held_out'])} against nothing skipped)."
        )
    return words


def kinds_table(metrics: dict, colors: dict[str, str]) -> str:
    rows = []
    for name, kind in metrics["kinds"].items():
        ratio = kind["time_relative_to_torch"]
        cells = [
            f'<span class=swatch style="background:{colors[name]}"></span>{name}',
            f"{kind['train_loss']:.3f}",
            f"{kind['held_out']:.4f}",
            f"{kind['bits_per_byte']:.3f}",
            percent(kind["kept"]) if kind["computed"] is None else percent(kind["computed"]) + " *",
            f"{kind['ms_per_step']:.0f}",
            f"{kind['tokens_per_second']:,.0f}",
            "–" if ratio is None else f"{ratio:.2f}×",
        ]
        rows.append(cells)
    header = (
        "attention, training loss, held-out loss, bits per byte, kept tiles, ms per step, tokens/s, / torch"
    )
    words = (
        "Loss: cross-entropy in nats per byte, lower is better; a uniform guess has 5.545. Training loss: "
        "mean of the last 20 steps. Kept tiles: of those visible under the causal mask, over all layers, "
        "heads and held-out windows. / torch: time of a step against the same step with torch's attention."
    )
    if metrics["nsa"] is not None:
        words += (
            " * nsa skips no tiles: given are the pairs of a query and a key or compressed key in its three "
            "branches, of those that the causal mask leaves visible, on one held-out window."
        )
    return table(header.split(", "), rows) + small(words)


def checks_section(metrics: dict) -> list[str]:
    rows = [
        [
            f"<span class={STATUS_CLASS[c['status']]}>{c['status']}</span>",
            escape(c["name"]),
            escape(c["detail"]),
        ]
        for c in metrics["checks"]
    ]
    return ["<h2>Checks</h2>", table(["", "claim", "measured"], rows, text_columns=3)]


def training_section(metrics: dict) -> list[str]:
    model, text, options = metrics["model"], metrics["text"], metrics["options"]
    config = model["config"]
    rows = [
        [name, f"<code>{escape(kind['attention'])}</code>", escape(f"{kind['backend']}: {kind['kernel']}")]
        for name, kind in metrics["kinds"].items()
    ]
    return [
        "<h2>What was trained</h2>",
        paragraph(
            "A Llama-style transformer over bytes (RMSNorm, rotary positions, SwiGLU, grouped-query "
            f"attention) with {model['parameters']:,} parameters: {config['layers']} layers of width "
            f"{config['dim']}, {config['num_heads']} query heads and {config['num_kv_heads']} key heads of "
            f"{config['head_dim']}. Weights are float32, attention computes in {model['attention_dtype']}. Most "
            "heads start out looking a few bytes back, which spares them the search; from there everything is "
            "learned."
        ),
        paragraph(
            f"Text: {escape(text['description'])}: {text['train_bytes'] / 1e6:.1f} MB from "
            f"{text['train_files']} files to train on, {text['held_out_bytes'] / 1e6:.1f} MB from "
            f"{text['held_out_files']} files held out. Each kind took {options['steps']} steps of "
            f"{options['context']} bytes (AdamW, warm-up and cosine, seed {options['seed']}). Held-out "
            f"loss is the mean over {text['windows']} windows of {options['context']} bytes."
        ),
        table(["kind", "call", "computed by"], rows, text_columns=3),
    ]


def learning_section(metrics: dict, pictures: dict[str, str]) -> list[str]:
    words = (
        "Every kind starts from the same weights and sees the same bytes in the same order, so the curves "
        "can be compared step by step; common jumps are easier and harder files."
    )
    if "difference" in pictures:
        first, final = metrics["checks"][0], metrics["checks"][1]
        words += (
            " The wide grey line is torch's own attention, the blue one this library's dense attention. "
            f"Beginning: {escape(first['detail'])} (<b>{first['status']}</b>). "
            f"End: {escape(final['detail'])} (<b>{final['status']}</b>). "
            "In between, differences of rounding may grow, as between any two implementations."
        )
    parts = ["<h2>Learning</h2>", paragraph(words), picture(pictures["loss"], "loss curves")]
    if "difference" in pictures:
        parts.append(picture(pictures["difference"], "difference of the training losses of dense and torch"))
    return parts


def sweep_words(metrics: dict) -> str:
    sweep, tile = metrics["sweep"], metrics["skip_tile"]
    dense, rows = sweep["dense_held_out"], sweep["rows"]
    words = (
        f"The {sweep['trained_with']}-trained model, unchanged, is evaluated with a threshold τ: a tile of "
        f"{tile[0]} queries × {tile[1]} keys is skipped when none of its probabilities can reach τ times "
        "the uniform one (1 / number of visible keys). Further right in the plot less is computed."
    )
    index = half_row(metrics)
    if index is None:
        words += " No threshold of the range brought the kept tiles down to half."
    else:
        row = rows[index]
        words += (
            f" At τ = {row['threshold']:g}, {percent(row['kept'])} of the tiles are kept and the held-out "
            f"loss is {row['held_out']:.4f}: {relative(row['held_out'], dense)} against {dense:.4f} with "
            "nothing skipped."
        )
    change = max(abs(row["held_out"] / dense - 1) for row in rows)
    words += (
        f" The largest threshold, {rows[-1]['threshold']:g}, keeps {percent(rows[-1]['kept'])} at "
        f"{rows[-1]['held_out']:.4f}. Over the whole range the loss moves by at most {change:.3%}"
    )
    if change < FLAT:
        words += (
            ": the tiles that this model lets go hold next to none of its attention. It is small and was "
            "trained for minutes; how much a large model loses at such thresholds, this run cannot say"
        )
    words += "."
    for name, kind in metrics["kinds"].items():
        if kind["kept"] is not None:
            words += (
                f" The model trained with {name} keeps {percent(kind['kept'])} at {kind['held_out']:.4f}; "
                f"the same weights with nothing skipped have {kind['held_out_without_skipping']:.4f}."
            )
    return paragraph(words)


def sweep_table(metrics: dict) -> str:
    sweep = metrics["sweep"]
    dense = sweep["dense_held_out"]
    rows = [
        ["0 (nothing skipped)", f"{dense:.4f}", "", percent(1.0), *(f"{ms:.1f}" for ms in sweep["dense_ms"])]
    ]
    for row in sweep["rows"]:
        loss, times = row["held_out"], (row["forward_ms"], row["backward_ms"])
        cells = [f"{row['threshold']:g}", f"{loss:.4f}", relative(loss, dense), percent(row["kept"])]
        rows.append(cells + [f"{ms:.1f}" for ms in times])
    header = ["threshold τ", "held-out loss", "change", "kept tiles", "forward ms", "backward ms"]
    index = half_row(metrics)
    return table(header, rows, marked=None if index is None else index + 1) + small(
        "The marked row is the first that keeps half or less. Times: attention alone, all layers, one window."
    )


def quality_section(metrics: dict, pictures: dict[str, str]) -> list[str]:
    def pair(tiles: str, heads: str) -> str:
        left, right = (
            picture(pictures[tiles], "kept tiles"),
            picture(pictures[heads], "kept fraction by head"),
        )
        return f"<div class=pair>{left}{right}</div>"

    parts = [
        "<h2>Quality against work</h2>",
        sweep_words(metrics),
        picture(pictures["quality"], "held-out loss against kept tiles"),
        sweep_table(metrics),
        paragraph(
            "Where the tiles are: each small square is one head over one held-out window, queries "
            "downwards, keys to the right; orange tiles were kept, pale blue ones skipped, white lies "
            "beyond the diagonal. The numbers beside it are means over all held-out windows."
        ),
        pair("tiles", "heads"),
    ]
    if "gated_heads" in pictures:
        parts += [
            paragraph(
                "The model that was trained with gates drops tiles by its gates alone, whatever the keys say:"
            ),
            pair("gated_tiles", "gated_heads"),
        ]
    return parts


def gates_table(metrics: dict) -> str:
    rows = [
        [f"layer {layer}", *(f"{gate:.2f}" for gate in gates)]
        for layer, gates in enumerate(metrics["nsa"]["gates"])
    ]
    return table(["mean gate", "compressed", "selected", "sliding"], rows)


def nsa_steps_table(metrics: dict) -> str:
    rows = [
        [
            f"{row['context']:,} bytes",
            f"{row['ms']['dense']:,.0f}",
            f"{row['ms']['nsa']:,.0f}",
            f"{row['ms']['dense'] / row['ms']['nsa']:.2f}×",
        ]
        for row in metrics["steps"]
    ]
    return table(["context", "dense, ms per step", "nsa, ms per step", "dense / nsa"], rows)


def voted_text(metrics: dict) -> str:
    """The text of the window, every block shaded by how many heads select it for the last byte."""
    nsa = metrics["nsa"]
    text, size = bytes.fromhex(nsa["text_hex"]), nsa["sizes"]["block_size"]
    parts = []
    for number, votes in enumerate(nsa["votes"]):
        share = votes / nsa["voters"]
        # One span per block: a character cut by its border shows as a mark of its own.
        title = f"block {number}: {votes} of {nsa['voters']}"
        parts.append(
            f'<span title="{title}" style="background:rgba(163,66,143,{0.6 * share:.2f})">'
            f"{readable(text[number * size : (number + 1) * size])}</span>"
        )
    return f"<pre>{''.join(parts)}</pre>"


def plan_words(metrics: dict) -> str:
    """How the selected branch was computed, and the times that led to it where the profiler took any."""
    words = []
    for direction, plan in metrics["nsa"]["plan"].items():
        text = f"{direction} by <code>{escape(plan['kernel'])}</code> (chosen by {escape(plan['source'])}"
        if plan["times_ms"]:
            times = sorted(plan["times_ms"].items(), key=lambda item: item[1])
            text += ": " + ", ".join(f"{escape(name)} {ms:.3g} ms" for name, ms in times)
        words.append(text + ")")
    return f"The selected branch ran {listed(words)}."


def nsa_section(metrics: dict, pictures: dict[str, str]) -> list[str]:
    nsa, kinds = metrics["nsa"], metrics["kinds"]
    if nsa is None:
        return []
    sizes, losses = nsa["sizes"], {name: kinds[name]["held_out"] for name in ("dense", "nsa")}
    words = (
        "Native sparse attention is a gated sum of three: over tokens that each stand for a window of "
        f"{sizes['compress_block']} bytes, one per {sizes['compress_stride']}; over the {sizes['top_k']} blocks "
        f"of {sizes['block_size']} bytes in which those score best, the first {sizes['init_blocks']} and the last "
        f"{sizes['local_blocks']} always among them; and over the last {sizes['window_left'] + 1} bytes. It "
        "starts from dense's weights; how to compress and how far to open each gate it learns besides, in "
        f"{nsa['parameters'] - metrics['model']['parameters']:,} further parameters. "
        f"It ends at {losses['nsa']:.4f} nats per byte, dense at {losses['dense']:.4f} "
        f"({relative(losses['nsa'], losses['dense'])})."
    )
    parts = ["<h2>Native sparse attention beside dense</h2>", paragraph(words)]
    if metrics["steps"]:
        parts += [
            paragraph(
                "A training step of the whole model with either, forward, backward and update, taking turns. "
                "The pairs of dense attention grow with the square of the context; those of the selected and "
                "the sliding branch with the context, those of the compressed branch with its square divided "
                f"by {sizes['compress_stride']}."
            ),
            nsa_steps_table(metrics),
            small(plan_words(metrics)),
        ]
    parts += [
        paragraph(
            f"Which blocks the heads select along one held-out text of {metrics['options']['context']} bytes: "
            "queries downwards, blocks to the right; the darker a dot, the more of 16 neighbouring queries "
            "select the block. The first column and the diagonal are forced, the rest is each head's choice; "
            "all query heads of a key head share it."
        ),
        picture(pictures["selected"], "selected blocks of every layer and key head"),
        paragraph(
            "The same text as the model reads it: the darker a block, the more of the "
            f"{nsa['voters']} key heads of all layers select it for the last byte."
        ),
        voted_text(metrics),
        paragraph("How far the gates of the three branches are open, mean over queries and heads:"),
        gates_table(metrics),
    ]
    return parts


def time_section(metrics: dict, pictures: dict[str, str]) -> list[str]:
    kinds = metrics["kinds"]
    words = (
        "A training step is forward, backward and update of the whole model. Attention alone is measured "
        "on the queries, keys and values of a held-out window in all layers, the kinds taking turns."
    )
    if "torch" in kinds and len(kinds) > 1:
        others = {name: kind for name, kind in kinds.items() if name != "torch"}
        ratios = [f"{name} {kind['time_relative_to_torch']:.2f}×" for name, kind in others.items()]
        words += f" Median time of a step against torch's attention (below 1 is faster): {listed(ratios)}."
    parts = ["<h2>Time</h2>", paragraph(words), picture(pictures["time"], "times of steps and of attention")]
    if metrics["steps"]:
        parts += [
            paragraph("Whole training steps of the same models at longer contexts:"),
            steps_table(metrics),
        ]
    return parts


def steps_table(metrics: dict) -> str:
    """Against the first kind of the table, which is torch where it was trained."""
    first = next(iter(metrics["steps"][0]["ms"]))
    rows = [
        [
            f"{row['context']:,} bytes",
            name,
            f"{ms:,.1f}",
            f"{row['context'] / ms * 1e3:,.0f}",
            f"{ms / row['ms'][first]:.2f}×",
        ]
        for row in metrics["steps"]
        for name, ms in row["ms"].items()
    ]
    return table(["context", "attention", "ms per step", "tokens/s", f"/ {first}"], rows, text_columns=2)


def sample_section(metrics: dict) -> list[str]:
    samples = metrics["samples"]
    shown = samples[0]
    check = shown["check"]
    words = (
        f"Greedy text of the {shown['trained_with']}-trained model: after the grey end of a held-out "
        f"prompt of {shown['prompt_bytes']} bytes it chose the {shown['tokens']} blue bytes one at a time "
        f"through <code>{shown['function']}</code> over a cache of keys and values, on the CPU. Greedy text of a small "
        "model soon repeats itself; what counts here is that one prefill over the whole text chooses the "
        f"same bytes: {check['equal']} of {check['tokens']} are equal."
    )
    prompt, made = (bytes.fromhex(shown[key]) for key in ("prompt_hex", "generated_hex"))
    rows = []
    for sample in samples:
        check = sample["check"]
        equal = (
            f"{check['equal']} of {check['tokens']}"
            if check
            else f"{sample['shared']} of {sample['tokens']} *"
        )
        error = f"{check['logit_error']:.1g}" if check else "–"
        function = f"<code>{sample['function']}</code>"
        speed = f"{sample['tokens_per_second']:,.0f}"
        rows.append([sample["trained_with"], function, sample["setting"], speed, equal, error])
    header = ["trained with", "decode function", "setting", "tokens/s", "same tokens", "logit difference"]
    parts = [
        "<h2>Text from the decode path</h2>",
        paragraph(words),
        f"<pre><span class=prompt>{readable(prompt[-PROMPT_SHOWN:])}</span>"
        f"<span class=made>{readable(made)}</span></pre>",
        table(header, rows, text_columns=3),
    ]
    if any(sample["check"] is None for sample in samples):
        parts.append(
            small(
                "* With a threshold on, decode decides for one query at a time and prefill for 64, so "
                "they need not choose alike; given is how many leading tokens agree with the same model's "
                "when nothing is skipped."
            )
        )
    return parts


def page(metrics: dict, pictures: dict[str, str], colors: dict[str, str]) -> str:
    """metrics as in metrics.json; pictures: name -> SVG (absent where a run cannot show it)."""
    style, sentence = verdict(metrics)
    versions = metrics["versions"]
    about = [
        metrics["name"],
        f"flash_sparse_attention {versions['library']}",
        metrics["created"],
        metrics["device"],
        f"{metrics['seconds']:.0f} s",
        f"{metrics['peak_memory_mib']:,.0f} MiB",
    ]
    weights = ", ".join(f"<code>{escape(name)}</code>" for name in metrics["weights"])
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{escape(metrics['name'])}: a byte language model and its attention</title>",
        f"<style>{STYLE}</style></head><body>",
        "<h1>A small language model, trained with each kind of attention</h1>",
        f"<p class=lead>{escape(' · '.join(about))}</p>",
        f"<div class='verdict {style}'>{escape(sentence)}</div>",
        paragraph(escape(summary_words(metrics))),
        kinds_table(metrics, colors),
        *checks_section(metrics),
        *training_section(metrics),
        *learning_section(metrics, pictures),
        *quality_section(metrics, pictures),
        *nsa_section(metrics, pictures),
        *time_section(metrics, pictures),
        *sample_section(metrics),
        "<h2>This run</h2>",
        paragraph(f"<code>{escape(metrics['command'])}</code>"),
        small(
            f"torch {escape(versions['torch'])}, Python {escape(versions['python'])}, torch threads: "
            f"{metrics['threads']}. All numbers: <code>metrics.json</code>; weights: {weights}."
        ),
        "</body></html>",
    ]
    return "\n".join(parts)


def terminal_table(metrics: dict) -> str:
    """The same numbers for the terminal."""
    header = f"{'attention':<11}{'held-out':>9}{'bits/byte':>11}{'kept':>8}{'ms/step':>9}{'tokens/s':>10}"
    lines = ["", f"{header}{'/ torch':>9}"]
    for name, kind in metrics["kinds"].items():
        ratio = kind["time_relative_to_torch"]
        lines.append(
            f"{name:<11}{kind['held_out']:>9.4f}{kind['bits_per_byte']:>11.3f}"
            f"{percent(kind['kept'] if kind['computed'] is None else kind['computed']):>8}"
            f"{kind['ms_per_step']:>9.0f}{kind['tokens_per_second']:>10,.0f}"
            f"{'–' if ratio is None else f'{ratio:.2f}×':>9}"
        )
    sweep = metrics["sweep"]
    lines += ["", f"the {sweep['trained_with']}-trained model under a threshold τ"]
    lines += [
        f"{'τ':>6}{'held-out':>11}{'kept':>8}",
        f"{0:>6}{sweep['dense_held_out']:>11.4f}{percent(1.0):>8}",
    ]
    for row in sweep["rows"]:
        lines.append(f"{row['threshold']:>6g}{row['held_out']:>11.4f}{percent(row['kept']):>8}")
    if metrics["steps"]:
        lines += [
            "",
            "a training step at other contexts",
            f"{'bytes':>6} {'attention':<11}{'ms':>9}{'tokens/s':>12}",
        ]
        for row in metrics["steps"]:
            for name, ms in row["ms"].items():
                lines.append(f"{row['context']:>6} {name:<11}{ms:>9.1f}{row['context'] / ms * 1e3:>12,.0f}")
    lines.append("")
    lines += [f"{check['status']:<8} {check['name']}: {check['detail']}" for check in metrics["checks"]]
    lines += ["", f"{metrics['seconds']:.0f} s, {metrics['peak_memory_mib']:,.0f} MiB, {metrics['device']}"]
    return "\n".join(lines)

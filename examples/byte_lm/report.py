# SPDX-License-Identifier: Apache-2.0
"""The page runs/<name>/index.html and the table on the terminal, both from the numbers of metrics.json."""

from __future__ import annotations

from .checks import relative
from .page_parts import STYLE, escape, listed, percent, picture, readable, table

STATUS_CLASS = {"PASS": "ok", "FAIL": "bad", "NOT RUN": "none"}


def half_row(sweep: list[dict], limit: float) -> int | None:
    """The first row of the sweep that keeps at most `limit`."""
    return next((index for index, row in enumerate(sweep) if row["kept"] <= limit), None)


def verdict(metrics: dict) -> tuple[str, str]:
    """(class, sentence)"""
    by_status = {
        status: [check for check in metrics["checks"] if check["status"] == status] for status in STATUS_CLASS
    }
    if by_status["FAIL"]:
        return "fail", "FAIL: " + "; ".join(check["name"] for check in by_status["FAIL"])
    if by_status["NOT RUN"]:
        return (
            "partly",
            f"{len(by_status['PASS'])} checks passed, {len(by_status['NOT RUN'])} could not be run",
        )
    return "pass", f"All {len(by_status['PASS'])} checks passed"


def summary_words(metrics: dict) -> str:
    kinds, sweep = metrics["kinds"], metrics["sweep"]
    sentences = []
    losses = {name: kind["held_out"] for name, kind in kinds.items()}
    if len(losses) > 1:
        best, worst = min(losses.values()), max(losses.values())
        sentences.append(
            f"Trained with {listed(list(losses))} attention, the same model ends between {best:.3f} and "
            f"{worst:.3f} nats per byte on text it has not seen ({worst / best - 1:.1%} apart)."
        )
    else:
        name, loss = next(iter(losses.items()))
        sentences.append(
            f"Trained with {name} attention, the model ends at {loss:.3f} nats per byte on text it has not seen."
        )
    sparse = [f"{name} {percent(kind['kept'])}" for name, kind in kinds.items() if kind["kept"] is not None]
    if sparse:
        sentences.append(
            f"Of the tiles that the causal mask leaves visible, attention computed: {listed(sparse)}."
        )
    index = half_row(sweep["rows"], metrics["limits"]["enough_kept"])
    if index is not None:
        row = sweep["rows"][index]
        sentences.append(
            f"The {sweep['trained_with']}-trained model, evaluated with threshold {row['threshold']:g}, keeps "
            f"{percent(row['kept'])} of the tiles and loses {row['held_out']:.4f} nats per byte "
            f"({relative(row['held_out'], sweep['dense_held_out'])} against nothing skipped)."
        )
    return " ".join(sentences)


def kinds_table(metrics: dict, colors: dict[str, str]) -> str:
    rows = []
    for name, kind in metrics["kinds"].items():
        ratio = kind["time_relative_to_torch"]
        rows.append(
            [
                f'<span class=swatch style="background:{colors[name]}"></span>{name}',
                f"{kind['train_loss']:.3f}",
                f"{kind['held_out']:.4f}",
                f"{kind['bits_per_byte']:.3f}",
                percent(kind["kept"]),
                f"{kind['ms_per_step']:.0f}",
                f"{kind['tokens_per_second']:,.0f}",
                "–" if ratio is None else f"{ratio:.2f}×",
            ]
        )
    header = [
        "attention",
        "training loss",
        "held-out loss",
        "bits per byte",
        "kept tiles",
        "ms per step",
        "tokens/s",
    ]
    return table([*header, "time, torch = 1"], rows)


def sweep_table(metrics: dict) -> str:
    sweep = metrics["sweep"]
    dense = sweep["dense_held_out"]
    rows = [["0 (dense)", f"{dense:.4f}", "", percent(1.0), "", ""]]
    if sweep["dense_ms"]:
        rows[0][4:] = [f"{ms:.1f}" for ms in sweep["dense_ms"]]
    for row in sweep["rows"]:
        rows.append(
            [
                f"{row['threshold']:g}",
                f"{row['held_out']:.4f}",
                relative(row["held_out"], dense),
                percent(row["kept"]),
                f"{row['forward_ms']:.1f}",
                f"{row['backward_ms']:.1f}",
            ]
        )
    index = half_row(sweep["rows"], metrics["limits"]["enough_kept"])
    header = [
        "threshold τ",
        "held-out loss",
        "against dense",
        "kept tiles",
        "attention forward, ms",
        "backward, ms",
    ]
    return table(header, rows, marked=None if index is None else index + 1)


def curve_words(metrics: dict) -> str:
    kinds = metrics["kinds"]
    text = (
        "Every kind starts from the same weights and sees the same bytes in the same order, so the curves can be "
        "compared step by step; their common jumps are easier and harder files."
    )
    if {"torch", "dense"} <= set(kinds):
        first, final = metrics["checks"][0], metrics["checks"][1]
        text += (
            " The wide grey line is torch's own attention, the blue line on it this library's dense attention. "
            f"In the first {metrics['limits']['first_steps']} steps: {escape(first['detail'])} "
            f"(<b>{first['status']}</b>). At the end: {escape(final['detail'])} (<b>{final['status']}</b>). "
            "In between rounding differences may grow, as they do between any two implementations."
        )
    return f"<p>{text}</p>"


def sweep_words(metrics: dict) -> str:
    sweep, tile = metrics["sweep"], metrics["skip_tile"]
    dense, rows = sweep["dense_held_out"], sweep["rows"]
    worst = max(rows, key=lambda row: abs(row["held_out"] - dense))
    text = (
        f"<p>The {sweep['trained_with']}-trained model, unchanged, is evaluated with a threshold τ: a tile of "
        f"{tile[0]} queries × {tile[1]} keys is skipped when none of its probabilities can reach τ times the uniform "
        "one (1 / number of visible keys). To the right less is computed.</p><p>"
    )
    index = half_row(rows, metrics["limits"]["enough_kept"])
    if index is None:
        text += "No threshold of the range brought the kept tiles down to half. "
    else:
        row = rows[index]
        text += (
            f"At τ = {row['threshold']:g} {percent(row['kept'])} of the tiles are kept; the held-out loss is "
            f"{row['held_out']:.4f}, {relative(row['held_out'], dense)} against {dense:.4f} with nothing skipped. "
        )
    least = rows[-1]
    text += (
        f"The largest threshold, {least['threshold']:g}, keeps {percent(least['kept'])} at {least['held_out']:.4f}. "
        f"Over the whole range the loss moves by at most {abs(worst['held_out'] / dense - 1):.3%}"
    )
    if abs(worst["held_out"] / dense - 1) < 0.001:
        text += (
            ": the tiles that this model lets go hold next to none of its attention. It is small and was trained "
            "for minutes; how much a large model loses at the same thresholds, this run cannot say"
        )
    return text + ".</p>"


def time_words(metrics: dict) -> str:
    kinds = metrics["kinds"]
    text = (
        "A training step is forward, backward and update of the whole model; attention alone is measured on the "
        "queries, keys and values of a held-out window, all layers, the kinds taking turns."
    )
    if "torch" in kinds and len(kinds) > 1:
        ratios = [
            f"{name} {kind['time_relative_to_torch']:.2f}×" for name, kind in kinds.items() if name != "torch"
        ]
        text += f" Median time of a step against torch's attention (below 1 is faster): {listed(ratios)}."
    return f"<p>{text}</p>"


def sample_section(metrics: dict) -> str:
    samples = metrics["samples"]
    shown = samples[0]
    prompt = bytes.fromhex(shown["prompt_hex"])[-320:]
    text = (
        f"<p>Greedy text of the {shown['trained_with']}-trained model: after the grey end of a held-out prompt of "
        f"{shown['prompt_bytes']} bytes it chose the {shown['tokens']} blue bytes, one at a time, through "
        f"<code>{shown['function']}</code> over a cache of keys and values "
        f"({shown['tokens_per_second']:,.0f} tokens/s). Greedy text of a small model repeats itself; what counts here "
        "is that each byte is the one that a single prefill over the whole text chooses.</p>"
        f"<pre><span class=prompt>{readable(prompt)}</span>"
        f"<span class=made>{readable(bytes.fromhex(shown['generated_hex']))}</span></pre>"
    )
    rows = []
    for sample in samples:
        check = sample["check"]
        rows.append(
            [
                sample["trained_with"],
                f"<code>{sample['function']}</code>",
                sample["setting"],
                f"{sample['tokens_per_second']:,.0f}",
                f"{check['equal']} of {check['tokens']}"
                if check
                else f"{sample['shared']} of {sample['tokens']} *",
                f"{check['logit_error']:.1g}" if check else "–",
            ]
        )
    text += table(
        [
            "model trained with",
            "decode function",
            "setting",
            "tokens/s",
            "tokens as prefill",
            "logit difference",
        ],
        rows,
        text_columns=3,
    )
    if any(sample["check"] is None for sample in samples):
        text += (
            "<p><small>* With a threshold on, decode decides by its own rule (one query at a time, probe tiles), so it "
            "need not choose what prefill chooses; given is how many leading tokens agree with the same model's "
            "tokens when nothing is skipped.</small></p>"
        )
    return text


def page(metrics: dict, pictures: dict[str, str], colors: dict[str, str]) -> str:
    """metrics as in metrics.json; pictures: name -> SVG (absent where a run cannot show it)."""
    model, text, options = metrics["model"], metrics["text"], metrics["options"]
    style, sentence = verdict(metrics)
    config = model["config"]
    check_rows = [
        [
            f"<span class={STATUS_CLASS[c['status']]}>{c['status']}</span>",
            escape(c["name"]),
            escape(c["detail"]),
        ]
        for c in metrics["checks"]
    ]
    kind_rows = [
        [
            name,
            f"<code>{escape(kind['attention'])}</code>",
            escape(f"{kind['backend']}: {kind['kernel']}"),
        ]
        for name, kind in metrics["kinds"].items()
    ]
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{escape(metrics['name'])}: a byte language model and its attention</title>",
        f"<style>{STYLE}</style></head><body>",
        "<h1>A small language model, trained with each kind of attention</h1>",
        f"<p class=lead>{escape(metrics['name'])} · flash_sparse_attention {escape(metrics['versions']['library'])} · "
        f"{escape(metrics['created'])} · {escape(metrics['device'])} · {metrics['seconds']:.0f} s, "
        f"{metrics['peak_memory_mib']:,.0f} MiB</p>",
        f"<div class='verdict {style}'>{escape(sentence)}</div>",
        f"<p>{escape(summary_words(metrics))}</p>",
        kinds_table(metrics, colors),
        "<p><small>Loss: cross-entropy in nats per byte, lower is better; a uniform guess has 5.545. Training loss: mean "
        "of the last 20 steps. Kept tiles: of those visible under the causal mask, over all layers, heads and held-out "
        "windows.</small></p>",
        "<h2>Checks</h2>",
        table(["", "claim", "measured"], check_rows, text_columns=3),
        "<h2>What was trained</h2>",
        f"<p>A Llama-style transformer over bytes (RMSNorm, rotary positions, SwiGLU, grouped-query attention) with "
        f"{model['parameters']:,} parameters: {config['layers']} layers of width {config['dim']}, "
        f"{config['num_heads']} query and {config['num_kv_heads']} key heads of {config['head_dim']}. Some heads start "
        f"out looking a few bytes back; everything is learned from there. "
        f"Text: {escape(text['description'])}: {text['train_bytes'] / 1e6:.1f} MB in {text['train_files']} files to "
        f"train on, {text['held_out_bytes'] / 1e6:.1f} MB in {text['held_out_files']} files held out. "
        f"Each kind took {options['steps']} steps of {options['context']} bytes (AdamW, warm-up and cosine, seed "
        f"{options['seed']}); held-out loss is the mean over {text['windows']} windows of {options['context']} bytes.</p>",
        table(["kind", "call", "computed by"], kind_rows, text_columns=3),
        "<h2>Learning</h2>",
        curve_words(metrics),
        picture(pictures["loss"], "loss curves"),
    ]
    if "difference" in pictures:
        parts.append(
            picture(pictures["difference"], "difference between the training losses of dense and torch")
        )
    parts += [
        "<h2>Quality against work</h2>",
        sweep_words(metrics),
        picture(pictures["quality"], "held-out loss against kept tiles"),
        sweep_table(metrics),
        "<p><small>The marked row is the first that keeps half or less. Times: attention alone, all layers, one window."
        "</small></p>",
        "<p>Where the tiles are: each small square is one head over one held-out window, queries downwards, keys to the "
        "right; orange tiles were kept, pale blue ones skipped, white lies beyond the diagonal.</p>",
        f"<div class=pair>{picture(pictures['tiles'], 'skip maps')}{picture(pictures['heads'], 'kept by head')}</div>",
    ]
    if "gated_heads" in pictures:
        parts.append(
            "<p>The model that was trained with gates shuts tiles by them alone, before any key is read:</p>"
            f"<div class=pair>{picture(pictures['gated_tiles'], 'skip maps of the gated model')}"
            f"{picture(pictures['gated_heads'], 'kept by head, gated model')}</div>"
        )
    parts += [
        "<h2>Time</h2>",
        time_words(metrics),
        picture(pictures["time"], "step times and attention times"),
        "<h2>Text from the decode path</h2>",
        sample_section(metrics),
        "<h2>This run</h2>",
        f"<p><code>{escape(metrics['command'])}</code></p>",
        f"<p><small>{escape(', '.join(f'{k} {v}' for k, v in metrics['versions'].items()))}; {metrics['threads']} threads. "
        "All numbers: <code>metrics.json</code>; weights: "
        f"{', '.join(f'<code>{escape(name)}</code>' for name in metrics['weights'])}.</small></p>",
        "</body></html>",
    ]
    return "\n".join(parts)


def terminal_table(metrics: dict) -> str:
    """The same numbers for the terminal."""
    lines = [
        "",
        f"{'attention':<11}{'held-out':>9}{'bits/byte':>11}{'kept':>9}{'ms/step':>9}{'tokens/s':>10}{'/ torch':>9}",
    ]
    for name, kind in metrics["kinds"].items():
        ratio = kind["time_relative_to_torch"]
        lines.append(
            f"{name:<11}{kind['held_out']:>9.4f}{kind['bits_per_byte']:>11.3f}{percent(kind['kept']):>9}"
            f"{kind['ms_per_step']:>9.0f}{kind['tokens_per_second']:>10,.0f}"
            f"{'–' if ratio is None else f'{ratio:.2f}×':>9}"
        )
    sweep = metrics["sweep"]
    lines += [
        "",
        f"{sweep['trained_with']}-trained model under a threshold",
        f"{'τ':>6}{'held-out':>11}{'kept':>9}",
    ]
    lines.append(f"{0:>6}{sweep['dense_held_out']:>11.4f}{percent(1.0):>9}")
    lines += [
        f"{row['threshold']:>6g}{row['held_out']:>11.4f}{percent(row['kept']):>9}" for row in sweep["rows"]
    ]
    lines.append("")
    lines += [f"{check['status']:<8} {check['name']}: {check['detail']}" for check in metrics["checks"]]
    lines.append(
        f"\n{metrics['seconds']:.0f} s, peak memory {metrics['peak_memory_mib']:,.0f} MiB, device {metrics['device']}"
    )
    return "\n".join(lines)

# SPDX-License-Identifier: Apache-2.0
"""Everything after training: what the models can do, in numbers and pictures, written to the run's folder."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import platform
import resource
import shlex
import statistics
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import flash_sparse_attention as fsa
import torch
from safetensors.torch import save_file

from . import checks, evaluate, generate, kinds, native, plots, report
from .data import Corpus
from .kinds import AttentionKind, make_kind
from .model import ByteLM
from .train import History, step_times

SAMPLE_TOKENS = 256
STEP_CONTEXTS = {"cpu": (2048, 8192), "cuda": (8192, 32768)}
NATS_PER_BIT = 0.6931471805599453


def kind_metrics(
    kind: AttentionKind,
    history: History,
    result: evaluate.HeldOut,
    plain_loss: float,
    context: int,
    torch_ms: float | None,
    how: dict,
) -> dict:
    ms = 1e3 * statistics.median(history.seconds)
    return {
        "attention": kind.describe(),
        "backend": how["backend"],
        "kernel": how["kernel"],
        "held_out": result.loss,
        "held_out_without_skipping": plain_loss,
        "bits_per_byte": result.loss / NATS_PER_BIT,
        "train_loss": statistics.fmean(history.losses[-20:]),
        "kept": result.kept,
        "kept_by_head": result.kept_by_head,
        "ms_per_step": ms,
        "tokens_per_second": context / ms * 1e3,
        "time_relative_to_torch": None if torch_ms is None else ms / torch_ms,
        "losses": history.losses,
        "seconds": history.seconds,
        "curve": history.curve,
    }


def sample_entry(name: str, kind: AttentionKind, sample: generate.Sample) -> dict:
    if kind.sparse:
        setting = f"γ = {kind.gate_threshold:g}" if kind.gated else f"τ = {kind.threshold:g}"
    else:
        setting = f"top_k = {kind.sizes.top_k}" if kind.native_sparse else "nothing skipped"
    return {
        "trained_with": name,
        "function": kinds.decode_function(kind),
        "setting": setting,
        "prompt_bytes": len(sample.prompt),
        "prompt_hex": sample.prompt.hex(),
        "generated_hex": sample.generated.hex(),
        "tokens": len(sample.generated),
        "tokens_per_second": sample.tokens_per_second,
        "check": None,
        "shared": len(sample.generated),  # leading tokens in common with nothing skipped
    }


def sample_texts(
    trained: dict[str, tuple[ByteLM, History]], primary: str, options: dict, corpus: Corpus
) -> tuple[list[dict], list[checks.Check]]:
    """Greedy samples, on the CPU wherever the models were trained: GPUs have no decode functions yet. Every model
    with no tile skipped, checked against prefill, and those that skip tiles also as they were trained."""
    count = min(SAMPLE_TOKENS, options["context"] // 4)
    prompt = generate.make_prompt(corpus.held_out, options["context"] // 2)
    samples, found = [], []
    for name in [primary, *(name for name in trained if name != primary)]:
        model, kind = copy.deepcopy(trained[name][0]).cpu(), make_kind(name, options)
        # Threshold 0 skips nothing either, and goes through the sparse function.
        plain = kind.under(0.0) if name == "threshold" else kind.without_skipping()
        sample = generate.generate(model, plain, prompt, count)
        check = generate.check_against_prefill(model, plain, sample)
        found.append(checks.decode_matches(name, kinds.decode_function(plain), check))
        samples.append(sample_entry(name, plain, sample) | {"check": dataclasses.asdict(check)})
        if kind.sparse:
            skipping = generate.generate(model, kind, prompt, count)
            shared = generate.agreement(sample.generated, skipping.generated)
            samples.append(sample_entry(name, kind, skipping) | {"shared": shared})
    return samples, found


def attention_times(
    trained: dict[str, tuple[ByteLM, History]],
    primary: str,
    options: dict,
    sweep: list[evaluate.SweepRow],
    window: torch.Tensor,
) -> tuple[list[dict], tuple[float, float]]:
    """Fills in the times of the sweep; returns the rows of the time plot and (forward, backward) in ms with
    nothing skipped."""
    kind = make_kind(primary, options)
    layers = evaluate.projections(trained[primary][0], kind.without_skipping(), window)
    calls = {"torch": (AttentionKind("torch"), layers), "dense": (kind.without_skipping(), layers)}
    for row in sweep:
        calls[f"threshold τ={row.threshold:g}"] = (kind.under(row.threshold), layers)
    if "gated" in trained:
        gated = make_kind("gated", options)
        own = evaluate.projections(trained["gated"][0], gated, window)
        calls["gated, γ=0"] = (gated.without_skipping(), own)
        calls[f"gated, γ={gated.gate_threshold:g}"] = (gated, own)
    if "nsa" in trained:
        native_sparse = make_kind("nsa", options)
        calls["nsa"] = (native_sparse, evaluate.projections(trained["nsa"][0], native_sparse, window))
    times = {name: (1e3 * f, 1e3 * b) for name, (f, b) in evaluate.attention_seconds(calls).items()}
    for row in sweep:
        row.forward_ms, row.backward_ms = times[f"threshold τ={row.threshold:g}"]
    half = next((row for row in sweep if row.kept <= evaluate.ENOUGH_KEPT), sweep[-1])
    shown = {sweep[0].threshold, half.threshold, sweep[-1].threshold}
    hidden = {f"threshold τ={row.threshold:g}" for row in sweep if row.threshold not in shown}
    rows = [
        {
            "label": name,
            "kind": name.split(",")[0].split(" ")[0],
            "forward_ms": forward,
            "backward_ms": backward,
        }
        for name, (forward, backward) in times.items()
        if name not in hidden
    ]
    return rows, times["dense"]


def nsa_metrics(
    trained: dict[str, tuple[ByteLM, History]],
    options: dict,
    corpus: Corpus,
    window: torch.Tensor,
    held_out: dict[str, float],
) -> tuple[dict, list[checks.Check], native.Selection]:
    """What the page says about native sparse attention beside dense; window int64 [context + 1]."""
    kind, dense = make_kind("nsa", options), make_kind("dense", options)
    selection = native.selection(trained["nsa"][0], kind, window)
    metrics = {
        "sizes": dataclasses.asdict(kind.sizes),
        "parameters": trained["nsa"][0].num_parameters(),
        "computed": native.computed_share(selection, kind.sizes),
        "gates": selection.gates,
        "plan": {
            direction: {name: plan[name] for name in ("kernel", "algorithm", "source", "times_ms")}
            for direction, plan in selection.plan.items()
        },
        "text_hex": bytes(window[:-1].tolist()).hex(),
        "votes": native.votes_of_last_byte(selection, kind.sizes),
        "voters": sum(len(blocks) for blocks in selection.blocks),
    }
    found = [
        checks.nsa_learns(held_out),
        checks.nsa_selects(*native.faulty_rows(selection, kind.sizes), kind.sizes),
        checks.all_blocks(*native.all_blocks_against_dense(trained["dense"][0], dense, window, kind.sizes)),
    ]
    return metrics, found, selection


def steps(trained: dict[str, tuple[ByteLM, History]], options: dict, corpus: Corpus) -> list[dict]:
    """Times of a training step at longer contexts: of every kind on a GPU, of dense and nsa on the CPU, where the
    others tell nothing that the run itself does not."""
    device = torch.device(options["device"]).type
    names = list(trained) if device == "cuda" else ["dense", "nsa"] if "nsa" in trained else []
    models = {name: (trained[name][0], make_kind(name, options)) for name in names}
    return step_times(models, corpus, STEP_CONTEXTS[device]) if models else []


def measure(
    folder: Path,
    options: dict,
    corpus: Corpus,
    windows: torch.Tensor,
    trained: dict[str, tuple[ByteLM, History]],
    how: dict[str, dict],
    seconds_so_far: Callable[[], float],
) -> dict:
    """Measures, draws, writes the run's files; returns the metrics.

    windows int64 [n, context + 1]: held-out text; trained and how by the name of the kind.
    """
    context = options["context"]
    primary = next(name for name in ("dense", "torch", "threshold", "gated") if name in trained)
    primary_model, primary_kind = trained[primary][0], make_kind(primary, options)
    results = {}
    for name, (_, history) in trained.items():
        last = {field: value for field, value in history.curve[-1].items() if field != "step"}
        results[name] = evaluate.HeldOut(**last)
    plain_losses = {
        name: evaluate.held_out(model, make_kind(name, options).without_skipping(), windows).loss
        if make_kind(name, options).sparse
        else results[name].loss
        for name, (model, _) in trained.items()
    }
    torch_ms = 1e3 * statistics.median(trained["torch"][1].seconds) if "torch" in trained else None
    found = checks.follows_torch(
        {name: history.losses for name, (_, history) in trained.items()},
        {name: result.loss for name, result in results.items()},
        kinds.attention_dtype(windows.device),
    )
    sweep = evaluate.threshold_sweep(primary_model, primary_kind, windows)
    found.append(checks.thresholds_reach(sweep, primary, context))
    equal = evaluate.zero_threshold_is_dense(primary_model, primary_kind, windows[0])
    found.append(checks.zero_threshold(equal, primary))
    attention_rows, dense_ms = attention_times(trained, primary, options, sweep, windows[0])
    nsa, selection = None, None
    if "nsa" in trained:
        losses = {name: result.loss for name, result in results.items()}
        nsa, nsa_checks, selection = nsa_metrics(trained, options, corpus, windows[0], losses)
        found += nsa_checks
    samples, decode_checks = sample_texts(trained, primary, options, corpus)
    found += decode_checks

    weights = {}
    for name, (model, _) in trained.items():
        weights["model.safetensors" if name == primary else f"model-{name}.safetensors"] = model
    for file, model in weights.items():
        tensors = {key: tensor.contiguous().cpu() for key, tensor in model.state_dict().items()}
        save_file(tensors, folder / file, {"config": json.dumps(dataclasses.asdict(model.config))})

    metrics = {
        "name": folder.name,
        "created": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "command": command(options),
        "device": describe_device(options["device"]),
        "threads": torch.get_num_threads(),
        "versions": {
            "library": fsa.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "options": options,
        "model": {
            "config": dataclasses.asdict(primary_model.config),
            "parameters": primary_model.num_parameters(),
            "attention_dtype": str(kinds.attention_dtype(windows.device)).removeprefix("torch."),
        },
        "text": {
            "description": corpus.description,
            "train_bytes": len(corpus.train),
            "held_out_bytes": len(corpus.held_out),
            "train_files": corpus.train_files,
            "held_out_files": corpus.held_out_files,
            "windows": len(windows),
        },
        "skip_tile": list(fsa.skip_tile(primary_model.config.head_dim)),
        "limits": {
            "first_steps": checks.FIRST_STEPS,
            "first_steps_difference": checks.FIRST_STEPS_LIMIT[kinds.attention_dtype(windows.device)],
            "final_relative": checks.FINAL_LIMIT,
            "nsa_relative": checks.NSA_LIMIT,
            "enough_kept": evaluate.ENOUGH_KEPT,
        },
        "kinds": {
            name: kind_metrics(
                make_kind(name, options),
                history,
                results[name],
                plain_losses[name],
                context,
                torch_ms,
                how[name],
            )
            | {
                "computed": nsa["computed"] if name == "nsa" else None
            }  # pairs of its branches / visible pairs
            for name, (_, history) in trained.items()
        },
        "sweep": {
            "trained_with": primary,
            "dense_held_out": plain_losses[primary],
            "dense_ms": list(dense_ms),
            "rows": [dataclasses.asdict(row) for row in sweep],
        },
        "attention_ms": attention_rows,
        "steps": steps(trained, options, corpus),
        "nsa": nsa,
        "samples": samples,
        "checks": [dataclasses.asdict(check) for check in found],
        "weights": list(weights),
        "seconds": seconds_so_far(),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    pictures = draw(metrics, trained, options, primary, windows[0], selection)
    (folder / "index.html").write_text(report.page(metrics, pictures, plots.COLORS), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    return metrics


def command(options: dict) -> str:
    """The command line that repeats the run."""
    words = ["python", "examples/train_byte_lm.py"]
    for name, value in options.items():
        given = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        words += [f"--{name.replace('_', '-')}", *given] if given else []
    return shlex.join(words)


def describe_device(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {len(os.sched_getaffinity(0))} cores"


def draw(
    metrics: dict,
    trained: dict,
    options: dict,
    primary: str,
    window: torch.Tensor,
    selection: native.Selection | None,
) -> dict[str, str]:
    found = metrics["kinds"]
    pictures = {"loss": plots.loss_curves(found)}
    if {"torch", "dense"} <= set(found):
        pictures["difference"] = plots.loss_difference(
            found["torch"]["losses"],
            found["dense"]["losses"],
            checks.FIRST_STEPS,
            metrics["limits"]["first_steps_difference"],
        )
    rows = metrics["sweep"]["rows"]
    sparse = [{"name": name, **kind} for name, kind in found.items() if kind["kept"] is not None]
    pictures["quality"] = plots.quality_and_work(rows, metrics["sweep"]["dense_held_out"], sparse)
    half = next((row for row in rows if row["kept"] <= evaluate.ENOUGH_KEPT), rows[-1])
    kind = make_kind(primary, options).under(half["threshold"])
    title = f"{primary}-trained, τ = {half['threshold']:g}"
    pictures["heads"] = plots.kept_heat_map(half["kept_by_head"], f"kept tiles: {title}")
    pictures["tiles"] = plots.skip_maps(evaluate.tiles_of(trained[primary][0], kind, window), title)
    if "gated" in trained:
        gated = make_kind("gated", options)
        title = f"gated, γ = {gated.gate_threshold:g}"
        pictures["gated_heads"] = plots.kept_heat_map(found["gated"]["kept_by_head"], f"kept tiles: {title}")
        pictures["gated_tiles"] = plots.skip_maps(
            evaluate.tiles_of(trained["gated"][0], gated, window), title
        )
    if selection is not None:
        size = metrics["nsa"]["sizes"]["block_size"]
        tables = [native.chosen(blocks, len(window) - 1, size) for blocks in selection.blocks]
        pictures["selected"] = plots.selected_blocks(tables, size, "blocks that the heads select")
    names = {name: kind["ms_per_step"] for name, kind in found.items()}
    pictures["time"] = plots.step_times(names, metrics["attention_ms"])
    return pictures

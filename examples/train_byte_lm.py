# SPDX-License-Identifier: Apache-2.0
"""Trains a small language model on real text with every kind of attention and shows what came of it.

    python examples/train_byte_lm.py                                # all kinds, a few minutes on two cores
    python examples/train_byte_lm.py --attention dense gated --steps 1000
    python examples/train_byte_lm.py --text my/notes.txt my/folder
    python examples/train_byte_lm.py --resume                       # after Ctrl-C

The text is the source of Python's standard library unless --text names another. Writes runs/<name>/: index.html
(the page to look at), metrics.json, model.safetensors. Exits with 1 when one of its checks fails, with 130 when
interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import shlex
import statistics
import sys
import time
from datetime import datetime
from pathlib import Path

import flash_sparse_attention as fsa
import torch
from byte_lm import checks, evaluate, generate, kinds, report
from byte_lm.data import Corpus, held_out_windows, load_corpus
from byte_lm.kinds import AttentionKind
from byte_lm.model import ByteLM, ModelConfig
from byte_lm.train import History, Interrupt, load_checkpoint, save_checkpoint, train
from safetensors.torch import save_file

RUNS = Path("runs")
CHECKPOINT = "checkpoint.pt"
HELD_OUT_WINDOWS = 16
SAMPLE_TOKENS = 256
DEFAULTS = {
    "attention": list(kinds.NAMES),
    "device": "cpu",
    "steps": 400,
    "context": 2048,
    "text": [],
    "seed": 0,
    "threshold": 64.0,
    "gate_threshold": 1.0,
}


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--attention", nargs="+", choices=kinds.NAMES, help="kinds to train, in this order (default: all)")
    add("--device", help="cpu (default) or cuda")
    add("--steps", type=int, help=f"steps of each kind (default {DEFAULTS['steps']})")
    add("--context", type=int, help=f"bytes the model sees at once (default {DEFAULTS['context']})")
    add("--text", nargs="+", metavar="PATH", help="files or folders (default: Python's standard library)")
    add("--seed", type=int, help=f"of weights and batches (default {DEFAULTS['seed']})")
    add("--threshold", type=float, help=f"of the kind threshold (default {DEFAULTS['threshold']:g})")
    add("--gate-threshold", type=float, help=f"of the kind gated (default {DEFAULTS['gate_threshold']:g})")
    add("--name", help="folder under runs/ (default: byte_lm-<date>-<time>; with --resume the newest unfinished)")
    add("--resume", action="store_true", help="go on from the checkpoint of an interrupted run")
    return parser.parse_args(arguments)


def check_options(options: dict) -> None:
    for name, least in (("steps", 1), ("context", 128)):
        if options[name] < least:
            raise ValueError(f"--{name}: {options[name]}, but it must be at least {least}")
    if len(set(options["attention"])) < len(options["attention"]):
        raise ValueError(f"--attention: {' '.join(options['attention'])} names a kind twice")
    for name in ("threshold", "gate_threshold"):
        if not 0 < options[name] < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')}: {options[name]}, but it must be positive and finite")
    device = torch.device(options["device"])  # raises RuntimeError for an unknown one
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda, but torch finds no CUDA device; use --device cpu")


def open_run(arguments: argparse.Namespace) -> tuple[Path, dict, dict]:
    """(folder, options, checkpoint state), the state empty for a new run. Nothing is created yet."""
    given = {name: value for name in DEFAULTS if (value := getattr(arguments, name)) is not None}
    given["text"] = [str(Path(path).resolve()) for path in given.get("text", [])] or DEFAULTS["text"]
    if not arguments.resume:
        folder = RUNS / (arguments.name or datetime.now().strftime("byte_lm-%Y%m%d-%H%M%S"))
        if (folder / CHECKPOINT).exists():
            raise ValueError(f"--name: {folder} holds an unfinished run; add --resume or choose another name")
        if folder.exists():
            raise ValueError(f"--name: {folder} exists; choose another name")
        options = DEFAULTS | given
        check_options(options)
        return folder, options, {}
    if arguments.name:
        path = RUNS / arguments.name / CHECKPOINT
        if not path.exists():
            raise ValueError(f"--resume: {path} does not exist; that run is finished or never began")
    else:
        found = sorted(RUNS.glob(f"*/{CHECKPOINT}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise ValueError(f"--resume: no {RUNS}/*/{CHECKPOINT}; there is no interrupted run to go on with")
        path = found[-1]
    state = load_checkpoint(path)
    for name in DEFAULTS:
        if getattr(arguments, name) is not None and given[name] != state["options"][name]:
            raise ValueError(
                f"--{name.replace('_', '-')}: {given[name]}, but {path.parent} was started with "
                f"{state['options'][name]}; leave the option out or start a new run"
            )
    return path.parent, state["options"], state


def make_kind(name: str, options: dict) -> AttentionKind:
    return AttentionKind(
        name,
        threshold=options["threshold"] if name == "threshold" else None,
        gate_threshold=options["gate_threshold"] if name == "gated" else 0.0,
    )


def make_model(kind: AttentionKind, options: dict) -> ByteLM:
    return ByteLM(ModelConfig(gated=kind.gated), options["seed"]).to(options["device"])


def explain_kinds(options: dict) -> dict[str, dict]:
    """Backend and kernel of every kind; fails before any work where one cannot be computed."""
    config = ModelConfig()
    like = torch.zeros(1, options["context"], 1, config.head_dim, device=options["device"])
    query = like.repeat(1, 1, config.num_heads, 1)
    key = like.repeat(1, 1, config.num_kv_heads, 1)
    found = {}
    for name in options["attention"]:
        kind = make_kind(name, options)
        found[name] = kinds.explain(kind, query, key, key, query[..., 0], key[..., 0])
    return found


def train_kinds(
    folder: Path, options: dict, state: dict, corpus: Corpus, windows: torch.Tensor, begin: float
) -> dict[str, tuple[ByteLM, History]] | None:
    """Trains every kind that the checkpoint does not hold yet; None when interrupted, after a checkpoint."""
    finished: dict[str, dict] = state.get("finished", {})
    resumed: dict | None = state.get("current")
    earlier = state.get("seconds", 0.0)

    def save(current: dict | None) -> None:
        save_checkpoint(
            folder / CHECKPOINT,
            {
                "options": options,
                "fingerprint": corpus.fingerprint,
                "seconds": earlier + time.monotonic() - begin,
                "finished": finished,
                "current": current,
            },
        )

    trained = {}
    with Interrupt() as interrupt:
        for name in options["attention"]:
            kind = make_kind(name, options)
            model = make_model(kind, options)
            if name in finished:
                model.load_state_dict(finished[name]["weights"])
                trained[name] = (model, History(**finished[name]["history"]))
                continue
            history = train(
                model,
                kind,
                corpus,
                windows,
                seed=options["seed"],
                steps=options["steps"],
                context=options["context"],
                interrupt=interrupt,
                save=save,
                resumed=resumed if resumed is not None and resumed["kind"] == name else None,
            )
            if history is None:
                return None
            finished[name] = {"weights": model.state_dict(), "history": dataclasses.asdict(history)}
            save(None)
            trained[name] = (model, history)
            if interrupt.requested:
                return None
    return trained


def kind_metrics(
    kind: AttentionKind, history: History, result: evaluate.HeldOut, context: int, torch_ms: float | None, how: dict
) -> dict:
    ms = 1e3 * statistics.median(history.seconds)
    return {
        "attention": kind.describe(),
        "backend": how["backend"],
        "kernel": how["kernel"],
        "held_out": result.loss,
        "bits_per_byte": result.loss / 0.6931471805599453,
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


def sample_texts(
    trained: dict[str, tuple[ByteLM, History]], primary: str, options: dict, corpus: Corpus
) -> tuple[list[dict], list[checks.Check]]:
    """Greedy samples: every model with nothing skipped, checked against prefill, and the sparse ones as they
    were trained."""
    count = min(SAMPLE_TOKENS, options["context"] // 4)
    prompt = generate.make_prompt(corpus.held_out, options["context"] // 2).to(options["device"])
    samples, found = [], []
    for name in [primary, *(name for name in trained if name != primary)]:
        model, kind = trained[name][0], make_kind(name, options)
        plain = kind.without_skipping()
        # A threshold of 0 skips nothing, but goes through the sparse function.
        if name == "threshold":
            plain = kind.under(0.0)
        sample = generate.generate(model, plain, prompt, count)
        check = generate.check_against_prefill(model, plain, sample)
        function = kinds.decode_function(plain)
        found.append(checks.decode_matches(name, function, check))

        def add(
            sample: generate.Sample,
            setting: str,
            check: dict | None,
            shared: int,
            name: str = name,
            function: str = function,
        ) -> None:
            samples.append(
                {
                    "trained_with": name,
                    "function": function,
                    "setting": setting,
                    "prompt_bytes": len(sample.prompt),
                    "prompt_hex": sample.prompt.hex(),
                    "generated_hex": sample.generated.hex(),
                    "tokens": len(sample.generated),
                    "tokens_per_second": sample.tokens_per_second,
                    "check": check,
                    "shared": shared,
                }
            )

        add(sample, "nothing skipped", dataclasses.asdict(check), len(sample.generated))
        if kind.sparse:
            skipping = generate.generate(model, kind, prompt, count)
            setting = f"γ = {kind.gate_threshold:g}" if kind.gated else f"τ = {kind.threshold:g}"
            add(skipping, setting, None, generate.agreement(sample.generated, skipping.generated))
    return samples, found


def attention_times(
    trained: dict[str, tuple[ByteLM, History]], primary: str, options: dict, sweep: list[evaluate.SweepRow], window
) -> tuple[list[dict], tuple[float, float]]:
    """Fills the times of the sweep; returns the rows of the time plot and dense's (forward, backward) in ms."""
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
    times = {name: (1e3 * f, 1e3 * b) for name, (f, b) in evaluate.attention_seconds(calls).items()}
    for row in sweep:
        row.forward_ms, row.backward_ms = times[f"threshold τ={row.threshold:g}"]
    half = next((row for row in sweep if row.kept <= evaluate.ENOUGH_KEPT), sweep[-1])
    shown = {sweep[0].threshold, half.threshold, sweep[-1].threshold}
    hidden = {f"threshold τ={row.threshold:g}" for row in sweep if row.threshold not in shown}
    rows = [
        {"label": name, "kind": name.split(",")[0].split(" ")[0], "forward_ms": forward, "backward_ms": backward}
        for name, (forward, backward) in times.items()
        if name not in hidden
    ]
    return rows, times["dense"]


def evaluate_and_report(
    folder: Path,
    options: dict,
    corpus: Corpus,
    windows: torch.Tensor,
    trained: dict[str, tuple[ByteLM, History]],
    how: dict[str, dict],
    command: str,
    seconds_so_far,
) -> dict:
    """Everything after training: measures, draws, writes the run's files; returns the metrics."""
    from byte_lm import plots  # matplotlib is needed only here

    print("evaluating", flush=True)
    context = options["context"]
    primary = next(name for name in ("dense", "torch", "threshold", "gated") if name in trained)
    primary_model, primary_kind = trained[primary][0], make_kind(primary, options)
    results = {
        name: evaluate.held_out(model, make_kind(name, options), windows) for name, (model, _) in trained.items()
    }
    torch_ms = 1e3 * statistics.median(trained["torch"][1].seconds) if "torch" in trained else None
    found = checks.follows_torch(
        {name: history.losses for name, (_, history) in trained.items()},
        {name: result.loss for name, result in results.items()},
    )
    plain_loss = evaluate.held_out(primary_model, primary_kind.without_skipping(), windows).loss
    sweep = evaluate.threshold_sweep(primary_model, primary_kind, windows)
    found.append(checks.thresholds_reach(sweep, primary))
    equal = evaluate.zero_threshold_is_dense(primary_model, primary_kind, windows[0])
    found.append(checks.zero_threshold(equal, primary))
    attention_rows, dense_ms = attention_times(trained, primary, options, sweep, windows[0])
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
        "command": command,
        "device": describe_device(options["device"]),
        "threads": torch.get_num_threads(),
        "versions": {"library": fsa.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "options": options,
        "model": {"config": dataclasses.asdict(ModelConfig()), "parameters": primary_model.num_parameters()},
        "text": {
            "description": corpus.description,
            "train_bytes": len(corpus.train),
            "held_out_bytes": len(corpus.held_out),
            "train_files": corpus.train_files,
            "held_out_files": corpus.held_out_files,
            "windows": len(windows),
        },
        "skip_tile": list(fsa.skip_tile(ModelConfig().head_dim)),
        "limits": {
            "first_steps": checks.FIRST_STEPS,
            "first_steps_difference": checks.FIRST_STEPS_LIMIT,
            "final_relative": checks.FINAL_LIMIT,
            "enough_kept": evaluate.ENOUGH_KEPT,
        },
        "kinds": {
            name: kind_metrics(make_kind(name, options), history, results[name], context, torch_ms, how[name])
            for name, (_, history) in trained.items()
        },
        "sweep": {
            "trained_with": primary,
            "dense_held_out": plain_loss,
            "dense_ms": list(dense_ms),
            "rows": [dataclasses.asdict(row) for row in sweep],
        },
        "attention_ms": attention_rows,
        "samples": samples,
        "checks": [dataclasses.asdict(check) for check in found],
        "weights": list(weights),
        "seconds": seconds_so_far(),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    pictures = draw(plots, metrics, trained, options, primary, windows[0])
    (folder / "index.html").write_text(report.page(metrics, pictures, plots.COLORS), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    return metrics


def describe_device(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {len(os.sched_getaffinity(0))} cores"


def draw(plots, metrics: dict, trained: dict, options: dict, primary: str, window: torch.Tensor) -> dict[str, str]:
    found = metrics["kinds"]
    pictures = {"loss": plots.loss_curves(found)}
    if {"torch", "dense"} <= set(found):
        pictures["difference"] = plots.loss_difference(
            found["torch"]["losses"], found["dense"]["losses"], checks.FIRST_STEPS, checks.FIRST_STEPS_LIMIT
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
        pictures["gated_tiles"] = plots.skip_maps(evaluate.tiles_of(trained["gated"][0], gated, window), title)
    names = {name: kind["ms_per_step"] for name, kind in found.items()}
    pictures["time"] = plots.step_times(names, metrics["attention_ms"])
    return pictures


def main(arguments: list[str]) -> int:
    begin = time.monotonic()
    try:
        folder, options, state = open_run(parse_arguments(arguments))
        corpus = load_corpus([Path(path) for path in options["text"]], options["context"])
        if state and state["fingerprint"] != corpus.fingerprint:
            raise ValueError(f"--resume: the text has changed since {folder} was started; start a new run")
        how = explain_kinds(options)
    except (ValueError, RuntimeError, TypeError) as error:
        print(f"train_byte_lm.py: {error}", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    windows = held_out_windows(corpus, count=HELD_OUT_WINDOWS, context=options["context"]).to(options["device"])
    print(
        f"{len(corpus.train) / 1e6:.1f} MB of text in {corpus.train_files} files, {len(corpus.held_out) / 1e6:.1f} MB "
        f"in {corpus.held_out_files} files held out; {options['steps']} steps of {options['context']} bytes with each "
        f"of: {', '.join(options['attention'])}"
    )
    resume = f"{Path(sys.argv[0]).as_posix()} --resume --name {shlex.quote(folder.name)}"
    try:
        trained = train_kinds(folder, options, state, corpus, windows, begin)
        if trained is None:
            raise KeyboardInterrupt
        metrics = evaluate_and_report(
            folder,
            options,
            corpus,
            windows,
            trained,
            how,
            shlex.join(["python", *sys.argv]),
            lambda: state.get("seconds", 0.0) + time.monotonic() - begin,
        )
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with: {shlex.join([sys.executable])} {resume}", file=sys.stderr)
        return 130
    (folder / CHECKPOINT).unlink()
    print(report.terminal_table(metrics))
    print(f"\npage: {(folder / 'index.html').resolve()}")
    return 1 if any(check["status"] == "FAIL" for check in metrics["checks"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

# SPDX-License-Identifier: Apache-2.0
"""Trains a small language model on real text with every kind of attention and shows what came of it.

    python examples/train_byte_lm.py                                # all kinds, a few minutes on two cores
    python examples/train_byte_lm.py --attention dense gated --steps 1000
    python examples/train_byte_lm.py --text my/notes.txt my/folder
    python examples/train_byte_lm.py --resume                       # after Ctrl-C

The text is the source of Python's standard library unless --text names another. Writes runs/<name>/:
index.html (the page to look at), metrics.json, model.safetensors (and one such file for each further kind).
Exits with 1 when one of its checks fails, with 2 on a wrong option, with 130 when interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from datetime import datetime
from pathlib import Path

import torch
from byte_lm import kinds, measure, report
from byte_lm.data import Corpus, held_out_windows, load_corpus
from byte_lm.kinds import AttentionKind, Projected
from byte_lm.model import ByteLM, ModelConfig
from byte_lm.train import History, Interrupt, load_checkpoint, save_checkpoint, train

RUNS = Path("runs")
CHECKPOINT = "checkpoint.pt"
HELD_OUT_WINDOWS = 6
DEFAULTS = {
    "attention": list(kinds.NAMES),
    "device": "cpu",
    "steps": 80,
    "context": 2048,
    "text": [],
    "seed": 0,
    "threshold": 64.0,
    "gate_threshold": 1.0,
}


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add(
        "--attention",
        nargs="+",
        choices=kinds.NAMES,
        help="kinds to train, in this order (default: all that the device has)",
    )
    add("--device", help="cpu (default) or cuda")
    add("--steps", type=int, help=f"steps of each kind (default {DEFAULTS['steps']})")
    add("--context", type=int, help=f"bytes the model sees at once (default {DEFAULTS['context']})")
    add("--text", nargs="+", metavar="PATH", help="files or folders (default: Python's standard library)")
    add("--seed", type=int, help=f"of weights and batches (default {DEFAULTS['seed']})")
    add("--threshold", type=float, help=f"of the kind threshold (default {DEFAULTS['threshold']:g})")
    add("--gate-threshold", type=float, help=f"of the kind gated (default {DEFAULTS['gate_threshold']:g})")
    add(
        "--name",
        help="folder under runs/ (default: byte_lm-<date>-<time>; with --resume the newest unfinished)",
    )
    add("--resume", action="store_true", help="go on from the checkpoint of an interrupted run")
    return parser.parse_args(arguments)


def check_options(options: dict) -> None:
    for name, least in (("steps", 1), ("context", 128)):
        if options[name] < least:
            raise ValueError(f"--{name}: {options[name]}, but it must be at least {least}")
    if len(set(options["attention"])) < len(options["attention"]):
        raise ValueError(f"--attention: {' '.join(options['attention'])} names a kind twice")
    if "nsa" in options["attention"] and "dense" not in options["attention"]:
        raise ValueError("--attention: nsa is compared with dense; name dense, too")
    for name in ("threshold", "gate_threshold"):
        if not 0 < options[name] < float("inf"):
            raise ValueError(
                f"--{name.replace('_', '-')}: {options[name]}, but it must be positive and finite"
            )
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
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"--name: {folder} exists; choose another name")
        options = DEFAULTS | given
        check_options(options)
        if torch.device(options["device"]).type == "cuda" and "attention" not in given:
            options["attention"] = [name for name in kinds.NAMES if name not in kinds.CPU_ONLY]
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


def make_model(kind: AttentionKind, options: dict) -> ByteLM:
    config = dataclasses.replace(
        ModelConfig.on(torch.device(options["device"])),
        gated=kind.gated,
        nsa=kind.sizes if kind.native_sparse else None,
    )
    return ByteLM(config, options["seed"]).to(options["device"])


def explain_kinds(options: dict) -> dict[str, dict]:
    """Backend and kernel of every kind; fails before any work where one cannot be computed."""
    config = ModelConfig.on(torch.device(options["device"]))
    like = torch.zeros(1, options["context"], 1, config.head_dim, device=options["device"])
    query = like.repeat(1, 1, config.num_heads, 1)
    key = like.repeat(1, 1, config.num_kv_heads, 1)
    p = Projected(query, key, key, query[..., 0].contiguous(), key[..., 0].contiguous())
    return {name: kinds.explain(kinds.make_kind(name, options), p) for name in options["attention"]}


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
            kind = kinds.make_kind(name, options)
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
    windows = held_out_windows(corpus, count=HELD_OUT_WINDOWS, context=options["context"]).to(
        options["device"]
    )
    print(
        f"{len(corpus.train) / 1e6:.1f} MB of text in {corpus.train_files} files, "
        f"{len(corpus.held_out) / 1e6:.1f} MB in {corpus.held_out_files} files held out; "
        f"{options['steps']} steps of {options['context']} bytes with each of: "
        f"{', '.join(options['attention'])}"
    )
    try:
        trained = train_kinds(folder, options, state, corpus, windows, begin)
        if trained is None:
            raise KeyboardInterrupt
        print("evaluating", flush=True)
        metrics = measure.measure(
            folder,
            options,
            corpus,
            windows,
            trained,
            how,
            lambda: state.get("seconds", 0.0) + time.monotonic() - begin,
        )
    except KeyboardInterrupt:
        if (folder / CHECKPOINT).exists():
            resume = shlex.join([sys.executable, sys.argv[0], "--resume", "--name", folder.name])
            print(f"\ninterrupted; go on with: {resume}", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        print(f"train_byte_lm.py: FAIL: {error}", file=sys.stderr)
        return 1
    (folder / CHECKPOINT).unlink()
    print(report.terminal_table(metrics))
    print(f"\npage: {(folder / 'index.html').resolve()}")
    return 1 if any(check["status"] == "FAIL" for check in metrics["checks"]) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before there was anything to keep
        sys.exit(130)

# SPDX-License-Identifier: Apache-2.0
"""Training one model with one kind of attention, interruptible and resumable at every step."""

from __future__ import annotations

import copy
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .data import Corpus, training_batch
from .evaluate import held_out, synchronize
from .kinds import AttentionKind
from .model import ByteLM

PEAK_RATE = 2e-3
FINAL_SHARE = 0.05  # of the peak rate, at the end of the cosine
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.1
GRADIENT_NORM = 1.0
WARMUP_STEPS = 60  # short ones make early steps erratic, and rounding differences with them
CURVE_POINTS = 3  # held-out evaluations during training, the last one at its end
CHECKPOINT_SECONDS = 30.0
CHECKPOINT_FORMAT = 2
STEP_ROUNDS = 3  # of step_times, per context and kind, in turns; the first warms up


@dataclass
class History:
    """What one training run leaves behind besides weights."""

    losses: list[float] = field(default_factory=list)  # per step, nats per byte, before the update
    seconds: list[float] = field(default_factory=list)  # per step: forward, backward, update
    # step and the fields of HeldOut; the last point is the trained model's.
    curve: list[dict] = field(default_factory=list)


class Interrupt:
    """Within it, the first Ctrl-C only sets `requested`, so that a step is never torn; the second one stops
    the program at once."""

    def __enter__(self) -> Interrupt:
        self.requested = False
        self.previous = signal.signal(signal.SIGINT, self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def handle(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def save_checkpoint(path: Path, state: dict) -> None:
    """Replaces `path` in one move: whatever interrupts it, the file is the old or the new one."""
    partial = path.with_suffix(".partial")
    torch.save({"format": CHECKPOINT_FORMAT, **state}, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path}: format {state.get('format')}, but this program reads {CHECKPOINT_FORMAT}")
    return state


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to FINAL_SHARE of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)
    return PEAK_RATE * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: ByteLM) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=BETAS)


def train_step(
    model: ByteLM, kind: AttentionKind, optimizer: torch.optim.Optimizer, windows: Tensor
) -> float:
    """One update on windows int64 [batch, context + 1]; the loss before it."""
    optimizer.zero_grad(set_to_none=True)
    loss = model.loss(windows, kind)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
    optimizer.step()
    return loss.item()


def train(
    model: ByteLM,
    kind: AttentionKind,
    corpus: Corpus,
    windows: Tensor,
    *,
    seed: int,
    steps: int,
    context: int,
    interrupt: Interrupt,
    save: Callable[[dict | None], None],
    resumed: dict | None = None,
) -> History | None:
    """Trains `model` in place and returns its history, or None when interrupted.

    windows int64 [n, context + 1] are the held-out text of the curve. `save` gets the state of this run every
    CHECKPOINT_SECONDS and at an interruption; `resumed` is such a state, loaded.
    """
    device = next(model.parameters()).device
    optimizer = make_optimizer(model)
    history, first_step = History(), 0
    if resumed is not None:
        model.load_state_dict(resumed["weights"])
        optimizer.load_state_dict(resumed["optimizer"])
        history, first_step = History(**resumed["history"]), resumed["step"]

    def state(step: int) -> dict:
        return {
            "kind": kind.name,
            "step": step,
            "weights": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": asdict(history),
        }

    last_save = time.monotonic()
    bar = tqdm(
        total=steps,
        initial=first_step,
        desc=f"{kind.name:>9}",
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10,
        dynamic_ncols=True,
    )
    with bar:
        for step in range(first_step, steps):
            rate = learning_rate(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = training_batch(corpus, seed=seed, step=step, batch=1, context=context).to(device)
            synchronize(device)
            begin = time.perf_counter()
            history.losses.append(train_step(model, kind, optimizer, batch))
            synchronize(device)
            history.seconds.append(time.perf_counter() - begin)
            if not math.isfinite(history.losses[-1]):
                raise FloatingPointError(f"{kind.name}: loss {history.losses[-1]} at step {step}")

            done = step + 1
            if done * CURVE_POINTS // steps > step * CURVE_POINTS // steps:
                result = held_out(model, kind, windows)
                history.curve.append({"step": done, **asdict(result)})
            recent = history.losses[-20:]
            speed = batch[:, 1:].numel() * len(recent) / sum(history.seconds[-20:])
            bar.set_postfix_str(f"loss {sum(recent) / len(recent):.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
            if interrupt.requested:
                save(state(done))
                return None
            if time.monotonic() - last_save > CHECKPOINT_SECONDS:
                save(state(done))
                last_save = time.monotonic()
    return history


def step_times(
    models: dict[str, tuple[ByteLM, AttentionKind]], corpus: Corpus, contexts: tuple[int, ...]
) -> list[dict]:
    """Median milliseconds of a training step of copies of the models, taking turns, for each context that the
    text is long enough for: [{"context", "ms": {name: ms}}]."""
    rows = []
    for context in contexts:
        if len(corpus.train) <= context:
            continue
        copies = {name: (copy.deepcopy(model), kind) for name, (model, kind) in models.items()}
        optimizers = {name: make_optimizer(model) for name, (model, _) in copies.items()}
        seconds: dict[str, list[float]] = {name: [] for name in copies}
        for step in range(STEP_ROUNDS):
            batch = training_batch(corpus, seed=0, step=step, batch=1, context=context)
            for name, (model, kind) in copies.items():
                batch = batch.to(model.embedding.weight.device)
                synchronize(batch.device)
                begin = time.perf_counter()
                train_step(model, kind, optimizers[name], batch)
                synchronize(batch.device)
                seconds[name].append(time.perf_counter() - begin)
        ms = {name: 1e3 * statistics.median(values[1:]) for name, values in seconds.items()}
        rows.append({"context": context, "ms": ms})
    return rows

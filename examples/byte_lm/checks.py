# SPDX-License-Identifier: Apache-2.0
"""What the run claims, each claim computed from what was measured; a claim that fails fails the program."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .evaluate import ENOUGH_KEPT, SweepRow
from .generate import TIE, DecodeCheck
from .kinds import NsaSizes

FIRST_STEPS = 20
FIRST_STEPS_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 1e-3}  # nats per byte, by attention's dtype
FINAL_LIMIT = 0.01  # relative
NSA_LIMIT = 0.05  # relative; another architecture, not another rounding
ALL_BLOCKS_LIMIT = 1e-5  # relative to the largest output
LONG_CONTEXT = 2048


@dataclass
class Check:
    name: str
    status: str  # PASS, FAIL or NOT RUN
    detail: str


def relative(value: float, reference: float) -> str:
    """value / reference - 1 as a percentage with its sign, none where it vanishes."""
    text = f"{value / reference - 1:+.3%}"
    return "0.000%" if text in ("+0.000%", "-0.000%") else text


def judged(name: str, passed: bool, detail: str) -> Check:
    return Check(name, "PASS" if passed else "FAIL", detail)


def follows_torch(
    losses: dict[str, list[float]], held_out: dict[str, float], dtype: torch.dtype
) -> list[Check]:
    """dense against torch: the first steps and the end, attention in `dtype`. NaN passes nothing: every
    comparison asks for <=."""
    limit = FIRST_STEPS_LIMIT[dtype]
    first = f"dense follows torch's training loss within {limit:g} for the first {FIRST_STEPS} steps"
    final = f"dense ends within {FINAL_LIMIT:.0%} of torch's held-out loss"
    if not {"torch", "dense"} <= set(losses):
        reason = "needs --attention torch dense"
        return [Check(first, "NOT RUN", reason), Check(final, "NOT RUN", reason)]
    pairs = list(zip(losses["torch"], losses["dense"], strict=True))[:FIRST_STEPS]
    differences = [abs(dense - torch) for torch, dense in pairs]
    within = all(difference <= limit for difference in differences)
    detail = f"largest difference {max(differences):.2g} nats per byte over {len(pairs)} steps"
    if len(pairs) < FIRST_STEPS:
        checks = [
            Check(first, "NOT RUN" if within else "FAIL", f"only {len(pairs)} steps were trained; {detail}")
        ]
    else:
        checks = [judged(first, within, detail)]
    detail = f"dense {held_out['dense']:.4f}, torch {held_out['torch']:.4f} nats per byte: "
    detail += relative(held_out["dense"], held_out["torch"])
    return [*checks, judged(final, abs(held_out["dense"] / held_out["torch"] - 1) <= FINAL_LIMIT, detail)]


def thresholds_reach(rows: list[SweepRow], trained_with: str, context: int) -> Check:
    """A short context is mostly diagonal, whose tiles are always kept: there a miss is not held against "
    "it."""
    least = min(rows, key=lambda row: row.kept)
    detail = (
        f"fewest kept: {least.kept:.1%} at threshold {least.threshold:g}, held-out loss {least.held_out:.4f}"
    )
    check = judged(
        f"thresholds on the {trained_with}-trained model reach {ENOUGH_KEPT:.0%} kept tiles or fewer",
        least.kept <= ENOUGH_KEPT,
        detail,
    )
    if check.status == "FAIL" and context < LONG_CONTEXT:
        return Check(check.name, "NOT RUN", f"asked of contexts from {LONG_CONTEXT} on; {detail}")
    return check


def zero_threshold(equal: bool, trained_with: str) -> Check:
    return judged(
        f"threshold 0 changes no bit of the result ({trained_with}-trained model)",
        equal,
        "all logits of a held-out window are equal" if equal else "logits of a held-out window differ",
    )


def nsa_learns(held_out: dict[str, float]) -> Check:
    name = f"nsa ends at most {NSA_LIMIT:.0%} above dense's held-out loss"
    detail = f"nsa {held_out['nsa']:.4f}, dense {held_out['dense']:.4f} nats per byte: "
    detail += relative(held_out["nsa"], held_out["dense"])
    return judged(name, held_out["nsa"] <= (1 + NSA_LIMIT) * held_out["dense"], detail)


def nsa_selects(faults: int, rows: int, sizes: NsaSizes) -> Check:
    return judged(
        f"every row of nsa selects min({sizes.top_k}, own block + 1) blocks: the first {sizes.init_blocks}, the "
        f"last {sizes.local_blocks} up to its own, none after it",
        faults == 0,
        f"{rows - faults:,} of {rows:,} rows of all layers and key heads on a held-out window",
    )


def all_blocks(difference: float, largest: float) -> Check:
    return judged(
        "selected attention over every block is dense attention (dense-trained model)",
        difference <= ALL_BLOCKS_LIMIT * largest,
        f"largest difference of an output {difference:.2g}, of outputs up to {largest:.2g}",
    )


def decode_matches(trained_with: str, function: str, result: DecodeCheck) -> Check:
    ties = f", {result.ties} further within {TIE:g} of prefill's best logit" if result.ties else ""
    return judged(
        f"{function} generates prefill's tokens ({trained_with}-trained model)",
        result.passed,
        f"{result.equal} of {result.tokens} tokens equal{ties}; "
        f"largest difference of a logit {result.logit_error:.2g}",
    )

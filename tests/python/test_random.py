# SPDX-License-Identifier: Apache-2.0
"""Problems drawn at random (generator.py). More of them: pytest --cases N --seed S."""

from __future__ import annotations

import decisions
import generator
import oracle
from cases import Problem, tile_keys


def test_random_problem(random_case, seed):
    generator.check(seed, random_case)


def skips_really(problem: Problem) -> bool:
    """Whether the rules, applied in float64, drop a visible tile of the problem."""
    if problem.decode:
        kept, _ = decisions.decode_decisions(problem)
    else:
        kept = decisions.own_decisions(problem)
    tile = tile_keys(problem.tensors["query"].shape[-1])
    for s in oracle.sequences(problem):
        for head in range(problem.tensors["query"].shape[-2]) if s.seqlen_q and s.keys else ():
            mask = oracle.visible(problem, s, head)
            for n in range(kept[s.index].shape[2]):
                rows = mask[:, n * tile : (n + 1) * tile].any(1)
                for r, part in enumerate(rows.split(64)):
                    if part.any() and not kept[s.index][head, r, n]:
                        return True
    return False


def test_sparse_problems_really_skip(seed):
    """A generator whose thresholds and gates never skip would test nothing: at least 30 % of its sparse problems
    drop a tile."""
    sparse = [drawn.problem for drawn in (generator.draw(seed, i) for i in range(150))]
    sparse = [problem for problem in sparse if problem.case.skips]
    skipping = sum(skips_really(problem) for problem in sparse)
    assert len(sparse) >= 30
    assert skipping >= 0.3 * len(sparse), f"{skipping} of {len(sparse)} sparse problems skip a tile"


def test_draws_are_repeatable():
    a, b = generator.draw(3, 5), generator.draw(3, 5)
    assert str(a) == str(b)
    for name, tensor in a.problem.tensors.items():
        assert tensor.stride() == b.problem.tensors[name].stride()
        assert (tensor.nan_to_num() == b.problem.tensors[name].nan_to_num()).all()

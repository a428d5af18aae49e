# SPDX-License-Identifier: Apache-2.0
"""Options of the Python tests.

pytest tests/python                                   everything
pytest tests/python -m "not slow"                     without the large problems
pytest tests/python/test_random.py --cases 20000 --seed 7  a long run of the random generator
pytest tests/python --backend reference               one backend only
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # cases.py
sys.path.insert(0, str(Path(__file__).resolve().parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=560, help="problems that the random generator draws")
    parser.addoption("--seed", type=int, default=0, help="seed of the random generator")
    parser.addoption("--backend", help="compute with this backend alone (sets FSA_BACKEND)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: large problems")
    if config.getoption("--backend"):  # before the library reads it
        os.environ["FSA_BACKEND"] = config.getoption("--backend")
    torch.set_num_threads(1)  # the tensors are small: a second OpenMP thread would mostly spin


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "random_case" in metafunc.fixturenames:
        metafunc.parametrize("random_case", range(metafunc.config.getoption("--cases")))


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """Seed of the random generator."""
    return request.config.getoption("--seed")

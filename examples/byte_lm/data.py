# SPDX-License-Identifier: Apache-2.0
"""Text as bytes: which files, which of them are held out, and which bytes a training step sees."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

FILE_SEPARATOR = 0  # a byte that does not occur in text
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Bytes of the training and of the held-out files, uint8, files separated by a zero byte."""

    train: torch.Tensor
    held_out: torch.Tensor
    train_files: int
    held_out_files: int
    description: str
    fingerprint: str  # of all bytes and of the split; a checkpoint continues only on the same text


def standard_library_files() -> tuple[Path, list[Path]]:
    """Root and .py files of the running Python's standard library, without its tests (not every
    distribution installs them) and without installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return root, [
        path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)
    ]


def files_of(paths: list[Path]) -> list[tuple[str, Path]]:
    """(name, path) of the files to read, sorted by name; a folder stands for the .py and .txt and .md
    files in it. No paths: the standard library."""
    if not paths:
        root, files = standard_library_files()
        return sorted((path.relative_to(root).as_posix(), path) for path in files)
    named = []
    for path in paths:
        if path.is_dir():
            inside = [
                file for file in path.rglob("*") if file.suffix in (".py", ".txt", ".md") and file.is_file()
            ]
            if not inside:
                raise ValueError(f"--text: {path} holds no .py, .txt or .md file; name files instead")
            named += [(file.relative_to(path).as_posix(), file) for file in inside]
        elif path.is_file():
            named.append((path.name, path))
        else:
            raise ValueError(f"--text: {path} does not exist")
    return sorted(named)


def is_held_out(name: str) -> bool:
    """One file in ten, chosen by its name alone, so that the split does not depend on anything else."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def join(texts: list[bytes]) -> torch.Tensor:
    return torch.frombuffer(bytearray(bytes([FILE_SEPARATOR]).join([b"", *texts, b""])), dtype=torch.uint8)


def load_corpus(paths: list[Path], context: int) -> Corpus:
    """Reads and splits the text. A single file, or too few for a split by name, gives its last tenth away.

    Raises ValueError when either part is shorter than four contexts.
    """
    train, held_out = [], []
    names = files_of(paths)
    for name, path in names:
        (held_out if is_held_out(name) else train).append(path.read_bytes())
    what = "the .py files of Python's standard library" if not paths else ", ".join(map(str, paths))
    description = f"{what}; one file in ten held out, chosen by a hash of its name"
    if sum(map(len, held_out)) < 4 * (context + 1) or not train:
        texts = train + held_out
        cuts = [len(text) - len(text) // 10 for text in texts]
        train = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
        held_out = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
        description = f"{what}; the last tenth of each file held out"
    corpus = Corpus(
        train=join(train),
        held_out=join(held_out),
        train_files=len(train),
        held_out_files=len(held_out),
        description=description,
        fingerprint=hashlib.sha256(b"\1".join([b"\0".join(train), b"\0".join(held_out)])).hexdigest()[:16],
    )
    for part, text in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(text) < 4 * (context + 1):
            raise ValueError(
                f"--text: {len(text)} bytes of {part} text, but a context of {context} needs at least "
                f"{4 * (context + 1)}; give more text or a smaller --context"
            )
    return corpus


def training_batch(corpus: Corpus, *, seed: int, step: int, batch: int, context: int) -> torch.Tensor:
    """Bytes [batch, context + 1], int64, of one step: a function of its arguments alone, so every kind of
    attention and every resumed run sees the same."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(corpus.train) - context, (batch,), generator=generator)
    return torch.stack([corpus.train[start : start + context + 1] for start in starts.tolist()]).long()


def held_out_windows(corpus: Corpus, *, count: int, context: int) -> torch.Tensor:
    """Bytes [n, context + 1], int64: `count` disjoint windows, or as many as there are, spread over the
    held-out text."""
    count = max(1, min(count, len(corpus.held_out) // (context + 1)))
    last = len(corpus.held_out) - (context + 1)
    starts = [round(index * last / max(count - 1, 1)) for index in range(count)]
    return torch.stack([corpus.held_out[start : start + context + 1] for start in starts]).long()

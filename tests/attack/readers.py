"""Readers beside writers of one folder: every model that is opened is one of those that were saved, whole."""

from __future__ import annotations

import collections
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from helpers import mlp
from kills import mark_of, models, saving
from torch import nn

import quantkit
from quantkit import CheckpointError

OUTCOMES = ("one of them", "said to be busy")
WRITERS = 2


def attack(count: int, seed: int = 0) -> dict[str, Any]:
    """Read so often, with and without hashes, while two processes write."""
    found, wrong = collections.Counter[str](), list[str]()
    known = models()
    with tempfile.TemporaryDirectory() as place:
        folder = quantkit.save(next(iter(known.values())), Path(place, "out"))
        with writing(list(known.values()), folder):
            for turn in range(count):
                outcome = read(folder, known, verify=turn % 2 == 0)
                found[outcome] += 1
                if outcome not in OUTCOMES:
                    wrong.append(f"{turn}: {outcome}")
        if read(folder, known, verify=True) != "one of them":
            wrong.append("what is left at the end is none of them")
    seen = len([1 for outcome in found if outcome == "one of them"])
    return {"cases": count, "outcomes": dict(found), "wrong": wrong if seen else [*wrong, "nothing was ever read"]}


@contextmanager
def writing(saved: list[nn.Module], folder: Path) -> Iterator[None]:
    """Inside, processes write the models to the folder, one after the other, as fast as they can."""
    children = [saving(saved[turn:] + saved[:turn], folder) for turn in range(WRITERS)]
    try:
        yield
        assert [os.waitpid(child, os.WNOHANG)[0] for child in children] == [0] * WRITERS, "a writer failed"
    finally:
        for child in children:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def read(folder: Path, known: dict[int, nn.Module], *, verify: bool) -> str:
    try:
        loaded = quantkit.load(folder, model=mlp(), verify=verify)
    except CheckpointError as error:
        return "said to be busy" if "is being replaced all the time" in str(error) else f"refused: {error}"
    return "one of them" if mark_of(loaded) in known else "a mix of two checkpoints"

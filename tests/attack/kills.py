"""SIGKILL at any moment of a save: the folder holds a whole checkpoint, the old one or the new one, and nothing is left over.

With file systems that cannot let two folders change places in one step, there may be no folder for a moment; then the error
names the old one beside it.
"""

from __future__ import annotations

import collections
import os
import random
import signal
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from helpers import mlp, normal
from torch import nn

import quantkit
from quantkit import CheckpointError
from quantkit.checkpoint import files
from quantkit.core.checksum import checksum

OUTCOMES = ("whole", "none yet", "the old one is named")


def models() -> dict[int, nn.Module]:
    """Two quantized models that differ in everything, by what tells them apart."""
    made = [
        quantkit.quantize(mlp(), method, calibration=[normal(2, 9, 16)], progress=False, seed=seed)
        for seed, method in enumerate(["smoothquant", ["llm_int8", "rptq"]])
    ]
    return {mark_of(model): model for model in made}


def mark_of(model: nn.Module) -> int:
    """One number for all tensors of a model and its report."""
    total = hash(repr(quantkit.report(model).method))
    for name, tensor in sorted(model.state_dict().items()):
        total = hash((total, name, checksum(tensor)))
    return total


def attack(count: int, seed: int = 0) -> dict[str, Any]:
    """Kill so many saves."""
    moments, found, wrong = random.Random(seed), collections.Counter[str](), list[str]()
    known = models()
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        for model in known.values():
            quantkit.save(model, Path(place, "try"))
        seconds = (time.perf_counter() - start) / len(known)
        for turn in range(count):
            folder = Path(place, str(turn % 50))  # so that some are there already
            step = moments.random() < 0.7
            kill_one(list(known.values()), folder, step, moments.uniform(0, 3) * seconds)
            outcome = verdict(folder, known, step)
            found[outcome] += 1
            if outcome not in OUTCOMES:
                wrong.append(f"{turn}: {outcome}")
            quantkit.save(moments.choice(list(known.values())), folder)
            left = [p.name for p in Path(place).iterdir() if p.name.startswith(f".{folder.name}.")]
            if left or verdict(folder, known, True) != "whole":
                wrong.append(f"{turn}: after the next save there is {left}")
    return {"cases": count, "outcomes": dict(found), "wrong": wrong}


def kill_one(saved: list[nn.Module], folder: Path, step: bool, after: float) -> None:
    child = saving(saved, folder, step)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "a save failed by itself"


def saving(saved: list[nn.Module], folder: Path, step: bool = True) -> int:
    """The number of a new process that saves these models to a folder, one after the other, for ever.

    Without ``step`` it does so as where two folders cannot change places in one step.
    """
    child = os.fork()
    if not child:
        try:
            if not step:
                files._exchanged = lambda *_: False  # type: ignore[assignment]
            while True:
                for model in saved:
                    quantkit.save(model, folder)
        except BaseException:  # noqa: BLE001  nobody else would see it
            traceback.print_exc()
        finally:
            os._exit(1)
    return child


def verdict(folder: Path, known: dict[int, nn.Module], step: bool) -> str:
    before = folder.exists()
    try:
        loaded = quantkit.load(folder, model=mlp())
    except CheckpointError as error:
        if not before and not step and "left the whole old one at" in str(error):
            return "the old one is named"
        return "none yet" if not before and "left the whole old one" not in str(error) else f"refused: {error}"
    return "whole" if mark_of(loaded) in known else "a mix of two checkpoints"

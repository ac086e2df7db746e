"""Faults of the folder in which the library of C passes is kept: it is built again or elsewhere, and always runs."""

from __future__ import annotations

import collections
import ctypes
import ctypes.util
import logging
import os
import random
import tempfile
from pathlib import Path
from typing import Any

from quantkit.ops import build
from quantkit.ops.cpu import native

OUTCOMES = ("whole", "whole, elsewhere")


def attack(count: int, seed: int = 0) -> dict[str, Any]:
    """Damage it so often."""
    logging.disable(logging.CRITICAL)
    dice, found, wrong = random.Random(seed), collections.Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as place:
        cache, tempfile.tempdir = Path(place, "cache"), place
        os.environ["QUANTKIT_CACHE"] = str(cache)
        first = path()
        whole = first.read_bytes()
        for case in range(count):
            what = damage(first, whole, dice)
            used = path()
            good = used.read_bytes() == whole and build._is_own(used) and build._is_own(used.parent)
            outcome = f"{what}: {used} is not what was built" if not good else "whole" if used == first else "whole, elsewhere"
            found[outcome] += 1
            if outcome not in OUTCOMES:
                wrong.append(f"{case}: {outcome}")
            cache.chmod(0o700)
        tempfile.tempdir = None
    return {"cases": count, "outcomes": dict(found), "wrong": wrong}


def path() -> Path:
    lib = native.library.__wrapped__()
    assert isinstance(lib, ctypes.CDLL)
    assert lib.quantkit_quantize is not None
    return Path(lib._name)


def damage(file: Path, whole: bytes, dice: random.Random) -> str:
    """The file is not written in place: this process has it in its memory."""
    kind = dice.choice(("cut", "empty", "flipped", "another library", "text", "link", "open file", "open folder", "gone"))
    file.unlink(missing_ok=True)
    if kind == "link":
        other = file.with_name("planted.so")
        other.write_bytes(whole)
        file.symlink_to(other)
    elif kind != "gone":
        changed = bytearray(whole)
        changed[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        contents = {
            "cut": whole[: dice.randrange(len(whole))], "empty": b"", "flipped": bytes(changed),
            "another library": Path(ctypes.util.__file__).read_bytes(), "text": b"#!/bin/sh\n",
        }  # fmt: skip
        file.write_bytes(contents.get(kind, whole))
        file.chmod(0o777 if kind == "open file" else 0o700)
    if kind == "open folder":
        file.parent.chmod(0o777)
    return kind

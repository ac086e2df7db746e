"""Checkpoints with something changed in them, their digests made anew as an attacker would: opened, or refused in our words.

What is opened has to compute what the reference computes, from values that a quantizer may have written: no kernel may read
where a damaged index points. A process that dies or hangs counts as wrong, as does any error that is not ours.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import os
import random
import re
import shutil
import struct
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import isolated
import torch
from helpers import gpt2, llama, mlp, normal, quantized, tokens
from torch import nn

import quantkit
from quantkit import CheckpointError, W8A8Linear
from quantkit.checkpoint.record import digest_of
from quantkit.core.validity import value_fault
from quantkit.layers.attention import AttentionQuantizer
from quantkit.model.modules import tensors_in

OUTCOMES = ("refused", "opened", "opened, and its input is refused", "opened, and the class of the model fails")
NUMBERS = (
    0,
    1,
    -1,
    2,
    127,
    128,
    255,
    256,
    2**15,
    2**31,
    -(2**31),
    2**63,
    10**5,
    10**12,
    0.0,
    0.5,
    -1.0,
    1e300,
    float("nan"),
    float("inf"),
)
OTHERS = (None, True, False, "", "x", "../x", "w8a8", "rptq", "\x1b[2J", [], {}, [[]], {"x": 1}, "é" * 500)
BITS = (0x7FC00000, 0x7F800000, 0xFF800000, 0, 0x80000000, 0x3F800000, 0xFFFFFFFF, 0x00000001, 0x7FFFFFFF)


# ---- what is changed


def flip_bits(path: Path, dice: random.Random) -> None:
    """Of numbers, not of the header."""
    _, raw = parts(path)
    start = 8 + struct.unpack("<Q", raw[:8])[0] if len(raw) >= 8 else 0
    for _ in range(dice.choice((1, 1, 3, 50))):
        if start < len(raw):
            raw[dice.randrange(start, len(raw))] ^= 1 << dice.randrange(8)
    path.write_bytes(raw)


def plant(path: Path, dice: random.Random) -> None:
    """A number that nobody wrote into a tensor of any kind."""
    header, raw = parts(path)
    length = struct.unpack("<Q", raw[:8])[0]
    places = [facts["data_offsets"] for name, facts in sorted(header.items()) if name != "__metadata__"]
    if not places:
        return
    begin, end = dice.choice(places)
    size = min(dice.choice((1, 2, 4, 8)), end - begin)
    place = 8 + length + begin + (dice.randrange(0, end - begin - size + 1) // size * size if size else 0)
    value = dice.choice((*BITS, dice.getrandbits(32))) << dice.choice((0, 0, 32))
    raw[place : place + size] = (value & (256**size - 1)).to_bytes(size, "little") if size else b""
    path.write_bytes(raw)


def edit_header(path: Path, dice: random.Random) -> None:
    header, raw = parts(path)
    if header:
        text = json.dumps(mutated(header, dice)).encode()
        length = len(text) if dice.random() < 0.8 else dice.getrandbits(20)
        path.write_bytes(struct.pack("<Q", length) + text + raw[8 + struct.unpack("<Q", raw[:8])[0] :])


def parts(path: Path) -> tuple[dict[str, Any], bytearray]:
    """The header of a safetensors file, empty if an earlier change has broken it, and all bytes."""
    raw = bytearray(path.read_bytes())
    try:
        header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
        places = [facts["data_offsets"] for name, facts in header.items() if name != "__metadata__"]
        whole = all(type(a) is type(b) is int and 0 <= a <= b <= len(raw) for a, b in places)
    except (ValueError, struct.error, TypeError, KeyError, AttributeError):
        return {}, raw
    return header if whole else {}, raw


def cut(path: Path, dice: random.Random) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: dice.randrange(len(raw) + 1)] + bytes(dice.choice((0, 0, 8, 1000))))


def edit_json(path: Path, dice: random.Random) -> None:
    try:
        body = json.loads(path.read_text())
    except ValueError:  # cut before
        return
    for _ in range(dice.choice((1, 1, 2, 5))):
        body = mutated(body, dice)
    path.write_text(json.dumps(body))


def mutated(body: Any, dice: random.Random) -> Any:
    """The same JSON with one thing changed, removed, added or moved, wherever."""
    if isinstance(body, (dict, list)) and body and dice.random() < 0.9:
        body = copy.copy(body)
        key = dice.choice(sorted(body, key=str) if isinstance(body, dict) else range(len(body)))
        how = dice.random()
        if how < 0.85:
            body[key] = mutated(body[key], dice)
        elif how < 0.93:
            del body[key]
        elif isinstance(body, dict):
            body[dice.choice(("x", "", "../x", f"{key}.x", str(key).rpartition(".")[0]))] = body[key]
        else:
            body.append(body[key])
        return body
    if isinstance(body, (int, float)) and not isinstance(body, bool) and dice.random() < 0.5:
        return dice.choice((body + 1, body - 1, body * 2, -body, body * 10**6))
    return dice.choice((*NUMBERS, *OTHERS))


def replace_file(path: Path, dice: random.Random) -> None:
    """By another one, a link, a pipe, a folder, or nothing."""
    others = sorted(p for p in path.parent.iterdir() if p != path and p.is_file() and not p.is_symlink())
    path.unlink()
    how = dice.randrange(6)
    if how == 0 and others:
        shutil.copyfile(dice.choice(others), path)
    elif how == 1:
        path.symlink_to("/etc/passwd")
    elif how == 2:
        os.mkfifo(path)
    elif how == 3:
        path.mkdir()
    elif how == 4 and others:
        path.symlink_to(dice.choice(others).name)


def sign(folder: Path, dice: random.Random) -> None:
    """Make all hashes of quantkit's own record anew; now and then not."""
    record = folder / "quantkit.json"
    if record.is_symlink() or not record.is_file() or dice.random() < 0.03:
        return
    try:
        body = json.loads(record.read_text())
        for name, facts in body["files"].items():
            raw = (folder / name).read_bytes() if (folder / name).is_file() else b""
            facts.update(sha256=hashlib.sha256(raw).hexdigest(), bytes=len(raw))
        body.pop("digest", None)
        record.write_text(json.dumps({**body, "digest": digest_of(body)}))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return  # whatever of this was changed


CHANGES: dict[str, list[Callable[[Path, random.Random], None]]] = {
    ".safetensors": [flip_bits, flip_bits, plant, plant, plant, edit_header, cut, replace_file],
    ".json": [edit_json] * 8 + [cut, replace_file],
}


# ---- bases


def own_bases(folder: Path) -> list[tuple[Path, Callable[[], nn.Module] | None, Any]]:
    """Checkpoints of quantkit's own: folder, how to make a module to fill, and a batch."""
    x, ids = normal(3, 16), tokens(1, 4)
    kinds: list[tuple[Any, str]] = [
        ("smoothquant", "w8a8"), ("rptq", "w8a8"), (["llm_int8", "rptq"], "w8a8-asym"), ("hadamard", "w4a8-g16"),
        (quantkit.LLMInt8(columns=2), "w8a8"), ("rtn", "w8a8-static-asym"), ("rptq", "w4a4-static"),
    ]  # fmt: skip
    bases: list[tuple[Path, Callable[[], nn.Module] | None, Any]] = []
    for index, (method, scheme) in enumerate(kinds):
        model = quantkit.quantize(mlp(), method, calibration=[normal(2, 9, 16)], scheme=scheme, progress=False)
        bases.append((quantkit.save(model, folder / f"mlp{index}"), mlp, x))
    for index, (make, method, scheme) in enumerate(
        [(llama, "rptq", "w4a8-static-kv4"), (gpt2, "llm_int8", "w8a8"), (llama, "rotate", "w8a8")]
    ):
        bases.append((quantkit.save(quantized(make(), method, scheme=scheme), folder / f"model{index}"), None, ids))
    return bases


def other_bases(folder: Path) -> list[tuple[Path, Callable[[], nn.Module] | None, Any]]:
    """Folders in the compressed-tensors layout, in one file and in several."""
    ids = tokens(1, 4)
    one = dict[str, Any](num_hidden_layers=1)
    return [
        (quantkit.export(quantized(llama(**one), "rtn"), folder / "one"), None, ids),
        (quantkit.export(quantized(llama(**one), "rtn", scheme="w8a8-static"), folder / "many", shard_bytes=8000), None, ids),
        (quantkit.export(quantized(llama(**one), "smoothquant", scheme="w8a8-asym"), folder / "asym"), None, ids),
    ]


# ---- the attack


def attack(count: int, seed: int = 0, *, bases: Callable[[Path], Any] = own_bases) -> dict[str, Any]:
    """Change and open so many checkpoints."""
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as place:
        known = bases(Path(place))
        return isolated.run_all(count, functools.partial(one, Path(place), known, seed), OUTCOMES)


def one(place: Path, known: list[Any], seed: int, case: int) -> str:
    """One case: what became of it."""
    dice = random.Random(f"{seed} {case}")
    base, make, batch = dice.choice(known)
    folder = place / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        files = sorted(p for p in folder.iterdir() if p.suffix in CHANGES and p.is_file() and not p.is_symlink())
        if files:
            path = dice.choice(files)
            dice.choice(CHANGES[path.suffix])(path, dice)
    sign(folder, dice)
    model = make() if make else None
    try:
        with torch.no_grad():
            opened = quantkit.load(folder, model=model, verify=dice.random() < 0.5)
    except CheckpointError as error:
        if any(ord(c) < 32 and c != "\n" for c in str(error)):
            return f"an escape in the message: {error!r}"
        return "refused"
    return judged(opened, batch)


def judged(model: nn.Module, batch: Any) -> str:
    """What has been opened has values that make sense, and computes what the reference does."""
    for name, module in model.named_modules():
        fault = value_fault(module.operand) if isinstance(module, W8A8Linear) else None
        if isinstance(module, AttentionQuantizer):
            fault = module.damage_in(dict(module.named_buffers(recurse=False)))
        if fault:
            return f"nonsense accepted: {name}: {fault}"
    str(quantkit.report(model))
    both = []
    for backend in ("cpu", "reference"):
        try:
            with torch.no_grad(), quantkit.use_backend(backend):
                both.append(tensors_in(copy.deepcopy(model)(batch)))
        except (quantkit.QuantkitError, IndexError):  # fewer tokens than there were
            return "opened, and its input is refused"
        except Exception as error:
            if any(
                re.search(r"/quantkit/(core|layers|ops)/", frame.filename)
                for frame in traceback.extract_tb(error.__traceback__)[1:]
            ):
                raise
            return "opened, and the class of the model fails"
    same = all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan()) for a, b in zip(*both, strict=True)
    )
    return "opened" if same else "opened, and computes something else than the reference"

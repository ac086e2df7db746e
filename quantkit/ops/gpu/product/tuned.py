"""What ``quantkit tune`` found on this device: a file with the fastest kernel and setting for shapes that were measured."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantkit._version import __version__
from quantkit.ops.gpu.product.tiles import Config, Decode, Gemm, Tile, Vector

log = logging.getLogger("quantkit")

KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Tile, Gemm, Decode, Vector)}
"""The name of a kernel in the file -> the class of its settings."""


def cache_path(device: torch.device) -> Path:
    """The file of tuned choices for this device, Triton and quantkit; under ``QUANTKIT_CACHE`` or ``~/.cache/quantkit``."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkit"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    parts = (name, f"triton-{version('triton')}", f"quantkit-{__version__}")
    return Path(os.environ.get("QUANTKIT_CACHE") or home) / (re.sub(r"[^\w.-]+", "-", "_".join(parts)).lower() + ".json")


@functools.cache
def tuned(device: torch.device) -> dict[tuple[int, int], list[tuple[int, Config]]]:
    """(N, K) -> (most tokens, choice), ascending. A file that cannot be read counts as none, and is named in the log."""
    if device.type != "cuda":
        return {}
    path = cache_path(device)
    try:
        if not path.exists():
            return {}
        return parse(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning(
            "%s is not a table of `quantkit tune` (%s): the built-in one is used. Tune again or delete it.", path, error
        )
        return {}


def tuned_config(device: torch.device, m: int, n: int, k: int) -> Config | None:
    """The tuned choice for the next larger number of tokens that was measured."""
    return next((config for most, config in tuned(device).get((n, k), ()) if m <= most), None)


def parse(table: dict[str, dict[str, dict[str, Any]]]) -> dict[tuple[int, int], list[tuple[int, Config]]]:
    """``{"NxK": {"tokens": {"kernel": ..., ...}}}`` as the kernels' dataclasses."""
    out = {}
    for shape, rows in table.items():
        n, k = map(int, shape.split("x"))
        found = []
        for tokens, fields in rows.items():
            kind = KINDS[fields["kernel"]]
            found.append((int(tokens), kind(**{name: value for name, value in fields.items() if name != "kernel"})))
        out[n, k] = sorted(found, key=lambda row: row[0])
    return out


def as_json(config: Config) -> dict[str, Any]:
    """What :func:`parse` reads."""
    return {"kernel": type(config).__name__} | asdict(config)

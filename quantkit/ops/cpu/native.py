"""Builds and binds ``native.c``: the passes around the integer product that eager PyTorch has no fused operator for.

Like Triton's and Inductor's own launchers it is compiled at first use (about a second, then cached for this compiler, source
and processor). Without a C compiler, or with ``QUANTKIT_NATIVE=0``, the same arithmetic runs on PyTorch's operators.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

log = logging.getLogger("quantkit")

SOURCE = Path(__file__).with_name("native.c")
# No -ffast-math and no contraction: results equal numerics.py bit for bit.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "quantkit_quantize": (POINTER, POINTER, POINTER, POINTER, POINTER, LONG, LONG, FLOAT, INT, INT),
    "quantkit_group": (*[POINTER] * 4, LONG, POINTER, LONG, POINTER, LONG, LONG, INT),
    "quantkit_finish": (POINTER, POINTER, POINTER, POINTER, POINTER, LONG, LONG, INT, INT),
    "quantkit_token": (*[POINTER] * 8, LONG, LONG, FLOAT, INT, INT),
}


TILE = 64
"""``factors`` of a rewrite are padded to a multiple of this."""


class Rewrite(ctypes.Structure):
    """``struct rewrite``: addresses of ``[K]`` vectors, whose tensors the caller keeps alive, or None."""

    _fields_ = (("order", POINTER), ("shift", POINTER), ("scale", POINTER), ("factors", POINTER), ("block", LONG))


class Groups(ctypes.Structure):
    """``struct groups``: addresses of sizes int64 and shares float32, ``[G]``, and of multipliers of rows ``[G, N]`` int32."""

    _fields_ = (("count", LONG), ("sizes", POINTER), ("shares", POINTER), ("row_multipliers", POINTER))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it cannot be built; says once why."""
    if os.environ.get("QUANTKIT_NATIVE") == "0":
        log.info("QUANTKIT_NATIVE=0: INT8 layers run on PyTorch's own operators, slower for few tokens")
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        log.info("no C compiler found: INT8 layers run on PyTorch's own operators, slower for few tokens")
        return None
    errors = []
    # torch's OpenMP runtime is loaded already and must stay the only one: compile for it, but link no other.
    for extra in (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",)):
        try:
            return _bind(ctypes.CDLL(str(_built(compiler, (*FLAGS, *extra)))))
        except (OSError, subprocess.SubprocessError) as error:
            errors.append(getattr(error, "stderr", None) or str(error))
    log.warning("the CPU kernels could not be built, so PyTorch's own operators run: %s", errors[0].strip()[:500])
    return None


def _bind(lib: ctypes.CDLL) -> ctypes.CDLL:
    for name, types in SIGNATURES.items():
        getattr(lib, name).argtypes = types
        getattr(lib, name).restype = None if name in ("quantkit_finish", "quantkit_group") else INT
    return lib


def _built(compiler: str, flags: tuple[str, ...]) -> Path:
    key = hashlib.sha256("\0".join([SOURCE.read_text(), compiler, *flags, torch.__version__, _processor()]).encode())
    target = _cache() / f"native-{key.hexdigest()[:16]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            objects, shared = Path(folder, "native.o"), Path(folder, "native.so")
            subprocess.run(
                [compiler, *flags, "-c", SOURCE, "-o", objects], check=True, capture_output=True, text=True, timeout=120
            )
            subprocess.run(
                [compiler, "-shared", objects, "-o", shared], check=True, capture_output=True, text=True, timeout=120
            )
            os.replace(shared, target)  # two processes may build at once: the last one wins, with the same bytes
    return target


def _cache() -> Path:
    root = os.environ.get("QUANTKIT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "quantkit")
    folder = Path(root)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    except OSError:
        pass
    return _private_folder()


@functools.cache
def _private_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="quantkit-"))  # read-only home: build once for each process


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        return platform.processor()

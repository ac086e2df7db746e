"""Binds ``native.c``: the passes around the integer product that eager PyTorch has no fused operator for.

It is compiled at first use. Without a C compiler, or with ``QUANTKIT_NATIVE=0``, PyTorch's operators do the same arithmetic.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from pathlib import Path

from quantkit.ops.build import BuildError, NoCompilerError, Source

log = logging.getLogger("quantkit")

SOURCE = Source(
    "native",
    Path(__file__).with_name("native.c"),
    (Path(__file__).with_name("program.c"),),
    # No -ffast-math and no contraction: results equal numerics.py bit for bit.
    ("-std=gnu11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # torch's OpenMP runtime is loaded already and must stay the only one: compile for it, but link no other.
    (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",)),
)
POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "quantkit_quantize": (POINTER, POINTER, POINTER, POINTER, POINTER, LONG, LONG, FLOAT, INT, INT),
    "quantkit_group": (*[POINTER] * 4, LONG, POINTER, LONG, POINTER, LONG, LONG, INT),
    "quantkit_finish": (POINTER, POINTER, POINTER, POINTER, POINTER, LONG, LONG, INT, INT),
    "quantkit_token": (*[POINTER] * 8, LONG, LONG, FLOAT, INT, INT),
    "quantkit_run": (POINTER, LONG, INT),
}

RESULTS = {"quantkit_finish": None, "quantkit_group": None, "quantkit_run": LONG}

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
    """The compiled library, or None where it cannot be built or loaded; says once why."""
    if os.environ.get("QUANTKIT_NATIVE") == "0":
        log.info("QUANTKIT_NATIVE=0: INT8 layers run on PyTorch's own operators, slower for few tokens")
        return None
    try:
        return _bind(SOURCE.load(lambda path: ctypes.CDLL(str(path))))
    except NoCompilerError as error:
        log.info("%s: INT8 layers run on PyTorch's own operators, slower for few tokens", error)
    except BuildError as error:
        log.warning("the CPU kernels could not be built, so PyTorch's own operators run: %s", error)
    return None


def _bind(lib: ctypes.CDLL) -> ctypes.CDLL:
    for name, types in SIGNATURES.items():
        getattr(lib, name).argtypes = types
        getattr(lib, name).restype = RESULTS.get(name, INT)
    return lib

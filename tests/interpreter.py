"""Triton's interpreter, which runs our kernels on the CPU: it rounds as GPUs do, and does no work twice.

The short cuts change no value. Without them more than half of the time of a kernel goes into what they leave out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.language import core
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


def fma(_: Any, x: Any, y: Any, z: Any) -> Any:
    """Rounded once, as GPUs do it. Triton's interpreter rounds twice."""
    wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that a kernel calls. Triton would look through its whole language for things to patch in every call."""
    if function.fn not in function.rewritten_fn:
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*args, **kwargs)


def np_dtype(of: Any) -> np.dtype[Any]:
    """The type of NumPy for one of Triton, which would make a table of all types for each question."""
    scalar = of.scalar
    if (found := KNOWN.get(scalar.name)) is None:
        found = KNOWN[scalar.name] = plain_np_dtype(scalar)
    return found


def type_of_shape(values: list[Any], fields: Any = None) -> Any:
    """The type of a tuple by its values, as which each tensor has its shape, twice."""
    key = tuple([(type(value), getattr(value, "value", value)) for value in values])
    if fields is not None or not all(kind in (int, core.constexpr) and type(value) is int for kind, value in key):
        return plain_type(values, fields)
    if (found := SHAPES.get(key)) is None:
        found = SHAPES[key] = plain_type(values)
    return found


KNOWN: dict[str, np.dtype[Any]] = {}
SHAPES: dict[tuple[tuple[type, int], ...], Any] = {}
plain_np_dtype, plain_type = interpreter._get_np_dtype, core._type_for_tuple_values


def set_up() -> None:
    """Once, before any kernel runs."""
    InterpreterBuilder.create_fma = fma
    InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = np_dtype
    core._type_for_tuple_values = type_of_shape

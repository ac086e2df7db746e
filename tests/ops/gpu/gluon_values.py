"""What a Gluon kernel computes, without a GPU: its Python runs with torch in place of Gluon's operators.

Values only: layouts mean nothing here, shared memory is a variable, programs run one after the other, inline assembly is
replaced by what it stands for. Triton's interpreter does not know Gluon.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class DType:
    def __init__(self, torch_dtype: torch.dtype) -> None:
        self.torch = torch_dtype

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DType) and self.torch == other.torch


class Value:
    """A tensor of a kernel, or a scalar of it."""

    def __init__(self, of: Tensor | bool | int) -> None:
        self.of = torch.as_tensor(of)
        self.shape, self.dtype = list(self.of.shape), DType(self.of.dtype)
        self.type = types.SimpleNamespace(layout=None)

    def to(self, dtype: DType, bitcast: bool = False) -> Value:
        return Value(self.of.contiguous().view(dtype.torch) if bitcast else self.of.to(dtype.torch))

    def reshape(self, shape: Sequence[int]) -> Value:
        return Value(self.of.reshape(list(shape)))

    def permute(self, dims: Sequence[int]) -> Value:
        return Value(self.of.permute(list(dims)))

    def split(self) -> tuple[Value, ...]:
        return tuple(map(Value, self.of.unbind(-1)))

    def __getitem__(self, index: Any) -> Value:
        return Value(self.of[index])

    def __rtruediv__(self, other: float) -> Value:
        return Value(torch.full_like(self.of, other) / self.of)


def plain(value: Any) -> Any:
    return value.of if isinstance(value, Value) else value


for _name in ("add", "sub", "mul", "truediv", "floordiv", "and_", "or_", "lshift", "rshift", "lt", "le", "gt", "ge", "eq"):
    _of = getattr(operator, _name)
    setattr(Value, f"__{_name.rstrip('_')}__", lambda self, other, of=_of: Value(of(self.of, plain(other))))

Value.__radd__, Value.__rmul__ = Value.__add__, Value.__mul__


class Pointer:
    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=DType(memory.dtype))

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + plain(other))

    def at(self, mask: Any) -> tuple[Tensor, Tensor]:
        offset, mask = torch.broadcast_tensors(torch.as_tensor(self.offset), torch.as_tensor(plain(mask)))
        reached = offset[mask]
        assert not ((reached < 0) | (reached >= self.memory.numel())).any(), "outside of the memory of a pointer"
        return offset.long(), mask


class Shared:
    """Shared memory between programs' threads: what was stored there."""

    def __init__(self, dtype: DType, shape: Sequence[int], layout: Any) -> None:
        self.shape = list(shape)

    def store(self, value: Value) -> None:
        assert value.shape == self.shape
        self.kept = value.of.clone()

    def load(self, layout: Any) -> Value:
        return Value(self.kept)


def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Value:
    offset, mask = pointer.at(mask)
    found = pointer.memory.reshape(-1)[torch.where(mask, offset, 0)]
    return Value(torch.where(mask, found, torch.as_tensor(other).to(found.dtype)))


def store(pointer: Pointer, value: Value, mask: Any = True) -> None:
    offset, mask = pointer.at(mask)
    pointer.memory.view(-1)[offset[mask]] = value.of.expand(mask.shape)[mask].to(pointer.memory.dtype)


def same_dtype(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Numbers take the dtype of the tensor beside them."""
    a, b = plain(a), plain(b)
    dtype = a.dtype if isinstance(a, Tensor) else b.dtype if isinstance(b, Tensor) else None
    return torch.as_tensor(a, dtype=dtype), torch.as_tensor(b, dtype=dtype)


def gather(values: Value, index: Value, axis: int) -> Value:
    assert ((index.of >= 0) & (index.of < values.shape[axis])).all(), "a gather outside of its values"
    return Value(values.of.gather(axis, index.of.long()))


def folded(values: Any, axis: int, combine: Callable[..., Any]) -> Iterator[list[Value]]:
    parts = [value.of.unbind(axis) for value in (values if isinstance(values, tuple) else (values,))]
    kept = [Value(part[0]) for part in parts]
    yield kept
    for i in range(1, len(parts[0])):
        result = combine(*kept, *(Value(part[i]) for part in parts))
        kept = list(result) if isinstance(result, tuple) else [result]
        yield kept


def reduce(values: Any, axis: int, combine: Callable[..., Any]) -> Any:
    *_, last = folded(values, axis, combine)
    return tuple(last) if isinstance(values, tuple) else last[0]


def scan(values: Value, axis: int, combine: Callable[..., Any]) -> Value:
    return Value(torch.stack([kept[0].of for kept in folded(values, axis, combine)], axis))


class Program:
    """Stands for ``gluon.language`` in one of ``count`` programs."""

    constexpr = int
    SliceLayout = BlockedLayout = SwizzledSharedLayout = staticmethod(lambda *_: None)
    float32, float16, bfloat16, int8, int32, int64 = map(
        DType, (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64)
    )
    allocate_shared_memory = Shared
    load, store, gather, reduce, associative_scan = map(staticmethod, (load, store, gather, reduce, scan))

    def __init__(self, number: int, count: int, warps: int) -> None:
        self.program_id, self.num_programs = (lambda axis: Value(number)), (lambda axis: count)
        self.num_warps = lambda: warps
        self.thread_barrier = lambda: None
        self.arange = lambda start, end, layout: Value(torch.arange(start, end, dtype=torch.int32))
        self.convert_layout = lambda value, layout: value
        self.cast = lambda value, dtype: value.to(dtype)
        self.where = lambda mask, a, b: Value(torch.where(mask.of, *same_dtype(a, b)))
        self.maximum = lambda a, b: Value(torch.maximum(*same_dtype(a, b)))
        self.max = lambda value, axis: Value(value.of.amax(axis))
        self.abs, self.sqrt_rn = (lambda value: Value(value.of.abs())), (lambda value: Value(value.of.sqrt()))
        self.div_rn = lambda a, b: Value(a.of / b.of)
        self.ceil, self.expand_dims = (
            (lambda value: Value(value.of.ceil())),
            (lambda value, axis: Value(value.of.unsqueeze(axis))),
        )
        self.fma = lambda a, b, c: Value((a.of.double() * b.of.double() + c.of.double()).float())
        self.full = lambda shape, value, dtype, layout=None: Value(torch.full(shape, value, dtype=dtype.torch))
        self.full_like = lambda value, number: Value(torch.full_like(value.of, number))
        self.zeros = lambda shape, dtype, layout=None: Value(torch.zeros(shape, dtype=dtype.torch))
        self.zeros_like = lambda value: Value(torch.zeros_like(value.of))
        self.join = lambda a, b: Value(torch.stack([a.of, b.of], -1))
        self.broadcast = lambda a, b: tuple(map(Value, torch.broadcast_tensors(a.of, b.of)))


def rows_of(start: Any, end: int, step: int) -> Iterator[Value]:
    return (Value(i) for i in range(int(plain(start)), end, step))


def on_cpu(kernel: Any, program: Program, **replaced: Callable[..., Any]) -> Callable[..., Any]:
    """The Python of a ``gluon.jit`` function, with that of all it calls; layouts are left out, ``replaced`` put in by name."""
    function = kernel.fn
    names = {"gl": program, "range": rows_of, "gdc_wait": lambda: None, "gdc_launch_dependents": lambda: None}
    for name in function.__code__.co_names:
        found = function.__globals__.get(name)
        if name in replaced:
            names[name] = replaced[name]
        elif type(found).__name__ == "GluonJITFunction":
            names[name] = on_cpu(found, program, **replaced)
        elif type(found).__name__ == "ConstexprFunction":
            names[name] = lambda *_: None
        elif found is not None and name not in names:
            names[name] = getattr(found, "value", found)
    return types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)

"""Operations of a token as one list for ``program.c``, which runs it without PyTorch.

:func:`lowered` says what C can do of what PyTorch did: operators on float32 and bfloat16, and on integers what positions take.
Addresses are part of the list, so all tensors have to stay where they are; a :class:`Program` keeps them.

What C computes is what PyTorch computes, but for the order of sums and the last bit of exponentials and the like.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.ops.cpu.backend import CPUPrepared, Passes
from quantkit.ops.cpu.native import LONG, POINTER, TILE, library

OPS = (
    "add", "sub", "mul", "div", "le", "lt", "ge", "gt", "eq", "ne", "and", "or", "where", "copy", "neg", "rsqrt", "sqrt",
    "square", "exp", "silu", "relu", "tanh", "sigmoid", "gelu", "gelu_tanh", "cos", "sin", "mean", "layer_norm", "index_copy",
    "embedding", "attention", "linears",
)  # fmt: skip
"""In the order of the enumeration in C."""
CODE = {name: i for i, name in enumerate(OPS)}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int64: 2, torch.bool: 3}
FLOATS = (torch.float32, torch.bfloat16)
DIMS = 4
aten = torch.ops.aten


class View(ctypes.Structure):
    _fields_ = (("data", POINTER), ("strides", LONG * DIMS))


class Layer(ctypes.Structure):
    _fields_ = (*((name, POINTER) for name in ("y", "w", "sums", "sw", "bias", "c")), ("n", LONG))


class Mask(ctypes.Structure):
    _fields_ = (("data", POINTER), ("strides", LONG * DIMS), ("type", LONG))


class Instruction(ctypes.Structure):
    _fields_ = (
        ("op", LONG), ("type", LONG), ("to", LONG), ("sizes", LONG * DIMS), ("out", View), ("a", View), ("b", View),
        ("c", View), ("scalar", ctypes.c_double), ("how", POINTER), ("layers", POINTER), ("count", LONG), ("k", LONG),
        ("scratch", POINTER),
    )  # fmt: skip


@dataclass
class Readers:
    """Layers that read the same rows in one operation.

    Attributes:
        at: place of the operation in the list.
        x: the rows.
        passes: of the first of them.
        layers: all of them.
    """

    at: int
    x: Tensor
    passes: Passes
    layers: list[Layer]

    def joins(self, other: Passes) -> bool:
        """Whether ``other`` makes the same codes of the rows."""
        a, b = self.passes, other
        vectors = ((a.order, b.order), (a.shift, b.shift), (a.pre_scale, b.pre_scale), (a.factors, b.factors))
        same = all(u is v or (u is not None and v is not None and torch.equal(u, v)) for u, v in vectors)
        return same and (a.block, a.top, a.groups) == (b.block, b.top, b.groups)


class Program:
    """A list of operations under way, and what they read and write."""

    def __init__(self) -> None:
        self.list: list[Instruction] = []
        self.alive: list[Any] = []
        self.readers: list[Readers] = []
        self._written: list[set[int]] = []
        self._array: Any = None

    def add(self, instruction: Instruction, *alive: Any, written: Iterable[Tensor] = ()) -> None:
        self.list.append(instruction)
        self.alive += alive
        self._written.append({t.untyped_storage().data_ptr() for t in written})

    def reading(self, x: Tensor) -> Readers | None:
        """The layers that read ``x``, if nothing has written there since."""
        memory = x.untyped_storage().data_ptr()
        for readers in reversed(self.readers):
            if readers.x.data_ptr() == x.data_ptr() and readers.x.shape == x.shape:
                later = self._written[readers.at :]
                return readers if not any(memory in written for written in later) else None
        return None

    def run(self, threads: int) -> None:
        """Raises IndexError where an index points outside of its tensor."""
        if self._array is None:
            for readers in self.readers:
                layers = (Layer * len(readers.layers))(*readers.layers)
                self.list[readers.at].layers, self.list[readers.at].count = ctypes.addressof(layers), len(layers)
                self.alive.append(layers)
            self._array = (Instruction * len(self.list))(*self.list)
        lib = library()
        assert lib is not None
        if at := lib.quantkit_run(ctypes.addressof(self._array), len(self.list), threads):
            raise IndexError(f"an index points outside of its tensor (in {OPS[self.list[at - 1].op]})")


# ---- views


def view(tensor: Tensor, shape: Sequence[int], kept: Sequence[int]) -> View:
    """``tensor`` broadcast to ``shape``, with the axes ``kept`` of it, the last of them innermost."""
    strides = tensor.expand(shape).stride()
    return View(tensor.data_ptr(), (LONG * DIMS)(*[0] * (DIMS - len(kept)), *(strides[axis] for axis in kept)))


def instruction(name: str, out: Tensor, *tensors: Tensor, type_: torch.dtype | None = None) -> Instruction | None:
    """An operation on every element; None where it has too many axes or another type."""
    shape = tuple(out.shape)
    kept = [axis for axis, size in enumerate(shape) if size != 1]
    if len(kept) > DIMS or (type_ or out.dtype) not in TYPES:
        return None
    made = Instruction(op=CODE[name], type=TYPES[type_ or out.dtype], to=TYPES[out.dtype], out=view(out, shape, kept))
    made.sizes = (LONG * DIMS)(*[1] * (DIMS - len(kept)), *(shape[axis] for axis in kept))
    made.a = made.b = made.c = view(tensors[0], shape, kept)
    for field, tensor in zip("abc", tensors, strict=False):
        setattr(made, field, view(tensor, shape, kept))
    return made


# ---- operators


def _scalar(value: Any, like: Tensor) -> Tensor | None:
    """A number as a tensor of the type in which PyTorch computes."""
    if isinstance(value, Tensor):
        return value if value.dtype == like.dtype else None
    if like.dtype == torch.int64 and not isinstance(value, int):
        return None
    return torch.tensor(value, dtype=like.dtype, device="cpu")


def _of_two(name: str, *, compares: bool = False) -> Callable[..., list[Instruction] | None]:
    def lower(program: Program, out: Tensor, a: Any, b: Any, *, alpha: Any = 1) -> list[Instruction] | None:
        like = a if isinstance(a, Tensor) else b
        if like.dtype not in (*FLOATS, torch.int64) or alpha != 1 or (not compares and out.dtype != like.dtype):
            return None
        if name == "div" and like.dtype not in FLOATS:
            return None
        first, second = _scalar(a, like), _scalar(b, like)
        if first is None or second is None:
            return None
        program.alive += (first, second)
        made = instruction(name, out, first, second, type_=like.dtype)
        return None if made is None else [made]

    return lower


def _of_one(name: str) -> Callable[..., list[Instruction] | None]:
    def lower(program: Program, out: Tensor, a: Tensor, *rest: Any, **options: Any) -> list[Instruction] | None:
        if out.dtype not in FLOATS or a.dtype != out.dtype or rest or options:
            return None
        made = instruction(name, out, a)
        return None if made is None else [made]

    return lower


def _logical(name: str) -> Callable[..., list[Instruction] | None]:
    def lower(program: Program, out: Tensor, a: Tensor, b: Tensor) -> list[Instruction] | None:
        if {out.dtype, a.dtype, b.dtype} != {torch.bool}:
            return None
        made = instruction(name, out, a, b)
        return None if made is None else [made]

    return lower


def _square(program: Program, out: Tensor, a: Tensor, power: Any) -> list[Instruction] | None:
    return _of_one("square")(program, out, a) if power == 2 else None


def _gelu(program: Program, out: Tensor, a: Tensor, *, approximate: str = "none") -> list[Instruction] | None:
    return _of_one("gelu" if approximate == "none" else "gelu_tanh")(program, out, a)


CASTS = (
    (torch.int64, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
)  # fmt: skip


def _copy(program: Program, out: Tensor, a: Tensor, *_: Any, **__: Any) -> list[Instruction] | None:
    fits = a.dtype == out.dtype or (a.dtype, out.dtype) in CASTS
    made = instruction("copy", out, a, type_=a.dtype) if fits else None
    return None if made is None else [made]


def _copy_to(program: Program, out: Tensor, target: Tensor, source: Tensor, *_: Any) -> list[Instruction] | None:
    return _copy(program, target, source)


def _cat(program: Program, out: Tensor, parts: Sequence[Tensor], dim: int = 0) -> list[Instruction] | None:
    made, at = [], 0
    for part in parts:
        if part.dtype != out.dtype or part.dim() != out.dim():
            return None
        made.append(instruction("copy", out.narrow(dim, at, part.shape[dim]), part))
        at += part.shape[dim]
    return None if None in made else made  # type: ignore[return-value]


def _where(program: Program, out: Tensor, condition: Tensor, a: Tensor, b: Tensor) -> list[Instruction] | None:
    if condition.dtype != torch.bool or out.dtype not in FLOATS or {a.dtype, b.dtype} != {out.dtype}:
        return None
    made = instruction("where", out, a, b, condition)
    return None if made is None else [made]


def _mean(program: Program, out: Tensor, a: Tensor, dim: Any, keepdim: bool = False, **_: Any) -> list[Instruction] | None:
    if a.dtype not in FLOATS or out.dtype != a.dtype or not a.dim() or [d % a.dim() for d in dim or ()] != [a.dim() - 1]:
        return None
    return _rows("mean", out if keepdim else out.unsqueeze(-1), a)


def _rows(name: str, out: Tensor, a: Tensor) -> list[Instruction] | None:
    """An operation on whole rows: the last axis stays the last, also where it has one element."""
    shape = tuple(a.shape)
    kept = [axis for axis, size in enumerate(shape[:-1]) if size != 1] + [len(shape) - 1]
    if len(kept) > DIMS:
        return None
    made = Instruction(op=CODE[name], type=TYPES[a.dtype], out=view(out, shape, kept), a=view(a, shape, kept))
    made.sizes = (LONG * DIMS)(*[1] * (DIMS - len(kept)), *(shape[axis] for axis in kept))
    return [made]


def _layer_norm(
    program: Program, out: Any, a: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> list[Instruction] | None:
    tensors = [t for t in (a, weight, bias) if t is not None]
    if (
        len(shape) != 1
        or a.dtype not in FLOATS
        or any(t.dtype != a.dtype for t in tensors)
        or any(not t.is_contiguous() for t in tensors[1:])
    ):
        return None
    made = _rows("layer_norm", out[0], a)
    if made is not None:
        made[0].scalar = eps
        made[0].b = View(None if weight is None else weight.data_ptr())
        made[0].c = View(None if bias is None else bias.data_ptr())
    return made


def _index_copy(program: Program, out: Tensor, target: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    """Axes beside the indexed one and the last are two at most."""
    last, dim = target.dim() - 1, dim % max(target.dim(), 1)
    if target.dtype not in FLOATS or source.dtype != target.dtype or source.dim() != target.dim() or dim == last:
        return None
    beside = [axis for axis in range(last) if axis != dim and source.shape[axis] != 1]
    if len(beside) > 2:
        return None
    axes = [*[None] * (2 - len(beside)), *beside, dim, last]

    def at(tensor: Tensor) -> View:
        return View(tensor.data_ptr(), (LONG * DIMS)(*(0 if axis is None else tensor.stride(axis) for axis in axes)))

    made = Instruction(op=CODE["index_copy"], type=TYPES[target.dtype], out=at(target), a=at(source), count=target.shape[dim])
    made.b = View(index.data_ptr(), (LONG * DIMS)(index.stride(0) if index.dim() else 0))
    made.sizes = (LONG * DIMS)(*(1 if axis is None else source.shape[axis] for axis in axes))
    return [made]


def _embedding(program: Program, out: Tensor, weight: Tensor, ids: Tensor, *_: Any) -> list[Instruction] | None:
    if weight.dtype not in FLOATS or ids.dtype != torch.int64 or not ids.is_contiguous() or weight.stride(1) != 1:
        return None
    made = Instruction(op=CODE["embedding"], type=TYPES[weight.dtype], count=len(weight))
    made.a = View(weight.data_ptr(), (LONG * DIMS)(0, 0, weight.stride(0), 1))
    made.b = View(ids.data_ptr(), (LONG * DIMS)(1))
    made.out = View(out.data_ptr(), (LONG * DIMS)(0, 0, out.shape[-1], 1))
    made.sizes = (LONG * DIMS)(1, 1, ids.numel(), out.shape[-1])
    return [made]


def attends(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, **_: Any) -> bool:
    """Whether C does this attention, whose keys and values may have fewer heads than the queries."""
    fits = q.dtype in FLOATS and {k.dtype, v.dtype} == {q.dtype} and all(t.stride(-1) == 1 for t in (q, k, v))
    one = not causal or k.shape[2] <= 1
    return fits and not dropout and one and v.shape[-1] == q.shape[-1] and k.shape[1] > 0 and not q.shape[1] % k.shape[1]


def _attention(
    program: Program, out: Any, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, *,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> list[Instruction] | None:  # fmt: skip
    y, keys = out[0], k.shape[2]
    if not attends(q, k, v, dropout, causal) or y.dtype != q.dtype or y.stride(-1) != 1:
        return None
    made = Instruction(op=CODE["attention"], type=TYPES[q.dtype], count=keys, k=q.shape[1] // k.shape[1])
    made.sizes = (LONG * DIMS)(*q.shape)
    for field, tensor in (("out", y), ("a", q), ("b", k), ("c", v)):
        setattr(made, field, View(tensor.data_ptr(), (LONG * DIMS)(*tensor.stride())))
    made.scalar = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if attn_mask is not None:
        if attn_mask.dtype not in (torch.bool, *FLOATS):
            return None
        strides = attn_mask.expand(*q.shape[:3], keys).stride()
        mask = Mask(attn_mask.data_ptr(), (LONG * DIMS)(*strides), TYPES[attn_mask.dtype])
        program.alive.append(mask)
        made.how = ctypes.addressof(mask)
    scratch = torch.empty(q.shape[:3].numel() * (keys + 2 * q.shape[-1]), dtype=torch.float32, device="cpu")
    program.alive.append(scratch)
    made.scratch = scratch.data_ptr()
    return [made]


LOWERED: dict[Any, Callable[..., list[Instruction] | None]] = {
    aten.add.Tensor: _of_two("add"), aten.sub.Tensor: _of_two("sub"), aten.mul.Tensor: _of_two("mul"),
    aten.div.Tensor: _of_two("div"), aten.add_.Tensor: _of_two("add"), aten.mul_.Tensor: _of_two("mul"),
    **{
        getattr(getattr(aten, name), kind): _of_two(name, compares=True)
        for name in ("le", "lt", "ge", "gt", "eq", "ne") for kind in ("Tensor", "Scalar")
    },
    aten.bitwise_and.Tensor: _logical("and"), aten.logical_and.default: _logical("and"),
    aten.bitwise_or.Tensor: _logical("or"), aten.logical_or.default: _logical("or"),
    **{
        getattr(aten, name).default: _of_one(name)
        for name in ("neg", "rsqrt", "sqrt", "exp", "silu", "relu", "tanh", "sigmoid", "cos", "sin")
    },
    aten.pow.Tensor_Scalar: _square, aten.gelu.default: _gelu, aten.clone.default: _copy, aten._to_copy.default: _copy,
    aten.copy_.default: _copy_to, aten.cat.default: _cat, aten.where.self: _where, aten.mean.dim: _mean,
    aten.native_layer_norm.default: _layer_norm, aten.index_copy_.default: _index_copy, aten.embedding.default: _embedding,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
}  # fmt: skip


def lowered(program: Program, operator: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> bool:
    """Append what ``operator`` did; False, and nothing is appended, where C cannot do it."""
    lower = LOWERED.get(operator)
    tensors = [t for t in _flat((args, kwargs, out)) if isinstance(t, Tensor)]
    if lower is None or any(
        t.device.type != "cpu" or t.layout != torch.strided or not t.numel() or t.is_neg() for t in tensors
    ):
        return False
    made = lower(program, out, *args, **kwargs)
    if made is None:
        return False
    written = [t for t in _flat((out, args[:1])) if isinstance(t, Tensor)]  # in place, it is the first argument
    for one in made:
        program.add(one, *tensors, written=written)
    return True


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _flat(part)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


MOST_ROWS = 16
"""PyTorch's product is faster for more rows."""


def lowered_layer(program: Program, prepared: Any, x: Tensor, y: Tensor) -> bool:
    """Append an INT8 layer of a few rows ``x [..., K]`` to ``y [..., N]``; one that reads the same rows as another joins it."""
    k = x.shape[-1]
    rows = x.numel() // max(k, 1)
    if not isinstance(prepared, CPUPrepared) or not prepared.fused or x.dtype not in FLOATS or not 0 < rows <= MOST_ROWS:
        return False
    passes = prepared.passes
    how, codes, sums, scale, bias, groups = passes.pointers
    layer = Layer(y.data_ptr(), codes, sums, scale, bias, groups, passes.n)
    alike = program.reading(x) if not passes.groups else None
    if alike is not None and alike.joins(passes):
        alike.layers.append(layer)
        program.alive += (prepared, y)
        return True
    convert, count = how is not None or x.dtype != torch.float32, len(passes.groups) or 1
    room = (-(-k // TILE) * TILE if convert else 0) + rows * (1 + count) + -(-rows * k // 4)
    scratch = torch.empty(room, dtype=torch.float32, device="cpu")
    made = Instruction(op=CODE["linears"], type=TYPES[x.dtype], a=View(x.data_ptr()), scalar=passes.top, how=how, k=k)
    made.sizes, made.scratch = (LONG * DIMS)(1, 1, rows, 1), scratch.data_ptr()
    program.readers.append(Readers(len(program.list), x, passes, [layer]))
    program.add(made, prepared, scratch, x, y)
    return True

"""CPU: exact INT8 products on VNNI through oneDNN, with the passes around them fused in C.

Chosen by measurement (benchmarks/cpu.py, docs/cpu.md): ``torch._int_mm`` needs no second copy of the weight, costs about
two microseconds to call, and is the fastest or close to it for most shapes; what surrounds it is ours. One token runs in
a single fused call. Under ``torch.compile`` all of it is one opaque operator, but for a single token without a rotation, whose
surroundings are plain torch that Inductor fuses: a call from compiled code costs more than they do.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.core.numerics import qmax
from quantkit.core.rotation import Rotation
from quantkit.ops.cpu.native import TILE, Clusters, Rewrite, library
from quantkit.ops.plain import Plain, shares_of
from quantkit.ops.reference import row_sums

if TYPE_CHECKING:
    from quantkit.layers.linear import W8A8Linear

TYPES = {torch.float32: 0, torch.bfloat16: 1}
TOKEN_ELEMENTS = 2**21
"""Weights up to this size run a single token in the fused call; beyond, oneDNN's wider blocking wins."""
ELEMENTS_PER_THREAD = 2**15
"""Less work than this is not worth waking a thread for."""


# Asked while tracing too, if the first call of a layer is a compiled one: Dynamo then runs these instead of tracing them.
@torch.compiler.assume_constant_result
def int_mm_is_exact() -> bool:
    """Whether ``torch._int_mm`` adds without saturating: true with VNNI, false on AVX2 and plain AVX-512."""
    return _measured_exact()


@torch.compiler.assume_constant_result
def _has_library() -> bool:
    return library() is not None


@functools.cache
def _measured_exact() -> bool:
    for rows in (1, 16):
        for value in (127, -127):
            a = torch.full((rows, 64), 127, dtype=torch.int8)
            b = torch.full((32, 64), value, dtype=torch.int8)
            if not bool((torch._int_mm(a, b.t()) == 127 * value * 64).all()):
                return False
    return True


@dataclass
class CPUPacked:
    """A weight ready to run.

    ``fused`` says whether the C passes apply. ``low`` is None where int_mm is exact; elsewhere
    ``weight = high + low``, with halves too small to saturate. ``order`` to ``block`` rewrite the input, as :class:`Rewrite`
    says, with vectors in the channels of the result.
    """

    backend: Any
    device: torch.device
    weight: Tensor
    high: Tensor
    low: Tensor | None
    sums: Tensor
    scale: Tensor
    bias: Tensor | None
    order: Tensor | None
    shift: Tensor | None
    pre_scale: Tensor | None
    factors: Tensor | None
    block: int
    top: float
    fused: bool
    groups: tuple[int, ...] = ()
    shares: Tensor | None = None
    of_rows: Tensor | None = None
    """Multiples of the weight's rows ``[G, N]`` int32."""

    @functools.cached_property
    def sizes(self) -> Tensor:
        return torch.tensor(self.groups)

    @functools.cached_property
    def clusters(self) -> Clusters | None:
        vectors = map(_address, (self.sizes, self.shares, self.of_rows))
        return Clusters(len(self.groups), *vectors) if self.groups else None

    @functools.cached_property
    def rewrite(self) -> Rewrite:
        return Rewrite(*map(_address, (self.order, self.shift, self.pre_scale, self.factors)), self.block)

    @functools.cached_property
    def pointers(self) -> tuple[int | None, ...]:
        """Addresses of rewrite, weight, sums, scale, bias and clusters, which this object keeps alive."""
        rewrites = any(t is not None for t in (self.order, self.shift, self.pre_scale, self.factors))
        parts = map(_address, (self.high, self.sums, self.scale, self.bias))
        return (
            ctypes.addressof(self.rewrite) if rewrites else None, *parts,
            None if self.clusters is None else ctypes.addressof(self.clusters),
        )  # fmt: skip


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class CPU(Plain):
    """See the module."""

    name = "cpu"

    def why_not(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "needs tensors in main memory"

    def pack(self, layer: W8A8Linear) -> CPUPacked:
        weight = layer.weight.contiguous()
        high, low = weight, None
        if not int_mm_is_exact():
            high = weight.clamp(-64, 64)  # two products of 255 * 64 fit the int16 that AVX2 adds them in
            low = weight - high
        fused = not layer.scheme.is_static and layer.scheme.symmetric and layer.outlier_index is None
        fused = fused and not layer.threshold
        order, block = layer.permutation, layer.rotation_block

        def ordered(vector: Tensor | None) -> Tensor | None:
            nonlocal fused
            fused = fused and (vector is None or vector.dtype == torch.float32)  # C reads it as it is
            return vector if vector is None or order is None else vector[order]

        factors = None
        if block:
            factors = Rotation(block, layer.rotation_signs).factors(layer.in_features).float()
            factors = torch.nn.functional.pad(factors, (0, -len(factors) % TILE))
        return CPUPacked(
            self, layer.weight.device, layer.weight, high, low,
            row_sums(weight, layer.groups), layer.weight_scale.float()[:, 0].contiguous(),
            None if layer.bias is None else layer.bias.float().contiguous(),
            None if order is None else order.to(torch.int32), ordered(layer.shift), ordered(layer.pre_scale), factors, block,
            float(qmax(layer.scheme.activation_bits)), fused and _has_library(),
            layer.groups, shares_of(layer), layer.weight_scale[:, 1:].t().to(torch.int32).contiguous(),
        )  # fmt: skip

    def matmul(self, layer: W8A8Linear, q: Tensor) -> Tensor:
        packed = layer.packed
        if torch.compiler.is_compiling():
            return torch.ops.quantkit.int_matmul(q, packed.high, packed.low)
        return int_matmul(q, packed.high, packed.low)

    def segments(self, layer: W8A8Linear, q: Tensor) -> Iterator[Tensor]:
        return _segments(layer.packed, q)

    def segment_sum(self, layer: W8A8Linear, q: Tensor, multiples: Tensor, zero: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling() or not _has_library() or not q.numel():
            return super().segment_sum(layer, q, multiples, zero)
        return _segment_sum(layer.packed, _segments(layer.packed, q, in_place=True), multiples, zero)

    def linear(self, layer: W8A8Linear, x: Tensor) -> Tensor:
        packed = layer.packed
        if not packed.fused or x.dtype not in TYPES or (packed.groups and torch.compiler.is_compiling()):
            return super().linear(layer, x)
        if torch.compiler.is_compiling():
            if x.shape[0] <= (0 if packed.block else 1):
                return super().linear(layer, x)
            parts = (packed.high, packed.low, packed.sums, packed.scale, packed.bias)
            rewrite = (packed.order, packed.shift, packed.pre_scale, packed.factors, packed.block)
            return torch.ops.quantkit.cpu_linear(x, *parts, *rewrite, packed.top)
        if not x.numel():
            return super().linear(layer, x)
        return _fused(packed, x.contiguous())


def _segments(packed: CPUPacked, q: Tensor, in_place: bool = False) -> Iterator[Tensor]:
    """The product of each cluster of channels, ``[M, N]`` int32, exact; with ``in_place`` each where the one before was.

    Memory that is allocated for each of them may be given back to the system in between, and is then five times as slow.
    """
    product = torch.ops.quantkit.int_matmul if torch.compiler.is_compiling() else int_matmul
    if in_place:
        product = functools.partial(int_matmul, out=torch.empty(len(q), len(packed.high), dtype=torch.int32))
    groups = packed.groups
    lows = [None] * len(groups) if packed.low is None else packed.low.split(groups, dim=1)
    for part, high, low in zip(q.split(groups, dim=1), packed.high.split(groups, dim=1), lows, strict=True):
        yield product(part, high, low)


def _segment_sum(packed: CPUPacked, products: Iterable[Tensor], multiples: Tensor, zero: Tensor | None) -> Tensor:
    """:func:`quantkit.ops.reference.segment_sum`, one pass for each cluster; ``multiples`` are columns of a scale."""
    lib, m, n, count = library(), len(multiples), len(packed.weight), len(packed.groups)
    assert lib is not None
    assert multiples.stride() == (1 + count, 1)
    acc = torch.empty(m, n, dtype=torch.int32)
    zero = None if zero is None else zero.contiguous()
    threads = min(torch.get_num_threads(), 1 + m * n // ELEMENTS_PER_THREAD, m)
    for g, product in enumerate(map(Tensor.contiguous, products)):
        lib.quantkit_segment(
            acc.data_ptr(), product.data_ptr(), multiples.data_ptr() - 4, packed.pointers[-1], g,
            None if zero is None else zero.data_ptr() + 4 * g, count if zero is not None and zero.dim() > 1 else 0,
            packed.sums[g].data_ptr(), m, n, threads,
        )  # fmt: skip
    return acc


def int_matmul(q: Tensor, high: Tensor, low: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """``q [M, K] @ (high + low) [N, K]^T``, int8 to int32, exact; it may be in ``out``."""
    if not q.numel() or not high.numel():
        return q.new_zeros(len(q), len(high), dtype=torch.int32)
    if q.shape[1] == 1:  # _int_mm of torch 2.13 leaves the result of a single product uninitialised
        weight = high.to(torch.int32) if low is None else high.to(torch.int32) + low
        return q.to(torch.int32) * weight.t()
    acc = torch._int_mm(q, high.t(), out=out)
    return acc if low is None else acc.add_(torch._int_mm(q, low.t()))


# Opaque to Inductor: with freezing it would turn _int_mm into an operator that is a thousand times slower for int8 inputs.
_library = torch.library.Library("quantkit", "FRAGMENT")
_library.define("int_matmul(Tensor q, Tensor high, Tensor? low) -> Tensor")
_library.impl("int_matmul", int_matmul, "CPU")


@torch.library.register_fake("quantkit::int_matmul")
def _(q: Tensor, high: Tensor, low: Tensor | None) -> Tensor:
    return q.new_empty(q.shape[0], high.shape[0], dtype=torch.int32)


_library.define(
    "cpu_linear(Tensor x, Tensor high, Tensor? low, Tensor sums, Tensor scale, Tensor? bias, Tensor? order, Tensor? shift, "
    "Tensor? pre_scale, Tensor? factors, int block, float top) -> Tensor"
)


def _cpu_linear(x: Tensor, high: Tensor, *rest: Any) -> Tensor:
    packed = CPUPacked(None, x.device, high, high, *rest, True)  # type: ignore[call-arg]  # the schema above
    return _fused(packed, x.contiguous())


_library.impl("cpu_linear", _cpu_linear, "CPU")


@torch.library.register_fake("quantkit::cpu_linear")
def _(x: Tensor, high: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], high.shape[0])


def _fused(packed: CPUPacked, x: Tensor) -> Tensor:
    lib, (m, k), n = library(), x.shape, packed.scale.shape[0]
    assert lib is not None
    kind, pool, (how, *weight, clusters) = TYPES[x.dtype], torch.get_num_threads(), packed.pointers
    if m == 1 and packed.low is None and n * k <= TOKEN_ELEMENTS:
        y = torch.empty(1, n, dtype=x.dtype)
        threads = min(pool, 1 + n * k // (8 * ELEMENTS_PER_THREAD))
        failed = lib.quantkit_token(y.data_ptr(), x.data_ptr(), how, *weight, clusters, n, k, packed.top, kind, threads)
    else:
        q, x_scale = torch.empty(m, k, dtype=torch.int8), torch.empty(m, 1 + len(packed.groups))
        threads = min(pool, 1 + m * k // ELEMENTS_PER_THREAD, m)
        failed = lib.quantkit_quantize(
            q.data_ptr(), x_scale.data_ptr(), x.data_ptr(), how, clusters, m, k, packed.top, kind, threads
        )
        if packed.groups:
            acc = _segment_sum(packed, _segments(packed, q, in_place=True), x_scale[:, 1:], None)
            x_scale = x_scale[:, 0].contiguous()
        else:
            acc = int_matmul(q, packed.high, packed.low)
        # float32 results take the place of the sums they come from
        y = acc.view(torch.float32) if kind == 0 else torch.empty(m, n, dtype=x.dtype)
        threads = min(pool, 1 + m * n // ELEMENTS_PER_THREAD, m)
        lib.quantkit_finish(y.data_ptr(), acc.data_ptr(), x_scale.data_ptr(), *weight[2:], m, n, kind, threads)
    if failed:
        raise MemoryError("no memory for the scratch buffers of an INT8 layer")
    return y

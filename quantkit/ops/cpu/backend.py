"""CPU: exact INT8 products on VNNI through oneDNN, with the passes around them fused in C.

Chosen by measurement (benchmarks/cpu.py, docs/cpu.md): ``torch._int_mm`` needs no second copy of the weight, costs about
two microseconds to call, and is the fastest or close to it for most shapes; what surrounds it is ours. Without VNNI it is
inexact or slow, so there float32 multiplies the codes, so few at a time that no sum is rounded. One token runs in a
single fused call. Under ``torch.compile`` all of it is one opaque operator, but for a single token without a rotation, whose
surroundings are plain torch that Inductor fuses: a call from compiled code costs more than they do.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.core.errors import BackendError, ModelError
from quantkit.core.formats import Quantized
from quantkit.core.operand import Operand
from quantkit.core.tracing import constant_while_tracing, demand_memory, in_memory
from quantkit.ops.cpu.native import TILE, Groups, Rewrite, library
from quantkit.ops.plain import Plain, PlainPrepared, other_than_bytes, other_than_w8a8, shares_of
from quantkit.ops.reference import row_sums

log = logging.getLogger("quantkit")
NO_VNNI = "the INT8 product of this processor %s, as without VNNI: float32 multiplies the codes, exactly, at its own pace"
TYPES = {torch.float32: 0, torch.bfloat16: 1}
EXACT_CHANNELS = 1024
"""Sums of so many products of two codes, 128 * 128 at most, are at most 2**24: float32 holds each of them, in any order."""
ELEMENTS_PER_THREAD = 2**15
"""Less work than this is not worth waking a thread for."""


# Asked while tracing too, if the first call of a layer is a compiled one: Dynamo then runs these instead of tracing them.
@constant_while_tracing
def _has_library() -> bool:
    return library() is not None


@constant_while_tracing
def _has_integer_product() -> bool:
    return has_integer_product()


@functools.cache
def has_integer_product() -> bool:
    """Whether ``torch._int_mm`` is a product for integers here: exact, and no slower than two float32 products.

    Both hold with VNNI. Without it, oneDNN saturates on some processors. On others, such as those with AVX2 alone, it falls
    back to plain loops, which take seven to sixty times as long as float32. That is far from the border on either side, and
    both ways give the same bits, so that a time may decide.
    """
    for rows in (1, 16):
        for value in (127, -127):
            a = torch.full((rows, 64), 127, dtype=torch.int8, device="cpu")
            b = torch.full((32, 64), value, dtype=torch.int8, device="cpu")
            if not bool((torch._int_mm(a, b.t()) == 127 * value * 64).all()):
                log.info(NO_VNNI, "is not exact")
                return False
    a, b = torch.ones(32, 512, dtype=torch.int8, device="cpu"), torch.ones(256, 512, dtype=torch.int8, device="cpu")
    fast = _seconds(lambda: torch._int_mm(a, b.t())) <= 2 * _seconds(lambda: float_matmul(a, b))
    if not fast:
        log.info(NO_VNNI, "is slow")
    return fast


def _seconds(run: Callable[[], Tensor]) -> float:
    """The shortest of four runs, of which the first is the slowest."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@dataclass(eq=False)
class Passes:
    """What the passes in C read. Vectors of the rewrite are in the order of the channels after it.

    Attributes:
        weight: ``[N, K]`` int8, contiguous.
        sums: ``[N]``, or ``[G, N]`` with groups, int32: sums of the codes of each row.
        scale: ``[N]`` float32, base scales.
        bias: ``[N]`` float32 or None.
        order, shift, pre_scale: ``[K]`` int32 and float32, or None.
        factors: ``[K]`` float32, padded to :data:`TILE`, by which a rotation begins; None without one.
        block: channels that the rotation mixes, 0 without one.
        top: the largest code of the activation.
        groups: sizes of groups of channels; empty for one.
        shares: ``[G]`` float32, :func:`quantkit.core.groups.shares`; None without groups.
        row_multipliers: ``[G, N]`` int32; None without groups.
    """

    weight: Tensor
    sums: Tensor
    scale: Tensor
    bias: Tensor | None
    order: Tensor | None
    shift: Tensor | None
    pre_scale: Tensor | None
    factors: Tensor | None
    block: int
    top: float
    groups: tuple[int, ...] = ()
    shares: Tensor | None = None
    row_multipliers: Tensor | None = None

    @functools.cached_property
    def n(self) -> int:
        return len(self.scale)

    @functools.cached_property
    def sizes(self) -> Tensor:
        return torch.tensor(self.groups, dtype=torch.int64, device="cpu")

    @functools.cached_property
    def groups_in_c(self) -> Groups | None:
        vectors = map(_address, (self.sizes, self.shares, self.row_multipliers))
        return Groups(len(self.groups), *vectors) if self.groups else None

    @functools.cached_property
    def rewrite_in_c(self) -> Rewrite:
        return Rewrite(*map(_address, (self.order, self.shift, self.pre_scale, self.factors)), self.block)

    @functools.cached_property
    def pointers(self) -> tuple[int | None, ...]:
        """Addresses of rewrite, weight, sums, scale, bias and groups, which this object keeps alive."""
        rewrites = any(t is not None for t in (self.order, self.shift, self.pre_scale, self.factors))
        parts = map(_address, (self.weight, self.sums, self.scale, self.bias))
        return (
            ctypes.addressof(self.rewrite_in_c) if rewrites else None, *parts,
            None if self.groups_in_c is None else ctypes.addressof(self.groups_in_c),
        )  # fmt: skip


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclass(eq=False)
class CPUPrepared(PlainPrepared):
    """An operand with what the passes in C read, and whether they do all of it (*fused*)."""

    passes: Passes
    fused: bool

    def run(self, x: Tensor) -> Tensor:
        passes = self.passes
        if not self.fused or x.dtype not in TYPES:
            return super().run(x)
        if in_memory(x) and x.is_cpu:
            x = x.contiguous()
            # no address: empty, or zeros that lie nowhere, or an error
            return _fused(passes, x, address) if (address := x.data_ptr()) else super().run(x)
        if x.device.type not in ("cpu", "meta"):
            raise BackendError(f"an INT8 layer on the CPU is called with a tensor on {x.device}: move one of them to the other")
        # one token's codes are a part of what Inductor makes, if its product by itself is quick as well
        alone = torch.compiler.is_compiling() and not passes.block and _has_integer_product()
        if passes.groups or (alone and x.shape[0] <= 1):
            return super().run(x)
        parts = (passes.weight, passes.sums, passes.scale, passes.bias)
        rewrite = (passes.order, passes.shift, passes.pre_scale, passes.factors, passes.block)
        return torch.ops.quantkit.cpu_linear(x, *parts, *rewrite, passes.top)

    def matmul(self, q: Tensor) -> Tensor:
        return _product(q)(q, self.passes.weight)

    def group_products(self, q: Tensor) -> Iterator[Tensor]:
        return _group_products(self.passes, q)

    def group_sum(self, q: Tensor, multipliers: Tensor, zero: Tensor | None) -> Tensor:
        if not in_memory(q) or not _has_library() or not q.numel():
            return super().group_sum(q, multipliers, zero)
        return _group_sum(self.passes, _group_products(self.passes, q, in_place=True), multipliers, zero)


class CPU(Plain):
    """The backend called ``"cpu"``."""

    name = "cpu"

    def why_not(self, operand: Operand | None, device: torch.device) -> str | None:
        if device.type != "cpu":
            return "needs tensors in main memory"
        return None if operand is None else other_than_bytes(operand)

    def why_simulated(self, operand: Operand) -> str | None:
        return other_than_w8a8(operand)

    def prepare(self, operand: Operand) -> CPUPrepared:
        codes, rewrite, input_ = operand.codes.contiguous(), operand.rewrite, operand.input
        number = input_.number if isinstance(input_, Quantized) else None
        fused = number is not None and number.symmetric and not operand.is_static
        fused = fused and rewrite.outliers is None and rewrite.threshold is None
        order, rotation, factors = rewrite.permutation, rewrite.rotation, None

        def ordered(vector: Tensor | None) -> Tensor | None:
            nonlocal fused
            fused = fused and (vector is None or vector.dtype == torch.float32)  # C reads it as it is
            return vector if vector is None or order is None else vector[order]

        if rotation is not None:
            factors = rotation.factors(operand.in_features).float()
            factors = torch.nn.functional.pad(factors, (0, -len(factors) % TILE))
        sums, shares = row_sums(codes, operand.groups), shares_of(operand)
        multipliers = operand.multipliers
        passes = Passes(
            codes, sums, operand.scale.float()[:, 0].contiguous(),
            None if operand.bias is None else operand.bias.float().contiguous(),
            None if order is None else order.to(torch.int32), ordered(rewrite.shift), ordered(rewrite.pre_scale), factors,
            0 if rotation is None else rotation.block, 0.0 if number is None else float(number.qmax),
            operand.groups, shares, None if multipliers is None else multipliers.t().to(torch.int32).contiguous(),
        )  # fmt: skip
        return CPUPrepared(operand, sums, shares, passes, fused and _has_library())


def _product(q: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """:func:`int_matmul`, or the operator of it."""
    return int_matmul if in_memory(q) else torch.ops.quantkit.int_matmul


def _group_products(passes: Passes, q: Tensor, in_place: bool = False) -> Iterator[Tensor]:
    """The product of each group of channels, ``[M, N]`` int32, exact; with ``in_place`` each where the one before was.

    Memory that is allocated for each of them may be given back to the system in between, and is then five times as slow.
    """
    product = _product(q)
    if in_place:
        product = functools.partial(int_matmul, out=torch.empty(len(q), len(passes.weight), dtype=torch.int32, device="cpu"))
    groups = passes.groups
    for part, weight in zip(q.split(groups, dim=1), passes.weight.split(groups, dim=1), strict=True):
        yield product(part, weight)


def _group_sum(passes: Passes, products: Iterable[Tensor], multipliers: Tensor, zero: Tensor | None) -> Tensor:
    """:func:`quantkit.ops.reference.group_sum`, one pass for each group; ``multipliers`` are columns of a scale."""
    lib, m, n, count = library(), len(multipliers), len(passes.weight), len(passes.groups)
    assert lib is not None
    assert multipliers.stride() == (1 + count, 1)
    acc = torch.empty(m, n, dtype=torch.int32, device="cpu")
    zero = None if zero is None else zero.contiguous()
    threads = min(torch.get_num_threads(), 1 + m * n // ELEMENTS_PER_THREAD, m)
    for g, product in enumerate(map(Tensor.contiguous, products)):
        lib.quantkit_group(
            acc.data_ptr(), product.data_ptr(), multipliers.data_ptr() - 4, passes.pointers[-1], g,
            None if zero is None else zero.data_ptr() + 4 * g, count if zero is not None and zero.dim() > 1 else 0,
            passes.sums[g].data_ptr(), m, n, threads,
        )  # fmt: skip
    return acc


def int_matmul(q: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``q [M, K] @ weight [N, K]^T``, int8 to int32, exact; it may be in ``out``."""
    if not q.numel() or not weight.numel():
        return q.new_zeros(len(q), len(weight), dtype=torch.int32)
    if q.shape[1] == 1:  # _int_mm of torch 2.13 leaves the result of a single product uninitialised
        return q.to(torch.int32) * weight.to(torch.int32).t()
    if has_integer_product():
        return torch._int_mm(q, weight.t(), out=out)
    return float_matmul(q, weight, out=out)


def float_matmul(q: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """:func:`int_matmul` in float32, :data:`EXACT_CHANNELS` at a time."""
    acc = q.new_empty(len(q), len(weight), dtype=torch.int32) if out is None else out
    product = q.new_empty(acc.shape, dtype=torch.float32)
    if q.shape[1] <= EXACT_CHANNELS:  # splitting takes longer than a small product
        torch.mm(q.float(), weight.float().t(), out=product)
        return acc.copy_(product)
    for i, (a, b) in enumerate(zip(q.split(EXACT_CHANNELS, dim=1), weight.split(EXACT_CHANNELS, dim=1), strict=True)):
        torch.mm(a.float(), b.float().t(), out=product)  # with out=, autocast does not turn it into a product of bfloat16
        acc.add_(product.to(torch.int32)) if i else acc.copy_(product)
    return acc


# Opaque to Inductor: with freezing it would turn _int_mm into an operator that is a thousand times slower for int8 inputs.
_library = torch.library.Library("quantkit", "FRAGMENT")
_library.define("int_matmul(Tensor q, Tensor weight) -> Tensor")
_library.impl("int_matmul", int_matmul, "CPU")


@torch.library.register_fake("quantkit::int_matmul")
def _(q: Tensor, weight: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], weight.shape[0], dtype=torch.int32)


_library.define(
    "cpu_linear(Tensor x, Tensor weight, Tensor sums, Tensor scale, Tensor? bias, Tensor? order, Tensor? shift, "
    "Tensor? pre_scale, Tensor? factors, int block, float top) -> Tensor"
)


def _cpu_linear(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    passes, x = Passes(weight, *rest), x.contiguous()  # the schema above
    if x.numel():
        demand_memory(x)
    return _fused(passes, x, x.data_ptr())


_library.impl("cpu_linear", _cpu_linear, "CPU")


@torch.library.register_fake("quantkit::cpu_linear")
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fused(passes: Passes, x: Tensor, address: int) -> Tensor:
    lib, (m, k) = library(), x.shape
    assert lib is not None
    (how, codes, *weight, groups), n = passes.pointers, passes.n
    if not codes or passes.weight.data_ptr() != codes:
        raise ModelError("the memory of an INT8 weight was given back, or moved, or is none: load the model again")
    kind, pool = TYPES[x.dtype], torch.get_num_threads()
    if m == 1:
        y = x.new_empty(1, n)  # twice as fast as torch.empty
        threads = min(pool, 1 + n * k // (8 * ELEMENTS_PER_THREAD))
        failed = lib.quantkit_token(y.data_ptr(), address, how, codes, *weight, groups, n, k, passes.top, kind, threads)
    else:
        q, x_scale = x.new_empty(m, k, dtype=torch.int8), x.new_empty(m, 1 + len(passes.groups), dtype=torch.float32)
        threads = min(pool, 1 + m * k // ELEMENTS_PER_THREAD, m)
        failed = lib.quantkit_quantize(q.data_ptr(), x_scale.data_ptr(), address, how, groups, m, k, passes.top, kind, threads)
        if passes.groups:
            acc = _group_sum(passes, _group_products(passes, q, in_place=True), x_scale[:, 1:], None)
            x_scale = x_scale[:, 0].contiguous()
        else:
            acc = int_matmul(q, passes.weight)
        # float32 results take the place of the sums they come from
        y = acc.view(torch.float32) if kind == 0 else x.new_empty(m, n)
        threads = min(pool, 1 + m * n // ELEMENTS_PER_THREAD, m)
        lib.quantkit_finish(y.data_ptr(), acc.data_ptr(), x_scale.data_ptr(), *weight[1:], m, n, kind, threads)
    if failed:
        raise MemoryError("no memory for the scratch buffers of an INT8 layer")
    return y

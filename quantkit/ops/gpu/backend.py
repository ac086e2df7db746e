"""The backend for GPUs with INT8 Tensor Cores: quantize, multiply and rescale in two launches, or in one for one token.

:mod:`.codes` turns activations into INT8 codes, :mod:`.product` multiplies them; both are reached through :mod:`.operators`.
This file decides what they are given: an operand is laid out once (:mod:`.packing`), and each call is then two operators.
Triton is imported with the operators, when an operand first runs on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.core.formats import Float, Quantized
from quantkit.core.groups import with_multipliers
from quantkit.core.operand import Operand
from quantkit.core.rewrite import Rewrite
from quantkit.core.tracing import constant_while_tracing, demand_memory, in_memory
from quantkit.ops.gpu import devices
from quantkit.ops.gpu.layout import BLOCK, padded, padded_side
from quantkit.ops.gpu.packing import alignment, narrow, places_of
from quantkit.ops.plain import Plain, PlainPrepared, other_than_bytes, other_than_w8a8, shares_of
from quantkit.ops.reference import row_sums

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of activations that the kernels read; others go through the reference operations."""


@dataclass(eq=False)
class GPUPrepared(PlainPrepared):
    """An operand laid out for the kernels.

    Attributes:
        codes: ``[N, P]`` int8, rows in whole steps of 16 bytes; with groups each of them begins at a whole step.
        scale: ``[N]`` float32, base scales; where groups have other multipliers than 1, ``[1 + G, N]``, these below.
        making: what the kernels that make codes are asked for, beside x: see :class:`.codes.request.CodesRequest`.
        wsum: sums of the codes for zero points, as in ``sums``; None where codes of activations have none.
        side_weight: ``[N, padded_side(n)]``, columns of the side product; None without outliers.
        pre_scale: ``[K]`` float32, the factors of channels, signs of the rotation included; None without.
        borders: ``[G + 1]`` int32, where groups begin and the last one ends; None without groups.
        align: a number that divides all borders.
        vector: whether one token may take the kernel that quantizes on its way in.
        finds_zero: whether zero points are found with the codes.
        bits: of codes of activations.
        again: calls the kernels once more as they were called before (:mod:`.launch`); None until they were.
    """

    codes: Tensor
    scale: Tensor
    making: dict[str, Any]
    wsum: Tensor | None
    side_weight: Tensor | None
    pre_scale: Tensor | None
    borders: Tensor | None
    align: int
    vector: bool
    finds_zero: bool
    bits: int
    again: Callable[[Tensor], Tensor | None] | None = None

    def run(self, x: Tensor) -> Tensor:
        if x.dtype not in DTYPES or not self.codes.numel():
            return super().run(x)
        ops = kernels()  # also under torch.compile: it registers the operators
        if not in_memory(x):
            return self._run(x, torch.ops.quantkit)
        if not x.data_ptr() and x.numel():
            return super().run(x)  # zeros that lie nowhere, or an error
        tensors = self._tensors()
        for tensor in tensors:
            demand_memory(tensor)
        family = launch().family_of(self._kind(), x, len(self.codes), tensors) if len(x) else None
        if family is None:
            return self._run(x, ops)
        y = launch().recorded(family, x, tensors, lambda x: self._run(x, ops))
        self.again = launch().library().Runner(family, tensors)
        return y

    def _tensors(self) -> tuple[Tensor, ...]:
        """All that kernels read."""
        operand = self.operand
        held = (
            self.codes, self.scale, self.wsum, self.side_weight, self.pre_scale, self.borders, operand.bias,
            operand.input_zero_point, *self.making.values(),
        )  # fmt: skip
        return tuple({id(t): t for t in held if isinstance(t, Tensor)}.values())

    def _kind(self) -> tuple[Any, ...]:
        """What its calls depend on beside them."""
        operand, making = self.operand, self.making.items()
        return (
            operand.facts, operand.bias is None, self.wsum is None, self.align, self.vector, self.finds_zero, self.bits,
            *((name, None if isinstance(value, Tensor) else value) for name, value in making),
        )  # fmt: skip

    def _run(self, x: Tensor, ops: Any) -> Tensor:
        if self.vector and x.shape[0] == 1:
            return ops.gemv(x, self.codes, self.scale, self.bits, self.operand.bias, self.pre_scale)
        made = ops.quantize(x, **self.making)
        if ops is not torch.ops.quantkit:
            launch().codes_made()
        return self._product(made, x, ops)

    def _product(self, made: list[Tensor], x: Tensor, ops: Any) -> Tensor:
        operand = self.operand
        if operand.rewrite.threshold is not None:
            q, scale, active = made
            return ops.matmul(q, scale, self.codes, self.scale, x.dtype, bias=operand.bias, side=x, active=active)
        zero = made[2] if self.finds_zero else operand.input_zero_point
        side = (None, None) if self.side_weight is None else (made[-1], self.side_weight.to(x.dtype))
        return ops.matmul(
            made[0], made[1], self.codes, self.scale, x.dtype, zero, self.wsum, operand.bias, *side, self.borders, self.align
        )

    # ---- in two parts, for those who know what else reads an activation, and what made it

    def why_not_apart(self, dtype: torch.dtype) -> str | None:
        """None if :meth:`made` and :meth:`multiplied` can be called by themselves, the former with a norm or gate in it."""
        if dtype not in DTYPES or not self.codes.numel():
            return "it does not run on its kernels"
        steps = {"threshold", "side_index"} & set(self.making)
        return f"it takes columns of the activation aside ({', '.join(steps)})" if steps else None

    def shares_codes(self, other: GPUPrepared) -> bool:
        """Whether codes that are made for the one serve the other. Compares values."""
        mine, theirs = self.making, other.making

        def same(a: Any, b: Any) -> bool:
            if not isinstance(a, Tensor) or not isinstance(b, Tensor):
                return bool(a == b)
            return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))

        return mine.keys() == theirs.keys() and all(same(mine[name], theirs[name]) for name in mine)

    def made(self, x: Tensor, **source: Any) -> list[Tensor]:
        """Codes of ``x [M, K]`` as the operator ``quantkit::quantize`` gives them; ``source`` are fields of its request."""
        given: list[Tensor] = kernels().quantize(x, **self.making, **source)
        return given

    def multiplied(self, made: list[Tensor], dtype: torch.dtype) -> Tensor:
        """``[M, N]`` of codes; :meth:`run` is this of :meth:`made`."""
        return self._product(made, made[0].new_empty(0, dtype=dtype), kernels())


class GPU(Plain):
    """The backend called ``"triton"``."""

    name = "triton"

    def why_not(self, operand: Operand | None, device: torch.device) -> str | None:
        return devices.why_not(device) or (None if operand is None else _why_not(operand))

    def why_simulated(self, operand: Operand) -> str | None:
        return other_than_w8a8(operand)

    def prepare(self, operand: Operand) -> PlainPrepared:
        if isinstance(operand.input, Float):  # multiplied as such, which is no business of these kernels
            return super().prepare(operand)
        number, k, rewrite = operand.input.number, operand.in_features, operand.rewrite
        codes, order = operand.codes.contiguous(), rewrite.permutation
        of_tokens, in_scale = shares_of(operand), operand.input_scale
        align, borders, group_of = alignment(operand.groups, operand.device), None, None
        if of_tokens is not None:
            free = order if align == BLOCK and rewrite.rotation is None else None
            borders, group_of, places = places_of(operand.groups, align, free, codes.device)
            in_scale = None if in_scale is None else with_multipliers(in_scale, of_tokens)
            width = 16 * len(group_of)
            codes = codes.new_zeros(len(codes), width).index_copy_(1, places, codes)
            if order is not None or width > k:
                channels = torch.arange(k, device=codes.device, dtype=torch.int64) if order is None else order
                order = torch.full((width,), -1, device=codes.device, dtype=torch.int64).index_copy_(0, places, channels)
        elif padded(k) != k:
            codes = F.pad(codes, (0, padded(k) - k))
        sums, pre_scale = row_sums(operand.codes, operand.groups), factors_of(rewrite)
        simple = number.symmetric and not operand.is_static and of_tokens is None
        asked = {
            "bits": number.bits, "symmetric": number.symmetric, "shift": rewrite.shift, "pre_scale": pre_scale,
            "permutation": None if order is None else narrow(order, k),
            "rotation": None if rewrite.rotation is None else rewrite.rotation.block,
            "side_index": rewrite.outliers, "side_mask": _mask_of(rewrite, k), "in_scale": in_scale,
            "in_zero": operand.input_zero_point, "clusters": group_of, "shares": of_tokens, "align": align,
            "threshold": rewrite.threshold,
        }  # fmt: skip
        making = {name: value for name, value in asked.items() if value is not None}
        return GPUPrepared(
            operand, sums, of_tokens, codes, _row_scales(operand), making,
            wsum=None if number.symmetric else sums, side_weight=_side_of(operand), pre_scale=pre_scale, borders=borders,
            align=align, vector=simple and not set(rewrite.steps) - {"pre_scale"},
            finds_zero=not number.symmetric and not operand.is_static, bits=number.bits,
        )  # fmt: skip


def _why_not(operand: Operand) -> str | None:
    """What of an operand the kernels cannot run, if anything."""
    if fault := other_than_bytes(operand):
        return fault
    if operand.rewrite.threshold is not None:
        if set(operand.rewrite.steps) != {"threshold"} or operand.groups:
            return "a threshold stands beside other steps of the rewrite, or groups"
        if not (isinstance(operand.input, Quantized) and operand.input.takes_threshold):
            return "a threshold stands beside static or asymmetric codes"
    return None


@constant_while_tracing
def _counts_by_row(multipliers: Tensor) -> bool:
    """Whether groups count differently in rows of a weight. Which values ``multipliers [N, G]`` have cannot be traced."""
    return bool((multipliers != 1).any())


def _row_scales(operand: Operand) -> Tensor:
    """``[N]``, or with multipliers that are not all 1 ``[1 + G, N]``, float32, contiguous."""
    by_row = operand.multipliers is not None and _counts_by_row(operand.multipliers)
    return (operand.weight_scale.t() if by_row else operand.scale[:, 0]).contiguous()


def _side_of(operand: Operand) -> Tensor | None:
    """The weight of the side product, padded to whole steps of columns."""
    side = operand.outlier_weight
    return None if side is None else F.pad(side, (0, padded_side(side.shape[1]) - side.shape[1])).contiguous()


def _mask_of(rewrite: Rewrite, k: int) -> Tensor | None:
    """``[K]`` int8, 1 at the outlier channels: the kernels would search their index for every channel."""
    index = rewrite.outliers
    return None if index is None else torch.zeros(k, dtype=torch.int8, device=index.device).index_fill(0, index, 1)


def factors_of(rewrite: Rewrite) -> Tensor | None:
    """Pre-scale and signs of the rotation as one factor of each channel of the input, ``[K]``; None without both."""
    signs = None if rewrite.rotation is None else rewrite.rotation.signs
    if signs is not None and rewrite.permutation is not None:
        signs = torch.empty_like(signs).index_copy_(0, rewrite.permutation, signs)
    if rewrite.pre_scale is None or signs is None:
        return signs if rewrite.pre_scale is None else rewrite.pre_scale
    return rewrite.pre_scale * signs


def launch() -> Any:
    """The module that launches kernels again; imported with them."""
    from quantkit.ops.gpu import launch

    return launch


@constant_while_tracing
def kernels() -> Any:
    """The module of operators; imports Triton, which takes a second, only where there is a GPU to use it."""
    from quantkit.ops.gpu import operators

    return operators

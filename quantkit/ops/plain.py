"""The reference operations as a backend: runs on any device, exact and slow. Others override what they do faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.core.errors import ModelError
from quantkit.core.formats import Float, Quantized, Storage
from quantkit.core.groups import shares
from quantkit.core.operand import Operand
from quantkit.core.tracing import demand_memory, in_memory
from quantkit.ops import reference


@dataclass(eq=False)
class PlainPrepared:
    """An operand with what its products need more than once.

    Attributes:
        operand: what is run.
        sums: sums of the codes in each row, for zero points: ``[N]`` int32, or ``[G, N]`` of each group of channels.
        shares: ``[G]`` float32, :func:`quantkit.core.groups.shares` of the groups of the input; None without.
    """

    operand: Operand
    sums: Tensor
    shares: Tensor | None

    def run(self, x: Tensor) -> Tensor:
        """``x [M, K]`` float to ``[M, N]`` in its dtype, one step after the other. Faster backends hand other dtypes here.

        Raises:
            ModelError: ``x`` is not floating point, or its memory or that of the codes was given back.
        """
        operand, dtype = self.operand, x.dtype
        if in_memory(x):
            demand_memory(operand.stored)
            if not x._is_zerotensor():  # zeros that lie nowhere, as autograd makes them, which PyTorch knows
                demand_memory(x)
        if not dtype.is_floating_point:
            raise ModelError(
                f"an INT8 layer of {operand.in_features} to {operand.out_features} features was called on a tensor of {dtype}: "
                "cast it to floating point before. If the model casts to the dtype of the layer's weight, which is integers, "
                "name the layer in ignore="
            )
        if isinstance(operand.input, Float):
            return self._run_float(x)
        x, side = operand.rewrite.apply(x)
        extra, columns, threshold = operand.bias, None, operand.rewrite.threshold
        if threshold is not None:
            large, columns = reference.reaching(x, threshold)
            product = torch.ops.quantkit.column_product(x, columns, operand.codes, operand.scale)
            extra = product if extra is None else product + extra.float()
            x = x.masked_fill(large, 0)
        q, scale, zero = self.quantized(x)
        if columns is not None:
            q = q.masked_fill(columns, 0)
        product = None
        if side is not None:
            assert operand.outlier_weight is not None
            # float64, so that no bit of float32 shows how the library splits the sum: a token is the same in any batch
            product = (side.double() @ operand.outlier_weight.double().t()).float()
        sums = None if zero is None else self.sums
        if operand.groups:
            multipliers, count = scale[:, 1:], len(operand.groups)
            if not operand.input_groups:  # the groups are those of the weight alone
                multipliers, zero = (
                    scale.new_ones(q.shape[0], count),
                    None if zero is None else zero.expand(*zero.shape[:-1], count),
                )
            acc, zero = self.group_sum(q, multipliers, zero), None
        else:
            acc = self.matmul(q)
        if product is not None:
            extra = product if extra is None else product + extra.float()
        return reference.epilogue(acc, scale[:, :1], operand.scale[:, 0], zero, sums, extra, dtype)

    def _run_float(self, x: Tensor) -> Tensor:
        """Of an activation that nothing rounds, in float32, multiplied by what the codes stand for."""
        operand = self.operand
        inner, side = operand.rewrite.apply(x)
        y = inner.float() @ operand.dequantized().t()
        if side is not None:
            assert operand.outlier_weight is not None
            y = y + side.float() @ operand.outlier_weight.float().t()
        return (y if operand.bias is None else y + operand.bias.float()).to(x.dtype)

    def matmul(self, q: Tensor) -> Tensor:
        """``q [M, K] @ codes [N, K]^T`` to int32, exact."""
        return reference.int_matmul(q, self.operand.codes)

    def group_products(self, q: Tensor) -> Iterator[Tensor]:
        """The product of each group of channels, ``[M, N]`` int32, exact."""
        groups = self.operand.groups
        for part, codes in zip(q.split(groups, dim=1), self.operand.codes.split(groups, dim=1), strict=True):
            yield reference.int_matmul(part, codes)

    def group_sum(self, q: Tensor, multipliers: Tensor, zero: Tensor | None) -> Tensor:
        """:func:`quantkit.ops.reference.group_sum` of the groups of the operand."""
        assert self.operand.multipliers is not None
        products, sums = self.group_products(q), None if zero is None else self.sums
        return reference.group_sum(products, multipliers, self.operand.multipliers, zero, sums)

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes ``[M, K]`` int8, scale ``[M, 1]`` (or ``[M, 1 + G]``) float32 and zero point of the rewritten activation."""
        operand = self.operand
        assert isinstance(operand.input, Quantized)
        number, zero = operand.input.number, operand.input_zero_point
        groups: dict[str, Any] = {"groups": operand.input_groups, "shares": self.shares}
        if operand.input_scale is None:
            return reference.quantize_rows(x, bits=number.bits, symmetric=number.symmetric, **groups)
        return *reference.quantize_static(x, operand.input_scale, zero, bits=number.bits, **groups), zero


class Plain:
    """The backend called ``"reference"``."""

    name = "reference"

    def why_not(self, operand: Operand | None, device: torch.device) -> str | None:
        return None

    def why_simulated(self, operand: Operand) -> str | None:
        return "plain PyTorch computes it, which saves nothing"

    def prepare(self, operand: Operand) -> PlainPrepared:
        return PlainPrepared(operand, reference.row_sums(operand.codes, operand.groups), shares_of(operand))


def shares_of(operand: Operand) -> Tensor | None:
    """:func:`quantkit.core.groups.shares` of the groups of the input; None where it has none."""
    if not operand.input_groups or not isinstance(operand.input, Quantized):
        return None
    return shares(operand.codes, operand.weight_scale, operand.groups, operand.input.number.symmetric)


def other_than_bytes(operand: Operand) -> str | None:
    """Why kernels that read a code from each byte, with the same groups in weight and input, cannot run ``operand``."""
    if operand.weight.storage is not Storage.BYTES:
        return "its codes are not stored one in a byte"
    if isinstance(operand.input, Quantized) and operand.groups != operand.input_groups:
        return "the groups of its weight are not those of its input"
    return None


def other_than_w8a8(operand: Operand) -> str | None:
    """What of the formats of ``operand`` is no INT8, for backends that multiply INT8 by INT8; None if all of it is."""
    if fault := other_than_bytes(operand):
        return fault
    if isinstance(operand.input, Float):
        return "activations stay in floating point, and are multiplied as such"
    if operand.weight.number.bits != 8:
        return f"weights of {operand.weight.number.bits} bits are stored and multiplied as INT8"
    if operand.input.number.bits != 8:
        return f"activations of {operand.input.number.bits} bits are multiplied as INT8"
    return None


# One operator, since how many columns there are is known only at run time.
_library = torch.library.Library("quantkit", "FRAGMENT")
_library.define("column_product(Tensor x, Tensor columns, Tensor weight, Tensor weight_scale) -> Tensor")
_library.impl("column_product", reference.column_product, "CompositeExplicitAutograd")


@torch.library.register_fake("quantkit::column_product")
def _(x: Tensor, columns: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)

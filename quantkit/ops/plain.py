"""The reference operations as a backend: runs on any device, exact and slow. Others override what they do faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.core.numerics import shares
from quantkit.core.rotation import Rotation
from quantkit.ops import reference

if TYPE_CHECKING:
    from quantkit.layers.linear import W8A8Linear


@dataclass
class PlainPacked:
    """Only the sums of the weight's rows, for zero points; with clusters of channels ``[G, N]``, and their ``shares [G]``."""

    backend: Any
    device: torch.device
    weight: Tensor
    sums: Tensor
    shares: Tensor | None


class Plain:
    """Composes :mod:`quantkit.ops.reference`, one step after the other."""

    name = "reference"

    def why_not(self, device: torch.device) -> str | None:
        return None

    def pack(self, layer: W8A8Linear) -> Any:
        sums = reference.row_sums(layer.weight, layer.groups)
        return PlainPacked(self, layer.weight.device, layer.weight, sums, shares_of(layer))

    def matmul(self, layer: W8A8Linear, q: Tensor) -> Tensor:
        """``q [M, K] @ weight [N, K]^T`` to int32, exact."""
        return reference.int_matmul(q, layer.weight)

    def segments(self, layer: W8A8Linear, q: Tensor) -> Iterator[Tensor]:
        """The product of each cluster of channels, ``[M, N]`` int32, exact."""
        for part, weight in zip(q.split(layer.groups, dim=1), layer.weight.split(layer.groups, dim=1), strict=True):
            yield reference.int_matmul(part, weight)

    def segment_sum(self, layer: W8A8Linear, q: Tensor, multiples: Tensor, zero: Tensor | None) -> Tensor:
        """:func:`quantkit.ops.reference.segment_sum` of the clusters of ``layer``."""
        products, sums = self.segments(layer, q), None if zero is None else layer.packed.sums
        return reference.segment_sum(products, multiples, layer.weight_scale[:, 1:], zero, sums)

    def codes(self, layer: W8A8Linear, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes ``[M, K]`` int8, scale ``[M, 1]`` (or ``[M, 1 + G]``) float32 and zero point of the rewritten activation."""
        scheme, zero = layer.scheme, layer.input_zero_point
        clusters = {"groups": layer.groups, "shares": layer.packed.shares}
        if layer.input_scale is None:
            return reference.quantize_rows(x, bits=scheme.activation_bits, symmetric=scheme.symmetric, **clusters)
        return *reference.quantize_static(x, layer.input_scale, zero, bits=scheme.activation_bits, **clusters), zero

    def linear(self, layer: W8A8Linear, x: Tensor) -> Tensor:
        dtype = x.dtype
        x, side = layer.prepare_input(x)
        extra, columns = layer.bias, None
        if layer.threshold:
            large, columns = reference.reaching(x, layer.threshold)
            product = torch.ops.quantkit.column_product(x, columns, layer.weight, layer.weight_scale)
            extra = product if extra is None else product + extra.float()
            x = x.masked_fill(large, 0)
        q, scale, zero = self.codes(layer, x)
        if columns is not None:
            q = q.masked_fill(columns, 0)
        product = None
        if side is not None:
            assert layer.outlier_weight is not None
            # float64, so that no bit of float32 shows how the library splits the sum: a token is the same in any batch
            product = (side.double() @ layer.outlier_weight.double().t()).float()
        sums = None if zero is None else layer.packed.sums
        if layer.groups:
            acc, zero = self.segment_sum(layer, q, scale[:, 1:], zero), None
        else:
            acc = self.matmul(layer, q)
        if product is not None:
            extra = product if extra is None else product + extra.float()
        return reference.epilogue(acc, scale[:, :1], layer.weight_scale[:, 0], zero, sums, extra, dtype)


def shares_of(layer: W8A8Linear) -> Tensor | None:
    """:func:`quantkit.core.numerics.shares` of the clusters of ``layer``."""
    if not layer.groups:
        return None
    return shares(layer.weight, layer.weight_scale, layer.groups, layer.scheme.symmetric)


# One operator, since how many columns there are is known only at run time.
_library = torch.library.Library("quantkit", "FRAGMENT")
_library.define("column_product(Tensor x, Tensor columns, Tensor weight, Tensor weight_scale) -> Tensor")
_library.impl("column_product", reference.column_product, "CompositeExplicitAutograd")


@torch.library.register_fake("quantkit::column_product")
def _(x: Tensor, columns: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


# One operator for all butterflies: Inductor takes seconds for each layer to compile what it can only run slower.
_library.define("rotate(Tensor x, int block, Tensor? signs) -> Tensor")
_library.impl("rotate", lambda x, block, signs: Rotation(block, signs).apply(x), "CompositeExplicitAutograd")


@torch.library.register_fake("quantkit::rotate")
def _(x: Tensor, block: int, signs: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)

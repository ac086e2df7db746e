"""The backend for GPUs with INT8 Tensor Cores: quantize, multiply and rescale in two launches, or in one for one token.

:mod:`.codes` turns activations into INT8 codes, :mod:`.product` multiplies them; both are reached through :mod:`.operators`.
This file decides what they are given: a weight is laid out once (:mod:`.packing`), and each call is then two operators. Triton
is imported with the operators, when a layer first runs on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.core.numerics import shared
from quantkit.core.tracing import constant_while_tracing
from quantkit.ops.gpu.devices import why_not
from quantkit.ops.gpu.layout import BLOCK, padded, padded_side
from quantkit.ops.gpu.packing import alignment, narrow, places_of
from quantkit.ops.plain import Plain, shares_of
from quantkit.ops.reference import row_sums

if TYPE_CHECKING:
    from quantkit.layers.linear import W8A8Linear


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class GPUPacked:
    """A weight ready to run: ``codes`` in rows of 16; ``vector`` says whether one token may take the fused kernel.

    With clusters of channels, each starts at a multiple of 16 of the P places in a row: ``permutation [P]`` says which channel
    is where, -1 where none is, ``borders [G + 1]`` int32 where clusters begin, all at multiples of ``align``, and ``clusters
    [P / 16]`` int32 whose 16 places are, with their ``shares [G]``; ``in_scale``, if static, is then ``[1 + G]``, and
    ``scale`` is ``[1 + G, N]`` unless all multiples are 1. ``permutation`` is always as :func:`narrow` makes it.
    """

    backend: Any
    device: torch.device
    weight: Tensor
    codes: Tensor
    scale: Tensor
    sums: Tensor | None
    side_weight: Tensor | None
    side_mask: Tensor | None
    pre_scale: Tensor | None
    permutation: Tensor | None
    borders: Tensor | None
    clusters: Tensor | None
    shares: Tensor | None
    in_scale: Tensor | None
    align: int
    vector: bool


class GPU(Plain):
    """See the module."""

    name = "triton"

    def why_not(self, device: torch.device) -> str | None:
        return why_not(device)

    def pack(self, layer: W8A8Linear) -> GPUPacked:
        k = layer.in_features
        weight, permutation = layer.weight.contiguous(), layer.permutation
        borders = clusters = None
        scale = (layer.weight_scale.t() if _by_row(layer.weight_scale) else layer.weight_scale[:, 0]).contiguous()
        shares, in_scale = shares_of(layer), layer.input_scale
        align = alignment(layer.groups, layer.weight.device)
        if layer.groups:
            free = permutation if align == BLOCK and not layer.rotation_block else None
            borders, clusters, places = places_of(layer.groups, align, free, weight.device)
            assert shares is not None
            in_scale = None if in_scale is None else shared(in_scale, shares)
            width = 16 * len(clusters)
            weight = weight.new_zeros(len(weight), width).index_copy_(1, places, weight)
            if permutation is not None or width > k:
                order = torch.arange(k, device=weight.device) if permutation is None else permutation
                permutation = torch.full((width,), -1, device=weight.device).index_copy_(0, places, order)
        elif padded(k) != k:
            weight = torch.nn.functional.pad(weight, (0, padded(k) - k))
        side, mask = layer.outlier_weight, None
        if side is not None and layer.outlier_index is not None:
            mask = torch.zeros(k, dtype=torch.int8, device=side.device).index_fill(0, layer.outlier_index, 1)
            side = torch.nn.functional.pad(side, (0, padded_side(side.shape[1]) - side.shape[1])).contiguous()
        if permutation is not None:
            permutation = narrow(permutation, k)
        rest = (layer.shift, layer.permutation, layer.outlier_index)
        vector = layer.scheme.symmetric and not layer.scheme.is_static and not layer.rotation_block and not layer.groups
        sums = None if layer.scheme.symmetric else row_sums(layer.weight, layer.groups)
        return GPUPacked(
            self, layer.weight.device, layer.weight, weight, scale, sums,
            side, mask, _signed_scale(layer), permutation, borders, clusters, shares, in_scale, align,
            vector and not layer.threshold and all(v is None for v in rest),
        )  # fmt: skip

    def linear(self, layer: W8A8Linear, x: Tensor) -> Tensor:
        packed, scheme = layer.packed, layer.scheme
        if x.dtype not in DTYPES or not packed.codes.numel():
            return super().linear(layer, x)
        ops = kernels()  # also under torch.compile: it registers the operators
        if torch.compiler.is_compiling():
            ops = torch.ops.quantkit
        if x.shape[0] == 1 and packed.vector:
            return ops.gemv(x, packed.codes, packed.scale, scheme.activation_bits, layer.bias, packed.pre_scale)
        if layer.threshold:
            q, scale, active = ops.quantize(x, bits=scheme.activation_bits, threshold=layer.threshold)
            return ops.matmul(q, scale, packed.codes, packed.scale, x.dtype, bias=layer.bias, side=x, active=active)
        out = ops.quantize(
            x, bits=scheme.activation_bits, symmetric=scheme.symmetric, shift=layer.shift, pre_scale=packed.pre_scale,
            permutation=packed.permutation, rotation=layer.rotation_block, side_index=layer.outlier_index,
            side_mask=packed.side_mask, in_scale=packed.in_scale, in_zero=layer.input_zero_point, clusters=packed.clusters,
            shares=packed.shares, align=packed.align,
        )  # fmt: skip
        q, scale = out[:2]
        zero = out[2] if not scheme.symmetric and not scheme.is_static else layer.input_zero_point
        side = (None, None) if packed.side_weight is None else (out[-1], packed.side_weight.to(x.dtype))
        return ops.matmul(
            q, scale, packed.codes, packed.scale, x.dtype, zero, packed.sums, layer.bias, *side, packed.borders,
            packed.align,
        )  # fmt: skip


@constant_while_tracing  # which values they have cannot be traced
def _by_row(scale: Tensor) -> bool:
    """Whether clusters count differently in rows of a weight, of ``scale [N, 1 + G]``."""
    return bool((scale[:, 1:] != 1).any())


def _signed_scale(layer: W8A8Linear) -> Tensor | None:
    """Pre-scale and signs of the rotation in one vector ``[K]``, in the channels of the input."""
    signs = layer.rotation_signs
    if signs is not None and layer.permutation is not None:
        signs = torch.empty_like(signs).index_copy_(0, layer.permutation, signs)
    if layer.pre_scale is None or signs is None:
        return signs if layer.pre_scale is None else layer.pre_scale
    return layer.pre_scale * signs


@constant_while_tracing
def kernels() -> Any:
    """The module of operators; imports Triton, which takes a second, only where there is a GPU to use it."""
    from quantkit.ops.gpu import operators

    return operators

"""The reference operations as a backend: runs on any device, exact and slow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.ops import reference

if TYPE_CHECKING:
    from quantkit.linear import W8A8Linear


@dataclass(frozen=True)
class PlainPacked:
    backend: Any
    device: torch.device
    weight_sum: Tensor


class Plain:
    """Composes :mod:`quantkit.ops.reference`, one step after the other."""

    name = "reference"

    def why_not(self, device: torch.device) -> str | None:
        return None

    def pack(self, layer: W8A8Linear) -> PlainPacked:
        return PlainPacked(self, layer.weight.device, layer.weight.sum(dim=1, dtype=torch.int32))

    def linear(self, layer: W8A8Linear, x: Tensor) -> Tensor:
        scheme, dtype = layer.scheme, x.dtype
        x, side = layer.prepare_input(x)
        zero: Tensor | None
        if layer.input_scale is not None:
            zero = layer.input_zero_point
            q, scale = reference.quantize_static(x, layer.input_scale, zero, bits=scheme.activation_bits)
        else:
            q, scale, zero = reference.quantize_rows(x, bits=scheme.activation_bits, symmetric=scheme.symmetric)
        acc = reference.int_matmul(q, layer.weight)
        extra = layer.bias
        if side is not None:
            assert layer.outlier_weight is not None
            product = side.float() @ layer.outlier_weight.float().t()
            extra = product if extra is None else product + extra.float()
        weight_sum = None if zero is None else layer.weight.sum(dim=1, dtype=torch.int32)
        return reference.epilogue(acc, scale, layer.weight_scale.view(-1), zero, weight_sum, extra, dtype)

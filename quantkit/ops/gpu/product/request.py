"""What is asked of the kernels that multiply INT8 codes, as one value."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ProductRequest(NamedTuple):
    """``y [M, N]``: codes of M tokens times those of N rows of a weight, rescaled, with side product and bias.

    ``y = (acc - zero * wsum) * sx * sw + side sidew^T + bias``, in that order, in float32. The fields are called as the
    arguments of the operator ``quantkit::matmul``, which compiled graphs keep. A named tuple, because one is made in every
    call, and a frozen dataclass takes twice as long to make.

    Attributes:
        q: ``[M, K]`` int8, contiguous. Without ``sx`` it is the one token ``[1, K]`` still in floating point.
        sx: ``[M, 1]`` float32, or for G groups of channels ``[M, 1 + G]``: base scale and multipliers of each token.
        weight: ``[N, K]`` int8, contiguous; for a token in floating point ``[N, padded(K)]``.
        sw: ``[N]`` float32, or for groups that count differently in each row ``[1 + G, N]``, base scale and multipliers.
        dtype: of y.
        zero, wsum: ``[M, G]`` (or ``[G]``, static) and ``[G, N]`` int32: zero points, and sums over groups of the weight.
        bias: ``[N]`` float.
        side, side_weight: ``[M, n]`` and ``[N, n]`` in one float dtype: columns multiplied without rounding.
        borders: ``[G + 1]`` int32, where groups of channels start and end: multiples of 16, from 0 to K.
        align: a number that divides all borders.
        active: ``[1 + K]`` int32, how many columns to take from ``side`` as they are, and which; ``side [M, K]`` is then what q
            was rounded from, and there is no side_weight.
        bits, pre_scale: of a token in floating point: bits of its codes, and ``[K]`` float32 by which it is multiplied before.
    """

    q: Tensor
    sx: Tensor | None
    weight: Tensor
    sw: Tensor
    dtype: torch.dtype
    zero: Tensor | None = None
    wsum: Tensor | None = None
    bias: Tensor | None = None
    side: Tensor | None = None
    side_weight: Tensor | None = None
    borders: Tensor | None = None
    align: int = 16
    active: Tensor | None = None
    bits: int = 8
    pre_scale: Tensor | None = None

    @property
    def groups(self) -> int:
        """How many groups of channels have multipliers of their own; 1 where all channels share a scale."""
        return 1 if self.borders is None else self.borders.shape[0] - 1

    @property
    def zero_stride(self) -> int:
        """From the zero points of a token to those of the next: 0 where they are static, the same for all tokens."""
        return 0 if self.zero is None or self.zero.numel() <= self.groups else self.groups

"""An RMSNorm in one launch, with the residual sum before it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quantkit.ops.gpu.launch import launch
from quantkit.ops.gpu.layout import power_of_two
from quantkit.ops.reference import rms_norm


def norm_reference(
    x: Tensor, x2: Tensor | None, gain: Tensor, eps: float, offset: float = 0.0, late: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`~quantkit.ops.reference.rms_norm` of ``t = x + x2 [M, K]``, and t. Without x2 t is x."""
    total = x if x2 is None else x + x2
    return rms_norm(total, gain, eps, offset, late), total


def norm(
    x: Tensor, x2: Tensor | None, gain: Tensor, eps: float, offset: float = 0.0, late: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`norm_reference` but for the order of the sum of squares. Channels lie side by side, at most ``layout.NORM``."""
    (m, k), y = x.shape, x.new_empty(x.shape)
    total = x if x2 is None else x.new_empty(x.shape)
    launch(
        norm_kernel, (m,), x, x2, gain, y, total, k, x.stride(0), 0 if x2 is None else x2.stride(0), eps, offset,
        power_of_two(k), late, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return y, total


@triton.jit
def norm_kernel(X, X2, GAIN, Y, SUM, K, stride_x, stride_2, eps, offset, B: tl.constexpr, LATE: tl.constexpr):
    """One row."""
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    mask = k < K
    x = tl.load(X + row * stride_x + k, mask=mask, other=0.0)
    if X2 is not None:
        x = (x.to(tl.float32) + tl.load(X2 + row * stride_2 + k, mask=mask, other=0.0).to(tl.float32)).to(SUM.dtype.element_ty)
        tl.store(SUM + row * K + k, x, mask=mask)
    wide = x.to(tl.float32)
    y = wide * tl.rsqrt(tl.sum(wide * wide, 0) / K + eps)
    if not LATE:
        y = y.to(Y.dtype.element_ty).to(tl.float32)
    y *= tl.load(GAIN + k, mask=mask, other=0.0).to(tl.float32) + offset
    tl.store(Y + row * K + k, y.to(Y.dtype.element_ty), mask=mask)

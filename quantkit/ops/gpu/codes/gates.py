"""Device code, in Triton, for gates: an activation function of one tensor times another tensor. Gluon kernels call it too."""

from __future__ import annotations

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def gated(x, x2, SOURCE: tl.constexpr):
    """``silu(x) * x2`` or ``gelu(x) * x2``."""
    if SOURCE == "silu":
        y = x / (1.0 + tl.exp(-x)) * x2
    elif SOURCE == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF)) * x2
    else:  # tanh(t) = 1 - 2 / (exp(2 t) + 1)
        t = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = 0.5 * x * (2.0 - 2.0 / (tl.exp(2.0 * t) + 1.0)) * x2
    return y

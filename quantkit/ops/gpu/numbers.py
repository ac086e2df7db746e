"""Device code, in Triton, for what all kernels round alike; it equals :mod:`quantkit.core.numerics` bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.core.groups import FINENESS
from quantkit.core.numerics import ABSMAX_FLOOR

FLOOR = tl.constexpr(ABSMAX_FLOOR)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds half to even and leaves the integer in the low bits
EXPONENT = tl.constexpr(0x7F800000)  # absolute bit patterns from here on are Inf and NaN, which float maxima would drop
FINE = tl.constexpr(FINENESS)


@triton.jit
def whole(x):
    """The nearest integer to a float below 2**22 in size, in two quick instructions; the one that converts takes longer."""
    return (x + ROUND).to(tl.int32, bitcast=True) - 0x4B400000  # the bits of ROUND

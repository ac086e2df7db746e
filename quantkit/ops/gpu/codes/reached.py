"""Device code, in Triton, that finds the columns with an element that reaches a threshold: LLM.int8() as published.

The kernel that makes the codes marks these columns, and the one below lists them, so that nothing has to be read back by the
host. What is done with the list is in :mod:`quantkit.ops.gpu.product.columns`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def reaching(x, threshold):
    """Whether elements ``x`` float32 are finite and reach it."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return (bits.to(tl.float32, bitcast=True) >= threshold) & (bits < 0x7F800000)


@triton.jit
def list_kernel(REACHED, ACTIVE, K, B: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr):
    """``active [1 + K]``: how many columns are marked in ``reached [K]``, and which, ascending; B columns a program."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first = tl.program_id(0) * B
    count = 0
    for start in range(0, first, WHOLE):  # every program counts those before its own
        k = start + tl.arange(0, WHOLE)
        count += tl.sum(tl.load(REACHED + k, mask=k < first, other=0), 0)
    k = first + tl.arange(0, B)
    mark = tl.load(REACHED + k, mask=k < K, other=0)
    tl.store(ACTIVE + count + tl.cumsum(mark, 0), k, mask=mark != 0)
    if first + B >= K:
        tl.store(ACTIVE, count + tl.sum(mark, 0))

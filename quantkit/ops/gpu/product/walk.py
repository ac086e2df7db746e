"""Device code, in Triton, for the order in which programs take the tiles of a product. Gluon kernels call it too."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(t, tiles_m, tiles_n, BAND: tl.constexpr):
    """Row and column of tile ``t``: columns within bands of BAND rows, so that neighbours in time share what is in L2."""
    first = t // (BAND * tiles_n) * BAND
    height = tl.minimum(tiles_m - first, BAND)
    rest = t % (BAND * tiles_n)
    return first + rest % height, rest // height

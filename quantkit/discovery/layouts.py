"""The orders in which fused projections lay out their rows.

A fused projection computes several things at once, q, k and v, or gate and up, and only one of them may reach the next linear
without being mixed with others (v and up). Which rows it has depends on the model. So the probe tries the layouts that are in
use, and this file lists them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

MOST_HEADS = 256
"""No model has more heads than this, so that layouts with more are not tried."""


def fused_layouts(rows: int, channels: int) -> Iterator[Tensor]:
    """Rows of one part of a fused projection that can be behind ``channels`` channels, the likeliest layouts first.

    Rows are thought of as ``[heads][parts][width]``. Parts are of equal width: two for gate and up or for k and v, three for q,
    k and v, and more if several query heads share a key and a value, which then is the last part. After these come two parts of
    unequal width. With as many heads as rows in a part, the parts are interleaved row by row.

    Args:
        rows: rows of the fused projection.
        channels: input channels of the linear behind it; rows may repeat there.

    Yields:
        ``[n]`` int64, sorted within each head, where n divides ``channels`` or, with parts of unequal width, is ``channels``.
    """
    for parts in range(2, MOST_HEADS + 2):
        if rows % parts or channels % (rows // parts):
            continue
        picked = rows // parts
        counts = (1,) if parts > 32 else dict.fromkeys(h for h in (*range(1, MOST_HEADS + 1), picked) if picked % h == 0)
        for heads in counts:
            grid = torch.arange(rows, dtype=torch.int64, device="cpu").view(heads, parts, picked // heads)
            for part in dict.fromkeys((parts - 1, 0, 1)) if parts <= 4 else (parts - 1,):
                yield grid[:, part].reshape(-1)
        if rows <= channels:  # no query, but keys with values, or not fused at all, and then all rows were asked before
            return
    for heads in (h for h in range(1, MOST_HEADS + 1) if rows % h == 0 and channels % h == 0):
        grid = torch.arange(rows, dtype=torch.int64, device="cpu").view(heads, rows // heads)
        for unequal in (grid[:, -channels // heads :], grid[:, : channels // heads]):
            yield unequal.reshape(-1)

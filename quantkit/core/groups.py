"""Scales of groups of channels, as whole multiples of one base scale, so that sums over all channels stay exact integers.

A product that gives each group g of channels scales of its own would have to turn every group's int32 sum into a float. Here
the scales of a token are ``base * m_g`` with odd whole numbers ``m_g``, its *multipliers*, and so are those of a row of the
weight. Then the whole product is ``base_token * base_row * sum_g(m_g * m'_g * sum_g)``, and the sum is one int32. What has to
be found is a base scale so large that this sum cannot leave int32, and not larger: :func:`shares` says how much room the groups
of a weight take up, and :func:`with_multipliers` finds base and multipliers of a token.

Base scale and multipliers of a token or row lie beside each other in one tensor, ``[..., 1 + G]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROOM = 2.0**31 * (1 - 2.0**-10)
"""Sums of at most this size stay within int32 although shares are float32."""

LEAST_SHARE = 2.0**-20
"""Share of a group whose weights are all 0. It bounds multipliers, which are about its inverse at most."""

FINENESS = 2.0**17
"""How finely :func:`with_multipliers` counts terms before it adds them: sums of whole numbers are the same in any order."""

PIECE = 2**20
"""Elements of a weight that are looked at a time."""


def shares(codes: Tensor, scale: Tensor, groups: tuple[int, ...], symmetric: bool) -> Tensor:
    """How much of the int32 range a product with a weight takes up in each of G groups: ``[G]`` float32.

    Args:
        codes, scale: ``[N, K]`` int8 and ``[N, 1 + G]`` of the weight.
        groups: sizes of the groups.
        symmetric: whether codes of activations have no zero point.

    Returns:
        NaN where no sum of that many channels would fit for certain, so that nothing looks like a result.
    """
    most = largest_sums(codes, scale, groups).double() * (127 if symmetric else 255)
    free = ROOM - 2 * most.sum()  # rounding up to odd numbers adds less than 2 to each
    alone = torch.where((scale[:, 1:] > 1).any(), torch.nan, 1.0)  # one scale for all groups, as without them
    return torch.where(free > 0, (most / free).clamp(LEAST_SHARE, 1.0), alone).float()


def largest_sums(codes: Tensor, scale: Tensor, groups: tuple[int, ...]) -> Tensor:
    """``[G]`` int64: the largest sum of absolute codes times the group's multiplier in any row of a weight."""
    rows, found = max(1, PIECE // max(codes.shape[1], 1)), torch.zeros(len(groups), dtype=torch.int64, device=codes.device)
    for part, multipliers in zip(codes.split(rows), scale[:, 1:].split(rows), strict=True):
        sums = torch.stack([c.abs().sum(1, dtype=torch.int64) for c in part.split(groups, 1)], 1) * multipliers.long()
        found = torch.maximum(found, sums.amax(0)) if len(sums) else found
    return found


def with_multipliers(scale: Tensor, shares: Tensor) -> Tensor:
    """Base scale and odd multipliers ``[..., 1 + G]`` of groups that need ``scale [..., G]``; none gets less than it needs.

    The base is ``sum(scale * shares)``, the least that keeps sums within int32. Multipliers are odd because odd numbers have an
    inverse modulo 2**32: a kernel can then turn one accumulator from the terms of one group into those of the next.
    """
    shares = shares.to(scale.device)
    terms = scale * shares
    top = terms.amax(-1, keepdim=True)
    count = torch.ceil(terms / top * FINENESS).sum(-1, keepdim=True, dtype=torch.float64).float()
    base = count * (1 / FINENESS) * top
    multipliers = (2 * torch.ceil((scale / base - 1) * 0.5) + 1).clamp_min(1.0)
    return torch.cat([base, multipliers], -1)


def group_scales(scale: Tensor) -> Tensor:
    """The scale of each group, ``[..., G]``, from base scale and multipliers ``[..., 1 + G]``."""
    return scale[..., :1] * scale[..., 1:]

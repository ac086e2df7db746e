"""Weights to codes: where the grid of each row ends, and rounding to the nearest code on it.

A row of a weight has one scale, its largest absolute value over ``qmax``. In groups of columns each group has a grid of its
own. The scale of the row's loudest group is divided into :func:`steps_of` steps: a step is the base scale of the row, and each
group counts an odd number of steps, its multiplier (see :mod:`quantkit.core.groups`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.core.formats import Int, PerChannel, PerGroup, PerTensor, Quantized
from quantkit.core.groups import PIECE, group_scales
from quantkit.core.numerics import ABSMAX_FLOOR, absmax_scale, divided, encode, qmax


def quantize_weight(
    weight: Tensor,
    bits: int = 8,
    *,
    per_tensor: bool = False,
    groups: tuple[int, ...] = (),
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`round_weight` to symmetric codes of so many ``bits``, 2 to 8.

    Args:
        weight, clip: as there.
        bits: 2 to 8.
        per_tensor: one scale for the whole weight (repeated over its rows) in place of one per row.
        groups: sizes of G groups of consecutive columns, each with a scale of its own; none for one scale.
    """
    return round_weight(weight, Quantized(Int(bits), PerTensor(groups) if per_tensor else PerChannel(groups)), clip=clip)


def round_weight(weight: Tensor, format: Quantized, *, clip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The nearest codes of a weight in a number format.

    Args:
        weight: ``[N, K]``, any floating dtype.
        format: of the weight.
        clip: ``[N, 1]``, the share of its largest value that a row's grid spans; all of it if left out.

    Returns:
        codes ``[N, K]`` int8 and scale ``[N, 1]`` (``[N, 1 + G]`` with groups, see :func:`grid_of`) float32.
    """
    # A few rows at a time: float32 copies of a whole weight would be the peak of memory while a model is loaded.
    # On a GPU they are more, since each piece costs the host ten launches.
    piece = PIECE * 8 if weight.is_cuda else PIECE
    rows, bits = max(1, piece // max(weight.shape[1], 1)), format.number.bits
    sizes = format.groups(weight.shape[1]) or (weight.shape[1],)
    if weight.shape[1]:
        absmax = torch.cat([largest_in_groups(part, sizes) for part in weight.split(rows)])
    else:
        absmax = torch.zeros(len(weight), 1, dtype=torch.float32, device=weight.device)
    if isinstance(format.granularity, PerTensor) and absmax.numel():
        absmax = absmax.amax(0).expand_as(absmax).contiguous()
    if clip is not None:
        absmax = absmax * clip
    grid, scale = grid_of(absmax, format, weight.shape[1])
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        codes[part] = encode_groups(weight[part], grid[part], sizes, bits)
    return codes, scale


def grid_of(absmax: Tensor, format: Quantized, channels: int) -> tuple[Tensor, Tensor]:
    """The grids of the rows of a weight of ``channels`` columns, whose largest absolute values are ``absmax [N, G]``.

    Returns:
        where each group's grid ends ``[N, G]`` float32, and the scale, ``[N, 1]`` or base scale and multipliers ``[N, 1 + G]``.
    """
    bits = format.number.bits
    if isinstance(format.granularity, PerGroup):
        return group_grid(absmax, bits, most_multiplier(channels, bits))
    return weight_grid(absmax, bits, steps_of(channels, bits))


def most_multiplier(channels: int, bits: int) -> int:
    """The largest multiplier with which no sum over ``channels`` products of such codes with INT8 codes can leave int32."""
    return max(1, min(127, (2**31 - 1) // (255 * qmax(bits) * max(channels, 1))))


def group_grid(absmax: Tensor, bits: int, most: int) -> tuple[Tensor, Tensor]:
    """The grids of rows whose groups of columns reach ``absmax [N, G]``, with multipliers from 1 to ``most``.

    The scale of a row's loudest group is ``most`` times the base scale of the row, and the others count the next whole number
    above what they need, so that no value is clipped.

    Returns:
        where each group's grid ends ``[N, G]``, and base scale and multipliers ``[N, 1 + G]`` float32.
    """
    largest = absmax.float().amax(1, keepdim=True)
    empty = largest == 0
    base = divided(absmax_scale(largest, bits), most)
    base = torch.where(empty, torch.ones_like(base), base)
    share = absmax / largest.clamp_min(ABSMAX_FLOOR) * most
    multipliers = torch.where(empty, torch.ones_like(share), torch.ceil(share).clamp(1, most))
    scale = torch.cat([base, multipliers], 1)
    return group_scales(scale) * qmax(bits), scale


def steps_of(channels: int, bits: int) -> int:
    """In how many steps the scale of a row's loudest group is counted: an odd number up to 31.

    The multipliers of weights and those of tokens share what sums of K channels usually leave of int32. The more of it the
    weights get, the coarser the scales of tokens become, so both get about as much; at 576 channels either side's error grows
    by 10 % or so. Long rows leave so little that the weight keeps one scale, with 8 bits from 3,000 channels on. Kernels are
    then spared a multiplication of each sum in each group. Rows that are full of the largest code fit all the same.
    """
    room = 2.0**31 / (127 * max(channels, 1) * qmax(bits) / 4)
    steps = min(2 * int(0.3 * room**0.5) + 1, 31)
    return steps if steps >= 9 else 1


def weight_grid(absmax: Tensor, bits: int = 8, steps: int = 1) -> tuple[Tensor, Tensor]:
    """The grids of the rows of a weight, whose largest absolute values are ``absmax [N, G]`` in G groups of columns.

    Returns:
        where each group's grid ends ``[N, G]``, and the scale: ``[N, 1]`` for one group, else ``[N, 1 + G]``, a base scale of
        which the loudest group counts ``steps``, and odd multipliers. Rows of zeros keep the scale 1, as files expect it.
    """
    largest = absmax.float().amax(1, keepdim=True)
    empty, scale = largest == 0, absmax_scale(largest, bits)
    if absmax.shape[1] == 1:
        return absmax, torch.where(empty, torch.ones_like(scale), scale)
    share = absmax / largest.clamp_min(ABSMAX_FLOOR) * steps
    multipliers = (2 * torch.ceil((share - 1) * 0.5) + 1).clamp(1, steps)
    base = divided(scale, steps)
    base = torch.where(empty, torch.ones_like(base), base)
    scale = torch.cat([base, torch.where(empty, torch.ones_like(multipliers), multipliers)], 1)
    return group_scales(scale) * qmax(bits), scale


def largest_in_groups(x: Tensor, groups: tuple[int, ...]) -> Tensor:
    """Largest absolute values ``[M, G]`` float32 of groups of the columns of ``x [M, K]``."""
    return torch.stack([part.float().abs().amax(dim=1) for part in x.split(groups, dim=1)], 1)


def encode_groups(x: Tensor, grid: Tensor, groups: tuple[int, ...], bits: int = 8) -> Tensor:
    """Symmetric codes of ``x [M, K]``, whose grid ends at ``grid [M, G]`` in groups of its columns."""
    parts = zip(x.split(groups, dim=1), grid.split(1, dim=1), strict=True)
    return torch.cat([encode(part, end, bits) for part, end in parts], 1)

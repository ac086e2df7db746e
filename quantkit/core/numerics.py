"""What the integers mean. Every backend must equal this page.

=====================  ==========================================================================
real value             ``x ~ (q - zero) * scale``; a scale is a multiplier, always float32
codes                  symmetric: ``q in [-qmax, qmax]``, ``qmax = 2**(bits-1) - 1`` (127, never -128)
                       asymmetric: ``q in [-qmax - 1, qmax]`` with an integer ``zero`` in that range
rounding               half to even; ``q = rne(x * (qmax / absmax))``, ``scale = absmax / qmax``
row of zeros           all codes 0; the output is exactly the bias
NaN or Inf in a row    its scale is NaN, so that the whole output row is NaN, never a finite number; the same
                       with an asymmetric range ``high - low`` beyond float32
accumulator            int32, exact while ``K <= MAX_EXACT_K``
clusters of channels   each has a zero point of its own, and scales that are odd multiples of a unit: of each token's, see
                       :func:`shared`, and of each row's of the weight, see :func:`weight_grid`; int32 sums times both are
                       added up exactly, and the total is in both units
=====================  ==========================================================================

-128 is left out of symmetric codes so that ``-q`` always exists and ``|acc| <= K * 127**2``.
"""

import torch
from torch import Tensor

MAX_EXACT_K = (2**31 - 1) // 127**2
"""133,144: the longest dot product of codes in [-127, 127] that an int32 accumulator holds exactly."""

MAX_EXACT_K_ASYMMETRIC = (2**31 - 1) // (255 * 127)
"""66,311: the same with asymmetric activations, where ``q - zero`` reaches 255: a row of ones makes it do so."""

ABSMAX_FLOOR = 2.0**-96
"""Smallest absmax used for a scale: a row of zeros gets finite scales, and ``qmax / absmax`` never overflows."""


def shares(codes: Tensor, scale: Tensor, groups: tuple[int, ...], symmetric: bool) -> Tensor:
    """How much of the int32 range a product with a weight takes up in each of G clusters: ``[G]`` float32.

    With these, :func:`shared` finds scales of tokens whose sums fit.

    Args:
        codes, scale: ``[N, K]`` int8 and ``[N, 1 + G]`` of the weight.
        groups: sizes of the clusters.
        symmetric: whether codes of activations have no zero point.

    Returns:
        NaN where no sum of that many channels would fit for certain, so that nothing looks like a result.
    """
    most = loudest(codes, scale, groups).double() * (127 if symmetric else 255)
    free = ROOM - 2 * most.sum()  # rounding up to odd numbers adds less than 2 to each
    alone = torch.where((scale[:, 1:] > 1).any(), torch.nan, 1.0)  # one scale for all clusters, as without them
    return torch.where(free > 0, (most / free).clamp(LEAST_SHARE, 1.0), alone).float()


def loudest(codes: Tensor, scale: Tensor, groups: tuple[int, ...]) -> Tensor:
    """The largest sum of absolute codes times the cluster's multiple in any row of a weight, ``[G]`` int64."""
    rows, found = max(1, PIECE // max(codes.shape[1], 1)), torch.zeros(len(groups), dtype=torch.int64, device=codes.device)
    for part, multiple in zip(codes.split(rows), scale[:, 1:].split(rows), strict=True):
        sums = torch.stack([c.abs().sum(1, dtype=torch.int64) for c in part.split(groups, 1)], 1) * multiple.long()
        found = torch.maximum(found, sums.amax(0)) if len(sums) else found
    return found


ROOM = 2.0**31 * (1 - 2.0**-10)
"""What float32 arithmetic on shares keeps within int32."""

LEAST_SHARE = 2.0**-20
"""Of a cluster whose weights are all 0; bounds multiples."""

FINENESS = 2.0**17
"""Parts of the largest term that :func:`shared` counts in whole numbers: their sum is the same in any order."""


def shared(scale: Tensor, shares: Tensor) -> Tensor:
    """Scales ``[..., 1 + G]`` of clusters that need ``scale [..., G]``: a unit, and odd multiples of it, none below the need.

    The unit is ``sum(scale * shares)``, the least that keeps sums in units within int32. Multiples are odd because odd numbers
    have an inverse modulo 2**32: one accumulator can then be multiplied from one cluster to the next.
    """
    shares = shares.to(scale.device)
    terms = scale * shares
    top = terms.amax(-1, keepdim=True)
    count = torch.ceil(terms / top * FINENESS).sum(-1, keepdim=True, dtype=torch.float64).float()
    unit = count * (1 / FINENESS) * top
    multiples = (2 * torch.ceil((scale / unit - 1) * 0.5) + 1).clamp_min(1.0)
    return torch.cat([unit, multiples], -1)


def of_clusters(scale: Tensor) -> Tensor:
    """``[..., G]`` scales from a unit and multiples ``[..., 1 + G]``; those of all channels ``[..., 1]`` are what they are."""
    return scale if scale.shape[-1] == 1 else scale[..., :1] * scale[..., 1:]


def qmax(bits: int) -> int:
    """Largest code of a signed ``bits``-bit integer: 127 for 8, 7 for 4."""
    return 2 ** (bits - 1) - 1


def poison(absmax: Tensor) -> Tensor:
    """0 where ``absmax`` is finite and NaN where it is not: added to a scale, it marks the row."""
    return absmax - absmax


def divided(x: Tensor, by: float) -> Tensor:
    """``x / by``, correctly rounded: on a GPU torch multiplies by the rounded reciprocal of a Python number."""
    return x / torch.full_like(x, by)


def absmax_scale(absmax: Tensor, bits: int = 8) -> Tensor:
    """Symmetric scale of a range: ``absmax / qmax`` in float32, NaN where ``absmax`` is not finite."""
    absmax = absmax.float()
    return divided(absmax.clamp_min(ABSMAX_FLOOR), qmax(bits)) + poison(absmax)


def range_scale(low: Tensor, high: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Asymmetric ``(scale, zero)`` of a range, extended to hold 0 so that 0 is a code.

    ``zero`` is an int32 tensor in ``[-qmax - 1, qmax]``. The scale is NaN where an end, or their distance, is not finite.
    """
    low, high = low.float().clamp_max(0), high.float().clamp_min(0)
    scale = divided((high - low).clamp_min(ABSMAX_FLOOR), 2**bits - 1)
    return scale + poison(high - low), zero_point(low, scale, bits)


def zero_point(low: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """The code of 0, int32, where the least value ``low``, not above 0, has the least code."""
    return torch.round(-(qmax(bits) + 1) - low / scale).nan_to_num(0.0).to(torch.int32)


def encode(x: Tensor, absmax: Tensor, bits: int = 8) -> Tensor:
    """Symmetric codes of ``x`` for a broadcastable ``absmax``: int8, round half to even, saturating.

    Rows whose ``absmax`` is not finite get code 0 (their scale is NaN and poisons the output).
    """
    top = float(qmax(bits))
    # A true division: torch turns ``127.0 / tensor`` into a rounded reciprocal times 127.
    inverse = torch.full_like(absmax, top, dtype=torch.float32) / absmax.float().clamp_min(ABSMAX_FLOOR)
    return torch.round(x.float() * inverse).clamp(-top, top).nan_to_num(0.0).to(torch.int8)


def encode_asymmetric(x: Tensor, scale: Tensor, zero: Tensor, bits: int = 8) -> Tensor:
    """Asymmetric codes of ``x``: int8, round half to even, saturating at ``[-qmax - 1, qmax]``."""
    top = qmax(bits)
    q = torch.round(x.float() * (1.0 / scale)) + zero
    return q.clamp(-top - 1, top).nan_to_num(0.0).to(torch.int8)


def decode(q: Tensor, scale: Tensor, zero: Tensor | int = 0) -> Tensor:
    """Real values of codes: ``(q - zero) * scale`` in float32."""
    return (q.float() - zero) * scale


PIECE = 2**20
"""Elements that :func:`quantize_weight` rounds at a time."""


def quantize_weight(
    weight: Tensor,
    bits: int = 8,
    *,
    per_tensor: bool = False,
    groups: tuple[int, ...] = (),
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Symmetric round-to-nearest codes of a weight.

    Args:
        weight: ``[N, K]``, any floating dtype.
        bits: 2 to 8.
        per_tensor: one scale for the whole weight (repeated over its rows) in place of one per row.
        groups: sizes of G consecutive clusters of columns, each with a scale of its own.
        clip: ``[N, 1]``, the share of its largest value that a row's grid spans; all of it if left out.

    Returns:
        codes ``[N, K]`` int8 and scale ``[N, 1]`` (``[N, 1 + G]`` with groups, see :func:`weight_grid`) float32.
    """
    # A few rows at a time: float32 copies of a whole weight would be the peak of memory while a model is loaded.
    rows = max(1, PIECE // max(weight.shape[1], 1))
    sizes = groups or (weight.shape[1],)
    if weight.shape[1]:
        absmax = torch.cat([largest_of(part, sizes) for part in weight.split(rows)])
    else:
        absmax = torch.zeros(len(weight), 1, device=weight.device)
    if per_tensor and absmax.numel():
        absmax = absmax.amax(0).expand_as(absmax).contiguous()
    if clip is not None:
        absmax = absmax * clip
    grid, scale = weight_grid(absmax, bits, steps_of(weight.shape[1], bits))
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        codes[part] = encode_clusters(weight[part], grid[part], sizes, bits)
    return codes, scale


def steps_of(channels: int, bits: int) -> int:
    """In how many steps the scale of a row's loudest cluster is counted: an odd number up to 31.

    What sums of K channels usually leave of int32 is shared out between weights and tokens, whose errors are then coarser by as
    much, at 576 channels by 10 % each. Rows so long that few steps are left keep one scale, 8 bits from 3,000 channels on:
    kernels are then spared a multiplication of each sum for each cluster. Even rows full of the largest codes fit with these.
    """
    room = 2.0**31 / (127 * max(channels, 1) * qmax(bits) / 4)
    steps = min(2 * int(0.3 * room**0.5) + 1, 31)
    return steps if steps >= 9 else 1


def weight_grid(absmax: Tensor, bits: int = 8, steps: int = 1) -> tuple[Tensor, Tensor]:
    """The grid of rows of a weight, with largest values ``absmax [N, G]`` in G clusters of its columns.

    Returns:
        where each cluster's grid ends ``[N, G]``, and scale ``[N, 1]``, or of more than one cluster ``[N, 1 + G]``: a unit, of
        which the loudest has ``steps``, and odd multiples. Rows of zeros keep the scale 1, as checkpoint formats expect it.
    """
    largest = absmax.float().amax(1, keepdim=True)
    empty, scale = largest == 0, absmax_scale(largest, bits)
    if absmax.shape[1] == 1:
        return absmax, torch.where(empty, torch.ones_like(scale), scale)
    share = absmax / largest.clamp_min(ABSMAX_FLOOR) * steps
    multiple = (2 * torch.ceil((share - 1) * 0.5) + 1).clamp(1, steps)
    unit = divided(scale, steps)
    scale = torch.cat(
        [torch.where(empty, torch.ones_like(unit), unit), torch.where(empty, torch.ones_like(multiple), multiple)], 1
    )
    return of_clusters(scale) * qmax(bits), scale


def largest_of(x: Tensor, groups: tuple[int, ...]) -> Tensor:
    """Largest absolute values ``[M, G]`` float32 of clusters of the columns of ``x [M, K]``."""
    return torch.stack([part.float().abs().amax(dim=1) for part in x.split(groups, dim=1)], 1)


def encode_clusters(x: Tensor, grid: Tensor, groups: tuple[int, ...], bits: int = 8) -> Tensor:
    """Symmetric codes of ``x [M, K]`` whose grid ends at ``grid [M, G]`` in clusters of its columns."""
    parts = zip(x.split(groups, dim=1), grid.split(1, dim=1), strict=True)
    return torch.cat([encode(part, end, bits) for part, end in parts], 1)


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization-noise ratio in decibels; ``inf`` when equal."""
    reference = reference.detach().double()
    noise = (reference - approximation.detach().double()).pow(2).sum()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(reference.pow(2).sum() / noise))

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
clusters of channels   each has a scale and zero point of its own, but :func:`raised`; from one cluster to the next the int32
                       sum is multiplied by the quotient of their scales and rounded (:func:`on_grid`), so that one
                       accumulator serves all
=====================  ==========================================================================

-128 is left out of symmetric codes so that ``-q`` always exists and ``|acc| <= K * 127**2``.
"""

import math

import torch
from torch import Tensor

MAX_EXACT_K = (2**31 - 1) // 127**2
"""133,144: the longest dot product of codes in [-127, 127] that an int32 accumulator holds exactly."""

MAX_EXACT_K_ASYMMETRIC = (2**31 - 1) // (255 * 127)
"""66,311: the same with asymmetric activations, where ``q - zero`` reaches 255: a row of ones makes it do so."""

ABSMAX_FLOOR = 2.0**-96
"""Smallest absmax used for a scale: a row of zeros gets finite scales, and ``qmax / absmax`` never overflows."""


WIDEST = 2.0
"""How many times smaller than an earlier cluster's scale that of a later one may be, in a weight."""


def reach(groups: tuple[int, ...], symmetric: bool) -> tuple[Tensor, Tensor]:
    """By how much the scales after each of G clusters may be smaller than its own: ``[G]`` float32, activations and weights.

    Sums of earlier clusters grow by both quotients, and with all that follows they have to stay within int32. What K leaves of
    its 31 bits is shared out, most of it to the smallest clusters: 16 outlier channels of 4096 may be 4,000 times louder than
    the rest, the first half of 4096 channels 32 times (and each twice that, for their weights).
    """
    spare = (MAX_EXACT_K if symmetric else MAX_EXACT_K_ASYMMETRIC) * (1 - 2.0**-8) - sum(groups)
    share = max(spare, 0.0) / max(len(groups) - 1, 1)
    both = [1 + share / max(size, 1) for size in groups]
    weights = torch.tensor([min(math.sqrt(b), WIDEST) for b in both])
    return torch.tensor(both) / weights, weights


SLACK = 1 + 2.0**-10
"""More than rounding at a border adds to sums."""


def peaks(groups: tuple[int, ...], symmetric: bool) -> Tensor:
    """The largest sum that each cluster's products can have, as large as steps of weights can ever make it: ``[G]`` float32.

    From cluster i to any later j these steps are ``scale_i / scale_j`` together, which is within its reach, at most ``WIDEST``.
    """
    return torch.tensor([WIDEST * size * (127**2 if symmetric else 255 * 127) for size in groups])


def on_grid(a: Tensor, b: Tensor, peak: Tensor) -> Tensor:
    """``a * b`` as int32, rounded once, half to even, to a multiple of the least ``2**e >= 1`` with ``peak < 2**(22 + e)``.

    ``a [M, N]`` and ``b [N]`` are float32, of which float64 holds the product exactly.

    ``peak [M, 1]`` float32 bounds a token's sums. A grid of 2**23 points across them is far finer than the noise of rounding,
    and a kernel gets there by adding a number and reading the bits, in half the time that conversions take.
    """
    grid = torch.exp2(((peak.view(torch.int32) >> 23) - 148).clamp_min(0).double())
    return (torch.round(a.double() * b.double() / grid) * grid).to(torch.int32)


def within(values: Tensor, reach: Tensor) -> Tensor:
    """Which of ``values [..., G]`` :func:`raised` would leave, but for rounding; bool."""
    return values * (1 + 2.0**-16) >= raised(values, reach)


def raised(values: Tensor, reach: Tensor) -> Tensor:
    """Ranges or scales ``[..., G]`` of clusters, none below an earlier one over its ``reach [G]``."""
    if values.shape[-1] < 2:
        return values
    floors = (values * (1.0 / reach).to(values.device)).cummax(-1).values
    return torch.cat([values[..., :1], torch.maximum(values[..., 1:], floors[..., :-1])], -1)


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


def range_scale(low: Tensor, high: Tensor, bits: int = 8, reach: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Asymmetric ``(scale, zero)`` of a range, extended to hold 0 so that 0 is a code.

    ``zero`` is an int32 tensor in ``[-qmax - 1, qmax]``. The scale is NaN where an end, or their distance, is not finite. With
    ``reach [G]`` ranges ``[..., G]`` are those of clusters, and where one is not finite none of its neighbours counts as such.
    """
    low, high = low.float().clamp_max(0), high.float().clamp_min(0)
    scale, bad = divided((high - low).clamp_min(ABSMAX_FLOOR), 2**bits - 1), poison(high - low)
    if reach is not None:
        scale, bad = raised(scale, reach), bad.sum(-1, keepdim=True)
    zero = torch.round(-(qmax(bits) + 1) - low / scale).nan_to_num(0.0)
    return scale + bad, zero.to(torch.int32)


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
        groups: sizes of G consecutive clusters of columns, each with a scale of its own, within :func:`reach`.
        clip: ``[N, 1]``, the share of its largest value that a row's grid spans; all of it if left out.

    Returns:
        codes ``[N, K]`` int8 and scale ``[N, 1]`` (``[N, G]`` with groups) float32.
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
    absmax = raised(absmax, reach(sizes, False)[1])
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        codes[part] = encode_clusters(weight[part], absmax[part], sizes, bits)
    return codes, weight_scale(absmax, bits)


def weight_scale(absmax: Tensor, bits: int = 8) -> Tensor:
    """Scales ``[N, G]`` of rows of a weight: those of zeros keep 1, as every checkpoint format expects of an empty row."""
    empty = (absmax == 0).all(dim=1, keepdim=True)
    return torch.where(empty, torch.ones_like(absmax), absmax_scale(absmax, bits))


def largest_of(x: Tensor, groups: tuple[int, ...]) -> Tensor:
    """Largest absolute values ``[M, G]`` float32 of clusters of the columns of ``x [M, K]``."""
    return torch.stack([part.float().abs().amax(dim=1) for part in x.split(groups, dim=1)], 1)


def encode_clusters(x: Tensor, absmax: Tensor, groups: tuple[int, ...], bits: int = 8) -> Tensor:
    """Symmetric codes of ``x [M, K]`` for ``absmax [M, G]`` of clusters of its columns."""
    parts = zip(x.split(groups, dim=1), absmax.split(1, dim=1), strict=True)
    return torch.cat([encode(part, top, bits) for part, top in parts], 1)


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization-noise ratio in decibels; ``inf`` when equal."""
    reference = reference.detach().double()
    noise = (reference - approximation.detach().double()).pow(2).sum()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(reference.pow(2).sum() / noise))

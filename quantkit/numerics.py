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
clusters of channels   each has scales and zero points of its own, as if it were a matrix product by itself; the products
                       are rescaled and added up in float32, first to last, starting from 0
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
    zero = torch.round(-(qmax(bits) + 1) - low / scale).nan_to_num(0.0)
    return scale + poison(high - low), zero.to(torch.int32)


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
        groups: sizes of G consecutive clusters of columns, each of which is rounded by itself.
        clip: ``[N, 1]``, the share of its largest value that a row's grid spans; all of it if left out.

    Returns:
        codes ``[N, K]`` int8 and scale ``[N, 1]`` (``[N, G]`` with groups) float32.
    """
    if groups:
        parts = [quantize_weight(part, bits, per_tensor=per_tensor, clip=clip) for part in weight.split(groups, dim=1)]
        return torch.cat([codes for codes, _ in parts], 1), torch.cat([scale for _, scale in parts], 1)
    # A few rows at a time: float32 copies of a whole weight would be the peak of memory while a model is loaded.
    rows = max(1, PIECE // max(weight.shape[1], 1))
    if weight.shape[1]:
        absmax = torch.cat([part.float().abs().amax(dim=1, keepdim=True) for part in weight.split(rows)])
    else:
        absmax = torch.zeros(len(weight), 1, device=weight.device)
    if per_tensor and absmax.numel():
        absmax = absmax.amax().expand_as(absmax).contiguous()
    if clip is not None:
        absmax = absmax * clip
    # A row of zeros keeps scale 1, as every checkpoint format expects of an empty row.
    scale = torch.where(absmax == 0, torch.ones_like(absmax), absmax_scale(absmax, bits))
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        codes[part] = encode(weight[part], absmax[part], bits)
    return codes, scale


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization-noise ratio in decibels; ``inf`` when equal."""
    reference = reference.detach().double()
    noise = (reference - approximation.detach().double()).pow(2).sum()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(reference.pow(2).sum() / noise))

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
groups of channels     each has a zero point of its own, and a scale that is an odd multiple of a base scale: of each
                       token's, see :mod:`quantkit.core.groups`, and of each row's of the weight, see
                       :mod:`quantkit.core.weights`. The int32 sum of each group is multiplied by both multipliers, and
                       these products are added up exactly
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


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization-noise ratio in decibels; ``inf`` when equal."""
    reference = reference.detach().double()
    noise = (reference - approximation.detach().double()).pow(2).sum()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(reference.pow(2).sum() / noise))

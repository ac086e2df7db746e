"""How far two tensors of two passes of the probe are apart, and whether one is the other times powers of two.

Powers of two commute with every rounding of a floating-point number, so a channel that was multiplied by one can be told from
its bits, in any dtype. What remains of a difference is noise: sums that the machine adds up in another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors over the largest finite absolute value of ``a``.

    Infinities that agree, such as masked logits, count as equal. Infinite for different shapes and for not-a-numbers.
    """
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    a, b = a.double(), b.double()
    difference, signal = torch.where(a == b, 0.0, a - b), torch.where(a.isinf(), 0.0, a)
    value = float(difference.abs().max() / signal.abs().max().clamp_min(1e-30))
    return value if value == value else float("inf")


def largest_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The largest :func:`distance` of two lists of tensors, pair by pair; infinite if one list is longer."""
    if len(first) != len(second):
        return float("inf")
    return max(map(distance, first, second), default=0.0)


def near(a: Tensor, b: Tensor) -> bool:
    """Whether ``a`` is ``b`` but for 1e-5 of the largest value of ``b``, which is the rounding of a float32 computation."""
    return bool(((a - b).abs() <= 1e-5 * b.abs().amax()).all())


def powers_of_two(before: Tensor, after: Tensor, noise: float) -> Tensor | None:
    """The powers of two ``[K]`` float64, on the CPU, by which each channel of ``before [..., K]`` was multiplied to give
    ``after``.

    Args:
        before, after: what the same linear read in two passes.
        noise: the :func:`distance` of two passes in which nothing was changed.

    Returns:
        None if ``after`` is anything else than ``before`` times one power of two for each channel.
    """
    a, b = before.reshape(-1, before.shape[-1]).double(), after.reshape(-1, before.shape[-1]).double()
    energy = a.pow(2).sum(0)
    ratio = torch.where(energy > 0, (a * b).sum(0) / energy.clamp_min(1e-300), 1.0)
    if not bool((ratio > 0).all()) or not bool(torch.isfinite(ratio).all()):
        return None
    factor = torch.exp2(ratio.log2().round())
    # Every element has to agree by itself, however small it is: a curve may hide in the small ones.
    slack = 4 * torch.finfo(before.dtype).eps * b.abs() + 10 * noise * b.abs().amax(0)
    return factor.cpu() if bool(((b - a * factor).abs() <= slack).all()) else None

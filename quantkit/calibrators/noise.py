"""How much rounding will hurt, predicted without rounding anything.

Calibrators that search, for an alpha, a set of outlier channels or a clipping, compare hundreds of candidates for each site.
Running the linear with each would take too long. :func:`noise` predicts the error of the output from the sizes of values and
the steps of the grids alone; :func:`best_clip` finds the grid of each row of a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.core.formats import PerTensor, Quantized
from quantkit.core.numerics import absmax_scale, decode, encode
from quantkit.core.rotation import Rotation, hadamard
from quantkit.core.scheme import Scheme

ROWS = 512
"""Candidates are compared on so many rows of a weight. The error is a sum over rows, so a sample of rows ranks them as well."""


def sampled_rows(weight: Tensor) -> Tensor:
    """At most :data:`ROWS` rows of ``weight [N, K]``, evenly spaced."""
    return weight[torch.linspace(0, len(weight) - 1, min(ROWS, len(weight)), device=weight.device, dtype=torch.float32).long()]


def noise(x: Tensor, counts: Tensor, w: Tensor, scheme: Scheme, rotation: Rotation | None = None) -> float:
    """The predicted squared error of ``x w^T`` when both sides are rounded, up to a constant factor.

    The squared rounding error of a value is ``step**2 / 12`` on average, or the square of the value itself if it is so small
    that it rounds to zero. The error of ``x[t, j]`` reaches the output through column j of ``w``, and that of ``w[n, j]``
    through column j of ``x``.

    Args:
        x: ``[T, K]`` float32, sampled tokens as the product reads them.
        counts: ``[T]`` float32, how many tokens of the data each of them stands for.
        w: ``[N, K]`` float32, rows of the weights as the product reads them.
        scheme: the numbers of bits, and which values share a scale.
        rotation: applied to both sides before they are rounded, such as
            :attr:`quantkit.calibrators.base.SiteView.rotation_ahead`.
    """
    if rotation is not None:
        x, w = rotated(x, rotation), rotated(w, rotation)
    x2, w2 = x * x, w * w
    x_top = x.abs().amax(1, keepdim=True) if not scheme.is_static else x.abs().amax()
    w_top = w2.amax() if isinstance(scheme.weight.granularity, PerTensor) else w2.amax(1, keepdim=True)
    w_step, input_ = w_top / scheme.weight.number.qmax**2 / 12, scheme.input
    x_step = (x_top / input_.number.qmax) ** 2 / 12 if isinstance(input_, Quantized) else torch.zeros_like(x_top)
    from_x = (counts @ torch.minimum(x2, x_step)) @ w2.sum(0)
    from_w = (counts @ x2) @ torch.minimum(w2, w_step).sum(0)
    return float(from_x + from_w)


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """``rotation.apply(x)`` in a few matrix products, which differ from it in the last bits, but are fast enough for a
    search."""
    y = x if rotation.signs is None else x * rotation.signs.to(x)
    done = 1
    while done < rotation.block:  # the Hadamard matrix of n m is the Kronecker product of those of n and m
        factor = hadamard(min(rotation.block // done, 64)).to(x)
        y = y.reshape(-1, len(factor)) @ factor if done == 1 else factor @ y.view(-1, len(factor), done)
        done *= len(factor)
    return y.view(x.shape)


def power_mean(tokens: Tensor, counts: Tensor, power: int) -> Tensor:
    """The power mean of each channel of ``|tokens| [T, K]``, where token t counts ``counts[t]`` times: ``[K]``."""
    return ((counts @ tokens.abs() ** power) / counts.sum()) ** (1 / power)


CLIPS = tuple(1 - i / 40 for i in range(21))
"""Where the grid of a row may end, as fractions of its largest weight: from 1 down to 1/2."""


def best_clip(weight: Tensor, size: Tensor, scheme: Scheme) -> Tensor:
    """Where the grid of each row should end for the least rounding error: ``[N, 1]``, one of :data:`CLIPS`.

    Args:
        weight: ``[N, K]`` float32.
        size: ``[K]``, how much the squared error of each column counts.
        scheme: the number of bits. If the weight has a single scale, all rows get the same answer.
    """
    whole = weight.abs().amax(1, keepdim=True)
    together, bits = isinstance(scheme.weight.granularity, PerTensor), scheme.weight.number.bits
    if together:
        whole = whole.amax().expand_as(whole)
    best, found = torch.full_like(whole, float("inf")), torch.ones_like(whole)
    for clip in CLIPS:
        absmax = whole * clip
        rounded = decode(encode(weight, absmax, bits), absmax_scale(absmax, bits))
        error = ((rounded - weight) ** 2 @ size)[:, None]
        error = error.sum().expand_as(error) if together else error
        found = torch.where(error < best, clip, found)
        best = torch.minimum(error, best)
    return found

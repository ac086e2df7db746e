"""A closed-form guess of the output error, by which calibrators compare what they might do to a site."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.core.numerics import absmax_scale, decode, encode, qmax
from quantkit.core.rotation import Rotation, hadamard
from quantkit.core.scheme import Scheme

ROWS = 512
"""Rows of a weight on which candidates are compared: the error is a sum over rows, so a sample ranks them as well."""


def sampled_rows(weight: Tensor) -> Tensor:
    """At most :data:`ROWS` rows of ``weight [N, K]``, evenly spaced."""
    return weight[torch.linspace(0, len(weight) - 1, min(ROWS, len(weight)), device=weight.device).long()]


def noise(x: Tensor, counts: Tensor, w: Tensor, scheme: Scheme, rotation: Rotation | None = None) -> float:
    """Predicted squared error of ``x w^T`` after rounding both sides, up to a constant.

    A value is off by ``step**2 / 12`` on average, or by its own square where it is so small that it rounds to zero. An error in
    ``x[t, j]`` reaches the output through column j of ``w``, and one in ``w[n, j]`` through column j of ``x``.

    Args:
        x: ``[T, K]`` float32 transformed tokens; counts ``[T]``, how many tokens each stands for.
        w: ``[N, K]`` float32 transformed weights.
        scheme: bits and granularity.
        rotation: applied to both sides before they are rounded, such as :attr:`SiteView.rotation_ahead`.
    """
    if rotation is not None:
        x, w = rotated(x, rotation), rotated(w, rotation)
    x2, w2 = x * x, w * w
    x_top = x.abs().amax(1, keepdim=True) if not scheme.is_static else x.abs().amax()
    w_top = w2.amax(1, keepdim=True) if scheme.weights == "channel" else w2.amax()
    x_step, w_step = (x_top / qmax(scheme.activation_bits)) ** 2 / 12, w_top / qmax(scheme.weight_bits) ** 2 / 12
    x_step = x_step if scheme.quantizes_activations else torch.zeros_like(x_step)
    from_x = (counts @ torch.minimum(x2, x_step)) @ w2.sum(0)
    from_w = (counts @ x2) @ torch.minimum(w2, w_step).sum(0)
    return float(from_x + from_w)


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """``rotation.apply(x)`` up to rounding, in few products, since a search asks for it a hundred times."""
    y = x if rotation.signs is None else x * rotation.signs.to(x)
    done = 1
    while done < rotation.block:  # the Hadamard matrix of n m is the Kronecker product of those of n and m
        factor = hadamard(min(rotation.block // done, 64)).to(x)
        y = y.reshape(-1, len(factor)) @ factor if done == 1 else factor @ y.view(-1, len(factor), done)
        done *= len(factor)
    return y.view(x.shape)


def power_mean(tokens: Tensor, counts: Tensor, power: int) -> Tensor:
    """Of ``|tokens| [T, K]`` over tokens that stand for ``counts [T]``, ``[K]``."""
    return ((counts @ tokens.abs() ** power) / counts.sum()) ** (1 / power)


CLIPS = tuple(1 - i / 40 for i in range(21))
"""Shares of a row's largest weight that its grid may span: 1 down to 1/2."""


def best_clip(weight: Tensor, size: Tensor, scheme: Scheme) -> Tensor:
    """The share ``[N, 1]`` of each row's grid with the least rounding error of ``weight [N, K]``.

    Args:
        weight: ``[N, K]`` float32.
        size: ``[K]``, how much the square of an error in each column counts.
        scheme: bits; with one scale for the whole weight all rows get the same share.
    """
    whole = weight.abs().amax(1, keepdim=True)
    together = scheme.weights == "tensor"
    if together:
        whole = whole.amax().expand_as(whole)
    best, clip = torch.full_like(whole, float("inf")), torch.ones_like(whole)
    for share in CLIPS:
        absmax = whole * share
        rounded = decode(encode(weight, absmax, scheme.weight_bits), absmax_scale(absmax, scheme.weight_bits))
        error = ((rounded - weight) ** 2 @ size)[:, None]
        error = error.sum().expand_as(error) if together else error
        clip = torch.where(error < best, share, clip)
        best = torch.minimum(error, best)
    return clip

"""Rounding through which gradients pass: the arithmetic of learning, without any module.

Rounding has the gradient 0 almost everywhere, so learning through it needs a substitute. Here a value is rounded as
``y = scale * clamp(round(x / scale))``, and both inputs get a gradient:

- ``x`` gets the gradient of ``y`` unchanged if it lies inside of the grid (straight-through), and none if it lies beyond, where
  moving it a little would not change its code.
- ``scale`` gets ``code - x / scale`` for each value inside of the grid: the rounding error that a wider step makes larger. For
  a value beyond, it gets the code itself, because the end of the grid moves with the scale.

The scale itself comes from the data, as the largest absolute value or as a range, so its gradient flows on to the values that
set it. :func:`round_symmetric` and :func:`round_activation` leave that to autograd. :class:`RoundRows` computes the same for
the usual case, one symmetric scale for each row, with fewer passes over memory.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkit.core.formats import Quantized
from quantkit.core.numerics import ABSMAX_FLOOR, absmax_scale, encode, encode_asymmetric, qmax, range_scale


def round_symmetric(x: Tensor, absmax: Tensor, bits: int) -> Tensor:
    """``x`` rounded to ``bits``-bit symmetric codes of a grid that ends at ``absmax``; both get gradients.

    Args:
        x: float, any shape.
        absmax: float, of a shape that broadcasts to that of ``x``.
        bits: of the codes.
    """
    with torch.no_grad():
        codes = encode(x, absmax, bits)
        inside = x.abs() * qmax(bits) <= absmax * (qmax(bits) + 0.5)
    return StraightThrough.apply(x, absmax_scale(absmax, bits), codes, inside)


def round_activation(x: Tensor, format: Quantized, low: Tensor, high: Tensor) -> Tensor:
    """``x`` rounded as ``format`` rounds activations with the range from ``low`` to ``high``; all three get gradients.

    Args:
        x: float, any shape.
        format: symmetric or asymmetric, and how many bits.
        low, high: least and largest value, of shapes that broadcast to that of ``x``.
    """
    bits = format.number.bits
    if format.number.symmetric:
        return round_symmetric(x, torch.maximum(-low, high) if format.is_static else high, bits)
    scale, zero = range_scale(low, high, bits)
    with torch.no_grad():
        codes = encode_asymmetric(x, scale, zero, bits).float() - zero
        wanted = torch.round(x / scale) + zero
        inside = (wanted >= -qmax(bits) - 1) & (wanted <= qmax(bits))
    return StraightThrough.apply(x, scale, codes, inside)


class StraightThrough(torch.autograd.Function):
    """``codes * scale``, with the gradients of ``x`` and ``scale`` that this file opens with.

    ``inside``, a bool for each value, says which values of ``x`` lie inside of the grid.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, codes: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, codes, inside)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale, codes, inside = ctx.saved_tensors
        of_x = gradient * inside if ctx.needs_input_grad[0] else None
        of_scale = None
        if ctx.needs_input_grad[1]:
            of_scale = (gradient * (codes - torch.where(inside, x / scale, 0.0))).sum_to_size(scale.shape)
        return of_x, of_scale, None, None


class RoundRows(torch.autograd.Function):
    """Rounds each row of ``x [..., K]`` to symmetric codes of a grid that ends at its largest absolute value times ``clip``.

    The result is that of :func:`round_symmetric`. It takes half as many passes over memory, and a fifth where the passes are
    compiled; on a GPU they are most of what a step of learning costs. Where several values of a row are the largest, the first
    one gets the gradient of the scale, while autograd would divide it among them.

    Arguments of ``apply``: ``x``; ``clip``, which broadcasts to ``[..., 1]``, or None for 1; and the bits of the codes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor | None, bits: int) -> Tensor:
        y, by_scale, largest, index = fused(round_rows, x)(x, clip, bits)
        ctx.save_for_backward(by_scale, index, x.gather(-1, index).sign(), largest, clip)
        ctx.top = float(qmax(bits))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        by_scale, index, sign, largest, clip = ctx.saved_tensors
        of_x, of_scale = fused(gradient_of_rows, gradient)(gradient, by_scale)
        of_absmax = of_scale / ctx.top
        of_clip = None if clip is None or not ctx.needs_input_grad[1] else of_absmax * largest
        of_largest = of_absmax if clip is None else of_absmax * clip
        return of_x.scatter_add_(-1, index, of_largest * sign), of_clip, None


def round_rows(x: Tensor, clip: Tensor | None, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward pass of :class:`RoundRows`.

    Returns:
        y: ``[..., K]``, the rounded values.
        by_scale: ``[..., K]``, the derivative of ``y`` by the scale of its row. It is at most 1/2 in size for values inside of
            the grid, and the code, which is larger than that, for values beyond it; so it tells the two apart.
        largest, index: ``[..., 1]``, the largest absolute value of each row and where in the row it is.
    """
    top = float(qmax(bits))
    largest, index = x.abs().max(dim=-1, keepdim=True)
    absmax = largest if clip is None else largest * clip
    steps = x * (torch.full_like(absmax, top) / absmax.clamp_min(ABSMAX_FLOOR))
    codes = steps.round().clamp(-top, top)
    by_scale = torch.where(steps.abs() <= top + 0.5, codes - steps, codes)
    return codes * absmax_scale(absmax, bits), by_scale, largest, index


def gradient_of_rows(gradient: Tensor, by_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``x [..., K]``, straight through, and of the scales ``[..., 1]``, from that of ``y`` and
    :func:`round_rows`."""
    return torch.where(by_scale.abs() <= 0.5, gradient, 0.0), (gradient * by_scale).sum(-1, keepdim=True)


def fused(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """``function``, compiled if ``x`` is so large a tensor on a GPU that passes over memory are what it costs."""
    worth_it = x.is_cuda and x.numel() >= 2**20 and importlib.util.find_spec("triton") is not None
    return compiled(function) if worth_it else function


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled for all shapes, once in a process."""
    return torch.compile(function, dynamic=True)

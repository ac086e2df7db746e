"""Attention in few bits, in plain torch: the arithmetic, without any module or model.

There is no integer kernel for attention here. It is simulated: queries, keys and values are rounded to the values that their
codes stand for (:func:`round_heads`), and the products are computed in floating point. Where a scheme rounds the probabilities
as well, torch's own function cannot be used, because the probabilities never leave it; :func:`attention` computes the same
thing step by step and rounds them in the middle.

A *head* is a slice of the channels that attends by itself. Its channels may be divided into *clusters* of similar range, each
with a scale of its own; nothing is reordered for this, since a label says for each channel which cluster it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.core.numerics import absmax_scale, decode, encode, encode_asymmetric, poison, range_scale

STEPS = 255
"""Probabilities are rounded to whole multiples of 1 / STEPS, which are 256 values from 0 to 1 and fit into 8 bits."""


def through(function: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """``function(x, *rest)``, where gradients pass to ``x`` unchanged, as if the function did nothing (straight through)."""
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _StraightThrough.apply(x, function, *rest)
        return y
    return function(x, *rest)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[..., Tensor], *rest: Any) -> Tensor:
        ctx.rest = len(rest)
        return function(x, *rest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None, *[None] * ctx.rest


def round_heads(x: Tensor, label: Tensor | None, ends: Tensor | None, clusters: int, bits: int, symmetric: bool) -> Tensor:
    """``x`` rounded to the codes of each cluster of channels of each head, in the dtype of ``x``.

    Where ``x`` is NaN or infinite the result is NaN.

    Args:
        x: ``[..., H, L, D]`` (or ``[..., L, D]`` for a single head), any floating dtype.
        label: ``[H, D]`` int64, the cluster of each channel; None if each head is a single cluster.
        ends: ``[2, H, C]`` float32, the least and the largest value of each cluster; None to take those of each token instead.
        clusters: C, the number of clusters in each head.
        bits: of the codes.
        symmetric: whether codes are symmetric around 0, or have a zero point.
    """
    heads = (x if x.dim() > 3 else x.unsqueeze(-3)).float()
    index = None if label is None else label[:, None]
    low, high = cluster_ends(heads, index, clusters) if ends is None else ends[:, :, None]
    if index is not None:  # from one value for each cluster to one for each channel
        low, high = (end.gather(-1, index.expand(*end.shape[:-1], -1)) for end in (low, high))
    if symmetric:
        absmax = torch.maximum(-low, high)
        y = decode(encode(heads, absmax, bits), absmax_scale(absmax, bits))
    else:
        scale, zero = range_scale(low, high, bits)
        y = decode(encode_asymmetric(heads, scale, zero, bits), scale, zero)
    return (y + poison(heads)).reshape(x.shape).to(x.dtype)


def cluster_ends(x: Tensor, index: Tensor | None, clusters: int) -> tuple[Tensor, Tensor]:
    """The least and the largest value of each token in each cluster of channels, extended so that 0 lies between them.

    Args:
        x: ``[..., H, L, D]`` float.
        index: ``[H, 1, D]`` int64, the cluster of each channel; None for a single one.
        clusters: C.

    Returns:
        Two tensors ``[..., H, L, C]``.
    """
    parts = [x] if index is None else [torch.where(index == c, x, 0.0) for c in range(clusters)]
    ends = [part.aminmax(dim=-1) for part in parts]
    return torch.stack([end.min for end in ends], -1).clamp_max(0), torch.stack([end.max for end in ends], -1).clamp_min(0)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` step by step, with probabilities rounded to multiples of 1/255.

    Takes the arguments of :func:`torch.nn.functional.scaled_dot_product_attention`. Computes in float32 (in float64 for inputs
    in float64) and returns the dtype of ``query``. A query that may look at no key gets zeros.
    """
    dtype = query.dtype
    query, key, value = (t if dtype == torch.float64 else t.float() for t in (query, key, value))
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if boolean else scores + attn_mask.to(scores)
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    weights = through(round_probabilities, weights)
    return (F.dropout(weights, dropout_p) @ value).to(dtype)


def round_probabilities(weights: Tensor) -> Tensor:
    """Numbers from 0 to 1, rounded to multiples of 1/255, half to even."""
    return torch.round(weights * STEPS) / STEPS

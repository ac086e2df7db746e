"""The meaning of every operation in plain torch: clear, exact, and slow. Also the fallback on any device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from quantkit.core.groups import group_scales, with_multipliers
from quantkit.core.numerics import absmax_scale, encode, encode_asymmetric, qmax, range_scale, zero_point
from quantkit.core.weights import largest_in_groups


def quantize_rows(
    x: Tensor, *, bits: int = 8, symmetric: bool = True, groups: tuple[int, ...] = (), shares: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Dynamic per-token codes of ``x [M, K]``.

    Args:
        x: float.
        bits, symmetric: number format.
        groups, shares: sizes of G consecutive clusters of channels, each with a scale of its own, and
            :func:`quantkit.core.groups.shares` of what they are multiplied by; none is one of all.

    Returns:
        codes ``[M, K]`` int8; scale ``[M, 1]`` float32, or base scale and multipliers ``[M, 1 + G]`` with groups; and zero
        point ``[M, 1]`` (``[M, G]``) int32, or None when symmetric.
    """
    if not x.shape[1]:
        return x.to(torch.int8), x.new_ones(x.shape[0], 1, dtype=torch.float32), None
    if not groups:
        if symmetric:
            absmax = largest_in_groups(x, (x.shape[1],))
            return encode(x, absmax, bits), absmax_scale(absmax, bits), None
        low, high = x.float().aminmax(dim=1, keepdim=True)
        scale, lowest = range_scale(low, high, bits)
        return encode_asymmetric(x, scale, lowest, bits), scale, lowest
    assert shares is not None
    ends = [part.float().aminmax(dim=1) for part in x.split(groups, dim=1)]
    low, high = (torch.stack(values, 1) for values in zip(*ends, strict=True))
    scale = absmax_scale(torch.maximum(-low, high), bits) if symmetric else range_scale(low, high, bits)[0]
    finite = scale.isfinite().all(dim=1, keepdim=True)  # where one cluster is not, none counts as such
    scale = with_multipliers(torch.where(finite, scale, 1.0), shares)
    zero = None if symmetric else zero_point(torch.where(finite, low.clamp_max(0), 0.0), group_scales(scale), bits)
    q = codes_of(x, group_scales(scale), zero, groups, bits).masked_fill(~finite, 0)
    return q, poisoned(scale, finite), zero


def quantize_static(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int = 8,
    groups: tuple[int, ...] = (),
    shares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Static codes of ``x [M, K]`` for ``scale [G]`` and ``zero [G]``, G clusters or one; values outside saturate.

    Returns:
        codes ``[M, K]`` int8; and scale ``[M, 1]`` float32, or base scale and multipliers ``[M, 1 + G]`` with groups, whose
        products the codes are rounded with. It is NaN for rows that are not finite.
    """
    finite = x.isfinite().all(dim=1, keepdim=True)
    if groups:
        assert shares is not None
        scale = with_multipliers(scale, shares)
    own = group_scales(scale) if groups else scale
    q = codes_of(x, own, zero, groups or (x.shape[1],), bits).masked_fill(~finite, 0)
    return q, poisoned(scale.expand(x.shape[0], -1), finite)


def codes_of(x: Tensor, scale: Tensor, zero: Tensor | None, groups: tuple[int, ...], bits: int) -> Tensor:
    """Codes of ``x [M, K]`` for ``scale`` and ``zero [..., G]`` of clusters of its columns; values outside saturate."""
    top = qmax(bits)
    codes = []
    for g, part in enumerate(x.split(groups, dim=1)):
        at = (..., slice(g, g + 1))
        if zero is None:
            codes.append(torch.round(part.float() * (1.0 / scale[at])).clamp(-top, top).nan_to_num(0.0).to(torch.int8))
        else:
            codes.append(encode_asymmetric(part, scale[at], zero[at], bits))
    return torch.cat(codes, 1)


def poisoned(scale: Tensor, finite: Tensor) -> Tensor:
    """``scale [M, 1]`` or ``[M, 1 + G]`` with NaN, and multiples of it that are 1, for rows that are not finite."""
    return torch.cat([torch.where(finite, scale[:, :1], torch.nan), torch.where(finite, scale[:, 1:], 1.0)], 1)


def reaching(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Finite elements ``[M, K]`` of ``x`` that reach the threshold, and columns ``[K]`` with such an element; bool (paper,
    sec. 3.2)."""
    large = (x.abs() >= threshold) & x.isfinite()
    return large, large.any(dim=0)


def column_product(x: Tensor, columns: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """``x[:, columns] @ (weight * weight_scale)[:, columns]^T``, ``[M, N]`` float32, for ``columns [K]`` bool."""
    index = columns.nonzero().view(-1)
    return x.index_select(1, index).float() @ (weight.index_select(1, index).float() * weight_scale).t()


def int_matmul(q: Tensor, weight: Tensor) -> Tensor:
    """``q [M, K] int8 @ weight [N, K]^T int8 -> [M, N] int32``, exact."""
    # Integer products on CPU; elsewhere float64, exact below 2**53, since CUDA has no integer matmul for every shape.
    if q.device.type == "cpu":
        return q.to(torch.int32) @ weight.to(torch.int32).t()
    return (q.double() @ weight.double().t()).to(torch.int32)


def epilogue(
    acc: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    zero: Tensor | None,
    weight_sum: Tensor | None,
    extra: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``(acc - zero * weight_sum) * x_scale * weight_scale + extra`` in float32, cast last.

    Args:
        acc: ``[M, N]`` int32.
        x_scale: ``[M, 1]`` float32.
        weight_scale: ``[N]`` float32.
        zero, weight_sum: ``[M, 1]`` (or ``[1]``) int32 and ``[N]`` int32, for asymmetric activations.
        extra: bias ``[N]``, or bias and side product ``[M, N]``, float.
        dtype: of the result.
    """
    if zero is not None:
        assert weight_sum is not None
        acc = acc - zero * weight_sum
    y = acc.float() * x_scale * weight_scale
    return (y if extra is None else y + extra.float()).to(dtype)


def row_sums(weight: Tensor, groups: tuple[int, ...] = ()) -> Tensor:
    """Sums of the codes in each row of ``weight [N, K]``, int32: ``[N]``, or ``[G, N]`` of each cluster of channels."""
    if not groups:
        return weight.sum(dim=1, dtype=torch.int32)
    return torch.stack([part.sum(dim=1, dtype=torch.int32) for part in weight.split(groups, dim=1)])


def group_sum(
    products: Iterable[Tensor], multipliers: Tensor, row_multipliers: Tensor, zero: Tensor | None, weight_sum: Tensor | None
) -> Tensor:
    """``[M, N]`` int32: the sum over groups g of ``multiplier_g row_multiplier_g (acc_g - zero_g weight_sum_g)``.

    Times the base scales of token and row, this is the product.

    Args:
        products: of each of G groups of channels, ``acc [M, N]`` int32.
        multipliers, row_multipliers: ``[M, G]`` and ``[N, G]``, whole numbers, of tokens and of rows of the weight.
        zero, weight_sum: ``[M, G]`` (or ``[G]``) and ``[G, N]`` int32, for asymmetric activations.
    """
    terms = []
    both = multipliers.to(torch.int32).split(1, dim=1), row_multipliers.to(torch.int32).unbind(1)
    for g, (product, multiplier, row_multiplier) in enumerate(zip(products, *both, strict=True)):
        if zero is not None:
            assert weight_sum is not None
            product = product - zero[..., g : g + 1] * weight_sum[g]
        terms.append(product * multiplier * row_multiplier)
    return sum(terms[1:], terms[0])  # not in place, which tensors of other libraries and transforms do not follow


def rms_norm(x: Tensor, gain: Tensor, eps: float, offset: float = 0.0, late: bool = False) -> Tensor:
    """``(gain + offset) * x / sqrt(mean(x ** 2) + eps)`` in float32, rounded to the dtype of x where models do it.

    Args:
        x: ``[..., K]``.
        gain: ``[K]``.
        eps: added to the mean of squares.
        offset: added to the gain.
        late: whether to round once, behind the gain (as Gemma and ``nn.RMSNorm``); else in front of it, too (as Llama).
    """
    wide = x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = y if late else y.to(x.dtype).float()
    return (y * (gain.float() + offset)).to(x.dtype)

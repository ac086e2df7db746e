"""The meaning of every operation in plain torch: clear, exact, and slow. Also the fallback on any device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from quantkit.numerics import (
    SLACK,
    absmax_scale,
    encode_asymmetric,
    encode_clusters,
    largest_of,
    on_grid,
    peaks,
    raised,
    range_scale,
    reach,
)


def quantize_rows(
    x: Tensor, *, bits: int = 8, symmetric: bool = True, groups: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Dynamic per-token codes of ``x [M, K]``.

    Args:
        x: float.
        bits, symmetric: number format.
        groups: sizes of G consecutive clusters of channels, each with a scale of its own; none is one of all.

    Returns:
        codes ``[M, K]`` int8, scale ``[M, G]`` float32, and zero ``[M, G]`` int32 or None when symmetric.
    """
    if not x.shape[1]:
        return x.to(torch.int8), x.new_ones(len(x), 1, dtype=torch.float32), None
    sizes = groups or (x.shape[1],)
    if symmetric:
        absmax = largest_of(x, sizes)
        finite = absmax.isfinite().all(dim=1, keepdim=True)
        absmax = torch.where(finite, raised(absmax, reach(sizes, True)[0]), torch.nan)
        return encode_clusters(x, absmax, sizes, bits), absmax_scale(absmax, bits), None
    ends = [part.float().aminmax(dim=1) for part in x.split(sizes, dim=1)]
    low, high = (torch.stack(values, 1) for values in zip(*ends, strict=True))
    scale, zero = range_scale(low, high, bits, reach(sizes, False)[0])
    parts = zip(x.split(sizes, dim=1), scale.split(1, dim=1), zero.split(1, dim=1), strict=True)
    return torch.cat([encode_asymmetric(*part, bits) for part in parts], 1), scale, zero


def quantize_static(
    x: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int = 8, groups: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Static codes of ``x [M, K]`` for ``scale [G]`` and ``zero [G]``, G clusters or one; values outside saturate.

    Returns:
        codes ``[M, K]`` int8 and scale ``[M, G]`` float32: the given one, NaN for rows that are not finite.
    """
    finite = x.isfinite().all(dim=1, keepdim=True)
    if groups:
        zeros = [None] * len(groups) if zero is None else zero.split(1)
        columns = x.split(groups, dim=1)
        parts = [quantize_static(*part, bits=bits)[0] for part in zip(columns, scale.split(1), zeros, strict=True)]
        return torch.cat(parts, 1).masked_fill(~finite, 0), torch.where(finite, scale, torch.nan)
    top = 2 ** (bits - 1) - 1
    if zero is None:
        q = torch.round(x.float() * (1.0 / scale)).clamp(-top, top).nan_to_num(0.0).to(torch.int8)
    else:
        q = encode_asymmetric(x, scale, zero, bits)
    return q, torch.where(finite, scale, torch.nan)


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


def steps(scale: Tensor) -> Tensor:
    """``[..., G - 1]``: by how much the scale of each of G clusters is larger than that of the next."""
    return scale[..., :-1] / scale[..., 1:]


def chained(scale: Tensor) -> Tensor:
    """``[G, N]`` from the scales ``[N, G]`` of clusters: :func:`steps` from each to the next, and at last those of the last."""
    return torch.cat([steps(scale), scale[:, -1:]], 1).t().contiguous()


def segment_sum(
    products: Iterable[Tensor],
    groups: tuple[int, ...],
    x_scale: Tensor,
    weight_scale: Tensor,
    zero: Tensor | None,
    weight_sum: Tensor | None,
) -> Tensor:
    """``[M, N]`` int32 of clusters of channels, in the scales of the last one.

    From cluster g to the next, ``acc`` becomes ``acc * (x_scale_g / x_scale_g+1) * (weight_scale_g / weight_scale_g+1)``, the
    first product in float32, the second rounded once, :func:`quantkit.numerics.on_grid`; each cluster adds
    ``acc_g - zero_g * weight_sum_g``.

    Args:
        products: of each of G clusters, ``[M, N]`` int32.
        groups: their sizes.
        x_scale, weight_scale: ``[M, G]`` and ``[N, G]`` float32.
        zero, weight_sum: ``[M, G]`` (or ``[G]``) and ``[G, N]`` int32, for asymmetric activations.
    """
    acc = torch.zeros(len(x_scale), len(weight_scale), dtype=torch.int32, device=x_scale.device)
    x_steps, weight_steps = steps(x_scale).nan_to_num(0.0), steps(weight_scale)
    peak = torch.zeros_like(x_scale[:, :1])
    for g, (product, most) in enumerate(zip(products, peaks(groups, zero is None).to(peak.device), strict=True)):
        if g:
            x_step = x_steps[:, g - 1 : g]
            peak = peak * (x_step * SLACK)
            acc = on_grid(acc.float() * x_step, weight_steps[:, g - 1], peak)
        peak = peak + most
        if zero is not None:
            assert weight_sum is not None
            product = product - zero[..., g : g + 1] * weight_sum[g]
        acc = acc + product
    return acc


def segment_epilogue(
    acc: Tensor, x_scale: Tensor, weight_scale: Tensor, side: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``acc * x_scale * weight_scale + side + bias`` of a :func:`segment_sum`, with the scales of the last cluster, cast last.

    Args:
        acc: ``[M, N]`` int32.
        x_scale, weight_scale: ``[M, G]`` and ``[N, G]`` float32.
        side, bias: ``[M, N]`` and ``[N]``, float.
        dtype: of the result.
    """
    y = acc.float() * x_scale[:, -1:] * weight_scale[:, -1]
    for extra in (side, bias):
        y = y if extra is None else y + extra.float()
    return y.to(dtype)

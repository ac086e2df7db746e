"""The meaning of every operation in plain torch: clear, exact, and slow. Also the fallback on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numerics import absmax_scale, encode, encode_asymmetric, range_scale


def quantize_rows(x: Tensor, *, bits: int = 8, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Dynamic per-token codes of ``x [M, K]``.

    Returns:
        codes ``[M, K]`` int8, scale ``[M, 1]`` float32, and zero ``[M, 1]`` int32 or None when symmetric.
    """
    if not x.shape[1]:
        return x.to(torch.int8), x.new_ones(len(x), 1, dtype=torch.float32), None
    if symmetric:
        absmax = x.float().abs().amax(dim=1, keepdim=True)
        return encode(x, absmax, bits), absmax_scale(absmax, bits), None
    low, high = x.float().aminmax(dim=1, keepdim=True)
    scale, zero = range_scale(low, high, bits)
    return encode_asymmetric(x, scale, zero, bits), scale, zero


def quantize_static(x: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Static per-tensor codes of ``x [M, K]`` for ``scale [1]`` and ``zero [1]``; values outside saturate.

    Returns:
        codes ``[M, K]`` int8 and scale ``[M, 1]`` float32: the given one, NaN for rows that are not finite.
    """
    top = 2 ** (bits - 1) - 1
    if zero is None:
        q = torch.round(x.float() * (1.0 / scale)).clamp(-top, top).nan_to_num(0.0).to(torch.int8)
    else:
        q = encode_asymmetric(x, scale, zero, bits)
    finite = x.isfinite().all(dim=1, keepdim=True)
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

"""The kernel that puts channels in order, by its values: see gluon_values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gluon_values import DType, Pointer, Program, Value, on_cpu
from torch import Tensor

from quantkit.core.groups import group_scales, with_multipliers
from quantkit.ops.gpu.codes import order, shapes
from quantkit.ops.gpu.layout import BLOCK, padded, scale_columns
from quantkit.ops.gpu.numbers import FLOOR
from quantkit.ops.gpu.packing import narrow, places_of
from quantkit.ops.reference import poisoned


def larger(a: Value, b: Value) -> Value:
    most = torch.maximum(a.of.abs(), b.of.abs())
    return Value(torch.where(most.isnan(), float("nan"), most))  # a GPU's NaN has no sign


def words(a: Value, b: Value) -> Value:
    low, high = (t.of.contiguous().view(torch.int16).long() & 0xFFFF for t in (a, b))
    return Value(low | high << 16)


def halves(word: Value, dtype: DType) -> tuple[Value, ...]:
    parts = (word.of & 0xFFFF, word.of >> 16)
    return tuple(Value(part.to(torch.uint16).view(dtype.torch).float()) for part in parts)


def low_bytes(x: Value, mask: Value) -> Value:
    return Value((x.of.view(torch.int32) & 255 & mask.of).to(torch.uint8).view(torch.int8))


def quantize(x: Tensor, *, programs: int = 3, **vectors: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernel ``order`` launches it."""
    m, k = x.shape
    clusters, shares = vectors.get("clusters"), vectors.get("shares")
    places, count = (padded(k), 1) if clusters is None else (16 * len(clusters), len(shares))
    q, scale, kept = (
        torch.full((m, places), 99, dtype=torch.int8),
        torch.full((m, scale_columns(count)), 7.0),
        torch.zeros_like(x),
    )
    block, most = (1 << (n - 1).bit_length() for n in (places, count))
    names = ("x2", "gain", "pre_scale", "permutation", "clusters", "shares")
    pointers = [None if t is None else Pointer(t) for t in (x, *map(vectors.get, names), q, scale, kept)]
    source = "rms" if "gain" in vectors else ""
    for number in range(programs):
        program = Program(number, programs, shapes.order_warps(block))
        kernel = on_cpu(order.order_kernel, program, larger=larger, words=words, halves=halves, low_bytes=low_bytes)
        kernel(*pointers, m, k, places, k, k, 1e-6, 0.0, source, 127, most, count, block, block == k == places, False)
    return q, scale, kept


def wanted(
    x: Tensor, groups: tuple[int, ...], channels: Tensor, shares: Tensor | None, gain: Tensor | None, pre: Tensor
) -> tuple[Tensor, Tensor]:
    """What is to be rounded, in order, and its scale: NaN for rows that are not finite."""
    z = x.float()
    if gain is not None:
        z = z / (z.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * gain.float()
    z = (z * pre)[:, channels]
    finite = z.isfinite().all(1, keepdim=True)
    absmax = torch.stack([part.abs().amax(1) for part in z.split(groups, 1)], 1)
    scale = torch.where(finite, absmax, 0.0).clamp_min(getattr(FLOOR, "value", FLOOR)) / 127
    return z, poisoned(scale if shares is None else with_multipliers(scale, shares), finite)


GROUPS = [(128, 896), (128, 384, 512), (20, 500, 1500, 2076), (130,) * 5, (512,) * 8, (256,) * 16, (128,) * 32, (4096,)]


@pytest.mark.parametrize("groups", GROUPS, ids=lambda groups: f"{len(groups)} of {sum(groups)}")
@pytest.mark.parametrize("form", ["alone", "norm", "residual"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_order(groups: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    m, k, channels = 5, sum(groups), torch.randperm(sum(groups))
    x, y = torch.randn(m, k).to(dtype), torch.randn(m, k).to(dtype)
    x[:, channels[: groups[0]]] *= 30
    x[1], x[2, k // 2], x[3, 0] = 0, float("nan"), float("-inf")
    vectors: dict[str, Any] = {"pre_scale": torch.rand(k) + 0.1, "permutation": narrow(channels, k)}
    places = torch.arange(k)
    if len(groups) > 1:
        _, group_of, places = places_of(groups, BLOCK, channels, torch.device("cpu"))
        gathered = torch.full((16 * len(group_of),), -1).index_copy_(0, places, channels)
        vectors |= {"permutation": narrow(gathered, k), "clusters": group_of, "shares": torch.rand(len(groups)) / 1000}
    vectors |= {} if form == "alone" else {"gain": torch.rand(k).to(dtype)}
    vectors |= {"x2": y} if form == "residual" else {}
    q, scale, kept = quantize(x, **vectors)
    total = (x.float() + y.float()).to(dtype) if form == "residual" else x
    if form == "residual":
        assert torch.equal(kept.nan_to_num(5), total.nan_to_num(5))
    z, scales = wanted(total, groups, channels, vectors.get("shares"), vectors.get("gain"), vectors["pre_scale"])
    torch.testing.assert_close(scale[:, :1], scales[:, :1], rtol=1e-5, atol=0, equal_nan=True)
    # a multiple may be the next one where the last bit of a range, or of a norm, is another
    assert float((scale[:, 1:] != scales[:, 1:]).float().mean() if len(groups) > 1 else 0) < 0.02
    own = group_scales(scale) if len(groups) > 1 else scale
    parts = zip(z.split(groups, 1), own.split(1, 1), strict=True)
    codes = torch.zeros(m, q.shape[1]).index_copy_(1, places, torch.cat([part / s for part, s in parts], 1)).nan_to_num(0, 0, 0)
    off = (q.float() - codes.round()).abs()
    assert int(off.max()) <= 1
    assert float(off.mean()) < 1e-2  # ties: sums of squares are added in another order


@pytest.mark.parametrize("k", [512, 576, 1000, 8000])
def test_rows_of_any_length(k: int) -> None:
    x, channels = torch.randn(3, k).bfloat16(), torch.randperm(k)
    q, scale, _ = quantize(x, permutation=narrow(channels, k))
    assert torch.equal(scale, x.float().abs().amax(1, keepdim=True) / 127)
    assert int((q[:, :k].float() - (x.float()[:, channels] / scale).round()).abs().max()) <= 1
    assert not q[:, k:].any()

"""Kernels between the products of a decoding step, beside the plain arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from quantkit.ops.gpu.step.attention import attention, attention_reference, why_not
from quantkit.ops.gpu.step.norm import norm, norm_reference
from quantkit.ops.gpu.step.rotary import rotary, rotary_reference

HALF = torch.float16


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(HALF)


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 20), st.booleans(), st.integers(0, 99))
def test_rotary_positions_have_the_same_bits(b: int, h: int, t: int, half: int, shared: bool, seed: int) -> None:
    x = random(seed, b, t, h, 2 * half + 3)[..., 1 : 1 + 2 * half].transpose(1, 2)
    cos, sin = random(seed + 1, 1 if shared else b, 1, t, 2 * half), random(seed + 2, b, 1, t, 2 * half)
    wanted = rotary_reference(x, cos, sin)
    got = rotary(x, cos, sin, wanted.stride())
    assert torch.equal(got, wanted)
    assert got.stride() == wanted.stride()


def test_rotary_positions_that_are_not_finite() -> None:
    x, cos = random(0, 1, 2, 3, 8), random(1, 1, 1, 3, 8)
    x[0, 0, 1, 2], x[0, 1, 2, 5], cos[0, 0, 0, 0] = float("nan"), float("inf"), float("-inf")
    wanted = rotary_reference(x, cos, cos)
    torch.testing.assert_close(rotary(x, cos, cos, wanted.stride()), wanted, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 200), st.booleans(), st.sampled_from([1e-6, 1e-2]), st.integers(0, 99))
def test_norms(m: int, k: int, two: bool, eps: float, seed: int) -> None:
    x, gain = random(seed, m, 2 * k)[:, :k], random(seed + 1, k)
    x2 = random(seed + 2, m, k) if two else None
    x[0, : k // 2] = 0
    (y, total), (wanted, wanted_total) = norm(x, x2, gain, eps), norm_reference(x, x2, gain, eps)
    torch.testing.assert_close(y, wanted, rtol=4e-3, atol=1e-6)  # the last bit, twice
    assert torch.equal(total, wanted_total)
    assert two or total is x


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 60000.0])
def test_norms_of_hostile_rows(value: float) -> None:
    x = torch.full((2, 16), value, dtype=HALF)
    x[1] = random(0, 16)
    gain = torch.ones(16, dtype=HALF)
    torch.testing.assert_close(norm(x, None, gain, 1e-6)[0], norm_reference(x, None, gain, 1e-6)[0], equal_nan=True, rtol=2e-3,
                               atol=1e-5)  # fmt: skip


MASKS: dict[str, Any] = {
    "none": lambda b, h, t, s, seed: None,
    "left padding": lambda b, h, t, s, seed: (torch.arange(s) >= s // 3)[None, None, None].expand(b, 1, t, s),
    "room behind": lambda b, h, t, s, seed: (torch.arange(s) <= s // 4)[None, None, None],
    "any": lambda b, h, t, s, seed: (random(seed, b, h, t, s) > 0).index_fill(3, torch.tensor([s - 1]), True),
    "numbers": lambda b, h, t, s, seed: random(seed, b, 1, t, s),
    "minus infinity": lambda b, h, t, s, seed: torch.zeros(1, 1, 1, s, dtype=HALF).index_fill(
        3, torch.arange(s // 2), -torch.inf
    ),
}


@settings(max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 300), st.sampled_from([16, 64]),
    st.sampled_from(list(MASKS)), st.integers(0, 99),
)  # fmt: skip
def test_attention(b: int, kv: int, g: int, t: int, s: int, d: int, kind: str, seed: int) -> None:
    h = kv * g
    q, k, v = (
        random(seed, b, t, h, d).transpose(1, 2),
        random(seed + 1, b, s, kv, d).transpose(1, 2),
        random(seed + 2, b, kv, s, d),
    )
    mask = MASKS[kind](b, h, t, s, seed + 3)
    assert why_not(q, k, v, mask) is None
    wide = mask if mask is None or mask.dtype == torch.bool else mask.float()
    wanted = attention_reference(q.float(), k.float(), v.float(), wide, 0.2)
    for strides in (None, q.stride()):
        got = attention(q, k, v, mask, 0.2, strides)
        torch.testing.assert_close(got.float(), wanted, rtol=0, atol=4e-3)
        assert got.stride() == (strides or got.contiguous().stride())


def test_attention_of_large_scores_and_of_nothing() -> None:
    q, k, v = random(0, 1, 4, 1, 16) * 100, random(1, 1, 2, 200, 16) * 100, random(2, 1, 2, 200, 16)
    wanted = attention_reference(q.float(), k.float(), v.float(), None, 1.0)
    torch.testing.assert_close(attention(q, k, v, None, 1.0).float(), wanted, rtol=0, atol=4e-3)
    nothing = torch.zeros(1, 1, 1, 200, dtype=torch.bool)
    assert torch.equal(attention(q, k, v, nothing, 1.0), attention_reference(q, k, v, nothing, 1.0))
    k[0, 0, 7], v[0, 1, 3] = float("nan"), float("inf")
    seen = (torch.arange(200) >= 10)[None, None, None]
    assert attention(q, k, v, seen.expand(1, 4, 1, 200), 1.0).isfinite().sum() < 64  # masked, but in a block that is read
    assert not attention(q, k, v, None, 1.0)[0, :2].isfinite().any()


def test_what_attention_does_not_take() -> None:
    q, k = random(0, 1, 4, 1, 16), random(1, 1, 2, 9, 16)
    assert why_not(q, k, k, None) is None
    for bad in (
        (q.float(), k.float(), k.float(), None), (q, k, k.float(), None), (q.expand(1, 4, 9, 16), k, k, None),
        (q, k[:, :, :0], k[:, :, :0], None),
        (q[..., :12], k[..., :12], k[..., :12], None), (q[:, :3], k, k, None), (q, k, k[:, :, :5], None),
        (q, k.transpose(2, 3).contiguous().transpose(2, 3), k, None), (q, k, k, torch.ones(9, dtype=torch.bool)),
        (q, k, k, torch.ones(1, 1, 1, 9, dtype=torch.int64)),
    ):  # fmt: skip
        assert why_not(*bad) is not None

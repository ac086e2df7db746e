"""The arithmetic of attention in few bits, against the reference of rounding and against torch's own attention."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, normal
from hypothesis import given
from hypothesis import strategies as st

from quantkit.core.numerics import qmax
from quantkit.ops import attention as module
from quantkit.ops.attention import attention, round_heads
from quantkit.ops.reference import quantize_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_token_is_rounded_as_the_reference_rounds_a_row(dtype: torch.dtype, symmetric: bool, bits: int) -> None:
    """Each cluster of each head by itself, in any order of its channels."""
    x = (normal(2, 3, 5, 8) * 3 + 1).to(dtype)
    x[0, 0, 2] = 0.0
    label = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(h)) % 3 for h in range(3)])
    got = round_heads(x, label, None, 3, bits, symmetric)
    assert got.dtype == dtype
    for head, cluster in itertools.product(range(3), range(3)):
        part = x[:, head][..., label[head] == cluster]
        codes, scale, zero = quantize_rows(part.flatten(0, 1), bits=bits, symmetric=symmetric)
        wanted = ((codes.float() - (0 if zero is None else zero)) * scale).view(part.shape).to(dtype)
        assert_same(got[:, head][..., label[head] == cluster].abs(), wanted.abs())  # a zero has either sign
        assert torch.equal(got[:, head][..., label[head] == cluster], wanted)
    one = round_heads(x, None, None, 1, bits, symmetric)
    assert torch.equal(one, round_heads(x, torch.zeros(3, 8, dtype=torch.int64), None, 1, bits, symmetric))


@given(st.integers(2, 8), st.booleans(), st.booleans(), st.floats(-4, 4), st.integers(0, 2**20))
def test_error_of_rounding(bits: int, symmetric: bool, static: bool, offset: float, seed: int) -> None:
    """At most half a step inside of the range, and a value beyond it lands on its end."""
    x, limit = normal(2, 3, 4, seed=seed)[None] + offset, 2.0
    low = torch.full((2, 1), -limit) if static else x.amin(-1).clamp_max(0)[..., None]
    high = torch.full((2, 1), limit) if static else x.amax(-1).clamp_min(0)[..., None]
    got = round_heads(x, None, torch.stack([low, high]) if static else None, 1, bits, symmetric)
    low, high = (end[:, None] if static else end for end in (low, high))
    top = torch.maximum(-low, high)
    step = top / qmax(bits) if symmetric else (high - low) / (2**bits - 1)
    # the zero point is rounded, so that an asymmetric range moves by up to half a step
    inside = x.clamp(-top, top) if symmetric else x.clamp(low, high)
    assert bool(((got - inside).abs() <= step * (0.5 if symmetric else 1.0) * (1 + 1e-5) + 1e-6).all())
    assert_same(round_heads(got, None, torch.stack([low[:, 0], high[:, 0]]), 1, bits, symmetric), got) if static else None


SHAPES = {"a token": (1, 2, 1, 4), "no batch": (0, 2, 3, 4), "no token": (1, 2, 0, 4), "more batches": (2, 3, 2, 4, 4)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape: tuple[int, ...]) -> None:
    x, label = normal(*shape), torch.arange(4).expand(2, 4) % 2
    got = round_heads(x, label, None, 2, 8, False)
    assert got.shape == x.shape
    assert torch.allclose(got, x, atol=0.02)
    for dims in (2, 3):  # without heads
        flat = normal(5, 5, 4)[:, 0] if dims == 2 else normal(5, 3, 4)
        assert torch.allclose(round_heads(flat, label[:1], None, 2, 8, False), flat, atol=0.02)


BOOLEAN = torch.tensor([[True, False, True, True, False]] * 3)
MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "boolean": {"attn_mask": BOOLEAN},
    "boolean, a blind query": {"attn_mask": BOOLEAN & torch.tensor([[False], [True], [True]])},
    "added": {"attn_mask": normal(2, 1, 3, 5, seed=7)},
    "added, a blind query": {"attn_mask": torch.where(torch.tensor([[False], [True], [True]]), 0.0, -math.inf).expand(3, 5)},
    "no query": {"queries": 0},
    "no key": {"keys": 0},
    "grouped": {"heads": 2, "enable_gqa": True},
    "broadcast": {"heads": 1},
    "bfloat16": {"dtype": torch.bfloat16, "is_causal": True},
    "bfloat16, added": {"dtype": torch.bfloat16, "attn_mask": normal(3, 5, seed=7).bfloat16()},
    "float64": {"dtype": torch.float64},
}


@pytest.mark.parametrize("case", MASKS)
def test_explicit_attention_is_torchs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"queries": 3, "keys": 5, "heads": 4, "dtype": torch.float32} | MASKS[case]
    length, keys, heads, dtype = (options.pop(name) for name in ("queries", "keys", "heads", "dtype"))
    q = normal(2, 4, length, 8, seed=1).to(dtype)
    k, v = normal(2, heads, keys, 8, seed=2).to(dtype), normal(2, heads, keys, 6, seed=3).to(dtype)
    wanted = F.scaled_dot_product_attention(q, k, v, **options)
    coarse = attention(q, k, v, **options)
    assert (coarse.dtype, coarse.shape) == (dtype, wanted.shape)
    assert torch.allclose(coarse, wanted, atol=5 * 3 / 510 + (0.02 if dtype == torch.bfloat16 else 0))
    monkeypatch.setattr(module, "STEPS", 2**22)
    close = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 5e-6}
    assert torch.allclose(attention(q, k, v, **options), wanted, **close)


def test_probabilities_have_255_steps() -> None:
    q, k = normal(1, 1, 4, 8) * 3, normal(1, 1, 6, 8, seed=1)
    weights = attention(q, k, torch.eye(6)[None, None])  # the values tell them
    assert torch.equal(weights, torch.round((q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) * 255) / 255)


def test_dropout_is_applied() -> None:
    torch.manual_seed(0)
    y = attention(normal(1, 1, 4, 8), normal(1, 1, 50, 8), torch.eye(50)[None, None], dropout_p=0.5)
    assert 0.3 < float((y == 0).float().mean()) < 0.7

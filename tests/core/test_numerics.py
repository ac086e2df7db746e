"""The page that every backend must equal: rounding, saturation, degenerate rows, error bounds."""

import math

import pytest
import torch
from helpers import assert_same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantkit.core.numerics import (
    ABSMAX_FLOOR,
    MAX_EXACT_K,
    MAX_EXACT_K_ASYMMETRIC,
    absmax_scale,
    decode,
    encode,
    encode_asymmetric,
    qmax,
    range_scale,
    sqnr_db,
)
from quantkit.core.weights import quantize_weight
from quantkit.ops.reference import quantize_rows

EPS = 2.0**-24  # of one float32 rounding
BITS = range(2, 9)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
rows = st.lists(finite, min_size=1, max_size=12).map(torch.tensor)


def row_absmax(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True)


@pytest.mark.parametrize("bits", BITS)
def test_half_to_even(bits: int) -> None:
    top = qmax(bits)
    halves = torch.arange(-top, top) + 0.5
    assert encode(halves, torch.tensor([float(top)]), bits).tolist() == [
        round(h) for h in halves.tolist()
    ]  # python rounds to even too


@pytest.mark.parametrize("bits", BITS)
def test_saturation(bits: int) -> None:
    x = torch.tensor([-1e9, -1.0, 0.0, 1.0, 1e9])
    top = qmax(bits)
    assert top == 2 ** (bits - 1) - 1
    assert encode(x, torch.ones(1), bits).tolist() == [-top, -top, 0, top, top]  # never -128
    scale, zero = range_scale(torch.tensor([-1.0]), torch.tensor([1.0]), bits)
    q = encode_asymmetric(x, scale, zero, bits)
    assert (int(q.min()), int(q.max())) == (-top - 1, top)


@given(rows, st.sampled_from(BITS))
def test_symmetric_error_is_half_a_step(x: Tensor, bits: int) -> None:
    """The inverse, the product, the scale and the decoding round once each, on codes up to qmax."""
    absmax = row_absmax(x)
    q, scale = encode(x, absmax, bits), absmax_scale(absmax, bits)
    assert q.abs().max() <= qmax(bits)
    error = (decode(q.double(), scale.double()).double() - x.double()).abs() / scale.double()
    assert error.max() <= 0.5 + 4 * EPS * qmax(bits)


@given(rows.filter(lambda x: x.max().double() - x.min().double() < 3e38), st.sampled_from(BITS))
def test_asymmetric_error_is_half_a_step(x: Tensor, bits: int) -> None:
    """As above; codes relative to zero go up to ``2**bits - 1``, and the zero point is a rounded quotient too."""
    scale, zero = range_scale(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), bits)
    q = encode_asymmetric(x, scale, zero, bits)
    assert -qmax(bits) - 1 <= int(zero) <= qmax(bits)
    error = ((q.double() - zero) * scale.double() - x.double()).abs() / scale.double()
    assert error.max() <= 0.5 + 6 * EPS * (2**bits - 1)


@given(finite.filter(lambda v: abs(v) < 1e38), finite.filter(lambda v: abs(v) < 1e38), st.sampled_from(BITS))
def test_a_range_is_extended_to_hold_zero(a: float, b: float, bits: int) -> None:
    low, high = torch.tensor([min(a, b)]), torch.tensor([max(a, b)])
    scale, zero = range_scale(low, high, bits)
    q = encode_asymmetric(torch.zeros(1), scale, zero, bits)
    assert decode(q, scale, zero).item() == 0.0
    assert scale.item() * (2**bits - 1) >= (max(b, a, 0.0) - min(a, b, 0.0)) * (1 - 4 * EPS)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_range_of_one_value(value: float) -> None:
    x = torch.full((4,), value)
    scale, zero = range_scale(x.amin(0, keepdim=True), x.amax(0, keepdim=True))
    assert scale.isfinite()
    torch.testing.assert_close(decode(encode_asymmetric(x, scale, zero), scale, zero), x, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_zeros(bits: int) -> None:
    x = torch.zeros(2, 5)
    assert not encode(x, row_absmax(x), bits).any()
    assert absmax_scale(row_absmax(x), bits).isfinite().all()
    codes, scale = quantize_weight(x, bits)
    assert not codes.any()
    assert (scale == 1).all()
    scale, zero = range_scale(torch.zeros(1), torch.zeros(1), bits)
    assert (encode_asymmetric(x, scale, zero, bits) == zero).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite(bad: float) -> None:
    """The scale is NaN and the codes are 0, so that the whole output row is NaN; the row beside it is untouched."""
    x = torch.tensor([[1.0, bad, -2.0], [1.0, 0.5, -2.0]])
    q, scale = encode(x, row_absmax(x)), absmax_scale(row_absmax(x))
    assert scale.isnan().squeeze().tolist() == [True, False]
    assert decode(q, scale)[0].isnan().all()
    assert not q[0].any()
    assert q[1].tolist() == [64, 32, -127]  # 63.5 to even, 31.75
    low, high = x.aminmax(dim=1, keepdim=True)
    scale, zero = range_scale(low, high)
    assert scale.isnan().squeeze().tolist() == [True, False]
    assert not encode_asymmetric(x, scale, zero)[0].any()


@pytest.mark.parametrize("ends", [(-3e38, 3e38), (-3.4e38, 1e38), (-2e38, 1.5e38)])
def test_ends_too_far_apart(ends: tuple[float, float]) -> None:
    """Each is a float32 but not their distance: such a row is treated as one that is not finite; symmetric codes hold it."""
    x = torch.tensor([ends, (-1.0, 2.0)])
    codes, scale, zero = quantize_rows(x, symmetric=False)
    assert zero is not None
    assert scale.isnan().squeeze().tolist() == [True, False]
    assert not codes[0].any()
    assert_same([codes[1:], scale[1:], zero[1:]], list(quantize_rows(x[1:], symmetric=False)))
    assert quantize_rows(x)[1].isfinite().all()


@pytest.mark.parametrize("absmax", [1e-45, 2.0**-126, ABSMAX_FLOOR / 2, ABSMAX_FLOOR, 1.0, 3.4e38])
def test_extreme_magnitudes(absmax: float) -> None:
    x = torch.tensor([absmax, -absmax, 0.0])
    q, scale = encode(x, row_absmax(x)), absmax_scale(row_absmax(x))
    assert scale.isfinite()
    assert scale > 0
    assert q.tolist() == (
        [127, -127, 0] if absmax >= ABSMAX_FLOOR else [round(127 * absmax / ABSMAX_FLOOR) * s for s in (1, -1, 0)]
    )


def test_the_longest_exact_sum() -> None:
    """Codes in [-127, 127], and codes minus a zero point in [-255, 255], times weights in [-127, 127]."""
    for limit, largest in ((MAX_EXACT_K, 127 * 127), (MAX_EXACT_K_ASYMMETRIC, 255 * 127)):
        assert limit * largest <= 2**31 - 1 < (limit + 1) * largest


@pytest.mark.parametrize("bits", BITS)
def test_weights(bits: int) -> None:
    w = torch.randn(6, 33) * torch.logspace(-3, 3, 6)[:, None]
    codes, scale = quantize_weight(w, bits)
    assert codes.dtype == torch.int8
    assert scale.shape == (6, 1)
    assert (codes.abs().amax(1) == qmax(bits)).all()
    assert ((decode(codes, scale) - w).abs() <= scale * (0.5 + 4 * EPS * qmax(bits))).all()
    codes, scale = quantize_weight(w, bits, per_tensor=True)
    assert scale.unique().numel() == 1
    assert codes.abs().max() == qmax(bits)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_weights_without_elements(shape: tuple[int, int]) -> None:
    codes, scale = quantize_weight(torch.zeros(shape))
    assert codes.shape == shape
    assert scale.shape == (shape[0], 1)


def test_sqnr() -> None:
    x = torch.ones(100)
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(x, x * 0.9) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(x.clone().requires_grad_(), x * torch.tensor(0.9, requires_grad=True)) == pytest.approx(20, abs=1e-4)

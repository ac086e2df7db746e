"""The kernels that multiply codes, run by Triton's interpreter against exact arithmetic.

Whole layers go through test_contract.py. The Gluon kernels have no interpreter: ``benchmarks/check_gpu.py`` runs them on a GPU.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from helpers import assert_same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from triton.compiler.errors import CompilationError

from quantkit.core.errors import BackendError
from quantkit.ops import reference
from quantkit.ops.gpu import devices, operators, service
from quantkit.ops.gpu.layout import padded
from quantkit.ops.gpu.product import door
from quantkit.ops.gpu.product.kernels import HOPPER, PORTABLE, VECTOR
from quantkit.ops.gpu.product.request import ProductRequest
from quantkit.ops.gpu.product.tiles import Tile, Vector

SMALL = Tile(16, 32, 64, 4, 4, 2)
SOME = (SMALL, Tile(32, 16, 32, 1, 4, 2), Tile(64, 64, 128, 8, 4, 4))


def matmul(q: Tensor, sx: Tensor, w: Tensor, sw: Tensor, dtype: torch.dtype, *, config: Tile, **options: Any) -> Tensor:
    """The portable kernel at one setting."""
    return PORTABLE.launch(ProductRequest(q, sx, w, sw, dtype, **options), config)


def gemv(x: Tensor, w: Tensor, sw: Tensor, *, sx: Tensor | None = None, config: Vector, **options: Any) -> Tensor:
    """The kernel for one token at one setting."""
    request = ProductRequest(x, sx, w, sw, options.pop("dtype", x.dtype), **options)
    assert VECTOR.why_not(request) is None
    return VECTOR.launch(request, config)


def codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


@given(
    st.integers(1, 40), st.integers(1, 70), st.integers(1, 200), st.booleans(), st.booleans(),
    st.sampled_from([torch.float32, torch.float16]), st.sampled_from(SOME),
)  # fmt: skip
def test_matmul(m: int, n: int, k: int, bias: bool, zero: bool, dtype: torch.dtype, config: Tile) -> None:
    q, w = codes(m, k), codes(n, k)
    sx, sw, b = torch.rand(m, 1), torch.rand(n), torch.randn(n) if bias else None
    z, sums = (torch.randint(-128, 128, (m, 1), dtype=torch.int32), w.sum(1, dtype=torch.int32)) if zero else (None, None)
    got = matmul(q, sx, w, sw, dtype, zero=z, wsum=sums, bias=b, config=config)
    assert_same(got, reference.epilogue(reference.int_matmul(q, w), sx, sw, z, sums, b, dtype))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum(sign: int) -> None:
    k = 133_136  # the largest multiple of 16 within numerics.MAX_EXACT_K
    q, w = torch.full((2, k), 127, dtype=torch.int8), torch.full((1, k), sign * 127, dtype=torch.int8)
    one = torch.ones(2, 1)
    got = matmul(q, one, w, one[:1, 0], torch.float32, config=Tile(16, 16, 4096, 1, 4, 2))
    assert_same(got, torch.full((2, 1), float(sign * k * 127**2)))


def multipliers(rows: int, count: int) -> Tensor:
    """A base scale and odd multipliers ``[rows, 1 + count]``, whose sums over few channels stay in int32."""
    return torch.cat([torch.rand(rows, 1), 2.0 * torch.randint(0, 12, (rows, count)) + 1], 1)


def summed(
    q: Tensor,
    sx: Tensor,
    w: Tensor,
    sw: Tensor,
    groups: tuple[int, ...],
    zero: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    products = [reference.int_matmul(a, b) for a, b in zip(q.split(groups, 1), w.split(groups, 1), strict=True)]
    return reference.group_sum(products, sx[:, 1:], sw[:, 1:], zero, sums)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 64), (20, 40, 208)])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_groups(m: int, n: int, k: int, zero: bool, by_row: bool) -> None:
    """A multiple for every (token, group); groups of any multiple of 16, one of them empty."""
    q, w, borders = codes(m, k), codes(n, k), [0, 16, 48, 48, k]
    groups = tuple(b - a for a, b in pairwise(borders))
    sx, sw = multipliers(m, 4), multipliers(n, 4)
    z = torch.randint(-128, 128, (m, 4), dtype=torch.int32) if zero else None
    sums = reference.row_sums(w, groups)
    where = torch.tensor(borders, dtype=torch.int32)
    scale = sw.t().contiguous()
    if not by_row:
        sw[:, 1:], scale = 1, sw[:, 0].contiguous()
    got = matmul(q, sx, w, scale, torch.float32, borders=where, zero=z, wsum=sums, config=SMALL)
    acc = summed(q, sx, w, sw, groups, z, sums)
    assert_same(got, reference.epilogue(acc, sx[:, :1], sw[:, 0], None, None, None, torch.float32))


@pytest.mark.parametrize("count", [1, 16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_side_product(count: int, dtype: torch.dtype) -> None:
    q, w, sx, sw, bias = codes(9, 64), codes(20, 64), torch.rand(9, 1), torch.rand(20), torch.randn(20)
    side, side_weight = torch.randn(9, count).to(dtype), torch.randn(20, count).to(dtype)
    got = matmul(q, sx, w, sw, torch.float32, bias=bias, side=side, side_weight=side_weight, config=SMALL)
    extra = side.double() @ side_weight.double().t() + bias
    wanted = reference.epilogue(reference.int_matmul(q, w), sx, sw, None, None, extra.float(), torch.float32)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


@given(st.integers(1, 40), st.integers(1, 200), st.sampled_from([Vector(8, 2, 4), Vector(4, 1, 8), Vector(16, 3, 4)]))
def test_gemv(n: int, k: int, config: Vector) -> None:
    x, w, sw, bias = torch.randn(1, k), codes(n, k), torch.rand(n), torch.randn(n)
    q, sx, _ = reference.quantize_rows(x)
    wide = F.pad(w, (0, padded(k) - k))
    wanted = reference.epilogue(reference.int_matmul(q, w), sx, sw, None, None, bias, x.dtype)
    assert_same(gemv(x, wide, sw, bias=bias, config=config), wanted)
    given = F.pad(q, (0, padded(k) - k))
    assert_same(gemv(given, wide, sw, sx=sx, dtype=x.dtype, bias=bias, config=config), wanted)


@given(st.integers(1, 20), st.lists(st.integers(1, 5), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_gemv_in_groups(n: int, sizes: list[int], by_row: bool, nan: bool) -> None:
    groups = tuple(16 * size for size in sizes)
    q, w = codes(1, sum(groups)), codes(n, sum(groups))
    sx, sw, bias = multipliers(1, len(groups)), multipliers(n, len(groups)), torch.randn(n)
    if nan:
        sx[0, 0] = float("nan")
    if len(groups) == 1:
        sx[:, 1] = 1
    if len(groups) == 1 or not by_row:
        sw[:, 1:] = 1
    acc = summed(q, sx, w, sw, groups)
    wanted = reference.epilogue(acc, sx[:, :1], sw[:, 0], None, None, bias, torch.float32)
    borders = torch.tensor([0, *accumulate(groups)], dtype=torch.int32) if len(groups) > 1 else None
    scale = sw.t().contiguous() if len(groups) > 1 and by_row else sw[:, 0].contiguous()
    assert_same(gemv(q, w, scale, sx=sx, dtype=torch.float32, bias=bias, borders=borders, config=Vector(4, 1, 4)), wanted)


def test_nothing_to_multiply() -> None:
    q, scale = torch.zeros(0, 32, dtype=torch.int8), torch.zeros(0, 1)
    assert matmul(q, scale, codes(7, 32), torch.rand(7), torch.float32, config=SMALL).shape == (0, 7)


def request(m: int = 2, n: int = 16, k: int = 32, **options: Any) -> ProductRequest:
    return ProductRequest(codes(m, k), torch.rand(m, 1), codes(n, k), torch.rand(n), torch.float16, **options)


def test_what_no_kernel_handles_is_an_error() -> None:
    with pytest.raises(BackendError, match="pre_scale"):
        door.multiply(request(pre_scale=torch.ones(32)))
    with pytest.raises(BackendError, match="bits"):
        door.multiply(request(bits=4))
    with pytest.raises(TypeError, match="tokens"):
        operators.matmul(*request()[:5], tokens=3)


def test_one_token_leaves_what_it_does_not_handle_to_the_portable_kernel() -> None:
    assert VECTOR.why_not(request(1)) is None
    zero, sums = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    assert "zero" in str(VECTOR.why_not(request(1, zero=zero, wsum=sums)))
    assert PORTABLE.why_not(request(1, zero=zero, wsum=sums)) is None


@pytest.mark.parametrize("name", ["zero", "wsum", "side_weight", "borders"])
def test_hopper_leaves_active_columns_with_more_than_a_bias_to_the_portable_kernel(name: str) -> None:
    threshold = {"side": torch.zeros(2, 32).half(), "active": torch.zeros(33, dtype=torch.int32)}
    assert HOPPER.why_not(request(**threshold)) is None
    assert HOPPER.why_not(request(**threshold, **{name: torch.zeros(2, dtype=torch.int32)}, align=128)) is not None


def test_a_triton_with_another_gluon(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Hopper's kernels fail to compile: the portable one takes over, and that is said once."""

    def broken(*args: object) -> Tensor:
        raise CompilationError(None, None, "async_load has been removed")

    monkeypatch.setattr(HOPPER, "launch", broken)
    monkeypatch.setattr(door, "service", service.Service())
    monkeypatch.setattr(devices, "capability", lambda device: 90)
    q, w, sx, sw = codes(20, 64), codes(16, 64), torch.rand(20, 1), torch.rand(16)
    for _ in range(2):
        got = operators.matmul(q, sx, w, sw, torch.float16)
        assert_same(got, reference.epilogue(reference.int_matmul(q, w), sx, sw, None, None, None, torch.float16))
    assert len(caplog.records) == 1
    assert "async_load has been removed" in caplog.text
    assert set(door.service.out()) == {"hopper", "order", "rows"}
    assert "async_load has been removed" in door.service.out()["rows"]

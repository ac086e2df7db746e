"""The GPU kernels without a GPU: run by Triton's interpreter against exact arithmetic, and compiled for every architecture.

Whole layers go through test_contract.py. The Gluon kernels for Hopper have no interpreter: here they are compiled only, and
``benchmarks/check_gpu.py`` runs them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from quantkit.ops import reference
from quantkit.ops.gpu import configs
from quantkit.ops.gpu.configs import Decode, Gemm, Tile, Vector, padded
from quantkit.ops.gpu.gemv import gemv
from quantkit.ops.gpu.matmul import matmul
from quantkit.ops.gpu.quantize import quantize
from quantkit.transform import Rotation

SMALL = Tile(16, 32, 64, 4, 4, 2)
SOME = (SMALL, Tile(32, 16, 32, 1, 4, 2), Tile(64, 64, 128, 8, 4, 4))


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


@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 64), (20, 40, 208)])
@pytest.mark.parametrize("zero", [False, True])
def test_segments(m: int, n: int, k: int, zero: bool) -> None:
    """A scale for every (token, segment) and (row, segment); segments of any multiple of 16, one of them empty."""
    q, w, borders = codes(m, k), codes(n, k), [0, 16, 48, 48, k]
    sx, sw = torch.rand(m, 4), torch.rand(n, 4)
    z = torch.randint(-128, 128, (m, 4), dtype=torch.int32)
    wanted, sums = torch.zeros(m, n), torch.empty(n, 4, dtype=torch.int32)
    for g, (first, last) in enumerate(pairwise(borders)):
        part = w[:, first:last]
        sums[:, g] = part.sum(1, dtype=torch.int32)
        acc = reference.int_matmul(q[:, first:last], part)
        acc = acc - z[:, g : g + 1] * sums[:, g] if zero else acc
        wanted += acc.float() * sx[:, g : g + 1] * sw[:, g]
    more = {"zero": z, "wsum": sums} if zero else {}
    got = matmul(q, sx, w, sw, torch.float32, borders=torch.tensor(borders, dtype=torch.int32), config=SMALL, **more)
    assert_same(got, wanted)


@pytest.mark.parametrize("count", [1, 16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_side_product(count: int, dtype: torch.dtype) -> None:
    q, w, sx, sw, bias = codes(9, 64), codes(20, 64), torch.rand(9, 1), torch.rand(20), torch.randn(20)
    side, side_weight = torch.randn(9, count).to(dtype), torch.randn(20, count).to(dtype)
    got = matmul(q, sx, w, sw, torch.float32, bias=bias, side=side, side_weight=side_weight, config=SMALL)
    extra = side.double() @ side_weight.double().t() + bias
    wanted = reference.epilogue(reference.int_matmul(q, w), sx, sw, None, None, extra.float(), torch.float32)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


@given(st.integers(1, 9), st.integers(1, 300), st.booleans(), st.sampled_from([2, 4, 8]), st.booleans())
def test_quantize(m: int, k: int, symmetric: bool, bits: int, strided: bool) -> None:
    x = torch.randn(m, k) * torch.logspace(-6, 6, m)[:, None]
    x = torch.stack([x, x], 2)[..., 0] if strided else x
    got = quantize(x, symmetric=symmetric, bits=bits)
    wanted = [t for t in reference.quantize_rows(x, symmetric=symmetric, bits=bits) if t is not None]
    assert got[0].shape == (m, padded(k))
    assert_same([got[0][:, :k], *got[1:]], wanted)


@given(st.integers(1, 40), st.integers(1, 200), st.sampled_from([Vector(8, 2, 4), Vector(4, 1, 8), Vector(16, 3, 4)]))
def test_gemv(n: int, k: int, config: Vector) -> None:
    x, w, sw, bias = torch.randn(1, k), codes(n, k), torch.rand(n), torch.randn(n)
    q, sx, _ = reference.quantize_rows(x)
    wide = F.pad(w, (0, padded(k) - k))
    wanted = reference.epilogue(reference.int_matmul(q, w), sx, sw, None, None, bias, x.dtype)
    assert_same(gemv(x, wide, sw, bias=bias, config=config), wanted)
    given = F.pad(q, (0, padded(k) - k))
    assert_same(gemv(given, wide, sw, sx=sx, dtype=x.dtype, bias=bias, config=config), wanted)


SOURCES = {
    "rms": lambda x, y, gain, bias: F.rms_norm(x, x.shape[1:], gain, 1e-6),
    "layer": lambda x, y, gain, bias: F.layer_norm(x, x.shape[1:], gain, bias, 1e-6),
    "silu": lambda x, y, gain, bias: F.silu(x) * y,
    "gelu": lambda x, y, gain, bias: F.gelu(x) * y,
    "gelu_tanh": lambda x, y, gain, bias: F.gelu(x, approximate="tanh") * y,
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("k", [64, 300])
@pytest.mark.parametrize("rotation", [0, 4])
def test_what_comes_before(source: str, k: int, rotation: int) -> None:
    x, y, gain, bias = torch.randn(5, k), torch.randn(5, k), torch.randn(k), torch.randn(k)
    scale = torch.rand(k) + 0.5
    more = {"gain": gain, "eps": 1e-6} if source in ("rms", "layer") else {"x2": y}
    more |= {"bias": bias} if source == "layer" else {}
    wanted = SOURCES[source](x, y, gain, bias) * scale
    wanted = Rotation(rotation).apply(wanted) if rotation else wanted
    near(quantize(x, source=source, pre_scale=scale, rotation=rotation, **more), wanted)


@pytest.mark.parametrize("source", ["rms", "layer"])
def test_residual(source: str) -> None:
    """The sum is kept, and normed as it is kept; an offset gain as Gemma has it; the channels in another order."""
    x, y, gain, order = torch.randn(3, 48), torch.randn(3, 48), torch.randn(48), torch.randperm(48)
    *got, kept = quantize(x, source=source, x2=y, gain=gain, offset=1.0, eps=1e-6, permutation=order)
    assert_same(kept, x + y)
    near(got, SOURCES[source](x + y, y, gain + 1, None)[:, order])


def near(got: list[Tensor], wanted: Tensor) -> None:
    q, scale, _ = reference.quantize_rows(wanted)
    torch.testing.assert_close(got[1], scale, rtol=1e-5, atol=0)
    off = (got[0][:, : q.shape[1]].int() - q.int()).abs()
    assert int(off.max()) <= 1
    assert float(off.float().mean()) < 0.01


def test_empty() -> None:
    q, scale = quantize(torch.zeros(0, 32))
    assert (q.shape, scale.shape) == ((0, 32), (0, 1))
    assert matmul(q, scale, codes(7, 32), torch.rand(7), torch.float32, config=SMALL).shape == (0, 7)


SHARED = {80: 163_840, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes that one block may have
MMA = {80: "mma.sync", 89: "mma.sync", 90: ("mma.sync", "wgmma"), 100: ("mma.sync", "tcgen05")}


def test_compiled_for_every_architecture() -> None:
    """INT8 matrix instructions are in the code, nothing spills to local memory, shared memory suffices."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout)
    assert {name.split()[0] for name in kernels} == {"quantize", "gemv", "matmul", "hopper"}
    for name, found in kernels.items():
        arch = next(a for a in SHARED if str(a) in name.split())
        assert found["stack"] == found["local"] == 0, f"{name} spills: {found}"
        assert found["shared"] <= SHARED[arch], f"{name}: {found}"
        if name.startswith(("matmul", "hopper")):
            assert any(i.startswith(MMA[arch]) and "s8.s8" in i for i in found["mma"]), f"{name}: {found}"
        if name.startswith("gemv"):
            assert "dp4a.s32.s32" in found["mma"], f"{name}: {found}"
        if name.startswith("hopper"):
            assert all(i.startswith("wgmma") for i in found["mma"]), f"{name}: {found}"


def test_the_table_knows_every_shape() -> None:
    for m in (1, 2, 16, 17, 64, 65, 128, 129, 1000, 100_000):
        for n in (1, 64, 4096, 57344):
            for arch in (0, 80, 86, 89, 90, 100, 120):
                assert isinstance(configs.portable(arch, m, n), Tile)
            assert isinstance(configs.hopper(m, n), Gemm | Decode)
            assert isinstance(configs.choose(torch.device("cpu"), m, n, 4096, tma=True), Tile)

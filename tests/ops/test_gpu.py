"""The GPU kernels without a GPU: run by Triton's interpreter against exact arithmetic, and compiled for every architecture.

Whole layers go through test_contract.py. The Gluon kernels for Hopper have no interpreter: here they are compiled only, and
``benchmarks/check_gpu.py`` runs them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from compile_kernels import SHARED
from helpers import assert_same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from triton.compiler.errors import CompilationError

from quantkit.core.errors import BackendError
from quantkit.core.rotation import Rotation
from quantkit.ops import gpu, reference
from quantkit.ops.gpu import configs, operators, tune
from quantkit.ops.gpu.configs import Decode, Gemm, Tile, Vector, padded
from quantkit.ops.gpu.gemv import gemv
from quantkit.ops.gpu.matmul import matmul
from quantkit.ops.gpu.quantize import quantize

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


def multiples(rows: int, count: int) -> Tensor:
    """A unit and odd multiples ``[rows, 1 + count]``, whose sums over few channels stay in int32."""
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
    return reference.segment_sum(products, sx[:, 1:], sw[:, 1:], zero, sums)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 64), (20, 40, 208)])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_segments(m: int, n: int, k: int, zero: bool, by_row: bool) -> None:
    """A multiple for every (token, segment); segments of any multiple of 16, one of them empty."""
    q, w, borders = codes(m, k), codes(n, k), [0, 16, 48, 48, k]
    groups = tuple(b - a for a, b in pairwise(borders))
    sx, sw = multiples(m, 4), multiples(n, 4)
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


@given(st.integers(1, 20), st.integers(1, 9000), st.sampled_from([0.0, 1e-4, 0.1, 1.0]))
def test_columns_that_reach_a_threshold(m: int, k: int, share: float) -> None:
    x = torch.where(torch.rand(m, k) < share, 7.0, 1.0) * torch.randn(m, k).sign()
    x[0, 0], x[0, -1] = -torch.inf, torch.nan  # which say nothing of their columns
    q, scale, active = quantize(x, threshold=6.0)
    large, columns = reference.reaching(x, 6.0)
    wanted = reference.quantize_rows(x.masked_fill(large, 0))
    assert_same([q[:, :k], scale], [wanted[0], wanted[1]])
    assert_same(active[1 : 1 + int(active[0])].long(), columns.nonzero().view(-1))


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


@given(st.integers(1, 20), st.lists(st.integers(1, 5), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_gemv_in_segments(n: int, sizes: list[int], by_row: bool, nan: bool) -> None:
    groups = tuple(16 * size for size in sizes)
    q, w = codes(1, sum(groups)), codes(n, sum(groups))
    sx, sw, bias = multiples(1, len(groups)), multiples(n, len(groups)), torch.randn(n)
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


MMA = {80: "mma.sync", 89: "mma.sync", 90: ("mma.sync", "wgmma"), 100: ("mma.sync", "tcgen05")}


def test_compiled_for_every_architecture() -> None:
    """INT8 matrix instructions are in the code, nothing spills to local memory, shared memory suffices."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout)
    assert {name.split()[0] for name in kernels} == {"quantize", "rows", "order", "columns", "gemv", "matmul", "hopper"}
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


EVERY_KIND = {
    "64x32": {"1": Vector(8, 2, 4), "16": Decode(16, 10), "256": Gemm(128, 6, early=True), "512": Tile(16, 32, 64, 4, 4, 2)}
}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a GPU here would look into."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU / 80 GB")
    configs.tuned.cache_clear()
    yield configs.cache_path(torch.device("cuda"))
    configs.tuned.cache_clear()


def test_tuned_choices_come_back(table: Path) -> None:
    written = {shape: {m: configs.as_json(c) for m, c in rows.items()} for shape, rows in EVERY_KIND.items()}
    table.write_text(json.dumps(written))
    device = torch.device("cuda")
    assert re.fullmatch(r"some-gpu-80-gb_triton-[\w.]+_quantkit-[\w.]+\.json", table.name)
    wanted = {1: "1", 2: "16", 16: "16", 17: "256", 256: "256", 300: "512"}
    for m, key in wanted.items():
        assert configs.tuned_config(device, m, 64, 32) == EVERY_KIND["64x32"][key]
    assert configs.tuned_config(device, 513, 64, 32) is None, "beyond what was measured, the built-in table decides"
    assert configs.tuned_config(device, 1, 64, 48) is None


def test_few_tokens_never_take_the_kernel_tuned_for_many(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes 16-bit results only, and would be slow: with nothing but 256 tokens tuned, 10 follow the built-in table."""
    monkeypatch.setattr(configs, "capability", lambda device: 90)
    tuned = Gemm(128, 5, early=True)
    table.write_text(json.dumps({"64x32": {"256": configs.as_json(tuned)}}))
    device = torch.device("cuda")
    assert configs.choose(device, 256, 64, 32, tma=True) == tuned
    assert configs.choose(device, 10, 64, 32, tma=True) == configs.hopper(10, 64)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"4096": {}}', '{"1x2": {"a": {}}}', '{"1x2": {"1": {"kernel": "Evil"}}}',
                                     '{"1x2": {"1": {"kernel": "Tile", "m": 1}}}', '{"1x2": 3}'])  # fmt: skip
def test_a_damaged_table_counts_as_none(table: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    table.write_text(content)
    with caplog.at_level("WARNING", "quantkit"):
        assert configs.tuned_config(torch.device("cuda"), 1, 1, 2) is None
        assert configs.tuned_config(torch.device("cuda"), 1, 1, 2) is None
    assert len(caplog.records) == 1, "said once"
    assert str(table) in caplog.text
    assert "quantkit tune" in caplog.text


def test_an_unreadable_table_counts_as_none(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    table.mkdir()
    assert configs.tuned(torch.device("cuda")) == {}
    assert str(table) in caplog.text


def test_a_table_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="--output"):
        tune._write(tmp_path / "file" / "table.json", {})


def test_a_table_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    tune._write(path, {"1x2": {"1": configs.as_json(Vector(8, 1, 4))}})
    tune._write(path, {"1x2": {"1": configs.as_json(Vector(4, 1, 4))}})
    assert configs.parse(tune._read(path)) == {(1, 2): [(1, Vector(4, 1, 4))]}
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]
    assert tune._read(tmp_path / "none") == {}


def test_candidates_start_with_the_built_in_choice() -> None:
    device = torch.device("cpu")
    for m in tune.TOKENS:
        found = tune.candidates(device, m, 4096, 4096)
        assert found[0] == (configs.vector(4096) if m == 1 else configs.portable(0, m, 4096))
        assert len(found) == len(set(found)) > 3


@pytest.mark.parametrize(("shape", "message"), [("4096", "OUTPUTxINPUT"), ("axb", "OUTPUTxINPUT"), ("0x8", "no channels")])
def test_shapes_that_are_none(shape: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        list(tune.parse_shapes([shape]))


def test_tune_needs_a_gpu() -> None:
    for device in ("cpu", "cuda", "nonsense"):
        with pytest.raises(BackendError, match=device):
            tune.tune([(64, 64)], device=device)


def test_shapes_of_a_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2), torch.nn.Linear(4, 8))
    assert tune.shapes_of(model) == [(2, 8), (8, 4)]


def test_side_columns_of_a_fused_source_are_refused() -> None:
    with pytest.raises(ValueError, match="side columns"):
        quantize(torch.ones(1, 16), source="rms", side_index=torch.tensor([0]))


def test_a_triton_with_another_gluon(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Hopper's kernels fail to compile: the portable one takes over, and that is said once."""

    class Broken:
        def multiply(self, *args: object, **kwargs: object) -> Tensor:
            raise CompilationError(None, None, "async_load has been removed")

    monkeypatch.setattr(operators, "hopper", Broken())
    monkeypatch.setattr(configs, "capability", lambda device: 90)
    q, w, sx, sw = codes(20, 64), codes(16, 64), torch.rand(20, 1), torch.rand(16)
    for _ in range(2):
        got = operators.matmul(q, sx, w, sw, torch.float16)
        assert_same(got, reference.epilogue(reference.int_matmul(q, w), sx, sw, None, None, None, torch.float16))
    assert len(caplog.records) == 1
    assert "async_load has been removed" in caplog.text


def read_at_once(sizes: tuple[int, ...], channels: Tensor | None, order: Tensor) -> list[list[int]]:
    """The banks that 32 threads want at once, of :mod:`.order` or for longer rows of :mod:`.rows`."""
    places = gpu.places_of(sizes, 128, channels, torch.device("cpu"))[2].tolist()
    lanes, size = (8 + 16 + 32 + 64 + 128, 1) if max(places) < configs.IN_PAIRS else (8 + 16 + 64 + 128 + 256, 2)
    together: dict[int, list[int]] = {}
    for place, channel in zip(places, order.tolist(), strict=True):
        together.setdefault(place & ~lanes, []).append(channel // size % 32)
    return list(together.values())


@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(0, 9))
def test_channels_are_spread_over_banks(sizes: list[int], seed: int) -> None:
    """Each cluster keeps its places; and what 32 threads read at once is in as many banks as there are."""
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    borders, _, places = gpu.places_of(tuple(sizes), 128, order, torch.device("cpu"))
    for first, last, mine in zip(borders[:-1], borders[1:], places.split(sizes), strict=True):
        assert sorted(mine.tolist()) == list(range(int(first), int(first) + len(mine)))
        assert last % 128 == 0
    if len(sizes) == 1 and sizes[0] % 64 == 0:
        assert all(len(set(banks)) >= min(len(banks), 16) for banks in read_at_once(tuple(sizes), order, order))


@pytest.mark.parametrize("sizes", [(20, 500, 1500, 2076), (20, 2000, 5000, 7316)], ids=["order", "rows"])
def test_few_reads_of_a_row_wait_for_a_bank(sizes: tuple[int, ...]) -> None:
    order = torch.randperm(sum(sizes))

    def waits(channels: Tensor | None) -> float:
        """Reads one after the other for what 32 threads want at once, on average."""
        banks = read_at_once(sizes, channels, order)
        return sum(max(map(wanted.count, wanted)) for wanted in banks) / len(banks)

    assert waits(order) < 1.5
    assert waits(None) > 2.5

"""Every backend equals the reference bit for bit, whatever it is given."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers import assert_same, clusters, hostile, near
from torch import Tensor, nn

import quantkit
from quantkit import BackendError, Rotation, Scheme, Transform, W8A8Linear
from quantkit.core.formats import PerTensor
from quantkit.core.numerics import MAX_EXACT_K, MAX_EXACT_K_ASYMMETRIC
from quantkit.core.weights import quantize_weight
from quantkit.integrations.compressed.load import longest
from quantkit.ops import reference
from quantkit.ops.cpu import backend as cpu
from quantkit.ops.cpu.native import library
from quantkit.ops.table import backends, forced, use_backend

SCHEMES = [
    "w8a8",
    "w8a8-asym",
    "w8a8-static",
    "w8a8-static-asym",
    "w8a8-pertensor",
    "w4a4",
    "w2a3",
    "w5a6-static-asym-pertensor",
]
STEPS = [
    (),
    ("scale",),
    ("shift",),
    ("permutation",),
    ("rotation",),
    ("outliers",),
    ("shift", "scale", "permutation", "rotation"),
    ("shift", "scale", "outliers", "permutation", "rotation"),
    ("groups",),
    ("shift", "scale", "outliers", "permutation", "rotation", "groups"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [
    (1, 1), (1, 64), (64, 1),  # one channel, one output
    (7, 5),  # less than a step of anything
    (63, 65), (64, 64),  # beside a step of K and a tile of N, and both of them full
    (577, 33), (33, 577),  # several steps of K, several tiles of N, and tails
]  # fmt: skip
"""Channels and outputs of layers. GPUs take tiles of 64 outputs, of 16, 32, 64 or 128 tokens, and steps of K of 128."""
VARIANTS = [(name, how) for name in backends() for how in (("native", "plain", "no-vnni") if name == "cpu" else ("",))]


@pytest.fixture(params=VARIANTS, ids="-".join)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each backend; that of the CPU also without its C passes, and as on processors without a product for INT8."""
    name, how = request.param
    if how == "no-vnni" and not cpu.has_integer_product():
        pytest.skip("this processor has none, so that cpu-plain is the same")
    if how != "native":
        monkeypatch.setenv("QUANTKIT_NATIVE", "0")
    library.cache_clear()
    if how == "no-vnni":
        monkeypatch.setattr(cpu, "has_integer_product", lambda: False)
    with use_backend(name):
        yield name
    library.cache_clear()


def transform(k: int, *steps: str) -> Transform:
    values = {
        "shift": torch.randn(k),
        "scale": torch.rand(k) + 0.5,
        "permutation": torch.randperm(k),
        "outliers": torch.randperm(k)[: max(1, k // 20)],
        "rotation": Rotation(math.gcd(k, 64), torch.randint(0, 2, (k,)) * 2.0 - 1),
        "groups": clusters(k),
    }
    return Transform(**{step: values[step] for step in steps})


def layer(
    k: int,
    n: int,
    scheme: str = "w8a8",
    *,
    bias: bool = True,
    steps: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    leftover: Transform | None = None,
) -> W8A8Linear:
    """A layer with random weights, one of whose rows is zero."""
    linear, leftover = nn.Linear(k, n, bias=bias, dtype=dtype), leftover or transform(k, *steps)
    weight = torch.randn(n, k) * torch.logspace(-2, 2, n)[:, None]
    weight[n // 2] = 0
    inner, side = leftover.weight(weight)
    kind = Scheme.parse(scheme)
    groups = leftover.groups or ()
    codes, scale = quantize_weight(
        inner, kind.weight.number.bits, per_tensor=kind.weight.granularity == PerTensor(), groups=groups
    )
    return W8A8Linear.from_float(
        linear, scheme=kind, codes=codes, weight_scale=scale, bias=torch.randn(n) if bias else None, leftover=leftover,
        outlier_weight=side, input_range=(torch.tensor(-2.0), torch.tensor(3.0)),
    )  # fmt: skip


def check(module: W8A8Linear, x: Tensor) -> Tensor:
    got = module(x)
    with use_backend("reference"):
        wanted = copy.deepcopy(module)(x)
    assert got.dtype == x.dtype
    what = f"{module} of {list(x.shape)} {x.dtype}"
    if forced() == "triton" and x.dtype == torch.bfloat16 and module.outlier_index is not None:
        return got  # its interpreter multiplies bfloat16 as integers; benchmarks/check_gpu.py compares these on a GPU
    if forced() == "triton" and (module.rotation_block or module.outlier_index is not None):
        near(got, wanted, what)  # sums of floats, in another order
    elif forced() == "triton" and x.dtype == torch.bfloat16:
        torch.testing.assert_close(got, wanted, rtol=2.0**-7, atol=0, equal_nan=True, msg=what)  # its interpreter truncates
    else:
        assert_same(got, wanted, what)
    return got


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler here")
def test_the_native_passes_build() -> None:
    library.cache_clear()
    assert library() is not None


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("steps", [(), ("groups",)], ids=str)
def test_shapes(backend: str, scheme: str, bias: bool, steps: tuple[str, ...]) -> None:
    for at, (k, n) in enumerate(SHAPES):
        # In Triton's interpreter each shape, and each scheme, has a bias in one half of its cases and none in the other.
        if backend == "triton" and (at + SCHEMES.index(scheme)) % 2 == bias:
            continue
        module = layer(k, n, scheme, bias=bias, steps=steps)
        for m in (0, 1, 2, 17, 300) if k * n < 5000 else (1, 17):
            # It takes rows one by one: there 130 of one shape fill a tile of 128, and two of the next.
            if backend == "triton" and m == 300:
                m = 130 if (k, n) == (63, 65) else 0
            check(module, hostile(m, k))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym", "w8a8-static-asym", "w4a4"])
@pytest.mark.parametrize("steps", STEPS, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rewritten_inputs(backend: str, scheme: str, steps: tuple[str, ...], dtype: torch.dtype) -> None:
    module = layer(40, 19, scheme, steps=steps, dtype=dtype)
    assert module.rewrites_input == bool(set(steps) - {"groups"})
    for m in (1, 17):
        check(module, hostile(m, 40, dtype))


@pytest.mark.parametrize(
    ("k", "block"),
    [(5, 1), (6, 2), (12, 4), (8, 8), (40, 8), (48, 16), (96, 32), (64, 64), (192, 64), (640, 128), (1024, 1024)],
)
@pytest.mark.parametrize("others", [(), ("permutation",), ("shift", "scale", "permutation")], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotations_in_c(k: int, block: int, others: tuple[str, ...], dtype: torch.dtype) -> None:
    """Tiles that are not full, blocks within a tile and across tiles, up to the whole row."""
    for signs in (None, torch.randint(0, 2, (k,)) * 2.0 - 1):
        leftover = replace(transform(k, *others), rotation=Rotation(block, signs))
        module = layer(k, 19, dtype=dtype, leftover=leftover)
        assert module.prepared.fused == (library() is not None)
        x = hostile(17, k, dtype)
        y = check(module, x)
        assert_same(torch.cat([check(module, row[None]) for row in x]), y)  # in one call, and in three
        assert y[6:9].isnan().all()  # NaN, Inf and -Inf somewhere in the row
        assert y[[0, 1, 16]].isfinite().all()
        assert check(module, x[:0]).shape == (0, 19)
        for view in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, k // 2 : k // 2 + k], x[:1].expand(3, k)):
            check(module, view)


@pytest.mark.parametrize("steps", STEPS, ids="+".join)
def test_compiled_before_it_ever_ran(backend: str, steps: tuple[str, ...]) -> None:
    """The weight is then packed while it is traced. C++ is made of no step and of all, which has each of them in it."""
    torch.compiler.reset()
    module, x = layer(40, 19, "w8a8", steps=steps), torch.randn(17, 40)
    both = steps in (("groups",), STEPS[-3]) and library() is not None  # our own C beside C++ also by themselves
    made = "inductor" if steps in ((), STEPS[-1]) or both else "aot_eager"
    with torch.inference_mode():
        got = torch.compile(module, fullgraph=True, backend=made)(x)
        near(got, module(x), f"{module}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("k", [5, 40, 300])
def test_threshold(backend: str, k: int, dtype: torch.dtype) -> None:
    """No column, some and all of them reach it; what is not finite says nothing about other rows."""
    module = layer(k, 19)
    module.threshold = 6.0
    for m in (0, 1, 2, 17):
        for share in (0.0, 0.02, 0.3, 1.0):
            x = torch.randn(m, k).clamp(-5.9, 5.9)
            x = torch.where(torch.rand(m, k) < share, x.sign() * (6 + 40 * x.abs()), x)
            if m > 10:
                x[1], x[2, 0], x[3, k // 2], x[4, k - 1], x[5, 0] = 0, math.nan, math.inf, -math.inf, 6.0
            for given in (x.to(dtype), x.to(dtype).t().contiguous().t()):
                got = module(given)
                with use_backend("reference"):
                    wanted = copy.deepcopy(module)(given)
                near(got, wanted, f"{m} tokens, {share:.0%} large")
                if m > 10:
                    assert got[2:5].isnan().all()
                    assert_same(got[1], module.bias.to(dtype))


def test_threshold_compiled(backend: str) -> None:
    torch.compiler.reset()
    module, x = layer(40, 19), torch.randn(17, 40) * 4
    module.threshold = 6.0
    with torch.inference_mode():
        near(torch.compile(module, fullgraph=True)(x), module(x), f"{module}")


@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (2, 1, 3, 48), (0, 48), (2, 0, 48)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    assert check(layer(48, 6), x).shape == (*shape[:-1], 6)


def test_views(backend: str) -> None:
    """Transposed, strided, expanded and sliced inputs, and weights that are no longer contiguous."""
    module, base = layer(24, 9), torch.randn(24, 48)
    for x in (base.t(), base[:, ::2], base[:1, :24].expand(5, 24), base[1:, 3:27], base.view(2, 12, 48)[..., :24]):
        assert_same(check(module, x), module(x.clone(memory_format=torch.contiguous_format)))
    module.weight = module.weight.t().contiguous().t()
    check(module, base[:, :24])


def test_arithmetic(backend: str) -> None:
    """By hand: codes 127 and -64 (63.5 to even), times 10 and 20, and so on through the scales."""
    module = W8A8Linear(2, 1)
    module.weight.copy_(torch.tensor([[10, 20]]))
    module.weight_scale.fill_(0.5)
    module.bias.fill_(1.0)
    assert module(torch.tensor([[254.0, -127.0]])).item() == (127 * 10 - 64 * 20) * 2.0 * 0.5 + 1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("steps", [(), ("groups",)], ids=str)
def test_rows_that_are_zero_or_not_finite(backend: str, scheme: str, steps: tuple[str, ...]) -> None:
    module = layer(32, 8, scheme, steps=steps)
    x = torch.randn(6, 32)
    x[1], x[2, 3], x[3, 0], x[4, 31] = 0, math.nan, math.inf, -math.inf
    y = check(module, x)
    assert_same(y[1], module.bias)  # exactly the bias
    assert y[2:5].isnan().all()
    assert y[[0, 1, 5]].isfinite().all()


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "w8a8-asym"])
@pytest.mark.parametrize("steps", [("outliers",), ("shift", "scale", "outliers"), ("permutation", "outliers")], ids=str)
def test_outlier_columns_that_are_not_finite(backend: str, scheme: str, steps: tuple[str, ...]) -> None:
    """In the product of floats beside the INT8 product an infinity would stay one."""
    module = layer(64, 8, scheme, steps=steps)
    assert module.outlier_index is not None
    x = torch.randn(5, 64)
    for row, value in enumerate((math.nan, math.inf, -math.inf), 1):
        x[row, module.outlier_index[row % len(module.outlier_index)]] = value
    y = check(module, x)
    assert y[1:4].isnan().all()
    assert y[[0, 4]].isfinite().all()


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("m", [1, 2])
def test_the_longest_exact_sum(backend: str, scheme: str, sign: int, m: int) -> None:
    """All codes as large as they get and of one sign: the sum is the largest there is, and must not wrap."""
    symmetric = Scheme.parse(scheme).input.number.symmetric
    k = MAX_EXACT_K if symmetric else MAX_EXACT_K_ASYMMETRIC
    module = W8A8Linear(k, 1, scheme=Scheme.parse(scheme), bias=False)
    module.weight.fill_(127)
    y = check(module, torch.full((m, k), float(sign)))
    torch.testing.assert_close(y, torch.full((m, 1), sign * 127.0 * k), rtol=2.0**-21, atol=0)  # a few float32 roundings
    with pytest.raises(quantkit.ModelError, match=f"{k + 1} input features"):
        W8A8Linear(k + 1, 1, scheme=Scheme.parse(scheme))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym", "w8a8-static", "w8a8-static-asym"])
@pytest.mark.parametrize("m", [1, 2, 17])
def test_codes_of_minus_128(backend: str, scheme: str, m: int) -> None:
    """quantkit writes none, and other tools do."""
    for k, n in ((1, 8), (64, 8), (130, 9)):
        module = W8A8Linear(k, n, scheme=Scheme.parse(scheme), bias=False)
        module.weight.fill_(-128)
        module.weight[1::2] = 127
        check(module, torch.full((m, k), -1.0))
        check(module, torch.randn(m, k))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym"])
@pytest.mark.parametrize("m", [1, 3])
def test_the_longest_exact_sum_with_minus_128(backend: str, scheme: str, m: int) -> None:
    k = longest(Scheme.parse(scheme))
    module = W8A8Linear(k, 1, scheme=Scheme.parse(scheme), bias=False)
    module.weight.fill_(-128)
    y = check(module, torch.full((m, k), -1.0))
    torch.testing.assert_close(y, torch.full((m, 1), 128.0 * k), rtol=2.0**-21, atol=0)


@pytest.mark.parametrize("k", [1, 63, 1040, 1041, 4096, 16384])
@pytest.mark.parametrize("m", [1, 2, 17])
def test_accumulators(k: int, m: int) -> None:
    """Against int64, with all products of one sign, where a saturating or float32 sum would be off. 16384 * 127**2 > 2**24."""
    random = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    for q, w in ((127, 127), (127, -127), (-127, -127), (-127, 127), (random, 127), (random, random[:1].expand(5, k))):
        a = torch.full((m, k), q, dtype=torch.int8) if isinstance(q, int) else q
        b = torch.full((5, k), w, dtype=torch.int8) if isinstance(w, int) else w.contiguous()
        wanted = (a.long() @ b.long().t()).to(torch.int32)
        assert_same(reference.int_matmul(a, b), wanted)
        assert_same(cpu.int_matmul(a, b), wanted)
        assert_same(cpu.float_matmul(a, b), wanted)
        with torch.autocast("cpu"):
            assert_same(cpu.float_matmul(a, b, out=torch.empty(m, 5, dtype=torch.int32)), wanted)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym", "w8a8-static", "w8a8-static-asym"])
def test_clusters_share_an_accumulator(backend: str, scheme: str) -> None:
    """The rule of numerics, with int64 sums: exactly what clusters would be by themselves, each in its own scale."""
    module, x = layer(40, 19, scheme, steps=("groups",)), hostile(17, 40)
    with use_backend("reference"):
        q, scale, zero = copy.deepcopy(module).prepared.quantized(x)
    zero = torch.zeros(17, 3, dtype=torch.int32) if zero is None else zero.expand(17, 3)
    acc = torch.zeros(17, 19, dtype=torch.int64)
    for g, (a, b) in enumerate(zip(q.split(module.groups, 1), module.weight.split(module.groups, 1), strict=True)):
        both = scale[:, 1 + g : 2 + g].long() * module.weight_scale[:, 1 + g].long()
        acc += both * ((a.long() - zero[:, g : g + 1]) @ b.long().t())
    assert acc.abs().max() < 2**31
    assert_same(module(x), acc.float() * scale[:, :1] * module.weight_scale[:, 0] + module.bias)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym", "w8a8-static", "w8a8-static-asym", "w4a8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_clusters_of_any_loudness(backend: str, scheme: str, dtype: torch.dtype) -> None:
    """Multiples from one to thousands, and tokens by themselves."""
    torch.manual_seed(0)
    sizes = (3, 1, 64, 2, 130, 16, 16, 40, 5, 23)
    module = layer(sum(sizes), 21, scheme, leftover=Transform(groups=sizes, permutation=torch.randperm(sum(sizes))))
    loud = torch.cat([torch.full((size,), 10.0 ** (3 - g)) for g, size in enumerate(sizes)])[module.permutation.argsort()]
    x = torch.cat([hostile(12, 300), torch.randn(9, 300) * loud, torch.ones(1, 300) * loud, torch.randn(3, 300) / loud]).to(
        dtype
    )
    y = check(module, x)
    some = slice(None, None, 3 if backend == "triton" else 1)  # its interpreter takes a third of a second for a call
    alone = torch.cat([module(row[None]) for row in x[some]])
    assert_same(alone, y[some])


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler here")
@pytest.mark.parametrize("steps", [(), ("groups",), ("shift", "scale", "permutation", "rotation", "groups")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_in_one_call(steps: tuple[str, ...], dtype: torch.dtype) -> None:
    """On any processor: this pass multiplies by itself."""
    for k, n in ((40, 19), (577, 33), (64, 64), (5, 3)):
        module = layer(k, n, steps=steps)
        assert module.prepared.fused
        for row in hostile(17, k, dtype):
            with use_backend("reference"):
                wanted = copy.deepcopy(module)(row[None])
            assert_same(cpu._fused(module.prepared.passes, row[None], row.data_ptr()), wanted)


def test_float32_holds_every_sum_of_so_many_products() -> None:
    """2**24 and 2**24 - 1 are floats of their own, and one more product of codes would not be."""
    assert cpu.EXACT_CHANNELS * 128 * 128 == 2**24
    codes = torch.full((1, cpu.EXACT_CHANNELS), -128, dtype=torch.int8)
    assert cpu.float_matmul(codes, codes).item() == 2**24
    nearly = codes.clone()
    nearly[0, -1] = 127
    assert cpu.float_matmul(codes, nearly).item() == 2**24 - 128 * 255
    long, one = torch.full((1, 4 * cpu.EXACT_CHANNELS + 1), -128, dtype=torch.int8), torch.full((1, 1), -1, dtype=torch.int8)
    both = torch.cat([long, one], 1)
    assert cpu.float_matmul(both, both).item() == (4 * cpu.EXACT_CHANNELS + 1) * 2**14 + 1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("steps", [(), ("scale",), ("rotation",), ("groups",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_is_the_same_in_any_company(backend: str, scheme: str, steps: tuple[str, ...], dtype: torch.dtype) -> None:
    # 70 outputs make programs beyond count in Triton's interpreter; 21 are more than one for a token, and a tail
    module, x = layer(96, 21 if backend == "triton" else 70, scheme, steps=steps), hostile(17, 96, dtype)
    assert_same(torch.cat([module(row[None]) for row in x]), module(x))


def test_results_do_not_alias(backend: str) -> None:
    module, x = layer(32, 32), torch.randn(3, 32)
    before, first = x.clone(), module(x)
    kept = first.clone()
    module(torch.randn(3, 32))
    assert_same(x, before)
    assert_same(first, kept)


@pytest.mark.parametrize("steps", [(), ("rotation",)], ids=str)
def test_threads(steps: tuple[str, ...]) -> None:
    """Rows are split over threads, and no bit depends on how many there are."""
    module, x, count = layer(512, 300, steps=steps), torch.randn(70, 512), torch.get_num_threads()
    wanted = [module(x), module(x[:1])]
    try:
        torch.set_num_threads(3)
        assert_same([module(x), module(x[:1])], wanted)
    finally:
        torch.set_num_threads(count)


# ---- the module around them


@pytest.mark.parametrize("steps", [(), STEPS[-1]], ids=str)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static-asym"])
def test_copies_and_state(scheme: str, steps: tuple[str, ...]) -> None:
    module, x = layer(16, 8, scheme, steps=steps), torch.randn(5, 16)
    wanted = module(x)
    fresh = W8A8Linear(16, 8, scheme=Scheme.parse(scheme), groups=module.groups)
    fresh.rotation_block = module.rotation_block
    fresh(x)  # what it packed is out of date afterwards
    assert not fresh.load_state_dict(module.state_dict()).missing_keys
    for other in (copy.deepcopy(module), fresh):
        assert_same(other.state_dict(), module.state_dict())
        assert_same(other(x), wanted)
        other.weight.zero_()
    assert_same(module(x), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casts_leave_scales_alone(dtype: torch.dtype) -> None:
    module = layer(16, 8, "w8a8-static-asym", steps=("shift", "scale", "outliers"))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module(torch.randn(2, 16))
    module.to(dtype)
    for name, value in module.state_dict().items():
        assert_same(value, before[name].to(dtype) if name in ("bias", "outlier_weight") else before[name], name)
    check(module, torch.randn(3, 16, dtype=dtype))


def test_half_and_meta() -> None:
    module = layer(16, 8)
    scale = module.weight_scale.clone()
    assert_same(module.half().weight_scale, scale)
    assert_same(module.float().weight_scale, scale)
    assert module.to("meta").weight_scale.is_meta


def test_weights_changed_in_place_are_seen() -> None:
    module, x = layer(16, 8), torch.randn(2, 16)
    module(x)
    module.load_state_dict(layer(16, 8).state_dict())
    check(module, x)


def test_backends_by_name() -> None:
    assert list(quantkit.backends()) == ["cpu", "triton", "reference"]
    assert quantkit.backends()["cpu"] == quantkit.backends()["reference"] == "ready"
    assert quantkit.backends("meta")["cpu"] != "ready"
    with pytest.raises(BackendError, match="magic"), use_backend("magic"):
        pass
    with use_backend("cpu"), pytest.raises(BackendError, match="meta"):
        layer(4, 4).to("meta")(torch.zeros(1, 4, device="meta"))
    module, x = layer(16, 8), torch.randn(2, 16)
    assert type(module.prepared).__name__ == "CPUPrepared"
    with use_backend("reference"):
        module(x)
    check(module, x)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym"])
def test_compiled(scheme: str) -> None:
    """One graph, for two lengths; Inductor divides and fuses in float32, so a few units in the last place may differ."""
    torch._dynamo.reset()
    model = nn.Sequential(layer(64, 48, scheme), nn.ReLU(), layer(48, 20, scheme, steps=("scale",)))
    compiled = torch.compile(model, fullgraph=True)
    for m in (1, 5):
        x = torch.randn(m, 64)
        torch.testing.assert_close(compiled(x), model(x), rtol=2.0**-20, atol=2.0**-20)


@pytest.mark.parametrize("steps", [("rotation",), ("scale", "permutation", "rotation")], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler here")
def test_rotations_compiled(steps: tuple[str, ...], dtype: torch.dtype) -> None:
    """The operator runs for one token as well, so that no bit differs from eager mode."""
    torch._dynamo.reset()
    module = layer(96, 19, steps=steps, dtype=dtype)
    compiled = torch.compile(module, fullgraph=True)
    with torch.inference_mode():
        for m in (1, 17, 5, 0):
            x = hostile(m, 96, dtype)
            assert_same(compiled(x), module(x))


@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler here")
def test_one_token_compiled(integer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch has no product of integers, its stand-in would turn the whole weight into floats for one token."""
    torch._dynamo.reset()
    monkeypatch.setattr(cpu, "has_integer_product", lambda: integer)
    module, x = layer(64, 48), torch.randn(1, 64)
    compiled = torch.compile(module, fullgraph=True)
    with torch.inference_mode():
        compiled(x)
        with torch.profiler.profile() as profile:
            y = compiled(x)
        torch.testing.assert_close(y, module(x), rtol=2.0**-20, atol=2.0**-20)
    ran = {event.key for event in profile.key_averages()} & {"quantkit::int_matmul", "quantkit::cpu_linear"}
    assert ran == {"quantkit::int_matmul" if integer else "quantkit::cpu_linear"}

"""Are the GPU kernels right? Every kernel on a real GPU against exact integer arithmetic, on awkward shapes and hostile inputs.

    python benchmarks/check_gpu.py

Needs no data and no pytest. Outputs are allocated over memory full of NaN, every call runs twice and must give the same bits,
and a token must give the same bits alone and in a batch. Exit status 1 and a list of what failed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import record
from torch import Tensor

import quantkit
from quantkit.core.rotation import Rotation
from quantkit.core.transform import Transform
from quantkit.core.weights import quantize_weight
from quantkit.layers.linear import W8A8Linear
from quantkit.ops import reference
from quantkit.ops.gpu import operators
from quantkit.ops.gpu.backend import GPUPrepared
from quantkit.ops.gpu.codes import kernels as makers
from quantkit.ops.gpu.codes import shapes
from quantkit.ops.gpu.codes.request import CodesRequest
from quantkit.ops.gpu.layout import BLOCK
from quantkit.ops.gpu.product import tiles
from quantkit.ops.gpu.product.kernels import kernel_of
from quantkit.ops.gpu.product.request import ProductRequest

DEVICE = torch.device("cuda")
random = torch.Generator(DEVICE).manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, generator=random)


def codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, device=DEVICE, generator=random).to(torch.int8)


def quantize(x: Tensor, **options: Any) -> list[Tensor]:
    """Codes from the portable kernel."""
    return makers.PORTABLE.launch(CodesRequest(x, **options))


def takes(kernel: Any, x: Tensor, **options: Any) -> bool:
    return kernel.why_not(CodesRequest(x, **options)) is None


def multiply(q: Tensor, sx: Tensor, w: Tensor, sw: Tensor, dtype: torch.dtype, *, config: tiles.Config) -> Tensor:
    """The product at this setting, whichever the tables would choose."""
    kernel: Any = kernel_of(config)
    return kernel.launch(ProductRequest(q, sx, w, sw, dtype), config)


def poisoned(call: Callable[[], Any], *shapes: tuple[int, ...]) -> Any:
    """The result of ``call`` with its outputs placed over NaN, run twice."""
    results = []
    for _ in range(2):
        junk = [torch.full(shape, float("nan"), device=DEVICE) for shape in shapes]
        del junk
        results.append(call())
    one, two = ([r] if isinstance(r, Tensor) else r for r in results)
    for a, b in zip(one, two, strict=True):
        assert same(a, b), "two runs differ"
    return results[0]


def same(a: Tensor, b: Tensor) -> bool:
    if a.dtype.is_floating_point:
        return a.dtype == b.dtype and bool((a.isnan() == b.isnan()).all()) and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    return torch.equal(a, b)


def exact(q: Tensor, sx: Tensor, w: Tensor, sw: Tensor, dtype: torch.dtype, **extra: Any) -> Tensor:
    zero, wsum, bias = (extra.get(name) for name in ("zero", "wsum", "bias"))
    zero = zero.view(-1, 1) if zero is not None and zero.numel() > 1 else zero
    return reference.epilogue(reference.int_matmul(q, w), sx, sw, zero, wsum, bias, dtype)


def check_matmul() -> None:
    shapes = [(1, 64, 64), (3, 72, 4096), (8, 4096, 4096), (16, 200, 336), (17, 1024, 512), (33, 4096, 14336), (64, 640, 4096)]
    shapes += [(65, 1024, 4096), (128, 4096, 4096), (129, 4104, 1040), (200, 1024, 304), (300, 6144, 4096), (1000, 4096, 4096)]
    shapes += [(2049, 3080, 1024), (5, 33, 77), (130, 257, 99), (1, 7, 5), (70, 1, 1), (40, 4096, 66000), (4, 8, 133144)]
    for (m, n, k), dtype in itertools.product(shapes, (torch.bfloat16, torch.float16, torch.float32)):
        q, w = codes(m, k), codes(n, k)
        if k > 60000:
            q, w = torch.full_like(q, 127), torch.full_like(w, 127)  # the largest sums there are
        sx, sw = rand(m, 1).abs() / k, rand(n).abs() / 127
        sx[m // 2] = float("nan")
        zero = torch.randint(-128, 128, (m, 1), device=DEVICE, generator=random, dtype=torch.int32)
        wsum = w.sum(1, dtype=torch.int32)
        for extra in ({}, {"bias": rand(n)}, {"zero": zero, "wsum": wsum, "bias": rand(n).to(torch.bfloat16)}):
            if k > 60000 and "zero" in extra:
                continue
            got = poisoned(lambda: operators.matmul(q, sx, w, sw, dtype, **extra), (m, n))  # noqa: B023
            assert same(got, exact(q, sx, w, sw, dtype, **extra)), f"{(m, n, k)} {dtype} {list(extra)}"


SOME = ((1, 64, 32), (7, 1000, 4096), (100, 4096, 4096), (128, 512, 48), (257, 1032, 2064), (700, 3000, 1040))


def against_exact(run: Callable[..., Tensor], what: Any) -> None:
    for m, n, k in SOME:
        q, w, sx, sw = codes(m, k), codes(n, k), rand(m, 1).abs() / k, rand(n).abs()
        got = poisoned(lambda: run(q, sx, w, sw, torch.bfloat16), (m, n))  # noqa: B023
        assert same(got, exact(q, sx, w, sw, torch.bfloat16)), f"{what} {(m, n, k)}"


def check_gemms() -> None:
    """Not only the kernels that the table chooses for a shape."""
    for columns, stages, group, early in (
        (256, 4, 8, False),
        (256, 3, 1, True),
        (128, 6, 8, True),
        (64, 8, 4, False),
        (32, 4, 8, True),
    ):
        config = tiles.Gemm(columns, stages, group, early)
        against_exact(functools.partial(multiply, config=config), config)


def check_decodes() -> None:
    for tokens, stages, block, early in (
        (8, 10, 256, True),
        (16, 10, 256, False),
        (32, 4, 128, True),
        (64, 6, 256, True),
        (128, 8, 128, True),
    ):
        config = tiles.Decode(tokens, stages, block, early)
        against_exact(functools.partial(multiply, config=config), config)


def check_tiles() -> None:
    for tile in (*tiles.TILES.values(), *(t for a, t in tiles.LARGE.items() if a <= 90)):
        against_exact(functools.partial(multiply, config=tile), tile)


def check_segments() -> None:
    """Clusters of channels in every kernel, with and without zero points, to the bits of the reference."""
    for (m, n, k), zeros, by_row in itertools.product(
        (
            (1, 96, 256),
            (9, 304, 1024),
            (50, 304, 1024),
            (100, 4096, 4096),
            (300, 520, 4096),
            (1000, 4096, 4096),
            (4096, 8192, 2048),
        ),
        (False, True),
        (False, True),
    ):
        for inner in ([128], [128, k - 128], [32, k // 48 * 16]):
            borders = [0, *sorted({b for b in inner if 0 < b < k}), k]
            groups = tuple(b - a for a, b in itertools.pairwise(borders))
            q, w, count = codes(m, k), codes(n, k), len(groups)
            sx, sw = (
                torch.cat(
                    [rand(rows, 1).abs() / k, 2.0 * torch.randint(0, 4, (rows, count), device=DEVICE, generator=random) + 1], 1
                )
                for rows in (m, n)
            )
            if by_row:
                packed = sw.t().contiguous()
            else:
                sw[:, 1:], packed = 1, sw[:, 0].contiguous()
            zero = torch.randint(-128, 128, (m, count), device=DEVICE, generator=random, dtype=torch.int32) if zeros else None
            sums, side = reference.row_sums(w, groups), rand(m, 64).bfloat16()
            products = [reference.int_matmul(a, b) for a, b in zip(q.split(groups, 1), w.split(groups, 1), strict=True)]
            align = 16 if any(b % 128 for b in borders) else 128
            pack = {
                "borders": torch.tensor(borders, device=DEVICE, dtype=torch.int32), "align": align, "zero": zero,
                "wsum": sums if zeros else None,
            }  # fmt: skip
            acc = reference.group_sum(products, sx[:, 1:], sw[:, 1:], zero, sums)
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                wanted = reference.epilogue(acc, sx[:, :1], sw[:, 0], None, None, None, dtype)
                got = poisoned(lambda: operators.matmul(q, sx, w, packed, dtype, **pack), (m, n))  # noqa: B023
                assert same(got, wanted), f"segments {(m, n, k, borders, zeros, by_row, dtype)}"
            side_weight = rand(n, 64).bfloat16()
            extra = (side.double() @ side_weight.double().t()).float()
            wanted = reference.epilogue(acc, sx[:, :1], sw[:, 0], None, None, extra, torch.float32)
            out = operators.matmul(q, sx, w, packed, torch.bfloat16, side=side, side_weight=side_weight, **pack)
            off = relative(out, wanted)
            assert off < 5e-3, f"segments and a side {(m, n, k, borders, zeros, by_row)} {off}"


def check_sides() -> None:
    for m, n, k in ((1, 96, 256), (50, 304, 1008), (300, 520, 4096), (1000, 4096, 4096)):
        q, w, sx, sw = codes(m, k), codes(n, k), rand(m, 1).abs() / k, rand(n, 1).abs()
        for count, dtype in itertools.product((1, 37, 64, 128), (torch.bfloat16, torch.float16, torch.float32)):
            side, side_weight = rand(m, count).to(dtype), rand(n, count).to(dtype)
            one = sx[:, :1].contiguous(), sw[:, 0].contiguous()
            got = operators.matmul(q, one[0], w, one[1], torch.float32, side=side, side_weight=side_weight)
            wanted = exact(q, one[0], w, one[1], torch.float32, bias=(side.double() @ side_weight.double().t()).float())
            assert relative(got, wanted) < 1e-5, f"side {(m, n, k, count, dtype)} {relative(got, wanted)}"
            if dtype != torch.float32:  # a 16-bit result comes from the Hopper kernels
                out = poisoned(
                    lambda: operators.matmul(q, one[0], w, one[1], dtype, side=side, side_weight=side_weight),  # noqa: B023
                    (m, n),
                )
                assert relative(out, wanted) < 5e-3, f"side {(m, n, k, count, dtype)} {relative(out, wanted)}"


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def check_quantize() -> None:
    for (m, k), dtype in itertools.product(
        ((1, 4096), (5, 64), (3, 77), (100, 576), (33, 14336), (7, 28672), (2, 66000), (4, 1)),
        (torch.bfloat16, torch.float16, torch.float32),
    ):
        x = (rand(m, k) * 3).to(dtype)
        if m > 4:
            x[1], x[2, k // 2], x[3, 0] = 0, float("nan"), float("-inf")
        wide = torch.empty(m, 2 * k, device=DEVICE, dtype=dtype)[:, ::2].copy_(x)
        for symmetric, bits, given in itertools.product((True, False), (8, 4), (x, wide)):
            got = poisoned(lambda: quantize(given, symmetric=symmetric, bits=bits), (m, k))  # noqa: B023
            wanted = [t for t in reference.quantize_rows(x, symmetric=symmetric, bits=bits) if t is not None]
            ok = wanted[1].isfinite().view(-1)
            assert same(got[1], wanted[1]), f"scale {(m, k)} {dtype} {symmetric}"
            got[0] = got[0][:, :k]
            assert all(torch.equal(a[ok], b[ok]) for a, b in zip(got, wanted, strict=True)), f"{(m, k)} {dtype} {symmetric}"
        scale, zero = torch.tensor([0.03], device=DEVICE), torch.tensor([7], device=DEVICE, dtype=torch.int32)
        for z in (None, zero):
            got = quantize(x, symmetric=z is None, in_scale=scale, in_zero=z)
            wanted = list(reference.quantize_static(x, scale, z))
            ok = wanted[1].isfinite().view(-1)
            assert same(got[1], wanted[1]), f"static scale {(m, k)} {dtype}"
            assert torch.equal(got[0][ok, :k], wanted[0][ok]), f"static {(m, k)} {dtype}"


def check_norms_and_gates() -> None:
    f = torch.nn.functional
    for m, k in ((1, 4096), (50, 576), (9, 14336)):
        x, y, gain, bias = (rand(*s).bfloat16() for s in ((m, k), (m, k), (k,), (k,)))
        total = (x.float() + y.float()).bfloat16()
        rms = total.float() * torch.rsqrt(total.float().pow(2).mean(1, keepdim=True) + 1e-6)
        got = quantize(x, source="rms", x2=y, gain=gain, eps=1e-6, offset=1.0)
        near(got[:2], rms * (gain.float() + 1))
        assert torch.equal(got[2], total)
        near(quantize(x, source="rms", gain=gain, eps=1e-6), f.rms_norm(x.float(), (k,), gain.float(), 1e-6))
        near(
            quantize(x, source="layer", gain=gain, bias=bias, eps=1e-5),
            f.layer_norm(x.float(), (k,), gain.float(), bias.float()),
        )
        near(quantize(x, source="silu", x2=y), f.silu(x.float()) * y.float())
        near(quantize(x, source="gelu", x2=y), f.gelu(x.float()) * y.float())
        near(quantize(x, source="gelu_tanh", x2=y), f.gelu(x.float(), approximate="tanh") * y.float())


def near(got: list[Tensor], wanted: Tensor) -> None:
    q, scale, _ = reference.quantize_rows(wanted)
    assert relative(got[1], scale) < 1e-5, f"scale off by {relative(got[1], scale)}"
    off = (got[0].int() - q.int()).abs()
    assert int(off.max()) <= 1, f"code off by {int(off.max())}"
    assert float(off.float().mean()) < 1e-2, f"codes off: {float(off.float().mean())}"


def check_rows() -> None:
    """The kernel for common forms: exact without a rotation, ties aside with one, and the same norms and gates."""
    f = torch.nn.functional
    for k, dtype in itertools.product(
        (512, 576, 1000, 1536, 4096, 8192, 14336, 28672), (torch.bfloat16, torch.float16, torch.float32)
    ):
        for m in (1, 37, 3000):
            x = (rand(m, k) * 3).to(dtype)
            if m > 4:
                x[1], x[2, k // 2], x[3, 0] = 0, float("nan"), float("-inf")
            assert takes(makers.ROWS, x, rotation=64), f"rows leaves {(m, k)} out"
            for block in (0, 8, 16, 32, 64, 128, 256):
                if block and k % block:
                    continue
                y = Rotation(block).apply(x.float()) if block else x.float()
                got = poisoned(lambda: operators.quantize(x, rotation=block), (m, k))  # noqa: B023
                one = operators.quantize(x[:1], rotation=block)
                assert same(got[0][:1], one[0]) and same(got[1][:1], one[1]), f"rows {(m, k, block, dtype)}: alone"  # noqa: PT018
                agree(got, y, f"rows {(m, k, block, dtype)}", exact=not block)
            scale = rand(k).abs() + 0.1
            got = poisoned(lambda: operators.quantize(x, pre_scale=scale), (m, k))  # noqa: B023
            agree(got, x.float() * scale, f"rows {(m, k, dtype)}: pre-scale", exact=True)
            order = torch.randperm(k, device=DEVICE)
            got = poisoned(lambda: operators.quantize(x, pre_scale=scale, permutation=order), (m, k))  # noqa: B023
            agree(got, (x.float() * scale)[:, order], f"rows {(m, k, dtype)}: permutation", exact=True)
            if not k % 64:
                got = poisoned(lambda: operators.quantize(x, pre_scale=scale, rotation=64), (m, k))  # noqa: B023
                agree(got, Rotation(64).apply(x.float() * scale), f"rows {(m, k, dtype)}: pre-scale, rotation")
    for m, k in ((1, 4096), (50, 576), (3000, 4096), (9, 14336)):
        x, y, gain, bias = (rand(*s).bfloat16() for s in ((m, k), (m, k), (k,), (k,)))
        total = (x.float() + y.float()).bfloat16()
        rms = total.float() * torch.rsqrt(total.float().pow(2).mean(1, keepdim=True) + 1e-6)
        for block in (0, 64):
            r = Rotation(block).apply if block else (lambda x: x)
            got = poisoned(
                lambda: operators.quantize(x, source="rms", x2=y, gain=gain, eps=1e-6, offset=1.0, rotation=block),  # noqa: B023
                (m, k), (m, k),
            )  # fmt: skip
            near(got[:2], r(rms * (gain.float() + 1)))
            assert torch.equal(got[2], total)
            got = operators.quantize(x, source="layer", gain=gain, bias=bias, eps=1e-5, rotation=block)
            near(got, r(f.layer_norm(x.float(), (k,), gain.float(), bias.float())))
            got = poisoned(lambda: operators.quantize(x, source="silu", x2=y, rotation=block), (m, k))  # noqa: B023
            gate = f.silu(x.float()) * y.float()
            near(got, r(gate.bfloat16().float()) if block else gate)  # rounded as in memory, before a rotation


def check_clusters() -> None:
    """Clusters in the kernel for common forms: layers to the bits of the reference, norms and gates as the portable one."""
    for groups in (
        (128, 896),
        (20, 500, 1500, 2076),
        (64, 128, 64, 700, 1000, 1000, 2000, 3236),
        (8, 1000, 4000, 9328),
        (128, 384, 512),
        (512,) * 8,
        (256,) * 16,
        (128,) * 32,
        (128, 2000, 3872),
    ):
        k = sum(groups)
        order = torch.randperm(k, device=DEVICE)
        layer = layer_of(520, k, Transform(permutation=order, groups=groups))
        gain = rand(k).bfloat16()
        where = {name: layer.prepared.making[name] for name in ("permutation", "clusters", "shares", "align")}
        assert where["align"] == BLOCK, f"clusters {k, groups}"
        for m in (1, 37, 3000):
            x, y = rand(m, k).bfloat16(), rand(m, k).bfloat16()
            x[:, order[: groups[0]]] *= 30
            assert takes(makers.ROWS, x, **where), f"rows leaves clusters of {k} out"
            with torch.inference_mode():
                norm = {"source": "rms", "gain": gain, "eps": 1e-6}
                for form in (norm, norm | {"x2": y}, {"source": "silu", "x2": y}):
                    got, wanted = operators.quantize(x, **where, **form), quantize(x, **where, **form)
                    assert relative(got[1][:, :1], wanted[1][:, :1]) < 1e-5, f"clusters {(m, k, form['source'])}: scale"
                    # where the last bit of a norm is another, a multiple may be the next one
                    equal = (got[1][:, 1:] == wanted[1][:, 1:]).all(1)
                    assert float(equal.float().mean()) > 0.95 - 1 / m, f"clusters {(m, k, form['source'])}: multiples"
                    off = (got[0].int() - wanted[0].int()).abs()[equal]
                    assert not off.numel() or int(off.max()) <= 1, f"clusters {(m, k, form['source'])}: codes"
                    assert not off.numel() or float(off.float().mean()) < 1e-2, f"clusters {(m, k, form['source'])}: many codes"
                if m > 4:
                    x[1], x[2, k // 2], x[3, 0] = 0, float("nan"), float("-inf")
                for dtype in (torch.bfloat16, torch.float16, torch.float32):
                    got = poisoned(lambda: layer(x.to(dtype)), (m, k))  # noqa: B023
                    with quantkit.use_backend("reference"):
                        assert same(got, layer(x.to(dtype))), f"clusters {(m, k, dtype)}"
                    assert same(got[:1], layer(x[:1].to(dtype))), f"clusters {(m, k, dtype)}: alone"


def check_order() -> None:
    """Channels in another order, two rows at a time and one, as the portable kernel does it."""
    for m, k in itertools.product((1, 2, 37, 3001), (512, 576, 1000, 4096, 8000)):
        x, y = rand(m, k).bfloat16(), rand(m, k).bfloat16()
        if m > 4:
            x[1], x[2, k // 2], x[3, 0] = 0, float("nan"), float("-inf")
        norm = {"source": "rms", "gain": rand(k).bfloat16(), "eps": 1e-6, "pre_scale": rand(k).abs() + 0.1}
        for form, kernel in itertools.product(({}, norm, norm | {"x2": y}), (makers.ORDER, makers.ROWS)):
            options = form | {"permutation": torch.randperm(k, device=DEVICE)}
            assert m <= shapes.FEW or takes(makers.ORDER, x, **options), f"order leaves {(m, k)} out"
            assert takes(makers.ROWS, x, **options), f"rows leaves {(m, k)} out"
            got, wanted = poisoned(lambda: kernel.launch(CodesRequest(x, **options)), (m, k)), quantize(x, **options)  # noqa: B023
            what = f"{kernel.name} {(m, k, *form)}"
            finite = wanted[1].isfinite()
            assert torch.equal(got[1].isfinite(), finite), f"{what}: finite rows"
            assert relative(got[1][finite], wanted[1][finite]) < 1e-5, f"{what}: scale"
            off = (got[0].int() - wanted[0].int()).abs()
            assert int(off.max()) <= 1 and float(off.float().mean()) < 1e-2, f"{what}: codes"  # noqa: PT018
            assert all(same(a, b) for a, b in zip(got[2:], wanted[2:], strict=True)), f"{what}: sum"


def agree(got: list[Tensor], wanted: Tensor, what: str, *, exact: bool = False) -> None:
    """Codes and scales against those of ``wanted [M, K]``: the same, or but for ties, of which the share is counted."""
    q, scale, _ = reference.quantize_rows(wanted)
    finite = scale.isfinite().view(-1)
    assert torch.equal(got[1].isfinite().view(-1), finite), f"{what}: finite rows"
    assert not got[0][~finite].any(), f"{what}: codes of rows that are not finite"
    assert relative(got[1][finite], scale[finite]) < (1e-9 if exact else 1e-4), f"{what}: scale"
    off = (got[0][finite, : q.shape[1]].int() - q[finite].int()).abs()
    assert int(off.max()) <= (0 if exact else 1), f"{what}: code off by {int(off.max())}"
    assert int(off.sum()) <= 3 + 2e-3 * off.numel(), f"{what}: {int(off.sum())} of {off.numel()} codes off"


def layer_of(n: int, k: int, leftover: Transform | None = None, bias: bool = True, scheme: str = "w8a8") -> W8A8Linear:
    linear = torch.nn.Linear(k, n, bias=bias, device=DEVICE, dtype=torch.bfloat16)
    inner, side = (leftover or Transform()).weight(linear.weight.detach().float())
    q, s = quantize_weight(inner, groups=(leftover and leftover.groups) or ())
    return W8A8Linear.from_float(
        linear, scheme=quantkit.Scheme.parse(scheme), codes=q, weight_scale=s, leftover=leftover, outlier_weight=side,
        bias=None if linear.bias is None else linear.bias.detach().float(),
        input_range=(torch.tensor(-3.0), torch.tensor(4.0)),
    )  # fmt: skip


def check_layers() -> None:
    """Whole layers against the reference backend, every transform, alone and in a batch, compiled and in a CUDA graph."""
    n, k = 520, 640
    scale = rand(k).abs() + 0.1
    outliers = torch.tensor([3, 77, 600], device=DEVICE)
    transforms = {
        "plain": None,
        "pre_scale": Transform(scale=scale),
        "shift": Transform(shift=rand(k)),
        "permutation": Transform(permutation=torch.randperm(k, device=DEVICE)),
        "outliers": Transform(outliers=outliers),
        "all": Transform(rand(k), scale, outliers, torch.randperm(k, device=DEVICE), Rotation(64, rand(k).sign())),
        "rotation": Transform(rotation=Rotation(128)),
        "clusters": Transform(permutation=torch.randperm(k, device=DEVICE), groups=(9, 100, 200, k - 309)),
    }
    for (name, transform), scheme in itertools.product(
        transforms.items(), ("w8a8", "w8a8-asym", "w8a8-static", "w8a8-static-asym")
    ):
        layer = layer_of(n, k, transform, scheme=scheme)
        assert isinstance(layer.prepared, GPUPrepared)
        x = rand(40, k).bfloat16()
        with torch.inference_mode():
            got = layer(x)
            with quantkit.use_backend("reference"):
                wanted = layer(x)
            if name in ("plain", "pre_scale", "permutation", "shift", "clusters"):
                # reference and kernel round at the same places but for bf16 steps of shift
                assert same(got, wanted) or (name == "shift" and relative(got, wanted) < 1e-2), f"{name} {scheme}"
            assert relative(got, wanted) < 1e-2, f"{name} {scheme} {relative(got, wanted)}"
            for size in (1, 2, 5, 17):
                assert same(layer(x[:size]), got[:size]), f"batch of {size}: {name} {scheme}"
            assert layer(x[:0]).shape == (0, n)
            if scheme == "w8a8":
                check_compiled(layer, x, name)
                graph, out = captured(layer, x)
                x.copy_(rand(40, k))
                graph.replay()
                assert same(out, layer(x)), f"graph {name}"


def check_threshold() -> None:
    """Columns that reach a threshold in the batch: against the reference, compiled, in a CUDA graph that sees other columns."""
    for m, n, k in ((1, 64, 77), (1, 4096, 4096), (9, 520, 640), (200, 1000, 4096), (1030, 4096, 14336)):
        layer = layer_of(n, k)
        layer.threshold = 6.0

        def batch(columns: int) -> Tensor:
            x = rand(m, k).clamp(-5, 5)  # noqa: B023
            x[:, torch.randperm(k, device=DEVICE)[:columns]] *= 40  # noqa: B023
            if m > 5:  # noqa: B023
                x[2], x[3, 5], x[4, 6] = 0, torch.nan, torch.inf
            return x

        with torch.inference_mode():
            for columns, dtype in itertools.product((0, 1, 8, 70, 300), (torch.bfloat16, torch.float16, torch.float32)):
                x = batch(columns).to(dtype)
                got = poisoned(lambda: layer(x), (m, n))  # noqa: B023
                with quantkit.use_backend("reference"):
                    wanted = layer(x)
                assert torch.equal(got.isnan().any(1), wanted.isnan().any(1)), f"threshold {(m, n, k, columns, dtype)}: NaN"
                off = relative(got.nan_to_num(), wanted.nan_to_num())
                assert off < 5e-3, f"threshold {(m, n, k, columns, dtype)}: {off}"
            x = batch(3).bfloat16()
            graph, out = captured(layer, x)
            for columns in (20, 0, 400):
                x.copy_(batch(columns))
                graph.replay()
                assert same(out, layer(x)), f"threshold {(m, n, k)}: graph"
            if k == 640:
                torch.compiler.reset()
                assert same(torch.compile(layer, fullgraph=True)(x), layer(x)), "threshold: compiled"


def check_compiled(layer: W8A8Linear, x: Tensor, name: str) -> None:
    """One graph under torch.compile, with the bits of the eager layer."""
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    hostile = x.clone()
    hostile[1], hostile[2, 5], hostile[3, 6] = 0, torch.nan, torch.inf
    assert same(compiled(hostile).isnan().any(1), layer(hostile).isnan().any(1)), f"compiled {name}, NaN"
    assert same(compiled(x), layer(x)), f"compiled {name}"


def check_batches() -> None:
    """A token gives the same bits in every batch, whichever kernel runs it."""
    x = rand(2048, 4096).bfloat16()
    for leftover in (None, Transform(outliers=torch.arange(0, 4096, 300, device=DEVICE))):
        big = layer_of(4096, 4096, leftover, bias=False)
        whole = big(x)
        for size in (1, 2, 8, 9, 16, 33, 64, 65, 100, 128, 129, 256, 512, 1024):
            assert same(big(x[:size]), whole[:size]), f"batch of {size} {leftover}"


def captured(layer: Any, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    return graph, out


def check_chains() -> None:
    """Layers back to back, each started before the last one ended: no one may read too early."""
    layers = [layer_of(4096, 4096, bias=False) for _ in range(6)]
    with torch.inference_mode():
        for m in (1, 4, 16, 48, 100, 256):
            x = rand(m, 4096).bfloat16()
            wanted = x
            for layer in layers:
                wanted = layer(wanted)
                torch.cuda.synchronize()
            for _ in range(20):
                y = x
                for layer in layers:
                    y = layer(y)
                assert same(y, wanted), f"{m} tokens"


def check_devices() -> None:
    """Every GPU there is, whichever is current, and a stream of one's own: the bits of the first GPU's default stream."""
    outliers = Transform(outliers=torch.tensor([3, 77, 600], device=DEVICE))
    for leftover, m in itertools.product((None, Transform(rotation=Rotation(64)), outliers), (1, 40, 300)):
        layer, x = layer_of(4096, 640, leftover), rand(m, 640).bfloat16()
        with torch.inference_mode():
            wanted = layer(x).cpu()
            for index in range(torch.cuda.device_count()):
                there, copied = copy.deepcopy(layer).to(f"cuda:{index}"), x.to(f"cuda:{index}")
                for stream in (torch.cuda.default_stream(index), torch.cuda.Stream(index)):
                    stream.wait_stream(torch.cuda.default_stream(index))
                    with torch.cuda.stream(stream), torch.cuda.device(0):
                        got = there(copied)
                    stream.synchronize()
                    assert same(got.cpu(), wanted), f"cuda:{index} {m} {leftover}"


def check_shared_codes() -> None:
    """Layers of one activation in eager mode, called again and again: the bits of each by itself, whatever happens between."""
    layers = [layer_of(n, 640, bias=n == 320) for n in (320, 64, 1000)]
    stream = torch.cuda.Stream()

    def called(x: Tensor, *, between: Callable[[Tensor], Any] | None = None) -> None:
        wanted, got = [layer(x.clone()) for layer in layers], list[Tensor]()  # each of another tensor
        for layer in layers:
            got.append(layer(x))
            if between is not None:
                between(x)
                wanted[len(got) :] = [other(x.clone()) for other in layers[len(got) :]]
        assert all(map(same, got, wanted)), f"{len(x)} tokens"

    with torch.no_grad():
        for m in (1, 2, 40, 300, 2048):
            for _ in range(4):
                called(rand(m, 640).bfloat16())
            called(rand(m, 640).bfloat16(), between=lambda x: x.mul_(-0.5))
            called(rand(m, 640).bfloat16(), between=lambda x: setattr(x, "data", rand(*x.shape).bfloat16()))
            with torch.inference_mode():
                called(rand(m, 640).bfloat16(), between=lambda x: x.mul_(-0.5))
            stream.wait_stream(torch.cuda.current_stream())
            x = rand(m, 640).bfloat16()
            first = [layers[0](x)]
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                rest = [layer(x) for layer in layers[1:]]
            stream.synchronize()
            assert all(same(y, layer(x.clone())) for y, layer in zip(first + rest, layers, strict=True))


def check_eager_norms() -> None:
    """RMSNorms that fuse_norms has found, against themselves: at most two bits of the last place apart."""

    class Late(torch.nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
            return (wide * (1 + self.weight.float())).to(x.dtype)

    class Early(torch.nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    for kind, k, dtype in itertools.product(
        (Late, Early, torch.nn.RMSNorm), (1, 96, 4096, 5120, 2**15), (torch.bfloat16, torch.float16, torch.float32)
    ):
        norm = kind(k, eps=1e-5, device=DEVICE, dtype=dtype).requires_grad_(False)
        norm.weight.copy_(rand(k))
        fused = copy.deepcopy(norm)
        quantkit.fuse_norms(fused)
        for m in (1, 7, 300):
            x = rand(m, 2 * k).to(dtype)[:, k:]
            x[0] = 0
            wanted = norm(x)
            for _ in range(3):
                torch.testing.assert_close(fused(x), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
            x[-1, 0] = float("nan")
            assert bool(fused(x)[-1].isnan().all())
        assert vars(fused)["forward"]._runner is not None, f"{kind.__name__} {k} {dtype} goes through Triton every time"


CHECKS = {
    f.__name__.removeprefix("check_"): f
    for f in (
        check_quantize, check_norms_and_gates, check_rows, check_clusters, check_order, check_matmul, check_gemms,
        check_decodes, check_tiles, check_segments, check_sides, check_layers, check_threshold, check_batches, check_chains,
        check_devices, check_shared_codes, check_eager_norms,
    )
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CHECKS, help="one of them, in this process")
    only = parser.parse_args().only
    if only:
        CHECKS[only]()
        torch.cuda.synchronize()
        return
    # Most of the time goes into compiling kernels: one process for each check.
    running = {
        name: subprocess.Popen([sys.executable, __file__, "--only", name], stderr=subprocess.PIPE, text=True) for name in CHECKS
    }
    failed: dict[str, str] = {}
    for name, process in running.items():
        try:
            error = process.communicate(timeout=240)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            error = "hangs\n" + process.communicate()[1]
        if process.returncode:
            failed[name] = error[-1500:]
        print(f"FAILED  {name}\n{error[-1500:]}" if process.returncode else f"ok      {name}", flush=True)
    passed = [name for name in CHECKS if name not in failed]
    print("written", record("check_gpu", {"passed": passed, "failed": failed}, gpus=torch.cuda.device_count()))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

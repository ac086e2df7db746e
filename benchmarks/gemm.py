"""INT8 linears on a GPU beside everything else that a user could take, interleaved in one run.

    python benchmarks/gemm.py [--tokens 1 16 ...] [--shapes 4096x4096 ...] [--rounds 9] [--cutlass libcutlass_int8.so]
                              [--probe FOLDER] [--only PATTERN ...]

Every candidate is captured in a CUDA graph of a few calls over rotating copies of the weight (cold: beyond the L2 cache) or one
copy (hot). Graphs are replayed in turn, in an order drawn for every round, and the median is kept. Random data. "given" takes
INT8 activations and their scales; "bf16" starts from bf16 activations and includes their quantization.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import record
from torch import Tensor
from torch.nn import functional as F

from quantkit.core.weights import steps_of
from quantkit.ops.gpu import operators, tune
from quantkit.ops.gpu.layout import BLOCK, padded_side
from quantkit.ops.gpu.product import tiles
from quantkit.ops.gpu.product.door import choose
from quantkit.ops.gpu.product.kernels import kernel_of
from quantkit.ops.gpu.product.request import ProductRequest
from quantkit.ops.gpu.tune import COLD_BYTES, Call, graph_of, interleaved, seconds

TOKENS = (1, 4, 16, 32, 64, 128, 256, 1024, 4096, 8192)
SHAPES = ("6144x4096", "4096x4096", "28672x4096", "4096x14336", "8192x8192", "57344x8192", "8192x28672")
DEVICE = torch.device("cuda")


class Inputs:
    """Operands of one shape, in as many copies as it takes to leave the cache; made when first asked for."""

    def __init__(self, m: int, n: int, k: int, copies: int = 0) -> None:
        self.m, self.n, self.k = m, n, k
        self.copies = copies or max(2, min(64, -(-COLD_BYTES // (n * k))))
        self.sx, self.sw = torch.rand(m, 1, device=DEVICE) / k, torch.rand(n, device=DEVICE) / 127

    @functools.cached_property
    def x(self) -> list[Tensor]:
        return [torch.randn(self.m, self.k, device=DEVICE).bfloat16() for _ in range(self.copies)]

    @functools.cached_property
    def x_outliers(self) -> list[Tensor]:
        """The same with 8 channels that reach the threshold of LLM.int8(), and no others."""
        eight = torch.arange(8, device=DEVICE) * (self.k // 8)
        return [x.clamp(-5, 5).index_fill(1, eight, 20) for x in self.x]

    @functools.cached_property
    def q(self) -> list[Tensor]:
        return [int8(self.m, self.k) for _ in range(self.copies)]

    @functools.cached_property
    def w(self) -> list[Tensor]:
        return [int8(self.n, self.k) for _ in range(self.copies)]

    @functools.cached_property
    def w16(self) -> list[Tensor]:
        return [torch.randn(self.n, self.k, device=DEVICE, dtype=torch.bfloat16) for _ in range(max(2, self.copies // 2))]

    @functools.cached_property
    def w8(self) -> list[Tensor]:
        return [w.bfloat16().to(torch.float8_e4m3fn) for w in self.w]

    @functools.cached_property
    def q8(self) -> list[Tensor]:
        return [q.bfloat16().to(torch.float8_e4m3fn) for q in self.q]


def int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, device=DEVICE, dtype=torch.int8)


def at(values: list[Any], i: int) -> Any:
    return values[i % len(values)]


class Calls:
    """In place of a CUDA graph, for peers that read results back on the host: their launches count."""

    def __init__(self, call: Call, indices: list[int]) -> None:
        self.call, self.indices = call, indices
        self.replay()

    def replay(self) -> None:
        for i in self.indices:
            self.call(i)


def ours_given(a: Inputs) -> Call:
    return lambda i: operators.matmul(at(a.q, i), a.sx, at(a.w, i), a.sw, torch.bfloat16)


def ours(a: Inputs) -> Call:
    if a.m == 1:
        return lambda i: operators.gemv(at(a.x, i), at(a.w, i), a.sw)

    def call(i: int) -> Tensor:
        q, s = operators.quantize(at(a.x, i))
        return operators.matmul(q, s, at(a.w, i), a.sw, torch.bfloat16)

    return call


def ours_with_columns(n: int) -> Callable[[Inputs], Call | None]:
    """``n`` outlier columns beside the INT8 product, as LLMInt8 leaves them."""

    def candidate(a: Inputs) -> Call | None:
        index = torch.arange(n, device=DEVICE) * (a.k // n)
        side = torch.randn(a.n, padded_side(n), device=DEVICE, dtype=torch.bfloat16)
        mask = torch.zeros(a.k, device=DEVICE, dtype=torch.int8).index_fill(0, index, 1)

        def call(i: int) -> Tensor:
            q, s, x = operators.quantize(at(a.x_outliers, i), side_mask=mask, side_index=index)
            return operators.matmul(q, s, at(a.w, i), a.sw, torch.bfloat16, side=x, side_weight=side)

        return call

    return candidate


def ours_in_segments(count: int, padding: int = 0) -> Callable[[Inputs], Call | None]:
    """K in segments that count multiples, as RPTQ leaves it: the hottest channels in a tile, with ``padding`` zeros."""

    def candidate(a: Inputs) -> Call | None:
        wide = a.k + padding
        inner = [
            128,
            *(128 + a.k * parts // 256 // 128 * 128 for parts in {2: (), 4: (32, 128), 8: (8, 16, 32, 64, 96, 128)}[count]),
        ]
        if sorted({0, *inner, wide}) != [0, *inner, wide]:
            return None  # too short for so many
        borders = torch.tensor([0, *inner, wide], device=DEVICE, dtype=torch.int32)
        q, w = ([int8(rows, wide) for _ in range(a.copies)] for rows in (a.m, a.n))
        multiples = 2.0 * torch.randint(0, 100, (a.m, count), device=DEVICE) + 1
        sx, sw, more = torch.cat([a.sx, multiples], 1), a.sw, {"borders": borders, "align": BLOCK}
        if (steps := steps_of(a.k, 8)) > 1:
            sw = torch.cat([sw[None], 2.0 * torch.randint(0, steps // 2 + 1, (count, a.n), device=DEVICE) + 1])
        return lambda i: operators.matmul(at(q, i), sx, at(w, i), sw, torch.bfloat16, **more)

    return candidate


def ours_with_threshold(a: Inputs) -> Call | None:
    """LLM.int8() as published, with 8 columns that reach the threshold."""

    def call(i: int) -> Tensor:
        x = at(a.x_outliers, i)
        q, s, active = operators.quantize(x, threshold=6.0)
        return operators.matmul(q, s, at(a.w, i), a.sw, torch.bfloat16, side=x, active=active)

    return call


def ours_quantize(a: Inputs) -> Call:
    return lambda i: operators.quantize(at(a.x, i))


def bf16(a: Inputs) -> Call:
    return lambda i: F.linear(at(a.x, i), at(a.w16, i))


def int_mm(a: Inputs) -> Call | None:
    return None if a.m <= 16 else lambda i: torch._int_mm(at(a.q, i), at(a.w, i).t())


def fp8(a: Inputs) -> Call:
    sw = a.sw.view(1, -1)
    return lambda i: torch._scaled_mm(at(a.q8, i), at(a.w8, i).t(), a.sx, sw, out_dtype=torch.bfloat16, use_fast_accum=True)


def cutlass(path: Path) -> dict[str, Callable[[Inputs], Call | None]]:
    """A library that wraps CUTLASS in seven tiles, built for this comparison; see docs/gpu.md."""
    library = ctypes.CDLL(str(path))
    workspace = torch.empty(64 << 20, dtype=torch.uint8, device=DEVICE)

    def make(tile: int) -> Callable[[Inputs], Call | None]:
        def candidate(a: Inputs) -> Call | None:
            out = torch.empty(a.m, a.n, device=DEVICE, dtype=torch.bfloat16)

            def call(i: int) -> None:
                failed = library.mm(
                    ctypes.c_int(tile), *(ctypes.c_void_p(t.data_ptr()) for t in (at(a.q, i), at(a.w, i), out, a.sx, a.sw)),
                    ctypes.c_int(a.m), ctypes.c_int(a.n), ctypes.c_int(a.k), ctypes.c_void_p(workspace.data_ptr()),
                    ctypes.c_size_t(workspace.numel()), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
                )  # fmt: skip
                if failed:
                    raise RuntimeError(f"CUTLASS tile {tile}: {failed}")

            return call

        return candidate

    return {f"given: CUTLASS tile {tile}": make(tile) for tile in range(7)}


def probe(folder: Path) -> dict[str, Callable[[Inputs], Call | None]]:
    """The feasibility study that came before these kernels, at its best settings."""
    sys.path.insert(0, str(folder))
    import dec
    import gws

    def gemm(columns: int, stages: int, early: int) -> Callable[[Inputs], Call | None]:
        width = min(columns // 2, 64)
        run = gws.make_ws((2, 64, columns, 128, stages, width, 2, 8, 232, 24, 0, 0), early)

        def candidate(a: Inputs) -> Call | None:
            if a.m <= 64 or (a.m > 512 and columns < 256):
                return None
            out = torch.empty(a.m, a.n, device=DEVICE, dtype=torch.bfloat16)
            return lambda i: run(at(a.q, i), at(a.w, i), a.sx, a.sw, out)

        return candidate

    def swapped(tokens: int, stages: int, block: int = 256) -> Callable[[Inputs], Call | None]:
        run = dec.make_gl_dec(tokens, block, stages, 64, 1, 0, 1, 1)

        def candidate(a: Inputs) -> Call | None:
            if a.m > tokens or (a.m * 4 < tokens and a.m > 2):
                return None
            out = torch.empty(a.m, a.n, device=DEVICE, dtype=torch.bfloat16)
            return lambda i: run(at(a.q, i), at(a.q, i), at(a.w, i), a.sx, a.sw, out)

        return candidate

    def vector(rows: int, warps: int, groups: int, quantized: bool) -> Callable[[Inputs], Call | None]:
        run = dec.make_gemv(rows, warps, 0, 1) if quantized else dec.make_gemv_t(rows, warps, groups, 1)

        def candidate(a: Inputs) -> Call | None:
            if a.m > 1 or (a.k <= 8192) != (rows == 8):
                return None
            out = torch.empty(a.m, a.n, device=DEVICE, dtype=torch.bfloat16)
            return lambda i: run(at(a.x, i), at(a.q, i), at(a.w, i), a.sx, a.sw, out)

        return candidate

    return {
        "given: probe 256": gemm(256, 4, 0), "given: probe 128": gemm(128, 6, 0), "given: probe 64": gemm(64, 8, 1),
        "given: probe swapped 8": swapped(8, 10), "given: probe swapped 16": swapped(16, 10),
        "given: probe swapped 64": swapped(64, 6), "given: probe swapped 128": swapped(128, 8, 128),
        "given: probe vector": vector(8, 4, 1, True), "given: probe vector, wide": vector(2, 16, 1, True),
        "bf16: probe vector": vector(8, 4, 2, False), "bf16: probe vector, wide": vector(2, 16, 2, False),
    }  # fmt: skip


def variants() -> dict[str, Callable[[Inputs], Call | None]]:
    """Our kernels at every setting that ``quantkit tune`` tries."""

    def with_config(config: tiles.Config) -> Callable[[Inputs], Call | None]:
        def candidate(a: Inputs) -> Call | None:
            if config not in tune.candidates(DEVICE, a.m, a.n, a.k):
                return None
            kernel: Any = kernel_of(config)
            tokens, sx = (a.x, None) if isinstance(config, tiles.Vector) else (a.q, a.sx)
            requests = [ProductRequest(at(tokens, i), sx, w, a.sw, torch.bfloat16) for i, w in enumerate(a.w)]
            return lambda i: kernel.launch(at(requests, i), config)

        return candidate

    every = dict.fromkeys(
        c
        for m, k in itertools.product((1, 8, 16, 32, 64, 128, 256, 4096), (4096, 14336))
        for c in tune.candidates(DEVICE, m, 4096, k)
    )
    found = {f"{'bf16' if isinstance(c, tiles.Vector) else 'given'}: {c}": with_config(c) for c in every}
    return found | {
        f"quantize: {w} warps": lambda a, w=w: lambda i: operators.quantize(at(a.x, i), warps=w) for w in (4, 8, 16, 32)
    }


def peers() -> dict[str, Callable[[Inputs], Call | None]]:
    """Libraries, those that are installed."""
    found: dict[str, Callable[[Inputs], Call | None]] = {}
    try:
        import bitsandbytes as bnb

        def bnb_with(threshold: float) -> Callable[[Inputs], Call | None]:
            def candidate(a: Inputs) -> Call | None:
                layers = []
                for w in a.w16[:4]:
                    layer = bnb.nn.Linear8bitLt(a.k, a.n, bias=False, has_fp16_weights=False, threshold=threshold)
                    layer.weight = bnb.nn.Int8Params(w.half(), requires_grad=False, has_fp16_weights=False)
                    layers.append(layer.to(DEVICE))
                return lambda i: at(layers, i)(at(a.x_outliers if threshold else a.x, i))

            return candidate

        found |= {f"bf16: bitsandbytes, threshold {t:g}": bnb_with(t) for t in (0.0, 6.0)}
    except ImportError as error:
        print("bitsandbytes:", error)
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        def torchao(a: Inputs) -> Call | None:
            if a.m <= 16:
                return None  # torch._int_mm, which it calls, takes more
            torch._dynamo.reset()  # every shape compiles the one forward() again, and Dynamo gives up after 8 of them
            layers = []
            for w in a.w16[:4]:
                layer = torch.nn.Sequential(torch.nn.Linear(a.k, a.n, bias=False, device=DEVICE, dtype=torch.bfloat16))
                layer[0].weight.data = w
                quantize_(layer, Int8DynamicActivationInt8WeightConfig())
                layers.append(torch.compile(layer, dynamic=False))
            return lambda i: at(layers, i)(at(a.x, i))

        found |= {"bf16: torchao, compiled": torchao}
    except ImportError as error:
        print("torchao:", error)
    try:
        from gemlite.helper import A8W8_int8_dynamic

        def gemlite(a: Inputs) -> Call | None:
            layers = []
            for w in a.w16[:4]:
                linear = torch.nn.Linear(a.k, a.n, bias=False, device=DEVICE, dtype=torch.bfloat16)
                linear.weight.data = w
                layers.append(A8W8_int8_dynamic(device="cuda", dtype=torch.bfloat16).from_linear(linear, del_orig=False))
            return lambda i: at(layers, i)(at(a.x, i))

        found |= {"bf16: gemlite": gemlite}
    except ImportError as error:
        print("gemlite:", error)
    return found


UNCAPTURABLE = {"bf16: bitsandbytes, threshold 6"}

CANDIDATES: dict[str, Callable[[Inputs], Call | None]] = {
    "given: quantkit": ours_given, "bf16: quantkit": ours, "quantize: quantkit": ours_quantize,
    "bf16: F.linear": bf16, "given: torch._int_mm": int_mm, "given: fp8 _scaled_mm": fp8,
}  # fmt: skip


def measure(
    a: Inputs, candidates: dict[str, Callable[[Inputs], Call | None]], rounds: int, hot: bool
) -> dict[str, dict[str, float]]:
    """Candidate -> cold (and hot) microseconds a call."""
    floor = max(2e-6, a.m * a.n * a.k / 700e12, a.n * a.k / 3e12)
    calls = max(a.copies, min(40, int(400e-6 / floor)))
    graphs: dict[tuple[str, str], Any] = {}
    kept = []  # what a call holds must live as long as its graph
    for name, make in candidates.items():
        try:
            call = make(a)
            if call is None:
                continue
            kept.append(call)
            prepare = Calls if name in UNCAPTURABLE else graph_of
            graphs[name, "cold"] = prepare(call, list(range(calls)))
            if hot:
                graphs[name, "hot"] = prepare(call, [0] * calls)
        except Exception as error:  # noqa: BLE001  a peer that cannot run this shape
            print(f"  {name}: {type(error).__name__}: {str(error)[:100]}", flush=True)
            torch.cuda.synchronize()
    out: dict[str, dict[str, float]] = {}
    for (name, kind), time in interleaved(graphs, rounds).items():
        out.setdefault(name, {})[kind] = round(time / calls * 1e6, 2)
    return out


def run_once(candidates: dict[str, Callable[[Inputs], Call | None]], args: argparse.Namespace) -> None:
    """Fill the caches on disk with one job's share of the kernels."""
    everything = list(itertools.product(args.shapes, args.tokens, candidates.values()))
    with torch.inference_mode():
        for shape, m, make in everything[args.compile :: args.jobs]:
            with contextlib.suppress(Exception):  # said later, when it is measured
                call = make(Inputs(m, *map(int, shape.split("x")), copies=1))
                _ = call and call(0)


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    a = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    graph = graph_of(lambda _: b.copy_(a), [0] * 4)
    return 8 * 2**30 / median(seconds(graph) for _ in range(9))


def read_bandwidth() -> float:
    """Bytes a second that a sum over memory reads: the ceiling of a product with one token."""
    a = torch.ones(2**29, dtype=torch.float32, device=DEVICE)
    graph = graph_of(lambda _: a.sum(), [0] * 4)
    return 4 * a.nbytes / median(seconds(graph) for _ in range(9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), help="N x K")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cutlass", type=Path, help="libcutlass_int8.so")
    parser.add_argument("--probe", type=Path, help="folder of the feasibility probe")
    parser.add_argument("--variants", action="store_true", help="our kernels at other settings")
    parser.add_argument("--peers", action="store_true", help="bitsandbytes, torchao, gemlite, those that are installed")
    parser.add_argument("--hot", action="store_true", help="one copy of the weight as well")
    parser.add_argument("--columns", nargs="*", type=int, default=[], help="outlier columns beside the INT8 product")
    parser.add_argument("--segments", nargs="*", type=int, default=[], choices=[2, 4, 8], help="of K, with scales of their own")
    parser.add_argument("--threshold", action="store_true", help="columns that reach 6 in the batch, 8 of them")
    parser.add_argument("--only", nargs="*", default=["*"], help="globs over the names of candidates")
    parser.add_argument("--name", default="gemm", help="of the result")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile kernels before the measurement")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)  # one of these processes
    args = parser.parse_args()
    candidates = dict(CANDIDATES)
    candidates |= cutlass(args.cutlass) if args.cutlass else {}
    candidates |= probe(args.probe) if args.probe else {}
    candidates |= variants() if args.variants else {}
    candidates |= peers() if args.peers else {}
    candidates |= {f"bf16: quantkit, {n} columns": ours_with_columns(n) for n in args.columns}
    candidates |= {f"given: quantkit, {n} segments": ours_in_segments(n) for n in args.segments}
    candidates |= {f"given: quantkit, {n} segments, padded": ours_in_segments(n, BLOCK) for n in args.segments}
    candidates |= {"bf16: quantkit, threshold 6": ours_with_threshold} if args.threshold else {}
    candidates = {name: c for name, c in candidates.items() if any(fnmatch(name, pattern) for pattern in args.only)}
    if args.compile is not None:
        run_once(candidates, args)
        return
    jobs = [
        subprocess.Popen([sys.executable, *sys.argv, "--compile", str(i)], stdout=subprocess.DEVNULL) for i in range(args.jobs)
    ]
    for job in jobs:
        job.wait()
    print("compiled", flush=True)
    facts = {"copy_bytes_per_s": copy_bandwidth(), "read_bytes_per_s": read_bandwidth()}
    print(facts, flush=True)
    rows = []
    with torch.inference_mode():
        for shape, m in itertools.product(args.shapes, args.tokens):
            n, k = map(int, shape.split("x"))
            times = measure(Inputs(m, n, k), candidates, args.rounds, args.hot)
            torch.cuda.empty_cache()
            rows.append({"m": m, "n": n, "k": k, "config": str(choose(DEVICE, m, n, k, tma=True)), "us": times})
            best = sorted(times, key=lambda name: times[name]["cold"])
            print(f"{m} {shape}: " + "; ".join(f"{name} {times[name]['cold']}" for name in best), flush=True)
            path = record(args.name, rows, **facts)  # each time: whoever interrupts keeps what there is
    print("written", path)


if __name__ == "__main__":
    main()

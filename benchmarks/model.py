"""A whole model of the shape of Llama-3-8B, random, on a GPU: bf16 beside INT8, eager and compiled.

    python benchmarks/model.py [--layers 32] [--rounds 5] [--prefill 1x2048 8x2048] [--decode 1 16 64]

Prefill is the decoder and the logits of the last token; decode is one token for each sequence, with a static cache of
``--context`` tokens that all take part, as one CUDA graph. "eager" runs PyTorch's operators one by one ("graphed" for decode:
the same in a CUDA graph); "compiled" is torch.compile of every block with fullgraph=True. A profile says where the time goes.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import record
from torch import Tensor, nn
from torch.nn import functional as F

import quantkit
from quantkit.ops.gpu.tune import interleaved

HIDDEN, INNER, HEADS, KV, VOCABULARY = 4096, 14336, 32, 8, 128256
HEAD = HIDDEN // HEADS


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions for ``x [B, heads, T, HEAD]``."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN, 1e-5), nn.RMSNorm(HIDDEN, 1e-5)
        self.q, self.o = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.k, self.v = nn.Linear(HIDDEN, KV * HEAD, bias=False), nn.Linear(HIDDEN, KV * HEAD, bias=False)
        self.gate, self.up = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any = None, at: Tensor | None = None) -> Tensor:
        b, t, _ = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).view(b, t, -1, HEAD).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is None or at is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:  # one token; heads that share keys stand in for the positions of a longer query
            keys, values = cache[0].index_copy_(2, at, k), cache[1].index_copy_(2, at, v)
            y = F.scaled_dot_product_attention(q.view(b, KV, HEADS // KV, HEAD), keys, values).view(b, HEADS, 1, HEAD)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, HIDDEN))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.RMSNorm(HIDDEN, 1e-5)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, caches: list[tuple[Tensor, Tensor]] | None = None, at: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        positions = torch.arange(tokens.shape[1], device=x.device) if at is None else at
        angles = positions[:, None] * 5e5 ** (-torch.arange(0, HEAD, 2, device=x.device) / HEAD)
        cos, sin = (f(angles).repeat(1, 2).to(x.dtype) for f in (torch.cos, torch.sin))
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, None if caches is None else caches[i], at)
        return self.head(self.norm(x[:, -1]))


def build(layers: int, device: torch.device) -> Model:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Model(layers)
    model = model.to(torch.bfloat16).to_empty(device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1) if "norm" in name else p.normal_(0, p.shape[-1] ** -0.5 if p.ndim > 1 else 1)
    return model.eval()


def caches_for(model: Model, batch: int, context: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every block, tensors of their own: compilers copy a whole tensor when a part is written."""

    def random() -> Tensor:
        return torch.randn(batch, KV, context, HEAD, device=model.head.weight.device).bfloat16()

    return [(random(), random()) for _ in model.blocks]


def graphed(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def wall(call: Callable[[], Any], rounds: int) -> float:
    """Median seconds on the clock, launches included."""
    call()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times)


def profile(graph: torch.cuda.CUDAGraph) -> dict[str, float]:
    """Kernel -> microseconds of one replay."""
    graph.replay()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        graph.replay()
        torch.cuda.synchronize()
    out: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.device_time_total:
            out[event.key[:90]] += event.device_time_total
    return dict(sorted(out.items(), key=lambda row: -row[1]))


def peak(call: Callable[[], Any]) -> int:
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefill", nargs="*", default=["1x2048", "8x2048"])
    parser.add_argument("--decode", nargs="*", type=int, default=[1, 16, 64])
    parser.add_argument("--name", default="model")
    args = parser.parse_args()
    device = torch.device("cuda")
    models: dict[str, Model] = {}
    facts: dict[str, Any] = {"layers": args.layers, "context": args.context, "memory": {}}
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for name in ("bf16", "quantkit"):
            before = torch.cuda.memory_allocated()
            model = build(args.layers, device)
            if name == "quantkit":
                start = time.perf_counter()
                model = quantkit.quantize(
                    model, "rtn", calibration=[torch.zeros(1, 8, dtype=torch.long, device=device)], progress=False
                )
                facts["quantize_s"] = time.perf_counter() - start
                gc.collect()
                torch.cuda.empty_cache()
            models[name] = model
            tokens = torch.randint(VOCABULARY, (1, 2048), device=device)
            model(tokens)  # packs the weights, compiles the kernels
            facts["memory"][name] = {
                "weights": torch.cuda.memory_allocated() - before, "prefill_peak": peak(lambda m=model, t=tokens: m(t)) - before
            }  # fmt: skip
            print(name, facts["memory"][name], facts.get("quantize_s"), flush=True)

        work = [("prefill", *map(int, p.split("x"))) for p in args.prefill] + [("decode", b, 1) for b in args.decode]
        for kind, batch, length in work:
            tokens = torch.randint(VOCABULARY, (batch, length), device=device)
            row: dict[str, Any] = {"kind": kind, "batch": batch, "length": length, "s": {}, "kernels_us": {}}
            graphs, kept = {}, []  # what a call reads must live as long as its graph
            for name, model in models.items():
                extra: tuple[Any, ...] = ()
                if kind == "decode":
                    extra = (caches_for(model, batch, args.context), torch.tensor([args.context - 1], device=device))
                call = lambda m=model, t=tokens, e=extra: m(t, *e)  # noqa: E731
                kept.append(call)
                row["s"][f"{name}, eager"] = wall(call, args.rounds)
                graphs[f"{name}, eager, graphed"] = graphed(call)
                torch.compiler.reset()
                for block in model.blocks:
                    block.compile(fullgraph=True, dynamic=False)
                graphs[f"{name}, compiled"] = graphed(call)
                for block in model.blocks:
                    block._compiled_call_impl = None
            row["s"] |= interleaved(graphs, args.rounds)
            try:
                row["kernels_us"] = {name: profile(graphs[name]) for name in graphs if "compiled" in name}
            except RuntimeError as error:  # a machine without the profiling library
                print("no profile:", error)
            rows.append(row)
            print(kind, batch, length, {n: f"{t * 1e3:.2f} ms" for n, t in row["s"].items()}, flush=True)
            del graphs, kept, call
            gc.collect()
            torch.cuda.empty_cache()
            path = record(args.name, rows, **facts)
    print("written", path)


if __name__ == "__main__":
    main()

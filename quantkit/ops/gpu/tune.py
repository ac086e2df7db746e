"""``quantkit tune``: time the settings of the kernels on this GPU for the layers of a model, and remember the best.

The kernels give the same bits at every setting, so tuning changes speed only.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from triton.runtime.errors import OutOfResources, PTXASError

from quantkit.core.errors import BackendError
from quantkit.core.operand import Operand
from quantkit.model.modules import is_linear, weight_of
from quantkit.ops.gpu.devices import capability, tunable
from quantkit.ops.gpu.launch import forget
from quantkit.ops.gpu.layout import padded
from quantkit.ops.gpu.product import kernels, tiles, tuned
from quantkit.ops.gpu.product.request import ProductRequest
from quantkit.ops.gpu.product.tiles import Config, Decode, Gemm, Tile, Vector
from quantkit.ops.gpu.service import service

TOKENS = (1, 2, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
COLD_BYTES = 200 * 2**20  # four times the L2 of an H100
BETTER = 0.98  # of the built-in choice's time: less of a gain is noise
Call = Callable[[int], Any]
"""Runs on the copy of the operands with this index."""


def candidates(device: torch.device, m: int, n: int, k: int) -> list[Config]:
    """Settings worth a try, the built-in one first."""
    if m == 1:
        some = ((8, 2, 4), (8, 1, 4), (4, 2, 4), (4, 2, 8), (4, 1, 8), (2, 2, 8), (2, 2, 16), (4, 2, 16), (8, 2, 8), (16, 1, 8))
        return list(dict.fromkeys([tiles.vector(k), *(Vector(*v) for v in some)]))
    arch = capability(device)
    found: list[Config] = []
    if arch == 90 and service.runs(kernels.HOPPER.name) and k % 16 == 0 and n % 8 == 0:
        found = [tiles.hopper(m, n)]
        rings = {8: (12, 24), 16: (10, 20), 32: (8, 16), 64: (6, 12), 128: (4, 8)}  # stages of 256 and of 128 channels
        for width in [w for w in rings if m <= 2 * w][:2]:  # all tokens in one group, or in two
            found += [Decode(width, rings[width][0], 256), Decode(width, rings[width][1], 128)]
        if m > 64:
            columns = (32, 64, 128, 256) if m <= 512 else (128, 256)
            depth = {32: 10, 64: 8, 128: 6, 256: 4}
            found += [Gemm(c, depth[c], g, e) for c, g, e in itertools.product(columns, (8, 16), (False, True))]
    else:
        found = [tiles.portable(arch, m, n)]
        height = next((h for h in (16, 32, 64, 128) if m <= h), 128)
        found += [
            Tile(height, wide, deep, 8, warps, stages)
            for wide in (32, 64, 128, 256)
            for deep, warps, stages in itertools.product((64, 128), (4, 8), (3, 5))
            if height * wide <= 64 * 128 * warps // 2
        ]
    return list(dict.fromkeys(found))


def graph_of(call: Call, indices: Sequence[int]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call for each index."""
    for i in indices[:2]:
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in indices:
            call(i)
    return graph


def seconds(graph: torch.cuda.CUDAGraph) -> float:
    """One replay, timed on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(graphs: dict[Any, torch.cuda.CUDAGraph], rounds: int) -> dict[Any, float]:
    """Median seconds of each graph after one round to warm up, replayed in turn.

    The order is drawn anew for every round: at its power limit a GPU clocks down after the hungrier neighbour.
    """
    times: dict[Any, list[float]] = {key: [] for key in graphs}
    order, draw = list(graphs), random.Random(0)
    for _ in range(rounds + 1):
        draw.shuffle(order)
        for key in order:
            times[key].append(seconds(graphs[key]))
    return {key: median(values[1:]) for key, values in times.items()}


class Operands:
    """Random ones of a shape, in as many copies as it takes to leave the cache."""

    def __init__(self, device: torch.device, m: int, n: int, k: int) -> None:
        self.copies = max(2, min(64, -(-COLD_BYTES // (n * k))))
        self.x = torch.randn(m, k, device=device, dtype=torch.float32).bfloat16()
        self.q = self._codes(m, k)
        self.w = [self._codes(n, k) for _ in range(self.copies)]
        self.sx, self.sw = (
            torch.rand(m, 1, device=device, dtype=torch.float32) / k,
            torch.rand(n, device=device, dtype=torch.float32) / 127,
        )

    def _codes(self, *shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, device=self.x.device, dtype=torch.int8)

    def call(self, config: Config) -> Call:
        """The product at this setting."""
        kernel: Any = kernels.kernel_of(config)
        q, sx = (self.x, None) if isinstance(config, Vector) else (self.q, self.sx)
        requests = [ProductRequest(q, sx, w, self.sw, torch.bfloat16) for w in self.w]
        return lambda i: kernel.launch(requests[i % self.copies], config)


def fastest(device: torch.device, m: int, n: int, k: int, rounds: int = 7) -> tuple[Config, dict[Config, float]]:
    """The setting to use, and the seconds a call of every one that runs here; the weight comes from memory, not from L2."""
    operands = Operands(device, m, n, k)
    calls = max(operands.copies, min(40, int(400e-6 / max(2e-6, m * n * k / 700e12, n * k / 3e12))))
    graphs = {}
    for config in candidates(device, m, n, k):
        try:
            graphs[config] = graph_of(operands.call(config), range(calls))
        except (OutOfResources, PTXASError):  # too large a tile for this card
            torch.cuda.synchronize()
    if not graphs:
        raise BackendError(f"no kernel runs [{m}, {k}] x [{n}, {k}] on {torch.cuda.get_device_name(device)}")
    times = {config: t / calls for config, t in interleaved(graphs, rounds).items()}
    first = next(iter(times))
    best = min(times, key=lambda config: times[config])
    return (best if times[best] < BETTER * times[first] else first), times


def shapes_of(model: nn.Module) -> list[tuple[int, int]]:
    """(N, K) of the operands that modules hold, or of linears that would be INT8, each once; all may be on the meta device."""
    embeddings: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = embeddings()
    operands = [getattr(m, "operand", None) for m in model.modules()]
    found = {(operand.out_features, operand.in_features) for operand in operands if isinstance(operand, Operand)}
    return sorted(found or {tuple(weight_of(m).shape) for m in model.modules() if is_linear(m) and m is not head})


def tune(
    shapes: Iterable[tuple[int, int]],
    tokens: Sequence[int] = TOKENS,
    device: str | torch.device = "cuda",
    *,
    path: Path | None = None,
    progress: bool = True,
) -> Path:
    """Find the fastest kernel settings for weights of these shapes and write them where this GPU's table is looked up.

    Args:
        shapes: (N, K): output and input channels.
        tokens: numbers of tokens to tune for; a size between two of them uses the choice of the larger.
        device: the GPU.
        path: the table; left out, :func:`quantkit.ops.gpu.product.tuned.cache_path`. Shapes that it holds already stay.

    Raises:
        BackendError: no usable GPU, or the file cannot be written.
    """
    device = tunable(device)
    path = path or tuned.cache_path(device)
    table = _read(path)
    with torch.cuda.device(device), torch.inference_mode():
        work = list(itertools.product([(n, padded(k)) for n, k in shapes], tokens))
        for (n, k), m in tqdm(work, desc="tuning", disable=not progress):
            config, _ = fastest(device, m, n, k)
            table.setdefault(f"{n}x{k}", {})[str(m)] = tuned.as_json(config)
            _write(path, table)  # after each: whoever interrupts keeps what there is
    tuned.tuned.cache_clear()
    forget()
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        table: dict[str, Any] = json.loads(path.read_text())
        tuned.parse(table)
        return table
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(path: Path, table: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(table, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        raise BackendError(f"cannot write {path} ({error}): name another with --output or QUANTKIT_CACHE") from error


def parse_shapes(shapes: Iterable[str]) -> Iterator[tuple[int, int]]:
    """``"4096x14336"`` -> (4096, 14336): output by input channels."""
    for shape in shapes:
        try:
            n, k = map(int, shape.lower().split("x"))
        except ValueError:
            raise BackendError(f"shape {shape!r} is not OUTPUTxINPUT channels, as in 4096x14336") from None
        if min(n, k) < 1:
            raise BackendError(f"shape {shape!r} has no channels")
        yield n, k

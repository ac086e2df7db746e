"""What quantizing activations costs on a GPU, and what a rotation, a pre-scale, an order of channels or a norm adds to it.

    python benchmarks/quantize.py [--rows 16 4096 8192] [--channels 4096 8192 14336] [--rounds 15]

CUDA graphs over inputs beyond the L2 cache, replayed in turn in an order drawn for every round; medians. bf16 input.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import torch
from common import record
from torch import Tensor

from quantkit.core.groups import shares
from quantkit.core.weights import quantize_weight
from quantkit.ops.gpu import operators
from quantkit.ops.gpu.layout import BLOCK
from quantkit.ops.gpu.packing import narrow, places_of
from quantkit.ops.gpu.tune import COLD_BYTES, graph_of, interleaved

DEVICE = torch.device("cuda")


def forms(k: int) -> dict[str, dict[str, Any]]:
    """Name -> arguments of ``quantize``."""
    pre, gain = torch.rand(k, device=DEVICE) + 0.5, torch.rand(k, device=DEVICE).bfloat16()
    norm: dict[str, Any] = {"source": "rms", "gain": gain, "eps": 1e-6}
    order = torch.randperm(k, device=DEVICE)

    def clustered(groups: tuple[int, ...]) -> dict[str, Any]:
        """As a layer packs clusters."""
        _, clusters, places = places_of(groups, BLOCK, order, DEVICE)
        gathered = torch.full((16 * len(clusters),), -1, device=DEVICE).index_copy_(0, places, order)
        of_each = shares(*quantize_weight(torch.randn(64, k, device=DEVICE), groups=groups), groups, symmetric=True)
        return {"permutation": narrow(gathered, k), "clusters": clusters, "shares": of_each, "align": BLOCK}

    ordered = {"permutation": narrow(order, k)}
    eight, ragged = clustered((k // 8,) * 8), clustered((20, *(k // 8,) * 6, k - 20 - k // 8 * 6))
    return {
        "quantize": {},
        "rotate 32": {"rotation": 32}, "rotate 64": {"rotation": 64}, "rotate 128": {"rotation": 128},
        "pre-scale": {"pre_scale": pre}, "pre-scale, rotate 64": {"pre_scale": pre, "rotation": 64},
        "order": ordered,
        "RMSNorm": norm, "RMSNorm, rotate 64": norm | {"rotation": 64}, "RMSNorm, order": norm | ordered,
        "order, 8 clusters": eight, "RMSNorm, order, 8 clusters": norm | eight,
        "RMSNorm, order, 8 clusters, the first padded": norm | ragged,
        "residual, RMSNorm, order": norm | ordered | {"x2": True},
        "residual, RMSNorm": norm | {"x2": True}, "residual, RMSNorm, rotate 64": norm | {"x2": True, "rotation": 64},
        "SiLU gate": {"source": "silu", "x2": True}, "SiLU gate, rotate 64": {"source": "silu", "x2": True, "rotation": 64},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", type=int, default=[16, 1024, 4096, 8192])
    parser.add_argument("--channels", nargs="*", type=int, default=[4096, 8192, 14336])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", metavar="PATTERN", default=["*"], help="forms, * and ? as in a shell")
    parser.add_argument("--name", default="quantize")
    args = parser.parse_args()
    rows = []
    for k, m in itertools.product(args.channels, args.rows):
        copies = max(2, min(64, -(-COLD_BYTES // (2 * m * k))))
        x: list[Tensor] = [torch.randn(m, k, device=DEVICE).bfloat16() for _ in range(copies)]
        calls = max(copies, 8)

        def call(options: dict[str, Any], x: list[Tensor] = x, n: int = copies) -> Callable[[int], Any]:
            two = options.get("x2")
            return lambda i: operators.quantize(x[i % n], **options | ({"x2": x[(i + 1) % n]} if two else {}))

        graphs = {
            name: graph_of(call(options), list(range(calls)))
            for name, options in forms(k).items()
            if any(fnmatch(name, p) for p in args.only)
        }
        times = {name: round(s / calls * 1e6, 2) for name, s in interleaved(graphs, args.rounds).items()}
        rows.append({"m": m, "k": k, "us": times})
        print(m, k, times, flush=True)
        del graphs, x
        torch.cuda.empty_cache()
    print("written", record(args.name, rows))


if __name__ == "__main__":
    main()

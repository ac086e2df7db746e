"""What a call of one layer costs the host in eager mode, in microseconds: F.linear and INT8, turn by turn in one run.

    python benchmarks/host.py [--rows 1 16 256 2048] [--shapes 4096x4096 14336x4096 4096x14336] [--rounds 9]

A call is the time until it returns, the kernels still under way; between batches of calls the GPU is waited for. bf16. "x" is
the median of INT8 against that of F.linear. Every method runs on the first shape, plain INT8 on all.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, record, spread
from torch import nn
from torch.nn import functional as F

import quantkit
from quantkit import LLMInt8
from quantkit.ops.gpu import tune

METHODS: dict[str, tuple[Any, str]] = {
    "INT8": ("rtn", "w8a8"), "LLM.int8(), columns": (LLMInt8(columns=64), "w8a8"),
    "LLM.int8(), threshold": (LLMInt8(threshold=6.0), "w8a8"), "rotation": ("hadamard", "w8a8"),
    "RPTQ": ("rptq", "w8a8"), "static": ("rtn", "w8a8-static"), "asymmetric": ("rtn", "w8a8-asym"),
}  # fmt: skip
CALLS = 100


def layer_of(linear: nn.Linear, method: Any, scheme: str) -> nn.Module:
    batch = torch.randn(64, linear.in_features, device="cuda").bfloat16()
    model = nn.Sequential(copy.deepcopy(linear))
    quantkit.quantize(model, method, scheme=scheme, calibration=[batch], targets=["0"], verify=False, progress=False)
    return model[0]


def host(call: Callable[[], Any]) -> float:
    """Microseconds until a call returns."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 16, 256, 2048])
    parser.add_argument("--shapes", nargs="*", default=["4096x4096", "14336x4096", "4096x14336"], help="outputs x inputs")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for n, k in tune.parse_shapes(args.shapes):
            linear = nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
            some = METHODS if not rows else {"INT8": METHODS["INT8"]}
            layers = {name: layer_of(linear, *how) for name, how in some.items()}
            for m in args.rows:
                x = torch.randn(m, k, device="cuda").bfloat16()
                calls: dict[str, Callable[[], Any]] = {
                    "F.linear": lambda x=x, w=linear.weight: F.linear(x, w), "nn.Linear": lambda x=x, f=linear: f(x)
                }  # fmt: skip
                calls |= {name: lambda x=x, layer=layer: layer(x) for name, layer in layers.items()}
                for call in calls.values():
                    call(), call()
                times = interleaved({name: lambda c=call: host(c) for name, call in calls.items()}, args.rounds)
                row: dict[str, Any] = {"m": m, "n": n, "k": k, "us": {name: spread(values) for name, values in times.items()}}
                row["x"] = {name: row["us"][name]["median"] / row["us"]["F.linear"]["median"] for name in layers}
                rows.append(row)
                print(m, n, k, {name: round(v["median"], 1) for name, v in row["us"].items()}, flush=True)
    print("written", record("host", rows))


if __name__ == "__main__":
    main()

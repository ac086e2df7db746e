"""Memory that a checkpoint takes while it is opened and exported, for random INT8 weights of about 4 GB.

    python benchmarks/checkpoint.py [--layers 17] [--shard 1.0]

Every step runs in a process of its own; its peak is all the memory that the process ever held (VmHWM), mapped files included.
It must stay below the largest shard plus 1 GiB; exits with 1 if it does not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import record

import quantkit
from quantkit.core.report import LayerRecord, Report, attach
from quantkit.layers.linear import W8A8Linear
from quantkit.model.modules import linears_of, replace_module

GIB = 2**30


def write(folder: Path, layers: int, shard: int) -> None:
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config)
    report = Report(["rtn"], "w8a8", 0, "not needed")
    for name, linear in linears_of(model).items():
        if name == "lm_head":
            continue
        layer = W8A8Linear(linear.in_features, linear.out_features, bias=False)  # type: ignore[arg-type]
        layer.weight.random_(-127, 128)
        layer.weight_scale.uniform_(1e-4, 1e-3)
        replace_module(model, name, layer)
        report.layers.append(LayerRecord(name, "int8"))
    empty = {n: torch.randn(p.shape, dtype=torch.bfloat16) for n, p in model.named_parameters() if p.is_meta}
    model.load_state_dict(empty, strict=False, assign=True)
    attach(model, report)
    quantkit.save(model.eval(), folder, shard_bytes=shard)


def step(what: str, source: str, target: str, shard: int) -> dict[str, Any]:
    start = time.perf_counter()
    if what == "export":
        quantkit.export(source, target, shard_bytes=shard)
    else:
        model = quantkit.load(source)
        assert any(isinstance(m, W8A8Linear) for m in model.modules())
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    return {"peak": peak, "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--shard", type=float, default=1.0, help="GiB")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    shard = int(args.shard * GIB)
    if args.step and args.step[0] == "write":
        write(Path(args.step[1]), args.layers, shard)
        return
    if args.step:
        print(json.dumps(step(*args.step, shard)))
        return
    rows, options = [], ["--layers", str(args.layers), "--shard", str(args.shard)]
    with tempfile.TemporaryDirectory() as place:
        native, exported = f"{place}/native", f"{place}/exported"
        subprocess.run([sys.executable, __file__, *options, "--step", "write", native, ""], check=True)
        for name, *arguments in (
            ("load, quantkit's format", "load", native, ""),
            ("export", "export", native, exported),
            ("load, compressed-tensors", "load", exported, ""),
        ):
            command = [sys.executable, __file__, *options, "--step", *arguments]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            files = [f.stat().st_size for f in Path(arguments[1]).glob("*.safetensors")]
            row = {"step": name, "bytes": sum(files), "largest_shard": max(files), **json.loads(done.stdout.splitlines()[-1])}
            row["within"] = row["peak"] <= row["largest_shard"] + GIB
            rows.append(row)
            print(row, flush=True)
    print("saved", record("checkpoint", rows))
    sys.exit(not all(row["within"] for row in rows))


if __name__ == "__main__":
    main()

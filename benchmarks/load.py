"""Memory that from_pretrained needs at its peak while it quantizes, for a random checkpoint in the shape of Llama-3.2-1B.

    python benchmarks/load.py [--device cuda] [--layers 16] [--name load]

Every variant loads in a process of its own. On a CPU the peak is that of anonymous memory (what the process itself takes: the
checkpoint is mapped, and its pages belong to the page cache), on a GPU ``torch.cuda.max_memory_allocated``; both over what the
process had before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import record

from quantkit.layers.linear import W8A8Linear

VARIANTS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "quantkit, llm_int8": {"method": "llm_int8"},
    "quantkit, rtn": {"method": "rtn"},
}


def write(folder: Path, layers: int, device: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="1GB")


class Anonymous(threading.Thread):
    """The most anonymous memory of this process while it runs, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = self.now()
        self.running = True

    def now(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

    def run(self) -> None:
        while self.running:
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)


def load(folder: str, variant: str, device: str) -> dict[str, float]:
    """What one variant takes."""
    from transformers import AutoModelForCausalLM

    import quantkit

    options = VARIANTS[variant]
    config = None if options is None else quantkit.QuantKitConfig(**options)
    torch.zeros(1, device=device)
    watch = Anonymous()
    watch.start()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device, quantization_config=config)
    seconds = time.perf_counter() - start
    watch.running = False
    watch.join()
    size = sum(t.nbytes for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else watch.peak - watch.before
    largest = max(2 * m.weight.numel() for m in model.modules() if isinstance(m, (torch.nn.Linear, W8A8Linear)))
    return {"size": size, "peak": peak, "largest_layer": largest, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--name", default="load", help="of the result")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # folder and variant, in a process of its own
    args = parser.parse_args()
    if args.one:
        print(json.dumps(load(*args.one, args.device)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.layers, args.device)
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--device", args.device, "--one", folder, variant]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append({"variant": variant} | json.loads(done.splitlines()[-1]))
            print({k: round(v / 2**20) if isinstance(v, int) else v for k, v in rows[-1].items()}, flush=True)
    print("written", record(args.name, rows))


if __name__ == "__main__":
    main()

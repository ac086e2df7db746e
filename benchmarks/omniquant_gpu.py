"""How long OmniQuant takes for one block in the shape of Llama-3-8B, and how much memory: 128 x 2048 random hidden states.

    python benchmarks/omniquant_gpu.py [--steps 100] [--name omniquant_gpu]

Runs the calibrator's own code on one random block in bfloat16: hidden states in memory of the host, the paper's 20 epochs of
which only ``--steps`` steps are taken and timed. What a whole block and the 32 blocks of the model would take follows from the
seconds per step and the seconds per sample of the passes between blocks; measured and extrapolated figures are told apart.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import record
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import quantkit
from quantkit import SmoothQuant
from quantkit.calibration.blocks import HiddenStates, record_calls
from quantkit.calibration.observe import observe
from quantkit.calibration.statistics import Range, TokenSample
from quantkit.calibrators.base import SiteView, View
from quantkit.calibrators.learned.layers import Block
from quantkit.calibrators.learned.omniquant import HELD, OmniQuant, distance, fast_products
from quantkit.core.scheme import Scheme
from quantkit.core.transform import Transform

BLOCKS, EPOCHS = 32, 20


class Model(nn.Module):
    """One block, called as in the model."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([LlamaDecoderLayer(config, 0)])
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return self.layers[0](x, position_ids=positions, position_embeddings=self.rotary(x, positions))


class Clock:
    """Seconds on the wall once the device is done."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.start = self.now()

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self) -> float:
        last, self.start = self.start, self.now()
        return self.start - last


def hidden_states(count: int, length: int, width: int, seed: int) -> list[Tensor]:
    """Normal, with a few channels that stick out, in memory of the host."""
    random = torch.Generator().manual_seed(seed)
    loud = torch.ones(width)
    loud[torch.randperm(width, generator=random)[:8]] = 20.0
    return [(torch.randn(1, length, width, generator=random) * loud).bfloat16() for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=100, help="of the 20 epochs, to be timed after 5 that are not")
    parser.add_argument("--passes", type=int, default=16, help="samples of the passes between blocks to be timed")
    parser.add_argument("--scheme", default="w4a4")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--name", default="omniquant_gpu")
    args = parser.parse_args()
    device, scheme = args.device, Scheme.parse(args.scheme)

    config = LlamaConfig(
        hidden_size=args.width, intermediate_size=args.inner, num_attention_heads=args.width // 128,
        num_key_value_heads=max(1, args.width // 512), num_hidden_layers=1, vocab_size=8, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Model(config).to(device, torch.bfloat16).eval()
    samples = hidden_states(args.samples, args.length, args.width, 0)
    random = torch.Generator().manual_seed(0)
    clock = Clock(device)

    # what quantize() does before any method: sites, statistics, SmoothQuant's start
    found = quantkit.discover(model, samples[0][:, :16].to(device))
    sites = [s for s in found.sites if all(name not in found.kept for name in s.linears)]
    few = [s.to(device) for s in samples[:4]]
    statistics = observe(model, few, sites, [Range, TokenSample], progress=False)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    views = [SiteView(s, scheme, False, Transform(), {n: linears[n] for n in s.linears}, statistics[s.name]) for s in sites]
    start = SmoothQuant(0.5).plan(View(model, views, lambda: few, 0, lambda items, _: items))
    for view in views:
        view.transform = start.transforms[view.name]
    before = clock.lap()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    inputs = HiddenStates("cpu", torch.device(device))
    target = HiddenStates("cpu", torch.device(device))
    _, calls = record_calls(model, ("layers.0",), [samples[0].to(device)], "cpu")
    way = calls[0][0]
    for i, sample in enumerate(samples):
        inputs[i] = sample
    block = Block(model.layers[0], "layers.0", views, clips=True)
    setup = clock.lap()
    with torch.no_grad():
        for i in range(args.samples):
            target[i] = way.run(block.float, block.cast(inputs[i])).to(torch.bfloat16)
            if i + 1 == args.passes:
                per_float = clock.lap() / args.passes
    clock.lap()

    options = OmniQuant(samples=args.samples, epochs=EPOCHS)
    held = list(range(HELD - 1, args.samples, HELD))
    train = [i for i in range(args.samples) if i not in held]
    steps = EPOCHS * len(train)

    def loss(i: int) -> Tensor:
        return distance(way.run(block.quantized, block.cast(inputs[i])), block.cast(target[i]))

    def judge() -> float:
        with torch.no_grad(), block.fixed():
            return float(torch.stack([loss(i) for i in held]).mean())

    judge()
    compilation = clock.lap()  # of the kernels that round rows, once for all blocks
    error_start = judge()
    per_judgement = clock.lap()
    block.search_clips()
    search = clock.lap()
    error_search = judge()
    scales, clips = block.parameters()
    optimizer = torch.optim.AdamW(
        [{"params": scales, "lr": options.scale_lr}, {"params": clips, "lr": options.clip_lr}], weight_decay=0.0
    )
    clock.lap()
    with fast_products(torch.device(device)):
        for step in range(args.steps + 5):
            if step == 5:
                clock.lap()
            optimizer.zero_grad(set_to_none=True)
            loss(train[int(torch.randint(len(train), (), generator=random))]).backward()
            optimizer.step()
            block.keep_in_range()
    per_step = clock.lap() / args.steps
    error_end = judge()
    clock.lap()
    with torch.no_grad(), block.fixed():
        for i in range(args.passes):
            way.run(block.quantized, block.cast(inputs[i])).to(torch.bfloat16).cpu()
    per_quantized = clock.lap() / args.passes

    learning = steps * per_step
    passing = args.samples * (per_float + per_quantized)
    judging = (EPOCHS + 2) * per_judgement
    whole = setup + passing + judging + search + learning
    row: dict[str, Any] = {
        "block": {"width": args.width, "inner": args.inner, "parameters": sum(p.numel() for p in model.layers.parameters())},
        "samples": args.samples, "length": args.length, "epochs": EPOCHS, "scheme": scheme.name,
        "measured": {
            "seconds": {
                "discovery, statistics of 4 samples and SmoothQuant": round(before, 2), "copies of the block": round(setup, 2),
                "first judgement, with compilation": round(compilation, 2),
                "one step": round(per_step, 4), "float pass, one sample": round(per_float, 4),
                "quantized pass, one sample": round(per_quantized, 4), "judgement on held-out samples": round(per_judgement, 2),
                "search of clippings": round(search, 2),
            },
            "steps": args.steps,
            "peak GPU memory, GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else None,
            "held-out error": {"start": error_start, "search": error_search, f"{args.steps + 5} steps": error_end},
        },
        "extrapolated": {
            "steps of a block": steps, "block, seconds": round(whole, 1), "learning of a block, seconds": round(learning, 1),
            f"{BLOCKS} blocks, minutes": round((BLOCKS * whole + compilation) / 60, 1),
            "share of learning": round(learning / whole, 3),
        },
    }  # fmt: skip
    print(row)
    print("written", record(args.name, [row]))


if __name__ == "__main__":
    main()

"""A language model of transformers of the shape of Llama-3-8B, random, on a GPU: bf16 beside INT8, as users call it.

    python benchmarks/generate.py [--layers 32] [--rounds 3] [--batches 1 16 64] [--contexts 64 1024] [--new 64]
        [--methods rtn hadamard] [--no-compiled] [--name generate]

"eager" is transformers as it is, "norms" the same behind quantkit.fuse_norms; "compiled" has its static cache, which it
compiles; "captured" is quantkit.capture_decoding. Prefill is a forward of so many tokens in eager mode. Decode is generate():
tokens a second of all sequences, the first token of each left out; "ready" is the time of the first call, compilers and
captures included, less that of a later one. Candidates take turns in every round. "quantize" says how long it took to quantize
the model without data.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, record, spread
from transformers import LlamaConfig, LlamaForCausalLM

import quantkit

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}  # fmt: skip


def build(layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE, num_hidden_layers=layers, tie_word_embeddings=False, bos_token_id=1, eos_token_id=None, pad_token_id=0
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cuda")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1) if "norm" in name else p.normal_(0, p.shape[-1] ** -0.5 if "embed" not in name else 1)
        for module in model.modules():  # buffers that are no part of a state
            if hasattr(module, "inv_freq"):
                fresh = type(module)(config).to("cuda")
                module.inv_freq, module.original_inv_freq = fresh.inv_freq, fresh.original_inv_freq
    model.generation_config.eos_token_id = None
    return model.eval()


def with_norms(model: Any) -> Any:
    """Another model with the same tensors, whose norms are one kernel each."""
    held = [*model.parameters(), *model.buffers()]
    return quantkit.fuse_norms(copy.deepcopy(model, {id(tensor): tensor for tensor in held}))


class Clock:
    """A streamer that keeps the time of every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode(model: Any, ids: torch.Tensor, new: int, **options: Any) -> float:
    """Seconds a step."""
    clock = Clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        streamer=clock,
        **options,
    )
    return (clock.times[-1] - clock.times[1]) / (len(clock.times) - 2)


def wall(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16, 64])
    parser.add_argument("--contexts", nargs="*", type=int, default=[64, 1024])
    parser.add_argument("--prefill", nargs="*", default=["1x128", "1x2048"])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--methods", nargs="*", default=["rtn"])
    parser.add_argument("--no-compiled", action="store_true")
    parser.add_argument("--name", default="generate")
    args = parser.parse_args()
    models: dict[str, Any] = {"bf16": build(args.layers)}
    facts: dict[str, Any] = {"layers": args.layers, "new": args.new, "quantize": {}}
    rows: list[dict[str, Any]] = []
    for method in args.methods:
        model = build(args.layers)
        facts["quantize"][method] = wall(lambda m=model, how=method: quantkit.quantize(m, how, progress=False))
        print("quantize", method, facts["quantize"][method], flush=True)
        models[f"INT8 {method}"] = model
        gc.collect()
        torch.cuda.empty_cache()
    eager = {**models, **{f"{name}, norms": with_norms(model) for name, model in models.items()}}
    with torch.no_grad():
        for size in args.prefill:
            ids = torch.randint(5, 1000, tuple(map(int, size.split("x"))), device="cuda")
            calls = {name: lambda m=model, i=ids: m(i, use_cache=False, logits_to_keep=1) for name, model in eager.items()}
            for call in calls.values():
                call(), call()
            times = interleaved({name: lambda c=call: wall(c) for name, call in calls.items()}, 3 * args.rounds)
            rows.append({"kind": "prefill", "size": size, "s": {name: spread(values) for name, values in times.items()}})
            print("prefill", size, {name: f"{v['median'] * 1e3:.1f} ms" for name, v in rows[-1]["s"].items()}, flush=True)
    for batch in args.batches:
        for context in args.contexts:
            ids = torch.randint(5, 1000, (batch, context), device="cuda")
            steps: dict[str, Callable[[], float]] = {}
            row: dict[str, Any] = {"kind": "decode", "batch": batch, "context": context, "ready_s": {}, "s": {}}
            torch.compiler.reset()
            for name, model in eager.items():
                few = min(args.new, 16)
                steps[f"{name}, eager"] = lambda m=model, i=ids, n=few: min(decode(m, i, n) for _ in range(2))
            for name, model in models.items():

                def captured(m: Any = model, i: torch.Tensor = ids) -> float:
                    quantkit.capture_decoding(m)
                    decode(m, i, 4)
                    seconds = decode(m, i, args.new)
                    quantkit.release_decoding(m)
                    return seconds

                steps[f"{name}, captured"] = captured
                start = time.perf_counter()
                quantkit.capture_decoding(model)
                decode(model, ids, args.new)
                first = time.perf_counter() - start
                row["ready_s"][f"{name}, captured"] = first - wall(lambda m=model: decode(m, ids, args.new))  # noqa: B023
                quantkit.release_decoding(model)
            if not args.no_compiled:
                model = models["bf16"]
                steps["bf16, compiled"] = lambda m=model, i=ids: decode(m, i, args.new, cache_implementation="static")
                first = wall(steps["bf16, compiled"])
                row["ready_s"]["bf16, compiled"] = first - wall(steps["bf16, compiled"])
            times = interleaved(steps, args.rounds)
            row["s"] = {name: spread(values) for name, values in times.items()}
            row["tokens_per_s"] = {name: batch / v["median"] for name, v in row["s"].items()}
            rows.append(row)
            print(
                "decode", batch, context, {n: round(t, 1) for n, t in row["tokens_per_s"].items()}, row["ready_s"], flush=True
            )
            record(args.name, rows, **facts)
    print("written", record(args.name, rows, **facts))


if __name__ == "__main__":
    main()

"""CPU speed of SmolLM2: quantkit beside fp32, bf16, torch.ao dynamic quantization and torchao, interleaved in one run.

    python benchmarks/cpu.py [--rounds 7] [--no-compile] [--rotation | --clusters]

Prefill is 1 x 512 tokens through the decoder without the head; decode is one token at a time with a cache, head included.
Every peer quantizes the same linears (the decoder's). Run it with nothing else on the machine. --rotation measures what a
Hadamard rotation costs instead: in the pass that quantizes, in single layers, and in the model, each beside itself without;
--clusters what clusters of channels cost: their borders, in C and by PyTorch's operators, and single layers.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, record, spread
from torch import nn

import quantkit
from quantkit.integrations.transformers.models import SMOLLM2, load_float
from quantkit.ops.cpu import backend as cpu
from quantkit.ops.cpu.native import library
from quantkit.ops.reference import group_sum

PROMPT, NEW, PREFILL = 64, 16, 512


def decoder_linears(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name]


def torch_ao(model: nn.Module) -> nn.Module:
    from torch.ao.quantization import default_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_dynamic(model, dict.fromkeys(decoder_linears(model), default_dynamic_qconfig))


def torchao(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    wanted = set(decoder_linears(model))
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in wanted)
    return model


def ours(model: nn.Module) -> nn.Module:
    return quantkit.quantize(model, "rtn")  # smoothing is folded away: the arithmetic is the same


CANDIDATES: dict[str, tuple[torch.dtype, Callable[[nn.Module], nn.Module]]] = {
    "fp32": (torch.float32, lambda m: m),
    "bf16": (torch.bfloat16, lambda m: m),
    "torch.ao dynamic": (torch.float32, torch_ao),
    "torchao int8 dynamic": (torch.float32, torchao),
    "torchao int8 dynamic, bf16": (torch.bfloat16, torchao),
    "quantkit": (torch.float32, ours),
    "quantkit, bf16": (torch.bfloat16, ours),
}


def prefill(model: Any, ids: torch.Tensor) -> Callable[[], float]:
    body = model.model

    def run() -> float:
        start = time.perf_counter()
        body(input_ids=ids, use_cache=False)
        return time.perf_counter() - start

    return run


def decode(model: Any, ids: torch.Tensor, forward: Callable[..., Any]) -> Callable[[], float]:
    """Seconds per token for NEW tokens after a prompt, with the cache that suits the forward."""
    from transformers import StaticCache

    def run() -> float:
        cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
        token = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for step in range(NEW):
            position = torch.tensor([[PROMPT + step]])
            token = (
                forward(input_ids=token, past_key_values=cache, position_ids=position, use_cache=True).logits[:, -1:].argmax(-1)
            )
        return (time.perf_counter() - start) / NEW

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="leave the torch.compile rows out")
    parser.add_argument("--rotation", action="store_true", help="the cost of a rotation in place of the table")
    parser.add_argument("--clusters", action="store_true", help="the cost of clusters in place of the table")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.clusters:
        with torch.inference_mode():
            clusters(args.rounds)
        return
    base, _ = load_float(SMOLLM2)
    ids = torch.randint(0, 49000, (1, PREFILL))
    if args.rotation:
        with torch.inference_mode():
            rotation(base, ids, args.rounds, not args.no_compile)
        return

    prefills: dict[str, Callable[[], float]] = {}
    decodes: dict[str, Callable[[], float]] = {}
    with torch.inference_mode():
        for name, (dtype, convert) in CANDIDATES.items():
            try:
                model = convert(copy.deepcopy(base).to(dtype)).eval()
            except ImportError as error:
                print(f"{name}: not installed ({error})")
                continue
            prefills[name], decodes[name] = prefill(model, ids), decode(model, ids[:, :PROMPT], model)
        facts = {"model": "SmolLM2-135M-Instruct", "prefill_tokens": PREFILL, "prompt_tokens": PROMPT}
        rows = measure(prefills, decodes, args.rounds)
        print("written", record("cpu", rows, **facts), flush=True)  # the compiled rows take a quarter of an hour
        if not args.no_compile:
            prefills.clear(), decodes.clear(), gc.collect()
            for name in ("fp32", "bf16", "torchao int8 dynamic", "torchao int8 dynamic, bf16", "quantkit", "quantkit, bf16"):
                dtype, convert = CANDIDATES[name]
                model = convert(copy.deepcopy(base).to(dtype)).eval()
                label = f"{name}, compiled"
                torch._dynamo.reset()
                decodes[label] = decode(model, ids[:, :PROMPT], torch.compile(model.forward, dynamic=False))
                decodes[label]()
                model.model.forward = torch.compile(model.model.forward, dynamic=False)
                prefills[label] = prefill(model, ids)
                prefills[label]()
                print("compiled", label, flush=True)
            rows += measure(prefills, decodes, args.rounds)
            print("written", record("cpu", rows, **facts))


def beside(what: str, calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """A row of the result: several forms of the same thing, interleaved."""
    for call in calls.values():
        call()  # warm up
    row = {"what": what, "s": {name: spread(s) for name, s in interleaved(calls, rounds).items()}}
    times = "   ".join(f"{name} {1e6 * s['median']:.1f} us" for name, s in row["s"].items())
    print(f"{what:40} {times}", flush=True)
    return row


def clusters(rounds: int) -> None:
    """Writes cpu-clusters.json."""
    rows = []
    for n, k in ((576, 576), (1536, 576), (576, 1536), (4096, 4096)):
        for m in (1, 16, PREFILL):
            x, calls, layers = torch.randn(m, k), {}, {}
            for count in (1, 2, 4, 8):
                layer = layers[count] = quantkit.W8A8Linear(k, n, groups=(k // count,) * count if count > 1 else ())
                layer.weight.random_(-127, 128)
                calls[str(count)] = repeated(lambda layer=layer, x=x: layer(x))
            name = f"layer {n} x {k}, {'1 token' if m == 1 else f'{m} tokens'}"
            rows.append(beside(name, calls, rounds))
            packed, scale = layers[8].prepared.passes, torch.ones(m, 9)
            q = torch.randint(-127, 128, (m, k), dtype=torch.int8)
            products = list(cpu._group_products(packed, q))
            sums = {
                "PyTorch": lambda p=products, s=scale, w=layers[8].weight_scale[:, 1:]: group_sum(p, s[:, 1:], w, None, None),
                "C": lambda p=products, s=scale, packed=packed: cpu._group_sum(packed, p, s[:, 1:], None),
            }
            rows.append(beside(f"borders of 8, {m} x {n}", {name: repeated(call) for name, call in sums.items()}, rounds))
            print("written", record("cpu-clusters", rows), flush=True)


def rotation(base: Any, ids: torch.Tensor, rounds: int, compiled: bool) -> None:
    """Writes cpu-rotation.json: the same thing without and with a rotation."""
    rows: list[dict[str, Any]] = []

    def add(what: str, calls: dict[str, Callable[[], float]], rounds: int) -> None:
        rows.append(beside(what, calls, rounds))

    for m, k in ((1, 4096), (512, 4096), (512, 576)):
        x = torch.randn(m, k)
        add(
            f"pass that quantizes {m} x {k}",
            {n: quantizer(x, b) for n, b in (("without", 0), ("with", 64), ("full", k & -k))},
            50,
        )
    for n, k in ((192, 576), (576, 576), (1536, 576), (576, 1536), (4096, 4096)):
        for m in (1, PREFILL):
            x, calls = torch.randn(m, k), {}
            for name, block in (("without", 0), ("with", 64)):
                layer = quantkit.W8A8Linear(k, n)
                layer.weight.random_(-127, 128)
                layer.rotation_block = block
                calls[name] = repeated(lambda layer=layer, x=x: layer(x))
            add(f"layer {n} x {k}, {'1 token' if m == 1 else f'{m} tokens'}", calls, 50)
    facts = {"model": "SmolLM2-135M-Instruct", "prefill_tokens": PREFILL, "prompt_tokens": PROMPT}
    for how in ("", ", compiled") if compiled else ("",):
        for dtype, kind in ((torch.float32, ""), (torch.bfloat16, ", bf16")):
            prefills: dict[str, Callable[[], float]] = {}
            decodes: dict[str, Callable[[], float]] = {}
            for name, method in (("without", "rtn"), ("with", "hadamard")):
                model = quantkit.quantize(copy.deepcopy(base).to(dtype), method).eval()
                torch._dynamo.reset()
                decodes[name] = decode(model, ids[:, :PROMPT], torch.compile(model.forward, dynamic=False) if how else model)
                decodes[name]()
                if how:
                    model.model.forward = torch.compile(model.model.forward, dynamic=False)
                prefills[name] = prefill(model, ids)
                prefills[name]()
            add(f"SmolLM2 prefill of {PREFILL} tokens{kind}{how}", prefills, rounds)
            add(f"SmolLM2 decode, a token{kind}{how}", decodes, rounds)
            print("written", record("cpu-rotation", rows, **facts), flush=True)


def repeated(call: Callable[[], Any], seconds: float = 5e-3) -> Callable[[], float]:
    """Seconds per call, over as many calls as take about ``seconds``."""
    call()
    start = time.perf_counter()
    call()
    count = max(1, int(seconds / (time.perf_counter() - start)))

    def run() -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count

    return run


def quantizer(x: torch.Tensor, block: int) -> Callable[[], float]:
    """The C pass alone, in one thread."""
    lib, (m, k) = library(), x.shape
    assert lib is not None
    layer = quantkit.W8A8Linear(k, 1)
    layer.rotation_block = block
    q, scale, packed = torch.empty(m, k, dtype=torch.int8), torch.empty(m), layer.prepared.passes
    args = (q.data_ptr(), scale.data_ptr(), x.data_ptr(), packed.pointers[0], None, m, k, 127.0, 0, 1)

    def call(*_: Any, keep: Any = (q, scale, x, layer)) -> None:
        lib.quantkit_quantize(*args)

    return repeated(call)


def measure(
    prefills: dict[str, Callable[[], float]], decodes: dict[str, Callable[[], float]], rounds: int
) -> list[dict[str, Any]]:
    for calls in (prefills, decodes):
        for call in calls.values():
            call()  # warm up
    prefill_s, decode_s = interleaved(prefills, rounds), interleaved(decodes, rounds)
    rows = []
    for name in prefills:
        row = {"name": name, "prefill_s": spread(prefill_s[name]), "decode_s": spread(decode_s[name])}
        rows.append(row)
        print(
            f"{name:40} prefill {1e3 * row['prefill_s']['median']:8.1f} ms   "
            f"decode {1e3 * row['decode_s']['median']:7.2f} ms/token",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()

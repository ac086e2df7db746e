"""How far W8A8 moves SmolLM2, and a twin of it with injected outlier channels, from fp32; peers in the same run.

    python benchmarks/accuracy.py --data ../shared/data/wikitext-2 [--windows 20] [--only PATTERN ...]

Perplexity, mean KL(fp32 || quantized) in nats and top-1 agreement over the first windows of 1024 tokens of the WikiText-2
raw test split; calibration on 32 windows of 512 tokens of the validation split. All decoder linears, the head left out.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from common import record, shared_out
from cpu import decoder_linears, torch_ao, torchao
from torch import nn

import quantkit
from quantkit import RPTQ, Hadamard, LLMInt8, SmoothQuant
from quantkit.calibration.data import packed_text
from quantkit.calibration.statistics import Range, TokenSample
from quantkit.cli.demo import outlier_twin
from quantkit.evaluation.perplexity import compare, log_probabilities, windows_of
from quantkit.integrations.transformers.models import SMOLLM2, load_float
from quantkit.pipeline import find

Quantizer = Callable[[nn.Module, list[torch.Tensor]], nn.Module]


def ours(method: Any, scheme: str = "w8a8", **options: Any) -> Quantizer:
    return lambda model, batches: quantkit.quantize(
        model, method, scheme=scheme, calibration=batches, progress=False, **options
    )


def exported(method: Any) -> Quantizer:
    """In the layout of engines, and back."""

    def run(model: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
        quantized = quantkit.quantize(model, method, calibration=batches, progress=False)
        with tempfile.TemporaryDirectory() as folder:
            quantkit.export(quantized, folder)
            return quantkit.load(folder, device=batches[0].device)

    return run


def ours_without_data(model: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
    return quantkit.quantize(model, progress=False)


class Unaware:
    """SmoothQuant as if nothing followed it: what it is worth that it knows of the rotation."""

    name, stage, statistics = "smoothquant, unaware", SmoothQuant.stage, SmoothQuant.statistics

    def plan(self, view: quantkit.View) -> quantkit.Plan:
        for site in view.sites:
            site.rotation_ahead = None
        return SmoothQuant().plan(view)


def torchao_smoothquant(model: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
    """torchao's prototype at alpha 0.5: every linear by itself, with a multiply before it at run time."""
    from torchao.prototype.smoothquant import SmoothQuantConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    wanted = set(decoder_linears(model))
    base = Int8DynamicActivationInt8WeightConfig()
    quantize_(model, SmoothQuantConfig(base, step="prepare", alpha=0.5), filter_fn=lambda _, name: name in wanted)
    with torch.no_grad():
        for batch in batches[:16]:  # its observer keeps every input
            model(batch)
    quantize_(model, SmoothQuantConfig(base, step="convert"), filter_fn=lambda m, _: "Observed" in type(m).__name__)
    return model


def bitsandbytes(model: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
    """LLM.int8() as the industry has it, threshold 6, on its CPU backend."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    for name in decoder_linears(model):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        rows, channels = linear.weight.shape
        new = Linear8bitLt(channels, rows, bias=linear.bias is not None, has_fp16_weights=False, threshold=6.0)
        new.weight = Int8Params(linear.weight.data.half(), requires_grad=False, has_fp16_weights=False)
        new.bias = linear.bias
        model.set_submodule(name, new.to(linear.weight.device))
    return model


class FP8Linear(nn.Module):
    """As engines do FP8: e4m3, a scale for each row of the weight, and for each token; or for the weight alone.

    Products of values of e4m3 are exact in float32, which adds them up.
    """

    def __init__(self, linear: nn.Linear, activations: bool) -> None:
        super().__init__()
        self.activations, self.bias = activations, linear.bias
        self.register_buffer("weight", self.rounded(linear.weight.detach()))

    @staticmethod
    def rounded(x: torch.Tensor) -> torch.Tensor:
        e4m3 = torch.float8_e4m3fn
        scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(e4m3).max
        return (x / scale).to(e4m3).to(x.dtype) * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.rounded(x) if self.activations else x, self.get_buffer("weight"), self.bias)


def fp8(*, activations: bool) -> Quantizer:
    def run(model: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
        for name in decoder_linears(model):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, FP8Linear(linear, activations))
        return model

    return run


def llmcompressor(model: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
    """Its INT8 recipe: SmoothQuant 0.8 and GPTQ. Needs an environment of its own."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from llmcompressor.modifiers.smoothquant import SmoothQuantModifier

    recipe = [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
    data = Dataset.from_dict(
        {"input_ids": [b[0].tolist() for b in batches], "attention_mask": [[1] * b.shape[1] for b in batches]}
    )
    _, tokenizer = load_float(SMOLLM2)
    length, count = batches[0].shape[1], len(batches)
    with tempfile.TemporaryDirectory() as folder:  # it wants a model with a name, and a tokenizer for data that needs none
        for part in (model, tokenizer):
            part.save_pretrained(folder)
        return oneshot(model=folder, dataset=data, recipe=recipe, max_seq_length=length, num_calibration_samples=count)


CANDIDATES: dict[str, Quantizer] = {
    "naive: static, per tensor": ours("rtn", "w8a8-static-pertensor"),
    "RTN": ours("rtn"),
    "SmoothQuant": ours("smoothquant"),
    "SmoothQuant, no data": ours_without_data,
    "SmoothQuant(0.5)": ours(quantkit.SmoothQuant(0.5)),
    "SmoothQuant(0.8)": ours(quantkit.SmoothQuant(0.8)),
    "SmoothQuant, static": ours("smoothquant", "w8a8-static"),
    "SmoothQuant, asymmetric": ours("smoothquant", "w8a8-asym"),
    "LLMInt8": ours("llm_int8"),
    "LLMInt8(columns=16)": ours(quantkit.LLMInt8(columns=16)),
    "SmoothQuant + LLMInt8": ours(["smoothquant", "llm_int8"]),
    "SmoothQuant + LLMInt8(columns=16)": ours(["smoothquant", quantkit.LLMInt8(columns=16)]),
    "LLMInt8 + SmoothQuant": ours(["llm_int8", "smoothquant"]),
    "LLMInt8(threshold=6)": ours(quantkit.LLMInt8(threshold=6.0)),
    "best": ours("best"),
    "only the head": ours("rtn", targets=["lm_head"], heads=True),
    "RTN, head": ours("rtn", heads=True),
    "SmoothQuant, head": ours("smoothquant", heads=True),
    "best, head": ours("best", heads=True),
    "FP8": fp8(activations=True),
    "FP8, weights alone": fp8(activations=False),
    "only q, k, v": ours("smoothquant", targets=["q_proj", "k_proj", "v_proj"]),
    "only o": ours("smoothquant", targets=["o_proj"]),
    "only gate, up": ours("smoothquant", targets=["gate_proj", "up_proj"]),
    "only down": ours("smoothquant", targets=["down_proj"]),
    "peer: torch.ao dynamic": lambda model, _: torch_ao(model),
    "peer: torchao int8 dynamic": lambda model, _: torchao(model),
    "peer: torchao SmoothQuant(0.5)": torchao_smoothquant,
    "peer: bitsandbytes, threshold 6": bitsandbytes,
    "peer: llm-compressor SmoothQuant(0.8) + GPTQ": llmcompressor,
    "Rotate(), not smoothed": ours("rotate"),
    "Rotate + SmoothQuant": ours(["rotate", "smoothquant"]),
    "Rotate + SmoothQuant(0.5) + Hadamard": ours(["rotate", quantkit.SmoothQuant(0.5), "hadamard"]),
    "Rotate(block='full') + SmoothQuant": ours([quantkit.Rotate(block="full"), "smoothquant"]),
    "Rotate(heads=False) + SmoothQuant": ours([quantkit.Rotate(heads=False), "smoothquant"]),
    "Rotate(stream=False) + SmoothQuant": ours([quantkit.Rotate(stream=False), "smoothquant"]),
    "exported: SmoothQuant": exported("smoothquant"),
    "exported: Rotate + SmoothQuant": exported(["rotate", "smoothquant"]),
    "RTN, static": ours("rtn", "w8a8-static"),
    "RTN, static-asym": ours("rtn", "w8a8-static-asym"),
}
SMOOTHED = {"": [], "SmoothQuant + ": ["smoothquant"]}
for scheme, suffix in (("static-asym", "-static-asym"), ("static", "-static"), ("per token", "")):
    for clusters in (2, 4, 8, 32) if scheme != "static" else (8, 32):
        for first, before in SMOOTHED.items():
            one = RPTQ(clusters)
            CANDIDATES[f"{first}RPTQ({clusters}), {scheme}"] = ours([*before, one], f"w8a8{suffix}")
            if clusters in (8, 32) and scheme == "static-asym":
                one = RPTQ(clusters, by="kmeans")
                CANDIDATES[f"{first}RPTQ({clusters}, by='kmeans'), {scheme}"] = ours([*before, one], f"w8a8{suffix}")
    for name, before in (("SmoothQuant", "smoothquant"), ("LLMInt8", "llm_int8")):
        CANDIDATES[f"{name} + Hadamard, {scheme}"] = ours([before, "hadamard"], f"w8a8{suffix}")
        CANDIDATES[f"{name} + RPTQ(8) + Hadamard, {scheme}"] = ours([before, RPTQ(8), "hadamard"], f"w8a8{suffix}")
for bits in ("w4a8", "w4a4"):
    for scheme, suffix in (("static-asym", "-static-asym"), ("per token", "")):
        CANDIDATES[f"{bits}: RTN, {scheme}"] = ours("rtn", f"{bits}{suffix}")
        CANDIDATES[f"{bits}: SmoothQuant, {scheme}"] = ours("smoothquant", f"{bits}{suffix}")
        for first, before in SMOOTHED.items():
            CANDIDATES[f"{bits}: {first}RPTQ(32), {scheme}"] = ours([*before, RPTQ(32)], f"{bits}{suffix}")

for regime in (  # of RPTQ's paper: W4A16, W4A8, W4A4, W4A4KV, W4A3KV, W3A3KV; and those of its cache per token
    "w4a16", "w4a8-static-asym-kv8-attention8", "w4a4-static-asym-norm8-kv4-attention4",
    "w4a16-static-asym-kv4", "w4a16-static-asym-kv3", "w3a16-static-asym-kv3", "w4a16-kv4", "w4a16-kv3",
):  # fmt: skip
    one = RPTQ(32, by="kmeans")
    CANDIDATES |= {
        f"{regime}: RTN": ours("rtn", regime),
        f"{regime}: RPTQ(32, by='kmeans')": ours(one, regime),
        f"{regime}: RPTQ(32, by='kmeans') + GPTQ": ours([one, "gptq"], regime),
    }

for size in (16, 32, 64, 128, "full"):
    CANDIDATES |= {
        f"Hadamard({size})": ours(Hadamard(size)),
        f"SmoothQuant(0.5) + Hadamard({size})": ours([SmoothQuant(0.5), Hadamard(size)]),
        f"SmoothQuant + Hadamard({size})": ours([SmoothQuant(), Hadamard(size)]),
    }
CANDIDATES |= {
    "SmoothQuant, unaware, + Hadamard(64)": ours([Unaware(), Hadamard(64)]),
    "LLMInt8 + Hadamard(64)": ours([LLMInt8(), Hadamard(64)]),
    "LLMInt8(columns=16) + Hadamard(64)": ours([LLMInt8(16), Hadamard(64)]),
    "SmoothQuant + LLMInt8 + Hadamard(64)": ours([SmoothQuant(), LLMInt8(), Hadamard(64)]),
    "SmoothQuant + LLMInt8(columns=16) + Hadamard(64)": ours([SmoothQuant(), LLMInt8(16), Hadamard(64)]),
    "static: Hadamard(64)": ours(Hadamard(64), "w8a8-static"),
    "static: SmoothQuant + Hadamard(64)": ours([SmoothQuant(), Hadamard(64)], "w8a8-static"),
}
for bits in ("w6a6", "w4a8", "w4a4"):
    CANDIDATES |= {
        f"{bits}: RTN": ours("rtn", bits),
        f"{bits}: SmoothQuant": ours("smoothquant", bits),
        f"{bits}: Hadamard(64)": ours(Hadamard(64), bits),
        f"{bits}: SmoothQuant + Hadamard(64)": ours([SmoothQuant(), Hadamard(64)], bits),
        f"{bits}: SmoothQuant + Hadamard(full)": ours([SmoothQuant(), Hadamard("full")], bits),
    }


def collect_once() -> Callable[[], None]:
    """Let candidates that are quantized from the same model share its statistics. Returns what to call for another model."""
    observe, shared = find.observe, {}

    def once(model: nn.Module, batches: Any, sites: Any, kinds: Any, **options: Any) -> Any:
        if options.get("transforms") or not {Range, TokenSample}.issuperset(kinds):
            return observe(model, batches, sites, kinds, **options)
        weights = sum(float(p.detach().double().abs().sum()) for p in model.parameters())  # a calibrator may have rotated them
        key = (weights, *(site.name for site in sites))
        if key not in shared:
            shared[key] = observe(model, batches, sites, [Range, TokenSample], **options)
        return shared[key]

    find.observe = once  # type: ignore[assignment]
    return shared.clear


STATE: dict[str, Any] = {}
"""Of one process: models, windows, what the float model says to them, and calibration batches."""


def begin(device: str, data: Path, count: int, once: bool) -> None:
    base, tokenizer = load_float(SMOLLM2)
    windows = windows_of(tokenizer, (data / "test.raw.txt").read_text(encoding="utf-8"), 1024, count).to(device)
    batches = packed_text([(data / "valid.txt").read_text(encoding="utf-8")], tokenizer, device=device)[:32]
    twin = outlier_twin(base)
    models = {"SmolLM2": base.to(device), "outlier twin": twin.to(device)}
    reference = [log_probabilities(base, window) for window in windows]
    another_model = collect_once() if once else lambda: None
    STATE.update(models=models, windows=windows, batches=batches, reference=reference, once=once, another_model=another_model)


def score(task: tuple[str, str]) -> tuple[dict[str, Any], dict[str, float | None]]:
    """The row of one model and candidate, and with SmoothQuant what each layer has."""
    name, candidate = task
    if STATE.get("last") != name:
        STATE["another_model"]()
        STATE["last"] = name
    start = time.perf_counter()
    quantized = CANDIDATES[candidate](copy.deepcopy(STATE["models"][name]), STATE["batches"])
    seconds = None if STATE["once"] else round(time.perf_counter() - start, 1)
    row = {"model": name, "method": candidate, "quantize_s": seconds}
    row |= compare(quantized, STATE["windows"], STATE["reference"], progress=False)
    if not STATE["once"]:
        row["kl_5"] = compare(quantized, STATE["windows"][:5], STATE["reference"], progress=False)["kl"]
    if candidate != "SmoothQuant":
        return row, {}
    return row, {x.name: x.sqnr_db for x in quantkit.report(quantized).layers if x.kind == "int8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with test.raw.txt and valid.txt")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=["*"], help="globs over the names of candidates, in this order")
    parser.add_argument("--models", nargs="*", default=["SmolLM2", "outlier twin"])
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for all GPUs")
    parser.add_argument("--jobs", type=int, default=1, help="processes; more than one, and the seconds mean little")
    parser.add_argument("--name", default="accuracy", help="of the result")
    parser.add_argument(
        "--once",
        action="store_true",
        help="calibrate once for all candidates: no time to quantize, and KL over all windows only",
    )
    args = parser.parse_args()
    wanted = list(dict.fromkeys(c for pattern in args.only for c in CANDIDATES if fnmatch(c, pattern)))
    tasks = list(itertools.product(args.models, wanted))
    found: dict[tuple[str, str], dict[str, Any]] = {}
    layers: dict[str, dict[str, float | None]] = {}
    for task, (row, own) in shared_out(tasks, args.jobs, args.device, begin, score, args.data, args.windows, args.once):
        found[task] = row
        layers |= {task[0]: own} if own else {}
        print(
            f"{task[0]:13} {task[1]:45} KL {row['kl']:.5f} perplexity {row['perplexity']:.3f} top-1 {row['top1']:.1%}",
            flush=True,
        )
        facts = {"windows": args.windows, "length": 1024, "layers": layers}
        path = record(args.name, [found[t] for t in tasks if t in found], **facts)
    print("written", path)


if __name__ == "__main__":
    main()

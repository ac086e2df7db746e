"""Every method and the compositions that make sense, at W8A8, W6A6, W4A8 and W4A4: how far each moves SmolLM2 from fp32.

    python benchmarks/methods.py --data ../shared/data/wikitext-2 [--windows 20] [--schemes w4a4] [--only PATTERN ...]

Perplexity, mean KL(fp32 || quantized) and top-1 agreement over the first windows of 1024 tokens of the WikiText-2 raw test
split, calibration on 32 windows of 512 tokens of the validation split, the seconds that quantizing takes, and the memory that
it takes at its peak over what the float model has (with --device cuda, of the GPU). All decoder linears, the head left out.
Rows are written as they come, and those that the result has already for as many windows are not run again: delete the file to
start over. Also draws docs/images/methods.png.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import itertools
import json
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import RESULTS, ROOT, record, shared_out
from load import Anonymous

import quantkit
from quantkit.calibration.data import packed_text
from quantkit.evaluation.perplexity import compare, log_probabilities, windows_of
from quantkit.integrations.transformers.models import SMOLLM2, load_float

METHODS: dict[str, Any] = {
    "RTN": "rtn",
    "SmoothQuant": "smoothquant",
    "LLMInt8": "llm_int8",
    "SmoothQuant + LLMInt8": ["smoothquant", "llm_int8"],
    "RPTQ": "rptq",
    "SmoothQuant + RPTQ": ["smoothquant", "rptq"],
    "SmoothQuant + Hadamard": ["smoothquant", "hadamard"],
    "SmoothQuant + RPTQ + Hadamard": ["smoothquant", "rptq", "hadamard"],
    "LLMInt8 + RPTQ + Hadamard": ["llm_int8", "rptq", "hadamard"],
    "OmniQuant": "omniquant",
    "SmoothQuant + LLMInt8 + OmniQuant": ["smoothquant", "llm_int8", "omniquant"],
    "SmoothQuant + GPTQ": ["smoothquant", "gptq"],
    "SmoothQuant + LLMInt8 + GPTQ": ["smoothquant", "llm_int8", "gptq"],
    "SmoothQuant + RPTQ + GPTQ": ["smoothquant", "rptq", "gptq"],
    "SmoothQuant + Hadamard + GPTQ": ["smoothquant", "hadamard", "gptq"],
    "OmniQuant + GPTQ": ["omniquant", "gptq"],
}
"""Name -> what a recipe says; another method is another line."""

SCHEMES = ("w8a8", "w6a6", "w4a8", "w4a4")


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("scheme", "method", "seed", "windows"))


def known(name: str) -> list[dict[str, Any]]:
    """Rows of all results whose name fits the glob ``name``."""
    return [row for file in sorted(RESULTS.glob(f"{name}.json")) for row in json.loads(file.read_text())["rows"]]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity over bits, one line for each method: the mean of seeds, with their range."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5))
    schemes = [s for s in SCHEMES if any(r["scheme"] == s for r in rows)]
    methods = [m for m in METHODS if any(r["method"] == m for r in rows)]
    markers = "osD^vP*X<>hd"
    for number, method in enumerate(methods):
        points = [
            (i, [r["perplexity"] for r in rows if (r["method"], r["scheme"]) == (method, s)]) for i, s in enumerate(schemes)
        ]
        points = [(i, values) for i, values in points if values]
        x = [i + 0.05 * (number - len(methods) / 2) for i, _ in points]
        y = [mean(values) for _, values in points]
        spread = [
            [m - min(v) for m, (_, v) in zip(y, points, strict=True)],
            [max(v) - m for m, (_, v) in zip(y, points, strict=True)],
        ]
        axes.errorbar(x, y, spread, marker=markers[number % len(markers)], capsize=3, linewidth=1, label=method)
    axes.axhline(rows[0]["reference_perplexity"], color="black", linestyle=":", label="fp32")
    axes.set(yscale="log", ylabel="perplexity", title="SmolLM2-135M-Instruct, WikiText-2", xticks=range(len(schemes)))
    axes.set_xticklabels([s.upper() for s in schemes])
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


STATE: dict[str, Any] = {}
"""Of one process: the model, windows, what it says to them, and calibration batches."""


def begin(device: str, data: Path, count: int) -> None:
    base, tokenizer = load_float(SMOLLM2)
    windows = windows_of(tokenizer, (data / "test.raw.txt").read_text(encoding="utf-8"), 1024, count).to(device)
    batches = packed_text([(data / "valid.txt").read_text(encoding="utf-8")], tokenizer, device=device)[:32]
    base.to(device)
    STATE.update(base=base, windows=windows, batches=batches, reference=[log_probabilities(base, window) for window in windows])


def score(facts: dict[str, Any]) -> dict[str, Any]:
    recipe = quantkit.Recipe.from_dict({"method": METHODS[facts["method"]], "scheme": facts["scheme"], "seed": facts["seed"]})
    model = copy.deepcopy(STATE["base"])
    with peak_memory(model.device) as peak:
        start = time.perf_counter()
        quantkit.quantize(model, **recipe.arguments, calibration=STATE["batches"], progress=False)
        seconds = time.perf_counter() - start
    row = facts | {"quantize_s": round(seconds, 1), "peak_MiB": round(peak[0] / 2**20)}
    row |= {"threads": torch.get_num_threads(), "recipe": recipe.to_dict()}
    return row | compare(model, STATE["windows"], STATE["reference"], progress=False)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """In the list, at the end: bytes that were taken at most, over what was taken before."""
    out: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield out
        out.append(torch.cuda.max_memory_allocated(device) - before)
        return
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what earlier rows have freed would be taken for free
    watch = Anonymous()
    watch.start()
    yield out
    watch.running = False
    watch.join()
    out.append(watch.peak - watch.before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with test.raw.txt and valid.txt")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    parser.add_argument("--only", nargs="*", default=["*"], help="globs over the names of methods")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for all GPUs")
    parser.add_argument("--jobs", type=int, default=1, help="processes; more than one, and the seconds mean little")
    parser.add_argument("--name", default="methods", help="of the result")
    args = parser.parse_args()

    rows = known(args.name)
    tasks = [
        {"scheme": scheme, "method": name, "seed": seed, "windows": args.windows}
        for seed, scheme, name in itertools.product(args.seeds, args.schemes, METHODS)
        if any(fnmatch(name, pattern) for pattern in args.only)
    ]
    tasks = [task for task in tasks if key(task) not in map(key, rows)]
    tasks.sort(key=lambda task: "OmniQuant" not in task["method"])  # what takes longest goes first
    for _, row in shared_out(tasks, args.jobs, args.device, begin, score, args.data, args.windows):
        rows.append(row)
        rows.sort(key=lambda r: (SCHEMES.index(r["scheme"]), list(METHODS).index(r["method"]), r["seed"], r["windows"]))
        path = record(args.name, rows, length=1024)
        print(
            f"{row['scheme']} {row['method']:42} seed {row['seed']} KL {row['kl']:.5f} perplexity {row['perplexity']:.3f} "
            f"top-1 {row['top1']:.1%} {row['quantize_s']:.0f} s {row['peak_MiB']} MiB -> {path.name}",
            flush=True,
        )
    if args.name.startswith("methods"):
        plot(known("methods*"), ROOT / "docs" / "images" / "methods.png")


if __name__ == "__main__":
    main()

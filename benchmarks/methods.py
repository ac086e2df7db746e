"""Every method and the compositions that make sense, at W8A8, W6A6, W4A8 and W4A4: how far each moves SmolLM2 from fp32.

    python benchmarks/methods.py --data ../shared/data/wikitext-2 [--windows 20] [--schemes w4a4] [--only PATTERN ...]

Perplexity, mean KL(fp32 || quantized) and top-1 agreement over the first windows of 1024 tokens of the WikiText-2 raw test
split, calibration on 32 windows of 512 tokens of the validation split, the seconds that quantizing takes, and the memory that
it takes at its peak over what the float model has. All decoder linears, the head left out. Rows are written as they come, and
those that the result has already for as many windows are not run again: delete the file to start over. Also draws
docs/images/methods.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import RESULTS, ROOT, record
from load import Anonymous

import quantkit
from quantkit.data import packed_text
from quantkit.evaluate import compare, log_probabilities, windows_of
from quantkit.integrations.transformers import SMOLLM2, load_float

METHODS: dict[str, Any] = {
    "RTN": "rtn",
    "SmoothQuant": "smoothquant",
    "LLMInt8": "llm_int8",
    "SmoothQuant + LLMInt8": ["smoothquant", "llm_int8"],
    "RPTQ": "rptq",
    "SmoothQuant + RPTQ": ["smoothquant", "rptq"],
    "SmoothQuant + Hadamard": ["smoothquant", "hadamard"],
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
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text())["rows"] if file.exists() else []


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with test.raw.txt and valid.txt")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    parser.add_argument("--only", nargs="*", default=["*"], help="globs over the names of methods")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--name", default="methods", help="of the result")
    args = parser.parse_args()

    base, tokenizer = load_float(SMOLLM2)
    windows = windows_of(tokenizer, (args.data / "test.raw.txt").read_text(encoding="utf-8"), 1024, args.windows)
    batches = packed_text([(args.data / "valid.txt").read_text(encoding="utf-8")], tokenizer)[:32]
    reference = [log_probabilities(base, window) for window in windows]
    for seed in args.seeds:
        for scheme in args.schemes:
            for name, method in METHODS.items():
                facts = {"scheme": scheme, "method": name, "seed": seed, "windows": len(windows)}
                rows = known(args.name)
                if not any(fnmatch(name, pattern) for pattern in args.only) or key(facts) in map(key, rows):
                    continue
                recipe = quantkit.Recipe.from_dict({"method": method, "scheme": scheme, "seed": seed})
                model = copy.deepcopy(base)
                watch = Anonymous()
                watch.start()
                start = time.perf_counter()
                quantkit.quantize(model, **recipe.arguments, calibration=batches, progress=False)
                seconds = time.perf_counter() - start
                watch.running = False
                watch.join()
                row = facts | {"quantize_s": round(seconds, 1), "peak_MiB": round((watch.peak - watch.before) / 2**20)}
                row |= {"threads": torch.get_num_threads(), "recipe": recipe.to_dict()}
                row |= compare(model, windows, reference, progress=False)
                rows.append(row)
                rows.sort(key=lambda r: (SCHEMES.index(r["scheme"]), list(METHODS).index(r["method"]), r["seed"], r["windows"]))
                path = record(args.name, rows, length=1024)
                print(
                    f"{scheme} {name:42} seed {seed} KL {row['kl']:.5f} perplexity {row['perplexity']:.3f} "
                    f"top-1 {row['top1']:.1%} {seconds:.0f} s {row['peak_MiB']} MiB -> {path.name}",
                    flush=True,
                )
    rows = known(args.name)
    if rows and args.name == "methods":
        plot(rows, ROOT / "docs" / "images" / "methods.png")


if __name__ == "__main__":
    main()

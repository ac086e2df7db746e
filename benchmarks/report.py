"""Write the tables of README and docs from ``benchmarks/results/*.json``, between ``<!-- results:NAME -->`` markers.

    python benchmarks/report.py [--check]

``--check`` writes nothing and fails if a page does not show the recorded results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
Result = dict[str, Any]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; columns that hold numbers are the caller's to format."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin(result: Result) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if name != "quantkit-w8a8")
    where = ", ".join(f"{value}" for key, value in result["device"].items() if key != "threads")
    return f"<sub>`{result['command']}`, {result['date'][:10]}, commit {result['commit'][:7]}; {where}; {versions}</sub>"


def demo(result: Result) -> str:
    head = ("", "", "perplexity", "KL to fp32", "top-1", "MiB", "prefill tok/s", "decode tok/s")
    rows = [
        (
            r["model"], r["method"], f"{r['perplexity']:.2f}", f"{r['kl']:.4f}", f"{r['top1']:.1%}", f"{r['MiB']:.0f}",
            f"{r['prefill tok/s']:.0f}", f"{r['decode tok/s']:.1f}",
        )
        for r in result["rows"]
    ]  # fmt: skip
    return table(head, rows)


def accuracy(result: Result) -> str:
    rows = [r for r in result["rows"] if not r["method"].startswith("only ")]
    head = ("model", "method", "KL", "KL, first 5 windows", "perplexity", "top-1", "seconds to quantize")
    body = table(
        head,
        (
            (
                r["model"], r["method"], f"{r['kl']:.4f}", f"{r['kl_5']:.4f}", f"{r['perplexity']:.3f}", f"{r['top1']:.1%}",
                f"{r['quantize_s']:.0f}",
            )
            for r in rows
        ),
    )  # fmt: skip
    base = rows[0]["reference_perplexity"]
    return f"{body}\n\n{result['windows']} windows of {result['length']} tokens; perplexity of fp32: {base:.3f}."


def sites(result: Result) -> str:
    """KL with only one kind of layer quantized, and the output noise of its layers."""
    kl = {(r["model"], r["method"]): r["kl"] for r in result["rows"]}
    noise: dict[tuple[str, str], list[float]] = defaultdict(list)
    for model, layers in result["layers"].items():
        for name, decibels in layers.items():
            noise[model, next(kind for kind in KINDS if name.rpartition(".")[2] in KINDS[kind])].append(decibels)
    rows = [
        (model, kind, f"{kl[model, f'only {kind}']:.4f}", str(len(values)), f"{median(values):.1f}", f"{min(values):.1f}")
        for (model, kind), values in noise.items()
    ]
    return table(("model", "quantized alone", "KL", "layers", "median SQNR, dB", "lowest"), rows)


KINDS = {
    "q, k, v": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


def cpu(result: Result) -> str:
    def time(r: Result, key: str, scale: float) -> str:
        return f"{1e3 * r[key]['median']:.{0 if scale > 1 else 1}f}"

    base = {r["name"]: r for r in result["rows"]}

    def row(r: Result) -> tuple[str, ...]:
        fp32 = base["fp32, compiled" if r["name"].endswith("compiled") else "fp32"]
        faster = (f"{fp32[key]['median'] / r[key]['median']:.2f}x" for key in ("prefill_s", "decode_s"))
        prefill, decode = faster
        return r["name"], time(r, "prefill_s", 10), prefill, time(r, "decode_s", 1), decode

    head = ("", f"prefill of {result['prefill_tokens']} tokens, ms", "against fp32", "decode, ms a token", "against fp32")
    return table(head, map(row, result["rows"]))


TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "demo": ("demo", demo),
    "accuracy": ("accuracy", accuracy),
    "sites": ("accuracy", sites),
    "cpu": ("cpu", cpu),
}


def fill(text: str) -> str:
    """``text`` with the body of every marker replaced."""

    def body(match: re.Match[str]) -> str:
        source, render = TABLES[match[1]]
        result = json.loads((ROOT / "benchmarks" / "results" / f"{source}.json").read_text(encoding="utf-8"))
        return f"<!-- results:{match[1]} -->\n{render(result)}\n\n{origin(result)}\n<!-- /results:{match[1]} -->"

    return re.sub(r"<!-- results:([\w-]+) -->\n.*?<!-- /results:\1 -->", body, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        filled = fill(text)
        if filled != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(filled, encoding="utf-8")
    print(*stale or ["every table is up to date"], sep="\n")
    sys.exit(bool(stale) if check else 0)


if __name__ == "__main__":
    main()

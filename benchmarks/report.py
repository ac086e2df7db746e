"""Write the tables of README and docs from ``benchmarks/results/*.json``, between ``<!-- results:NAME -->`` markers.

    python benchmarks/report.py [--check]

``--check`` writes nothing and fails if a page does not show the recorded results.
"""

from __future__ import annotations

import argparse
import itertools
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
    speeds = [name for name in ("prefill tok/s", "decode tok/s", "captured tok/s") if name in result["rows"][0]]
    head = ("", "", "perplexity", "KL to fp32", "top-1", "MiB", *speeds)
    rows = [
        (
            r["model"], r["method"], f"{r['perplexity']:.2f}", f"{r['kl']:.4f}", f"{r['top1']:.1%}", f"{r['MiB']:.0f}",
            *(f"{r[name]:.0f}" if name.startswith("prefill") else f"{r[name]:.1f}" for name in speeds),
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


def rotation(result: Result) -> str:
    """Quantizers that share one calibration."""
    rows = result["rows"]
    body = table(
        ("model", "method", "KL", "perplexity", "top-1"),
        ((r["model"], r["method"], f"{r['kl']:.4f}", f"{r['perplexity']:.3f}", f"{r['top1']:.1%}") for r in rows),
    )
    base = rows[0]["reference_perplexity"]
    return f"{body}\n\n{result['windows']} windows of {result['length']} tokens; perplexity of fp32: {base:.3f}."


def twins(result: Result) -> str:
    """One row for each method, models beside each other."""
    models = list(dict.fromkeys(r["model"] for r in result["rows"]))
    found = {
        (r["method"], r["model"]): (f"{r['kl']:.4f}", f"{r['perplexity']:.2f}", f"{r['top1']:.1%}") for r in result["rows"]
    }
    names = dict.fromkeys(r["method"] for r in result["rows"])
    methods = sorted(names, key=lambda m: -float(found[m, models[0]][0]))
    head = ("method", *(f"{model}: {what}" for model in models for what in ("KL", "perplexity", "top-1")))
    empty = ("", "", "")
    body = table(head, ((m, *(cell for model in models for cell in found.get((m, model), empty))) for m in methods))
    base = result["rows"][0]["reference_perplexity"]
    return f"{body}\n\n{result['windows']} windows of {result['length']} tokens; perplexity of fp32: {base:.3f}."


def blocks(result: Result) -> str:
    """KL by the channels of a block."""
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for r in result["rows"]:
        if sized := re.fullmatch(r"(.*)\((\d+|full)\)", r["method"]):
            found[r["model"], sized[1]][sized[2]] = r["kl"]
    found = {key: by_size for key, by_size in found.items() if len(by_size) > 1}
    sizes = list(dict.fromkeys(size for by_size in found.values() for size in by_size))
    rows = ((*key, *(f"{by_size[s]:.4f}" if s in by_size else "" for s in sizes)) for key, by_size in found.items())
    return f"{table(('model', 'method, KL with blocks of', *sizes), rows)}\n\n{result['windows']} windows."


def bits(result: Result) -> str:
    """KL by number format: candidates called "FORMAT: METHOD"."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for r in result["rows"]:
        scheme, _, method = r["method"].partition(": ")
        found[scheme][method] = r.get("kl", r.get("cosine"))
    found = {scheme: by_method for scheme, by_method in found.items() if len(by_method) > 1}
    methods = list(dict.fromkeys(method for by_method in found.values() for method in by_method))
    return table(("", *methods), ((s, *(f"{v[m]:.4f}" if m in v else "" for m in methods)) for s, v in found.items()))


def encoder(result: Result) -> str:
    """Sentence embeddings."""
    rows = [r for r in result["rows"] if ": " not in r["method"]]
    cells = ((r["method"], f"{r['cosine']:.5f}", f"{r['worst']:.5f}", f"{r['same_nearest']:.1%}") for r in rows)
    return table(("method", "mean cosine to fp32", "worst", "same nearest sentence"), cells)


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


def cpu_rotation(result: Result) -> str:
    def row(r: Result) -> tuple[str, ...]:
        without, *others = (r["s"][name]["median"] for name in ("without", "with"))
        unit, scale = ("ms", 1e3) if without > 1e-3 else ("us", 1e6)
        return (
            r["what"],
            f"{scale * without:.1f} {unit}",
            *(f"{scale * t:.1f} {unit}" for t in others),
            f"{others[0] / without:.2f}x",
        )

    return table(("", "without", "blocks of 64", "takes"), map(row, result["rows"]))


def cpu_clusters(result: Result) -> str:
    """Layers with 1 to 8 clusters, and what the borders of 8 take."""

    def row(layer: Result, borders: Result) -> tuple[str, ...]:
        one, *others = (time["median"] for time in layer["s"].values())
        times = (f"{1e3 * time['median']:.3f}" for time in borders["s"].values())
        return layer["what"], f"{1e3 * one:.3f}", *(f"{1e3 * t:.3f} ({t / one:.2f}x)" for t in others), *times

    head = ("ms", "1 cluster", "2", "4", "8", "borders of 8, PyTorch", "borders of 8, C")
    return table(head, itertools.starmap(row, zip(result["rows"][::2], result["rows"][1::2], strict=True)))


def least(row: Result, start: str, kind: str = "cold", but: str = "quantkit") -> tuple[float, str]:
    """Microseconds and name of the fastest candidate whose name starts so."""
    ours = f"{start.split(':')[0]}: quantkit, "  # our own other forms are no peers
    names = (n for n in row["us"] if n.startswith(start) and not n.endswith(but) and not n.startswith(ours))
    found = [(row["us"][name][kind], name) for name in names]
    return min(found, default=(float("nan"), ""))


def floor(row: Result, result: Result) -> float:
    """Microseconds in which this GPU reads the operands and writes the result, or multiplies, whichever takes longer."""
    m, n, k = row["m"], row["n"], row["k"]
    return max((n * k + m * k + 2 * m * n) / result["read_bytes_per_s"], 2 * m * n * k / peak(result)) * 1e6


def peak(result: Result) -> float:
    """The most operations a second that any INT8 candidate reached."""
    return max(2e6 * r["m"] * r["n"] * r["k"] / least(r, "given", but="_scaled_mm")[0] for r in result["rows"])


def gemm(result: Result) -> str:
    head = ("tokens", "bf16 `F.linear`", "quantkit from bf16", "faster", "quantkit from INT8", "of the floor")
    head += ("best CUTLASS tile", "`torch._int_mm`", "fp8 `_scaled_mm`")
    parts = []
    for n, k in dict.fromkeys((r["n"], r["k"]) for r in result["rows"]):
        rows = []
        for r in result["rows"]:
            if (r["n"], r["k"]) == (n, k):
                us = {name: times["cold"] for name, times in r["us"].items()}
                whole, given = us["bf16: quantkit"], us["given: quantkit"]
                cells = [us["bf16: F.linear"], whole, given, least(r, "given: CUTLASS")[0]]
                cells += [us.get(f"given: {name}", float("nan")) for name in ("torch._int_mm", "fp8 _scaled_mm")]
                base, whole_, given_, *others = ("" if c != c else f"{c:.1f}" if c < 1000 else f"{c:.0f}" for c in cells)
                share = f"{floor(r, result) / given:.0%}"
                rows.append((str(r["m"]), base, whole_, f"{cells[0] / whole:.2f}x", given_, share, *others))
        parts.append(f"Weight {n} x {k} (microseconds, weight read from memory):\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def load(result: Result) -> str:
    rows = []
    for r in result["rows"]:
        size, peak, largest = (r[key] / 2**20 for key in ("size", "peak", "largest_layer"))
        rows.append((r["variant"], f"{size:.0f}", f"{largest:.0f}", f"{peak:.0f}", f"{r['seconds']:.1f}"))
    return table(("", "model, MiB", "its largest layer in 16 bit", "peak", "seconds"), rows)


def checkpoint(result: Result) -> str:
    rows = [
        (r["step"], *(f"{r[key] / 2**20:.0f}" for key in ("bytes", "largest_shard", "peak")), f"{r['seconds']:.0f}")
        for r in result["rows"]
    ]
    return table(("", "files, MiB", "largest shard", "peak", "seconds"), rows)


def engine(result: Result) -> str:
    """Each served model: against quantkit on the same folder, against bf16 in the engine, and its speed."""
    rows = []
    for r in result["rows"]:
        if "decode_tok_s" not in r:
            continue
        cells = [f"{r[key]['difference']:+.4f} +- {r[key]['standard_error']:.4f}" if key in r else "" for key in GAPS]
        rows.append((r["model"], f"{r['engine_nll']:.4f}", *cells, f"{r['decode_tok_s']:.1f}", f"{r['prefill_tok_s']:.0f}"))
    return table(("", "nats per token", "less quantkit's own", "less bf16's", "decode tok/s", "prefill tok/s"), rows)


GAPS = ("to_quantkit", "to_bf16")


def outliers(result: Result) -> str:
    """Products with 16-bit columns beside the INT8 ones: fixed ones, or those that reach a threshold."""
    counts = [n for n in result["rows"][0]["us"] if n.startswith("bf16: quantkit, ")]
    rows = []
    for r in result["rows"]:
        us = {name: times["cold"] for name, times in r["us"].items()}
        plain, base = us["bf16: quantkit"], us["bf16: F.linear"]
        cells = (f"{us[n]:.1f} ({us[n] / plain - 1:+.0%}, {base / us[n]:.2f}x)" for n in counts)
        rows.append((str(r["m"]), f"{r['n']} x {r['k']}", f"{base:.1f}", f"{plain:.1f}", *cells))
    return table(("tokens", "weight", "bf16", "no columns", *(n.split(", ")[1] for n in counts)), rows)


def quantize(result: Result) -> str:
    """Activations to INT8, and what each step adds."""
    bases = ("residual, RMSNorm", "RMSNorm", "SiLU gate")
    names = list(result["rows"][0]["us"])

    def cell(us: dict[str, float], name: str) -> str:
        start = next((b for b in bases if name.startswith(b)), "quantize")
        return f"{us[name]:.1f}" if name == start else f"{us[name]:.1f} ({us[name] / us[start] - 1:+.0%})"

    rows = [[str(r["m"]), str(r["k"]), *(cell(r["us"], name) for name in names)] for r in result["rows"]]
    return table(("rows", "channels", *names), rows)


def segments(result: Result) -> str:
    """Products in segments of K, and what they cost over the plain one."""
    plain = "given: quantkit"
    names = [name for name in result["rows"][0]["us"] if name != plain]
    rows = []
    for r in result["rows"]:
        us = {name: times["cold"] for name, times in r["us"].items()}
        more = (f"{us[name]:.1f} ({us[name] / us[plain] - 1:+.1%})" if name in us else "" for name in names)
        rows.append((str(r["m"]), f"{r['n']} x {r['k']}", f"{us[plain]:.1f}", *more))
    return table(("tokens", "weight", "plain, us", *(n.removeprefix(f"{plain}, ") for n in names)), rows)


def peers(result: Result) -> str:
    """Libraries, all from bf16 activations."""
    result["rows"].sort(key=lambda r: (r["n"], r["k"], r["m"]))
    found = {n for r in result["rows"] for n in r["us"] if n.startswith("bf16: ")}
    names = sorted(found, key=lambda n: ("quantkit" not in n, n))
    rows = [
        (str(r["m"]), f"{r['n']} x {r['k']}", *(f"{r['us'][n]['cold']:.1f}" if n in r["us"] else "" for n in names))
        for r in result["rows"]
    ]
    return table(("tokens", "weight", *(n.removeprefix("bf16: ") for n in names)), rows) + "\n\n" + ahead(result)


def ahead(result: Result) -> str:
    """Where something else is faster."""
    lines = []
    for r in result["rows"]:
        for kind in ("given", "bf16"):
            if f"{kind}: quantkit" not in r["us"]:
                continue
            ours, (other, name) = r["us"][f"{kind}: quantkit"]["cold"], least(r, kind)
            if other < ours and "probe" not in name:
                lines.append((str(r["m"]), f"{r['n']} x {r['k']}", name.split(": ")[1], f"{ours / other - 1:.1%}"))
    if not lines:
        return "None of the measured candidates is faster at any of these shapes."
    return table(("tokens", "weight", "faster candidate", "by"), lines)


def roofline(result: Result) -> None:
    """A picture: operations a second over operations a byte, under the ceilings that this GPU was measured to have."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    bandwidth, top = result["read_bytes_per_s"], peak(result)
    ends = [1.0, top / bandwidth, 2e4]
    axes.plot(ends, [min(top, bandwidth * x) / 1e12 for x in ends], color="black", linewidth=1)
    axes.text(1.2, bandwidth * 1.6 / 1e12, f"memory, {bandwidth / 1e12:.2f} TB/s", rotation=33, fontsize=8)
    axes.text(2e3, top * 1.08 / 1e12, f"fastest product, {top / 1e12:.0f} TOPS", fontsize=8)
    for name, label, marker, bytes_each in (
        ("given: quantkit", "quantkit, INT8 activations given", "o", 1), ("bf16: F.linear", "bf16 F.linear", "x", 2)
    ):  # fmt: skip
        points = []
        for r in result["rows"]:
            m, n, k = r["m"], r["n"], r["k"]
            work = 2 * m * n * k
            points.append((work / (bytes_each * (n * k + m * k) + 2 * m * n), work / r["us"][name]["cold"] * 1e6 / 1e12))
        axes.scatter(*zip(*points, strict=True), label=label, marker=marker, s=16)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TOPS", title=result["device"]["gpu"])
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "images" / "roofline.png", dpi=110)


def model(result: Result) -> str:
    """Tokens a second of a whole model."""
    rows = []
    for r in result["rows"]:
        tokens = r["batch"] * r["length"]
        what = f"prefill {r['batch']} x {r['length']}" if r["kind"] == "prefill" else f"decode, batch {r['batch']}"
        base = r["s"]["bf16, compiled"]
        rows += [(what, name, f"{t * 1e3:.2f}", f"{tokens / t:.0f}", f"{base / t:.2f}x") for name, t in r["s"].items()]
    memory = result["memory"]
    lines = [
        f"Weights {memory[name]['weights'] / 2**30:.2f} GiB, peak in a prefill of 2048 tokens "
        f"{memory[name]['prefill_peak'] / 2**30:.2f} GiB ({name})."
        for name in memory
    ]
    return table(("", "", "ms", "tokens/s", "against bf16 compiled"), rows) + "\n\n" + "\n".join(lines)


def kernels(result: Result) -> str:
    """Where the time of a compiled model goes."""
    parts = []
    for r in result["rows"]:
        title = f"prefill {r['batch']} x {r['length']}" if r["kind"] == "prefill" else f"decode, batch {r['batch']}"
        for name, times in r["kernels_us"].items():
            rows = [(f"`{kernel[:60]}`", f"{us / 1e3:.2f}", f"{us / sum(times.values()):.0%}") for kernel, us in times.items()]
            parts.append(f"{title}, {name}:\n\n{table(('kernel', 'ms', 'share'), rows[:9])}")
    return "\n\n".join(parts)


def methods(result: Result) -> str:
    """One row for each scheme and method; several seeds as mean and range."""
    groups: dict[tuple[str, str, int], list[Result]] = defaultdict(list)
    for r in result["rows"]:
        groups[r["scheme"], r["method"], r["windows"]].append(r)

    def spread(rows: list[Result], name: str, digits: int) -> str:
        values = [r[name] for r in rows]
        text = f"{sum(values) / len(values):.{digits}f}"
        return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    def closeness(group: tuple[tuple[str, str, int], list[Result]]) -> tuple[str, float]:
        (scheme, _, _), rows = group
        return scheme, sum(r["kl"] for r in rows) / len(rows)

    head = ("scheme", "method", "seeds", "windows", "KL", "perplexity", "top-1", "seconds", "peak MiB")
    return table(
        head,
        (
            (
                scheme.upper(), method, str(len(rows)), str(windows), spread(rows, "kl", 4), spread(rows, "perplexity", 2),
                f"{median(r['top1'] for r in rows):.1%}", f"{median(r['quantize_s'] for r in rows):.0f}",
                f"{median(r['peak_MiB'] for r in rows):.0f}",
            )
            for (scheme, method, windows), rows in sorted(groups.items(), key=closeness, reverse=True)
        ),
    )  # fmt: skip


def heads(result: Result) -> str:
    """What an output head in INT8 adds to the error."""
    rows = [r for r in result["rows"] if not r["method"].startswith("FP8")]
    body = table(
        ("model", "method", "KL", "perplexity", "top-1"),
        ((r["model"], r["method"], f"{r['kl']:.4f}", f"{r['perplexity']:.3f}", f"{r['top1']:.1%}") for r in rows),
    )
    return f"{body}\n\n{result['windows']} windows of {result['length']} tokens."


def fp8(result: Result) -> str:
    """INT8 beside FP8, the same layers."""
    names = {"RTN": "INT8, naive", "SmoothQuant": "INT8, SmoothQuant", "best": 'INT8, `"best"`'}
    rows = [r for r in result["rows"] if r["method"] in names or r["method"].startswith("FP8")]
    body = table(
        ("model", "", "KL", "perplexity", "top-1"),
        (
            (
                r["model"], names.get(r["method"], r["method"]), f"{r['kl']:.4f}", f"{r['perplexity']:.3f}", f"{r['top1']:.1%}",
            )
            for r in sorted(rows, key=lambda r: (r["model"], -r["kl"]))
        ),
    )  # fmt: skip
    base = rows[0]["reference_perplexity"]
    return f"{body}\n\n{result['windows']} windows of {result['length']} tokens; perplexity of fp32: {base:.3f}."


def decode(result: Result) -> str:
    """Tokens per second of SmolLM2 on a CPU."""
    found: dict[str, dict[str, float]] = {}
    for r in result["rows"]:
        tokens = result["prefill"] if r["what"] == "prefill" else 1
        found.setdefault(r["name"], {})[r["what"]] = tokens / r["seconds"]["median"]
    columns = list(dict.fromkeys(r["what"] for r in result["rows"]))
    body = table(
        ("tokens/s", *columns),
        ((name, *(f"{own[c]:,.0f}" if c in own else "" for c in columns)) for name, own in found.items()),
    )
    return f"{body}\n\nMedians of {result['rounds']} rounds; SmolLM2-135M in float32 but for its INT8 layers."


def generate(result: Result) -> str:
    """A model of transformers on a GPU, as users call it."""
    rows = [r for r in result["rows"] if r["kind"] == "decode"]
    names = list(rows[0]["tokens_per_s"])
    decode = table(
        ("tokens/s of generate()", *(f"{r['batch']} x {r['context']:,}" for r in rows)),
        ((name, *(f"{r['tokens_per_s'][name]:,.0f}" for r in rows)) for name in names),
    )
    ready = table(
        ("seconds until it is so", *(f"{r['batch']} x {r['context']:,}" for r in rows)),
        ((name, *(f"{max(r['ready_s'][name], 0):.1f}" for r in rows)) for name in names if name in rows[0]["ready_s"]),
    )
    some = [r for r in result["rows"] if r["kind"] == "prefill"]
    prefill = table(
        ("milliseconds of a forward, eager", *(r["size"] for r in some)),
        ((name, *(f"{r['s'][name]['median'] * 1e3:.1f}" for r in some)) for name in some[0]["s"]),
    )
    return f"{decode}\n\n{ready}\n\n{prefill}\n\nMedians; {result['layers']} layers, {result['new']} tokens a call."


def host(result: Result) -> str:
    """What the call of a layer costs the host."""
    names = list(dict.fromkeys(name for r in result["rows"] for name in r["us"]))
    return table(
        ("us a call", *(f"{r['m']} x {r['k']} to {r['n']}" for r in result["rows"])),
        ((name, *(f"{r['us'][name]['median']:.1f}" if name in r["us"] else "" for r in result["rows"])) for name in names),
    )


def architectures(result: Result) -> str:
    """What became of every class of models; where several results have one, the last counts."""
    rows = list({r["model"]: r for r in result["rows"]}.values())
    ran = [r for r in rows if r["status"] != "not tried"]
    counted = []
    for task, some in itertools.groupby(sorted(ran, key=lambda r: r["task"]), key=lambda r: r["task"]):
        of_task = list(some)
        right = [r for r in of_task if r["status"] == "right" and r["sqnr_db"] is not None and r["expected_db"] is not None]
        status = (sum(r["status"] == s for r in of_task) for s in ("right", "refused", "wrong"))
        ahead = median(r["sqnr_db"] - r["expected_db"] for r in right) if right else 0.0
        counted.append((task.lower().replace("_", " "), *map(str, status), f"{ahead:+.1f} dB"))
    total = ("all", *(str(sum(int(c[i]) for c in counted)) for i in (1, 2, 3)), "")
    head = ("task", "right", "refused", "wrong", "end to end beside what layers predict (median)")
    return f"{table(head, [*counted, total])}\n\n{table(*_one_by_one(ran))}"


def _one_by_one(rows: list[Result]) -> tuple[Iterable[str], Iterable[Iterable[str]]]:
    head = ("class", "", "linears in INT8", "weights in INT8", "scheme=None", "W8A8", "predicted", "remark")

    def decibels(value: float | None) -> str:
        return "" if value is None else f"{value:.1f} dB"

    def cells(r: Result) -> Iterable[str]:
        remark = r.get("why", "") if r["status"] != "right" else r.get("from_pretrained", "")
        remark = remark if isinstance(remark, str) else ""
        remark = re.sub(r"\s+", " ", remark).replace("|", "/")
        if r["status"] != "right":
            return (r["model"], r["status"], "", "", "", "", "", remark[:160])
        int8 = f"{r['int8']} of {r['linears']}", f"{r['share']:.0%}"
        return (
            r["model"],
            "right",
            *int8,
            f"{r['folding']:.0e}",
            decibels(r["sqnr_db"]),
            decibels(r["expected_db"]),
            remark[:160],
        )

    return head, (cells(r) for r in rows)


# Marker -> glob over the names of results, whose rows make one table, and what writes it.
TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "demo": ("demo", demo),
    "accuracy": ("accuracy", accuracy),
    "accuracy-llmcompressor": ("accuracy-llmcompressor", accuracy),
    "accuracy-llmint8": ("accuracy-llmint8", accuracy),
    "accuracy-rotation": ("accuracy-rotation", rotation),
    "accuracy-blocks": ("accuracy-blocks", blocks),
    "accuracy-compositions": ("accuracy-blocks", rotation),
    "accuracy-bits": ("accuracy-bits", bits),
    "accuracy-exported": ("accuracy-exported", rotation),
    "encoder": ("encoder", encoder),
    "encoder-bits": ("encoder", bits),
    "accuracy-rptq": ("accuracy-rptq", twins),
    "accuracy-rptq-bits": ("accuracy-rptq-bits*", twins),
    "accuracy-rptq-regimes": ("accuracy-rptq-regimes*", twins),
    "load": ("load", load),
    "load-gpu": ("load-gpu", load),
    "checkpoint": ("checkpoint", checkpoint),
    "engine": ("engine", engine),
    "sites": ("accuracy", sites),
    "cpu": ("cpu", cpu),
    "cpu-rotation": ("cpu-rotation", cpu_rotation),
    "cpu-clusters": ("cpu-clusters", cpu_clusters),
    "gemm": ("gemm", gemm),
    "ahead": ("gemm", ahead),
    "outliers": ("outliers", outliers),
    "outliers-bitsandbytes": ("outliers-bitsandbytes", peers),
    "peers": ("peers-*", peers),
    "methods": ("methods*", methods),
    "model": ("model", model),
    "model-rotated": ("model-rotated", model),
    "quantize": ("quantize", quantize),
    "segments": ("gemm-segments", segments),
    "kernels": ("model", kernels),
    "accuracy-heads": ("accuracy-heads*", heads),
    "fp8": ("accuracy-heads*", fp8),
    "decode": ("decode", decode),
    "decode-vnni": ("decode-vnni", decode),
    "decode-avx2": ("decode-avx2", decode),
    "generate": ("generate", generate),
    "host": ("host", host),
    "architectures": ("architectures-*", architectures),
}


def fill(text: str) -> str:
    """``text`` with the body of every marker replaced."""

    def body(match: re.Match[str]) -> str:
        source, render = TABLES[match[1]]
        paths = sorted((ROOT / "benchmarks" / "results").glob(f"{source}.json"))
        results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        result = results[0]
        if len(results) > 1:
            result |= {"rows": [r for one in results for r in one["rows"]]}
        origins = "\n".join(map(origin, results))
        return f"<!-- results:{match[1]} -->\n{render(result)}\n\n{origins}\n<!-- /results:{match[1]} -->"

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
    if not check:
        roofline(json.loads((ROOT / "benchmarks" / "results" / "gemm.json").read_text(encoding="utf-8")))
    print(*stale or ["every table is up to date"], sep="\n")
    sys.exit(bool(stale) if check else 0)


if __name__ == "__main__":
    main()

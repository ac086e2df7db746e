"""Quantizes tiny models in many ways and writes down the bits that come out: of every tensor, and of the outputs.

    python tests/bits/record.py --out tests/bits/record.json                      # all of it, 3 minutes on one core
    python tests/bits/record.py --models llama --only 'gptq/*' --out /tmp/x.json  # a part of it

It uses nothing of quantkit but public names, so that it runs on any version, whatever its inside looks like; PYTHONPATH chooses
one. It starts itself again in the environment of pinned.py, which makes float arithmetic the same on different processors. The
record of one version is compared with that of another in test_same_bits.py.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import logging
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pinned import pin

if __name__ == "__main__":
    pin()  # before anything loads PyTorch

import torch
import transformers
from digests import arithmetic, digest, exact_roots
from models import MODELS, tokens
from torch import Tensor, nn

import quantkit
from quantkit import GPTQ, RPTQ, Hadamard, LLMInt8, OmniQuant, Rotate, SmoothQuant

METHODS: dict[str, Callable[[], Any]] = {
    "rtn": lambda: "rtn",
    "smoothquant": lambda: "smoothquant",
    "best": lambda: "best",
    "columns": lambda: LLMInt8(columns=4),
    "threshold": lambda: LLMInt8(threshold=3.0),
    "rotate": lambda: "rotate",
    "rptq": lambda: "rptq",
    "gptq": lambda: "gptq",
    "omniquant": lambda: [SmoothQuant(), OmniQuant(samples=8, epochs=1)],
    "smoothquant+columns+gptq": lambda: ["smoothquant", LLMInt8(columns=4), "gptq"],
    "columns+rptq+hadamard": lambda: [LLMInt8(columns=4), RPTQ(clusters=4), Hadamard()],
    "rotate+smoothquant+hadamard": lambda: [Rotate(), SmoothQuant(0.5), Hadamard()],
    "kmeans+gptq": lambda: [RPTQ(clusters=4, by="kmeans"), GPTQ()],
}
PARTS: dict[str, Callable[[], Any]] = {"hadamard": lambda: "hadamard"}
"""Methods that those above contain: they are not tried in every scheme."""
SCHEMES = ("w8a8", "w8a8-asym", "w8a8-static-asym", "w4a4", "w4a16-kv4")
EXTRA: list[tuple[str, str | None]] = [
    ("hadamard", "w8a8"),
    ("rptq", "w4a4-static-asym-norm8-kv4-attention4"),  # clusters of the channels of heads, with ranges
    ("rtn", "w4a8-kv8-attention8"),  # attention without ranges
    ("smoothquant", "w8a8-static-pertensor"),
    ("best", None),  # the model stays in floating point: what folds, and nothing else
]
"""What the table of methods and schemes leaves out."""
BACKENDS = ("reference", "cpu")
DIGITS = 4
"""Hexadecimal digits kept of the digest of one tensor: enough to name those that differ, where the whole digest does."""
ABSENT = "-" * DIGITS


def combinations() -> list[tuple[str, str | None]]:
    return [(method, scheme) for method in METHODS for scheme in SCHEMES] + EXTRA


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


def record_of(name: str, only: str) -> dict[str, Any]:
    """What becomes of one model."""
    model = MODELS[name]()
    data, ids = [tokens(seed=seed) for seed in range(4)], tokens(length=20, seed=9)
    plain = {"state": digest(model.state_dict().items()), "logits": digest([("logits", logits(model, ids))])}
    results = {}
    for method, scheme in combinations():
        key = f"{method}/{scheme}"
        if fnmatch.fnmatch(key, only):
            results[key] = result_of(copy.deepcopy(model), (METHODS | PARTS)[method](), scheme, data, ids)
    names = sorted({name for result in results.values() for name in result.get("tensors", ())})
    for result in results.values():  # names are long, and much the same in all results: they are written down once
        if "tensors" in result:
            result["tensors"] = "".join(result["tensors"].get(name, ABSENT) for name in names)
    return {"float": plain, "names": names, "results": results}


def tensors_of(record: dict[str, Any], key: str) -> dict[str, str]:
    """Name -> short digest of each tensor of one result in what :func:`record_of` returns; none where it was refused."""
    text = record["results"][key].get("tensors", "")
    parts = [text[i : i + DIGITS] for i in range(0, len(text), DIGITS)]
    return {name: part for name, part in zip(record["names"], parts, strict=False) if part != ABSENT}


def result_of(model: nn.Module, method: Any, scheme: str | None, data: list[Tensor], ids: Tensor) -> dict[str, Any]:
    """Digests of the quantized model and of its outputs, or the class of the error that refuses the combination."""
    torch.manual_seed(0)
    try:
        quantkit.quantize(model, method, calibration=data, scheme=scheme, progress=False)
        state = model.state_dict()
        result: dict[str, Any] = {
            "state": digest(state.items()),
            "tensors": {name: digest([(name, tensor)])[:DIGITS] for name, tensor in state.items()},
        }
        for backend in BACKENDS:
            with quantkit.use_backend(backend):
                result[backend] = digest([("logits", logits(model, ids))])
    except quantkit.QuantkitError as error:
        return {"error": type(error).__name__}
    except Exception as error:  # noqa: BLE001  a crash must not hide what else differs: it is told like a difference
        traceback.print_exc()
        return {"error": f"{type(error).__name__}, which is no QuantkitError"}
    return result


def commit() -> str | None:
    """Of the quantkit that is running, with a plus sign if its files were changed since."""
    git = ["git", "-C", str(Path(quantkit.__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--", "."], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.strip() else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write; the standard output if left out")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--only", default="*", metavar="GLOB", help="methods and schemes to run, such as 'gptq/w8a8*'")
    arguments = parser.parse_args()
    exact_roots()
    logging.getLogger("quantkit").setLevel(logging.ERROR)  # which schemes are simulations is known
    print(f"quantkit of {quantkit.__file__}", file=sys.stderr)
    made_with = {
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    models = {name: record_of(name, arguments.only) for name in arguments.models}
    text = json.dumps({"made_with": made_with, "arithmetic": arithmetic(), "models": models}, indent=1, sort_keys=True) + "\n"
    if arguments.out is None:
        sys.stdout.write(text)
    else:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

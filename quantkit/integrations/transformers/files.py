"""The files that transformers has beside the tensors of a model: writing them, and making an empty model from them.

A checkpoint of quantkit's names the class of its model, and the class makes an empty model from ``config.json``. Only classes
that transformers itself has are made: code that a folder brings along is never run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from quantkit.checkpoint.files import read_object
from quantkit.checkpoint.load import Checkpoint
from quantkit.checkpoint.record import RECORD_FILE, attention_records, version_of
from quantkit.core.errors import CheckpointError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
CLASS_KEY = "transformers_class"
"""The key of the record that names the class of a model, or holds null for a module of any other library."""
PIP_HINT = "pip install 'quantkit-w8a8[transformers]'"


def class_name(model: Any) -> str | None:
    """The name of a class of transformers' own; None for any other module, which ``config.json`` alone could not make."""
    known = type(model).__module__.startswith("transformers.") and hasattr(model, "config")
    return type(model).__name__ if known else None


def write_beside(model: Any, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Write the configurations of a transformers model, and a tokenizer if there is one, into a checkpoint of quantkit's.

    Returns:
        What the record has to say about the model.
    """
    name = class_name(model)
    if name is not None:
        config = model.config.to_dict()
        config.pop("_name_or_path", None)
        config["architectures"] = [name]
        # Engines refuse what they do not know; plain transformers only warns, and then finds codes of another shape.
        version = version_of(attention_records(model))
        config["quantization_config"] = {"quant_method": "quantkit", "format_version": version}
        (folder / CONFIG).write_text(json.dumps(config, indent=1, default=str), encoding="utf-8")
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return {CLASS_KEY: name}


def recorded_class(checkpoint: Checkpoint) -> str | None:
    """The class that the record of a checkpoint names.

    Raises:
        CheckpointError: the record does not say, or says no name.
    """
    name = checkpoint.record.get(CLASS_KEY, 0)
    if not isinstance(name, str | None):
        raise CheckpointError(f"{checkpoint.folder / RECORD_FILE} is damaged: {CLASS_KEY!r} is missing or malformed")
    return name


def empty_model(folder: Path, name: str | None) -> nn.Module:
    """A model of the class called ``name`` as ``config.json`` describes it, its parameters on the meta device.

    Raises:
        CheckpointError: there is no such class, it cannot be made, or transformers is not installed.
    """
    if name is None:
        raise CheckpointError(
            f"{folder} is no transformers model: pass a fresh instance, quantkit.load(path, model=MyModel(...))"
        )
    cls = model_class(folder, name)
    try:
        from accelerate import init_empty_weights
        from transformers import GenerationConfig
    except ImportError as error:
        raise CheckpointError(f"{folder} is a transformers model: {PIP_HINT} ({error})") from None
    config = read_object(folder, CONFIG)
    config.pop("quantization_config", None)
    try:
        with init_empty_weights(include_buffers=False):
            model: Any = cls._from_config(cls.config_class.from_dict(config))
        if (folder / GENERATION_CONFIG).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever transformers makes of a config that it did not write
        raise CheckpointError(f"{folder}: {name} cannot be made from {CONFIG}: {error}") from error
    return model


def model_class(folder: Path, name: str) -> Any:
    """The class of transformers that a folder asks for by name.

    Raises:
        CheckpointError: transformers is not installed, or has no class of models of this name.
    """
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(f"{folder} is a transformers model: {PIP_HINT} ({error})") from None
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(f"{folder}: this transformers has no model class {name!r}")
    return found

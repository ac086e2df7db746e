"""The files that transformers has beside the tensors of a model: writing them, and making an empty model from them.

A checkpoint of quantkit's names the class of its model, and the class makes an empty model from ``config.json``. Only classes
that transformers itself has are made: code that a folder brings along is never run, and none is fetched because a folder says
so. A model is first made without any memory, so that a file cannot ask for one that its tensors do not fill.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.files import read_object
from quantkit.checkpoint.load import Checkpoint
from quantkit.checkpoint.record import RECORD_FILE, attention_records, version_of
from quantkit.core.errors import CheckpointError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
CLASS_KEY = "transformers_class"
"""The key of the record that names the class of a model, or holds null for a module of any other library."""
MOST_LAYERS, SPARE, SPARE_BYTES = 10_000, 2_000, 2**30
"""How much a configuration may ask for whatever is stored: layers, parameters, and bytes of buffers."""
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


def read_config(folder: Path) -> dict[str, Any]:
    """What ``config.json`` holds, if it names nothing that would be fetched from elsewhere.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it names kernels of a hub.
    """
    config = read_object(folder, CONFIG)
    for key, value in _entries(config):
        if key.endswith("_implementation") and isinstance(value, str) and not value.replace("_", "").isalnum():
            raise CheckpointError(f"{folder / CONFIG} has {key} {value!r}, which is code of a hub: refused")
    return config


def _entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of nested JSON with its value; what is in a list or under an implementation of parts has the key around it."""
    items = value.items() if isinstance(value, dict) else [("", item) for item in value] if isinstance(value, list) else []
    for own, item in items:
        inner = own if own and not key.endswith("_implementation") else key
        yield inner, item
        yield from _entries(item, inner)


def empty_model(folder: Path, name: str | None, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model of the class called ``name`` as ``config.json`` describes it, its parameters on the meta device.

    Args:
        folder: where the configuration is.
        name: of the class.
        tensors: what the model will be filled with, which bounds its size.

    Raises:
        CheckpointError: there is no such class, it cannot be made, it is much larger than what is stored, or transformers
            is not installed.
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
    config = read_config(folder)
    config.pop("quantization_config", None)
    generation = read_object(folder, GENERATION_CONFIG) if (folder / GENERATION_CONFIG).is_file() else None
    try:
        check_counts(config, len(tensors))
        with at_most(len(tensors)):
            _check_buffers(cls, config, sum(t.nbytes for t in tensors.values()))
            with init_empty_weights(include_buffers=False):
                model: Any = cls._from_config(cls.config_class.from_dict(copy.deepcopy(config)))
        if generation is not None:
            model.generation_config = GenerationConfig.from_dict(generation)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except Exception as error:  # whatever transformers makes of a config that it did not write
        raise CheckpointError(f"{folder}: {name} cannot be made from {CONFIG}: {error}") from error
    return model


def check_counts(config: Mapping[str, Any], stored: int) -> None:
    """Raise a CheckpointError if a configuration asks for many more layers than there are tensors: lists are made of them."""
    for key, value in _entries(config):
        layers = any(word in key for word in ("layer", "depth", "block"))
        if layers and isinstance(value, (int, float)) and value > max(MOST_LAYERS, stored):
            raise CheckpointError(
                f"{CONFIG} has {key} {value}, and {stored} tensors are stored: it is of another model, or damaged"
            )


@contextmanager
def at_most(stored: int) -> Iterator[None]:
    """Inside, making models ends in a CheckpointError once they have many more parameters than tensors are ``stored``."""
    register, left = nn.Module.register_parameter, 8 * stored + SPARE

    def counted(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal left
        left -= param is not None
        if left < 0:
            raise CheckpointError(f"{CONFIG} asks for a model of many more tensors than the {stored} that are stored: refused")
        register(module, name, param)

    nn.Module.register_parameter = counted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _check_buffers(cls: Any, config: dict[str, Any], nbytes: int) -> None:
    """Raise a CheckpointError if the model has buffers much larger than all that is stored: these get memory at once."""
    try:
        with torch.device("meta"):
            model = cls._from_config(cls.config_class.from_dict(copy.deepcopy(config)))
    except CheckpointError:
        raise
    except Exception:  # noqa: BLE001  some classes look at values, which are not there; the attempt with memory says what is wrong
        return
    size = sum(buffer.nbytes for buffer in model.buffers())
    if size > nbytes + SPARE_BYTES:
        raise CheckpointError(
            f"{CONFIG} asks for buffers of {size / 2**30:.1f} GiB, and {nbytes / 2**30:.1f} GiB are stored: refused"
        )


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

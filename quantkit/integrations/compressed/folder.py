"""Folders in the compressed-tensors layout, from whoever made them: everything that can be refused is refused here.

The files are looked at before transformers sees them: what the JSON asks for, whether the tensors are where the index says, and
whether anything points to code or to files elsewhere. The layout has no hashes, so damaged values are not found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint.files import inside, read_object
from quantkit.checkpoint.record import RECORD_FILE
from quantkit.checkpoint.tensors import read_headers
from quantkit.core.errors import CheckpointError
from quantkit.integrations.compressed.layout import METHOD, parse
from quantkit.integrations.transformers.files import CONFIG, PIP_HINT, at_most, check_counts, read_config
from quantkit.integrations.transformers.register import register_with_transformers

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
"""The files that transformers and the engines look for: one that says in which file each tensor is, or one with all tensors."""


@contextmanager
def compressed_tensors_as_int8() -> Iterator[None]:
    """Inside, ``from_pretrained`` of transformers gives W8A8 checkpoints of compressed-tensors INT8 layers that stay INT8.

    Outside, and by default, transformers turns them into 16 bit at the first forward. What the tables of transformers had for
    this layout comes back, whatever happens inside.

    Raises:
        ImportError: transformers is not installed.
    """
    register_with_transformers()  # the model that comes out is one of quantkit's, and may be saved and opened as such
    from quantkit.integrations.compressed.load import replaced

    with replaced():
        yield


def is_compressed(folder: Path) -> bool:
    """Whether a folder is in the compressed-tensors layout by its ``config.json``, and is no checkpoint of quantkit's own."""
    if (folder / RECORD_FILE).is_file() or not (folder / CONFIG).is_file():
        return False
    config = read_object(folder, CONFIG).get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == METHOD


def open_compressed(folder: Path, model: nn.Module | None, device: torch.device | str) -> nn.Module:
    """The model of a folder in the compressed-tensors layout, with INT8 layers of quantkit's.

    Args:
        folder: where it is.
        model: what the caller of :func:`quantkit.load` wants filled, which has to be nothing.
        device: where the model shall be.

    Raises:
        CheckpointError: the folder cannot be run by quantkit, is damaged, or is not safe; says which.
    """
    if model is not None:
        raise CheckpointError(f"{folder} is a transformers model, which load() makes itself: leave model= out")
    config = read_config(folder)
    try:
        parse(config["quantization_config"])
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    names = config.get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise CheckpointError(f"{folder / CONFIG} names no class of model in 'architectures'")
    for key in ("transformers_weights", "auto_map"):
        if config.get(key):
            raise CheckpointError(f"{folder / CONFIG} has {key!r}, which points to files or code of its own: refused")
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder} holds an adapter beside the model: refused")
    stored = read_headers(folder, _weight_files(folder))
    if not any(found.dtype == "I8" for found in stored.values()):
        raise CheckpointError(f"{folder}: no tensor holds INT8 codes, and {CONFIG} says that some do")
    try:
        from quantkit.integrations.compressed.load import load_compressed
    except ImportError as error:
        raise CheckpointError(f"{folder} is a transformers model: {PIP_HINT} ({error})") from None
    try:
        check_counts(config, len(stored))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    with at_most(len(stored)):
        return load_compressed(folder, names[0], device)


def _weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files of a folder, each found in it, with the tensors that the index says."""
    if not (folder / INDEX).exists():
        return [inside(folder, WEIGHTS, CONFIG).name]
    places: Any = read_object(folder, INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map from tensors to files")
    files = sorted(set(places.values()))
    for name in files:
        if not inside(folder, name, INDEX).name.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX} lists {name!r}, which is no safetensors file: refused")
    held = read_headers(folder, files)
    for name, file in places.items():
        if name not in held or held[name].file.name != file:
            raise CheckpointError(f"tensor {name!r} is missing from {folder / file}, where the index has it")
    surplus = next((name for name in held if name not in places), None)
    if surplus is not None:
        raise CheckpointError(f"tensor {surplus!r} of {held[surplus].file} is not in the index")
    return files

"""``quantkit.save`` and ``quantkit.load``: folders of quantized models, whatever library the model is from.

quantkit's own format is the business of :mod:`quantkit.checkpoint`. What is added here is what transformers wants beside the
tensors, models that are made from ``config.json`` alone, and folders in the compressed-tensors layout.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint.files import as_one
from quantkit.checkpoint.load import Checkpoint, fill, open_checkpoint
from quantkit.checkpoint.record import RECORD_FILE
from quantkit.checkpoint.rerun import run_again
from quantkit.checkpoint.save import write_checkpoint
from quantkit.integrations.compressed.folder import is_compressed, open_compressed
from quantkit.integrations.transformers.files import empty_model, recorded_class, write_beside
from quantkit.model.compiled import uncompiled


def save(model: nn.Module, path: str | os.PathLike[str], *, tokenizer: Any = None, shard_bytes: int = 4 * 2**30) -> Path:
    """Write a quantized model to the folder ``path``.

    The folder holds safetensors files, the record ``quantkit.json``, what the model says to an input with made-up numbers,
    and for transformers models ``config.json`` and ``generation_config.json``. It appears whole or not at all. Tensors are
    written one by one, so that a model on a GPU needs main memory for its largest tensor only.

    Args:
        model: a model that :func:`quantkit.quantize` returned.
        path: a folder that does not exist, is empty, or holds a quantkit checkpoint (which is replaced as a whole).
        tokenizer: a transformers tokenizer to put beside the model.
        shard_bytes: largest size of one safetensors file, in bytes.

    Returns:
        The folder.

    Raises:
        ModelError: quantkit has not quantized the model.
        CheckpointError: the folder holds something else.
    """
    model = uncompiled(model)
    return write_checkpoint(model, path, shard_bytes=shard_bytes, beside=lambda folder: write_beside(model, folder, tokenizer))


@torch.inference_mode(False)
def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> nn.Module:
    """Open a checkpoint that :func:`save` wrote, or a W8A8 INT8 checkpoint in the compressed-tensors layout.

    The latter is what :func:`quantkit.export` and other tools write; its layers become INT8 layers of quantkit.

    Args:
        path: the folder.
        model: for a module that is not from transformers: a fresh float instance of the same architecture, filled in
            place and returned. Nothing is changed if the checkpoint does not fit; what is found at the end, when the model
            is run, leaves it filled.
        device: where to put it.
        verify: compare the SHA-256 of every file first; and run the model at the end on made-up numbers, which the folder holds
            with what the model said to them when it was saved.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: the folder is missing, truncated, tampered with, of a newer format, not safe, or of another model; or
            the opened model does not say what the saved one said.
    """
    folder = Path(path)

    def opened() -> tuple[Checkpoint | None, nn.Module]:
        if is_compressed(folder):
            return None, open_compressed(folder, model, device)
        checkpoint = open_checkpoint(folder, verify=verify)
        name = recorded_class(checkpoint)
        return checkpoint, empty_model(folder, name, checkpoint.tensors) if model is None else uncompiled(model)

    checkpoint, found = as_one(folder, opened)
    if checkpoint is None:
        return found
    filled = fill(found, checkpoint, device)
    if verify and checkpoint.check is not None:
        run_again(filled, checkpoint.check, checkpoint.report)
    return filled if model is None else model


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a folder that :func:`load` opens, in either layout."""
    return (Path(path) / RECORD_FILE).is_file() or is_compressed(Path(path))

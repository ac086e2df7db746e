"""Writing a quantized model to a folder: its tensors, whatever the caller puts beside them, and at last the record."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from quantkit.checkpoint.files import check_target, files_of, sha256_of, written_whole
from quantkit.checkpoint.record import (
    RECORD_FILE,
    attention_records,
    cast_buffers,
    codes_apart,
    digest_of,
    layer_records,
    version_of,
)
from quantkit.checkpoint.rerun import write_check
from quantkit.checkpoint.tensors import Entry, unshared, write_shards
from quantkit.core.report import report

WHAT = "quantkit checkpoint"


def is_own(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, which another may replace."""
    return (folder / RECORD_FILE).is_file()


def check_place(target: Path) -> None:
    """Raise a CheckpointError if a checkpoint must not or cannot be written to ``target``, see :func:`check_target`."""
    check_target(target, is_own, WHAT)


def write_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    shard_bytes: int,
    beside: Callable[[Path], dict[str, Any]],
) -> Path:
    """Write a quantized model to the folder ``path``, which exists as a whole afterwards or is as it was.

    Args:
        model: a model with a report.
        path: a folder that does not exist, is empty, or holds a checkpoint of quantkit's (which is replaced as a whole).
        shard_bytes: largest size of one safetensors file, in bytes.
        beside: called with the folder while it is written; may put files into it, and returns keys for the record.

    Returns:
        The folder.

    Raises:
        ModelError: quantkit has not quantized the model.
        CheckpointError: the folder holds something else.
    """
    record, target = report(model), Path(path)
    tensors, tied = unshared(codes_apart(model, model.state_dict()))
    attention, cast = attention_records(model), cast_buffers(model)
    entries = [Entry.of(name, tensor) for name, tensor in tensors.items()]
    with written_whole(target, is_own, WHAT, sum(entry.nbytes for entry in entries)) as folder:
        write_shards(entries, folder, shard_bytes)
        more = {"check": write_check(model, folder), **beside(folder)}
        body = {
            "format": "quantkit",
            "format_version": version_of(attention),
            **more,
            "layers": layer_records(model),
            **({"attention": attention} if attention else {}),
            "tied": tied,
            **({"cast": cast} if cast else {}),
            "files": {
                name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size} for name in files_of(folder)
            },
            "report": record.to_dict(),
        }
        body["digest"] = digest_of(body)
        (folder / RECORD_FILE).write_text(json.dumps(body, indent=1), encoding="utf-8")
    return target

"""Folders that appear whole or not at all, and files from strangers that are looked at before they are believed.

Whoever publishes a checkpoint chooses the names that its JSON lists. A name is therefore only ever that of a plain file in the
same folder: no path, no link that leads elsewhere. JSON is read up to a size that no honest file exceeds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.core.errors import CheckpointError

MAX_JSON_BYTES = 64 * 2**20
FILE_NAME = re.compile(r"[\w\- ][\w.\- ]{0,200}")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place at the end, or vanishes if anything fails inside.

    A folder that was there before comes back where the exchange itself fails.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    previous = None
    try:
        folder.chmod(0o755)
        yield folder
        for file in folder.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            previous = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, previous)
        os.replace(folder, target)
        if previous is not None:
            shutil.rmtree(previous, ignore_errors=True)
    except BaseException:
        if previous is not None and not target.exists():
            os.replace(previous, target)  # the old folder was already out of the way
        elif previous is not None:
            shutil.rmtree(previous, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        raise


def inside(folder: Path, name: str, said_by: str) -> Path:
    """The file called ``name`` in ``folder``, where ``said_by`` is the file that lists this name.

    Raises:
        CheckpointError: the name is a path, the file is a link that leaves the folder, or there is no such file.
    """
    file = folder / name
    if not FILE_NAME.fullmatch(name):
        raise CheckpointError(f"{folder / said_by} lists {name!r}, a path outside the checkpoint: refused")
    if file.is_symlink() and file.resolve().parent != folder.resolve() and not _is_hub_cache(file):
        raise CheckpointError(f"{file} is a link that leaves the checkpoint: refused")
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    return file


def _is_hub_cache(file: Path) -> bool:
    """Whether a link is one that huggingface_hub makes: its snapshots are links into ``../../blobs`` of the same repository."""
    return file.parent.parent.name == "snapshots" and file.resolve().parent == (file.parent.parent.parent / "blobs").resolve()


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        CheckpointError: it is larger than :data:`MAX_JSON_BYTES`, or no JSON.
    """
    if file.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{file} is larger than {MAX_JSON_BYTES >> 20} MiB: refused")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file ``name`` of ``folder``.

    Raises:
        CheckpointError: there is no such file inside the folder, or it holds something else.
    """
    file = inside(folder, name, name)
    body = read_json(file)
    if not isinstance(body, dict):
        raise CheckpointError(f"{file} is damaged: it holds no JSON object")
    return body


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

"""Finished work kept in a folder, so that a run that was interrupted can go on and end with the same bits.

A method that takes hours does so in pieces: one block of the model after the other. When a piece is done, its result is written
into a file of its own: named tensors, a few numbers, and a *key*. The key is a hash of everything that the result was made
from, such as the weights, the data, the options and the pieces before it (:class:`Fingerprint` computes it). When the run is
repeated, a piece is read back if there is a file with the same key. A file with another key belongs to another run and is
refused, never overwritten.

A file is either whole or not there: it is written under another name, flushed to the disk, and renamed. It has a hash of its
own content, and the folder is locked while somebody works in it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantkit.core.errors import MethodError
from quantkit.core.locks import HeldError, lock
from quantkit.model.modules import memory_of


class Fingerprint:
    """A SHA-256 hash of texts and tensors, in the order in which they are added.

    Args:
        start: the first text, such as the key of the piece of work before this one.
    """

    def __init__(self, start: str) -> None:
        self._digest = hashlib.sha256(start.encode())

    def add(self, *parts: str | Tensor | None) -> None:
        """Take in texts as UTF-8, tensors as their bytes in memory (without dtype and shape), and None as a mark of its own."""
        for part in parts:
            if isinstance(part, Tensor):
                here = part.detach().cpu().contiguous()  # has a name, since memory_of() does not keep its tensor alive
                if here.numel():
                    self._digest.update(memory_of(here))
            else:
                self._digest.update(b"-" if part is None else part.encode())

    @property
    def key(self) -> str:
        """The hash of all that was added so far, 64 hexadecimal digits."""
        return self._digest.hexdigest()


@dataclass(frozen=True)
class Work:
    """The result of one piece of work.

    Attributes:
        tensors: by name.
        numbers: a few numbers besides; they come back to the last bit.
    """

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, float]


class Store:
    """A folder with one safetensors file for each finished piece of work; ``with`` makes it and locks it.

    Args:
        folder: where.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._held: int | None = None

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held = lock(self.folder)
        except HeldError:
            raise MethodError(f"{self.folder} is in use by another run: wait until it ends, or choose another folder") from None
        except OSError as error:
            raise MethodError(f"{self.folder} cannot be used for finished work: {error}") from error
        for unfinished in self.folder.glob("*.new"):
            unfinished.unlink()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def write(self, name: str, key: str, work: Work) -> None:
        """Write a finished piece of work to the file called ``name``, whole or not at all.

        Raises:
            MethodError: the system refuses.
        """
        file = self._file(name)
        new = file.with_suffix(".new")
        tensors = {name: t.detach().cpu().contiguous() for name, t in work.tensors.items()}
        facts = {"key": key} | {name: float(number).hex() for name, number in work.numbers.items()}
        try:
            save_file(tensors, new, metadata=facts | {"content": _content(tensors, facts)})
            with new.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(new, file)
        except (SafetensorError, OSError) as error:
            raise MethodError(f"{file} cannot be written: {error}") from error

    def read(self, name: str, key: str, tensors: Mapping[str, Tensor], numbers: Collection[str]) -> Work | None:
        """The piece of work in the file called ``name``, on the CPU; None if there is no such file, so that it has to be done.

        Args:
            name, key: as they were written.
            tensors: tensors with the names, shapes and types that the file should have.
            numbers: the names of the numbers that it should have.

        Raises:
            MethodError: the file is damaged, or was written by another run.
        """
        file = self._file(name)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as handle:
                facts = handle.metadata() or {}
                stored = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  safe_open is no mapping
            if facts.pop("content", None) != _content(stored, facts):
                raise ValueError("its content is not what was written")
            work = Work(stored, {name: float.fromhex(facts[name]) for name in numbers})
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise MethodError(f"{file} is damaged: delete it, and what it holds is computed again ({error})") from None
        if facts.get("key") != key or _forms(stored) != _forms(tensors):
            raise MethodError(
                f"{file} is of another run (model, data, options or earlier blocks differ): choose another folder"
            )
        return work

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _content(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """A hash of everything in a file."""
    whole = Fingerprint(repr(sorted(facts.items())))
    for name in sorted(tensors):
        whole.add(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}", tensors[name])
    return whole.key


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (t.shape, t.dtype) for name, t in tensors.items()}

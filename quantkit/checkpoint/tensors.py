"""Safetensors files, read and written one tensor at a time.

A safetensors file is the length of a header, the header as JSON (name, type, shape and place of every tensor), and then the
bytes of the tensors. Reading a header says what a file holds without reading any tensor. Writing needs the names, types and
shapes of all tensors first and their values only one by one; the package of that name takes all values at once, which for a
model on a GPU, or for a model that is converted while it is written, would be a second copy of it in main memory. Files come
out byte for byte as that package writes them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.core.errors import CheckpointError
from quantkit.model.modules import memory_of

TYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32",
    torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64", torch.float64: "F64", torch.int64: "I64",
    torch.uint64: "U64",
}  # fmt: skip
"""What safetensors calls each type of numbers. Files hold the last of these first, so that wide numbers lie at multiples of
their size."""
UNREADABLE = (SafetensorError, OSError, RuntimeError, TypeError, AttributeError)
"""What safetensors and torch raise of a file that is none; the last three where it was replaced while it was opened, or has
types of numbers that torch has not."""
ORDER = {dtype: place for place, dtype in enumerate(TYPES)}


class Stored(NamedTuple):
    """A tensor that the header of a safetensors file says it holds; ``dtype`` is one of the names in :data:`TYPES`."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written: its type and shape are known now, and ``make`` gives its values when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Entry:
        """The entry of a tensor that exists already, on whatever device."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def unshared(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state dict, each under its first name only, and a dict from every further name to that first one."""
    seen: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device) if tensor.numel() else name
        if key in seen:
            tied[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = tensor.detach()
    return tensors, tied


def write_shards(entries: list[Entry], folder: Path, shard_bytes: int, *, alone: str | None = None) -> dict[str, list[str]]:
    """Write tensors to safetensors files of at most ``shard_bytes`` each, where no single tensor is larger.

    Args:
        entries: what to write. The list is empty afterwards: a tensor that nobody else holds is freed once it is written.
        folder: where to.
        shard_bytes: bytes of tensors in one file.
        alone: name of the file where one is enough; left out, it is called ``model-00001-of-00001.safetensors``.

    Returns:
        The names of the files, and of the tensors in each.

    Raises:
        CheckpointError: safetensors does not know a type of numbers.
    """
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    entries.clear()
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if alone is not None and len(files) == 1:
        files = [alone]
    written = {file: [entry.name for entry in shard] for file, shard in zip(files, shards, strict=True)}
    for file, shard in zip(files, shards, strict=True):
        _write(folder / file, shard)
    return written


def _write(file: Path, entries: list[Entry]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    unknown = next((entry for entry in entries if entry.dtype not in TYPES), None)
    if unknown is not None:
        raise CheckpointError(f"tensor {unknown.name!r} is {unknown.dtype}, which safetensors files do not hold")
    entries.sort(key=lambda entry: (-ORDER[entry.dtype], entry.name))
    end = 0
    for entry in entries:
        place = [end, end + entry.nbytes]
        header[entry.name] = {"dtype": TYPES[entry.dtype], "shape": entry.shape, "data_offsets": place}
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        while entries:
            entry = entries.pop(0)
            tensor = entry.make().cpu().contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape)
            if tensor.numel():
                out.write(memory_of(tensor))
            del tensor  # or it would be there still while the next one is made


def read_header(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds, by name, from its header alone.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  safe_open is no mapping
            return {name: Stored(file, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except UNREADABLE as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None


def read_headers(folder: Path, files: Iterable[str]) -> dict[str, Stored]:
    """What several safetensors files of a folder hold together.

    Raises:
        CheckpointError: a file is damaged, or two files hold a tensor of the same name.
    """
    index: dict[str, Stored] = {}
    for file in files:
        found = read_header(folder / file)
        twice = next((name for name in found if name in index), None)
        if twice is not None:
            raise CheckpointError(f"{folder}: tensor {twice!r} is stored twice")
        index |= found
    return index


def read_tensors(folder: Path, files: Iterable[str]) -> dict[str, Tensor]:
    """What several safetensors files of a folder hold together, on the CPU.

    The memory of a tensor is the mapped file, which the system reads when the tensor is used. The file may be replaced then: a
    mapping is of the file that was opened.

    Raises:
        CheckpointError: a file is damaged or cannot be read, or two files hold a tensor of the same name.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118  safe_open is no mapping
                    if name in tensors:
                        raise CheckpointError(f"{folder}: tensor {name!r} is stored twice")
                    tensors[name] = handle.get_tensor(name)
        except UNREADABLE as error:
            raise CheckpointError(f"{folder / file} is damaged: {error}") from None
    return tensors


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a file, on the CPU.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
    except UNREADABLE as error:
        raise CheckpointError(f"tensor {name!r} of {file} cannot be read: {error}") from None
    return tensor

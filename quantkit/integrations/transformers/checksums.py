"""Checksums in the ``config.json`` of a folder that ``save_pretrained`` wrote.

transformers writes and reads the tensors itself, into files that have no hashes, one after the other and in place. So what is
compared are the modules: what they held when they were saved, and what they hold when they have been loaded. A flipped bit is
found in this way, and a folder whose files are from two saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from quantkit.core.checksum import checksum
from quantkit.core.errors import CheckpointError


def checksums(model: nn.Module) -> dict[str, dict[str, str]]:
    """Name of a module -> dtype -> how many bytes of it are in the tensors of this module itself, and their checksum."""
    found = {name: facts for name, module in model.named_modules() if (facts := _of_module(module))}
    return {name: {kind: f"{size}:{number:016x}" for kind, (size, number) in facts.items()} for name, facts in found.items()}


def compare(model: nn.Module, wanted: Mapping[str, Any]) -> None:
    """Raise a CheckpointError if a module of ``model`` holds something else than it did when it was saved.

    Modules that only one side has are left alone, as are tensors whose dtype or size is another one by the wish of the user,
    and those without memory.
    """
    for name, facts in checksums(model).items():
        expected = wanted.get(name)
        for kind, fact in facts.items():
            known = expected.get(kind) if isinstance(expected, dict) else None
            same_size = isinstance(known, str) and known.partition(":")[0] == fact.partition(":")[0]
            if same_size and known != fact:
                raise CheckpointError(
                    f"{name!r} does not hold what it held when it was saved (the checksum of its {kind} numbers differs): the "
                    "files are damaged, or of two saves; save the model again"
                )


def _of_module(module: nn.Module) -> dict[str, tuple[int, int]]:
    facts: dict[str, tuple[int, int]] = {}
    held: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    for name in sorted(held.keys() - module._non_persistent_buffers_set):
        tensor = held[name]
        if tensor is None or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
            continue  # in no memory here, or only a part of it is
        kind = str(tensor.dtype).removeprefix("torch.")
        for part in _parts(module, tensor):
            size, number = facts.get(kind, (0, 0))
            facts[kind] = size + part.nbytes, (number * 3 + checksum(part)) % 2**64
    return facts


def _parts(module: nn.Module, tensor: Tensor) -> Sequence[Tensor]:
    """What counts of a tensor: not the row of an embedding for padding, which classes set to 0 when they are made."""
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        return tensor[: module.padding_idx], tensor[module.padding_idx + 1 :]
    return (tensor,)

"""Modules at the same place in every block, which the probe may ask in one pass.

A model of 80 blocks has 80 linears that play the same part, and asking each of them by itself would take 80 passes. Outputs
of linears do not depend on their inputs in the probe, so what one block is asked does not disturb the answers of another.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def peers_of(model: nn.Module, rows: Mapping[str, int]) -> list[list[str]]:
    """The modules named in ``rows``, in lists of those at the same place and with the same number of rows."""
    peers: dict[tuple[str, int], list[str]] = {}
    for name, count in rows.items():
        peers.setdefault((place_of(model, name), count), []).append(name)
    return list(peers.values())


def place_of(model: nn.Module, name: str) -> str:
    """The name of a module with the number of each repeated block replaced by ``#`` and the type of the block.

    ``layers.3.mlp.up`` becomes ``layers.#Block.mlp.up``. Two things are no repetition, since modules that play different parts
    must not be asked together and hide each other's answers: a number within a word, such as ``norm1``, and a number in an
    ``nn.Sequential`` of modules of different types.
    """
    place, parent = [], model
    for part in name.split("."):
        child = parent.get_submodule(part)
        repeated = not isinstance(parent, nn.Sequential) or len({type(m) for m in parent.children()}) == 1
        place.append(f"#{type(child).__name__}" if part.isdigit() and repeated else part)
        parent = child
    return ".".join(place)

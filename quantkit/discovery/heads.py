"""Value heads of attention that may be rotated: found by rotating them in the probe, one width after another.

The output rows of a value projection are rotated in blocks of d channels, for each d that is possible, the widest first. If the
output projection then reads what it read before, rotated in the same blocks, d is the width of a head. What is between
them may mix tokens and heads, as attention does, but no function may act on single channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from quantkit.core.rotation import BlockRotation
from quantkit.core.sites import Site
from quantkit.core.spaces import ValueHeads
from quantkit.discovery.rotating import RotationProbe, rotate

SMALLEST_HEAD = 8
"""Narrower heads are not looked for."""


def find_heads(model: nn.Module, batch: Any, sites: Sequence[Site]) -> list[ValueHeads]:
    """The value projections among the producers of ``sites``, with the width of their heads; the model is only watched.

    Args:
        model: any module.
        batch: a small batch.
        sites: what :func:`quantkit.discover` found on it.
    """
    probe = RotationProbe(model, batch)
    reference = probe.run()
    pending = {site.name: site for site in sites if _may_be_values(site, sites)}
    found: dict[str, ValueHeads] = {}
    widths = {d for site in pending.values() for d in range(SMALLEST_HEAD, site.channels + 1) if site.channels % d == 0}
    for width in sorted(widths, reverse=True):
        rotation = BlockRotation(width)
        tried = {name: heads for name, site in pending.items() if (heads := _in_blocks(site, width)) is not None}
        if not tried:
            continue
        trace = probe.run({heads.writer: _rotating(heads, rotation) for heads in tried.values()})
        for name, heads in tried.items():
            if all(probe.rotated(reference, trace, reader, rotation) for reader in heads.readers):
                found[name] = heads
                del pending[name]
    return [found[site.name] for site in sites if site.name in found]


def _may_be_values(site: Site, sites: Sequence[Site]) -> bool:
    """Whether a linear produces this site and no other."""
    producer = site.producer
    if producer is None or producer.kind != "linear" or producer.power != 1:
        return False
    return sum(other.producer is not None and other.producer.module == producer.module for other in sites) == 1


def _in_blocks(site: Site, width: int) -> ValueHeads | None:
    """``site`` as heads of this width; None where its channels are no multiple of it, or a row would belong to two heads."""
    assert site.producer is not None
    if site.channels % width:
        return None
    heads = ValueHeads(site.producer.module, site.producer.rows, site.linears, width)
    distinct = {tuple(block.tolist()) for block in heads.rows.view(-1, width)}
    return heads if sum(map(len, distinct)) == len(heads.rows.unique()) == sum(len(set(b)) for b in distinct) else None


def _rotating(heads: ValueHeads, rotation: BlockRotation) -> Callable[[Tensor], Tensor]:
    """Rotates the channels ``[..., N]`` of a value projection's output within their heads, and leaves the others."""
    rows = heads.blocks.flatten()

    def edit(y: Tensor) -> Tensor:
        y = y.clone()
        y[..., rows] = rotate(y[..., rows], rotation)
        return y

    return edit

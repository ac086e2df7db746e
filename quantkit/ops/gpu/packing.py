"""How a weight, and an order of channels, are laid out once so that the kernels can run them.

A row of K codes becomes P places: K and the padding at its end, or with groups of channels that have scales of their own, each
group padded to whole steps, so that a step belongs to one group. The kernel that makes the codes gathers channels into these
places by a permutation, which says for each place which channel it is of.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from quantkit.ops.gpu.devices import capability
from quantkit.ops.gpu.layout import BLOCK, IN_PAIRS

BANKS = 32
"""Banks of shared memory: reads of one warp from different banks happen at once, from the same one in turn."""


def narrow(permutation: Tensor, k: int) -> Tensor:
    """A permutation of ``k`` channels in as few bytes as hold it: every program of the kernels reads all of it."""
    return permutation.to(torch.int16 if k <= 2**15 else torch.int32)


def alignment(groups: tuple[int, ...], device: torch.device) -> int:
    """To how many places groups of these sizes are padded: 16, or on Hopper whole slots of the ring of its fast kernels.

    The latter only where it does not make rows longer by more than an eighth.
    """
    whole = sum(-(-size // BLOCK) * BLOCK for size in groups)
    return BLOCK if device.type == "cuda" and capability(device) == 90 and whole <= 1.125 * sum(groups) else 16


def places_of(
    groups: tuple[int, ...], align: int, channels: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Where G groups of these sizes lie in a row of codes.

    Args:
        groups: sizes, which sum to K.
        align: each group begins at a multiple of it.
        channels: ``[K]``, which channel of the input goes to each place, where they are gathered anyway. The order within a
            group is then free, and is chosen such that the gather is fast.
        device: of the results.

    Returns:
        where groups begin, and the last one ends, ``[G + 1]`` int32; to which group each 16 of the P places belong,
        ``[P / 16]`` int32; and the place of each channel, in the order of the groups, ``[K]`` int64.
    """
    widths = [-(-size // align) * align for size in groups]
    starts = [0, *itertools.accumulate(widths)]
    of_steps = [number for number, width in enumerate(widths) for _ in range(width // 16)]
    places = [
        torch.arange(start, start + size, dtype=torch.int64, device="cpu")
        for start, size in zip(starts[:-1], groups, strict=True)
    ]
    if channels is not None:
        pairs = starts[-1] <= IN_PAIRS
        places = [spread(*part, pairs=pairs) for part in zip(places, channels.cpu().split(groups), strict=True)]
    borders, group_of = (torch.tensor(values, dtype=torch.int32, device=device) for values in (starts, of_steps))
    return borders, group_of, torch.cat(places).to(device)


def spread(places: Tensor, channels: Tensor, *, pairs: bool) -> Tensor:
    """``places [n]`` in an order in which threads that read ``channels [n]`` at once read different banks of shared memory.

    A warp of :mod:`.codes.rows` reads channels of 16 bit for 32 places that differ in their bits 3, 4, 6, 7 and 8. A warp of
    :mod:`.codes.order` reads ``pairs`` of them, 32 bit, for places that differ in their bits 3 to 7.
    """
    lanes, size = (0b0_1111_1000, 1) if pairs else (0b1_1101_1000, 2)
    waiting: list[list[int]] = [[] for _ in range(BANKS)]
    for i, channel in enumerate(channels.tolist()):
        waiting[channel // size % BANKS].append(i)
    together: dict[int, list[int]] = {}
    for place in places.tolist():
        together.setdefault(place & ~lanes, []).append(place)
    out = torch.empty_like(places)
    for wanted in together.values():
        while wanted:  # once, but where fewer banks than places are left
            for bank in sorted(waiting, key=len, reverse=True)[: len(wanted)]:
                if bank:
                    out[bank.pop()] = wanted.pop()
    return out

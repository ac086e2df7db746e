"""Where channels and groups of them are laid for the kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantkit.ops.gpu.layout import IN_PAIRS
from quantkit.ops.gpu.packing import places_of


def read_at_once(sizes: tuple[int, ...], channels: Tensor | None, order: Tensor) -> list[list[int]]:
    """The banks that 32 threads want at once, of :mod:`.order` or for longer rows of :mod:`.rows`."""
    places = places_of(sizes, 128, channels, torch.device("cpu"))[2].tolist()
    lanes, size = (8 + 16 + 32 + 64 + 128, 1) if max(places) < IN_PAIRS else (8 + 16 + 64 + 128 + 256, 2)
    together: dict[int, list[int]] = {}
    for place, channel in zip(places, order.tolist(), strict=True):
        together.setdefault(place & ~lanes, []).append(channel // size % 32)
    return list(together.values())


@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(0, 9))
def test_channels_are_spread_over_banks(sizes: list[int], seed: int) -> None:
    """Each group keeps its places; and what 32 threads read at once is in as many banks as there are."""
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    borders, _, places = places_of(tuple(sizes), 128, order, torch.device("cpu"))
    for first, last, mine in zip(borders[:-1], borders[1:], places.split(sizes), strict=True):
        assert sorted(mine.tolist()) == list(range(int(first), int(first) + len(mine)))
        assert last % 128 == 0
    if len(sizes) == 1 and sizes[0] % 64 == 0:
        assert all(len(set(banks)) >= min(len(banks), 16) for banks in read_at_once(tuple(sizes), order, order))


@pytest.mark.parametrize("sizes", [(20, 500, 1500, 2076), (20, 2000, 5000, 7316)], ids=["order", "rows"])
def test_few_reads_of_a_row_wait_for_a_bank(sizes: tuple[int, ...]) -> None:
    order = torch.randperm(sum(sizes))

    def waits(channels: Tensor | None) -> float:
        """Reads one after the other for what 32 threads want at once, on average."""
        banks = read_at_once(sizes, channels, order)
        return sum(max(map(wanted.count, wanted)) for wanted in banks) / len(banks)

    assert waits(order) < 1.5
    assert waits(None) > 2.5

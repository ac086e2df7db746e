"""One number for the bits of a tensor, on every device and in every layout the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.core.checksum import STEP, WORDS, checksum


def slowly(tensor: torch.Tensor) -> int:
    """The same sum with Python's numbers."""
    octets = bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())
    whole = len(octets) // 8 * 8
    tail = octets[whole:]
    words = [int.from_bytes(octets[i : i + 8], "little") for i in range(0, whole, 8)]
    total = 0
    slabs = [words[i : i + WORDS * 64] for i in range(0, len(words), WORDS * 64)] or [[]]
    for slab in [*slabs, [int.from_bytes(tail, "little")] if tail else []]:
        full = len(slab) // WORDS * WORDS
        for start in [*range(0, full, WORDS), full]:
            part = sum(word * (i * STEP | 1) for i, word in enumerate(slab[start : start + WORDS]))
            total = (total * STEP + part) % 2**64
    return total


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 63, 64, 8 * WORDS - 1, 8 * WORDS, 8 * WORDS + 9])
def test_the_sum_as_it_is_described(size: int) -> None:
    octets = torch.randint(0, 256, (size,), dtype=torch.uint8)
    assert checksum(octets) == slowly(octets)


@settings(deadline=None)
@given(st.integers(1, 300), st.data())
def test_every_bit_counts(size: int, data: st.DataObject) -> None:
    octets = torch.randint(0, 256, (size,), dtype=torch.uint8)
    other = octets.clone()
    other[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(other) != checksum(octets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.float64], ids=str)
def test_views_and_parameters(dtype: torch.dtype) -> None:
    x = torch.randint(-5, 6, (33, 7)).to(dtype)
    wanted = checksum(x)
    assert wanted == checksum(x.view(7, 33)) == checksum(x.t().contiguous().t()) == slowly(x)
    assert checksum(torch.cat([x, x])[33:]) == wanted  # begins anywhere in its memory
    if dtype.is_floating_point:
        assert checksum(torch.nn.Parameter(x)) == wanted
    assert checksum(torch.tensor(1, dtype=dtype)) == slowly(torch.tensor(1, dtype=dtype))

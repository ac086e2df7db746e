"""Formats are values: what they say of codes, groups and storage, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import assert_same

from quantkit import SchemeError
from quantkit.core.formats import Int, PerChannel, PerTensor, PerToken, Quantized, Storage, groups_fault


@pytest.mark.parametrize(("bits", "symmetric"), list(itertools.product(range(2, 9), [True, False])))
def test_codes_of_so_many_bits(bits: int, symmetric: bool) -> None:
    number = Int(bits, symmetric)
    assert number.qmax == 2 ** (bits - 1) - 1
    assert number.qmax - number.lowest == 2**bits - (2 if symmetric else 1)
    assert number.reach == max(abs(a - z) for a in (number.lowest, number.qmax) for z in (_zeros(number)))


def _zeros(number: Int) -> tuple[int, ...]:
    return (0,) if number.symmetric else (number.lowest, number.qmax)


@pytest.mark.parametrize("bits", [1, 9, 0, -8, 16, 8.0, "8", True, None])
def test_numbers_of_bits_that_there_are_not(bits: Any) -> None:
    with pytest.raises(SchemeError, match="2 to 8"):
        Int(bits)


@pytest.mark.parametrize("symmetric", [1, 0, None, "yes"])
def test_symmetric_is_a_bool(symmetric: Any) -> None:
    with pytest.raises(SchemeError, match="symmetric"):
        Int(8, symmetric)


@pytest.mark.parametrize("granularity", [PerChannel(), PerToken(), PerTensor()], ids=repr)
def test_groups_refine_a_granularity(granularity: Any) -> None:
    whole = Quantized(Int(4), granularity)
    parts = whole.in_groups((8, 24))
    assert type(parts.granularity) is type(granularity)
    assert (whole.groups(32), parts.groups(32)) == ((), (8, 24))
    assert parts.without_groups == whole.without_groups == whole.in_groups(()) == whole
    assert parts.is_static == whole.is_static == isinstance(granularity, PerTensor)
    with pytest.raises(SchemeError, match="groups of its own"):
        parts.in_groups((16, 16))
    assert parts.in_groups(()) == parts


@pytest.mark.parametrize("groups", [(8, 8), (8, 0, 8), (-8, 24), [8, 8], (8.0, 8.0), (True, 15), 16, None, ()])
def test_sizes_of_groups(groups: Any) -> None:
    assert (groups_fault(groups, 16) is None) == (repr(groups) == "(8, 8)")


@pytest.mark.parametrize("storage", list(Storage))
def test_storage_gives_back_what_it_took(storage: Storage) -> None:
    for k in (0, 1, 2, 7, 64):
        codes = torch.randint(-7, 8, (3, k), dtype=torch.int8)
        stored = storage.pack(codes)
        assert (stored.dtype, stored.shape) == (storage.dtype, (3, storage.width(k)))
        assert_same(storage.unpack(stored, k), codes)

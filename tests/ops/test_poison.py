"""The memory of these tests is poisoned, whoever asks for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int32, torch.int64, torch.bool]
SOME = torch.zeros(3, 5)
WAYS: dict[str, Any] = {
    "empty": lambda dtype: torch.empty(3, 5, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(SOME, dtype=dtype),
    "new_empty": lambda dtype: SOME.new_empty(3, 5, dtype=dtype),
    "empty_strided": lambda dtype: torch.empty_strided((3, 5), (1, 3), dtype=dtype),
    "new_empty_strided": lambda dtype: SOME.new_empty_strided((3, 5), (5, 1), dtype=dtype),
}


def poisoned(tensor: Tensor) -> bool:
    if tensor.is_floating_point():
        return bool(tensor.isnan().all())
    return bool((tensor == (True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_memory_is_poisoned(way: str, dtype: torch.dtype) -> None:
    torch.zeros(3, 5, dtype=dtype)  # its memory would come back, with zeros in it
    assert poisoned(WAYS[way](dtype))


def test_what_was_written_stays() -> None:
    x = torch.empty(4)
    x.fill_(2.0)
    assert x.tolist() == [2.0] * 4
    assert torch.zeros(4).tolist() == [0.0] * 4

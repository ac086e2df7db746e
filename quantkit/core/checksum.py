"""A checksum of a tensor's bits that is the same number on every device, at about the speed at which memory is read.

It finds what happens to files: a flipped bit always, and parts of another file but for one time in very many. It is no
signature: whoever changes a file on purpose can compute it anew.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

WORDS, SLAB = 2**15, 2**6
"""Words of 8 bytes that are summed together, and how many such sums are made at once."""
STEP = 0x9E3779B97F4A7C15
"""Odd, as all factors are: an odd factor loses no bit, modulo 2**64."""


def checksum(tensor: Tensor) -> int:
    """64 bits that say what the memory of ``tensor`` holds, in the order of its elements.

    Words of 8 bytes, the last one filled up with zeros, are multiplied by odd numbers and summed modulo 2**64. Shape and dtype
    do not count.

    Args:
        tensor: of any dtype of whole bytes, on any device that has memory.
    """
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    words = torch.nn.functional.pad(octets[len(octets) // 8 * 8 :], (0, -len(octets) % 8)).view(torch.int64)
    whole = octets[: len(octets) // 8 * 8]
    if whole.data_ptr() % 8:
        whole = whole.clone()
    total, factors = 0, _factors(tensor.device)
    for slab in [*whole.view(torch.int64).split(WORDS * SLAB), words]:
        full = slab[: len(slab) // WORDS * WORDS].view(-1, WORDS)
        rest = slab[len(full) * WORDS :]
        sums = [*(full * factors).sum(1).tolist(), int((rest * factors[: len(rest)]).sum())]
        for part in sums:
            total = (total * STEP + part) % 2**64
    return total


@functools.lru_cache(maxsize=8)
def _factors(device: torch.device) -> Tensor:
    numbers = torch.arange(WORDS, dtype=torch.int64, device=device)
    return numbers * (STEP - 2**64) | 1

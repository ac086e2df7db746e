"""The sizes of one attention call, read off the tensors that it is given.

Attention multiplies queries with keys and sums values, separately in each head. Models differ in how many heads there are, and
in grouped-query attention several query heads share one head of keys and values. Whoever stores a scale for each head has to
know these numbers; they are found when a model is calibrated, written into its checkpoint, and read back from there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_SIZE = 2**16
"""The largest number of heads, or of channels in a head, that a checkpoint may ask for."""


@dataclass(frozen=True)
class HeadSizes:
    """The sizes of a call of ``scaled_dot_product_attention``.

    A model with grouped-query attention may pass each head of keys and values once, or may pass copies of it, one for each
    query head that reads it. Copies are counted as one head.

    Attributes:
        queries: number of query heads.
        keys: number of different heads of keys, which is also that of values.
        width: channels in each head of queries and keys.
        value_width: channels in each head of values.
    """

    queries: int
    keys: int
    width: int
    value_width: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> HeadSizes:
        """The sizes of a call with these three tensors, each ``[..., H, L, D]`` or, without heads, ``[..., L, D]``."""
        count = count_heads(key)
        repeats = 1
        if count == count_heads(query) == count_heads(value):
            divisors = (r for r in range(count, 0, -1) if count % r == 0)
            repeats = next(r for r in divisors if _repeats(key, r) and _repeats(value, r))
        return cls(count_heads(query), count // repeats, key.shape[-1], value.shape[-1])

    def size(self, what: str) -> tuple[int, int]:
        """The number of heads, and of channels in each, of one tensor of the call.

        Args:
            what: ``"query"``, ``"key"`` or ``"value"``; or ``"key_label"`` or ``"value_label"``, tensors with one entry for
                each channel of a head of keys or values.
        """
        width = self.value_width if what in ("value", "value_label") else self.width
        return self.queries if what == "query" else self.keys, width

    @property
    def fault(self) -> str | None:
        """Why no attention can have these sizes, or None if one can."""
        if not all(1 <= size <= MAX_SIZE for size in vars(self).values()):
            return f"sizes go from 1 to {MAX_SIZE}"
        return f"{self.queries} query heads share {self.keys} of keys" if self.queries % self.keys else None


def count_heads(x: Tensor) -> int:
    """The number of heads of ``x [..., H, L, D]``; a tensor of up to three dimensions has no dimension for heads, and so one
    head."""
    return x.shape[-3] if x.dim() > 3 else 1


def _repeats(x: Tensor, times: int) -> bool:
    """Whether the heads of ``x`` come in runs of ``times`` equal ones."""
    if times == 1:
        return True
    runs = x.unflatten(-3, (-1, times))
    return torch.equal(runs, runs[..., :1, :, :].expand_as(runs))

"""Value rows in grouped-query attention and in fused projections are found, whatever the layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import WIDTH, Attention, Net, check_preserved, sites
from torch import Tensor, nn

from quantkit.discovery.layouts import fused_layouts


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("fused", ["", "split", "grouped"])
@pytest.mark.parametrize(("repeat", "groups"), [(1, 4), (4, 2), (8, 1), (8, 2), (71, 1)])
def test_grouped_query_attention(repeat: int, groups: int, fused: str, gated: bool) -> None:
    model = Attention(repeat, groups, fused=fused, gated=gated)
    found = sites(model)
    producer = found["o"].producer
    assert producer is not None
    rows = torch.arange(groups * 4).view(groups, 1, 4).expand(-1, repeat, -1).flatten()  # of v, by channel
    if fused == "split":
        rows = rows + model.q_width + model.kv_width
    elif fused == "grouped":
        rows = rows + (rows // 4 + 1) * (repeat + 1) * 4
    assert torch.equal(producer.rows, rows)
    assert producer.module == ("qkv" if fused else "v")
    assert found["gate" if gated else "qkv" if fused else "q"].producer is not None
    tied = found["o"].tie(torch.arange(len(rows)).float())
    assert all(len(set(tied[rows == row].tolist())) == 1 for row in rows)
    check_preserved(model)


class Fused(nn.Module):
    """One projection laid out as ``[heads][before | wanted | after]``; the wanted rows alone reach ``down`` linearly."""

    def __init__(self, heads: int, before: int, wanted: int, after: int, repeat: int = 1) -> None:
        super().__init__()
        self.sizes, self.heads, self.repeat = [before, wanted, after], heads, repeat
        self.up = nn.Linear(WIDTH, heads * sum(self.sizes))
        self.down, self.head = nn.Linear(heads * wanted * repeat, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        before, wanted, after = self.up(x).unflatten(-1, (self.heads, -1)).split(self.sizes, -1)
        weight = 1.5 + torch.cos(before.sum((-1, -2), True) + after.sum((-1, -2), True))
        return self.head(self.down((wanted * weight).repeat_interleave(self.repeat, -2).flatten(-2)))

    @property
    def rows(self) -> Tensor:
        rows = torch.arange(self.up.out_features).view(self.heads, -1).split(self.sizes, -1)[1]
        return rows.repeat_interleave(self.repeat, 0).flatten()


def check_rows(model: Fused) -> None:
    producer = sites(model)["down"].producer
    assert producer is not None
    assert torch.equal(producer.rows, model.rows)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    heads=st.integers(1, 9),
    width=st.integers(1, 12),
    others=st.integers(1, 4),
    first=st.booleans(),
    repeat=st.sampled_from([1, 2, 4]),
)
def test_equal_parts_are_recovered(heads: int, width: int, others: int, first: bool, repeat: int) -> None:
    others = 1 if repeat > others else others  # no more channels than rows: only fused keys and values look like that
    rest = (0, others * width) if first and others < 4 else (others * width, 0)
    check_rows(Fused(heads, rest[0], width, rest[1], repeat))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(heads=st.integers(1, 9), width=st.integers(1, 12), other=st.integers(1, 12), first=st.booleans())
def test_unequal_parts_are_recovered(heads: int, width: int, other: int, first: bool) -> None:
    check_rows(Fused(heads, 0 if first else other, width, other if first else 0))


@settings(deadline=None, max_examples=20, derandomize=True)
@given(heads=st.integers(1, 9), width=st.integers(1, 12))
def test_the_second_of_three_parts_is_recovered(heads: int, width: int) -> None:
    check_rows(Fused(heads, width, width, width))


@pytest.mark.parametrize("order", ["gate first", "up first", "interleaved"])
def test_fused_gate_and_up(order: str) -> None:
    inner = 600  # more rows than any model has heads

    def rule(n: Any, x: Tensor) -> Tensor:
        h = n.gate_up(n.norm(x))
        gate, up = (h[..., ::2], h[..., 1::2]) if order == "interleaved" else h.chunk(2, -1)
        return n.out(n.down(F.silu(up) * gate if order == "up first" else F.silu(gate) * up))

    model = Net(rule, gate_up=nn.Linear(WIDTH, 2 * inner), down=nn.Linear(inner, WIDTH))
    producer = sites(model)["down"].producer
    assert producer is not None
    wanted = {"gate first": slice(inner, None), "up first": slice(0, inner), "interleaved": slice(1, None, 2)}[order]
    assert torch.equal(producer.rows, torch.arange(2 * inner)[wanted])
    check_preserved(model)


def test_layouts_are_distinct_rows_in_range() -> None:
    for n, k in ((96, 32), (48, 32), (4608, 1536), (18, 9), (7, 5), (40, 24)):
        for rows in fused_layouts(n, k):
            assert len(rows.unique()) == len(rows) < n
            assert int(rows.max()) < n
            assert k % len(rows) == 0

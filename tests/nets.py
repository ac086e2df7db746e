"""Modules as small as a question to discovery allows, and what it says of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from families import HEADS, VOCAB, normal
from families import WIDTH as HIDDEN
from torch import Tensor, nn

import quantkit
from quantkit.core.sites import Site
from quantkit.discovery import discover

WIDTH, INNER = 16, 24
X = normal(2, 10, WIDTH)


class Net(nn.Module):
    """Two linears with something in between: ``forward`` is ``rule(net, x)``, and more modules come by name."""

    def __init__(self, rule: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.rule = rule
        self.norm = nn.LayerNorm(WIDTH)
        self.a, self.b, self.out = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH), nn.Linear(WIDTH, 8)
        for name, module in modules.items():
            self.add_module(name, module)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)

    def forward(self, x: Tensor) -> Any:
        return self.rule(self, x)


def sites(model: nn.Module, batch: Any = X) -> dict[str, Site]:
    """Every linear that reads a site -> the site."""
    return {linear: site for site in discover(model, batch).sites for linear in site.linears}


def producers(model: nn.Module, batch: Any = X) -> dict[str, str | None]:
    """Every linear of a site -> its producer."""
    return {linear: site.producer and site.producer.module for linear, site in sites(model, batch).items()}


def check_preserved(model: nn.Module, batch: Any = X) -> None:
    """Folding with an outlier in every foldable producer changes nothing, and INT8 runs."""
    original = copy.deepcopy(model)
    quantkit.quantize(model, quantkit.SmoothQuant(alpha=0.5), scheme=None, calibration=[batch], progress=False)
    equivalence = quantkit.verify_equivalence(model, original, batch)
    assert equivalence.error <= 1e-5, equivalence


class Attention(nn.Module):
    """Grouped-query attention with ``repeat`` query heads to a key/value head; fused, gated or parallel by choice."""

    def __init__(self, repeat: int, groups: int, *, fused: str = "", gated: bool = False, head: int = 4) -> None:
        super().__init__()
        self.repeat, self.groups, self.head, self.fused, self.gated = repeat, groups, head, fused, gated
        self.q_width, self.kv_width = repeat * groups * head, groups * head
        self.norm = nn.LayerNorm(WIDTH)
        if fused:
            self.qkv = nn.Linear(WIDTH, self.q_width + 2 * self.kv_width)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, n) for n in (self.q_width, self.kv_width, self.kv_width))
        if gated:
            self.gate = nn.Linear(WIDTH, self.q_width)
        self.o, self.head_out = nn.Linear(self.q_width, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.fused == "grouped":  # for each key/value head: its queries, its key, its value
            q, k, v = self.qkv(h).unflatten(-1, (self.groups, -1, self.head)).split([self.repeat, 1, 1], -2)
            q, k, v = q.flatten(-3), k.flatten(-3), v.flatten(-3)
        elif self.fused:
            q, k, v = self.qkv(h).split([self.q_width, self.kv_width, self.kv_width], -1)
        else:
            q, k, v = self.q(h), self.k(h), self.v(h)
        q, k, v = (t.unflatten(-1, (-1, self.head)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        return self.head_out(x + self.o(y * torch.sigmoid(self.gate(h)) if self.gated else y))


class Gated(nn.Module):
    """Attention whose output is gated channel by channel: what is in front of the last linear does not rotate."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(VOCAB, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB)
        self.q, self.k, self.v, self.gate, self.o = (nn.Linear(HIDDEN, HIDDEN) for _ in range(5))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + self.o(y * self.gate(h).sigmoid()))

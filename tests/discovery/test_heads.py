"""Value heads are found with their width, and not where something acts on single channels."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tokens
from nets import Gated
from randomised import build, rotated

import quantkit
from quantkit import MethodError, Rotate
from quantkit.core.rotation import BlockRotation
from quantkit.discovery.equivalence import outputs_of, relative_error
from quantkit.discovery.heads import find_heads
from quantkit.model.modules import weight_of


@pytest.mark.parametrize(
    ("name", "width"), [("llama", 8), ("llama-bias", 8), ("qwen3", 16), ("gpt2", 8), ("gpt-bigcode", 8), ("falcon-new", 8)]
)
def test_heads(name: str, width: int) -> None:
    batch, original = tokens(), build(name)
    heads = find_heads(original, batch, quantkit.discover(original, batch).sites)
    assert [h.width for h in heads] == [width, width]
    model = rotated(build(name), batch, Rotate(stream=False))
    assert relative_error(outputs_of(original, batch), outputs_of(model, batch)) < 1e-5
    for h in heads:
        new, old = (weight_of(m.get_submodule(h.readers[0])) for m in (model, original))
        assert float((new - BlockRotation(width).apply(old)).abs().max()) < 1e-6
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, original.get_parameter(n))}
    assert {n.rpartition(".")[0] for n in changed} == {n for h in heads for n in (h.writer, *h.readers)}


@pytest.mark.parametrize("name", ["gated", "olmo-clipped", "diffllama", "relu-mlp"])
def test_no_heads_where_channels_matter(name: str) -> None:
    model = Gated() if name == "gated" else build(name)
    batch = FAMILIES["relu-mlp"].batch() if name == "relu-mlp" else tokens()
    sites = quantkit.discover(model, batch).sites
    assert any(site.producer and site.producer.kind == "linear" for site in sites)
    assert find_heads(model, batch, sites) == []
    with pytest.raises(MethodError, match="no value projection"):
        rotated(model, batch, Rotate(stream=False))

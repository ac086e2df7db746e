"""One pass over the data: every site is seen once, on what it reads, and the model is as it was."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from helpers import assert_same, llama, mlp, normal, state, tokens

import quantkit
from quantkit import CalibrationError, Range, TokenSample, Transform
from quantkit.calibration.observe import observe


def test_statistics_are_those_of_the_inputs() -> None:
    model, batches = mlp().train(), [normal(2, 5, 16), normal(1, 3, 16, seed=1)]
    sites = quantkit.discover(model, batches[0]).sites
    before = state(model)
    found = observe(model, batches, sites, [Range, TokenSample], progress=False)
    assert_same(state(model), before)
    with torch.no_grad():
        rows = torch.cat([model.norm(batch).flatten(0, 1) for batch in batches])
        inner = torch.cat([model.up(model.norm(batch)).relu().flatten(0, 1) for batch in batches])
    by_linear = {site.linears[0]: found[site.name] for site in sites}
    assert_same(by_linear["up"][Range].absmax, rows.abs().amax(0))
    assert_same(by_linear["down"][Range].absmax, inner.abs().amax(0))
    assert by_linear["up"][TokenSample].weighted()[1].sum() == 13


def test_transformed_sites_are_seen_as_they_are_quantized() -> None:
    model, batch = mlp(), normal(2, 5, 16)
    (site,) = (s for s in quantkit.discover(model, batch).sites if s.linears == ("up",))
    halved = Transform(scale=torch.full((16,), 2.0))
    seen = observe(model, [batch], [site], [Range], transforms={site.name: halved}, progress=False)
    assert_same(seen[site.name][Range].absmax, model.norm(batch).abs().amax((0, 1)).detach() / 2)


def test_no_batch_at_all() -> None:
    model = mlp()
    sites = quantkit.discover(model, normal(2, 5, 16)).sites
    with pytest.raises(CalibrationError):
        observe(model, [], sites, [Range], progress=False)


def test_the_data_is_hashed_on_its_way() -> None:
    model, one, other = llama(), hashlib.sha256(), hashlib.sha256()
    sites = quantkit.discover(model, tokens()).sites
    observe(model, [tokens()], sites, [Range], digest=one, progress=False)
    observe(model, [{"input_ids": tokens()}], sites, [Range], digest=other, progress=False)
    assert one.digest() != hashlib.sha256().digest()
    again = hashlib.sha256()
    observe(model, [tokens()], sites, [Range], digest=again, progress=False)
    assert again.digest() == one.digest()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named(bad: float) -> None:
    model = mlp()
    sites = quantkit.discover(model, normal(2, 5, 16)).sites
    before = state(model)
    with pytest.raises(CalibrationError, match="batch 2"):
        observe(model, [normal(2, 5, 16), normal(2, 5, 16) * bad], sites, [Range], progress=False)
    assert_same(state(model), before)

"""Names of the version before: they work, and say what to write instead."""

from __future__ import annotations

import importlib

import pytest

import quantkit
from quantkit.core import moved
from quantkit.core.numerics import absmax_scale
from quantkit.core.weights import quantize_weight

OLD = ("data", "errors", "evaluate", "linear", "modules", "numerics", "scheme", "sites", "statistics", "transform")


@pytest.mark.parametrize("name", OLD)
def test_modules_at_their_old_places(name: str) -> None:
    module = importlib.import_module(f"quantkit.{name}")
    assert "core.moved" not in (module.__doc__ or "")
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018


def test_names_in_old_modules() -> None:
    old = importlib.import_module("quantkit.numerics")
    with pytest.warns(DeprecationWarning, match=r"quantkit\.core\.numerics\.absmax_scale"):
        assert old.absmax_scale is absmax_scale
    with pytest.warns(DeprecationWarning, match=r"quantkit\.core\.weights\.quantize_weight"):
        assert old.quantize_weight is quantize_weight
    ops = importlib.import_module("quantkit.ops")
    with pytest.warns(DeprecationWarning, match=r"quantkit\.ops\.table\.use_backend"):
        assert ops.use_backend is quantkit.use_backend
    assert moved.moved("old", "quantkit.core.numerics")("__doc__")


def test_attributes() -> None:
    layer = quantkit.W8A8Linear(4, 4)
    with pytest.warns(DeprecationWarning, match="prepared"):
        assert layer.packed is layer.prepared
    site = quantkit.SiteView(quantkit.Site("a", ("a",), ("a",), 4), quantkit.Scheme(), False, quantkit.Transform(), {}, {})
    with pytest.warns(DeprecationWarning, match="rotated_space"):
        assert site.turned == site.rotated_space

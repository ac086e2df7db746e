"""The report names every linear, and is read back from plain JSON."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import gpt2, int8, llama, mlp, quantized

import quantkit
from quantkit.model.modules import linears_of


@pytest.mark.parametrize("build", [mlp, llama, gpt2])
def test_every_linear_is_in_the_report(build: Any) -> None:
    model = build()
    names = linears_of(model).keys()
    record = quantkit.report(quantized(model))
    assert sorted(layer.name for layer in record.layers) == sorted(names)
    assert {layer.name for layer in record.layers if layer.kind == "int8"} == int8(model)
    assert all(layer.sqnr_db > 20 for layer in record.layers if layer.kind == "int8")
    assert all(name in str(record) for name in names)
    assert type(record).from_dict(record.to_dict()) == record
    with pytest.raises(quantkit.ModelError, match="not quantized"):
        quantkit.report(build())

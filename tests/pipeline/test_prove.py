"""A fold that changes the function of a model is undone."""

from __future__ import annotations

import pytest
from helpers import mlp, quantized, refused

import quantkit


def test_a_proof_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tolerance can be met: the norm, written already, gets its parameters back."""
    monkeypatch.setattr("quantkit.pipeline.prove.tolerance_for", lambda *_: -1.0)
    model = mlp()
    with refused(model, quantkit.EquivalenceError, "undone"):
        quantized(model)

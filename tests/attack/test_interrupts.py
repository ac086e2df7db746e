"""The short form of the attack with real signals; ``make attack`` runs the long one."""

from __future__ import annotations

import pytest
from interrupts import attack


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "too large to be kept"])
def test_ctrl_c_at_any_moment(kept: bool) -> None:
    found = attack(25, seed=3, kept=kept)
    assert not found["wrong"], found["wrong"]
    if kept:
        assert "marked" not in found["outcomes"]

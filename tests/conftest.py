"""Every test starts from the same seed, and every search of hypothesis is repeatable."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network
os.environ["TRITON_INTERPRET"] = "1"  # GPU kernels run on the CPU, in the interpreter of Triton; before anything imports them

import interpreter
import pytest
import torch
from found import find
from hypothesis import settings

interpreter.set_up()
settings.register_profile("quantkit", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("quantkit")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of one model are searched for sites once: see found.py."""
    for user in ("pipeline.find", "calibrators.rotate"):
        monkeypatch.setattr(f"quantkit.{user}.discover", find)

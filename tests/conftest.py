"""Every test starts from the same seed, and every search of hypothesis is repeatable."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network
os.environ["TRITON_INTERPRET"] = "1"  # GPU kernels run on the CPU, in the interpreter of Triton; before anything imports them

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def fma(_: Any, x: Any, y: Any, z: Any) -> Any:
    """Rounded once, as GPUs do it. Triton's interpreter rounds twice."""
    wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


InterpreterBuilder.create_fma = fma

settings.register_profile("quantkit", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("quantkit")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

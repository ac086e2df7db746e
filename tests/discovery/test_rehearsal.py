"""The rehearsal of all folds on the real model."""

from __future__ import annotations

import pytest
import torch
from helpers import normal
from torch import Tensor, nn

import quantkit
from quantkit.discovery.rehearsal import rehearse


class Leaks(nn.Module):
    """A norm that a linear reads, and, with little effect, something else."""

    def __init__(self, effect: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear, self.head, self.effect = nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(8, 4), effect

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.head(self.linear(y).tanh()) + self.effect * y.sigmoid().sum(-1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("effect", [1.0, 1e-2, 3e-6, 0.0])
def test_a_fold_that_changes_the_model_a_little(effect: float, dtype: torch.dtype) -> None:
    """Experts that hardly count hid a router that reads their norm (AXK2): folding changed the model by 4e-6."""
    x = normal(2, 6, 16).to(dtype)
    (site,) = quantkit.discover(Leaks(0.0).to(dtype), x).sites
    model = Leaks(effect).to(dtype)
    seen = effect * 8 > torch.finfo(dtype).eps  # or it is lost in the rounding of the output
    assert rehearse(model, x, [site]) == ({site.name} if seen else set())


def test_halves_lose_bits_of_their_smallest_numbers() -> None:
    """A power of two does not commute with the rounding of subnormal numbers, so float16 is not asked for equal bits."""
    model = Leaks(0.0).half()
    model.norm.weight.data.mul_(2.0**-14)
    x = normal(2, 6, 16).half()
    (site,) = quantkit.discover(model, x).sites
    assert site.producer is not None
    assert rehearse(model, x, [site]) == set()

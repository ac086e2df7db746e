"""Which rows are behind which channels, asked of all modules in the same passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import quantkit
from quantkit.discovery.probe import Probe


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each pass of a probe."""
    ran: list[int] = []
    run = Probe.run

    def counted(self: Probe, *args: Any, **kwargs: Any) -> Any:
        ran.append(1)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Probe, "run", counted)
    return ran


def test_all_modules_are_told_apart_in_the_same_passes(passes: list[int]) -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=20)
    discovery = quantkit.discover(LlamaForCausalLM(config), torch.arange(8).view(1, 8))
    assert {site.producer.kind for site in discovery.sites if site.producer} == {"norm", "linear"}
    assert sum(site.producer is not None for site in discovery.sites) == 12
    # 11 questions, 4 digits of at most 96 rows, a confirmation, a head, and a few passes of the model as it is
    assert len(passes) <= 11 + 4 + 1 + 1 + 4


class Disturbed(nn.Module):
    """What ``first`` is multiplied by depends on the size of what ``second`` gives, but not for small multipliers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.of_first, self.of_second = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.second(x)
        loud = a.abs().amax() * b.abs().amax() > 1500
        return self.of_first(a * (3 if loud else 1)) + self.of_second(b)


def test_what_disturbs_each_other_is_asked_alone() -> None:
    torch.manual_seed(0)
    found = {site.name: site.producer for site in quantkit.discover(Disturbed(), torch.randn(4, 8)).sites}
    assert found["of_first"] is not None
    assert found["of_second"] is not None
    assert (found["of_first"].module, found["of_second"].module) == ("first", "second")

"""An input that a model is known to run on, kept with the model: whoever saves it or opens it again can run it as a whole.

Its numbers are made up. A piece of somebody's calibration data has no business in a folder that may be published.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantkit.model.modules import map_tensors

ATTRIBUTE = "_quantkit_example"


def keep_example(model: nn.Module, batch: Any) -> None:
    """Keep ``batch``, see :func:`made_up`, as something of a form that ``model`` takes."""
    setattr(model, ATTRIBUTE, batch)


def example_of(model: nn.Module) -> Any:
    """What :func:`keep_example` kept, or None."""
    return getattr(model, ATTRIBUTE, None)


def made_up(batch: Any, seed: int = 0) -> Any:
    """A batch in the form of ``batch``, with numbers drawn at random on the CPU.

    Integers are drawn from between the smallest and the largest that are there; floats have the mean and the deviation of those
    there. Masks and what else holds zeros and ones alone stay, since they say which tokens there are.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(t: Tensor) -> Tensor:
        t = t.detach().cpu()
        if not t.numel() or t.dtype == torch.bool or bool(((t == 0) | (t == 1)).all()):
            return t.clone()
        if not t.is_floating_point():
            return torch.randint(int(t.min()), int(t.max()) + 1, t.shape, generator=random, dtype=t.dtype, device="cpu")
        finite = t[t.isfinite()].double()
        mean, deviation = (finite.mean(), finite.std(correction=0)) if finite.numel() else (0.0, 1.0)
        return (torch.randn(t.shape, generator=random, dtype=torch.float64, device="cpu") * deviation + mean).to(t.dtype)

    return map_tensors(batch, draw)

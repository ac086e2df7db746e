"""A picture of what smoothing does to the activations and weights of one site of a language model.

The site is the one behind a norm whose largest channel stands out most, since there quantization loses most. What was
before and what is after have the same scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.sites import Site
from quantkit.discovery import discover
from quantkit.layers.linear import W8A8Linear
from quantkit.model.modules import call, evaluating


def draw(before: nn.Module, after: nn.Module, window: Tensor, path: Path, *, title: str) -> Path:
    """Draw the magnitudes of one site before and after smoothing, as surfaces.

    Args:
        before, after: a language model in floating point, and the same one quantized.
        window: token ids ``[T]``.
        path: file of the picture.
        title: name of the model in its heading.

    Returns:
        The file. It shows the activation over tokens and channels, and the weight over input and output channels.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with torch.no_grad():
        sites = [s for s in discover(before, window[None, :16]).sites if s.producer and s.producer.kind == "norm"]
        inputs = {site.name: input_of(before, site, window) for site in sites}
        site = max(sites, key=lambda s: spikiness(inputs[s.name]))
        panels = {
            "activation, original": inputs[site.name],
            "activation, smoothed": input_of(after, site, window),
            "weight, original": weights_of(before, site),
            "weight, smoothed": weights_of(after, site),
        }
    figure = plt.figure(figsize=(13, 8.5), layout="constrained")
    shown = {panel: values.abs()[:96] for panel, values in panels.items()}
    for index, (panel, rows) in enumerate(shown.items()):
        axes: Any = figure.add_subplot(2, 2, index + 1, projection="3d")
        top = max(float(other.max()) for name, other in shown.items() if name.split(",")[0] == panel.split(",")[0])
        y, x = torch.meshgrid(
            torch.arange(rows.shape[0], dtype=torch.int64, device="cpu"),
            torch.arange(rows.shape[1], dtype=torch.int64, device="cpu"),
            indexing="ij",
        )
        look = {"cmap": "viridis", "vmin": 0, "vmax": top, "linewidth": 0, "antialiased": False}
        axes.plot_surface(x.numpy(), y.numpy(), rows.numpy(), rcount=96, ccount=rows.shape[1], **look)
        axes.set(xlabel="input channel", ylabel="token" if index < 2 else "output channel", zlabel="|value|", title=panel)
        axes.set_zlim(0, top)
        axes.view_init(elev=25, azim=-55)
    figure.suptitle(
        f"{title}, input of {', '.join(n.rpartition('.')[2] for n in site.linears)} in {site.name.rpartition('.')[0]}"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def spikiness(x: Tensor) -> float:
    """How far the largest channel of ``x [T, K]`` stands out: its mean magnitude over the median of that of all channels."""
    size = x.abs().mean(0)
    return float(size.max() / size.median())


def input_of(model: nn.Module, site: Site, window: Tensor) -> Tensor:
    """What the linears of ``site`` read while the model reads a window, ``[T, K]`` float32."""
    seen: list[Tensor] = []
    hook = model.get_submodule(site.name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0].float()))
    try:
        with evaluating(model):
            call(model, window[None])
    finally:
        hook.remove()
    return seen[0]


def weights_of(model: nn.Module, site: Site) -> Tensor:
    """The weight of the first linear of ``site``, ``[N, K]`` float32."""
    linear: Any = model.get_submodule(site.name)
    weight: Tensor = linear.dequantized_weight() if isinstance(linear, W8A8Linear) else linear.weight.detach().float()
    return weight

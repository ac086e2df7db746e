"""Calibrating attention: from the modules that call it to a quantizer for each.

A dynamic scheme without clusters needs no data, since each token brings its own range. A static scheme needs the least and the
largest value of each head, and clusters of channels are made from those of each channel. Both come from one more pass over the
calibration data (:func:`observe_attention`). It runs after the linears are quantized, because folding changes the values of
queries, keys and values, and because they should be measured as the finished model will compute them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.errors import CalibrationError
from quantkit.core.formats import Quantized
from quantkit.core.heads import HeadSizes, count_heads
from quantkit.core.progress import Progress, tracked
from quantkit.core.scheme import Scheme
from quantkit.discovery.attention import watching
from quantkit.layers.attention import LABELS, AttentionQuantizer, parts_of
from quantkit.model.modules import call, evaluating

Label = Callable[[Tensor, Tensor, bool, str], Tensor]
"""A function that puts the channels of a head into clusters, see :class:`quantkit.calibrators.base.HeadClusters`."""

Ranges = Mapping[str, tuple[Tensor, Tensor]]
"""``"query"``, ``"key"`` and ``"value"`` of one module -> least and largest value of each channel of each head, each ``[H,
D]``."""


def calibrate_attention(
    model: nn.Module,
    found: Mapping[str, HeadSizes],
    scheme: Scheme,
    batches: Iterable[Any],
    label: Label | None,
    *,
    progress: Progress = None,
) -> dict[str, AttentionQuantizer]:
    """Make a quantizer for each module that calls attention, with a pass over ``batches`` if it is needed.

    Args:
        model: as it will run, except for its attention. It is only watched.
        found: the modules and the sizes of their calls, from :func:`quantkit.discovery.attention.find_attention`.
        scheme: the number formats.
        batches: the calibration data.
        label: puts the channels of a head into clusters; None leaves each head in one.
        progress: see :mod:`quantkit.core.progress`.

    Raises:
        CalibrationError: a module was not called, a module was called that is not in ``found``, or a value is NaN or infinite.
    """
    if label is None and not scheme.is_static:
        return {name: AttentionQuantizer(scheme, heads) for name, heads in found.items()}
    ranges = observe_attention(model, found, tracked(batches, "calibrating attention", progress, "batch"))
    return {name: _quantizer(name, heads, scheme, ranges[name], label) for name, heads in found.items()}


def observe_attention(model: nn.Module, found: Mapping[str, HeadSizes], batches: Iterable[Any]) -> dict[str, Ranges]:
    """The ranges of what each module in ``found`` hands to attention, by its name. Tensors that never came are left out.

    Raises:
        CalibrationError: a module that is not in ``found`` calls attention.
    """
    seen: dict[str, dict[str, tuple[Tensor, Tensor]]] = {name: {} for name in found}

    def see(name: str, *tensors: Tensor) -> None:
        if name not in found:
            raise CalibrationError(
                f"attention of {name!r} is called in the calibration data and was not in its first batch: put one that reaches "
                "all of the model first"
            )
        for what, x in zip(("query", "key", "value"), tensors, strict=True):
            count, _ = found[name].size(what)
            if not x.numel() or count_heads(x) % count:
                continue
            heads = (x if x.dim() > 3 else x.unsqueeze(-3)).float()
            rows = heads.unflatten(-3, (count, -1)).movedim(-4, 0).flatten(1, -2)  # [H, tokens, D]
            ends = rows.aminmax(dim=1)
            low, high = seen[name].get(what, ends)
            seen[name][what] = torch.minimum(low, ends.min), torch.maximum(high, ends.max)

    with evaluating(model), watching(model, see):
        for batch in batches:
            call(model, batch)
    return dict(seen)


def _quantizer(name: str, heads: HeadSizes, scheme: Scheme, ranges: Ranges, label: Label | None) -> AttentionQuantizer:
    """The quantizer of the module called ``name``, from the ranges of what it hands to attention."""
    parts = parts_of(scheme)
    for what in parts:
        if what not in ranges:
            raise CalibrationError(f"no token of the calibration data reached the {what} of attention in {name!r}")
        if not bool((ranges[what][1] - ranges[what][0]).isfinite().all()):
            raise CalibrationError(f"calibration puts NaN, Inf or too wide a range into the {what} of attention in {name!r}")
    labels = {} if label is None else _labels(name, heads, scheme, ranges, label)
    clusters = 1 + max((int(value.max()) for value in labels.values()), default=0)
    new = AttentionQuantizer(scheme, heads, clusters, ranges[parts[0]][0].device)
    for which in labels if clusters > 1 else ():
        getattr(new, which).copy_(labels[which])
    for what in parts if scheme.is_static else ():
        low, high = ranges[what]
        index = labels.get(LABELS[what], low.new_zeros(heads.keys, low.shape[1], dtype=torch.int64))
        index = index.repeat_interleave(len(low) // heads.keys, 0)
        ends = getattr(new, f"{what}_range")  # of zeros, so that 0 is in every range
        ends[0].scatter_reduce_(1, index, low, "amin")
        ends[1].scatter_reduce_(1, index, high, "amax")
    return new


def _labels(name: str, heads: HeadSizes, scheme: Scheme, ranges: Ranges, label: Label) -> dict[str, Tensor]:
    """Name of a label buffer -> ``[H, D]`` int64, the cluster of each channel of each head of keys or values."""
    labels: dict[str, Tensor] = {}
    parts = parts_of(scheme)
    for which in dict.fromkeys(LABELS[what] for what in parts):
        sharing = [ranges[what] for what in parts if LABELS[what] == which]
        # All query heads that share a head of keys count as one; then P tensors share the label: [H, P, D].
        low = torch.stack([low.unflatten(0, (heads.keys, -1)).amin(1) for low, _ in sharing], 1)
        high = torch.stack([high.unflatten(0, (heads.keys, -1)).amax(1) for _, high in sharing], 1)
        ends = enumerate(zip(low, high, strict=True))
        symmetric = all(f.number.symmetric for f in (scheme.kv, scheme.queries) if isinstance(f, Quantized))
        of_heads = [label(*end, symmetric, f"{name}.{which}.{head}") for head, end in ends]
        labels[which] = torch.stack(of_heads).to(low.device)
    return labels

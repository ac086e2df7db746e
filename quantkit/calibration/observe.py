"""One streaming pass of calibration data through the float model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.calibration.statistics import Statistic
from quantkit.core.errors import CalibrationError
from quantkit.core.progress import Progress, tracked
from quantkit.core.sites import Site
from quantkit.core.transform import Transform
from quantkit.model.modules import all_tensors, call, evaluating, first_input, memory_of

SiteStatistics = dict[type[Statistic], Statistic]


def observe(
    model: nn.Module,
    batches: Iterable[Any],
    sites: Sequence[Site],
    kinds: Sequence[type[Statistic]],
    *,
    transforms: Mapping[str, Transform] | None = None,
    seed: int = 0,
    progress: Progress = None,
    digest: Any = None,
) -> dict[str, SiteStatistics]:
    """Statistics of every site, keyed by site name and then by kind.

    The model is only watched: hooks are removed even when the pass is interrupted. Memory holds the statistics and one
    batch, whatever the amount of data. With ``transforms``, by site, it is their INT8 side that is measured, in float32. A
    ``digest`` of hashlib, if given, is fed with the tensors of each batch.

    Raises:
        CalibrationError: an activation is NaN or Inf (naming the layer), or no batch came.
    """
    statistics: dict[str, SiteStatistics] = {}
    finite: dict[str, Tensor] = {}

    def watch(site: Site, index: int, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_input(args, kwargs).detach()
            x = x.reshape(-1, x.shape[-1])
            if not len(x):
                return  # an expert that no token chose
            entry = statistics.setdefault(site.name, {})
            finite[name] = finite.get(name, torch.ones((), dtype=torch.bool, device=x.device)) & x.isfinite().all()
            if transforms is not None:
                x, _ = transforms[site.name].activation(x.float())
            for kind in kinds:
                if kind not in entry:
                    entry[kind] = kind(site.channels, x.device, seed + index)
                entry[kind].update(x)

        return hook

    count = 0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for index, site in enumerate(sites):
            for name in site.taps:
                hook = model.get_submodule(name).register_forward_pre_hook(watch(site, index, name), with_kwargs=True)
                stack.callback(hook.remove)
        for batch in tracked(batches, "calibrating", progress, "batch"):
            if digest is not None:
                _hash(digest, batch)
            call(model, batch)
            count += 1
            bad = next((name for name, ok in finite.items() if not ok), None)
            if bad is not None:
                raise CalibrationError(
                    f"calibration batch {count} puts NaN or Inf into the input of {bad!r}: look at the data and at the "
                    "model's dtype (float16 overflows above 65504; try bfloat16)"
                )
    if not count:
        raise CalibrationError("calibration is empty: pass at least one batch")
    return statistics


def _hash(digest: Any, batch: Any) -> None:
    for tensor in all_tensors(batch):
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(memory_of(tensor.detach().cpu().contiguous()))

"""One pass of the calibration data through the float model, while statistics are collected.

Hooks on one linear of each site hand its input to the statistics that calibrators asked for, batch by batch. Nothing else is
kept, so memory does not grow with the amount of data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
"""The statistics of one site, by their class."""


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
    """Collect statistics of the activation of every site.

    Args:
        model: only watched; hooks are removed even when the pass is interrupted.
        batches: the calibration data.
        sites: whose activations are measured.
        kinds: which statistics to collect.
        transforms: by the name of the site. If given, what is measured is the transformed activation, in float32 and without
            its outlier channels.
        seed: for statistics that draw random samples.
        progress: show a progress bar; None decides by the terminal.
        digest: a hash object of hashlib, which takes in the tensors of each batch.

    Returns:
        The statistics by the name of the site and then by kind. Sites that no token reached are left out.

    Raises:
        CalibrationError: an activation is NaN or infinite, or there was no batch.
    """
    observer = _Observer(kinds, transforms, seed)
    count = 0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for index, site in enumerate(sites):
            for name in site.taps:
                hook = model.get_submodule(name).register_forward_pre_hook(observer.hook(site, index, name), with_kwargs=True)
                stack.callback(hook.remove)
        for batch in tracked(batches, "calibrating", progress, "batch"):
            if digest is not None:
                _hash(digest, batch)
            count += 1
            try:
                call(model, batch)
            except Exception as error:
                error.add_note(f"in calibration batch {count}")
                raise
            bad = next((name for name, ok in observer.finite.items() if not ok), None)
            if bad is not None:
                raise CalibrationError(
                    f"calibration batch {count} puts NaN or Inf into the input of {bad!r}: look at the data and at the "
                    "model's dtype (float16 overflows above 65504; try bfloat16)"
                )
    if not count:
        raise CalibrationError("calibration is empty: pass at least one batch")
    return observer.statistics


class _Observer:
    """Statistics that grow while a model runs, and whether all inputs were finite, by the name of the linear that read them."""

    def __init__(self, kinds: Sequence[type[Statistic]], transforms: Mapping[str, Transform] | None, seed: int) -> None:
        self.kinds, self.transforms, self.seed = kinds, transforms, seed
        self.statistics: dict[str, SiteStatistics] = {}
        self.finite: dict[str, Tensor] = {}

    def hook(self, site: Site, index: int, name: str) -> Callable[..., None]:
        """A forward pre-hook for the linear ``name``, which reads the activation of ``site``, the site of number ``index``."""

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_input(args, kwargs).detach()
            x = x.reshape(-1, x.shape[-1])
            if not len(x):
                return  # an expert that no token chose
            entry = self.statistics.setdefault(site.name, {})
            before = self.finite.get(name, torch.ones((), dtype=torch.bool, device=x.device))
            self.finite[name] = before & x.isfinite().all()
            if self.transforms is not None:
                x, _ = self.transforms[site.name].activation(x.float())
            for kind in self.kinds:
                if kind not in entry:
                    entry[kind] = kind(site.channels, x.device, self.seed + index)
                entry[kind].update(x)

        return take


def _hash(digest: Any, batch: Any) -> None:
    for tensor in all_tensors(batch):
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
        here = dense.cpu().contiguous()  # has a name, since memory_of() does not keep its tensor alive
        if here.numel():
            digest.update(memory_of(here))

"""A block of the model twice: as it is, and as a copy that rounds as its scheme will and can learn.

A :class:`Block` copies a block of the model, with the weights shared between its two halves. In the second half each linear to
be quantized is replaced by a :class:`LearnedLinear`, which computes in floating point what the integer layer will compute: it
rounds its input and its weight to the values that codes stand for. Linears that read the same activation share a
:class:`LearnedSite`, which holds the scale and the shift of that activation's channels. What is learned is therefore:

- for each site, the logarithm of a scale and possibly a shift, one for each row of the layer before it that produces the
channels; - for each linear, a clipping: how far from the largest weight of each row its grid ends.

The model itself is not touched. What was learned is read off as a :class:`~quantkit.core.transform.Transform` and as clips.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.calibration.statistics import Range, TokenSample
from quantkit.calibrators.base import SiteView
from quantkit.calibrators.learned.rounding import RoundRows, round_activation, round_symmetric
from quantkit.calibrators.noise import best_clip
from quantkit.core.formats import PerTensor, Quantized
from quantkit.core.transform import Transform
from quantkit.model.modules import replace_module, weight_of

LEAST_CLIP = 0.1
"""No grid may end below this fraction of the largest weight in its row."""


class Block:
    """A float copy of one block of a model, and a second copy that rounds and learns.

    Both compute in float32 if the block is in 16 bits, and in the block's own dtype otherwise.

    Args:
        module: the block; it is copied.
        name: its name in the model, by which names of linears begin.
        views: the sites whose linears are all inside of the block.
        shifts: whether shifts are learned, where a site allows it.
        clips: whether clippings are learned, where weights are quantized at all.

    Attributes:
        float: the float copy.
        quantized: the copy that rounds and learns. It shares its parameters with ``float``.
        dtype: in which both compute.
        sites, linears: what learns in ``quantized``.
    """

    def __init__(self, module: nn.Module, name: str, views: Sequence[SiteView], shifts: bool, clips: bool) -> None:
        self.name = name
        self.float = copy.deepcopy(module).requires_grad_(False).eval()
        halves = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.float.parameters())
        self.dtype = torch.float32 if halves else next(p.dtype for p in self.float.parameters() if p.is_floating_point())
        self.float.to(self.dtype)
        memo: dict[int, Any] = {id(p): p for p in (*self.float.parameters(), *self.float.buffers())}
        self.quantized = copy.deepcopy(self.float, memo)  # other modules with the same tensors
        self.sites: list[LearnedSite] = []
        self.linears: list[LearnedLinear] = []
        for view in views:
            site = LearnedSite(view, shifts)
            self.sites.append(site)
            for full in view.linears:
                inner = full.removeprefix(f"{name}.")
                linear = LearnedLinear(full, self.quantized.get_submodule(inner), site, clips and not view.fold_only)
                replace_module(self.quantized, inner, linear)
                self.linears.append(linear)
        # Some modules of torch have a fused path that reads weights of their children without calling these. A module with a
        # hook does not take it.
        self.quantized.register_forward_pre_hook(lambda *_: None)

    def cast(self, x: Tensor) -> Tensor:
        """``x`` in the dtype in which the block computes."""
        return x.to(self.dtype)

    def parameters(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Everything that learns: the logarithms of scales, the shifts, and the clippings."""
        return (
            [site.log_scale for site in self.sites if site.log_scale is not None],
            [site.row_shift for site in self.sites if site.row_shift is not None],
            [linear.steps for linear in self.linears if linear.steps is not None],
        )

    def state(self) -> dict[str, Tensor]:
        """A copy of everything that learns, by name."""
        scales = {f"scale.{s.view.name}": s.log_scale.detach().clone() for s in self.sites if s.log_scale is not None}
        scales |= {f"shift.{s.view.name}": s.row_shift.detach().clone() for s in self.sites if s.row_shift is not None}
        return scales | {f"clip.{x.name}": x.steps.detach().clone() for x in self.linears if x.steps is not None}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a :meth:`state` taken earlier."""
        for site in self.sites:
            if site.log_scale is not None:
                site.log_scale.copy_(state[f"scale.{site.view.name}"])
            if site.row_shift is not None:
                site.row_shift.copy_(state[f"shift.{site.view.name}"])
        for linear in self.linears:
            if linear.steps is not None:
                linear.steps.copy_(state[f"clip.{linear.name}"])

    @torch.no_grad()
    def center_channels(self) -> bool:
        """Set every shift to the middle of the range of its channels (paper, sec. 3.3). Returns whether there are any
        shifts."""
        for site in self.sites:
            site.center()
        return any(site.row_shift is not None for site in self.sites)

    @torch.no_grad()
    def search_clips(self) -> None:
        """Set the clipping of every row to the one with which rounding the row does the least harm, given how large inputs
        are."""
        for linear in self.linears:
            if linear.steps is not None:
                tokens, counts = linear.site.view.statistic(TokenSample).weighted()
                clip = best_clip(linear.inner_weight()[0].float(), counts @ tokens**2, linear.site.view.scheme)
                linear.steps.copy_((1 - clip[: len(linear.steps)]) * linear.site.view.scheme.weight.number.qmax)

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """To be called after each step of the optimizer.

        Clippings are moved back to where a grid ends between :data:`LEAST_CLIP` times the largest weight of its row and that
        weight, and rounded inputs, which were made with the parameters of before, are forgotten.
        """
        for linear in self.linears:
            if linear.steps is not None:
                linear.steps.clamp_(0, (1 - LEAST_CLIP) * linear.site.view.scheme.weight.number.qmax)
        for site in self.sites:
            site.last = None

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """A context in which nothing learns, so that weights are rounded once and not again for every sample."""
        for linear in self.linears:
            linear.constant = linear.rounded_weight()
        try:
            yield
        finally:
            for linear in self.linears:
                linear.constant = None
            for site in self.sites:
                site.last = None


class LearnedSite:
    """A site whose channels are scaled and shifted by what is learned, on top of what earlier calibrators decided.

    There is one scale and one shift for each row of the producer, because they are folded into it; channels that share a row
    share both. A site without a producer learns nothing. Parameters are counted so that one learning rate suits all of them: a
    scale by its logarithm, and a shift in units of half the range of its row.

    Args:
        view: the site.
        shifts: whether to learn a shift, if the producer has a bias to fold it into.

    Attributes:
        log_scale: ``[rows]`` float32, or None if there is no producer.
        row_shift: ``[rows]`` float32, or None if no shift is learned.
        half_range: ``[rows]`` float32, the distance by which a ``row_shift`` of 1 shifts.
        range: ``[2, K]``, least and largest value of each channel, for static schemes.
        last: the last input and what it was rounded to, since all linears of a site ask for the same one.
    """

    def __init__(self, view: SiteView, shifts: bool) -> None:
        self.view, self.start = view, view.transform
        self.range: Tensor | None = None
        if view.scheme.is_static:
            seen = view.statistic(Range)
            self.range = torch.stack([seen.low, seen.high])
        self.log_scale: Tensor | None = None
        self.row_shift: Tensor | None = None
        self.last: tuple[Tensor, tuple[Tensor, Tensor | None]] | None = None
        if view.site.producer is not None:
            rows = int(view.site.producer.rows.max()) + 1
            self.log_scale = torch.zeros(rows, device=view.device, requires_grad=True, dtype=torch.float32)
            if shifts and view.site.producer.bias is not None:
                self.row_shift = torch.zeros(rows, device=view.device, requires_grad=True, dtype=torch.float32)
                low, high = self.row_ends()
                self.half_range = (high - low) / 2

    def row_ends(self) -> tuple[Tensor, Tensor]:
        """Least and largest value of the channels of each producer row, two ``[rows]``, as earlier calibrators left them."""
        assert self.log_scale is not None
        seen, index = self.view.statistic(Range), self.row_of_channel()
        low, high = torch.zeros_like(self.log_scale), torch.zeros_like(self.log_scale)
        return (
            low.scatter_reduce(0, index, seen.low, "amin", include_self=False),
            high.scatter_reduce(0, index, seen.high, "amax", include_self=False),
        )

    def row_of_channel(self) -> Tensor:
        """The producer row of each channel, ``[K]`` int64, with channels in the order in which earlier calibrators left
        them."""
        assert self.view.site.producer is not None
        rows, order = self.view.site.producer.rows.to(self.view.device), self.start.permutation
        return rows if order is None else rows[order]

    def center(self) -> None:
        """Set each shift so that the middle of its row's range becomes 0."""
        if self.row_shift is not None:
            low, high = self.row_ends()
            self.row_shift.copy_(torch.where(self.half_range > 0, (low + high) / 2 / self.half_range, 0.0))

    def own_scale(self) -> Tensor:
        """The learned scale of each channel, ``[K]`` float32, in the order in which earlier calibrators left the channels."""
        assert self.log_scale is not None
        return self.log_scale.exp()[self.row_of_channel()]

    def own_shift(self) -> Tensor | None:
        """The learned shift of each channel, ``[K]`` float32 in the same order; None if no shift is learned."""
        return None if self.row_shift is None else (self.row_shift * self.half_range)[self.row_of_channel()]

    def own(self) -> Transform:
        """What was learned, as constants: a transform to apply after those of earlier calibrators."""
        shift = self.own_shift()
        return Transform(scale=self.own_scale().detach(), shift=None if shift is None else shift.detach())

    def transform(self) -> Transform:
        """Everything that happens to the channels: what earlier calibrators decided, and what is learned, with its gradient."""
        if self.log_scale is None:
            return self.start
        return self.start.then(Transform(scale=self.own_scale(), shift=self.own_shift()))

    def bias(self, weight: Tensor) -> Tensor | None:
        """``[N]``, what shifts add to the bias of a linear with this ``weight [N, K]``; None if there are no shifts."""
        return None if self.row_shift is None and self.start.shift is None else self.transform().bias(weight)

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The activation of the site as the integer product will see it.

        Args:
            x: ``[..., K]``, the input of a linear.

        Returns:
            ``[..., K]``, transformed and rounded; and ``[..., n]``, the outlier channels that are not rounded, or None.
        """
        if self.last is None or self.last[0] is not x:
            inner, side = self.transform().activation(x)
            self.last = x, (self._round(inner), side)
        return self.last[1]

    def _round(self, x: Tensor) -> Tensor:
        """The transformed activation ``x [..., K]`` rounded as the scheme says."""
        wanted = self.view.scheme.input
        if not isinstance(wanted, Quantized):
            return x
        if self.range is not None:
            ends, shift = self.range, self.own_shift()
            ends = ends if shift is None else ends - shift
            ends = ends if self.log_scale is None else ends / self.own_scale()
            return round_activation(x, wanted, ends.min(), ends.max())
        if wanted.number.symmetric:
            return RoundRows.apply(x, None, wanted.number.bits)
        return round_activation(x, wanted, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))


class LearnedLinear(nn.Module):
    """A linear that computes in floating point what it will compute in integers, with gradients for what is learned.

    Args:
        name: of the linear in the model.
        linear: whose weight and bias are used; they do not learn.
        site: the activation that it reads.
        clips: whether a clipping of its weight is learned.

    Attributes:
        steps: how many steps of the grid are clipped off each row, ``[N, 1]`` float32 (``[1, 1]`` if the weight has a single
            scale), 0 for a grid that ends at the largest weight; None if no clipping is learned. Counting in steps lets one
            learning rate suit any number of bits.
        constant: the rounded weight, while nothing learns.
    """

    def __init__(self, name: str, linear: nn.Module, site: LearnedSite, clips: bool) -> None:
        super().__init__()
        self.name, self.site = name, site
        self.weight = weight_of(linear).detach()
        bias = getattr(linear, "bias", None)
        self.bias = None if bias is None else bias.detach()
        self.constant: tuple[Tensor, Tensor | None] | None = None
        self.steps: Tensor | None = None
        if clips:
            shape = (1, 1) if isinstance(site.view.scheme.weight.granularity, PerTensor) else (len(self.weight), 1)
            self.steps = torch.zeros(shape, device=self.weight.device, requires_grad=True, dtype=torch.float32)

    def clip(self) -> Tensor:
        """The clipping as :attr:`quantkit.calibrators.base.Plan.clips` has it: ``[N, 1]``, where the grid of each row ends, as
        a fraction of the largest weight of the row."""
        assert self.steps is not None
        return (1 - self.steps / self.site.view.scheme.weight.number.qmax).expand(len(self.weight), 1).contiguous()

    def inner_weight(self) -> tuple[Tensor, Tensor | None]:
        """The transformed weight before rounding, ``[N, K]``, and the columns of outlier channels, ``[N, n]`` or None."""
        return self.site.transform().weight(self.weight)

    def rounded_weight(self) -> tuple[Tensor, Tensor | None]:
        """The same with the weight rounded; the columns of outlier channels stay as they are."""
        inner, side = self.inner_weight()
        clip, bits = None if self.steps is None else self.clip(), self.site.view.scheme.weight.number.bits
        if isinstance(self.site.view.scheme.weight.granularity, PerTensor):
            absmax = inner.abs().amax()
            return round_symmetric(inner, absmax if clip is None else absmax * clip, bits), side
        return RoundRows.apply(inner, clip, bits), side

    def forward(self, x: Tensor) -> Tensor:
        inner, side = self.site.rounded(x)
        weight, side_weight = self.rounded_weight() if self.constant is None else self.constant
        bias, extra = self.bias, self.site.bias(self.weight)
        if extra is not None:
            bias = extra if bias is None else bias + extra
        y = F.linear(inner.to(x.dtype), weight.to(x.dtype), bias)
        return y if side is None or side_weight is None else y + side @ side_weight.T

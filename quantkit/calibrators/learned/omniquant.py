"""OmniQuant (Shao et al. 2024): learn scales, shifts and clipping by gradient descent, one block of the model at a time."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.calibration.blocks import Call, Place, Stream, find_blocks, record_calls, samples_of
from quantkit.calibration.statistics import Range, Statistic, TokenSample
from quantkit.calibrators.base import Plan, SiteView, Stage, View
from quantkit.calibrators.noise import best_clip
from quantkit.core.errors import MethodError
from quantkit.core.numerics import ABSMAX_FLOOR, absmax_scale, encode, encode_asymmetric, qmax, range_scale
from quantkit.core.scheme import Scheme
from quantkit.core.transform import Transform
from quantkit.model.modules import evaluating, weight_of

log = logging.getLogger("quantkit")

HELD = 8
"""Every eighth sample is held out, and the last one if there are fewer."""

LEAST_CLIP = 0.1
"""No grid shrinks below this share of a row's largest weight."""


@dataclass(frozen=True)
class OmniQuant:
    """Scales and shifts of channels (LET) and a clipping of each weight row (LWC) that make the output of every block right.

    Blocks are taken in order. Two streams of hidden states run along: one of the float model, and one of the model whose
    earlier blocks are quantized already, so that a block learns to make up for them (paper, sec. 3.1). What is learned starts
    from what earlier calibrators decided, so ``["smoothquant", OmniQuant()]`` starts from SmoothQuant; the name
    ``"omniquant"`` stands for that list. A block keeps what it learned only as far as samples that were held out gain by it:
    its error on them is never above that of its start.

    Scales are learned for sites whose producer can take them, one per producer row, and shifts where it has a bias for them and
    so have all that read it (:attr:`quantkit.core.sites.Producer.bias`). The result is data, as with every calibrator: it folds, and
    what runs is a plain INT8 model.

    Args:
        samples: of the calibration data, at most; one eighth is held out.
        epochs: passes over the samples for each block.
        scale_lr: learning rate of the logarithm of scales; 0 learns none.
        shift_lr: learning rate of shifts, counted in half the range of their channel; 0 learns none.
        clip_lr: learning rate of clippings, counted in steps of the grid, so that it suits any number of bits; 0 learns none.
        offload: where the two streams are kept: ``"device"`` (that of the model), ``"cpu"`` or ``"disk"``.
        folder: where finished blocks are written, to go on after an interruption, to the same bits; None for nowhere. Another
            model, other data or options in the same folder are refused.

    Raises:
        MethodError: a value that makes no sense, or a model in which no chain of blocks is found.
    """

    name: ClassVar[str] = "omniquant"
    stage: ClassVar[Stage] = Stage.SCALE
    statistics: ClassVar[tuple[type[Statistic], ...]] = (Range, TokenSample)

    samples: int = 32
    epochs: int = 3
    scale_lr: float = 2e-2
    shift_lr: float = 1e-2
    clip_lr: float = 5e-2
    offload: Place = field(default="cpu", metadata={"recipe": False})
    folder: str | os.PathLike[str] | None = field(default=None, metadata={"recipe": False})

    def __post_init__(self) -> None:
        for name, least in (("samples", 2), ("epochs", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise MethodError(f"OmniQuant({name}={value!r}): a whole number from {least} up")
        for name in ("scale_lr", "shift_lr", "clip_lr"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise MethodError(f"OmniQuant({name}={value!r}): a learning rate is a number from 0 up to 1")
        if self.offload not in ("device", "cpu", "disk"):
            raise MethodError(
                f"OmniQuant(offload={self.offload!r}): streams are kept on the 'device', in 'cpu' memory or on 'disk'"
            )

    def plan(self, view: View) -> Plan:
        blocks = find_blocks(view.model, [name for site in view.sites for name in site.linears])
        samples = samples_of(view.batches(), self.samples)
        if len(samples) < 2:
            raise MethodError("it learns from some samples and judges by others: pass at least two calibration batches")
        target, calls = record_calls(view.model, blocks, samples, self.offload)
        inputs = Stream(self.offload, target.device)
        for i in range(len(samples)):
            inputs[i] = target[i]
        plan = Plan()
        key = self._key(view, target, len(samples))
        for index, name in enumerate(view.progress(blocks, self.name)):
            inside = [s for s in view.sites if all(linear.startswith(f"{name}.") for linear in s.linears)]
            start = time.perf_counter()
            with evaluating(view.model):
                key = block_key(key, view.model.get_submodule(name), inside)
                block = Block(view.model.get_submodule(name), name, inside, self.shift_lr > 0, self.clip_lr > 0)
                ways = [c[index] for c in calls]
                for i, way in enumerate(ways):  # from here on the first stream holds what the block should return
                    target[i] = way.run(block.float, block.cast(target[i])).to(target[i].dtype)
            file = None if self.folder is None else Path(self.folder) / f"{index:04d}.safetensors"
            found = None if file is None else read_block(file, key, block)
            if found is None:
                random = torch.Generator().manual_seed(view.seed + zlib.crc32(name.encode()))
                with evaluating(view.model), torch.enable_grad():
                    found = self._learn(block, ways, inputs, target, random)
                if file is not None:
                    write_block(file, key, block, found)
                how = f"in {time.perf_counter() - start:.0f} s"
            else:
                how = "read back"
            log.info("omniquant: block %s, held-out error %.3e -> %.3e, %s", name, *found, how)
            with torch.no_grad(), block.fixed():
                for i, way in enumerate(ways):
                    inputs[i] = way.run(block.quantized, block.cast(inputs[i])).to(inputs[i].dtype)
            for site in block.sites:
                plan.notes[site.view.name] = {"block error": f"{found[0]:.2e} -> {found[1]:.2e}"}
                if site.log_scale is not None:
                    plan.transforms[site.view.name] = site.own()
            if not any(site.view.fold_only for site in block.sites):
                plan.clips.update(
                    {linear.name: linear.share().detach() for linear in block.linears if linear.steps is not None}
                )
        return plan

    def _learn(
        self, block: Block, calls: Sequence[Call], inputs: Stream, target: Stream, random: torch.Generator
    ) -> tuple[float, float]:
        """Train the block in place; its error on held-out samples before and after."""
        count = len(calls)
        held = list(range(HELD - 1, count, HELD)) or [count - 1]
        train = [i for i in range(count) if i not in held]

        def loss(i: int) -> Tensor:
            wanted = block.cast(target[i])
            return distance(calls[i].run(block.quantized, block.cast(inputs[i])), wanted)

        def judge() -> float:
            with torch.no_grad(), block.fixed():
                return float(torch.stack([loss(i) for i in held]).mean())

        before = judge()
        best = (before, block.state())
        if block.center_channels():
            best = min(best, (judge(), block.state()), key=lambda pair: pair[0])
            block.restore(best[1])
        if self.clip_lr:
            block.search_clips()
            best = min(best, (judge(), block.state()), key=lambda pair: pair[0])
        rates = zip(block.parameters(), (self.scale_lr, self.shift_lr, self.clip_lr), strict=True)
        groups = [{"params": p, "lr": lr} for p, lr in rates if p and lr]
        if not groups:
            block.restore(best[1])
            return before, best[0]
        block.restore(best[1])
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        steps = self.epochs * len(train)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        with fast_products(inputs.device):
            for _ in range(self.epochs):
                for place in torch.randperm(len(train), generator=random).tolist():
                    optimizer.zero_grad(set_to_none=True)
                    error = loss(train[place])
                    if not error.requires_grad:
                        raise MethodError(
                            f"block {block.name!r} does not pass its output through the linears that were found in it"
                        )
                    error.backward()
                    optimizer.step()
                    decay.step()
                    block.keep_in_range()
                    if not bool(error.isfinite()):
                        break
                now = judge()
                if not now < float("inf"):
                    break  # what has blown up does not come back
                best = min(best, (now, block.state()), key=lambda pair: pair[0])
        block.restore(best[1])
        return before, best[0]

    def _key(self, view: View, inputs: Stream, count: int) -> str:
        """Of everything that decides what the first block will learn, but its weights."""
        options = {k: v for k, v in asdict(self).items() if k not in ("offload", "folder")}
        schemes = ", ".join(sorted({site.scheme.name for site in view.sites}))
        facts = {"options": options, "seed": view.seed, "scheme": schemes, "fold": view.sites[0].fold_only}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for i in range(count):
            digest.update(bytes_of(inputs[i]))
        return digest.hexdigest()


def distance(got: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of ``|got - wanted|^2 / |wanted|^2``: norms make tokens equal, so a few huge ones should not decide."""
    return ((got - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1).clamp_min(1e-20)).mean()


class Block:
    """A block as a float copy, and a copy whose linears round both sides as the scheme will, and learn."""

    def __init__(self, module: nn.Module, name: str, views: Sequence[SiteView], shifts: bool, clips: bool) -> None:
        self.name = name
        self.float = copy.deepcopy(module).requires_grad_(False).eval()
        halves = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.float.parameters())
        self.dtype = torch.float32 if halves else next(p.dtype for p in self.float.parameters() if p.is_floating_point())
        self.float.to(self.dtype)
        memo: dict[int, Any] = {id(p): p for p in (*self.float.parameters(), *self.float.buffers())}
        self.quantized = copy.deepcopy(self.float, memo)  # the same tensors in other modules
        self.sites, self.linears = [], []
        for view in views:
            site = LearnedSite(view, shifts)
            self.sites.append(site)
            for full in view.linears:
                inner = full.removeprefix(f"{name}.")
                linear = LearnedLinear(full, self.quantized.get_submodule(inner), site, clips and not view.fold_only)
                self.quantized.set_submodule(inner, linear)
                self.linears.append(linear)
        # Fused paths of torch read weights past their modules, and stand aside where there are hooks.
        self.quantized.register_forward_pre_hook(lambda *_: None)

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def parameters(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Logarithms of scales, shifts, and clippings."""
        return (
            [site.log_scale for site in self.sites if site.log_scale is not None],
            [site.row_shift for site in self.sites if site.row_shift is not None],
            [linear.steps for linear in self.linears if linear.steps is not None],
        )

    def state(self) -> dict[str, Tensor]:
        """What was learned, as a copy."""
        scales = {f"scale.{s.view.name}": s.log_scale.detach().clone() for s in self.sites if s.log_scale is not None}
        scales |= {f"shift.{s.view.name}": s.row_shift.detach().clone() for s in self.sites if s.row_shift is not None}
        return scales | {f"clip.{x.name}": x.steps.detach().clone() for x in self.linears if x.steps is not None}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
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
        """Shift every channel to the middle of its range (paper, sec. 3.3); whether there are shifts."""
        for site in self.sites:
            site.center()
        return any(site.row_shift is not None for site in self.sites)

    @torch.no_grad()
    def search_clips(self) -> None:
        """Start every row from the grid with the least error by itself."""
        for linear in self.linears:
            if linear.steps is not None:
                tokens, counts = linear.site.view.statistic(TokenSample).weighted()
                share = best_clip(linear.inner_weight()[0].float(), counts @ tokens**2, linear.site.view.scheme)
                linear.steps.copy_((1 - share[: len(linear.steps)]) * qmax(linear.site.view.scheme.weight_bits))

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """After a step: no grid wider than its row. And forget the input that was rounded last."""
        for linear in self.linears:
            if linear.steps is not None:
                linear.steps.clamp_(0, (1 - LEAST_CLIP) * qmax(linear.site.view.scheme.weight_bits))
        for site in self.sites:
            site.last = None

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Inside, weights are rounded once and not for every sample."""
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
    """A site whose scale and shift are learned: one of each per producer row, on top of what earlier calibrators decided.

    A scale is learned as its logarithm, a shift in half the range of its channel (for rows with several, the largest).
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
            self.log_scale = torch.zeros(rows, device=view.device, requires_grad=True)
            if shifts and view.site.producer.bias is not None:
                self.row_shift = torch.zeros(rows, device=view.device, requires_grad=True)
                low, high = self.row_ends()
                self.unit = (high - low) / 2

    def row_ends(self) -> tuple[Tensor, Tensor]:
        """Least and largest value of the channels of each producer row ``[rows]``, as earlier calibrators left them."""
        assert self.log_scale is not None
        seen, place = self.view.statistic(Range), self.row_of_channel()
        low, high = torch.zeros_like(self.log_scale), torch.zeros_like(self.log_scale)
        return (
            low.scatter_reduce(0, place, seen.low, "amin", include_self=False),
            high.scatter_reduce(0, place, seen.high, "amax", include_self=False),
        )

    def row_of_channel(self) -> Tensor:
        """``[K]`` int64, numbered as earlier calibrators left the channels."""
        assert self.view.site.producer is not None
        rows, order = self.view.site.producer.rows.to(self.view.device), self.start.permutation
        return rows if order is None else rows[order]

    def center(self) -> None:
        """Shift the middle of every row's range to 0."""
        if self.row_shift is not None:
            low, high = self.row_ends()
            self.row_shift.copy_(torch.where(self.unit > 0, (low + high) / 2 / self.unit, 0.0))

    def own_scale(self) -> Tensor:
        """``[K]`` float32, numbered as earlier calibrators left the channels."""
        assert self.log_scale is not None
        return self.log_scale.exp()[self.row_of_channel()]

    def own_shift(self) -> Tensor | None:
        """The same of the shift."""
        return None if self.row_shift is None else (self.row_shift * self.unit)[self.row_of_channel()]

    def own(self) -> Transform:
        """What was learned, as data."""
        shift = self.own_shift()
        return Transform(scale=self.own_scale().detach(), shift=None if shift is None else shift.detach())

    def transform(self) -> Transform:
        """Everything that happens to the channels."""
        if self.log_scale is None:
            return self.start
        return self.start.then(Transform(scale=self.own_scale(), shift=self.own_shift()))

    def bias(self, weight: Tensor) -> Tensor | None:
        """What shifts add to the bias of a linear."""
        return None if self.row_shift is None and self.start.shift is None else self.transform().bias(weight)

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rounded activation ``[..., K]`` and the side that is not rounded; linears of a site ask for the same x."""
        if self.last is None or self.last[0] is not x:
            inner, side = self.transform().activation(x)
            scheme = self.view.scheme
            if not scheme.quantizes_activations:
                pass
            elif self.range is not None:
                ends, shift = self.range, self.own_shift()
                ends = ends if shift is None else ends - shift
                ends = ends if self.log_scale is None else ends / self.own_scale()
                inner = round_activation(inner, scheme, ends.min(), ends.max())
            elif scheme.symmetric:
                inner = RoundRows.apply(inner, None, scheme.activation_bits)
            else:
                inner = round_activation(inner, scheme, inner.amin(-1, keepdim=True), inner.amax(-1, keepdim=True))
            self.last = x, (inner, side)
        return self.last[1]


class LearnedLinear(nn.Module):
    """A linear as it will be in INT8, in floating point, with a gradient for its scales and its clipping."""

    def __init__(self, name: str, linear: nn.Module, site: LearnedSite, clips: bool) -> None:
        super().__init__()
        self.name, self.site = name, site
        self.weight = weight_of(linear).detach()
        bias = getattr(linear, "bias", None)
        self.bias = None if bias is None else bias.detach()
        self.constant: tuple[Tensor, Tensor | None] | None = None
        self.steps: Tensor | None = None
        if clips:
            shape = (1, 1) if site.view.scheme.weights == "tensor" else (len(self.weight), 1)
            self.steps = torch.zeros(shape, device=self.weight.device, requires_grad=True)

    def share(self) -> Tensor:
        """``[N, 1]`` of each row's largest weight that its grid spans."""
        assert self.steps is not None
        return (1 - self.steps / qmax(self.site.view.scheme.weight_bits)).expand(len(self.weight), 1).contiguous()

    def inner_weight(self) -> tuple[Tensor, Tensor | None]:
        """The weight that goes into INT8 and the side that does not, before rounding."""
        return self.site.transform().weight(self.weight)

    def rounded_weight(self) -> tuple[Tensor, Tensor | None]:
        inner, side = self.inner_weight()
        share, bits = None if self.steps is None else self.share(), self.site.view.scheme.weight_bits
        if self.site.view.scheme.weights == "tensor":
            absmax = inner.abs().amax()
            return round_symmetric(inner, absmax if share is None else absmax * share, bits), side
        return RoundRows.apply(inner, share, bits), side

    def forward(self, x: Tensor) -> Tensor:
        inner, side = self.site.rounded(x)
        weight, side_weight = self.rounded_weight() if self.constant is None else self.constant
        bias, extra = self.bias, self.site.bias(self.weight)
        if extra is not None:
            bias = extra if bias is None else bias + extra
        y = F.linear(inner.to(x.dtype), weight.to(x.dtype), bias)
        return y if side is None or side_weight is None else y + side @ side_weight.T


class StraightThrough(torch.autograd.Function):
    """``codes * scale`` with the gradient of ``x`` where x is inside of the grid, and of its nearer end where it is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, codes: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, codes, inside)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale, codes, inside = ctx.saved_tensors
        through = gradient * inside if ctx.needs_input_grad[0] else None
        of_scale = None
        if ctx.needs_input_grad[1]:
            of_scale = (gradient * (codes - torch.where(inside, x / scale, 0.0))).sum_to_size(scale.shape)
        return through, of_scale, None, None


class RoundRows(torch.autograd.Function):
    """Rows ``x [..., K]`` on the grid of their largest value times ``share``, as :func:`round_symmetric` has them.

    In half the passes over memory, or a fifth where they are compiled: they are most of what a step takes on a GPU. Of equal
    largest values the first one gets the gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Tensor | None, bits: int) -> Tensor:
        y, rest, largest, place = fused(round_rows, x)(x, share, bits)
        ctx.save_for_backward(rest, place, x.gather(-1, place).sign(), largest, share)
        ctx.top = float(qmax(bits))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rest, place, sign, largest, share = ctx.saved_tensors
        through, of_scale = fused(gradient_of_rows, gradient)(gradient, rest)
        of_absmax = of_scale / ctx.top
        of_share = None if share is None or not ctx.needs_input_grad[1] else of_absmax * largest
        of_largest = of_absmax if share is None else of_absmax * share
        return through.scatter_add_(-1, place, of_largest * sign), of_share, None


def round_rows(x: Tensor, share: Tensor | None, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y``; codes less steps, at most a half inside of the grid, and the code itself, which is more, outside of it; and the
    largest value of each row and where it is."""
    top = float(qmax(bits))
    largest, place = x.abs().max(dim=-1, keepdim=True)
    absmax = largest if share is None else largest * share
    steps = x * (torch.full_like(absmax, top) / absmax.clamp_min(ABSMAX_FLOOR))
    codes = steps.round().clamp(-top, top)
    rest = torch.where(steps.abs() <= top + 0.5, codes - steps, codes)
    return codes * absmax_scale(absmax, bits), rest, largest, place


def gradient_of_rows(gradient: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """What reaches x straight through, and the gradient of the scale."""
    return torch.where(rest.abs() <= 0.5, gradient, 0.0), (gradient * rest).sum(-1, keepdim=True)


def fused(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """``function``, compiled where passes over ``x`` are what it costs."""
    worth_it = x.is_cuda and x.numel() >= 2**20 and importlib.util.find_spec("triton") is not None
    return compiled(function) if worth_it else function


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def round_symmetric(x: Tensor, absmax: Tensor, bits: int) -> Tensor:
    """``x`` on the grid of ``absmax``, which broadcasts; the gradient reaches both."""
    with torch.no_grad():
        codes = encode(x, absmax, bits)
        inside = x.abs() * qmax(bits) <= absmax * (qmax(bits) + 0.5)
    return StraightThrough.apply(x, absmax_scale(absmax, bits), codes, inside)


def round_activation(x: Tensor, scheme: Scheme, low: Tensor, high: Tensor) -> Tensor:
    """``x`` on the grid of its range, as ``scheme`` has it; ``low`` and ``high`` broadcast."""
    bits = scheme.activation_bits
    if scheme.symmetric:
        return round_symmetric(x, torch.maximum(-low, high) if scheme.is_static else high, bits)
    scale, zero = range_scale(low, high, bits)
    with torch.no_grad():
        codes = encode_asymmetric(x, scale, zero, bits).float() - zero
        wanted = torch.round(x / scale) + zero
        inside = (wanted >= -qmax(bits) - 1) & (wanted <= qmax(bits))
    return StraightThrough.apply(x, scale, codes, inside)


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Inside, a GPU multiplies float32 in TF32: codes have 8 bits and TF32 11, so rounding stays far below the grid."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def block_key(key: str, module: nn.Module, views: Sequence[SiteView]) -> str:
    """Of everything that decides what a block learns: all blocks before it, its weights, and what is done to its channels."""
    digest = hashlib.sha256(key.encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(bytes_of(tensor))
    for view in views:
        digest.update(view.name.encode())
        transform = view.transform
        for tensor in (transform.shift, transform.scale, transform.outliers, transform.permutation):
            digest.update(b"-" if tensor is None else bytes_of(tensor))
        for linear in view.linears:
            digest.update(linear.encode())
    return digest.hexdigest()


def write_block(file: Path, key: str, block: Block, errors: tuple[float, float]) -> None:
    """A finished block, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    facts = {"key": key, "before": errors[0].hex(), "after": errors[1].hex()}
    save_file({name: t.cpu().contiguous() for name, t in block.state().items()}, new, metadata=facts)
    with new.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(new, file)


def read_block(file: Path, key: str, block: Block) -> tuple[float, float] | None:
    """Put back what was learned, and return the errors; None if this block was not finished.

    Raises:
        MethodError: the file is damaged, or of another run.
    """
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as handle:
            facts = handle.metadata() or {}
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  safe_open is no mapping
        errors = float.fromhex(facts["before"]), float.fromhex(facts["after"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise MethodError(f"{file} is damaged: delete it, and its block is learned again ({error})") from None
    if facts.get("key") != key or {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in block.state().items()}:
        raise MethodError(f"{file} is of another run (model, data, options or earlier blocks differ): choose another folder")
    block.restore(state)
    return errors

"""OmniQuant (Shao et al. 2024): learn scales, shifts and clippings by gradient descent, one block of the model at a time.

A formula such as SmoothQuant's guesses which scales make rounding harmless. OmniQuant tries them out: it rounds a block of the
model as the scheme will, compares its output with that of the float block on calibration samples, and follows the gradient.
Learning a block at a time needs the memory of one block, and not of the whole model with its gradients.

The file holds the algorithm: the options, the walk over the blocks (:meth:`OmniQuant.plan`) and the training of one block. The
copies of a block that learn are in :mod:`~quantkit.calibrators.learned.layers`, gradients through rounding in
:mod:`~quantkit.calibrators.learned.rounding`, and the folder from which an interrupted run goes on in
:mod:`quantkit.calibration.store`.
"""

from __future__ import annotations

import json
import logging
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from quantkit.calibration.blocks import Call, HiddenStates, Place, find_blocks, record_calls, samples_of
from quantkit.calibration.statistics import Range, Statistic, TokenSample
from quantkit.calibration.store import Fingerprint, Store, Work
from quantkit.calibrators.base import Plan, SiteView, Stage, View
from quantkit.calibrators.learned.layers import Block
from quantkit.core.errors import MethodError
from quantkit.model.modules import evaluating

log = logging.getLogger("quantkit")

HELD = 8
"""Every eighth sample is held out for judging. If there are fewer than eight, the last one is."""


@dataclass(frozen=True)
class OmniQuant:
    """Learns a scale and a shift for channels and a clipping for each row of a weight, so that every block's output stays
    right.

    The paper calls the first two learnable equivalent transformation (LET) and the third learnable weight clipping (LWC).
    Blocks are taken in the order in which they run. Two sets of hidden states go along, one as the float model has them and one
    as the model has them whose earlier blocks are quantized: a block is trained to turn the second into what the float block
    makes of the first, and so learns to make up for the errors of the blocks before it (paper, sec. 3.1).

    Learning starts from what earlier calibrators decided. ``["smoothquant", OmniQuant()]`` starts from SmoothQuant, and the
    name ``"omniquant"`` stands for that list. Some samples are held out and only judge: a block keeps the state in which its
    error on them was least, so its error there is never above that of its start.

    A scale is learned for each row of a producer that can take one, and a shift where the producer has a bias to take it and
    all linears that read the channels have one to make up for it (:attr:`quantkit.core.sites.Producer.bias`). The result is
    data, as with every calibrator. All of it can be folded, so the quantized model runs as fast as without it.

    Args:
        samples: the largest number of samples taken from the calibration data; one eighth of them is held out.
        epochs: passes over the samples for each block.
        scale_lr: learning rate of the logarithms of scales; 0 learns no scales.
        shift_lr: learning rate of shifts, in units of half the range of their channel; 0 learns no shifts.
        clip_lr: learning rate of clippings, in steps of the grid, so that it suits any number of bits; 0 learns no clippings.
        offload: where the hidden states are kept: ``"device"`` (that of the model), ``"cpu"`` or ``"disk"``.
        folder: where finished blocks are written. If the folder is passed again after an interruption, they are read back and
            the run goes on, to the same bits; a folder with blocks of another model, other data or other options is refused.
            None writes nothing.

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
                f"OmniQuant(offload={self.offload!r}): hidden states are kept on the 'device', in 'cpu' memory or on 'disk'"
            )

    def plan(self, view: View) -> Plan:
        with nullcontext() if self.folder is None else Store(self.folder) as store:
            return self._plan(view, store)

    def _plan(self, view: View, store: Store | None) -> Plan:
        """With the folder that finished blocks are kept in, if there is one."""
        blocks = find_blocks(view.model, [name for site in view.sites for name in site.linears])
        samples = samples_of(view.batches(), self.samples)
        if len(samples) < 2:
            raise MethodError("it learns from some samples and judges by others: pass at least two calibration batches")
        target, calls = record_calls(view.model, blocks, samples, self.offload)
        inputs = HiddenStates(self.offload, target.device)
        for i in range(len(samples)):
            inputs[i] = target[i]
        plan = Plan()
        key = self._key(view, target, len(samples))
        for index, name in enumerate(view.progress(blocks, self.name)):
            inside = [s for s in view.sites if all(linear.startswith(f"{name}.") for linear in s.linears)]
            ways = [c[index] for c in calls]
            start = time.perf_counter()
            with evaluating(view.model):
                module = view.model.get_submodule(name)
                key = block_key(key, module, inside)
                block = Block(module, name, inside, self.shift_lr > 0, self.clip_lr > 0)
                for i, way in enumerate(ways):  # from here on `target` holds what the block should return
                    target[i] = way.run(block.float, block.cast(target[i])).to(target[i].dtype)
            file = f"{index:04d}"
            done = None if store is None else store.read(file, key, block.state(), ("before", "after"))
            if done is not None:
                block.restore(done.tensors)
                errors, how = (done.numbers["before"], done.numbers["after"]), "read back"
            else:
                random = torch.Generator().manual_seed(view.seed + zlib.crc32(name.encode()))
                with evaluating(view.model), torch.enable_grad():
                    errors = self._learn(block, ways, inputs, target, random)
                if store is not None:
                    store.write(file, key, Work(block.state(), {"before": errors[0], "after": errors[1]}))
                how = f"in {time.perf_counter() - start:.0f} s"
            log.info("omniquant: block %s, held-out error %.3e -> %.3e, %s", name, *errors, how)
            with torch.no_grad(), block.fixed():  # and `inputs` what the quantized block returns
                for i, way in enumerate(ways):
                    inputs[i] = way.run(block.quantized, block.cast(inputs[i])).to(inputs[i].dtype)
            add_decisions(plan, block, errors)
        return plan

    def _learn(
        self,
        block: Block,
        calls: Sequence[Call],
        inputs: HiddenStates,
        target: HiddenStates,
        random: torch.Generator,
    ) -> tuple[float, float]:
        """Train a block in place.

        Args:
            block: what learns.
            calls: how the block is called on each sample.
            inputs: the hidden states that it reads, as the quantized blocks before it return them.
            target: the hidden states that it should return.
            random: draws the order of the samples.

        Returns:
            Its error on held-out samples before and after.
        """
        samples = Samples(block, calls, inputs, target)
        before = samples.held_out_error()
        best = (before, block.state())
        if block.center_channels():
            best = better(best, samples.held_out_error(), block)
            block.restore(best[1])
        if self.clip_lr:
            block.search_clips()
            best = better(best, samples.held_out_error(), block)
        block.restore(best[1])
        rates = zip(block.parameters(), (self.scale_lr, self.shift_lr, self.clip_lr), strict=True)
        groups = [{"params": p, "lr": lr} for p, lr in rates if p and lr]
        if groups:
            optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
            steps = self.epochs * len(samples.train)
            decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
            with fast_products(inputs.device):
                for _ in range(self.epochs):
                    samples.train_once(optimizer, decay, random)
                    now = samples.held_out_error()
                    if not now < float("inf"):
                        break  # what has blown up does not come back
                    best = better(best, now, block)
            block.restore(best[1])
        return before, best[0]

    def _key(self, view: View, inputs: HiddenStates, count: int) -> str:
        """The key of what the first block is learned from, apart from its own weights: options, schemes and hidden states."""
        options = {k: v for k, v in asdict(self).items() if k not in ("offload", "folder")}
        schemes = ", ".join(sorted({site.scheme.name for site in view.sites}))
        facts = {"options": options, "seed": view.seed, "scheme": schemes, "fold": view.sites[0].fold_only}
        fingerprint = Fingerprint(json.dumps(facts, sort_keys=True))
        for i in range(count):
            fingerprint.add(inputs[i])
        return fingerprint.key


class Samples:
    """The samples that a block learns from and is judged by.

    Args:
        block, calls, inputs, target: as in :meth:`OmniQuant._learn`.

    Attributes:
        held: numbers of the samples that judge.
        train: numbers of all others.
    """

    def __init__(self, block: Block, calls: Sequence[Call], inputs: HiddenStates, target: HiddenStates) -> None:
        self.block, self.calls, self.inputs, self.target = block, calls, inputs, target
        count = len(calls)
        self.held = list(range(HELD - 1, count, HELD)) or [count - 1]
        self.train = [i for i in range(count) if i not in self.held]

    def loss(self, i: int) -> Tensor:
        """How far the quantized block is from its target on sample ``i``."""
        wanted = self.block.cast(self.target[i])
        return distance(self.calls[i].run(self.block.quantized, self.block.cast(self.inputs[i])), wanted)

    def held_out_error(self) -> float:
        """The mean loss of the samples that judge."""
        with torch.no_grad(), self.block.fixed():
            return float(torch.stack([self.loss(i) for i in self.held]).mean())

    def train_once(
        self, optimizer: torch.optim.Optimizer, decay: torch.optim.lr_scheduler.LRScheduler, random: torch.Generator
    ) -> None:
        """Take one step of the optimizer for each training sample, in random order; stop at a loss that is not finite."""
        for position in torch.randperm(len(self.train), generator=random, dtype=torch.int64, device="cpu").tolist():
            optimizer.zero_grad(set_to_none=True)
            error = self.loss(self.train[position])
            if not error.requires_grad:
                raise MethodError(
                    f"block {self.block.name!r} does not pass its output through the linears that were found in it"
                )
            error.backward()
            optimizer.step()
            decay.step()
            self.block.keep_in_range()
            if not bool(error.isfinite()):
                break


def distance(got: Tensor, wanted: Tensor) -> Tensor:
    """The mean over tokens of ``|got - wanted|^2 / |wanted|^2``.

    Each token counts the same, however large it is: the next norm makes all of them equally large anyway, and without the
    division a few huge tokens would decide everything.
    """
    return ((got - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1).clamp_min(1e-20)).mean()


def better(best: tuple[float, dict[str, Tensor]], now: float, block: Block) -> tuple[float, dict[str, Tensor]]:
    """An error and the state of a block that has it: ``best``, or those of ``block`` as it is, if its error ``now`` is less."""
    return (now, block.state()) if now < best[0] else best


def add_decisions(plan: Plan, block: Block, errors: tuple[float, float]) -> None:
    """Write what a block has learned into ``plan``, and its held-out error before and after as a note for each of its sites."""
    for site in block.sites:
        plan.notes[site.view.name] = {"block error": f"{errors[0]:.2e} -> {errors[1]:.2e}"}
        if site.log_scale is not None:
            plan.transforms[site.view.name] = site.own()
    if not any(site.view.fold_only for site in block.sites):
        plan.clips.update({linear.name: linear.clip().detach() for linear in block.linears if linear.steps is not None})


def block_key(key: str, module: nn.Module, views: Sequence[SiteView]) -> str:
    """The key of everything that decides what a block learns.

    Args:
        key: that of the block before, so that a change there changes all keys that follow.
        module: the block, whose weights count.
        views: its sites; what earlier calibrators decided about their channels counts.
    """
    fingerprint = Fingerprint(key)
    for name, tensor in module.state_dict().items():
        fingerprint.add(name, tensor)
    for view in views:
        transform = view.transform
        fingerprint.add(view.name, transform.shift, transform.scale, transform.outliers, transform.permutation, *view.linears)
    return fingerprint.key


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """A context in which a GPU multiplies float32 matrices in TF32.

    TF32 keeps 11 bits of each factor. Codes have at most 8, so what is lost is far less than what rounding to codes loses.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

"""A step of a model, called with tensors of the same sizes again and again: captured once, replayed from then on.

On a GPU a step becomes a CUDA graph. On a CPU its operators are recorded, and most of them become a list that C runs
(:mod:`.record`). Either way the Python of the model does not run when it is replayed, which is where the time of a token goes.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from operator import eq, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from quantkit.capture.fuse import Fused
from quantkit.capture.notes import Notes, Ref
from quantkit.capture.record import CaptureError, record
from quantkit.core.errors import ModelError
from quantkit.layers.linear import W8A8Linear
from quantkit.ops.table import forced

log = logging.getLogger("quantkit")


class StepError(ModelError):
    """A step cannot be captured, and has run all the same.

    Attributes:
        outputs: what it returned.
    """

    def __init__(self, message: str, outputs: Any) -> None:
        super().__init__(message)
        self.outputs = outputs


class Rehearsal:
    """A call that is made for real, and noted, before it is captured when it is made again.

    All that is made at first use is there after it. On a GPU, :mod:`.fuse` makes its calls fewer.

    Args:
        function, inputs, model: as for :class:`Capture`.

    Attributes:
        outputs: what the function returned.
        keeps: sizes of a tensor that it made and somebody holds now, such as a cache that grows; a replay makes no other.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor], model: nn.Module) -> None:
        notes, own = Notes(), [tensor.clone() for tensor in inputs]
        with torch.no_grad(), notes.on(model):
            self.outputs = function(*own)
        self._notes, self._given, self._wanted = notes, notes.of(own), notes.of(self.outputs)
        if notes.survivors(self._wanted):
            gc.collect()
        kept = notes.survivors(self._wanted)
        self.keeps = list(kept[0].shape) if kept else None
        plain = (Ref, int, float, bool, str, type(None))
        # a cache is an object that stays, and no result; whatever else there is might hold tensors
        self._wanted = tree_map(lambda leaf: None if hasattr(leaf, "layers") else leaf, self._wanted)
        self._opaque = any(not isinstance(leaf, plain) for leaf in tree_leaves(self._wanted))

    @property
    def refused(self) -> str | None:
        """Why it cannot be captured, if so."""
        return self._notes.refused

    def fused(self) -> Fused | None:
        """The calls, ready to be captured; None where they cannot be made again without the function."""
        if self.refused or self._opaque or self._notes.unseen or self.keeps is not None:
            return None
        return Fused(self._notes.calls, self._given, self._wanted)


class Capture:
    """One captured call of a function.

    Args:
        function: reads its arguments, and other tensors that stay where they are; writes those only in place.
        inputs: its arguments, all on one device. The function runs on copies of them, once on a CPU.
        model: whose layers it calls.
        rehearsal: an earlier call on a GPU, with inputs of the same sizes.

    Attributes:
        outputs: what the function returned. Replaying writes into it.
        said: what was captured, in a few words.

    Raises:
        CaptureError: what it does depends on values of tensors, or on random numbers.
    """

    def __init__(
        self, function: Callable[..., Any], inputs: Sequence[Tensor], model: nn.Module, rehearsal: Rehearsal | None = None
    ) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        if inputs[0].is_cuda:
            graph = torch.cuda.CUDAGraph()
            fused = None if rehearsal is None else rehearsal.fused()
            try:
                with torch.no_grad(), torch.cuda.device(inputs[0].device):
                    if fused is not None:
                        fused(self.inputs, dry=True)
                    with torch.cuda.graph(graph):
                        self.outputs = function(*self.inputs) if fused is None else fused(self.inputs)
            except RuntimeError as error:  # what a stream may not do while it is captured, in words of CUDA
                raise CaptureError(str(error).split("\n", 1)[0]) from error
            self._kept = fused  # whose constants the graph reads
            self._replay: Callable[[], Any] = graph.replay
            pool = [part["total_size"] for part in torch.cuda.memory_snapshot() if part["segment_pool_id"] == graph.pool()]
            self.said = f"a CUDA graph, {sum(pool) / 2**20:.0f} MiB" + (f" ({fused.said})" if fused else "")
            graph.replay()  # capturing runs nothing
        else:
            recording = record(lambda: function(*self.inputs), model)
            self.outputs, self._replay, self.said = recording.outputs, recording.play, recording.said

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        """The outputs for other values of the inputs."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self._replay()
        return self.outputs


class Held:
    """What a capture of a model depends on: its modules and hooks, where its tensors are, and its backend."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._model, self._asked, self._training = model, forced(), model.training
        held: list[tuple[dict[str, Any], str, Any]] = [
            (d, name, t) for m in modules for d in (m._parameters, m._buffers) for name, t in d.items() if t is not None
        ]
        self._tensors = [t for _, _, t in held]
        self._at = [t.data_ptr() for t in self._tensors]
        held += [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        for layer in modules:
            if isinstance(layer, W8A8Linear):
                layer.prepared  # noqa: B018  made now, so that another one later is a change
                held.append((vars(layer), "_prepared", layer._prepared))
        self._places, self._names = [place for place, _, _ in held], [name for _, name, _ in held]
        self._values = [value for _, _, value in held]
        self._hooks: list[Any] = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._count = sum(map(len, self._hooks))

    def same(self) -> bool:
        """Whether all of it is as it was. This is asked at every step, of hundreds of things: by maps, which loop in C."""
        return (
            all(map(is_, map(dict.get, self._places, self._names), self._values))
            and all(map(eq, map(Tensor.data_ptr, self._tensors), self._at))
            and sum(map(len, self._hooks)) == self._count
            and (forced(), self._model.training) == (self._asked, self._training)
        )


class CapturedStep:
    """``function`` as one that is captured at its second call with tensors of some sizes, and replayed at later ones.

    For decoding with a module of one's own, whose cache is in tensors of fixed size that it writes in place::

        step = quantkit.CapturedStep(model.step, model)
        for position in range(length, length + 100):
            token = step(token, torch.tensor([position])).argmax(-1)

    What a call returns is overwritten by the next call: clone what has to last. A model whose weights move, or that gets other
    hooks, is captured anew.

    Args:
        function: takes tensors only. It may read other tensors that stay where they are, and write them in place; what it
            returns may depend on nothing else. Its first call is not captured, so that all that is made at first use is there.
        model: whose layers it calls.
        most: captures for so many different sizes of the inputs are kept, the latest used.
        fuse: on a GPU, whether kernels may be joined to larger ones (:mod:`.fuse`), which changes last bits of results.

    Raises:
        ModelError: at a call, if the step cannot be replayed: it decides by values of tensors, or draws random numbers (on a
            CPU), or keeps tensors that it makes each time, as a cache that grows.
    """

    def __init__(self, function: Callable[..., Any], model: nn.Module, *, most: int = 4, fuse: bool = True) -> None:
        self.function, self.model, self.most, self.fuse = function, model, most, fuse
        self._captures: dict[Any, Capture] = {}
        self._rehearsed: dict[Any, Rehearsal] = {}
        self._held: Held | None = None

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        if not inputs or not all(isinstance(tensor, Tensor) for tensor in inputs):
            raise ModelError("a captured step takes tensors, at least one: put numbers that change into tensors")
        if self._held is None or not self._held.same():
            self._captures, self._rehearsed, self._held = {}, {}, Held(self.model)
        key = tuple((t.shape, t.dtype, t.device) for t in inputs)
        capture = self._captures.pop(key, None)
        if capture is None:
            before = self._rehearsed.get(key)
            if before is None or before.keeps is not None:  # made at first use, or again and again
                rehearsal = Rehearsal(self.function, inputs, self.model)
                why = rehearsal.refused
                if before is not None and rehearsal.keeps is not None:
                    why = (
                        f"it keeps a tensor of {rehearsal.keeps} that it makes, of which a replay makes no other; let it write "
                        "in place, into one that is there"
                    )
                if why:
                    raise StepError(f"the step of {type(self.model).__name__} cannot be captured: {why}", rehearsal.outputs)
                self._rehearsed[key] = rehearsal
                return rehearsal.outputs
            del self._rehearsed[key]
            try:
                capture = Capture(self.function, inputs, self.model, before if self.fuse else None)
            except CaptureError as error:
                raise ModelError(f"the step of {type(self.model).__name__} cannot be captured: {error}") from error
            log.info("the step of %s is captured: %s", type(self.model).__name__, capture.said)
            outputs = capture.outputs
        else:
            outputs = capture(inputs)
        self._captures[key] = capture
        for oldest in list(self._captures)[: -self.most]:
            del self._captures[oldest]
        return outputs

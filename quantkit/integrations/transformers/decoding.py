"""``generate()`` of transformers with captured steps: prefill as before, and each token by replaying the step of the first one.

transformers asks a model for what it calls once per token (``get_compiled_call``), where it would put ``torch.compile``.
Sampling, beams, stopping and streaming stay its own. The step writes its keys and values into a static cache, whose tensors
have to stay where they are: those of the cache of each new call of ``generate()`` are copied into the captured ones.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from quantkit.capture.record import CaptureError
from quantkit.capture.step import Capture, Held, Rehearsal
from quantkit.core.errors import ModelError

log = logging.getLogger("quantkit")

MOST = 4
"""So many captures of a model are kept, the latest used: of different batches and lengths."""
REPLACED = ("generate", "get_compiled_call", "_valid_auto_compile_criteria")
"""Methods of the model."""
FILLED = "cumulative_length_int"
"""Where a layer of a cache with a sliding window counts its tokens in Python, which matters until the window is full."""
EAGER = ("output_attentions", "output_hidden_states", "labels")
"""What asks for results that a replay would overwrite."""


def capture_decoding(model: Any, *, fuse: bool = True) -> Any:
    """Let ``model.generate()`` replay a captured step for each token, in place; see docs/fast.md.

    Greedy search, sampling, beams, batches, padding, streamers and stopping stay what they are. The cache is static: it has
    room for all tokens that a call may produce, and keys behind the last one are masked. Calls that cannot be captured run as
    before, and the log says why, once.

    Args:
        model: a causal language model of transformers, in floating point or quantized.
        fuse: on a GPU, whether kernels between the products may be joined to larger ones, which changes last bits of results.

    Returns:
        The same object. :func:`release_decoding` takes it back.

    Raises:
        ModelError: it has no ``generate()`` that takes a static cache.
    """
    if not hasattr(model, "get_compiled_call") or not hasattr(model, "generate"):
        raise ModelError(f"{type(model).__name__} has no generate() of transformers: capture its step with CapturedStep")
    if not getattr(model, "_can_compile_fullgraph", True) or model.config.is_encoder_decoder:
        raise ModelError(f"{type(model).__name__} takes no static cache, in which a captured step writes")
    if "_quantkit_decoding" not in vars(model):
        vars(model)["_quantkit_decoding"] = Decoding(model)
    decoding: Decoding = vars(model)["_quantkit_decoding"]
    if decoding.fuse != fuse:
        decoding.fuse = fuse
        decoding.forget()
    return model


def release_decoding(model: Any) -> Any:
    """Take back what :func:`capture_decoding` did, and give the memory of captured steps back."""
    decoding = vars(model).pop("_quantkit_decoding", None)
    if decoding is not None:
        decoding.release()
    return model


class Decoding:
    """The captured steps of one model, and what of its methods is replaced."""

    fuse = True

    def __init__(self, model: Any) -> None:
        vars(model).update({name: getattr(self, name) for name in REPLACED})
        self._begin(model)

    def _begin(self, model: Any) -> None:
        self._model = model
        self._steps: dict[Any, _Step] = {}
        self._held: Held | None = None
        self._places: set[torch.device] = set()
        self._said: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoding:
        """For the copy of the model, which captures its own steps."""
        memo[id(self)] = new = Decoding.__new__(Decoding)
        new._begin(memo.get(id(self._model), self._model))
        new.fuse = self.fuse
        return new

    def __getstate__(self) -> Any:
        return self._model, self.fuse

    def __setstate__(self, state: Any) -> None:
        self._begin(state[0])
        self.fuse = state[1]

    def release(self) -> None:
        for name in REPLACED:
            vars(self._model).pop(name, None)
        self.forget()

    def forget(self) -> None:
        """Give captured steps back."""
        self._steps.clear()
        self._held = None

    # ---- in place of methods of the model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """With a static cache, unless the call says something about its cache."""
        config = kwargs.get("generation_config") or self._model.generation_config
        own = any(kwargs.get(name) is not None for name in ("past_key_values", "cache_implementation", "assistant_model"))
        asked = kwargs.get("use_cache", getattr(config, "use_cache", True))
        if not own and asked is not False and getattr(config, "cache_implementation", None) is None:
            kwargs["cache_implementation"] = "static"
        return type(self._model).generate(self._model, *args, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        cache = model_kwargs.get("past_key_values")
        if getattr(generation_config, "disable_compile", False):
            return False
        if cache is None or not getattr(cache, "is_compileable", False) or not hasattr(cache, "layers"):
            self._say(f"the cache is a {type(cache).__name__}, which grows")
            return False
        return True

    def get_compiled_call(self, compile_config: Any = None) -> Any:
        """What is called once per token; asked for once per call of ``generate()``."""
        if self._held is None or not self._held.same():
            self._steps.clear()
            self._held = Held(self._model)
            self._places = {t.device for t in (*self._model.parameters(), *self._model.buffers()) if t.is_cuda}
        return self._call

    # ---- a token

    def _call(self, **inputs: Any) -> Any:
        model, cache = self._model, inputs.pop("past_key_values", None)
        leaves, form = tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        rest = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        state = list(_tensors_of(cache)) if cache is not None else []
        why = self._why_not(inputs, cache, state, rest)
        if why:
            self._say(why)
            return model(past_key_values=cache, **inputs)
        key = (form, rest, *((t.shape, t.stride(), t.dtype, t.device) for t in (*tensors, *(t for _, _, t in state))))
        step = self._steps.pop(key, None)
        if step is None:
            step = _Step(self.fuse)
        outputs = step.run(model, cache, state, leaves, tensors, form, self._say)
        self._steps[key] = step
        for oldest in list(self._steps)[:-MOST]:
            del self._steps[oldest]
        return outputs

    def _why_not(self, inputs: dict[str, Any], cache: Any, state: list[Any], rest: tuple[Any, ...]) -> str:
        if not state:
            return "there is no cache"
        if len(self._places) > 1:
            return "the model is on several GPUs"
        if any(getattr(layer, FILLED, 0) < layer.max_cache_len for layer in cache.layers if hasattr(layer, FILLED)):
            return "a sliding window of the cache is not full yet, and until then Python counts its tokens"
        if asked := next((name for name in EAGER if inputs.get(name) not in (None, False)), None):
            return f"{asked} asks for what a replay would overwrite"
        try:
            hash(rest)
        except TypeError:
            return "an argument of the model is neither a tensor nor a plain value"
        return ""

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            log.info("generate() of %s does not replay captured steps: %s", type(self._model).__name__, why)


class _Step:
    """One step under way: on a GPU rehearsed, then captured, then replayed."""

    def __init__(self, fuse: bool) -> None:
        self.capture: Capture | None = None
        self.failed = False
        self.ran = False
        self._fuse = fuse
        self._rehearsal: Rehearsal | None = None
        self._with_cache = False
        self._state: list[Tensor] = []
        self._owner: Any = None

    def run(
        self, model: Any, cache: Any, state: list[Any], leaves: list[Any], tensors: list[Tensor], form: Any, say: Any
    ) -> Any:
        def step(*values: Tensor) -> Any:
            given = iter(values)
            filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return model(past_key_values=cache, **tree_unflatten(filled, form))

        if self.capture is not None:
            self._adopt(cache, state)
            self.capture(tensors)
            return self._outputs(cache)
        if self.failed:
            return step(*tensors)
        there = all(own is mine for (_, _, own), mine in zip(state, self._state, strict=False)) and self.ran
        before, why = _numbers_of(cache), None
        if tensors[0].is_cuda and not there:  # not rehearsed, or on another cache
            self.ran, self._state = True, [tensor for _, _, tensor in state]
            if self._fuse:
                self._rehearsal = Rehearsal(step, tensors, model)
                outputs, why = self._rehearsal.outputs, self._rehearsal.refused
            else:
                outputs = step(*tensors)
            if why := why or _counted(before, cache):
                self.failed = True
                say(why)
            return outputs
        self._capture(step, model, cache, state, tensors, say)
        if self.capture is None:
            return step(*tensors)
        outputs = self._outputs(cache)
        if why := _counted(before, cache):
            self.failed, self.capture = True, None
            say(why)
        return outputs

    def _capture(self, step: Any, model: Any, cache: Any, state: list[Any], tensors: list[Tensor], say: Any) -> None:
        before = [tensor.clone() for _, _, tensor in state] if not tensors[0].is_cuda else []
        try:
            self.capture = Capture(step, tensors, model, self._rehearsal)
        except CaptureError as error:
            self.failed = True
            for (owner, name, tensor), old in zip(state, before, strict=False):  # it may have run half way
                setattr(owner, name, tensor.copy_(old))
            say(str(error))
            return
        finally:
            self._rehearsal = None
        self._state, self._owner = [tensor for _, _, tensor in state], weakref.ref(cache)
        # the cache of a call lives as long as whoever called wants it
        outputs = self.capture.outputs
        self._with_cache = hasattr(outputs, "past_key_values")
        if self._with_cache:
            self.capture.outputs = type(outputs)(**{**outputs, "past_key_values": None})
        log.info("generate() of %s replays a captured step: %s", type(model).__name__, self.capture.said)

    def _adopt(self, cache: Any, state: list[Any]) -> None:
        """Give ``cache`` the tensors that were captured, with what its own hold."""
        if all(own is mine for (_, _, own), mine in zip(state, self._state, strict=True)):
            return
        before = self._owner()
        if before is not None and before is not cache:  # somebody keeps it: it gets tensors of its own
            for owner, name, tensor in list(_tensors_of(before)):
                if any(tensor is mine for mine in self._state):
                    setattr(owner, name, tensor.clone())
        for (owner, name, own), mine in zip(state, self._state, strict=True):
            if own is not mine:
                mine.copy_(own)
                setattr(owner, name, mine)
        self._owner = weakref.ref(cache)

    def _outputs(self, cache: Any) -> Any:
        assert self.capture is not None
        outputs = self.capture.outputs
        return type(outputs)(**{**outputs, "past_key_values": cache}) if self._with_cache else outputs


def _numbers_of(cache: Any) -> list[tuple[Any, str, Any]]:
    """What the layers of a cache count as numbers of Python, which a replay does not."""
    found = [(layer, name, value) for layer in cache.layers for name, value in vars(layer).items()]
    return [(layer, name, value) for layer, name, value in found if isinstance(value, int | float) and name != FILLED]


def _counted(before: list[tuple[Any, str, Any]], cache: Any) -> str | None:
    """Why a step cannot be replayed: its cache counts."""
    changed = [name for layer, name, value in before if vars(layer).get(name) != value]
    return f"its {type(cache).__name__} counts {changed[0]} in Python" if changed else None


def _tensors_of(cache: Any) -> Iterator[tuple[Any, str, Tensor]]:
    """Where the tensors of a cache are: the object that has them, the name there, and the tensor."""
    for layer in cache.layers:
        for name, value in vars(layer).items():
            if isinstance(value, Tensor):
                yield layer, name, value

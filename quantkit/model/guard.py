"""What gives the float model back, whatever happens while it is worked on, or says that it cannot be had any more."""

from __future__ import annotations

import logging
import sys
import traceback
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._C import _len_torch_function_stack, _pop_torch_function_stack

from quantkit.model.compiled import is_compiled
from quantkit.model.experts import put_back, unfuse

log = logging.getLogger("quantkit")

BROKEN = "_quantkit_interrupted"
"""The attribute of a model that was left half way, and is refused from then on."""
KEPT_BYTES = 2**30
"""Float weights up to this stay in memory until the converted model has been verified, so that it can be given back."""


class Guard:
    """Knows how a model was before anything was done to it. Whoever changes one does it inside of a guard::

        guard = Guard(model)
        try:
            ...
            guard.finished = True
        except BaseException:
            guard.give_back()
            raise

    An interruption may come between any two steps of Python, also inside of what cleans up after another one. So nothing here
    relies on context managers that were entered: which modules, parameters, hooks, flags and attributes a model had is looked
    at once and set again at last. What is written into a tensor in place is noted in ``undo``, before it is written.

    Attributes:
        undo: whoever writes into a tensor of the model tells it first how to take that back.
        finished: whether the work is done, so that the model is to stay as it is.
    """

    def __init__(self, model: nn.Module, *, experts_apart: bool = False) -> None:
        self.model, self.undo, self.finished = model, ExitStack(), False
        self._lost = False
        self._grad, self._modes, self._random = torch.is_grad_enabled(), _len_torch_function_stack(), torch.get_rng_state()
        things: list[Any] = list(model.modules())
        configs = {id(config): config for m in things if hasattr(config := vars(m).get("config"), "__dict__")}
        self._attributes = [(vars(thing), dict(vars(thing))) for thing in [*things, *configs.values()]]
        own = vars(nn.Module()).keys()
        tables = ((m, value) for m in things for key, value in vars(m).items() if key in own and isinstance(value, dict))
        self._tables = [(table, dict(table)) for _, table in tables]
        self._apart: list[tuple[str, nn.Module]] = []
        self._take_apart = experts_apart

    def take_experts_apart(self) -> None:
        """Let fused experts be linears until :meth:`put_experts_back`, if that was asked for."""
        if self._take_apart:
            self._apart = unfuse(self.model)

    def put_experts_back(self) -> None:
        """Fuse those experts again of which none was quantized."""
        put_back(self.model, self._apart)
        self._apart = []

    def let_go(self) -> bool:
        """Before linears are replaced: keep nothing that would hold float weights in memory, if they are large.

        Returns:
            Whether the float model can still be given back.
        """
        if sum(p.numel() * p.element_size() for p in self.model.parameters()) > KEPT_BYTES:
            self.lose()
        return not self._lost

    def lose(self) -> None:
        """From here on the float model cannot be had any more."""
        self._lost = True
        self._attributes, self._tables = [], []
        self.undo.pop_all()

    def give_back(self) -> None:
        """Make the model what it was, or mark it as of no use. A finished one stays as it is."""
        _end_generators()
        torch.set_grad_enabled(self._grad)
        torch.set_rng_state(self._random)
        while _len_torch_function_stack() > self._modes:
            _pop_torch_function_stack()
        if self.finished:
            return
        setattr(self.model, BROKEN, True)  # an interruption from here on would leave it half way
        if self._lost:
            log.error("the conversion stopped half way: this model object is unusable, load it again")
            return
        self.undo.close()
        for mapping, before in [*self._attributes, *self._tables]:
            mapping.update(before)
            for key in mapping.keys() - before.keys() - {BROKEN}:
                del mapping[key]
            if list(mapping) != list(before):  # hooks and modules have an order
                for key, value in before.items():
                    mapping[key] = mapping.pop(key, value)
        for module in self.model.modules():
            if is_compiled(module):
                module._initialize()  # type: ignore[operator]  # or it would go on calling what was in its place
        delattr(self.model, BROKEN)


def _end_generators() -> None:
    """After an interruption: let what was entered and not left clean up now, before all is set as it was.

    An interruption just after a context manager was entered leaves its generator waiting until the traceback goes. It would
    then put back what it found, which is not what there is by then.
    """
    error = sys.exc_info()[1]
    while error is not None:
        if not isinstance(error, Exception):
            traceback.clear_frames(error.__traceback__)
        error = error.__context__

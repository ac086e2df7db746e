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

    def __init__(self, model: nn.Module) -> None:
        self.model, self.undo, self.finished = model, ExitStack(), False
        self._lost, self._handled = False, sys.exc_info()[1]
        self._grad, self._modes, self._random = torch.is_grad_enabled(), _len_torch_function_stack(), torch.get_rng_state()
        things: list[Any] = list(model.modules())
        # What is called config says how a transformers model is saved. It may be a class, whose attributes are nobody's to set.
        configs = {id(c): c for m in things if isinstance(getattr(c := vars(m).get("config"), "__dict__", None), dict)}
        own = vars(nn.Module()).keys()
        tables = [t for m in things for key, t in vars(m).items() if key in own and isinstance(t, dict)]
        mappings: list[dict[Any, Any]] = [*(vars(thing) for thing in [*things, *configs.values()]), *tables]
        self._before = [(mapping, dict(mapping)) for mapping in mappings]

    def let_go(self) -> bool:
        """Before linears are replaced: keep nothing that would hold float weights in memory, if they are large.

        Returns:
            Whether the float model can still be given back.
        """
        self._lost = sum(p.numel() * p.element_size() for p in self.model.parameters()) > KEPT_BYTES
        if self._lost:
            self._before = []
            self.undo.pop_all()
        return not self._lost

    def give_back(self) -> None:
        """Make the model what it was, or mark it as of no use. A finished one stays as it is."""
        self._end_generators()
        torch.set_grad_enabled(self._grad)
        torch.set_rng_state(self._random)
        while _len_torch_function_stack() > self._modes:
            _pop_torch_function_stack()
        if self.finished:
            return
        was_broken = getattr(self.model, BROKEN, False)
        setattr(self.model, BROKEN, True)  # an interruption from here on would leave it half way
        if self._lost:
            log.error("the conversion stopped half way: this model object is unusable, load it again")
            return
        self.undo.close()
        for mapping, before in self._before:
            mapping.update(before)
            for key in mapping.keys() - before.keys() - {BROKEN}:
                del mapping[key]
            if list(mapping) != list(before):  # hooks and modules have an order
                for key, value in before.items():
                    mapping[key] = mapping.pop(key, value)
        for module in self.model.modules():
            if is_compiled(module):
                module._initialize()  # type: ignore[operator]  # or it would go on calling what was in its place
        if not was_broken:
            delattr(self.model, BROKEN)

    def _end_generators(self) -> None:
        """After an interruption: let what was entered and not left clean up now, before all is set as it was.

        An interruption just after a context manager was entered leaves its generator waiting until the traceback goes. It would
        then put back what it found, which is not what there is by then. Exceptions that were handled already when the work
        began are the caller's.
        """
        error = sys.exc_info()[1]
        while error is not None and error is not self._handled:
            if not isinstance(error, Exception):
                traceback.clear_frames(error.__traceback__)
            error = error.__context__

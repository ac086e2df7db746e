"""RMSNorms of a model as one kernel each, in eager mode on GPUs.

Models write the norm as six or seven operators, each of which goes through memory and costs the host a launch. For 2,048 tokens
of an 8B model that is a fifth of the time of a forward pass with INT8 layers. What a norm computes is not told by its class:
its forward is tried on inputs made for it, and it is left alone unless it gives what the kernel gives.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.utils.parametrize import is_parametrized

from quantkit.core.tracing import in_memory
from quantkit.ops.gpu import devices
from quantkit.ops.gpu.layout import NORM
from quantkit.ops.reference import rms_norm

log = logging.getLogger("quantkit")


class Form(NamedTuple):
    """What an RMSNorm computes, and where its numbers are.

    Attributes:
        gain, eps: names of the parameter and of the attribute.
        offset, late: see :func:`quantkit.ops.reference.rms_norm`.
    """

    gain: str
    eps: str
    offset: float
    late: bool


def fuse_norms(model: nn.Module) -> nn.Module:
    """Let RMSNorms of ``model`` run as one kernel each where they are on a GPU, in place; see docs/fast.md.

    Results differ from before in the last bit of a few elements, since the squares are summed in another order. Without
    gradients only (``torch.no_grad()``, as in ``generate()``); with them, on a CPU, under ``torch.compile`` and in captured
    steps, norms run as they were written. Parameters, hooks, copies and checkpoints stay what they are.

    Args:
        model: any module, in floating point or quantized.

    Returns:
        The same object. :func:`unfuse_norms` takes it back. The log says how many norms there are, and why others are none.
    """
    count, reasons = 0, dict[str, list[str]]()
    for name, module in model.named_modules():
        gains = [p for p in module.parameters(recurse=False) if p.dim() == 1 and p.is_floating_point()]
        if not gains or next(module.children(), None) is not None or isinstance(vars(module).get("forward"), FusedNorm):
            count += isinstance(vars(module).get("forward"), FusedNorm)
            continue
        form = form_of(module)
        if isinstance(form, Form):
            vars(module)["forward"] = FusedNorm(module, form)
            count += 1
        elif "norm" in type(module).__name__.lower():
            reasons.setdefault(form, []).append(name)
    log.info("%d norms of %s run as one kernel each on a GPU", count, type(model).__name__)
    for reason, names in reasons.items():
        log.info("  %s%s not: %s", names[0], f" and {len(names) - 1} more do" if len(names) > 1 else " does", reason)
    return model


def unfuse_norms(model: nn.Module) -> nn.Module:
    """Take back :func:`fuse_norms`: all norms run as they were written.

    Args:
        model: any module.

    Returns:
        The same object.
    """
    for module in model.modules():
        if isinstance(vars(module).get("forward"), FusedNorm):
            del vars(module)["forward"]
    return model


class FusedNorm:
    """The forward of an RMSNorm, as an attribute of the module itself, as accelerate puts one there."""

    def __init__(self, module: nn.Module, form: Form) -> None:
        self.module, self.form = module, form
        self._eps = getattr(module, form.eps)
        self._runner: Any = None
        self._gain: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and self._fits(x := args[0]):
            runner = self._runner
            if runner is None or (y := runner(x)) is None:
                y = self._first(x)
            if y is not None:
                return y
        return type(self.module).forward(self.module, *args, **kwargs)

    def _fits(self, x: Any) -> bool:
        """Whether the kernel computes the same for ``x``, as far as it is not the same for all calls."""
        if type(x) is not Tensor or not in_memory(x) or peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
            return False
        gain = self.module._parameters.get(self.form.gain)
        if gain is None or x.dtype != gain.dtype or x.device != gain.device or getattr(self.module, self.form.eps) != self._eps:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or gain.requires_grad):
            return False
        if torch.is_autocast_enabled(x.device.type):  # which may give another dtype
            return False
        known = self._gain
        if known is None or known.data_ptr() != gain.data_ptr() or known.dtype != gain.dtype:
            self._runner, self._gain = None, gain.detach()
        return True

    def _first(self, x: Tensor) -> Tensor | None:
        """Through Triton, and recorded; None where the kernel does not run."""
        gain, form = self._gain, self.form
        assert gain is not None
        k = len(gain)
        if devices.why_not(x.device) or not 0 < k <= NORM or not x.dim() or x.shape[-1] != k or not x.numel():
            return None
        if not gain.is_contiguous():
            return None
        from quantkit.ops.gpu.launch import family_of, library, recorded
        from quantkit.ops.gpu.operators import on_its_device
        from quantkit.ops.gpu.step.norm import norm

        rows = x.reshape(-1, k)
        if rows.stride(1) != 1:
            return None

        @on_its_device
        def call(rows: Tensor) -> Tensor:
            return norm(rows, None, gain, self._eps, form.offset, form.late)[0]

        family = family_of(("norm", *form, self._eps), rows, k, (gain,))
        if family is None:
            return call(rows).view(x.shape)
        y = recorded(family, rows, (gain,), call)
        self._runner = library().Runner(family, (gain,))
        return y.view(x.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_runner": None, "_gain": None}


def form_of(module: nn.Module) -> Form | str:
    """What ``module`` computes if it is an RMSNorm, or why it is none that the kernel could stand for."""
    parameters = dict(module.named_parameters(recurse=False))
    if "forward" in vars(module):
        return "something else stands in for its forward already"
    if len(parameters) != 1 or next(module.buffers(), None) is not None or is_parametrized(module):
        return "it has more than a gain"
    ((name, gain),) = parameters.items()
    if gain.is_meta or not 0 < len(gain) <= NORM:
        return "its gain is not in memory" if gain.is_meta else f"its rows have {len(gain)} channels"
    random = torch.Generator().manual_seed(0)
    like: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    sizes = torch.logspace(-3, 1, 64, **like)[:, None]  # the first squares are below eps
    x = torch.randn(64, len(gain), generator=random, **like) * sizes
    own = torch.rand(len(gain), generator=random, **like) + 0.5

    def told(dtype: torch.dtype) -> Any:
        """What it says of ``x``, with ``own`` for its gain, on the CPU and without hooks."""
        twin = copy.copy(module)
        twin._parameters = {name: nn.Parameter(own.to(dtype), requires_grad=False)}
        try:
            with torch.no_grad():
                return type(module).forward(twin, x.to(dtype))
        except Exception:  # noqa: BLE001  it may raise anything
            return None

    plain = told(torch.float32)
    if not isinstance(plain, Tensor) or plain.shape != x.shape or plain.dtype != x.dtype:
        return "it does not take one tensor and give another one like it"
    numbers = [key for key, value in vars(module).items() if isinstance(value, float) and value > 0]
    for eps in numbers:
        for offset in (0.0, 1.0):
            if torch.allclose(plain, rms_norm(x, own, vars(module)[eps], offset, False), rtol=1e-5, atol=1e-6):
                rounded = torch.bfloat16 if gain.dtype == torch.float32 else gain.dtype
                seen = told(rounded)
                if not isinstance(seen, Tensor) or seen.dtype != rounded:
                    return "it does not keep the dtype of its input"
                wanted = [rms_norm(x.to(rounded), own.to(rounded), vars(module)[eps], offset, late) for late in (False, True)]
                wrong = [int((seen != w).sum()) for w in wanted]
                late = wrong[1] < wrong[0]
                if min(wrong) > 0.01 * x.numel():
                    return "it rounds in another way"
                return Form(name, eps, offset, late)
    return "it is no RMSNorm"

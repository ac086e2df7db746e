"""What a user asks for, as one value, and everything about it that can be refused without running the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.calibrators import Calibrator, Stage, resolve
from quantkit.core.errors import MethodError, ModelError
from quantkit.core.progress import Progress
from quantkit.core.scheme import Scheme
from quantkit.layers.linear import W8A8Linear
from quantkit.model.adapters import Adapters
from quantkit.model.guard import BROKEN
from quantkit.model.modules import linears_of, lookalikes_of, weight_of
from quantkit.model.targets import check_patterns, chosen
from quantkit.ops.table import why_simulated

log = logging.getLogger("quantkit")


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`quantkit.quantize` but for the model and the data.

    Attributes:
        calibrators: in the order in which they decide.
        scheme: number formats; None leaves the model in floating point.
        ignore, targets: names, globs or classes of linears, see :func:`quantkit.quantize`.
        heads: whether output heads are quantized too.
        seed: of everything random.
        progress: how to tell how far the work is.
    """

    calibrators: tuple[Calibrator, ...]
    scheme: Scheme | None
    ignore: Sequence[Any] = ()
    targets: Sequence[Any] | None = None
    heads: bool = False
    seed: int = 0
    progress: Progress = None

    @classmethod
    def of(cls, method: Any, scheme: str | Scheme | None, **rest: Any) -> Request:
        """From what a user passes.

        Raises:
            MethodError: no such method, or an order of calibrators that makes no sense.
            SchemeError: no such scheme.
        """
        return cls(tuple(resolve(method)), None if scheme is None else Scheme.parse(scheme), **rest)

    @property
    def is_static(self) -> bool:
        """Whether scales of activations are fixed at calibration."""
        return self.scheme is not None and self.scheme.is_static

    @property
    def rotates_model(self) -> bool:
        """Whether a calibrator rewrites the float model as a whole."""
        return any(c.stage == Stage.MODEL for c in self.calibrators)

    @property
    def takes_experts_apart(self) -> bool:
        """Whether fused experts have to become linears."""
        return self.rotates_model or self.scheme is not None


def check(model: Any, request: Request) -> None:
    """Raises a QuantkitError for a model or a request that cannot work, and warns of formats that nothing runs."""
    check_model(model)
    if request.rotates_model and (reach := Adapters.of(model).reach):
        raise MethodError(
            f"rotate rewrites what adapters read and write, such as {min(reach)!r}: merge them first (merge_and_unload of "
            "PEFT), or attach them to the quantized model"
        )
    scheme = request.scheme
    rounder = next((c.name for c in request.calibrators if c.stage == Stage.ROUND), None)
    if scheme is None and rounder:
        raise MethodError(
            f"scheme=None leaves the model in floating point, so there is nothing to round: drop {rounder}, or pass a scheme"
        )
    if scheme is None and request.heads:
        raise MethodError("scheme=None leaves the model in floating point, output heads too: drop heads=, or pass a scheme")
    if scheme is not None and (reason := why_simulated(scheme)):
        log.warning("scheme %s is a simulation: rounded as it says, but no kernel computes so (%s)", scheme.name, reason)


def check_model(model: Any) -> None:
    """Raises ModelError for what is no float model in memory."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model is a {type(model).__name__}: pass a torch.nn.Module, or use quantkit.load(path) for a checkpoint"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"model is a {type(model).__name__}, whose code is fixed: quantize the nn.Module that was scripted or traced"
        )
    if getattr(model, BROKEN, False):
        raise ModelError("an earlier conversion of this model was interrupted half way: load the model again")
    if any(isinstance(module, W8A8Linear) for module in model.modules()):
        raise ModelError("the model is quantized already: load the floating-point model again to quantize it in another way")
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if plain and isinstance(weight, Tensor) and str(weight.dtype).startswith("torch.float8"):
            raise ModelError(
                f"layer {name!r} has a weight of {weight.dtype}, which PyTorch does not multiply: the model was quantized "
                "before; load it in bfloat16 or float32"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(
                f"parameter {name!r} is on the meta device (offloaded, or never loaded): load the whole model into memory first"
            )


def linears_to_choose_from(model: nn.Module, request: Request) -> dict[str, nn.Module]:
    """All linears of the model by name.

    Raises:
        ModelError: there is none, or a weight is not finite.
        TargetError: a pattern of ``ignore`` or ``targets`` matches none.
    """
    linears, lookalikes = linears_of(model), lookalikes_of(model)
    if not linears:
        but = "".join(f"; {name}: {reason}" for name, reason in list(lookalikes.items())[:3])
        raise ModelError(
            f"{type(model).__name__} has no linear to quantize: quantkit replaces nn.Linear and transformers' Conv1D{but}"
        )
    check_patterns(request.ignore, linears | {name: model.get_submodule(name) for name in lookalikes}, "ignore")
    if request.targets is not None:
        check_patterns(request.targets, linears, "targets", lookalikes)
    kept = chosen(linears, {}, request.ignore, request.targets)
    for name, linear in linears.items():
        weight = weight_of(linear)
        if name not in kept and weight.numel() and not all(end.isfinite() for end in weight.aminmax()):
            raise ModelError(
                f"the weight of layer {name!r} holds NaN or Inf: look at the model, or leave it out with ignore=[{name!r}]"
            )
    return linears

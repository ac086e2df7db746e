"""The methods, one file each. ``METHODS`` maps the name a user types to the calibrators it stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quantkit.calibrators.base import Calibrator, Codes, PerSite, Plan, SiteView, Stage, View, check_attributes, check_order
from quantkit.calibrators.gptq import GPTQ, Hessian
from quantkit.calibrators.hadamard import Hadamard
from quantkit.calibrators.learned.omniquant import OmniQuant
from quantkit.calibrators.llmint8 import LLMInt8
from quantkit.calibrators.rotate import Rotate
from quantkit.calibrators.rptq import RPTQ
from quantkit.calibrators.rtn import RTN
from quantkit.calibrators.smoothquant import SmoothQuant
from quantkit.core.errors import MethodError

METHODS: dict[str, Callable[[], Any]] = {
    "rtn": RTN,
    "smoothquant": SmoothQuant,
    "llm_int8": LLMInt8,
    "hadamard": Hadamard,
    "best": lambda: [SmoothQuant(), Hadamard()],
    "rotate": Rotate,
    "rptq": RPTQ,
    "gptq": GPTQ,
    "omniquant": lambda: [SmoothQuant(), OmniQuant()],
}
"""A name may also stand for several calibrators, in order; those that the user lists before it are not repeated."""


def resolve(method: Any) -> list[Calibrator]:
    """The calibrators of a name, an instance, or a sequence of both, checked for their order.

    Raises:
        MethodError: an unknown name, something that is no calibrator or a mistyped one, or an order that makes no sense.
    """
    parts: Sequence[Any] = method if isinstance(method, (list, tuple)) else [method]
    if not parts:
        raise MethodError(f"method is empty: pass a name ({', '.join(METHODS)}) or a calibrator such as quantkit.SmoothQuant()")
    calibrators: list[Calibrator] = []
    for part in parts:
        if isinstance(part, str):
            if part not in METHODS:
                raise MethodError(
                    f"method {part!r} is not known: pass one of {', '.join(METHODS)}, or a calibrator of your own"
                )
            part = METHODS[part]()
            if isinstance(part, (list, tuple)):
                known = {c.name for c in calibrators}
                calibrators += [c for c in part if c.name not in known]
                continue
        if isinstance(part, type) or not isinstance(part, Calibrator):
            hint = f"; did you mean {part.__name__}()?" if isinstance(part, type) else ""
            raise MethodError(
                f"method holds {part!r}, which is no calibrator: it needs name, stage, statistics and plan(view){hint}"
            )
        check_attributes(part)
        calibrators.append(part)
    check_order(calibrators)
    return calibrators


__all__ = [
    "GPTQ", "METHODS", "RPTQ", "RTN", "Calibrator", "Codes", "Hadamard", "Hessian", "LLMInt8", "OmniQuant", "PerSite", "Plan",
    "Rotate", "SiteView", "SmoothQuant", "Stage", "View", "resolve",
]  # fmt: skip

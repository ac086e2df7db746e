"""The methods: one file for each, and the names by which they are known.

A *calibrator* is an object that looks at a model and its data and decides, see :mod:`quantkit.calibrators.base`. A *method* is
what a user passes as ``method=``: a calibrator, a name, or a list of both. A name stands for a factory, which is called without
arguments and returns one calibrator or a list of them. Names come from three places, which are searched in this order:

1. those of quantkit, in the table below;
2. those that a program has registered with :func:`register_method`;
3. those that installed packages offer as entry points of the group ``quantkit.methods``. These packages are imported when their
   name is used and not before, and they cannot take a name from the other two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
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
from quantkit.core.errors import MethodError, did_you_mean
from quantkit.core.plugins import plugins

Factory = Callable[[], Calibrator | Sequence[Calibrator]]

_methods: dict[str, Factory] = {
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


def register_method(name: str, factory: Factory) -> None:
    """Make ``method=name`` stand for what ``factory()`` returns, in this process; also in recipes and on the command line.

    A package that others install does not need this function: it offers an entry point, see :mod:`quantkit.core.plugins`.

    Args:
        name: letters, digits, ``_``, ``-`` and ``.``.
        factory: returns a calibrator, or a list of calibrators in the order in which they run. A recipe can write down a
            calibrator with its options by name if ``name`` is also the calibrator's own, and it is a dataclass.

    Raises:
        MethodError: the name is taken or not plain, or the factory cannot be called.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise MethodError(f"register_method({name!r}, ...): a name is a string of letters, digits, '_', '-' and '.'")
    if not callable(factory):
        raise MethodError(
            f"register_method({name!r}, {factory!r}): pass what makes the calibrator, a class or a function without arguments"
        )
    if name in methods():
        raise MethodError(f"register_method({name!r}, ...): the name is taken; there are {', '.join(methods())}")
    _methods[name] = factory


def methods() -> dict[str, Factory]:
    """Every name and what makes its calibrators. Packages that offer methods are not imported until a factory is called."""
    offered = plugins("quantkit.methods").items()
    return _methods | {name: partial(_offered, name, load) for name, load in offered if name not in _methods}


def resolve(method: Any) -> list[Calibrator]:
    """The calibrators of a name, an instance, or a sequence of both, checked for their order.

    A name that stands for several calibrators leaves out those that are listed before it.

    Raises:
        MethodError: an unknown name, something that is no calibrator or a mistyped one, or an order that makes no sense.
        PluginError: the package that offers the name cannot be imported.
    """
    parts: Sequence[Any] = method if isinstance(method, (list, tuple)) else [method]
    if not parts:
        raise MethodError(
            f"method is empty: pass a name ({', '.join(methods())}) or a calibrator such as quantkit.SmoothQuant()"
        )
    calibrators: list[Calibrator] = []
    for part in parts:
        made = _made(part) if isinstance(part, str) else part
        if isinstance(part, str) and isinstance(made, (list, tuple)):
            listed = {calibrator.name for calibrator in calibrators}
            calibrators += [calibrator for calibrator in map(_checked, made) if calibrator.name not in listed]
        else:
            calibrators.append(_checked(made))
    check_order(calibrators)
    return calibrators


def kind_of(name: str) -> type[Calibrator] | None:
    """The class of the calibrator that is called like the method ``name`` and that this method makes, by itself or with others;
    None where there is none. Recipes write and read calibrators by this name.

    Raises:
        PluginError: the package that offers the name cannot be imported.
    """
    if name not in methods():
        return None
    return next((type(calibrator) for calibrator in resolve(name) if calibrator.name == name), None)


def _made(name: str) -> Any:
    factory = _methods.get(name) or methods().get(name)  # installed packages are looked through for unknown names only
    if factory is None:
        hint = did_you_mean(name, methods())
        raise MethodError(
            f"method {name!r} is not known{hint}: pass one of {', '.join(methods())}, or a calibrator of your own"
        )
    return factory()


def _offered(name: str, load: Callable[[], Any]) -> Any:
    factory = load()
    if not callable(factory):
        raise MethodError(f"method {name!r}: its package offers {factory!r}, which cannot be called: upgrade or uninstall it")
    return factory()


def _checked(part: Any) -> Calibrator:
    if isinstance(part, type) or not isinstance(part, Calibrator):
        hint = f"; did you mean {part.__name__}()?" if isinstance(part, type) else ""
        raise MethodError(
            f"method holds {part!r}, which is no calibrator: it needs name, stage, statistics and plan(view){hint}"
        )
    check_attributes(part)
    return part


__all__ = [
    "GPTQ", "RPTQ", "RTN", "Calibrator", "Codes", "Factory", "Hadamard", "Hessian", "LLMInt8", "OmniQuant", "PerSite", "Plan",
    "Rotate", "SiteView", "SmoothQuant", "Stage", "View", "kind_of", "methods", "register_method", "resolve",
]  # fmt: skip

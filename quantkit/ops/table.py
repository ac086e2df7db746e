"""Which backends there are, and which one runs an operand on a device.

A *backend* runs products of :class:`~quantkit.core.operand.Operand` on some kind of device. It is asked three things: whether
it can run an operand (:meth:`Backend.why_not`), whether it then computes in the operand's own formats or only simulates them
(:meth:`Backend.why_simulated`), and to prepare an operand once, which gives something that runs (:class:`Prepared`). All
backends give the results of :mod:`quantkit.ops.reference`.

The first backend of the table that can run an operand runs it. Others can be registered, see :func:`register_backend`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from quantkit.core.errors import BackendError
from quantkit.core.facts import Facts
from quantkit.core.operand import Operand, empty_operand
from quantkit.core.plugins import plugins
from quantkit.core.scheme import Scheme
from quantkit.core.tracing import constant_while_tracing
from quantkit.ops.cpu.backend import CPU
from quantkit.ops.gpu.backend import GPU
from quantkit.ops.plain import Plain


class Prepared(Protocol):
    """An operand that a backend has made ready to run."""

    @property
    def operand(self) -> Operand:
        """What was prepared."""

    def run(self, x: Tensor) -> Tensor:
        """``x [M, K]`` float, any M from 0 up, to ``[M, N]`` in its dtype."""


@runtime_checkable
class Backend(Protocol):
    """Runs operands on some kind of device."""

    @property
    def name(self) -> str:
        """By which users ask for it."""

    def why_not(self, operand: Operand | None, device: torch.device) -> str | None:
        """None if it runs ``operand`` on ``device``, else why not, in a few words. Without an operand: whether it runs any."""

    def why_simulated(self, operand: Operand) -> str | None:
        """None if it computes in the formats of ``operand``, else in a few words what it computes in."""

    def prepare(self, operand: Operand) -> Prepared:
        """What has to be done once. The operand stays as it is."""


log = logging.getLogger("quantkit")
_BACKENDS: list[Backend] = [CPU(), GPU(), Plain()]
_loaded: set[str] = set()
_said: set[str] = set()
_forced: ContextVar[str | None] = ContextVar("forced backend", default=None)
_in_use: list[str] = []
"""Names that are forced anywhere in this process. Compiled code is guarded by it, which it cannot be by a context variable."""


def table() -> list[Backend]:
    """All backends, in the order in which they are asked."""
    _load_plugins()
    return _BACKENDS


@constant_while_tracing
def _load_plugins() -> None:
    for name, load in plugins("quantkit.backends").items():
        if name not in _loaded:
            _loaded.add(name)
            register_backend(load()())


def register_backend(backend: Backend, *, before: str | None = None) -> None:
    """Add a backend to the table, for this process.

    An installed package can do the same with an entry point in the group ``quantkit.backends``, whose value is a class or a
    function that takes no arguments and makes the backend; it is asked first of all.

    Args:
        backend: an object with the four members of :class:`Backend`.
        before: name of the backend ahead of which it is asked; first of all, if left out.

    Raises:
        BackendError: it is no backend, its name is taken, or there is none called ``before``.
    """
    if not isinstance(backend, Backend) or isinstance(backend, type):
        raise BackendError(
            f"{backend!r} is no backend: it needs name, why_not, why_simulated and prepare, see quantkit.Backend"
        )
    names = [b.name for b in _BACKENDS]
    if backend.name in names:
        raise BackendError(f"a backend called {backend.name!r} is registered already: give this one another name")
    if before is not None and before not in names:
        raise BackendError(f"before={before!r} is no backend: there are {', '.join(names)}")
    _BACKENDS.insert(0 if before is None else names.index(before), backend)


def backends(device: torch.device | str = "cpu", operand: Operand | None = None) -> dict[str, str]:
    """Name -> "ready", or why it cannot run on ``device``, in order of preference.

    With ``operand``, such as that of a layer: why it cannot run this one there. The first that is ready runs it.
    """
    return {b.name: b.why_not(operand, torch.device(device)) or "ready" for b in table()}


def choose(operand: Operand) -> Backend:
    """The first backend that runs ``operand`` where it is, or the one forced by :func:`use_backend`.

    Why a faster one does not, and what is only simulated, is said once in the log.

    Raises:
        BackendError: the forced backend cannot run it.
    """
    name = forced()
    if name is None:
        chosen = next(b for b in table() if b.why_not(operand, operand.device) is None)
        if operand.device.type != "meta":
            _explain(chosen, operand)
        return chosen
    backend = next(b for b in table() if b.name == name)
    reason = backend.why_not(operand, operand.device)
    if reason:
        raise BackendError(f"backend {backend.name!r} cannot run on {operand.device}: {reason}")
    return backend


def _explain(chosen: Backend, operand: Operand) -> None:
    device, slow, declined = operand.device, type(chosen) is Plain, []
    for backend in table():
        if backend is chosen:
            break
        # One that runs nothing on this device is no loss, unless all that is left is the reference.
        if slow or backend.why_not(None, device) is None:
            declined.append(f"{backend.name} does not run them ({backend.why_not(operand, device)})")
    if declined:
        pace = ", which is exact and slow" if slow else ""
        _say_once(f"layers on {device.type} run on the backend {chosen.name}{pace}: {', '.join(declined)}", slow)
    elif simulated := chosen.why_simulated(operand):
        _say_once(f"layers on {device.type} simulate their scheme: {simulated}", False)


@constant_while_tracing
def _say_once(text: str, warn: bool) -> None:
    if text not in _said:
        _said.add(text)
        log.log(logging.WARNING if warn else logging.INFO, text)


def why_simulated(what: Operand | Scheme | str) -> str | None:
    """None if some backend computes in the formats of an operand or a scheme, on whatever device; else what it does instead.

    What no backend runs is a *simulation*: values are rounded as the formats say, and nothing gets faster. The reference does
    not count, since it only defines what the others compute.

    Raises:
        SchemeError: a name of no scheme.
    """
    if not isinstance(what, Operand):
        scheme = Scheme.parse(what)
        if scheme.quantizes_attention:
            return "no kernel rounds what attention reads"
        parts = (scheme.of_linear(), scheme.of_linear(behind_norm=True))
        return next((why for part in parts if (why := why_simulated(empty_operand(Facts(64, 64, part), device="meta")))), None)
    operand = what
    reasons = [b.why_simulated(operand) for b in table() if type(b) is not Plain]
    return None if None in reasons else next(iter(reasons), "no backend runs it")


def forced() -> str | None:
    """The backend that :func:`use_backend` asks for here."""
    return _forced_here(*_in_use) if _in_use else None


@constant_while_tracing
def _forced_here(*_: str) -> str | None:
    return _forced.get()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every layer, as ``"reference"`` in tests.

    It counts in the thread, or the asynchronous task, that asks for it, and in no other.

    Raises:
        BackendError: no backend has that name.
    """
    if name not in {b.name for b in table()}:
        raise BackendError(f"backend {name!r} is not known: there are {', '.join(b.name for b in table())}")
    before = _forced.set(name)
    _in_use.append(name)
    try:
        yield
    finally:
        _in_use.remove(name)
        _forced.reset(before)

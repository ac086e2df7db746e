"""Ctrl-C at any moment: a real signal, while a model is quantized, planned, converted or probed.

Whenever it comes, the model has to be the float one to the bit with all its flags, hooks and forwards, or be marked as broken,
or be finished. Nothing of the process may have changed either.
"""

from __future__ import annotations

import collections
import copy
import functools
import logging
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from families import NanoGPT
from helpers import llama, mlp, normal, tokens
from torch import Tensor, nn
from torch._C import _len_torch_function_stack

import quantkit
from quantkit.core.report import has_report
from quantkit.model import guard
from quantkit.model.modules import call as run
from quantkit.model.modules import tensors_in

OUTCOMES = ("untouched", "finished", "marked", "not interrupted")
"""What may come of it."""


def patched(model: nn.Module) -> nn.Module:
    """With what users put on models: hooks, a forward on an instance, parts in training, frozen parameters."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    linears[0].register_forward_hook(_doubled)
    linears[-1].register_forward_pre_hook(_passed)
    linears[1].forward = functools.partial(nn.functional.linear, weight=linears[1].weight, bias=linears[1].bias)  # type: ignore[method-assign]
    model.train()
    next(model.children()).eval()
    linears[-1].requires_grad_(False)
    return model


def _doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def _passed(module: nn.Module, args: Any) -> None:
    return None


def scenarios() -> dict[str, tuple[Callable[[], nn.Module], Any, Callable[[nn.Module], Any]]]:
    """Name -> how a model is made, a batch, and what is done to it."""
    ids = tokens()

    def quantized(method: Any, batch: Any, **options: Any) -> Callable[[nn.Module], Any]:
        return lambda model: quantkit.quantize(model, method, calibration=[batch], progress=False, **options)

    def planned_and_converted(model: nn.Module) -> None:
        quantkit.convert(model, quantkit.plan(model, "smoothquant", calibration=[ids], progress=False), progress=False)

    x = normal(2, 6, 16)
    return {
        "smoothquant": (lambda: patched(llama()), ids, quantized("smoothquant", ids)),
        "rotate": (lambda: llama().train(), ids, quantized(["rotate", "rtn"], ids)),
        "rptq": (lambda: llama(), ids, quantized(["llm_int8", "rptq"], ids)),
        "folds only": (lambda: patched(NanoGPT()), ids, quantized("smoothquant", ids, scheme=None)),
        "mlp": (lambda: patched(mlp()), x, quantized("rtn", x)),
        "plan and convert": (lambda: patched(llama()), ids, planned_and_converted),
        "discover": (lambda: patched(llama()), ids, lambda model: quantkit.discover(model, ids)),
    }


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that must be as before, in a form that can be compared: identities, and bits."""
    facts: dict[str, Any] = {}
    own = vars(nn.Module()).keys()
    for name, module in model.named_modules(remove_duplicate=False):
        facts[f"{name}: module"] = id(module)
        facts[f"{name}: flags"] = module.training
        facts[f"{name}: attributes"] = {k: id(v) for k, v in vars(module).items() if k not in own}
        facts[f"{name}: hooks"] = {
            key: (id(value), [(k, id(v)) for k, v in value.items()])
            for key, value in vars(module).items()
            if "hook" in key and isinstance(value, dict)
        }
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        facts[f"{name}: tensor"] = (id(tensor), tensor.requires_grad, tensor.detach().clone())
    return facts


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not the same any more, by kind."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, tuple) and len(a) == 3:
            return a[:2] == b[:2] and torch.equal(a[2], b[2])
        return bool(a == b)

    return [
        key
        for key in before.keys() | after.keys()
        if key not in before or key not in after or not same(before[key], after[key])
    ]


def process() -> tuple[Any, ...]:
    """What of the process and this thread must not change."""
    random_ = torch.get_rng_state()
    return torch.is_grad_enabled(), _len_torch_function_stack(), torch.get_default_dtype(), tuple(random_[:64].tolist())


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return list(tensors_in(run(model, batch)))


class Interrupted(KeyboardInterrupt):
    """What the signal raises, so that no other interruption is taken for it."""


def attack(count: int, seed: int = 0, *, kept: bool = True) -> dict[str, Any]:
    """Interrupt so often, at random moments of random scenarios.

    Args:
        count: how many signals reach their aim.
        seed: of the moments.
        kept: whether float weights are kept until the end, as those of small models are.

    Returns:
        How often each outcome came, and what was wrong.
    """
    log = logging.getLogger("quantkit")
    level = log.level
    log.setLevel(logging.CRITICAL)
    moments, found = random.Random(seed), collections.Counter[str]()
    wrong: list[str] = []
    places = scenarios()
    known: dict[str, tuple[float, list[Tensor]]] = {}
    size, guard.KEPT_BYTES = guard.KEPT_BYTES, guard.KEPT_BYTES if kept else 0
    try:
        for name, (make, batch, change) in places.items():
            model = made(make)
            change(made(make))  # imports and caches
            start = time.perf_counter()
            change(model)
            known[name] = time.perf_counter() - start, outputs(model, batch)
        while sum(found.values()) - found["not interrupted"] < count:
            name = moments.choice(list(places))
            make, batch, change = places[name]
            model, seconds = made(make), known[name][0]
            said = outputs(model, batch)
            before, around = snapshot(model), process()
            outcome = interrupted(functools.partial(change, model), moments.uniform(0, 1.05) * seconds)
            after = process()
            if after != around:
                wrong.append(f"{name}: the process: {around} became {after}")
                torch.set_grad_enabled(True)
            if outcome == "interrupted":
                outcome = verdict(model, before, said, known[name][1], batch)
            found[outcome] += 1
            if outcome not in OUTCOMES:
                wrong.append(f"{name}: {outcome}")
    finally:
        guard.KEPT_BYTES = size
        log.setLevel(level)
    return {"cases": sum(found.values()) - found["not interrupted"], "outcomes": dict(found), "wrong": wrong}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with the same weights each time."""
    torch.manual_seed(0)
    return make()


def interrupted(work: Callable[[], Any], after: float) -> str:
    """Run ``work`` and send a signal after so many seconds."""

    def ring(*_: Any) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, max(after, 1e-6))
            work()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted:
            return "interrupted"
        except Exception as error:  # noqa: BLE001  that is what is looked for
            return f"interrupted, and raises {type(error).__name__}: {error}"
        return "not interrupted"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def verdict(model: nn.Module, before: dict[str, Any], said: list[Tensor], wanted: list[Tensor], batch: Any) -> str:
    """Which of :data:`OUTCOMES` it is; else what is wrong."""
    if guard.BROKEN in vars(model):
        return "marked"
    if has_report(model):
        got = outputs(model, batch)
        return "finished" if all(map(torch.equal, got, wanted)) else "a finished model that computes something else"
    off = differences(before, snapshot(model))
    if off:
        return f"{len(off)} things differ, such as {sorted(off)[:3]}"
    return "untouched" if all(map(torch.equal, outputs(model, batch), said)) else "it computes something else"

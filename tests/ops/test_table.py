"""Backends by name: those that are built in run operands without any module, and others can be registered."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_same, hostile, near, normal, operand
from torch import Tensor, nn

import quantkit
from quantkit import BackendError, SchemeError, W8A8Linear
from quantkit.core.operand import Operand
from quantkit.ops import table
from quantkit.ops.cpu import backend as cpu
from quantkit.ops.linear import linear, prepare
from quantkit.ops.plain import Plain, PlainPrepared
from quantkit.ops.table import choose, forced, use_backend

SCHEMES = ["w8a8", "w8a8-asym", "w8a8-static", "w8a8-static-asym", "w8a8-pertensor", "w4a4", "w4a16"]
STEPS = [
    (),
    ("shift", "pre_scale", "permutation"),
    ("rotation",),
    ("outliers",),
    ("groups",),
    ("shift", "pre_scale", "outliers", "permutation", "rotation", "groups"),
    ("threshold",),
]


def cases() -> list[tuple[str, tuple[str, ...]]]:
    """A threshold goes with symmetric scales per token only."""
    return [(s, steps) for s, steps in itertools.product(SCHEMES, STEPS) if "threshold" not in steps or s in ("w8a8", "w4a4")]


@pytest.mark.parametrize("name", quantkit.backends())
@pytest.mark.parametrize(("scheme", "steps"), cases(), ids=[f"{s}-{'+'.join(steps)}" for s, steps in cases()])
def test_operands_without_a_module(name: str, scheme: str, steps: tuple[str, ...]) -> None:
    for (k, n), dtype in itertools.product(((48, 21), (5, 3)), (torch.float32, torch.float16)):
        own = operand(k, n, scheme, steps, dtype=dtype)
        before = {key: tensor.clone() for key, tensor in own.tensors().items()}
        with use_backend("reference"):
            plain = prepare(own)
        with use_backend(name):
            prepared = prepare(own)
        assert prepared.operand is own
        floats = "a16" in scheme
        for m in (0, 1, 17):
            x = (normal(m, k) if floats or "threshold" in steps else hostile(m, k)).to(dtype)
            got, wanted = prepared.run(x), plain.run(x)
            assert (got.shape, got.dtype) == ((m, n), dtype)
            inexact = name == "triton" and {"rotation", "outliers", "threshold"} & set(steps)
            (near if inexact else assert_same)(got, wanted, f"{name} {own.facts} {m}")
        assert_same(own.tensors(), before)


def test_an_operand_can_be_prepared_twice() -> None:
    own, x = operand(32, 8), normal(3, 32)
    one, two = prepare(own), prepare(own)
    assert_same(one.run(x), two.run(x))
    assert_same(linear(one, x), one.run(x))


# ---- backends of others


class Doubling:
    """Twice the reference, for operands without a bias; so that one sees who ran."""

    name = "doubling"

    def __init__(self, name: str = "doubling", simulates: str | None = "it doubles") -> None:
        self.name, self.simulates = name, simulates
        self.prepared: list[Operand] = []

    def why_not(self, operand: Operand | None, device: torch.device) -> str | None:
        if device.type != "cpu":
            return "only here"
        return "it has a bias" if operand is not None and operand.bias is not None else None

    def why_simulated(self, operand: Operand) -> str | None:
        return self.simulates

    def prepare(self, operand: Operand) -> PlainPrepared:
        self.prepared.append(operand)

        class Twice(PlainPrepared):
            def run(self, x: Tensor) -> Tensor:
                return 2 * super().run(x)

        plain = Plain().prepare(operand)
        return Twice(plain.operand, plain.sums, plain.shares)


@pytest.fixture(autouse=True)
def _table_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(table, "_BACKENDS", list(table._BACKENDS))
    yield
    assert table.forced() is None


def test_a_registered_backend_runs_what_it_can() -> None:
    backend = Doubling()
    quantkit.register_backend(backend)
    assert list(quantkit.backends()) == ["doubling", "cpu", "triton", "reference"]
    assert quantkit.backends("meta")["doubling"] == "only here"
    without, with_bias, x = operand(32, 8, bias=False), operand(32, 8), normal(3, 32)
    assert choose(without) is backend
    assert choose(with_bias).name == "cpu"
    with use_backend("reference"):
        wanted = prepare(without).run(x)
    assert_same(prepare(without).run(x), 2 * wanted)
    assert backend.prepared == [without]
    layer = W8A8Linear.from_operand(without)
    assert_same(layer(x), 2 * wanted)
    with use_backend("reference"):
        assert_same(layer(x), wanted)
    assert_same(layer(x), 2 * wanted)


def test_where_a_backend_stands() -> None:
    quantkit.register_backend(Doubling("second"), before="reference")
    quantkit.register_backend(Doubling("first"))
    assert list(quantkit.backends()) == ["first", "cpu", "triton", "second", "reference"]
    assert choose(operand(8, 4, bias=False)).name == "first"
    assert choose(operand(8, 4)).name == "cpu"


def test_a_forced_backend_says_why_it_cannot() -> None:
    quantkit.register_backend(Doubling())
    with use_backend("doubling"):
        assert choose(operand(8, 4, bias=False)).name == "doubling"
        with pytest.raises(BackendError, match="'doubling' cannot run on cpu: it has a bias"):
            prepare(operand(8, 4))
        with use_backend("reference"):  # the innermost counts
            assert choose(operand(8, 4)).name == "reference"
        assert table.forced() == "doubling"
    with pytest.raises(BackendError, match="'tripling' is not known: there are doubling, cpu"), use_backend("tripling"):
        pass


def test_a_forced_backend_is_forgotten_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert table.forced() is None


def test_what_is_no_backend() -> None:
    class Half:
        name = "half"

    for thing in (Half(), Doubling, nn.Linear(2, 2), None):
        with pytest.raises(BackendError, match="is no backend"):
            quantkit.register_backend(thing)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="registered already"):
        quantkit.register_backend(Doubling("cpu"))
    with pytest.raises(BackendError, match="before='gpu' is no backend"):
        quantkit.register_backend(Doubling(), before="gpu")
    assert list(quantkit.backends()) == ["cpu", "triton", "reference"]


def test_what_is_simulated() -> None:
    assert quantkit.why_simulated("w8a8") is None
    assert quantkit.why_simulated("w8a8-static-asym") is None
    assert quantkit.why_simulated(operand(16, 8)) is None
    for scheme, says in (
        ("w4a8", "weights of 4 bits"),
        ("w8a6", "activations of 6 bits"),
        ("w8a16", "floating point"),
        ("w8a8-norm4", "activations of 4 bits"),
        ("w8a8-kv8", "attention"),
    ):
        assert says in str(quantkit.why_simulated(scheme))
    with pytest.raises(SchemeError):
        quantkit.why_simulated("w9a8")


def test_a_backend_makes_a_format_real() -> None:
    """What is simulated is the answer of backends, so another one may change it."""
    assert quantkit.why_simulated("w4a8") is not None
    quantkit.register_backend(Doubling(simulates=None))
    assert quantkit.why_simulated("w4a8") is None
    assert quantkit.why_simulated(operand(16, 8, "w4a8")) is None


def test_a_forced_backend_is_that_of_one_context() -> None:
    """Not of other threads, and not of other tasks of one thread."""

    async def task(name: str | None) -> str | None:
        with use_backend(name) if name else contextlib.nullcontext():
            await asyncio.sleep(0)
            return forced()

    async def tasks() -> list[str | None]:
        return await asyncio.gather(*map(task, ("cpu", None, "reference")))

    assert asyncio.run(tasks()) == ["cpu", None, "reference"]
    with use_backend("reference"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(forced).result() is None
        assert forced() == "reference"
    assert forced() is None


def test_compiled_code_follows_a_forced_backend() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + {None: 0, "cpu": 1, "reference": 2}[forced()], backend="eager", fullgraph=True)
    for name, wanted in (("cpu", 1), ("reference", 2), ("cpu", 1)):
        with use_backend(name):
            assert compiled(torch.zeros(1)) == wanted
        assert compiled(torch.zeros(1)) == 0


# ---- what falls back


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(table, "_said", set())
    caplog.set_level(logging.INFO, "quantkit")
    return caplog


def packed() -> W8A8Linear:
    """A layer with two codes in a byte, which no kernel reads."""
    return W8A8Linear(64, 8, scheme=quantkit.Scheme.parse("w4a8-g32"))


def layer(scheme: str, bias: bool = False) -> W8A8Linear:
    return W8A8Linear.from_operand(operand(32, 8, scheme, bias=bias))


FALLBACKS: dict[str, tuple[Callable[[], W8A8Linear], str, str]] = {
    "packed codes": (packed, "WARNING", "backend reference, which is exact and slow: cpu does not run them (its codes are not"),
    "a backend that declines": (lambda: layer("w8a8", bias=True), "INFO", "doubling does not run them (it has a bias)"),
    "simulated weights": (lambda: layer("w4a8"), "INFO", "simulate their scheme: weights of 4"),
    "float activations": (lambda: layer("w8a16"), "INFO", "activations stay in floating point"),
}


@pytest.mark.parametrize("kind", FALLBACKS)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_fallback_is_said_once_with_its_reason(kind: str, compiled: bool, said: pytest.LogCaptureFixture) -> None:
    make, level, text = FALLBACKS[kind]
    if kind == "a backend that declines":
        quantkit.register_backend(Doubling())
    for layer in (make(), make()):
        x = normal(3, layer.in_features)
        (torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer)(x)
        layer(x)
    (record,) = (r for r in said.records if r.module == "table")  # what processors lack is said elsewhere
    assert record.levelname == level
    assert text in record.getMessage()


def test_nothing_is_said_where_nothing_falls_back(said: pytest.LogCaptureFixture) -> None:
    layer, x = W8A8Linear.from_operand(operand(32, 8)), normal(3, 32)
    layer(x)
    with use_backend("reference"):  # as the user asked
        packed()(normal(3, 64))
    assert not [r for r in said.records if r.module == "table"]


def test_backends_say_why_they_do_not_run_an_operand() -> None:
    found = quantkit.backends(operand=packed().operand)
    assert found["cpu"] == "its codes are not stored one in a byte"
    assert found["reference"] == "ready"


def test_processors_without_an_integer_product_are_said_once(
    monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "_seconds", lambda run: 0.0 if "float" in run.__code__.co_names[0] else 1.0)
    cpu.has_integer_product.cache_clear()
    try:
        assert [cpu.has_integer_product() for _ in range(2)] == [False, False]
    finally:
        cpu.has_integer_product.cache_clear()
    (record,) = said.records
    assert "float32 multiplies the codes" in record.getMessage()

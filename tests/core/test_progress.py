"""What work tells of how far it is: to a function, to the terminal, or to nobody."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from helpers import assert_same, llama, mlp, tokens

import quantkit
from quantkit.calibration.data import self_sampled
from quantkit.core.progress import counted, tracked
from quantkit.evaluation.perplexity import compare

Call = tuple[str, int, int | None]
METHODS = ["smoothquant", "gptq"]


class Log(list[Call]):
    def __call__(self, what: str, done: int, total: int | None) -> None:
        self.append((what, done, total))

    def of(self, what: str) -> list[tuple[int, int | None]]:
        return [(done, total) for name, done, total in self if name == what]


def test_a_function_hears_of_every_item() -> None:
    log = Log()
    assert list(tracked("ab", "letters", log)) == ["a", "b"]
    assert log == [("letters", 0, 2), ("letters", 1, 2), ("letters", 2, 2)]


def test_nobody_knows_the_length_of_a_generator() -> None:
    log = Log()
    assert list(tracked((n for n in range(2)), "numbers", log)) == [0, 1]
    assert log.of("numbers") == [(0, None), (1, None), (2, None)]


@pytest.mark.parametrize("progress", [True, False, None])
def test_bars(progress: bool | None, capfd: pytest.CaptureFixture[str]) -> None:
    with counted(2, "sampling", progress, "tok") as advance:
        advance()
        advance()
    assert list(tracked([1, 2, 3], "calibrating", progress, "batch")) == [1, 2, 3]
    shown = capfd.readouterr().err  # no terminal: None shows nothing
    assert [("sampling" in shown and "2/2" in shown), ("calibrating" in shown and "3/3" in shown)] == [progress is True] * 2


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "w4a16-kv4"])
def test_quantize_tells_a_function(scheme: str) -> None:
    log, model, data = Log(), llama(), [tokens(2, 16, seed=i) for i in range(3)]
    quiet = quantkit.quantize(copy.deepcopy(model), METHODS, calibration=data, scheme=scheme, progress=False)
    quantkit.quantize(model, METHODS, calibration=data, scheme=scheme, progress=log)
    assert_same(model.state_dict(), quiet.state_dict())
    assert log.of("calibrating") == [(n, 3) for n in range(4)]
    for what in ("smoothquant", "gptq", "converting"):
        total = len(log.of(what)) - 1
        assert total > 0
        assert log.of(what) == [(n, total) for n in range(total + 1)]


def test_sampling_and_evaluating_end_at_their_totals() -> None:
    log, model = Log(), llama()
    data = self_sampled(model, sequences=3, length=6, batch=2, progress=log)
    assert [len(batch) for batch in data] == [2, 1]
    assert log.of("sampling") == [(n, 10) for n in range(11)]
    compare(model, data[0], progress=log)
    assert log.of("evaluating") == [(n, 2) for n in range(3)]


def test_attention_tells_a_function() -> None:
    log = Log()
    quantkit.quantize(llama(), quantkit.RPTQ(), calibration=[tokens(2, 16), tokens(2, 16)], scheme="w4a16-kv4", progress=log)
    assert log.of("calibrating attention") == [(n, 2) for n in range(3)]


class StopError(Exception):
    pass


def stop_at(step: str) -> Callable[[str, int, int | None], None]:
    def stop(what: str, done: int, total: int | None) -> None:
        if (what, done) == (step, 1):
            raise StopError

    return stop


@pytest.mark.parametrize("step", ["calibrating", "smoothquant", "converting"])
def test_an_exception_ends_the_work_and_leaves_the_model(step: str) -> None:
    model, x = mlp(), torch.randn(2, 9, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(StopError):
        quantkit.quantize(model, calibration=[x, x], progress=stop_at(step))
    assert_same(model.state_dict(), before)
    quantkit.quantize(model, calibration=[x], progress=False)


def test_bars_are_imported_when_they_are_drawn() -> None:
    code = """
import sys
from quantkit.core.progress import tracked
assert list(tracked([1], "x", lambda *_: None)) == list(tracked([1], "x", False)) == [1]
assert "tqdm.auto" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

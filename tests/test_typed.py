"""Code that is written as the docs say passes ``mypy --strict`` against the package as users have it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pages import ROOT, examples

SHIPPED = """
from pathlib import Path

from torch import Tensor, nn

import quantkit
from quantkit import Calibrator, PerSite, Progress, Stage, Statistic
from quantkit.calibrators.base import Foreseen, HeadClusters

one: Calibrator = quantkit.RTN()
one = quantkit.SmoothQuant()
one = quantkit.LLMInt8()
one = quantkit.Hadamard()
one = quantkit.Rotate()
one = quantkit.RPTQ()
one = quantkit.GPTQ()
one = quantkit.OmniQuant()
seen: Foreseen = quantkit.Hadamard()
heads: HeadClusters = quantkit.RPTQ()
kinds: tuple[type[Statistic], ...] = (quantkit.Range, quantkit.TokenSample, quantkit.Hessian)


class Loose(PerSite):
    name: str
    stage = Stage.SCALE

    def __init__(self, name: str) -> None:
        self.name = name


class Fixed(PerSite):
    name, stage = "fixed", Stage.SCALE


def show(what: str, done: int, total: int | None) -> None:
    print(what, done, total)


shown: Progress = show
one = Loose("loose")
quantkit.register_method("fixed", Fixed)
quantkit.register_method("both", lambda: [quantkit.SmoothQuant(), Fixed()])


def wrapped(model: nn.Module, batches: list[Tensor], folder: Path, fresh: nn.Module) -> tuple[nn.Module, float]:
    quantkit.quantize(model, ["smoothquant", one], calibration=batches, ignore=["head"], progress=show)
    plain = [layer.name for layer in quantkit.report(model).layers if layer.kind == "float"]
    quantkit.save(model, folder / "int8")
    again = quantkit.load(folder / "int8", model=fresh)
    same = quantkit.verify_equivalence(again, model, batches[0])
    return again, same.error if same.holds else float(len(plain))


def decided(model: nn.Module, batches: list[Tensor], folder: Path) -> nn.Module:
    quantkit.save_plan(quantkit.plan(model, "best", calibration=batches, scheme=quantkit.Scheme.parse("w8a8-asym")), folder)
    with quantkit.use_backend("reference"):
        return quantkit.convert(model, quantkit.load_plan(folder))
"""

CONFIG = """
[mypy]
strict = true
untyped_calls_exclude = torch

[mypy-accelerate.*,numpy.*,sympy.*,transformers.*,triton.*,torch._dynamo.*,torch._functorch.*,torch._inductor.*,torch.distributed.*,torch.export.*,torch.fx.*]
follow_imports = skip
"""
"""Some functions of torch have no types, such as ``Tensor.backward``. What is skipped takes minutes and is in no signature."""


def write_code_of_users(folder: Path) -> list[str]:
    """Write programs and a configuration of mypy into a folder, and return the arguments with which Python checks them."""
    programs = {"shipped": SHIPPED} | examples(ROOT / "docs" / "calibrators.md")
    assert len(programs) > 6
    for name, code in programs.items():
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    (folder / "mypy.ini").write_text(CONFIG, encoding="utf-8")
    return ["-m", "mypy", "--config-file=mypy.ini", *(f"{name}.py" for name in programs)]


def test_examples_and_calibrators_are_typed(tmp_path: Path) -> None:
    """``make dist`` checks the same against the wheel."""
    arguments = write_code_of_users(tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "quantkit").symlink_to(ROOT / "quantkit")
    # What PYTHONPATH names counts as installed, so that mypy asks for py.typed, and shows no errors inside of the package.
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, *arguments, f"--cache-dir={ROOT / '.mypy_cache' / 'users'}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

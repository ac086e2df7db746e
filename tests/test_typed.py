"""Code that is written as the docs say passes ``mypy --strict`` against the wheel that users install."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SHIPPED = """
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
"""

CONFIG = """
[mypy]
strict = true
untyped_calls_exclude = torch

[mypy-accelerate.*,numpy.*,sympy.*,transformers.*,triton.*,torch._dynamo.*,torch._functorch.*,torch._inductor.*,torch.distributed.*,torch.export.*,torch.fx.*]
follow_imports = skip
"""
"""Some functions of torch have no types, such as ``Tensor.backward``. What is skipped takes minutes and is in no signature."""


def test_examples_and_calibrators_are_typed(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert (tmp_path / "site" / "quantkit" / "py.typed").is_file()
    (tmp_path / "mypy.ini").write_text(CONFIG)
    (tmp_path / "shipped.py").write_text(SHIPPED)
    page = (ROOT / "docs" / "calibrators.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n# test: (\S+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(examples) > 5
    for name, code in examples:
        (tmp_path / f"{name}.py").write_text(code)
    # What PYTHONPATH names counts as installed, so that mypy asks for py.typed, and shows no errors inside of the package.
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    check = [sys.executable, "-m", "mypy", "--config-file=mypy.ini", f"--cache-dir={ROOT / '.mypy_cache' / 'users'}"]
    files = sorted(path.name for path in tmp_path.glob("*.py"))
    done = subprocess.run([*check, *files], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

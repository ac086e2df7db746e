"""Names of methods: quantkit's, those of the program, and those of packages that are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import mlp

import quantkit
from quantkit import MethodError, Recipe, SmoothQuant, Stage
from quantkit.calibrators import _methods as table
from quantkit.calibrators import kind_of, methods, register_method, resolve

X = torch.randn(2, 9, 16)


@dataclass(frozen=True)
class Halves(quantkit.PerSite):
    """A calibrator of a program."""

    factor: float = 0.5
    name: ClassVar[str] = "halves"
    stage: ClassVar[Stage] = Stage.SCALE

    def plan_site(self, site: quantkit.SiteView) -> tuple[quantkit.Transform, dict[str, Any]]:
        return quantkit.Transform(scale=torch.full((site.site.channels,), self.factor)), {}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    before = dict(table)
    yield
    table.clear()
    table.update(before)


def test_a_registered_name_is_a_method() -> None:
    quantkit.register_method("halves", Halves)
    assert list(methods())[-1] == "halves"
    by_name = quantkit.quantize(mlp(), "halves", calibration=[X], progress=False)
    by_class = quantkit.quantize(mlp(), Halves(), calibration=[X], progress=False)
    assert quantkit.report(by_name).method == ["halves"]
    assert quantkit.report(by_name).recipe == quantkit.report(by_class).recipe


def test_a_recipe_writes_it_by_name_with_its_options() -> None:
    recipe = Recipe((Halves(0.25),))
    assert "import" in recipe.to_dict()["method"][0]
    register_method("halves", Halves)
    written = recipe.to_dict()
    assert written["method"] == [{"name": "halves", "factor": 0.25}]
    assert Recipe.from_dict(json.loads(json.dumps(written))) == recipe
    assert Recipe.from_dict({"method": ["halves", "rtn"]}).method[0] == Halves()


def test_a_name_may_stand_for_several() -> None:
    register_method("both", lambda: [SmoothQuant(), Halves()])
    assert [c.name for c in resolve("both")] == ["smoothquant", "halves"]
    assert [c.name for c in resolve([Halves(), "both"])] == ["halves", "smoothquant"]
    assert kind_of("both") is None
    with pytest.raises(MethodError, match="other names"):
        Recipe.from_dict({"method": [{"name": "both"}]})


@pytest.mark.parametrize("name", ["", "two words", "a,b", "a/b", 3, None, ("rtn",)])
def test_names_are_plain(name: Any) -> None:
    with pytest.raises(MethodError, match="a name is a string"):
        register_method(name, Halves)


def test_names_are_taken_once() -> None:
    register_method("halves", Halves)
    for name in ("halves", "smoothquant", "best"):
        with pytest.raises(MethodError, match="is taken"):
            register_method(name, Halves)
    assert kind_of("smoothquant") is SmoothQuant


def test_a_factory_is_called() -> None:
    factory: Any = Halves()
    with pytest.raises(MethodError, match="pass what makes the calibrator"):
        register_method("halves", factory)


@pytest.mark.parametrize("made", [3, None, Halves, [Halves(), 3], [Halves]], ids=repr)
def test_what_a_factory_makes_is_checked(made: Any) -> None:
    register_method("odd", lambda: made)
    with pytest.raises(MethodError, match="no calibrator"):
        resolve("odd")


def test_the_order_of_what_a_factory_makes_is_checked() -> None:
    register_method("odd", lambda: [quantkit.RTN(), Halves()])
    with pytest.raises(MethodError, match="rounding comes last"):
        resolve("odd")


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
import torch
import quantkit

@dataclass(frozen=True)
class Flat(quantkit.PerSite):
    factor: float = 2.0
    name: ClassVar[str] = "flat"
    stage: ClassVar[quantkit.Stage] = quantkit.Stage.SCALE

    def plan_site(self, site):
        return quantkit.Transform(scale=torch.full((site.site.channels,), self.factor)), {}

def both():
    return [Flat(3.0), quantkit.Hadamard()]

number = 3
"""


def package(folder: Path, name: str, entries: str, code: str = PLUGIN) -> None:
    """A distribution as pip would install it: a module, and what its metadata says."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(code)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[quantkit.methods]\n{entries}\n")


def python(folder: Path, code: str) -> str:
    paths = [str(folder), str(Path(quantkit.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_installed_package_brings_methods(tmp_path: Path) -> None:
    """By name and in recipes; and it is imported for its own names only."""
    offers = {"flat": "Flat", "flat_both": "both", "rtn": "Flat", "odd": "number"}
    package(tmp_path / "site", "flatten", "\n".join(f"{name} = flatten:{what}" for name, what in offers.items()))
    package(tmp_path / "site", "broken", "broken = broken:Missing", "raise RuntimeError('no such device')")
    code = f"""
import sys, json, torch, quantkit
from quantkit.calibrators import methods, resolve
torch.manual_seed(0)
x = torch.randn(2, 9, 16)
def model():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 24), torch.nn.GELU(), torch.nn.Linear(24, 8))
quantkit.quantize(model(), "rtn", progress=False, calibration=[x])
assert resolve("rtn") == [quantkit.RTN()]  # a package cannot take a name of quantkit's
assert set(methods()) >= {{"flat", "flat_both", "odd", "broken"}}
assert not {{"flatten", "broken"}} & set(sys.modules), "names are listed without imports"

first = quantkit.quantize(model(), "flat", progress=False, calibration=[x])
quantkit.save(first, {str(tmp_path / "saved")!r})
recipe = quantkit.Recipe.read({str(tmp_path / "saved")!r})
assert quantkit.report(first).recipe["method"] == [{{"name": "flat", "factor": 2.0}}]
again = quantkit.quantize(model(), **recipe.arguments, progress=False, calibration=[x])
assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
assert [c.name for c in quantkit.Recipe.from_dict({{"method": "flat_both"}}).method] == ["flat", "hadamard"]
assert quantkit.Recipe.from_dict({{"method": [{{"name": "flat", "factor": 4.0}}]}}).method[0].factor == 4.0
assert "broken" not in sys.modules

for name, error in (("broken", quantkit.PluginError), ("odd", quantkit.MethodError), ("nothing", quantkit.MethodError)):
    try:
        resolve(name)
    except error as fault:
        print(fault)
try:
    quantkit.register_method("flat", quantkit.RTN)
except quantkit.MethodError as fault:
    print(fault)
"""
    broken, odd, unknown, taken = python(tmp_path / "site", code).splitlines()
    assert "package broken" in broken
    assert "no such device" in broken
    assert "uninstall broken" in broken
    assert "offers 3" in odd
    assert "flat_both" in unknown
    assert "is taken" in taken


def test_two_packages_with_one_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        package(tmp_path, name, f"flat = {name}:Flat")
    code = """
from quantkit import PluginError
from quantkit.calibrators import methods, resolve
assert "flat" in methods() and resolve("rtn")
try:
    resolve("flat")
except PluginError as fault:
    print(fault)
"""
    assert "one and two both offer 'flat'" in python(tmp_path, code)

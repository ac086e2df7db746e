"""Recipes: written down, read back, and repeated to the same bits; and nothing is imported unless somebody asks."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import assert_same, llama, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import quantkit
from quantkit import GPTQ, Hadamard, LLMInt8, OmniQuant, PerSite, QuantkitError, Recipe, Scheme, SmoothQuant, Stage, Transform
from quantkit.calibrators import RTN, methods, resolve
from quantkit.pipeline.quantize import quantize

pytestmark = pytest.mark.usefixtures("found_once")

BATCHES = [tokens(2, 24, seed=i) for i in range(3)]


@dataclass(frozen=True)
class Mine(PerSite):
    """A calibrator of a user."""

    factor: float = 2.0
    name = "mine"
    stage = Stage.SCALE
    statistics = (quantkit.Range,)

    def plan_site(self, site: Any) -> Any:
        return Transform(scale=site.statistic(quantkit.Range).absmax.clamp_min(1.0) ** 0 * self.factor), {}


class Loose(Mine):
    name = "loose"

    def __init__(self) -> None:
        object.__setattr__(self, "factor", nn.Linear(1, 1))


calibrators = st.one_of(
    st.builds(SmoothQuant, st.one_of(st.just("auto"), st.floats(0, 1))),
    st.builds(LLMInt8, st.one_of(st.just("auto"), st.integers(0, 64))),
    st.builds(LLMInt8, threshold=st.floats(0.5, 10)),
    st.builds(Hadamard, st.sampled_from([8, 64, "full"]), st.one_of(st.none(), st.integers(0, 99))),
    st.builds(GPTQ, st.floats(0.001, 1), st.booleans()),
    st.builds(OmniQuant, st.integers(2, 200), st.integers(1, 30), st.floats(0, 0.5)),
    st.builds(RTN),
    st.builds(Mine, st.floats(0.5, 4)),
)
kinds = st.sampled_from(["", "-asym"])
schemes = st.none() | st.builds("w{}a{}{}".format, st.integers(2, 8), st.integers(2, 8), kinds).map(Scheme.parse)


@given(calibrators, schemes, st.integers(-5, 2**40), st.lists(st.text(max_size=5), max_size=3))
def test_round_trip(calibrator: Any, scheme: Scheme | None, seed: int, names: list[str]) -> None:
    recipe = Recipe((calibrator,), scheme, seed, tuple(names), tuple(names) or None)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())), imports=True) == recipe
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict())), imports=True) == recipe


def test_every_built_in_calibrator_makes_the_trip() -> None:
    for name in methods():
        recipe = Recipe(tuple(resolve(name)))
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
        assert Recipe.from_dict({"method": name}) == recipe


METHODS_TO_REPEAT: dict[str, Any] = {
    "names": ["smoothquant", "llm_int8", "gptq"],
    "options": [SmoothQuant(0.4), Hadamard(8, seed=3), GPTQ(damping=0.1)],
    "mine": [Mine(3.0), "rtn"],
}


@pytest.mark.parametrize("name", METHODS_TO_REPEAT)
@pytest.mark.parametrize("data", ["given", "sampled"])
def test_same_bits(name: str, data: str, tmp_path: Path) -> None:
    model = llama()
    calibration = BATCHES if data == "given" else None
    options = {"scheme": "w6a8", "seed": 5, "ignore": ["*.down_proj"]}
    first = quantize(copy.deepcopy(model), METHODS_TO_REPEAT[name], calibration=calibration, progress=False, **options)
    quantkit.save(first, tmp_path / "saved")
    recipe = Recipe.read(tmp_path / "saved", imports=name == "mine")
    assert recipe.scheme == Scheme.parse("w6a8")
    again = quantize(copy.deepcopy(model), **recipe.arguments, calibration=calibration, progress=False)
    assert_same(again.state_dict(), first.state_dict())
    assert quantkit.report(again).to_dict() == quantkit.report(first).to_dict()
    assert quantkit.report(quantkit.load(tmp_path / "saved")).recipe == recipe.to_dict()


def test_a_checkpoint_imports_nothing(tmp_path: Path) -> None:
    model = quantize(llama(), Mine(), calibration=BATCHES, progress=False)
    quantkit.save(model, tmp_path / "saved")
    quantkit.load(tmp_path / "saved")
    with pytest.raises(QuantkitError, match="runs code that is not quantkit's"):
        Recipe.read(tmp_path / "saved")


def test_folders_are_read_but_not_written(tmp_path: Path) -> None:
    """A person may say where to keep finished blocks; a checkpoint may not."""
    recipe = Recipe.from_dict({"method": [{"name": "omniquant", "folder": str(tmp_path / "work")}]})
    assert recipe.method == (OmniQuant(folder=str(tmp_path / "work")),)
    assert not {"folder", "offload"} & recipe.to_dict()["method"][0].keys()
    quantkit.save(quantize(llama(), "rtn", progress=False), tmp_path / "saved")
    file = tmp_path / "saved" / "quantkit.json"
    body = json.loads(file.read_text())
    body["report"]["recipe"]["method"] = [{"name": "omniquant", "folder": "/etc"}]
    file.write_text(json.dumps(body))
    with pytest.raises(QuantkitError, match="no option 'folder'"):
        Recipe.read(tmp_path / "saved")


def test_what_cannot_be_written_is_told() -> None:
    @dataclass(frozen=True)
    class Local(Mine):
        pass

    for calibrator in (Loose(), Local()):
        written = Recipe((calibrator,)).to_dict()
        json.dumps(written)
        with pytest.raises(QuantkitError, match="cannot be repeated"):
            Recipe.from_dict(written, imports=True)
    by_class = quantize(llama(), "rtn", ignore=["*.q_proj"], progress=False)
    assert quantkit.report(by_class).recipe is not None
    assert quantkit.report(quantize(llama(), "rtn", targets=[nn.Linear], progress=False)).recipe is None


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("just text", "mapping"),
        ({"scheme": "w8a8"}, "mapping with the key 'method'"),
        ({"method": "rtn", "bits": 8}, "has bits"),
        ({"method": "nothing"}, "not known"),
        ({"method": [{"name": "nothing"}]}, "names 'nothing'"),
        ({"method": [{"alpha": 0.5}]}, "names None"),
        ({"method": [{"name": ["rtn"]}]}, "names"),
        ({"method": [{"name": "best"}]}, "calibrators of other names"),
        ({"method": [{"name": "smoothquant", "beta": 1}]}, "no option 'beta'"),
        ({"method": [{"name": "smoothquant", "alpha": 7}]}, "alpha is a number from 0 to 1"),
        ({"method": [3]}, "write a name"),
        ({"method": [{1: 2}]}, "write a name"),
        ({"method": []}, "empty"),
        ({"method": ["gptq", "smoothquant"]}, "rounding comes last"),
        ({"method": "rtn", "seed": "x"}, "whole number"),
        ({"method": "rtn", "seed": True}, "whole number"),
        ({"method": "rtn", "scheme": "w9a9"}, "2 to 8"),
        ({"method": "rtn", "scheme": 8}, "write its name"),
        ({"method": "rtn", "ignore": "lm_head"}, "list of layer names"),
        ({"method": "rtn", "targets": [1]}, "list of layer names"),
        ({"method": [{"import": "os:system"}]}, "runs code"),
    ],
)
def test_recipes_that_make_no_sense(recipe: Any, message: str) -> None:
    with pytest.raises(QuantkitError, match=message):
        Recipe.from_dict(recipe)


@pytest.mark.parametrize("where", ["nowhere:At", "os:nothing", "os", 3, "", "json:dumps"])
def test_imports_that_lead_nowhere(where: Any) -> None:
    with pytest.raises(QuantkitError, match="which is n"):
        Recipe.from_dict({"method": [{"import": where}]}, imports=True)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("method:\n  - smoothquant\n  - {name: gptq, damping: 0.05}\nscheme: w4a8\n")
    (tmp_path / "a.json").write_text('{"method": ["smoothquant", {"name": "gptq", "damping": 0.05}], "scheme": "w4a8"}')
    wanted = Recipe((SmoothQuant(), GPTQ(0.05)), Scheme.parse("w4a8"))
    assert Recipe.read(tmp_path / "a.yaml") == Recipe.read(tmp_path / "a.json") == wanted
    for name, text in (("b.yaml", "a: [}"), ("b.json", "{"), ("c.yaml", "!!python/object/apply:os.getcwd []"), ("d.yaml", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(QuantkitError):
            Recipe.read(tmp_path / name)
    with pytest.raises(QuantkitError, match="holds no recipe"):
        Recipe.read(tmp_path)

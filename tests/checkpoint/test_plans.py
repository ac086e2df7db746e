"""Plans: made without a change to the model, written, read back, and carried out to the bits of ``quantize``."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import assert_same, gpt2, llama, mlp, normal, refused, state, tokens
from torch import nn

import quantkit
from quantkit import GPTQ, RPTQ, CheckpointError, Hadamard, LLMInt8, ModelError, ModelPlan, Rotate, SmoothQuant
from quantkit.checkpoint.files import sha256_of
from quantkit.checkpoint.plans import PLAN_FILE, TENSORS_FILE
from quantkit.checkpoint.record import digest_of

pytestmark = pytest.mark.usefixtures("found_once")

BUILD = {"mlp": lambda: mlp(outliers=True), "llama": llama, "gpt2": gpt2, "mixtral": lambda: FAMILIES["mixtral"].build().eval()}
CASES: list[tuple[str, Any, str | None]] = [
    ("mlp", "smoothquant", "w8a8"),
    ("mlp", [SmoothQuant(), LLMInt8(2)], "w8a8-asym"),
    ("mlp", [Hadamard(8)], "w4a4-static"),
    ("mlp", LLMInt8(threshold=6.0), "w8a8"),
    ("mlp", SmoothQuant(0.5), None),
    ("gpt2", "gptq", "w4a8-pertensor"),
    ("llama", ["rotate", "gptq"], "w4a8"),
    ("llama", [Rotate(8), "rtn"], None),
    ("llama", RPTQ(4), "w8a8-static-asym-norm4-kv4-attention4"),
    ("llama", "smoothquant", "w4a16-kv8"),
    ("mixtral", "smoothquant", "w8a8"),
    ("mixtral", ["rotate", GPTQ()], "w8a8-static"),
]


def batches(name: str) -> list[Any]:
    return [normal(2, 9, 16), normal(1, 5, 16, seed=3)] if name == "mlp" else [tokens(2, 12), tokens(1, 7, seed=3)]


def bits(model: nn.Module) -> dict[str, Any]:
    """What two quantized models must have in common; signal-to-noise ratios and runs take data, which a plan has not."""
    report = quantkit.report(model).to_dict() | {"verification": None}
    for layer in report["layers"]:
        layer.pop("sqnr_db", None)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    return {"bits": dict(model.state_dict()), "kinds": kinds, "report": report, "training": model.training}


@pytest.mark.parametrize(("name", "method", "scheme"), [(n, m, s) for n, m, s in CASES if not (s is None and n == "llama")])
def test_a_plan_gives_the_bits_of_quantize(name: str, method: Any, scheme: str | None, tmp_path: Path) -> None:
    model = BUILD[name]()
    wanted, other = copy.deepcopy(model), copy.deepcopy(model)
    before = state(model)
    made = quantkit.plan(model, method, calibration=batches(name), scheme=scheme, progress=False)
    assert_same(state(model), before)
    assert isinstance(made, ModelPlan)
    read = quantkit.load_plan(quantkit.save_plan(made, tmp_path / "plan"))
    quantkit.quantize(wanted, method, calibration=batches(name), scheme=scheme, progress=False)
    x = batches(name)[0]
    with torch.no_grad():
        expected = wanted(x)
        for target, plan in ((model, made), (other, read)):
            assert quantkit.convert(target, plan, progress=False) is target
            assert_same(bits(target), bits(wanted))
            got = target(x)
            pair = (got, expected) if isinstance(got, torch.Tensor) else (got.logits, expected.logits)
            assert_same(*pair)


def test_a_rotated_float_model_is_carried_out(tmp_path: Path) -> None:
    model = llama()
    wanted, before = copy.deepcopy(model), state(model)
    made = quantkit.plan(model, Rotate(8), scheme=None, progress=False)
    assert_same(state(model), before)
    assert made.rotations
    quantkit.save_plan(made, tmp_path / "plan")
    quantkit.quantize(wanted, Rotate(8), scheme=None, progress=False)
    assert_same(bits(quantkit.convert(model, quantkit.load_plan(tmp_path / "plan"), progress=False)), bits(wanted))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return quantkit.save_plan(_plan(), tmp_path / "plan")


def _plan(seed: int = 0) -> ModelPlan:
    torch.manual_seed(seed)
    return quantkit.plan(mlp(outliers=True), [SmoothQuant(), "gptq"], calibration=[normal(4, 9, 16)], progress=False)


# ---- folders


def test_writing_is_deterministic_and_replaces_a_plan(folder: Path, tmp_path: Path) -> None:
    again = quantkit.save_plan(_plan(), tmp_path / "again")
    for file in (PLAN_FILE, TENSORS_FILE):
        assert (folder / file).read_bytes() == (again / file).read_bytes()
    quantkit.save_plan(_plan(1), folder)
    assert (folder / TENSORS_FILE).read_bytes() != (again / TENSORS_FILE).read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == sorted([PLAN_FILE, TENSORS_FILE])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "plan"]


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(CheckpointError, match="exists and is no plan"):
            quantkit.save_plan(_plan(), target)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(CheckpointError, match="holds no plan"):
        quantkit.load_plan(tmp_path)
    with pytest.raises(CheckpointError, match="holds no plan"):
        quantkit.load_plan(tmp_path / "nowhere")


def edit(folder: Path, change: Any, *, sign: bool = True) -> None:
    """Change the JSON of a plan, and write the digest anew as its writer would."""
    body = json.loads((folder / PLAN_FILE).read_text())
    body.pop("digest")
    change(body)
    body["digest"] = digest_of(body) if sign else "0" * 64
    (folder / PLAN_FILE).write_text(json.dumps(body))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def swap(folder: Path) -> None:
    """The tensors of another plan."""
    other = quantkit.save_plan(_plan(1), folder.parent / "other")
    shutil.copy(other / TENSORS_FILE, folder / TENSORS_FILE)


DAMAGE: dict[str, tuple[Any, str]] = {
    "no tensors": (lambda f: (f / TENSORS_FILE).unlink(), "is missing"),
    "truncated tensors": (lambda f: truncate(f / TENSORS_FILE), "SHA-256"),
    "a bit of the tensors": (lambda f: flip(f / TENSORS_FILE), "SHA-256"),
    "other tensors": (swap, "SHA-256"),
    "truncated JSON": (lambda f: truncate(f / PLAN_FILE), "damaged"),
    "empty JSON": (lambda f: (f / PLAN_FILE).write_text(""), "damaged"),
    "a list": (lambda f: (f / PLAN_FILE).write_text("[]"), "no JSON object"),
    "another digest": (lambda f: edit(f, lambda b: None, sign=False), "digest"),
    "a later version": (lambda f: edit(f, lambda b: b.update(format_version=99)), "this version"),
    "another format": (lambda f: edit(f, lambda b: b.update(format="quantkit checkpoint")), "no plan of this version"),
    "no plan": (lambda f: edit(f, lambda b: b.pop("plan")), "damaged"),
    "a number": (lambda f: edit(f, lambda b: b.update(plan=3)), "damaged"),
    "nothing": (lambda f: edit(f, lambda b: b.update(plan=None)), "damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_plans_are_refused(case: str, folder: Path) -> None:
    damage, says = DAMAGE[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=says):
        quantkit.load_plan(folder)


def test_every_place_of_a_plan_can_be_damaged(folder: Path) -> None:
    """Behind a digest that fits: values of another type are refused by name, or at least read as plain data."""
    original = (folder / PLAN_FILE).read_text()
    count = 0
    for path in list(places(json.loads(original)["plan"]))[::3]:
        for value in (None, -1, "x", [], {}):

            def change(body: Any, path: Any = path, value: Any = value) -> None:
                at = body["plan"]
                for key in path[:-1]:
                    at = at[key]
                at[path[-1]] = copy.deepcopy(value)

            (folder / PLAN_FILE).write_text(original)
            edit(folder, change)
            try:
                quantkit.load_plan(folder)
            except CheckpointError:
                count += 1
    assert count


def places(value: Any, so_far: tuple[Any, ...] = ()) -> Any:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*so_far, key)
        yield from places(inner, (*so_far, key))


def test_tensors_that_the_plan_has_not(folder: Path) -> None:
    def lost(body: Any) -> None:
        text = json.dumps(body["plan"])
        (folder / TENSORS_FILE).write_bytes((quantkit.save_plan(_empty(), folder.parent / "small") / TENSORS_FILE).read_bytes())
        body["plan"], body["sha256"] = json.loads(text), sha256_of(folder / TENSORS_FILE)

    edit(folder, lost)
    with pytest.raises(CheckpointError, match="damaged"):
        quantkit.load_plan(folder)


def _empty() -> ModelPlan:
    return quantkit.plan(mlp(), SmoothQuant(0.5), ignore=["down"], calibration=[normal(4, 9, 16)], scheme=None, progress=False)


# ---- models of others


OTHERS: dict[str, tuple[Any, str]] = {
    "another class": (llama, "no such linear"),
    "wider": (lambda: mlp(width=18), "input features"),
    "narrower inside": (lambda: mlp(inner=20), "'up' has 24 output features there and 20 here"),
    "no linear": (lambda: nn.LayerNorm(16), "no such linear"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_plans_of_other_models_are_refused(case: str) -> None:
    build, says = OTHERS[case]
    model = build()
    with refused(model, ModelError, "plan is of another model", says):
        quantkit.convert(model, _plan(), progress=False)


def test_a_plan_with_other_outputs_is_refused() -> None:
    """Codes for more or fewer rows than the linear has."""
    model, plan = mlp(), _plan()
    model.down = nn.Linear(24, 9)
    with refused(model, ModelError, "plan is of another model", "'down'"):
        quantkit.convert(model, plan, progress=False)


def test_a_plan_is_carried_out_once() -> None:
    model, plan = mlp(outliers=True), _plan()
    quantkit.convert(model, plan, progress=False)
    with refused(model, ModelError, "quantized already"):
        quantkit.convert(model, plan, progress=False)


def test_a_plan_for_a_head_that_is_not_there() -> None:
    """The attention of modules that another model does not have."""
    small, large = llama(num_hidden_layers=1), llama()
    plan = quantkit.plan(large, "rtn", scheme="w8a8-kv8", calibration=[tokens()], progress=False)
    assert plan.attention
    with refused(small, ModelError, "plan is of another model"):
        quantkit.convert(small, plan, progress=False)

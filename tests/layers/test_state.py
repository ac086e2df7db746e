"""A state dict is loaded into layers that were quantized in the same way, or refused: another one would load just as well."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from helpers import MLP, assert_same, example, mlp, outputs, quantized
from torch import Tensor

import quantkit
from quantkit import Hadamard, LLMInt8, W8A8Linear

WAYS: dict[str, tuple[Any, str]] = {
    "rtn": ("rtn", "w8a8"),
    "static": ("rtn", "w8a8-static"),
    "asymmetric": ("rtn", "w8a8-asym"),
    "4 bits": ("rtn", "w4a8"),
    "groups": ("rtn", "w4a8-g4"),
    "at run time": ("smoothquant", "w8a8"),
    "rotated": (Hadamard(seed=5), "w8a8"),
    "rotated without signs": (Hadamard(), "w8a8"),
    "threshold": (LLMInt8(threshold=6.0), "w8a8"),
    "outliers": (LLMInt8(columns=2), "w8a8"),
}


class Open(MLP):
    """What ``up`` reads is read by something else too, so that nothing is folded into the norm."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return h + self.down(self.up(h).relu())


def made(way: str) -> Any:
    torch.manual_seed(0)
    method, scheme = WAYS[way]
    return quantized(Open().eval(), method, scheme=scheme)


def through_a_file(model: Any) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    return state


@pytest.mark.parametrize("way", WAYS)
def test_the_same_way(way: str) -> None:
    source = made(way)
    for state in (source.state_dict(), dict(source.state_dict()), through_a_file(source)):
        for assign in (False, True):
            model = made(way)
            with torch.no_grad():
                for buffer in model.buffers():
                    buffer.zero_()
            assert str(model.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
            assert_same(model.state_dict(), source.state_dict())
            assert_same(outputs(model), outputs(source))
    assert_same(made(way).to("meta").load_state_dict(source.state_dict(), assign=True).missing_keys, [])


def differ(one: W8A8Linear, other: W8A8Linear) -> bool:
    facts = [(m.scheme, m.groups, m.rotation_block, m.threshold) for m in (one, other)]
    return facts[0] != facts[1]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("target", WAYS)
@pytest.mark.parametrize("source", WAYS)
def test_another_way(source: str, target: str, strict: bool) -> None:
    """It is refused, with the names of all layers that differ in kind, or right."""
    if source == target:
        return
    model, other = made(target), made(source)
    if any(differ(model.get_submodule(name), other.get_submodule(name)) for name in ("up", "down")):
        with pytest.raises(RuntimeError, match=r"(?s)'up' is quantized.*'down' is quantized"):
            model.load_state_dict(through_a_file(other), strict=strict)
    elif lacking := [key for key in model.up.state_dict() if key not in other.up.state_dict()]:
        with pytest.raises(RuntimeError, match=rf"'up' is quantized.* it has no {' and no '.join(lacking)}"):
            model.load_state_dict(through_a_file(other), strict=strict)
    else:
        assert not model.load_state_dict(through_a_file(other), strict=strict).missing_keys
        assert_same(outputs(model), outputs(other))


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("static", "rtn", "input_scale, for which a layer of scheme w8a8 has no use"),
        ("rtn", "static", "it has no input_scale"),
        ("rotated", "rtn", "rotation_signs, for which"),
        ("rtn", "rotated", "it has no rotation_signs"),
        ("rtn", "at run time", "it has no pre_scale"),
        ("4 bits", "groups", "size mismatch"),
    ],
)
def test_without_metadata(source: str, target: str, words: str) -> None:
    """As in a file of safetensors, which holds tensors only."""
    model = made(target)
    with pytest.raises(RuntimeError, match=words):
        model.load_state_dict(dict(made(source).state_dict()), strict=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_weights_are_not_cut_to_integers(dtype: torch.dtype) -> None:
    model = made("rtn")
    before = outputs(model)
    with pytest.raises(RuntimeError, match=f"'up' is quantized.* its weight is {dtype}, not torch.int8"):
        model.load_state_dict(mlp().to(dtype).state_dict(), strict=False)
    assert_same(model.up(example(model)).isfinite().all(), torch.tensor(True))
    model.norm.load_state_dict(made("rtn").norm.state_dict())
    assert_same(outputs(model), before)


def test_parts_of_a_layer() -> None:
    model, state = made("rtn"), dict(made("rtn").state_dict())
    assert model.load_state_dict({"norm.weight": state["norm.weight"]}, strict=False).unexpected_keys == []
    for part in ("weight_scale", "bias", "weight"):
        with pytest.raises(RuntimeError, match=f"'up' is quantized.* it has no {part}"):
            model.load_state_dict({key: value for key, value in state.items() if key != f"up.{part}"}, strict=False)
    with pytest.raises(RuntimeError, match=r"weight_scale is torch\.bfloat16"):
        model.load_state_dict(state | {"up.weight_scale": state["up.weight_scale"].bfloat16()}, assign=True)


def test_names_are_those_of_the_tensors() -> None:
    model = made("rtn")
    assert [key for key in model.state_dict() if key.startswith("up.")] == ["up.weight", "up.weight_scale", "up.bias"]
    assert quantkit.report(model).scheme == "w8a8"

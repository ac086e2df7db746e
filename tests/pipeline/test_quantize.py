"""The public API: what quantized() accepts, what it does, and that it does the same every time."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from helpers import assert_same, gpt2, int8, llama, mlp, normal, outputs, quantized, tokens
from torch import nn

import quantkit
from quantkit import RTN, Scheme, SmoothQuant
from quantkit.core.formats import PerTensor
from quantkit.core.numerics import absmax_scale, range_scale
from quantkit.core.weights import quantize_weight
from quantkit.model.modules import weight_of

BLOCK = {
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
}
ALL = {f"model.layers.{i}.{name}" for i in range(2) for name in BLOCK}


def test_in_place_and_returned() -> None:
    model = mlp()
    assert quantized(model) is model
    assert int8(model) == {"up", "down"}
    assert not model.training
    assert not quantized(mlp().eval()).up.training
    assert quantized(mlp().train()).up.training


def test_a_language_model() -> None:
    model = quantized(llama())
    assert int8(model) == ALL  # the head stays in floating point
    prompt = tokens(2, 4)
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert text.shape == (2, 10)
    assert_same(text[:, :4], prompt)


@pytest.mark.parametrize("build", [mlp, llama, gpt2])
def test_rtn_is_the_textbook(build: Any) -> None:
    """Codes, scales and bias of every layer, and not a bit of anything else."""
    model = build()
    before, original = {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(model)
    quantized(model, "rtn")
    for name in int8(model):
        layer, linear = model.get_submodule(name), original.get_submodule(name)
        assert_same([layer.weight, layer.weight_scale], list(quantize_weight(weight_of(linear))), name)
        assert_same(layer.bias, None if linear.bias is None else linear.bias.detach())
        assert not layer.rewrites_input
    for key, value in model.state_dict().items():
        if key.rpartition(".")[0] not in int8(model):
            assert_same(value, before[key], key)


METHODS = {
    "default": None,
    "name": "smoothquant",
    "instance": SmoothQuant(),
    "names": ["smoothquant", "rtn"],
    "mixed": (SmoothQuant(), "rtn"),
    "one": [SmoothQuant()],
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_ways_to_name_a_method(method: Any) -> None:
    torch.manual_seed(1)
    model = mlp(outliers=True)
    wanted = quantized(copy.deepcopy(model), [SmoothQuant("auto"), RTN()]).state_dict()
    data = [normal(2, 9, 16)]
    got = quantkit.quantize(model, calibration=data) if method is None else quantized(model, method)
    assert_same(got.state_dict(), wanted)


@pytest.mark.parametrize(
    "name", ["w8a8", "w8a8-asym", "w8a8-static", "w8a8-static-asym", "w8a8-pertensor", "w4a6", "w2a3-static-asym-pertensor"]
)
def test_schemes(name: str) -> None:
    scheme = Scheme.parse(name)
    assert scheme.name == name
    data, models = normal(2, 9, 16), [mlp() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = models[0].norm(data).detach()
    a, b = (quantized(m, "rtn", scheme=s, calibration=[data]) for m, s in zip(models, (name, scheme), strict=True))
    assert_same(a.state_dict(), b.state_dict())
    layer = a.up
    assert layer.scheme == scheme
    assert layer.weight.abs().max() == scheme.weight.number.qmax
    assert (layer.weight_scale.unique().numel() == 1) == isinstance(scheme.weight.granularity, PerTensor)
    if not scheme.is_static:
        assert layer.input_scale is None
    elif scheme.input.number.symmetric:
        assert_same(layer.input_scale, absmax_scale(x.abs().max()[None], scheme.input.number.bits))
        assert layer.input_zero_point is None
    else:
        wanted = range_scale(x.min()[None], x.max()[None], scheme.input.number.bits)
        assert_same([layer.input_scale, layer.input_zero_point], list(wanted))


def test_simulations_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "quantkit"):
        quantized(mlp(), "rtn")
        assert not caplog.records
        quantized(mlp(), "rtn", scheme="w4a8")
    assert "w4a8 is a simulation" in caplog.text


def test_without_a_scheme_the_model_stays_float() -> None:
    model = llama()
    original = copy.deepcopy(model)
    quantized(model, SmoothQuant(0.5), scheme=None)
    assert not int8(model)
    assert not torch.equal(model.model.layers[0].input_layernorm.weight, original.model.layers[0].input_layernorm.weight)
    assert quantkit.verify_equivalence(model, original, tokens(seed=5)).holds


LAYER0 = {name for name in ALL if ".0." in name}
DOWN = {name for name in ALL if name.endswith("down_proj")}
SELECTIONS: list[tuple[dict[str, Any], set[str]]] = [
    ({"ignore": ["model.layers.0.mlp.down_proj"]}, ALL - {"model.layers.0.mlp.down_proj"}),
    ({"ignore": ["*.down_proj"]}, ALL - DOWN),
    ({"ignore": ["down_proj", "model.layers.0"]}, ALL - DOWN - LAYER0),
    ({"ignore": ("q_proj",)}, {n for n in ALL if "q_proj" not in n}),
    ({"targets": ["down_proj"]}, DOWN),
    ({"targets": ["down_proj"], "ignore": ["model.layers.0.*"]}, DOWN - LAYER0),
    ({"targets": [nn.Linear]}, ALL | {"lm_head"}),
    ({"targets": ["lm_head"]}, {"lm_head"}),
]


@pytest.mark.parametrize(("options", "wanted"), SELECTIONS, ids=[str(options) for options, _ in SELECTIONS])
def test_selections(options: dict[str, Any], wanted: set[str]) -> None:
    model = quantized(llama(), **options)
    assert int8(model) == wanted
    kept = {r.name: r.reason for r in quantkit.report(model).layers if r.kind == "float"}
    assert kept.keys() == (ALL | {"lm_head"}) - wanted
    assert all(kept.values())


def test_partial_selections_keep_the_function() -> None:
    """What reads a smoothed activation in floating point must undo the scale too."""
    data, model = normal(4, 30, 16), mlp(outliers=True)
    original = copy.deepcopy(model)
    for ignored in ("up", "down"):
        got = outputs(quantized(copy.deepcopy(model), SmoothQuant(0.5), ignore=[ignored], calibration=[data]), data)
        signal, noise = outputs(original, data)[0], got[0] - outputs(original, data)[0]
        assert noise.norm() < 0.05 * signal.norm()


# ---- SmoothQuant


# ---- calibrators of others

"""Experts held as one parameter are taken apart into linears, quantized, saved, and put back where nothing came of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import assert_same, state
from randomised import build
from transformers import Llama4ForCausalLM, Llama4TextConfig

import quantkit
from quantkit import CalibrationError, W8A8Linear
from quantkit.core.numerics import sqnr_db
from quantkit.discovery.equivalence import outputs_of, relative_error
from quantkit.model.experts import Experts, put_back, unfuse

# linears of experts, and how many of their inputs fold (all down projections but those behind gpt-oss' (up + 1))
FUSED = {
    "mixtral": (24, 8), "qwen2-moe": (24, 8), "qwen3-moe": (24, 8), "olmoe": (24, 8), "granite-moe": (24, 8),
    "gpt-oss": (24, 0), "qwen3-next": (24, 8),
}  # fmt: skip
every_family = pytest.mark.parametrize("name", FUSED)


def batch(name: str) -> Any:
    return FAMILIES[name].batch()


@every_family
def test_the_stand_in_computes_the_same(name: str) -> None:
    model = build(name)
    before, modules = outputs_of(model, batch(name)), dict(model.named_modules())
    replaced = unfuse(model)
    assert replaced
    assert any(isinstance(m, Experts) for m in model.modules())
    assert relative_error(before, outputs_of(model, batch(name))) < 1e-6
    path, original = replaced[0]
    weight = model.get_submodule(f"{path}.1.down_proj").weight  # a view
    assert weight.untyped_storage().data_ptr() == original.down_proj.untyped_storage().data_ptr()
    put_back(model, replaced)
    assert all(modules[n] is m for n, m in model.named_modules())


@every_family
def test_quantized_and_saved(name: str, tmp_path: Path) -> None:
    model, original = build(name, outliers=True), build(name, outliers=True)
    quantkit.quantize(model, calibration=[batch(name)], progress=False)
    layers = [layer for layer in quantkit.report(model).layers if ".experts." in layer.name]
    assert len(layers) == FUSED[name][0]
    assert all(layer.kind == "int8" and isinstance(model.get_submodule(layer.name), W8A8Linear) for layer in layers)
    assert sum(layer.folded_into is not None for layer in layers) == FUSED[name][1]
    assert not any(p.dim() == 3 for n, p in model.named_parameters() if "experts" in n)
    got = outputs_of(model, batch(name))
    assert sqnr_db(outputs_of(original, batch(name))[0], got[0]) > 15
    assert_same(outputs_of(quantkit.load(quantkit.save(model, tmp_path / "x")), batch(name)), got)
    assert_same(outputs_of(copy.deepcopy(model), batch(name)), got)


def test_experts_that_stay() -> None:
    """Modules of which nothing is quantized are what they were; a float expert among INT8 ones does not hold all weights."""
    model = build("mixtral")
    kept = [m for n, m in model.named_modules() if n.endswith("experts")]
    quantkit.quantize(model, "rtn", ignore=["experts"], calibration=[batch("mixtral")], progress=False)
    assert [m for n, m in model.named_modules() if n.endswith("experts")] == kept
    model = build("mixtral")
    quantkit.quantize(model, "rtn", ignore=["*.experts.2.*"], calibration=[batch("mixtral")], progress=False)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    linear = experts.get_submodule("2.up_proj")
    assert isinstance(linear, torch.nn.Linear)
    assert linear.weight.untyped_storage().nbytes() == linear.weight.nbytes
    assert isinstance(experts.get_submodule("1.up_proj"), W8A8Linear)


def test_generation(tmp_path: Path) -> None:
    model = build("mixtral")
    quantkit.quantize(model, calibration=[batch("mixtral")], progress=False)
    ids = torch.arange(4)[None]
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert written.shape == (1, 8)


def test_a_refusal_puts_them_back() -> None:
    model = build("mixtral")
    before = state(model)
    with pytest.raises(CalibrationError):
        quantkit.quantize(model, calibration=[], progress=False)
    assert_same(state(model), before)


def test_scheme_none_leaves_them_alone() -> None:
    model = build("mixtral")
    types = {n: type(m) for n, m in model.named_modules()}
    quantkit.quantize(model, scheme=None, calibration=[batch("mixtral")], progress=False)
    assert {n: type(m) for n, m in model.named_modules()} == types


def test_what_is_no_experts_module_or_lies_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unfuse(build("llama")) == []
    model = build("mixtral")
    experts = type(model.get_submodule("model.layers.0.mlp.experts"))
    monkeypatch.setattr(experts, "forward", lambda self, x, index, share: x)
    assert unfuse(model) == []  # the stand-in would compute something else


# ---- experts that get as many tokens each


def llama4(experts: int = 4) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": experts}
    model = Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 3:  # transformers leaves those of experts as they come
            torch.nn.init.normal_(parameter, std=0.1)
    return model


IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def test_experts_with_as_many_tokens_each_are_quantized_and_saved(tmp_path: Path) -> None:
    model, original = llama4(), llama4()
    quantkit.quantize(model, calibration=[IDS], progress=False)
    layers = [layer for layer in quantkit.report(model).layers if ".experts." in layer.name]
    assert len(layers) == 12
    assert all(layer.kind == "int8" for layer in layers)
    assert sum(layer.folded_into is not None for layer in layers) == 4  # all down projections
    got = outputs_of(model, IDS)
    assert sqnr_db(outputs_of(original, IDS)[0], got[0]) > 25
    assert_same(outputs_of(quantkit.load(quantkit.save(model, tmp_path / "x")), IDS), got)
    model.save_pretrained(tmp_path / "hf")
    assert_same(outputs_of(Llama4ForCausalLM.from_pretrained(tmp_path / "hf").eval(), IDS), got)


def test_experts_that_no_token_is_for_see_zeros_and_the_report_says_so() -> None:
    model = llama4(experts=16)
    quantkit.quantize(model, calibration=[IDS], progress=False)
    unseen = [layer for layer in quantkit.report(model).layers if "calibration" in layer.notes]
    assert unseen
    assert all(layer.sqnr_db is None and ".experts." in layer.name for layer in unseen)
    assert sqnr_db(outputs_of(llama4(experts=16), IDS)[0], outputs_of(model, IDS)[0]) > 25


def test_parameters_of_the_same_names_that_mean_something_else_stay_as_they_are() -> None:
    model = llama4()
    experts = model.model.layers[0].feed_forward.experts
    experts.act_fn = torch.nn.Identity()
    forward = type(experts).forward
    other = type("Other", (type(experts),), {"forward": lambda self, x: forward(self, x).abs()})
    experts.__class__ = other
    quantkit.quantize(model, calibration=[IDS], progress=False)
    assert model.model.layers[0].feed_forward.experts is experts
    assert any("experts" in r.name and "Other" in r.reason for r in quantkit.report(model).others)

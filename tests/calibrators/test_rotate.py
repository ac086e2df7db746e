"""Rotate: the function stays, the weights rotate, and a model that does not rotate is refused and left as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CORE, FAMILIES, GQA, WIDTH, NanoGPT, hf, tokens
from helpers import assert_same, state
from randomised import build, rotated, worst_sqnr
from torch import Tensor, nn

import quantkit
from quantkit import Hadamard, MethodError, Plan, Rotate, SmoothQuant, Stage
from quantkit.cli.demo import outlier_twin
from quantkit.core.rotation import BlockRotation
from quantkit.core.spaces import SpaceRotation
from quantkit.discovery.equivalence import outputs_of, relative_error
from quantkit.discovery.residual import find_stream
from quantkit.model.experts import unfuse
from quantkit.model.modules import weight_of

pytestmark = pytest.mark.usefixtures("found_once")

TURNING = {
    # embeddings, writers, readers, norms with parameters; a block has two writers and a norm for each branch
    "llama": (1, 4, 11, 5),
    "qwen2": (1, 4, 11, 5),
    "qwen3": (1, 4, 11, 5),
    "mistral": (1, 4, 11, 5),
    "phi3": (1, 4, 5, 5),
    "gpt2": (2, 4, 5, 5),
    "opt": (2, 4, 9, 5),
    "gpt-neox": (1, 4, 5, 5),
    "nanogpt": (2, 4, 5, 5),
    "nanogpt-no-bias": (2, 4, 5, 5),
    "gemma": (1, 4, 11, 5),  # 1 + w, embeddings times sqrt(H)
    "granite": (1, 4, 11, 5),  # branches times a constant
    "cohere": (1, 4, 11, 3),  # one norm for both branches
    "nemotron": (1, 4, 9, 5),  # 1 + w and a bias
    "olmo": (1, 4, 11, 0),  # norms without parameters
    "nanochat": (1, 4, 9, 0),  # the same, and one behind the embedding
    "mamba2": (1, 2, 3, 3),
    "moe": (1, 8, 19, 3),  # experts and a router that are linears
    "mixtral": (1, 10, 25, 5),  # two writers of attention, four experts a block with up and gate; the router is a bare matrix
    "gpt-oss": (1, 10, 25, 5),
    "qwen3-next": (1, 12, 30, 5),  # a shared expert with a gate; two inputs of the linear attention
    "deepseek-v3": (1, 12, 26, 5),  # eight experts and a shared one in the second block
    "shared-block": (2, 2, 3, 3),
}

REFUSED = {
    "gemma2": "a norm comes between",
    "olmo2": "a norm comes between",
    "bert": "a norm comes between",
    "opt-post-norm": "read by something besides linears",
    "bloom": "read by something besides linears",  # a norm behind the embedding
    "llama4": "post_attention_layernorm' is read by something besides linears",  # experts that are not taken apart
    "t5": "encoder.final_layer_norm' is read by something besides linears",  # an output of the model
    "vit": "no embedding",
    "relu-mlp": "no embedding",
}


# ---- models that turn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TURNING)
def test_function_is_preserved(name: str) -> None:
    batch, original = FAMILIES[name].batch(), build(name)
    apart = copy.deepcopy(original)
    unfuse(apart)
    stream = find_stream(apart, batch)
    found = len(stream.embeddings), len(stream.writers), len(stream.readers), len(stream.gains)
    assert found == TURNING[name]
    wanted = outputs_of(original, batch)

    model = rotated(build(name), batch)
    assert relative_error(wanted, outputs_of(model, batch)) < 1e-5
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    assert not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    new, old = (m.get_submodule(stream.embeddings[0]).weight.detach() for m in (model, original))
    assert float((new - BlockRotation(WIDTH).apply(old)).abs().max()) < 1e-6
    for norm, gain in stream.gains.items():
        if gain.weight:
            assert bool((model.get_submodule(norm).get_parameter(gain.weight) == gain.neutral).all())
    unfuse(model)
    for linear in dict.fromkeys((*stream.writers, *stream.readers)):  # each has to be the one that it is now
        old, new = weight_of(apart.get_submodule(linear)), weight_of(model.get_submodule(linear))
        kept = new.clone()
        new.copy_(old)
        assert relative_error(wanted, outputs_of(model, batch)) > 1e-4 or "expert" in linear, linear  # which may see no token
        new.copy_(kept)


@pytest.mark.parametrize("name", [n for n in TURNING if n in ("gpt2", "opt", "gpt-neox", "nanogpt", "nanogpt-no-bias", "moe")])
def test_float64_is_preserved_to_its_own_precision(name: str) -> None:
    """LayerNorms only: RMSNorms of transformers compute in float32 whatever they get."""
    batch, original = FAMILIES[name].batch(), build(name).double()
    model = rotated(build(name).double(), batch)
    assert relative_error(outputs_of(original, batch), outputs_of(model, batch)) < 1e-12


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "nanogpt", "nanochat"])
def test_bfloat16(name: str) -> None:
    batch, original = FAMILIES[name].batch(), build(name).bfloat16()
    model = rotated(build(name).bfloat16(), batch)
    assert relative_error(outputs_of(original, batch), outputs_of(model, batch)) < 8 * 2**-7
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "nanogpt-no-bias", "nemotron", "olmo", "mixtral"])
@pytest.mark.parametrize("block", [2, 8, 20, 64, "full"])
def test_blocks(name: str, block: int | str) -> None:
    batch, original = FAMILIES[name].batch(), build(name, outliers=True)
    model = rotated(copy.deepcopy(original), batch, Rotate(block=block))
    assert relative_error(outputs_of(original, batch), outputs_of(model, batch)) < 1e-5
    used = {2: 2, 8: 8, 20: 16, 64: 32, "full": 32}[block]
    assert f"in blocks of {used}:" in quantkit.report(model).rewrites[0]


def test_blocks_hold_channels_that_are_alike() -> None:
    """What is large in the stream, and damped by every norm, shares a block with its like and not with the rest."""
    model = build("llama")
    loud = torch.tensor([1, 7, 12, 30])
    with torch.no_grad():
        model.model.embed_tokens.weight[:, loud] *= 50
        for layer in model.model.layers:
            layer.input_layernorm.weight[loud] /= 50
            layer.post_attention_layernorm.weight[loud] /= 50
    before = model.model.embed_tokens.weight.detach().clone()
    after = rotated(model, tokens(), Rotate(block=4)).model.embed_tokens.weight.detach()
    torch.testing.assert_close(after[:, loud].norm(dim=1), before[:, loud].norm(dim=1), rtol=1e-4, atol=0)


def test_seed_is_the_rotation() -> None:
    first, same, other = (rotated(build("llama"), tokens(), Rotate(seed=seed)) for seed in (1, 1, 2))
    assert_same(dict(first.state_dict()), dict(same.state_dict()))
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_biases_go_where_they_can() -> None:
    """Into readers that have biases; else they stay in the norm and turn, as the one before GPT-2's head does."""
    model = rotated(build("gpt2"), tokens())
    assert all(not bool(block.ln_1.bias.any()) for block in model.transformer.h)
    assert bool(model.transformer.ln_f.bias.any())


def test_bias_without_gain_and_without_a_reader_to_take_it() -> None:
    model = build("gpt2")
    model.transformer.ln_f.weight.data[3] = 0.0
    before = state(model)
    with pytest.raises(
        MethodError, match=r"'transformer.ln_f' has a channel with a bias and no gain, and 'lm_head' has no bias"
    ):
        rotated(model, tokens())
    assert_same(state(model), before)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.tie_word_embeddings


# ---- models that do not ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    model, batch = build(name), FAMILIES[name].batch()
    before = state(model)
    with pytest.raises(MethodError, match=REFUSED[name]) as error:
        rotated(model, batch)
    assert "Rotate(stream=False)" in str(error.value)
    assert_same(state(model), before)


def test_weight_shared_with_something_else() -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    before = state(model)
    with pytest.raises(MethodError, match=r"shares its weight with model.layers.1.mlp.up_proj"):
        rotated(model, tokens())
    assert_same(state(model), before)


# ---- ties and checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "smollm3"])
def test_plain_checkpoint(name: str, tmp_path: Path) -> None:
    """Another process that knows nothing of rotations opens it, tied or not before."""
    model = build(name)
    wanted, tied = outputs_of(model, tokens()), model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name != "llama")
    rotated(model, tokens())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert_same(outputs_of(again, tokens()), outputs_of(model, tokens()))
    assert relative_error(wanted, outputs_of(again, tokens())) < 1e-5
    assert not again.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["gpt2", "nanogpt"])
def test_head_stays_tied_where_no_gain_goes_into_it(name: str) -> None:
    model = build(name)
    body = model.transformer if name == "gpt2" else model
    body.ln_f.weight.data.fill_(1.0)
    wanted = outputs_of(model, tokens())
    report = quantkit.report(rotated(model, tokens()))
    assert model.lm_head.weight is body.wte.weight
    assert relative_error(wanted, outputs_of(model, tokens())) < 1e-5
    assert not any("tied" in line for line in report.rewrites)


@pytest.mark.parametrize("name", ["llama", "gpt2", "nanogpt"])
def test_int8_checkpoint(name: str, tmp_path: Path) -> None:
    model = quantkit.quantize(build(name), ["rotate", "smoothquant"], calibration=[tokens()], progress=False)
    quantkit.save(model, tmp_path / "saved")
    again = quantkit.load(tmp_path / "saved", model=NanoGPT() if name == "nanogpt" else None)
    assert_same(outputs_of(again, tokens()), outputs_of(model, tokens()))
    assert quantkit.report(again).rewrites == quantkit.report(model).rewrites
    assert "residual stream of 32 channels rotated in blocks of 32" in str(quantkit.report(again))


def test_int8_model_of_transformers(tmp_path: Path) -> None:
    model = quantkit.quantize(build("gpt2"), ["rotate", "smoothquant"], calibration=[tokens()], progress=False)
    model.save_pretrained(tmp_path)
    assert_same(outputs_of(type(model).from_pretrained(tmp_path), tokens()), outputs_of(model, tokens()))


def test_experts_that_few_tokens_reach() -> None:
    """The first sixteen tokens need not reach every expert; the whole first batch has to."""
    ids = torch.cat([torch.full((1, 64), 5), tokens(1)], 1)
    model = build("moe")
    wanted = outputs_of(model, ids)
    rotated(model, ids)
    assert relative_error(wanted, outputs_of(model, ids)) < 1e-5


@pytest.mark.parametrize("when", ["later calibrator", "interrupted half way"])
def test_what_fails_later_leaves_the_model_as_it_was(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails:
        name, stage, statistics = "fails", Stage.SCALE, ()

        def plan(self, view: Any) -> Plan:
            assert not torch.equal(view.model.transformer.wte.weight, before["bits"]["transformer.wte.weight"])
            raise KeyboardInterrupt

    if when == "interrupted half way":
        left = [5]

        def stops(module: nn.Module) -> Tensor:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return weight_of(module)

        monkeypatch.setattr("quantkit.pipeline.rotate.weight_of", stops)
    model = build("gpt2")
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(model, ["rotate", Fails()], calibration=[tokens()], progress=False)
    assert_same(state(model), before)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.tie_word_embeddings
    monkeypatch.undo()
    quantkit.quantize(model, ["rotate", "smoothquant"], calibration=[tokens()], progress=False)


# ---- in a method -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "nanogpt-no-bias"])
def test_outlier_channels_cost_less(name: str) -> None:
    """Channels that norms blow up and linears shrink: rounding to nearest suffers, a rotation does not see them."""

    def sqnr(method: Any) -> float:
        model = quantkit.quantize(copy.deepcopy(twin), method, calibration=[tokens()], progress=False)
        return worst_sqnr(wanted, outputs_of(model, tokens()))

    twin = outlier_twin(build(name), share=0.05)
    wanted = outputs_of(twin, tokens())
    plain, smooth = sqnr("rtn"), sqnr("smoothquant")
    assert sqnr("rotate") > plain + 6
    assert sqnr(["rotate", SmoothQuant(0.5)]) > max(plain + 6, smooth - 3)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "nanogpt", "gemma"])
def test_with_smoothing_the_model_stays_a_plain_one(name: str) -> None:
    original = build(name, outliers=True)
    model = rotated(copy.deepcopy(original), tokens(), ["rotate", SmoothQuant(0.5)])
    assert relative_error(outputs_of(original, tokens()), outputs_of(model, tokens())) < 1e-5
    assert any(layer.folded_into for layer in quantkit.report(model).layers)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in original.named_modules()}


def test_hadamard_takes_what_is_left() -> None:
    model = quantkit.quantize(build("llama"), ["rotate", SmoothQuant(0.5), Hadamard(8)], calibration=[tokens()], progress=False)
    layers = {layer.name: layer for layer in quantkit.report(model).layers}
    for name, layer in layers.items():
        if name.endswith("down_proj"):
            assert layer.at_run_time == ["rotation"]
            assert layer.notes["block"] == 8
        elif layer.kind == "int8":
            assert layer.at_run_time == []
            assert layer.notes["rotated space"] == ("heads of 8" if name.endswith("o_proj") else "residual stream")


def test_head_that_is_untied_stays_in_floating_point() -> None:
    model = quantkit.quantize(build("gpt2"), "rotate", calibration=[tokens()], progress=False)
    assert type(model.lm_head) is nn.Linear
    assert sum(isinstance(m, quantkit.W8A8Linear) for m in model.modules()) == 8


def test_needs_no_data() -> None:
    model = hf("Llama", **GQA | {"tie_word_embeddings": True})()
    wanted = outputs_of(model, tokens())
    quantkit.quantize(model, "rotate", scheme=None, progress=False)
    assert relative_error(wanted, outputs_of(model, tokens())) < 1e-5


def test_orders_and_values_that_make_no_sense() -> None:
    for first in ("smoothquant", "hadamard", "llm_int8"):
        with pytest.raises(MethodError, match="rewrites the float model"):
            rotated(build("llama"), tokens(), [first, "rotate"])
    seeds: list[Any] = [1.5, True, None]
    for seed in seeds:
        with pytest.raises(MethodError, match="integer"):
            Rotate(seed=seed)
    blocks: list[Any] = [0, 1, True, 64.0, "half"]
    for block in blocks:
        with pytest.raises(MethodError, match="number of channels"):
            Rotate(block=block)
    with pytest.raises(MethodError, match="rotate nothing"):
        Rotate(stream=False, heads=False)

    class Late(Rotate):
        name, stage = "late", Stage.SCALE

        def plan(self, view: Any) -> Plan:
            return Plan(rotate=SpaceRotation())

    with pytest.raises(MethodError, match=r"Stage\.MODEL"):
        rotated(build("llama"), tokens(), Late())


def test_table_is_complete() -> None:
    """Every core family either turns or is refused, and is in one of the two tables."""
    assert set(CORE) <= set(TURNING) | set(REFUSED)

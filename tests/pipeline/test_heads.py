"""Output heads in INT8: with codes of their own where they were tied to an embedding, which stays as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import MLP, VOCAB, assert_same, gpt2, llama, refused, tokens
from torch import Tensor, nn

import quantkit
from quantkit import MethodError, QuantKitConfig, Recipe, W8A8Linear, quantize

pytestmark = pytest.mark.usefixtures("found_once")

X = tokens(2, 12)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": VOCAB}


class NanoGPT(nn.Module):
    """Its head is tied to its embedding, and nothing of transformers knows of it."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.block, self.norm = nn.Embedding(VOCAB, 16), MLP(), nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.norm(self.block(self.wte(ids))))
        return logits


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


MODELS: dict[str, tuple[Any, str, str, str]] = {
    "tied": (lambda: llama(tie_word_embeddings=True), "lm_head", "model.embed_tokens", "model.norm"),
    "of its own": (llama, "lm_head", "model.embed_tokens", "model.norm"),
    "Conv1D": (gpt2, "lm_head", "transformer.wte", "transformer.ln_f"),
    "encoder": (bert, "cls.predictions.decoder", "bert.embeddings.word_embeddings", "cls.predictions.transform.LayerNorm"),
    "of nobody": (NanoGPT, "lm_head", "wte", "norm"),
}


def made(kind: str) -> tuple[Any, str, Tensor, str]:
    torch.manual_seed(0)
    make, head, embedding, norm = MODELS[kind]
    model = make().eval()
    with torch.no_grad():
        model.get_submodule(norm).weight.uniform_(0.5, 2)
    return model, head, model.get_submodule(embedding).weight.detach().clone(), norm


def says(model: Any) -> Tensor:
    with torch.no_grad():
        out = model(X)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["rtn", "smoothquant", "best"])
def test_heads(kind: str, method: str, tmp_path: Path) -> None:
    model, head, embedding, norm = made(kind)
    before, wanted = copy.deepcopy(model), says(model)
    assert quantize(model, method, heads=True, calibration=[X], progress=False) is model
    layer = model.get_submodule(head)
    assert isinstance(layer, W8A8Linear)
    record = next(r for r in quantkit.report(model).layers if r.name == head)
    assert record.kind == "int8"
    assert record.weights == layer.in_features * layer.out_features
    assert record.folded_into == (None if method == "rtn" else norm)
    assert_same(model.get_submodule(MODELS[kind][2]).weight, embedding)
    assert float((says(model) - wanted).norm() / wanted.norm()) < 0.05
    said = " ".join(quantkit.report(model).rewrites)
    assert (f"output head {head} has codes of its own" in said) == (kind != "of its own")

    plan = quantkit.plan(copy.deepcopy(before), method, heads=True, calibration=[X], progress=False)
    assert_same(says(quantkit.convert(copy.deepcopy(before), plan)), says(model))
    path = quantkit.save(model, tmp_path / "out")
    assert_same(says(quantkit.load(path, model=copy.deepcopy(before))), says(model))
    if kind != "of nobody":
        assert_same(says(quantkit.load(path)), says(model))
        model.save_pretrained(tmp_path / "theirs")
        opened = type(model).from_pretrained(tmp_path / "theirs")
        assert_same(says(opened), says(model))
        opened.tie_weights()
        assert_same(says(opened), says(model))


def test_what_came_before_is_as_before() -> None:
    model, head, _, _ = made("tied")
    kept = quantize(copy.deepcopy(model), calibration=[X], progress=False)
    assert quantkit.report(kept).floats()
    assert kept.config.tie_word_embeddings
    left = quantize(model, heads=True, ignore=[head], calibration=[X], progress=False)
    assert_same(says(left), says(kept))
    assert left.get_submodule(head).weight is left.model.embed_tokens.weight


def test_a_failure_ties_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, head, embedding, _ = made("tied")
    monkeypatch.setattr("quantkit.pipeline.quantize.prove", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize(model, heads=True, calibration=[X], progress=False)
    assert model.get_submodule(head).weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert "lm_head.weight" in model.all_tied_weights_keys
    assert_same(model.model.embed_tokens.weight, embedding)


class Scaled(NanoGPT):
    """Computes something else where its head is not tied."""

    def forward(self, ids: Tensor) -> Tensor:
        tied = self.lm_head.weight is self.wte.weight
        return super().forward(ids) * (0.5 if tied else 1.0)


def test_models_that_have_to_be_tied() -> None:
    with refused(Scaled().eval(), MethodError, "lm_head", "something else", "heads="):
        quantize(model := Scaled().eval(), heads=True, calibration=[X], progress=False)
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": VOCAB}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    batch = {"input_ids": X, "decoder_input_ids": X}
    with refused(model, MethodError, "lm_head", "T5ForConditionalGeneration", "on loading"):
        quantize(model, heads=True, calibration=[batch], progress=False)
    assert model.lm_head.weight is model.shared.weight


def test_from_pretrained(tmp_path: Path) -> None:
    model, head, _, _ = made("tied")
    model.save_pretrained(tmp_path / "float")
    wanted = quantize(model, "smoothquant", heads=True, calibration=[X], progress=False)
    config = QuantKitConfig("smoothquant", heads=True, calibration=[X])
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert isinstance(opened.get_submodule(head), W8A8Linear)
    assert_same(says(opened), says(wanted))


def test_exports(tmp_path: Path) -> None:
    model, head, _, _ = made("tied")
    quantize(model, "smoothquant", heads=True, calibration=[X], progress=False)
    opened = quantkit.load(quantkit.export(model, tmp_path / "out"))
    assert_same(opened.get_submodule(head).weight, model.get_submodule(head).weight)


def test_recipes() -> None:
    model, _, _, _ = made("tied")
    quantize(model, "rtn", heads=True, calibration=[X], progress=False)
    recipe = Recipe.from_dict(quantkit.report(model).recipe)
    assert recipe.heads
    assert recipe.arguments["heads"]
    assert not Recipe.from_dict({"method": "rtn"}).heads
    with pytest.raises(MethodError, match="heads 'yes'"):
        Recipe.from_dict({"method": "rtn", "heads": "yes"})
    with refused(model := llama(), MethodError, "heads=", "scheme=None"):
        quantize(model, heads=True, scheme=None, calibration=[X], progress=False)

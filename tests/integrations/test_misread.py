"""Folders of INT8 models cannot be misread: who does not know quantkit gets an error, and who does gets the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from helpers import assert_same, llama, outputs, tokens
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
from transformers.quantizers import auto

import quantkit
from quantkit import W8A8Linear

pytestmark = pytest.mark.usefixtures("found_once")


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From this call on, transformers knows nothing of quantkit, as in a process that does not import it."""

    def forget() -> None:
        monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "quantkit")
        monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "quantkit")

    return forget


VISION = "model.vision_tower.encoder"


def quantized(model: Any, **options: Any) -> Any:
    quantkit.quantize(model, "smoothquant", calibration=[tokens()], progress=False, **options)
    return model


def vision_and_text() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**sizes, "model_type": "llama", "vocab_size": 64, "num_key_value_heads": 2}
    vision = {**sizes, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63, vision_feature_layer=-1)
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("without_the_key", [False, True])
def test_plain_transformers_refuses_a_folder_of_save_pretrained(
    stranger: Callable[[], None], without_the_key: bool, tmp_path: Path
) -> None:
    quantized(llama()).save_pretrained(tmp_path)
    stranger()
    if without_the_key:  # what the warning of transformers recommends
        config = json.loads((tmp_path / "config.json").read_text())
        del config["quantization_config"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    for cls in (AutoModelForCausalLM, AutoModel, LlamaForCausalLM, LlamaModel, transformers.LlamaForSequenceClassification):
        with pytest.raises(RuntimeError, match="mismatched"):
            cls.from_pretrained(tmp_path)


def test_plain_transformers_refuses_a_folder_of_save_whatever_its_files_are_called(
    stranger: Callable[[], None], tmp_path: Path
) -> None:
    quantkit.save(quantized(llama()), tmp_path)
    stranger()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "model-00001-of-00001.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_are_refused_by_strangers_and_read_by_us(family: str, stranger: Callable[[], None], tmp_path: Path) -> None:
    model = quantized(FAMILIES[family].build().eval())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(outputs(again, tokens()), outputs(model, tokens()))
    stranger()
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_class_without_the_head_opens_a_folder_with_one_and_back(tmp_path: Path) -> None:
    model = quantized(llama())
    model.save_pretrained(tmp_path / "head")
    body = AutoModel.from_pretrained(tmp_path / "head")
    wanted = outputs(model.model, tokens())
    assert_same(outputs(body, tokens()), wanted)
    body.save_pretrained(tmp_path / "body")
    assert_same(outputs(AutoModel.from_pretrained(tmp_path / "body"), tokens()), wanted)
    assert_same(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "body").model, tokens()), wanted)


def test_a_part_of_a_quantized_model_saved_by_itself(stranger: Callable[[], None], tmp_path: Path) -> None:
    model = quantized(llama())
    model.model.save_pretrained(tmp_path / "part")
    wanted = outputs(model.model, tokens())
    assert_same(outputs(AutoModel.from_pretrained(tmp_path / "part"), tokens()), wanted)
    model.save_pretrained(tmp_path / "whole")  # the two share a configuration
    assert_same(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), tokens()), outputs(model, tokens()))
    around = nn.Sequential(llama())
    quantized(around)
    around[0].save_pretrained(tmp_path / "inner")
    assert_same(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "inner"), tokens()), outputs(around[0], tokens()))
    stranger()
    for folder in ("part", "inner"):
        with pytest.raises(RuntimeError, match="mismatched"):
            AutoModel.from_pretrained(tmp_path / folder)


def test_a_model_whose_text_part_alone_is_quantized(stranger: Callable[[], None], tmp_path: Path) -> None:
    model = vision_and_text()
    quantized(model.model.language_model)
    model.save_pretrained(tmp_path)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert isinstance(again.model.language_model.layers[0].mlp.up_proj, W8A8Linear)
    assert_same(outputs(again, tokens()), outputs(model, tokens()))
    stranger()
    with pytest.raises(RuntimeError, match="mismatched"):
        transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", [VISION, "model.language_model.layers.0.mlp"])
def test_a_model_with_another_part_quantized_is_refused_by_everybody(
    part: str, stranger: Callable[[], None], tmp_path: Path
) -> None:
    model, x = vision_and_text(), torch.randn(2, 4, 32)
    quantkit.quantize(model.get_submodule(part), "rtn", calibration=[x], progress=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched"):
        transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    stranger()
    with pytest.raises(RuntimeError, match="mismatched"):
        transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)


class Hub(nn.Module, PyTorchModelHubMixin):
    """A model of a library with a ``save_pretrained`` of its own, which reads back whatever has a name that it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def test_other_libraries_with_a_save_pretrained_refuse_codes(tmp_path: Path) -> None:
    model = quantkit.quantize(Hub(), "rtn", calibration=[torch.randn(4, 16)], ignore=["down"], progress=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch for up\.weight"):
        Hub.from_pretrained(tmp_path)


def test_a_state_dict_of_a_larger_model_fits_only_where_codes_belong() -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        part = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        return nn.Sequential(part, nn.LayerNorm(16))

    x = torch.randn(4, 16)
    first, second = build(), build()
    for model in (first, second):
        quantkit.quantize(model[0], "rtn", calibration=[x + len(str(model))], progress=False)
    held = first.state_dict()
    assert held["0.0.weight"].shape == (32, 16, 1)
    with torch.no_grad():
        first[0][0].weight.neg_()
    second.load_state_dict(first.state_dict())
    assert_same(outputs(second, x), outputs(first, x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        build().load_state_dict(held, strict=False)

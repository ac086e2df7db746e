"""quantkit as a quantizer of transformers: from_pretrained, save_pretrained and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from helpers import assert_same
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import quantkit
from quantkit import MethodError, QuantKitConfig, W8A8Linear
from quantkit.core.weights import quantize_weight

pytestmark = pytest.mark.usefixtures("found_once")

TOKENS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def llama(tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def int8(model: torch.nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, W8A8Linear)}


CONFIGS = {
    "rtn": lambda: QuantKitConfig("rtn"),
    "llm_int8": lambda: QuantKitConfig("llm_int8", threshold=2.0),
    "smoothquant": lambda: QuantKitConfig("smoothquant", calibration=[TOKENS]),
}


@pytest.mark.parametrize("device_map", [None, "auto", "cpu"])
@pytest.mark.parametrize("method", CONFIGS)
def test_loaded_saved_and_loaded(method: str, device_map: str | None, folder: Path, tmp_path: Path) -> None:
    wanted = logits(llama())
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIGS[method](), device_map=device_map)
    assert len(int8(model)) == 14  # not the head
    got = logits(model)
    assert 0 < float((got - wanted).norm() / wanted.norm()) < 0.05
    model.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", device_map=device_map)
    assert int8(again) == int8(model)
    assert_same(logits(again), got)
    assert again.generate(TOKENS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 16)


def test_the_codes_are_those_of_quantize(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantKitConfig("rtn"))
    ours = quantkit.quantize(llama(), "rtn", calibration=[TOKENS], progress=False)
    for name in int8(model):
        assert_same(model.get_submodule(name).weight, ours.get_submodule(name).weight)
    assert_same(logits(model), logits(ours))


def test_saved_by_quantize_opens_in_transformers(tmp_path: Path) -> None:
    model = quantkit.quantize(llama(), "smoothquant", calibration=[TOKENS], progress=False)
    model.save_pretrained(tmp_path)
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_linears_of_another_class_are_known_to_their_checkpoint_only(tmp_path: Path) -> None:
    """Falcon's: without weights they cannot be tried, so they are not rounded while a model is loaded, which is said."""
    config = FalconConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, bos_token_id=1, eos_token_id=2
    )
    model = FalconForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "float")
    quantkit.quantize(model, "rtn")
    model.save_pretrained(tmp_path / "int8")
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "int8")), logits(model))
    with pytest.raises(quantkit.ModelError, match="FalconLinear has a forward of its own, and no weight to try it with"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=QuantKitConfig("rtn"))


class Remote(LlamaForCausalLM):
    """A class that is not transformers' own, as remote code and users have them."""


def test_saved_by_load_and_of_another_class(tmp_path: Path) -> None:
    model = quantkit.quantize(llama(), quantkit.LLMInt8(4), calibration=[TOKENS], progress=False)
    quantkit.save(model, tmp_path / "ours")
    quantkit.load(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert_same(logits(again), logits(model))
    assert again.config.quantization_config.threshold == 0.0  # its columns are calibrated
    other = quantkit.quantize(Remote(llama().config).eval(), "rtn", calibration=[TOKENS], progress=False)
    other.save_pretrained(tmp_path / "remote")
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "remote")), logits(other))


def test_in_a_list_llm_int8_means_columns(folder: Path) -> None:
    """Nothing may come before a threshold, so with other methods it would be refused after the model was loaded."""
    config = QuantKitConfig(["smoothquant", "llm_int8"], calibration=[TOKENS])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    layers = [m for m in model.modules() if isinstance(m, W8A8Linear)]
    assert len(layers) == 14
    assert not any(layer.threshold for layer in layers)


@pytest.mark.parametrize("method", CONFIGS)
def test_adapters_of_peft(method: str, folder: Path, tmp_path: Path) -> None:
    """LoRA on frozen INT8 layers: attached, trained, saved, attached again."""

    def base() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIGS[method]())

    wanted = logits(base())
    model = peft.get_peft_model(base(), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert_same(logits(model), wanted)  # an adapter starts at zero
    codes = {name: m.weight.clone() for name, m in model.named_modules() if isinstance(m, W8A8Linear)}
    assert len(codes) == 14
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(learning, 1e-2), []
    for _ in range(8):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learning)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    assert_same({name: model.get_submodule(name).weight for name in codes}, codes)
    model.save_pretrained(tmp_path / "adapter")
    assert_same(logits(peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize("make", [gpt2, lambda: llama(tied=True)], ids=["Conv1D", "tied"])
def test_other_linears(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    wanted = make()
    wanted.save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=QuantKitConfig("rtn"))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(logits(model), logits(wanted), rtol=0.1, atol=0.1)
    model.save_pretrained(tmp_path / "int8")
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "int8")), logits(model))


def test_ignored(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantKitConfig("rtn", ignore=["*.down_proj"]))
    assert len(int8(model)) == 12
    reasons = {layer.name: layer.reason for layer in quantkit.report(model).layers if layer.kind == "float"}
    assert reasons["model.layers.0.mlp.down_proj"] == "ignored"
    assert "head" in reasons["lm_head"]


def test_what_is_not_rounded_while_it_is_read_is_in_the_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Experts are fused then, which was most of the model and said nowhere."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "moe_intermediate_size": 48, "num_experts": 4, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads)).save_pretrained(tmp_path / "float")
    config = QuantKitConfig("rtn")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    total = sum(p.numel() for p in Qwen3MoeForCausalLM(model.config).parameters() if p.dim() > 1)
    record = quantkit.report(model)
    assert sum(r.weights for r in (*record.layers, *record.others)) == total
    experts = [r for r in record.others if "experts" in r.name]
    assert len(experts) == 2
    assert all("only quantkit.quantize() takes apart" in r.reason for r in experts)
    (said,) = [r.getMessage() for r in caplog.records if "stay in floating point" in r.getMessage()]
    assert "model.layers.*.mlp.experts.gate_up_proj" in said
    model.save_pretrained(tmp_path / "int8")
    again = quantkit.report(AutoModelForCausalLM.from_pretrained(tmp_path / "int8"))
    assert {(r.name, r.kind, r.weights) for r in (*again.layers, *again.others)} == {
        (r.name, r.kind, r.weights) for r in (*record.layers, *record.others)
    }


@pytest.mark.parametrize("where", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
@pytest.mark.parametrize("parts", [["down_proj"], ["mlp.down_proj.weight", "*.1.*.down_proj", "layers.0.mlp.down"]])
def test_what_a_model_lists_for_float32(where: str, parts: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, where, parts)
    asked = {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    configs = [QuantKitConfig("rtn"), QuantKitConfig("smoothquant", calibration=[TOKENS])]
    models = [AutoModelForCausalLM.from_pretrained(folder, quantization_config=config) for config in configs]
    models.append(quantkit.quantize(llama(), calibration=[TOKENS], progress=False))
    for model in models:
        float_ = {layer.name: layer.reason for layer in quantkit.report(model).layers if layer.kind == "float"}
        assert float_.pop("lm_head").startswith("output head")
        assert float_ == dict.fromkeys(asked, "the model asks for it in float32")
    forced = quantkit.quantize(llama(), calibration=[TOKENS], targets=["down_proj"], progress=False)
    assert {name for name, module in forced.named_modules() if isinstance(module, W8A8Linear)} == asked


def test_dequantized(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantKitConfig("rtn")).dequantize()
    assert not int8(model)
    linear, source = model.model.layers[0].mlp.up_proj, llama().model.layers[0].mlp.up_proj
    codes, scale = quantize_weight(source.weight.detach())
    assert_same(linear.weight.detach(), codes * scale)


def test_gradients_reach_the_input(folder: Path) -> None:
    """What an adapter on frozen INT8 layers needs."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantKitConfig("rtn"))
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    other = llama()
    same = other.get_input_embeddings()(TOKENS).detach().requires_grad_()
    other(inputs_embeds=same).logits.sum().backward()
    assert float((embedded.grad - same.grad).norm() / same.grad.norm()) < 0.1


class Own(quantkit.PerSite):
    """Somebody's own method, which needs no data."""

    name, stage = "own", quantkit.Stage.SCALE

    def plan_site(self, site: quantkit.SiteView) -> tuple[quantkit.Transform, dict[str, object]]:
        return quantkit.Transform(scale=torch.full((site.site.channels,), 2.0)), {"seen": True}


def test_methods_of_ones_own(folder: Path, tmp_path: Path) -> None:
    """They run, though they need no data, and what they made opens where nobody knows them."""
    config = QuantKitConfig(Own(), calibration=[TOKENS])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert all(layer.notes == {"seen": True} for layer in quantkit.report(model).layers if layer.kind == "int8")
    model.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert again.config.quantization_config.method == ["own"]
    assert_same(logits(again), logits(model))


def test_a_whole_number_as_threshold(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantKitConfig(threshold=2))
    model.save_pretrained(tmp_path / "int8")
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "int8")), logits(model))


def test_data_is_neither_copied_nor_saved(folder: Path) -> None:
    config = QuantKitConfig("smoothquant", calibration=(TOKENS for _ in range(2)))
    assert "calibration" not in str(config.to_dict())
    assert len(int8(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config))) == 14


def test_bitsandbytes_options() -> None:
    config = QuantKitConfig.from_bitsandbytes(
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0, llm_int8_skip_modules=["lm_head"])
    )
    assert (config.method, config.threshold, config.ignore) == (["llm_int8"], 5.0, ["lm_head"])
    config = QuantKitConfig.from_bitsandbytes(BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0))
    assert config.method == ["rtn"]
    with pytest.raises(MethodError, match="4-bit"):
        QuantKitConfig.from_bitsandbytes(BitsAndBytesConfig(load_in_4bit=True))


def test_refused(folder: Path) -> None:
    with pytest.raises(MethodError, match="smothquant"):
        QuantKitConfig("smothquant")
    with pytest.raises(MethodError, match="static"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantKitConfig("rtn", "w8a8-static"))
    with pytest.raises(MethodError, match="symmetric"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantKitConfig("llm_int8", "w8a8-asym"))
    with pytest.raises(quantkit.ModelError, match="no linear is left"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantKitConfig("rtn", ignore=["*"]))
    damaged = llama()
    with torch.no_grad():
        damaged.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    damaged.save_pretrained(folder)
    with pytest.raises(RuntimeError, match="CONVERSION"):  # transformers logs our message and raises its own
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantKitConfig("rtn"))

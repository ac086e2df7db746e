"""Models that carry adapters of PEFT: the linears under them become INT8, and the adapters stay what they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import quantkit
from quantkit import MethodError, W8A8Linear
from quantkit.core.numerics import sqnr_db
from quantkit.core.sites import Kept

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # LNTuning says so of norms
IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
TOKENS = IDS[0, :2].tolist()
AROUND: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
QUERIES: dict[str, Any] = {"target_modules": ["q_proj"]}

ADAPTERS: dict[str, Callable[[bool], Any]] = {
    "LoRA": lambda zero: peft.LoraConfig(r=4, init_lora_weights=zero, **AROUND),
    "DoRA": lambda zero: peft.LoraConfig(r=4, use_dora=True, init_lora_weights=zero, **AROUND),
    "AdaLoRA": lambda zero: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, init_lora_weights=zero, **AROUND),
    "IA3": lambda zero: peft.IA3Config(
        target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=zero
    ),
    "OFT": lambda zero: peft.OFTConfig(oft_block_size=8, init_weights=zero, **AROUND),
    "HRA": lambda zero: peft.HRAConfig(init_weights=zero, **QUERIES),
    "VeRA": lambda zero: peft.VeraConfig(init_weights=zero, **QUERIES),
    "LoHa": lambda zero: peft.LoHaConfig(init_weights=zero, **AROUND),
    "LoKr": lambda zero: peft.LoKrConfig(init_weights=zero, **AROUND),
    "trainable copies": lambda zero: peft.LoraConfig(
        r=4, init_lora_weights=zero, modules_to_save=["k_proj", "input_layernorm", "lm_head"], **AROUND
    ),
    "trainable tokens": lambda zero: peft.LoraConfig(r=4, init_lora_weights=zero, trainable_token_indices=TOKENS, **AROUND),
    "norms": lambda zero: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "prompts": lambda zero: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=32),
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.mul_(torch.rand(p.shape) + 0.5)
    return model


def adapted(kind: str, zero: bool = False) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(llama(), ADAPTERS[kind](zero)).eval()


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def quantized(model: Any, **options: Any) -> Any:
    return quantkit.quantize(model, calibration=[{"input_ids": IDS}], progress=False, **options)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_base_of_an_adapter_is_quantized_and_the_adapter_is_not(kind: str) -> None:
    model = adapted(kind)
    wanted, before = logits(model), {name: p.detach().clone() for name, p in trainable(model).items()}
    quantized(model)
    assert sqnr_db(wanted, logits(model)) > 30
    assert sum(isinstance(m, W8A8Linear) for m in model.modules()) >= 8
    now = trainable(model)
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in before)
    record = quantkit.report(model)
    assert any(said.startswith("adapters stay as they are") for said in record.rewrites)
    parts = {name.removesuffix(".weight") for name in before} & {layer.name for layer in record.layers}
    assert all(layer.reason == Kept.ADAPTER for layer in record.layers if layer.name in parts)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and bool(p.grad.any()) for p in now.values())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_folds_change_nothing_that_an_adapter_reads_or_writes(kind: str) -> None:
    """Most adapters begin as zero. What they learn later has to mean the same on the folded model as on the original one."""
    original = adapted(kind, zero=True)
    folded = quantized(copy.deepcopy(original), scheme=None)
    assert any(layer.folded_into for layer in quantkit.report(folded).layers) or kind == "trainable copies"
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in trainable(original).items():
            p.add_(0.05 * torch.randn_like(p))
            folded.get_parameter(name).copy_(p)
    assert sqnr_db(logits(original), logits(folded)) > 100


def test_targets_do_not_reach_adapters() -> None:
    model = quantized(adapted("LoRA"), targets=["*q_proj*", "lora_A", nn.Linear])
    assert all("lora" not in name for name, m in model.named_modules() if isinstance(m, W8A8Linear))


def test_an_adapter_on_experts_keeps_them_together() -> None:
    config = MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=2,
    )  # fmt: skip
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    model = peft.get_peft_model(MixtralForCausalLM(config).eval(), lora).eval()
    wanted = logits(model)
    quantized(model)
    assert sqnr_db(wanted, logits(model)) > 30


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_a_transposed_linear_learns_that_it_is_not_transposed_any_more(dora: bool) -> None:
    """Its square layers would take the transposed weight without a word: DoRA for its norm, and all others when merged."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=32)).eval()
    lora = peft.LoraConfig(
        r=4, use_dora=dora, init_lora_weights=False, fan_in_fan_out=True, target_modules=["attn.c_proj", "c_fc"]
    )
    model = peft.get_peft_model(base, lora).eval()
    wanted = logits(model)
    quantized(model)
    assert sqnr_db(wanted, logits(model)) > 30
    for tuner in model.modules():
        if isinstance(getattr(tuner, "base_layer", None), W8A8Linear):
            tuner.base_layer = tuner.base_layer.to_float()
    assert sqnr_db(wanted, logits(model.merge_and_unload())) > 30


def test_rotating_what_adapters_read_is_refused() -> None:
    model = adapted("LoRA")
    wanted = logits(model)
    with pytest.raises(MethodError, match=r"merge_and_unload"):
        quantized(model, method=["rotate", "rtn"])
    assert torch.equal(logits(model), wanted)

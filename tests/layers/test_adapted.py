"""Adapters of PEFT on INT8 layers: what they read of the weight is right, and what they would write there is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from helpers import assert_same
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import quantkit
from quantkit import ModelError, W8A8Linear
from quantkit.core.numerics import sqnr_db

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # SHiRA makes sparse tensors
X = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.out = nn.LayerNorm(32), nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.down(nn.functional.silu(self.up(self.norm(x)))))


def block(method: Any = "smoothquant") -> Any:
    """Quantized, with all that can be done to an activation at run time, if the method asks for it."""
    torch.manual_seed(0)
    return quantkit.quantize(Block().eval(), method, calibration=[X], progress=False)


def as_floats(model: nn.Module) -> Any:
    """The same with plain linears in place of INT8 layers."""
    model = copy.deepcopy(model)
    for name in ("up", "down"):
        layer = getattr(model, name)
        setattr(model, name, layer.to_float())
    return model


UP: dict[str, Any] = {"target_modules": ["up", "down"]}
ADAPTERS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(r=4, init_lora_weights=False, **UP),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, **UP),
    "IA3": lambda: peft.IA3Config(feedforward_modules=["down"], init_ia3_weights=False, **UP),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, init_weights=False, **UP),
    "HRA": lambda: peft.HRAConfig(init_weights=False, **UP),
    "VeRA": lambda: peft.VeraConfig(init_weights=False, **UP),
    "LoHa": lambda: peft.LoHaConfig(init_weights=False, **UP),
    "LoKr": lambda: peft.LoKrConfig(init_weights=False, **UP),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=20, init_weights=False, **UP),
    "SHiRA": lambda: peft.ShiraConfig(r=4, **UP),
}


def adapted(base: nn.Module, kind: str) -> Any:
    torch.manual_seed(1)
    model = peft.get_peft_model(base, ADAPTERS[kind]()).eval()
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_on_int8_layers_is_what_it_is_on_floats_and_learns(kind: str) -> None:
    base = block()
    floats, model = adapted(as_floats(base), kind), adapted(base, kind)
    with torch.no_grad():
        assert sqnr_db(floats(X), model(X)) > 35
    codes = {name: m._buffers["weight"].clone() for name, m in model.named_modules() if isinstance(m, W8A8Linear)}
    assert len(codes) == 2
    model.train()
    model(X).square().mean().backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert learning
    assert all(p.grad is not None and p.grad.isfinite().all() and bool(p.grad.any()) for p in learning)
    assert_same({name: model.get_submodule(name)._buffers["weight"] for name in codes}, codes)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_merging_into_codes_is_refused_and_into_floats_works(kind: str, safe: bool) -> None:
    model = adapted(block(), kind)
    with torch.no_grad():
        wanted = model(X)
        with pytest.raises(ModelError, match=r"to_float\(\)"):
            copy.deepcopy(model).merge_and_unload(safe_merge=safe)
        with pytest.raises(ModelError, match=r"to_float\(\)"):
            model.merge_adapter(safe_merge=safe)
        assert torch.equal(model(X), wanted)  # nothing was written
        for _, tuner in list(model.named_modules()):
            if isinstance(getattr(tuner, "base_layer", None), W8A8Linear):
                tuner.base_layer = tuner.base_layer.to_float()
        merged = model.merge_and_unload(safe_merge=safe)
        assert sqnr_db(wanted, merged(X)) > 35


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_begin_with_a_part_of_the_weight_are_refused(init: Any) -> None:
    with pytest.raises(ModelError, match="INT8"):
        peft.get_peft_model(block(), peft.LoraConfig(r=4, init_lora_weights=init, **UP))


def test_training_a_copy_of_an_int8_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="modules_to_save"):
        peft.get_peft_model(block(), peft.LoraConfig(r=4, target_modules=["down"], modules_to_save=["up"]))


@pytest.mark.parametrize("method", ["rtn", [quantkit.SmoothQuant(0.5), quantkit.Hadamard()], quantkit.LLMInt8(2)], ids=str)
def test_the_weight_reads_as_floats_under_an_adapter_only(method: Any) -> None:
    model = block(method)
    codes, wanted = model.up.weight, model.up.to_float().weight
    assert codes.dtype == torch.int8
    around = adapted(model, "LoRA")
    assert isinstance(around.base_model.model.up.base_layer, W8A8Linear)
    for some in (around, copy.deepcopy(around), pickle.loads(pickle.dumps(around))):
        weight = some.base_model.model.up.base_layer.weight
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight.clone(), wanted.detach(), rtol=0, atol=0)
        assert_same(some(X), around(X))
    assert around.unload().up is model.up
    assert type(model.up) is W8A8Linear
    assert model.up.weight is codes


WRITES: dict[str, Callable[[Any], Any]] = {
    "data": lambda layer: setattr(layer.weight, "data", torch.zeros(48, 32)),
    "data in place": lambda layer: layer.weight.data.add_(1.0),
    "in place": lambda layer: layer.weight.mul_(2.0),
    "by an index": lambda layer: layer.weight.data.__setitem__(0, 1.0),
    "through a view": lambda layer: layer.weight.data.reshape(-1)[3:].zero_(),
    "through a transposed view": lambda layer: layer.weight.T.copy_(torch.zeros(32, 48)),
    "as an output": lambda layer: torch.mul(layer.weight, 2.0, out=layer.weight),
    "another tensor": lambda layer: setattr(layer, "weight", torch.zeros(48, 32)),
    "a parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(48, 32))),
}


@pytest.mark.parametrize("how", WRITES)
def test_writing_to_the_weight_under_an_adapter_is_refused(how: str) -> None:
    model = adapted(block(), "LoRA")
    wanted = model(X)
    with pytest.raises(ModelError, match="cannot be written to"):
        WRITES[how](model.base_model.model.up.base_layer)
    assert_same(model(X), wanted)


def test_a_state_dict_still_loads_under_an_adapter() -> None:
    model, other = adapted(block(), "LoRA"), adapted(block("rtn"), "LoRA")
    for assign in (False, True):
        other.load_state_dict(model.state_dict(), assign=assign)
        assert_same(other(X), model(X))


def test_an_adapter_knows_whether_its_base_is_transposed() -> None:
    model = nn.Sequential(nn.LayerNorm(32), Conv1D(32, 32)).eval()
    dora = peft.LoraConfig(r=2, use_dora=True, fan_in_fan_out=True, target_modules=["1"])
    tuner: Any = peft.get_peft_model(model, dora).base_model.model[1]
    transposed = lambda: {m.fan_in_fan_out for m in tuner.modules() if hasattr(m, "fan_in_fan_out")}  # noqa: E731
    float_ = tuner.base_layer
    assert transposed() == {True}
    tuner.base_layer = W8A8Linear(32, 32)
    assert transposed() == {False}
    tuner.base_layer = float_
    assert transposed() == {True}

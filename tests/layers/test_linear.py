"""What code around an INT8 layer may ask of it as of any module: parameters, their dtype and device, and clear errors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from helpers import assert_same, llama, mlp, normal, quantized, tokens
from torch import Tensor, nn

import quantkit
from quantkit import ModelError, W8A8Linear


class Embedder(nn.Module):
    """Asks a part that holds linears alone for the dtype to cast to, as diffusers' embedders of time do."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(16, 32, bias=bias), nn.SiLU(), nn.Linear(32, 16, bias=bias))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        asked = next(iter(self.part.parameters()))
        y: Tensor = self.head(self.norm(self.part(x.to(asked.device, asked.dtype))))
        return y


def reloaded(model: nn.Module, folder: Path, fresh: nn.Module | None = None) -> nn.Module:
    return quantkit.load(quantkit.save(model, folder), model=fresh)


def dispatched(model: nn.Module) -> nn.Module:
    """As a model that is too large for its device: parameters are looked up in the state dict at every call."""
    return accelerate.cpu_offload(model, execution_device="cpu")


WAYS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "quantized": lambda m, _: m,
    "copied": lambda m, _: copy.deepcopy(m),
    "pickled": lambda m, _: pickle.loads(pickle.dumps(m)),
    "saved and loaded": lambda m, folder: reloaded(m, folder, Embedder(False)),
    "loaded on the meta device": lambda m, folder: reloaded(m, folder, Embedder(False).to("meta")),
    "dispatched": lambda m, _: dispatched(m),
    "compiled": lambda m, _: torch.compile(m, backend="eager", fullgraph=True),  # type: ignore[return-value]
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_a_part_without_other_parameters_answers_for_its_dtype(way: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = Embedder(bias=False).to(dtype), normal(9, 16).to(dtype)
    model = quantkit.quantize(model.eval(), calibration=[x], progress=False)
    assert isinstance(model.part[0], W8A8Linear)
    with torch.no_grad():
        wanted = model(x)
        got = WAYS[way](model, tmp_path)
        assert_same(got(x), wanted)
    (first, *_) = (p for name, p in got.named_parameters() if "part" in name)
    assert (first.dtype, first.device.type, first.numel(), first.requires_grad) == (dtype, "cpu", 0, False)


def test_the_placeholder_is_cast_and_in_no_state_dict() -> None:
    model = quantized(mlp())
    names = [name for name, _ in model.named_parameters()]
    assert "up.placeholder" in names
    assert not any("placeholder" in name for name in model.state_dict())
    assert {p.dtype for p in model.to(torch.float16).parameters()} == {torch.float16}
    other = quantized(mlp(outliers=True))
    for assign in (False, True):
        model.load_state_dict(other.state_dict(), strict=True, assign=assign)
    assert next(model.up.parameters()).dtype == torch.float32  # as the bias that was loaded
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert [name for name, _ in torch.load(buffer, weights_only=False).named_parameters()] == names


def test_optimizers_leave_the_placeholder_alone() -> None:
    model = quantized(mlp())
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(normal(3, 16)).sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"norm.weight", "norm.bias"}


COUNTED: list[Callable[[Any, Path], Any]] = [
    lambda m, _: m,
    lambda m, _: copy.deepcopy(m),
    lambda m, _: pickle.loads(pickle.dumps(m)),
    lambda m, folder: reloaded(m, folder),
]


@pytest.mark.parametrize("load", COUNTED)
def test_models_of_transformers_count_what_they_counted(load: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    model = llama(attention_bias=True, torch_dtype=torch.bfloat16).to(torch.bfloat16)
    counted = [part.num_parameters(exclude_embeddings=skip) for part in (model, model.model) for skip in (False, True)]
    model = load(quantized(model, "rtn"), tmp_path / "int8")
    assert [part.num_parameters(exclude_embeddings=skip) for part in (model, model.model) for skip in (False, True)] == counted
    assert model.dtype == next(model.model.layers[0].mlp.parameters()).dtype == torch.bfloat16
    assert model.device == torch.device("cpu")
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model(tokens())


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "w8a16"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("x", [torch.ones(1, 16).long(), torch.ones(3, 16).to(torch.int8), torch.ones(2, 3, 16).bool()])
def test_integers_are_refused(scheme: str, compiled: bool, x: Tensor) -> None:
    layer: Any = W8A8Linear(16, 24, scheme=quantkit.Scheme.parse(scheme))
    call = torch.compile(layer, backend="eager") if compiled else layer
    with pytest.raises(ModelError, match=f"16 to 24 features was called on a tensor of {x.dtype}: cast it"):
        call(x)


def test_models_of_transformers_inside_of_others_count_too() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x).logits
            return y

    wrapper = Wrapper()
    counted = wrapper.inner.num_parameters()
    quantized(wrapper, "rtn", calibration=[tokens()])
    assert wrapper.inner.num_parameters() == counted

"""torch's encoder has a fast path in floating point. Quantized layers take the slow one, and give what the fast one gives."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import int8, normal, quantized
from torch import Tensor, nn

import quantkit

X, MASK = normal(4, 10, 32), torch.arange(10) >= torch.tensor([10, 7, 5, 10])[:, None]


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32)).eval()


def close(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).norm() < 0.01 * wanted.norm())


CALLS: list[dict[str, Any]] = [{}, {"src_key_padding_mask": MASK}, {"mask": nn.Transformer.generate_square_subsequent_mask(10)}]


@pytest.mark.filterwarnings("ignore:.*nested.tensor")
@pytest.mark.parametrize("ignore", [[], ["layers.0"], ["layers.1"], ["linear2"]])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}])
@pytest.mark.parametrize("batch", [X, {"src": X, "src_key_padding_mask": MASK}], ids=["whole", "padded"])
def test_an_encoder_runs_with_and_without_a_padding_mask(batch: Any, options: dict[str, Any], ignore: list[str]) -> None:
    original, model = encoder(**options), encoder(**options)
    quantized(model, calibration=[batch], ignore=ignore)
    assert model.enable_nested_tensor == original.enable_nested_tensor
    for training in (False, True):
        original.train(training), model.train(training)
        for arguments in CALLS:
            for gradients in (False, True):
                with torch.set_grad_enabled(gradients):  # places of padding are zero on the fast path, and what not on the slow
                    assert close(model(X, **arguments), original(X, **arguments)), (training, arguments, gradients)


@pytest.mark.filterwarnings("ignore:.*nested.tensor")
@torch.no_grad()
def test_a_layer_alone_takes_nested_tensors() -> None:
    original, model = encoder(), quantized(encoder(), calibration=[X])
    nested = torch.nested.nested_tensor([X[0], X[1, :7]])
    got, wanted = model.layers[0](nested), original.layers[0](nested)
    assert got.is_nested
    assert close(got.to_padded_tensor(0.0), wanted.to_padded_tensor(0.0))


@torch.no_grad()
def test_copies_of_a_quantized_encoder_are_apart() -> None:
    model = quantized(encoder(), calibration=[X])
    wanted = model(X, src_key_padding_mask=MASK)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X, src_key_padding_mask=MASK), wanted)
        twin.layers[1].linear2.bias.zero_()
        assert not torch.equal(twin(X, src_key_padding_mask=MASK), wanted)
        assert torch.equal(model(X, src_key_padding_mask=MASK), wanted)


def test_attention_that_multiplies_by_itself_is_in_the_report() -> None:
    model = quantized(encoder(), calibration=[X])
    kinds = {layer.name: layer.kind for layer in quantkit.report(model).layers}
    assert {name for name, kind in kinds.items() if kind == "int8"} == int8(model)
    assert all(kinds[f"layers.{i}.self_attn{part}"] == "float" for i in (0, 1) for part in ("", ".out_proj"))


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_attention_of_torch_between_linears(masked: bool) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.head = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 4)
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            h = self.up(self.norm(x))
            return self.head(x + self.attention(h, h, h, key_padding_mask=MASK if masked else None, need_weights=False)[0])

    torch.manual_seed(0)
    model = Attends().eval()
    original = copy.deepcopy(model)
    quantized(model, calibration=[X])
    assert "up" in int8(model)
    assert close(model(X), original(X))

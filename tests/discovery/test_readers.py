"""Code around a linear that reads its weight, which holds integers once the linear is quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import FAMILIES
from nets import WIDTH, Net, X, check_preserved, producers
from torch import Tensor, nn

import quantkit
from quantkit.core.numerics import sqnr_db
from quantkit.core.sites import Kept
from quantkit.discovery import discover


def between(net: Any, x: Tensor, change: Callable[[Tensor], Tensor] = lambda h: h) -> Any:
    return net.out(net.b(change(F.relu(net.a(net.norm(x))))))


def guarded(net: Any, h: Tensor) -> Tensor:
    return h if net.b.weight.dtype == torch.int8 else h.to(net.b.weight.dtype)


READ: dict[str, tuple[Callable[[Any, Tensor], Any], set[str]]] = {
    "input cast to its dtype": (lambda n, x: between(n, x, lambda h: h.to(n.b.weight.dtype)), {"b"}),
    "input cast to another one's dtype": (lambda n, x: between(n, x, lambda h: h.type_as(n.out.weight)), {"out"}),
    "input of the model cast": (lambda n, x: between(n, x.to(n.a.weight.dtype)), {"a"}),
    "multiplied by its norm": (lambda n, x: between(n, x) * n.b.weight.norm(), {"b"}),
    "multiplied by it, transposed": (lambda n, x: (between(n, x), n.a(x) @ n.a.weight), {"a"}),
    "a branch on its values": (lambda n, x: between(n, x + 1 if n.a.weight.any() else x), {"a"}),
    "its bias on the way out": (lambda n, x: between(n, x) + n.out.bias, {"out"}),
    "a penalty over parameters": (lambda n, x: (between(n, x), sum(p.pow(2).sum() for p in n.b.parameters())), {"b"}),
    "a tensor made like it": (lambda n, x: between(n, x) + torch.full_like(n.b.weight[:1, :1], 0.5), {"b"}),
    "its device and shape": (lambda n, x: between(n, x.to(n.a.weight.device)) * n.a.weight.shape[0], set()),
    "its dtype, aware of integers": (lambda n, x: between(n, x, lambda h: guarded(n, h)), set()),
    "the dtype of its bias": (lambda n, x: between(n, x.to(n.a.bias.dtype)), set()),
    "the dtype of the first parameter": (lambda n, x: between(n, x, lambda h: h.to(next(n.b.parameters()).dtype)), set()),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_linears_that_are_read_stay_in_floating_point(name: str) -> None:
    rule, read = READ[name]
    model = Net(rule).eval()
    model(X)
    with torch.no_grad():
        wanted = model(X)
    found = discover(model, X)
    assert {linear for linear, reason in found.kept.items() if reason is Kept.READ} == read
    check_preserved(Net(rule))
    quantkit.quantize(model, calibration=[X], targets=["a", "b", "out"], progress=False)
    said = {layer.name: layer.reason for layer in quantkit.report(model).layers if layer.kind == "float"}
    assert said == dict.fromkeys(read, "other code of the model reads its weight")
    with torch.no_grad():
        for got, want in zip(model(X), wanted, strict=True):
            assert sqnr_db(want, got) > 25


def test_rows_that_others_read_take_no_scale_over() -> None:
    rule = lambda n, x: (between(n, x), F.linear(x, n.a.weight))  # noqa: E731
    assert producers(Net(rule)) == {"b": None}
    check_preserved(Net(rule))


def test_rows_that_are_tied_take_no_scale_over() -> None:
    rule = lambda n, x: n.out(n.b(F.relu(n.a(n.norm(x)))) + n.d(F.relu(n.c(x))))  # noqa: E731
    model = Net(rule, c=nn.Linear(WIDTH, 24), d=nn.Linear(24, WIDTH))
    model.c.weight = model.a.weight
    assert producers(model) == {"b": None, "d": None}
    check_preserved(model)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


@pytest.mark.parametrize("blocks", [[1], [0, 1, 2, 3, 4]])
def test_only_those_blocks_are_kept_whose_linears_are_read(blocks: list[int]) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.ModuleList(Block() for _ in range(5)), nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            for i, block in enumerate(self.blocks):
                x = block(x.to(block.up.weight.dtype) if i in blocks else x)  # type: ignore[union-attr, arg-type]
            return self.head(x)

    kept = discover(Stack(), X).kept
    assert {name for name, reason in kept.items() if reason is Kept.READ} == {f"blocks.{i}.up" for i in blocks}


def test_pixels_cast_to_the_dtype_of_the_first_weight() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 8}
    model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**sizes, num_patches=16)).eval()
    mask, shapes = torch.ones(2, 16, dtype=torch.long), torch.tensor([[4, 4]] * 2)
    batch = {"pixel_values": torch.rand(2, 16, 192) * 2 - 1, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    with torch.no_grad():
        wanted = model(**batch).pooler_output
        quantkit.quantize(model, calibration=[batch], progress=False)
        assert sqnr_db(wanted, model(**batch).pooler_output) > 25
    (layer,) = (r for r in quantkit.report(model).layers if r.kind == "float" and r.name.endswith("patch_embedding"))
    assert layer.reason == Kept.READ


@pytest.mark.parametrize("name", ["t5", "bert", "vit", "gpt2"])
def test_families_that_read_dtypes_and_devices_lose_no_linear(name: str) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    assert Kept.READ not in discover(family.build().eval(), family.batch()).kept.values()


def test_a_weight_that_is_transposed() -> None:
    rule = lambda n, x: n.out(n.conv(x.to(n.conv.weight.dtype)))  # noqa: E731
    model = Net(rule, conv=transformers.pytorch_utils.Conv1D(WIDTH, WIDTH))
    assert discover(model, X).kept["conv"] is Kept.READ


def test_parameters_are_put_back_if_reading_them_fails() -> None:
    model = Net(lambda n, x: between(n, x) + torch.linalg.inv(n.b.weight[:, :WIDTH] + torch.eye(WIDTH)).mean())
    own = {name: (m._parameters, m._buffers, dict(m._parameters)) for name, m in model.named_modules()}
    assert discover(model, X).kept["b"] is Kept.READ
    for name, module in model.named_modules():
        parameters, buffers, values = own[name]
        assert module._parameters is parameters
        assert module._buffers is buffers
        assert all(module._parameters[key] is value for key, value in values.items())

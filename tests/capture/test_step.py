"""Captured steps of modules that no library knows: the same results, for as long as they may be replayed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import VOCAB, assert_same, quantized, tokens
from torch import Tensor, nn

import quantkit
from quantkit import CapturedStep, ModelError

WIDTH, LENGTH, HEADS = 32, 24, 4


class NanoGPT(nn.Module):
    """Its cache is in two buffers that ``step`` writes at a position."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, HEADS, LENGTH, WIDTH // HEADS), persistent=False)

    def attend(self, x: Tensor, mask: Tensor, position: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if position is not None:
            k, v = self.keys.index_copy_(2, position, k), self.values.index_copy_(2, position, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def body(self, x: Tensor, mask: Tensor, position: Tensor | None = None) -> Tensor:
        x = x + self.proj(self.attend(self.first(x), mask, position))
        logits: Tensor = self.head(x + self.down(F.gelu(self.up(self.second(x)))))
        return logits

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        return self.body(self.wte(ids) + self.wpe(places), places[:, None] >= places)

    def step(self, token: Tensor, position: Tensor) -> Tensor:
        mask = (torch.arange(LENGTH) <= position).view(1, 1, 1, -1)
        return self.body(self.wte(token) + self.wpe(position), mask, position)


@pytest.mark.parametrize("method", [None, "rtn", "best"])
def test_a_module_of_ones_own(method: str | None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="quantkit")
    model, ids = NanoGPT().eval(), tokens(1, LENGTH)
    if method:
        quantized(model, method, calibration=[tokens(2, LENGTH)], heads=True)
    with torch.no_grad():
        wanted = model(ids)
    step = CapturedStep(model.step, model)
    for position in range(LENGTH):
        got = step(ids[:, position : position + 1], torch.tensor([position]))
        # a code that falls to the other side of a half moves a logit by a hundredth
        torch.testing.assert_close(got[:, 0], wanted[:, position], rtol=0, atol=1e-5 if method is None else 3e-2)
    assert caplog.text.count("is captured") == 1
    if method:
        assert "through PyTorch" not in caplog.text


def test_a_step_is_captured_for_each_size_and_again_for_other_weights(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="quantkit")
    layer = nn.Linear(4, 3)
    step = CapturedStep(layer, layer, most=2)
    for rows in (1, 2, 1, 3, 2):  # 2 is no longer kept the second time
        for _ in range(3):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(step(x), layer(x))
    assert caplog.text.count("is captured") == 4
    with torch.no_grad():
        layer.weight.mul_(2)  # in place: a replay reads it
    torch.testing.assert_close(step(x), layer(x))
    assert caplog.text.count("is captured") == 4
    layer.weight = nn.Parameter(torch.ones(3, 4))
    for _ in range(2):
        torch.testing.assert_close(step(x), layer(x))
    assert caplog.text.count("is captured") == 5


def test_states_that_are_loaded() -> None:
    """Into the same memory, though what was made of it for the kernels lies elsewhere."""
    torch.manual_seed(0)
    ids = tokens(1, LENGTH)
    model, other = NanoGPT().eval(), NanoGPT().eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    for one in (model, other):
        quantized(one, [quantkit.LLMInt8(columns=0), quantkit.Hadamard(32)], calibration=[ids])
    step, args = CapturedStep(model.step, model), (ids[:, :1], torch.tensor([0]))
    first = step(*args).clone()
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert_same(step(*args), other.step(*args))
    assert not torch.equal(step(*args), first)


class Of(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("state", torch.zeros(3))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def counting(module: Of, x: Tensor) -> Tensor:
    module.get_buffer("state").add_(1)
    return x + module.get_buffer("state")


def scratch(module: Of, x: Tensor) -> Tensor:
    """What begins as a constant, and is written in place."""
    total = torch.zeros(3)
    total += x
    total[1:].mul_(2)
    return total * 1


def several(module: Of, x: Tensor) -> dict[str, Any]:
    top, where = x.sort()
    return {"top": top, "where": [where, x.sum(0)], "rest": (3, None)}


GOOD = {
    "state": counting,
    "constants that are written": scratch,
    "several results": several,
    "views of inputs": lambda _, x: (x, x[1:], x.flip(0)),
    "operators that C has not": lambda _, x: x.cumsum(0).erfinv().nan_to_num().unsqueeze(0) @ torch.eye(3),
    "type": lambda _, x: x.double() / 3,
    "results put elsewhere": lambda m, x: torch.add(x, 1, out=m.get_buffer("state")) * 2,
    "lists written in place": lambda m, x: (torch._foreach_add_([m.get_buffer("state")], [x]), m.get_buffer("state") * 1)[1],
    "means of everything": lambda _, x: x.mean(dim=None, keepdim=True),
    "one query, causal": lambda _, x: torch.nn.functional.scaled_dot_product_attention(
        x.view(1, 1, 1, 3), x.cumsum(0).view(1, 1, 3, 1).expand(1, 1, 3, 3), x.outer(x).view(1, 1, 3, 3), is_causal=True
    ),
    "nothing": lambda _, x: x[:0] + 1,
}


@pytest.mark.parametrize("case", GOOD)
def test_replays(case: str) -> None:
    captured, plain = Of(GOOD[case]), Of(GOOD[case])
    step = CapturedStep(captured, captured)
    for i in range(4):
        x = torch.rand(3, generator=torch.Generator().manual_seed(i))
        assert_same(step(x), plain(x.clone()))


def growing(module: Of, x: Tensor) -> Tensor:
    vars(module)["past"] = torch.cat([vars(module).get("past", x), x])
    total: Tensor = vars(module)["past"].sum(0)
    return total


def made_once(module: Of, x: Tensor) -> Tensor:
    """Memory that is made at first use, as static caches are."""
    if "sums" not in vars(module):
        vars(module)["sums"] = torch.zeros(3)
    total: Tensor = vars(module)["sums"].add_(x) * 1
    return total


BAD = {
    "a branch": (lambda _, x: x if x[0] > 0 else -x, "values of tensors"),
    "a number": (lambda _, x: x * x.sum().item(), "values of tensors"),
    "a size": (lambda _, x: x.nonzero(), "values of tensors"),
    "a list": (lambda _, x: x * x.tolist()[0], "values of tensors"),
    "an array": (lambda _, x: x * float(x.numpy()[0]), "values of tensors"),
    "pieces": (lambda _, x: x.tensor_split(torch.tensor([1]))[0] * 2, "values of tensors"),
    "all of it": (lambda _, x: x * bool((x > 0).all()), "values of tensors"),
    "noise": (lambda _, x: x + torch.rand(3), "random numbers"),
    "a cache that grows": (growing, "keeps a tensor of"),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_replayed(case: str, inference: bool) -> None:
    function, why = BAD[case]
    module = Of(function)
    step = CapturedStep(module, module)

    def twice() -> None:
        for _ in range(2):
            step(torch.ones(3))

    for _ in range(2):  # and it is not captured afterwards
        with torch.inference_mode(inference), pytest.raises(ModelError, match=f"step of Of cannot be captured: .*{why}"):
            twice()


def test_what_is_made_at_first_use() -> None:
    captured, plain = Of(made_once), Of(made_once)
    step = CapturedStep(captured, captured)
    for i in range(5):
        x = torch.full((3,), float(i))
        assert_same(step(x), plain(x))


def test_arguments() -> None:
    layer = nn.Linear(4, 3)
    for args in ((), (3,), (torch.ones(1, 4), 2)):
        with pytest.raises(ModelError, match="takes tensors"):
            CapturedStep(layer, layer)(*args)
    assert quantkit.CapturedStep is CapturedStep


# ---- keys that are copied for each query of a group, as models write it


class Grouped(nn.Module):
    """Attention of four queries over two heads of a cache, which are repeated in front of it.

    Args:
        case: what else is done with the copies.
    """

    keys: Tensor

    def __init__(self, case: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.case, self.linear = case, nn.Linear(WIDTH, WIDTH)
        self.register_buffer("keys", torch.randn(1, 2, LENGTH, 8))

    def repeated(self, x: Tensor) -> Tensor:
        shape = 1, 2, 2, LENGTH, 8
        if self.case == "interleaved":  # other heads than those that a query reads
            return x[:, None].expand(1, 2, 2, LENGTH, 8).reshape(1, 4, LENGTH, 8)
        return x[:, :, None].expand(shape).reshape(1, 4, LENGTH, 8)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        q = self.linear(x).view(1, 1, 4, 8).transpose(1, 2)
        self.keys.index_copy_(2, position, q[:, :2])
        k, v = self.repeated(self.keys), self.repeated(self.keys)
        if self.case == "written later":
            self.keys.mul_(0.5)
        if self.case == "copy is written":
            k.mul_(0.5)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return y + k.sum() if self.case == "read by others" else y


@pytest.mark.parametrize("case", ["plain", "interleaved", "written later", "copy is written", "read by others"])
@torch.no_grad()
def test_repeated_heads_of_a_cache_are_read_where_they_are(case: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="quantkit")
    model, plain = Grouped(case), Grouped(case)
    step = CapturedStep(model, model)
    for position in range(6):
        x = torch.randn(1, 1, WIDTH)
        torch.testing.assert_close(step(x, torch.tensor([position])), plain(x, torch.tensor([position])), rtol=1e-4, atol=1e-5)
    # the layer is PyTorch's; written, read, and copied where that has to be
    copies = {"plain": 0, "read by others": 1}.get(case, 2)
    count = 2 + copies + {"written later": 1, "copy is written": 1, "read by others": 1}.get(case, 0)
    assert f"is captured: {count} operations in C" in caplog.text, caplog.text

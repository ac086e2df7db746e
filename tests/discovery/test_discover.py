"""Discovery against models that try to mislead it. ``Net`` modules are as small as the trap allows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from families import MixtureOfExperts, SquaredReLU, normal
from nets import INNER, WIDTH, Attention, Net, X, check_preserved, producers, sites
from torch import Tensor, nn

import quantkit
from quantkit.discovery import discover
from quantkit.discovery.equivalence import outputs_of, relative_error

# ---- what may be folded, and what may not ------------------------------------------------------------------------------------

RELU = lambda net, x: net.out(net.b(F.relu(net.a(net.norm(x)))))  # noqa: E731
RAW = nn.ParameterList([nn.Parameter(normal(INNER, WIDTH))])

TRAPS: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, str | None]]] = {
    "plain": (RELU, {"a": "norm", "b": "a"}),
    "raw matmul behind a linear": (lambda n, x: n.out(n.b(h := F.relu(n.a(n.norm(x)))) + h @ RAW[0]), {"a": "norm", "b": None}),
    "raw matmul behind a norm": (
        lambda n, x: n.out(n.b(F.relu(n.a(h := n.norm(x)))) + h @ RAW[0][:WIDTH]), {"a": None, "b": "a"}
    ),
    "residual behind a norm": (lambda n, x: n.out((h := n.norm(x)) + n.b(F.relu(n.a(h)))), {"a": None, "b": "a"}),
    "norm among the outputs": (lambda n, x: (n.out(n.b(F.relu(n.a(h := n.norm(x))))), h), {"a": None, "b": "a"}),
    "hidden layer among the outputs": (
        lambda n, x: {"y": n.out(n.b(h := F.relu(n.a(n.norm(x))))), "h": h}, {"a": "norm", "b": None}
    ),
    "one token of it among the outputs": (
        lambda n, x: (n.out(n.b(h := F.relu(n.a(n.norm(x))))), h[:, 0]), {"a": "norm", "b": None}
    ),
    "its mean gates the output": (
        lambda n, x: n.out(n.b(h := F.relu(n.a(n.norm(x))))) * h.mean(-1, True), {"a": "norm", "b": None}
    ),
    "gelu": (lambda n, x: n.out(n.b(F.gelu(n.a(n.norm(x))))), {"a": "norm", "b": None}),
    "gelu as steep as a relu": (lambda n, x: n.out(n.b(F.gelu(50 * n.a(n.norm(x))))), {"a": "norm", "b": None}),
    "silu": (lambda n, x: n.out(n.b(F.silu(n.a(n.norm(x))))), {"a": "norm", "b": None}),
    "relu6": (lambda n, x: n.out(n.b(F.relu6(n.a(n.norm(x))))), {"a": "norm", "b": None}),
    "hardtanh": (lambda n, x: n.out(n.b(F.hardtanh(n.a(n.norm(x))))), {"a": "norm", "b": None}),
    "clipped far out": (lambda n, x: n.out(n.b(n.a(n.norm(x)).clamp(-40, 40))), {"a": "norm", "b": None}),
    "clipped close to zero": (lambda n, x: n.out(n.b(F.hardshrink(n.a(n.norm(x)), 0.02))), {"a": "norm", "b": None}),
    "shifted relu": (lambda n, x: n.out(n.b(F.relu(n.a(n.norm(x)) + 0.01))), {"a": "norm", "b": None}),
    "leaky relu": (lambda n, x: n.out(n.b(F.leaky_relu(n.a(n.norm(x))))), {"a": "norm", "b": "a"}),
    "absolute value": (lambda n, x: n.out(n.b(n.a(n.norm(x)).abs())), {"a": "norm", "b": "a"}),
    "square root": (lambda n, x: n.out(n.b(n.a(n.norm(x)).abs().sqrt())), {"a": "norm", "b": None}),
    "cube": (lambda n, x: n.out(n.b(n.a(n.norm(x)) ** 3)), {"a": "norm", "b": None}),
    "round": (lambda n, x: n.out(n.b(n.a(n.norm(x)).round())), {"a": "norm", "b": None}),
    "softmax": (lambda n, x: n.out(n.b(n.a(n.norm(x)).softmax(-1))), {"a": "norm", "b": None}),
    "normalised": (lambda n, x: n.out(n.b(F.normalize(n.a(n.norm(x)), dim=-1))), {"a": "norm", "b": None}),
    "sum over channels": (lambda n, x: n.out(n.b(n.a(n.norm(x)).cumsum(-1))), {"a": "norm", "b": None}),
    "sum over tokens": (lambda n, x: n.out(n.b(n.a(n.norm(x)).cumsum(1))), {"a": "norm", "b": "a"}),
    "shuffled channels": (lambda n, x: n.out(n.b(F.relu(n.a(n.norm(x))).flip(-1))), {"a": "norm", "b": "a"}),
    "shuffled for one of two readers": (
        lambda n, x: n.out(n.b(h := F.relu(n.a(n.norm(x)))) + n.c(h.flip(-1))), {"a": "norm", "b": None, "c": None}
    ),
    "two readers at different powers": (
        lambda n, x: n.out(n.b(h := F.relu(n.a(n.norm(x)))) + n.c(h * h)), {"a": "norm", "b": None, "c": None}
    ),
    "two readers": (lambda n, x: n.out(n.b(h := n.a(n.norm(x))) + n.c(F.relu(h))), {"a": "norm", "b": "a", "c": "a"}),
    "one tensor read twice": (lambda n, x: n.out(n.b(h := F.relu(n.a(n.norm(x)))) + n.c(h)), {"a": "norm", "b": "a", "c": "a"}),
    "a linear applied twice": (
        lambda n, x: n.out(n.b(F.relu(n.a(n.norm(x)))) + n.b(F.relu(n.a(n.norm(2 * x + 1))))), {"a": "norm", "b": "a"}
    ),
    "a reader that also reads something else": (
        lambda n, x: n.out(n.b(F.relu(n.a(n.norm(x)))) + n.b(torch.ones(INNER))), {"a": "norm", "b": None}
    ),
    "a slice of it is read": (lambda n, x: n.out(n.c(F.relu(n.b(n.a(x)))[..., 3:])), {"c": "b"}),
    "keyword input": (lambda n, x: n.out(n.b(input=F.relu(n.a(input=n.norm(x))))), {"a": "norm", "b": "a"}),
    "in-place relu": (lambda n, x: n.out(n.b(n.a(n.norm(x)).relu_())), {"a": "norm", "b": "a"}),
    "in-place add to a norm": (lambda n, x: n.out(n.b(F.relu(n.a(n.norm(x).add_(1.0))))), {"a": None, "b": "a"}),
    "weight read directly": (lambda n, x: n.out(F.linear(F.relu(n.a(n.norm(x))), n.b.weight, n.b.bias)), {"a": "norm"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str) -> None:
    rule, wanted = TRAPS[name]
    width = WIDTH - 3 if "slice" in name else INNER
    model = Net(rule, **({"c": nn.Linear(width, WIDTH)} if "c" in wanted else {}))
    found = producers(model)
    assert {linear: found[linear] for linear in wanted} == wanted
    if name != "weight read directly":
        check_preserved(model)


def test_concatenated_norms_do_not_fold() -> None:
    norms = nn.ModuleList(nn.LayerNorm(WIDTH // 2) for _ in range(2))
    rule = lambda n, x: n.b(F.relu(n.a(torch.cat([m(h) for m, h in zip(n.norms, x.chunk(2, -1), strict=True)], -1))))  # noqa: E731
    model = Net(rule, norms=norms)
    assert producers(model)["a"] is None
    check_preserved(model)


def test_norm_shared_by_two_places() -> None:
    both = lambda n, x: n.out(n.b(F.relu(n.a(n.norm(x)))) + n.c(n.norm(2 * x + 1)))  # noqa: E731
    model = Net(both, c=nn.Linear(WIDTH, WIDTH))
    site = sites(model)["a"]
    assert site.linears == ("a", "c") == site.taps
    assert site.producer is not None
    check_preserved(model)
    leak = lambda n, x: n.out(n.b(F.relu(n.a(n.norm(x)))) + n.norm(2 * x + 1))  # noqa: E731
    assert producers(Net(leak))["a"] is None


@pytest.mark.parametrize("nested", [False, True])
def test_expert_that_never_runs(nested: bool) -> None:
    moe = MixtureOfExperts(WIDTH, INNER, used=3)
    model = nn.Sequential(moe, nn.Linear(WIDTH, 4)) if nested else moe
    prefix = "0." if nested else ""
    found = discover(model, X)
    assert found.kept[f"{prefix}experts.3.up"].startswith("it never ran")
    assert found.kept[f"{prefix}chooser"] == "router"
    by_name = {linear: site for site in found.sites for linear in site.linears}
    assert by_name[f"{prefix}experts.0.up"].producer is None
    assert by_name[f"{prefix}experts.0.up"].reason == f"{prefix}experts.3.up never ran in the probe and may read it too"
    assert by_name[f"{prefix}experts.0.down"].producer is not None
    check_preserved(model)


def test_squared_relu_scales_by_the_square() -> None:
    model = Net(lambda n, x: n.out(n.b(n.act(n.a(n.norm(x))))), act=SquaredReLU())
    producer = sites(model)["b"].producer
    assert producer is not None
    assert (producer.module, producer.power) == ("a", 2)
    check_preserved(model)


def test_places_with_numbers_in_their_names_do_not_hide_each_other() -> None:
    """norm1 feeds parameters, norm2 feeds a linear: only the second folds, in every block."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2, self.mix = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.Parameter(normal(WIDTH, WIDTH))
            self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.norm1(x) @ self.mix
            return x + self.mlp(self.norm2(x) @ self.mix)

    model = nn.Sequential(*(Block() for _ in range(3)))
    assert producers(model) == {f"{i}.mlp.{j}": f"{i}.mlp.{j - 1 - (j == 3)}" for i in range(3) for j in (1, 3)}
    check_preserved(model)


# ---- norms -----------------------------------------------------------------------------------------------------------------


class RMS(nn.Module):
    """A norm with the parameters and the rule of the test's choice."""

    def __init__(self, rule: Callable[[Any, Tensor], Tensor], **parameters: Tensor) -> None:
        super().__init__()
        self.rule = rule
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self, F.rms_norm(x, x.shape[-1:]))


GAIN, SHIFT = 1 + 0.2 * normal(WIDTH), normal(2, WIDTH)[1]
NORMS: dict[str, tuple[nn.Module, dict[str, str] | None]] = {
    "weight": (RMS(lambda m, x: x * m.weight, weight=GAIN), {"weight": "scale"}),
    "one plus weight": (RMS(lambda m, x: x * (1 + m.weight), weight=GAIN - 1), {"weight": "offset"}),
    "gain and offset": (RMS(lambda m, x: x * m.gain + m.offset, gain=GAIN, offset=SHIFT), {"gain": "scale", "offset": "scale"}),
    "offset before gain": (
        RMS(lambda m, x: x * m.gain + m.offset, offset=SHIFT, gain=GAIN), {"offset": "scale", "gain": "scale"}
    ),
    "one plus weight and bias": (
        RMS(lambda m, x: x * (1 + m.weight) + m.bias, weight=GAIN - 1, bias=SHIFT), {"weight": "offset", "bias": "scale"}
    ),
    "a scalar as well": (RMS(lambda m, x: x * m.weight * m.all, weight=GAIN, all=torch.tensor([0.7])), {"weight": "scale"}),
    "no parameters": (RMS(lambda m, x: x), None),
    "bias alone": (RMS(lambda m, x: x + m.bias, bias=SHIFT), None),
    "exponential gain": (RMS(lambda m, x: x * m.log_gain.exp(), log_gain=SHIFT), None),
    "squashed": (RMS(lambda m, x: torch.tanh(x * m.weight), weight=GAIN), None),
    "layer norm": (nn.LayerNorm(WIDTH), {"weight": "scale", "bias": "scale"}),
    "layer norm without parameters": (nn.LayerNorm(WIDTH, elementwise_affine=False), None),
    "torch's rms norm": (nn.RMSNorm(WIDTH), {"weight": "scale"}),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str) -> None:
    norm, wanted = NORMS[name]
    model = Net(RELU, norm=copy.deepcopy(norm))
    producer = sites(model)["a"].producer
    assert (producer and producer.parameters) == wanted
    check_preserved(model)


# ---- what is kept in floating point ------------------------------------------------------------------------------------------


def test_tied_weights_stay_and_block_the_fold() -> None:
    model = Net(
        lambda n, x: n.out(n.b(F.relu(n.a(n.norm(x)))) + n.c(x[..., :1].expand(-1, -1, INNER))), c=nn.Linear(INNER, WIDTH)
    )
    model.c.weight = model.b.weight
    found = discover(model, X)
    assert found.kept["b"] == found.kept["c"] == "its weight is tied to another module"
    check_preserved(model)


def test_gate_of_an_activation_is_no_router_but_a_narrow_gate_is() -> None:
    experts = MixtureOfExperts(WIDTH, INNER)
    found = discover(nn.Sequential(experts, nn.Linear(WIDTH, 4)), X)
    assert {name for name, reason in found.kept.items() if reason == "router"} == {"0.chooser"}
    soft = Net(lambda n, x: n.out(n.b(F.relu(n.a(h := n.norm(x)))) * n.gate(h).softmax(-1)[..., :1]), gate=nn.Linear(WIDTH, 4))
    assert discover(soft, X).kept["gate"] == "router"


# ---- manners ---------------------------------------------------------------------------------------------------------------


def state(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield module.training, module.__dict__.get("forward"), len(module._forward_hooks), len(module._forward_pre_hooks)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    def rule(n: Any, x: Tensor) -> Tensor:
        h = F.relu(n.a(n.norm(x)))
        if fails:
            raise KeyError("a forward that fails half way")
        return n.out(n.b(F.dropout(h, 0.5, n.training)))

    model = Net(rule).train()
    model.b.eval()  # a frozen layer within a model in training
    model.a.forward = lambda x, own=model.a.forward: own(x)  # as accelerate does
    model.norm.register_forward_hook(lambda *_: None)
    before, weights = list(state(model)), copy.deepcopy(model.state_dict())
    if fails:
        with pytest.raises(KeyError):
            discover(model, X)
    else:
        discover(model, X)
    assert list(state(model)) == before
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_noise_does_not_crash_and_never_folds_wrongly() -> None:
    noisy = Net(lambda n, x: n.out(n.b(F.relu(n.a(n.norm(x + 0.01 * torch.randn_like(x)))))))
    assert {"a", "b"} <= producers(noisy).keys()
    leaky = Net(lambda n, x: n.out((h := n.norm(x + 0.01 * torch.randn_like(x))) + n.b(F.dropout(F.relu(n.a(h)), 0.2))))
    assert producers(leaky)["a"] is None
    quantkit.quantize(noisy, quantkit.SmoothQuant(alpha=0.5), calibration=[X], progress=False)
    assert noisy(X).isfinite().all()


@dataclass
class Answer:
    logits: Tensor


class Opaque:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Pair(NamedTuple):
    x: Tensor
    mask: Tensor


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: [y], lambda y: (None, {"y": y}), Answer, lambda y: Pair(y, y > 0)])
def test_leaks_are_seen_in_every_kind_of_output(wrap: Callable[[Tensor], Any]) -> None:
    rule = lambda n, x: wrap((h := n.norm(x)) + n.b(F.relu(n.a(h))))  # noqa: E731
    assert producers(Net(rule)) == {"a": None, "b": "a"}


def test_outputs_that_cannot_be_looked_into_allow_no_fold() -> None:
    assert set(producers(Net(lambda n, x: Opaque(RELU(n, x)))).values()) == {None}


def test_masked_logits_do_not_hide_anything() -> None:
    masked = lambda y: torch.where(torch.arange(y.shape[-1]) < 3, float("-inf"), y)  # noqa: E731
    model = Net(lambda n, x: masked(RELU(n, x)))
    assert producers(model) == {"a": "norm", "b": "a"}
    check_preserved(model)
    leaky = Net(lambda n, x: masked((h := n.norm(x)) + n.b(F.relu(n.a(h)))))
    assert producers(leaky) == {"a": None, "b": "a"}


def test_outputs_that_never_repeat_allow_no_fold() -> None:
    nan_somewhere = lambda y: torch.where(torch.rand(y.shape) < 0.5, float("nan"), y)  # noqa: E731
    other_size = lambda y: y[:, : int(torch.randint(1, 9, ()))]  # noqa: E731
    for spoil in (nan_somewhere, other_size):
        torch.manual_seed(0)
        assert set(producers(Net(lambda n, x, spoil=spoil: spoil(RELU(n, x)))).values()) == {None}


def test_batches_of_every_kind() -> None:
    model = Net(lambda n, x: RELU(n, x))
    for batch in (X, (X,), [X], {"x": X}):
        assert producers(model, batch) == {"a": "norm", "b": "a"}

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.net(x) * mask

    masked = Masked()
    quantkit.quantize(masked, "rtn", calibration=[Pair(X, torch.ones(2, 10, 1))], progress=False)
    assert isinstance(masked.net.a, quantkit.W8A8Linear)


def test_discovery_repeats_itself() -> None:
    a, b = (discover(Attention(4, 2, fused="grouped"), X) for _ in range(2))
    assert [site.name for site in a.sites] == [site.name for site in b.sites]
    for one, two in zip(a.sites, b.sites, strict=True):
        assert one.producer is not None
        assert two.producer is not None
        assert torch.equal(one.producer.rows, two.producer.rows)


def test_half_precision_finds_the_same() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = Attention(4, 2, fused="grouped", gated=True).to(dtype)
        assert producers(model, X.to(dtype)) == {"qkv": "norm", "gate": "norm", "o": "qkv"}


@pytest.mark.parametrize("scheme", [None, "w8a8", "w8a8-static-asym"])
def test_readers_of_unequal_width_share_no_site(scheme: str | None) -> None:
    """One linear reads a tensor whole and another head by head, by one address and many numbers of channels."""

    def whole_and_heads(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        heads = m.by_head(y.view(*y.shape[:-1], 2, WIDTH // 2)).flatten(-2)
        return m.out(m.b((m.a(y) + heads).relu()).tanh())

    def build() -> Net:
        return Net(whole_and_heads, by_head=nn.Linear(WIDTH // 2, INNER // 2))

    found = sites(build())
    assert found["a"] is not found["by_head"]
    assert found["a"].producer is found["by_head"].producer is None
    assert (found["a"].channels, found["by_head"].channels) == (WIDTH, WIDTH // 2)
    check_preserved(build())
    for method in ("smoothquant", "best", quantkit.RPTQ(4)):
        if not (scheme is None and method == "best"):
            model = quantkit.quantize(build(), method, scheme=scheme, calibration=[X], progress=False)
            assert quantkit.report(model).verification is not None


class TwoWays(nn.Module):
    """Tokens above a limit take a norm of their own, in front of the same linears."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.rare_norm = nn.Embedding(32, 16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        rare = ids >= 24
        y = torch.empty_like(x)
        y[~rare], y[rare] = self.norm(x[~rare]), self.rare_norm(x[rare])
        return x + self.down(self.up(y).relu())


def test_a_norm_beside_one_that_no_token_took_is_not_folded_into() -> None:
    """What was proven for the tokens of the data would be wrong for others."""
    torch.manual_seed(0)
    model, ids = TwoWays(), torch.arange(24)[None]
    site = discover(model, ids).sites[0]
    assert site.producer is None
    assert "rare_norm never ran" in site.reason
    both = torch.arange(32)[None]
    wanted = outputs_of(model, both)
    quantkit.quantize(model, scheme=None, calibration=[ids], progress=False)
    assert relative_error(wanted, outputs_of(model, both)) < 1e-5


class Lengths(nn.Module):
    """Two linears say how much there is to do, and made-up values say that it is too much."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second, self.out = nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 4)
        for linear in (self.first, self.second):
            nn.init.normal_(linear.weight, std=1e-4)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        first, second = ((linear(y) * 1e3).exp() for linear in (self.first, self.second))
        if not max(first.max(), second.max()) < 1e30:
            raise RuntimeError("no memory for so many")
        return self.out(y) * first + second


def test_a_model_that_runs_with_no_made_up_values_is_quantized_without_folds(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = Lengths(), normal(32, 8)
    wanted = outputs_of(model, x)
    quantkit.quantize(model, calibration=[x], progress=False)
    assert "nothing is folded" in caplog.text
    assert all(layer.kind == "int8" for layer in quantkit.report(model).layers)
    assert len(quantkit.report(model).layers) == 3
    assert relative_error(wanted, outputs_of(model, x)) < 0.05


def test_a_tie_is_kept_where_nothing_else_is_known() -> None:
    model = Lengths()
    model.twin = nn.Linear(8, 4)
    model.twin.weight = model.first.weight
    quantkit.quantize(model, calibration=[normal(32, 8)], progress=False)
    kinds = {layer.name: layer.kind for layer in quantkit.report(model).layers}
    assert kinds["first"] == "float"
    assert kinds["second"] == kinds["out"] == "int8"


class Sounds(nn.Module):
    """Runs long if its linear ``length`` puts out a number above 8, as made-up values are once they are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.length, self.up, self.down = nn.Linear(8, 1), nn.Linear(8, 8), nn.Linear(8, 8)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        for _ in range(3_000_000 if self.length(x).abs().max() > 8 else 1):
            y = self.act(y)
        out: Tensor = self.down(y)
        return out


def test_later_passes_end_too(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("quantkit.discovery.probe.LONGEST", 1.0)
    model, x = Sounds(), normal(4, 8)
    quantkit.quantize(model, calibration=[x], progress=False)
    assert "nothing is folded" in caplog.text
    assert "EndlessError: a pass was not over after 1 s" in caplog.text
    assert {layer.name for layer in quantkit.report(model).layers if layer.kind == "int8"} >= {"up"}

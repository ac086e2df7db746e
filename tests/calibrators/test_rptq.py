"""RPTQ: what a cluster is, which orders fold and which do not, and that nothing but the rounding changes."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import assert_same, example, gpt2, llama, mlp, normal, outputs, tokens
from hypothesis import assume, given
from hypothesis import strategies as st
from randomised import build
from torch import Tensor, nn

import quantkit
from quantkit import (
    RPTQ,
    Carriers,
    CheckpointError,
    Codes,
    Hadamard,
    LLMInt8,
    MethodError,
    PerSite,
    Plan,
    Range,
    Stage,
    Transform,
    W8A8Linear,
)
from quantkit.calibrators.rptq import by_kmeans, by_tiles
from quantkit.checkpoint.record import digest_of
from quantkit.core.groups import shares, with_multipliers
from quantkit.core.numerics import MAX_EXACT_K, MAX_EXACT_K_ASYMMETRIC
from quantkit.core.weights import quantize_weight, steps_of
from quantkit.discovery.equivalence import outputs_of, relative_error
from quantkit.ops import reference
from quantkit.ops.table import use_backend

pytestmark = pytest.mark.usefixtures("found_once")

SCHEMES = ["w8a8", "w8a8-asym", "w8a8-static", "w8a8-static-asym"]


class GELU(nn.Module):
    """fc1 and fc2 with a curve between them: no factor passes, an order does."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(48, 16)
        self.act = act or nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.fc2(self.act(self.fc1(self.norm(x))))
        return y


class Watched(GELU):
    """Something besides fc2 reads the channels behind fc1 by their place."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act(self.fc1(self.norm(x)))
        y: Tensor = x + self.fc2(inner) + inner[..., :16]
        return y


class Fused(GELU):
    """Gate and up are halves of fc1."""

    def __init__(self) -> None:
        super().__init__()
        self.fc2 = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fc1(self.norm(x)).chunk(2, dim=-1)
        y: Tensor = x + self.fc2(self.act(gate) * up)
        return y


class Interleaved(Fused):
    """Gate and up are every other row of fc1."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.fc1(self.norm(x))
        y: Tensor = x + self.fc2(self.act(inner[..., ::2]) * inner[..., 1::2])
        return y


def loud(model: Any) -> Any:
    """Rows of every linear of very different sizes, and a norm that is no identity."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__:
                module.weight.copy_(torch.rand_like(module.weight) * 3 + 0.2)
            elif isinstance(module, nn.Linear) and module.out_features != 64:
                module.weight.mul_(torch.logspace(-1, 0.6, module.out_features)[torch.randperm(module.out_features), None])
    return model.eval()


class Shuffle(PerSite):
    """Any permutation at all, within what the site's carriers allow; groups of one."""

    name, stage, statistics = "shuffle", Stage.PARTITION, (Range,)
    groups = False

    def plan_site(self, site: Any) -> Any:
        k, carriers = site.site.channels, site.site.carriers
        span = carriers.span if carriers else k
        keys = torch.rand(span, generator=torch.Generator().manual_seed(5)).repeat(k // span).view(-1, span)
        order = (keys.argsort(1) + torch.arange(0, k, span)[:, None]).flatten()
        return Transform(permutation=order, groups=(k // 2, k - k // 2) if self.groups else None), {}


def quantized(model: Any, method: Any, batch: Any = None, scheme: str = "w8a8", **options: Any) -> Any:
    batch = example(model) if batch is None else batch
    return quantkit.quantize(copy.deepcopy(model), method, calibration=[batch], scheme=scheme, progress=False, **options)


def layers(model: Any) -> dict[str, Any]:
    return {layer.name: layer for layer in quantkit.report(model).layers}


X = normal(2, 5, 16)


# ---- which orders fold


def carried(model: nn.Module, batch: Tensor) -> dict[str, tuple[int, list[str]]]:
    found = quantkit.discover(model, batch, carriers=True)
    assert all(site.carriers is None for site in quantkit.discover(model, batch).sites)
    return {s.name: (s.carriers.span, [name for name, _ in s.carriers.rows]) for s in found.sites if s.carriers}


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.ReLU(), nn.Tanh()], ids=lambda a: type(a).__name__)
def test_an_order_passes_any_elementwise_curve(act: nn.Module) -> None:
    assert carried(loud(GELU(act)), X) == {"fc2": (48, ["fc1"])}


def test_a_gate_and_what_it_multiplies_go_together() -> None:
    assert carried(loud(Fused()), X) == {"fc2": (24, ["fc1", "fc1"])}
    model = loud(Interleaved())
    assert carried(model, X) == {"fc2": (24, ["fc1", "fc1"])}
    rows = quantkit.discover(model, X, carriers=True).sites[1].carriers.rows
    assert {tuple(r[:3].tolist()) for _, r in rows} == {(0, 2, 4), (1, 3, 5)}


def test_what_is_read_by_place_is_left_alone() -> None:
    assert carried(loud(Watched()), X) == {}
    model = loud(Watched())
    ours = quantized(model, RPTQ(4, tile=4), X)
    assert layers(ours)["fc2"].at_run_time == ["permutation"]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_carries_an_order_within_each_head(heads: int) -> None:
    found = carried(loud(llama(num_key_value_heads=heads)), tokens())
    for i in range(2):
        assert found[f"model.layers.{i}.self_attn.o_proj"] == (8, [f"model.layers.{i}.self_attn.v_proj"])
        mlp_names = [f"model.layers.{i}.mlp.{part}_proj" for part in ("gate", "up")]
        assert found[f"model.layers.{i}.mlp.down_proj"] == (48, mlp_names)
    assert len(found) == 4


def test_conv1d_and_fused_attention() -> None:
    found = carried(loud(gpt2()), tokens())
    assert found == {
        "transformer.h.0.attn.c_proj": (8, ["transformer.h.0.attn.c_attn"]),
        "transformer.h.0.mlp.c_proj": (128, ["transformer.h.0.mlp.c_fc"]),
    }


def test_orders_that_carriers_cannot_bring_about() -> None:
    rows = torch.tensor([0, 1, 0, 1])  # two heads of two channels that share their rows
    carriers = Carriers((("v", rows),), 2)
    assert carriers.sources(torch.tensor([1, 0, 3, 2]))["v"].tolist() == [1, 0]
    assert carriers.sources(torch.tensor([1, 0, 2, 3])) is None  # the heads disagree
    assert carriers.sources(torch.tensor([2, 3, 0, 1])) is None  # channels leave their head
    shifted = Carriers((("w", torch.tensor([4, 5])),), 2)  # part of a fused weight
    assert shifted.sources(torch.tensor([1, 0]))["w"].tolist() == [0, 1, 2, 3, 5, 4]


MODELS = {
    "llama": (llama, tokens), "mqa": (lambda: llama(num_key_value_heads=1), tokens), "gpt2": (gpt2, tokens),
    "gelu": (GELU, lambda: X), "fused": (Fused, lambda: X), "interleaved": (Interleaved, lambda: X), "mlp": (mlp, lambda: X),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_folding_preserves_the_function(name: str) -> None:
    """Float layers included: whatever is not quantized has to follow the order as well."""
    build, batch = MODELS[name]
    model, x = loud(build()), batch()
    for ignore in ([], ["*o_proj", "*gate_proj", "*c_attn", "fc1"]):
        some = [p for p in ignore if any(n.endswith(p.strip("*")) for n, _ in model.named_modules())]
        ours = quantized(model, Shuffle(), x, ignore=some)
        assert quantkit.report(ours).equivalence <= 1e-5
        assert relative_error(outputs(model, x), outputs(ours, x)) < 0.05  # a wrong order costs more than rounding
        exact = copy.deepcopy(ours)
        for path, module in list(exact.named_modules()):
            if isinstance(module, W8A8Linear):
                exact.set_submodule(path, module.to_float())
        floats = copy.deepcopy(model)
        for path, module in list(quantized(model, "rtn", x, ignore=some).named_modules()):
            if isinstance(module, W8A8Linear):
                floats.set_submodule(path, module.to_float())
        assert relative_error(outputs(floats, x), outputs(exact, x)) <= 1e-5  # INT8 weights, activations as they are


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static-asym"])
def test_a_permuted_model_gives_the_same_logits(name: str, scheme: str) -> None:
    """One cluster: the order changes nothing that is rounded, only where it stands."""
    build, batch = MODELS[name]
    model, x = loud(build()), batch()
    plain, ours = quantized(model, "rtn", x, scheme), quantized(model, Shuffle(), x, scheme)
    assert relative_error(outputs(plain, x), outputs(ours, x)) <= 1e-5
    assert any("order" in layer.notes for layer in quantkit.report(ours).layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the probe believes about orders holds for the real model, and INT8 is as close as without them."""
    model, batch = build(name), FAMILIES[name].batch()
    wanted = outputs_of(model, batch)
    errors = []
    for method in (Shuffle(), quantkit.RTN()):  # what is found for the first one holds for both
        ours = quantkit.quantize(copy.deepcopy(model), method, calibration=[batch], progress=False)
        errors.append(relative_error(wanted, outputs_of(ours, batch)))
    assert "cannot be folded" not in caplog.text
    assert errors[0] <= 1.5 * errors[1] + 1e-3


def test_norm_producers_gather_at_run_time() -> None:
    ours = quantized(loud(llama()), RPTQ(4, tile=8))
    facts = layers(ours)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        layer = ours.get_submodule(f"model.layers.0.{name}")
        assert layer.permutation is not None
        assert len(layer.groups) > 1
        assert facts[f"model.layers.0.{name}"].at_run_time == ["permutation"]
    down = facts["model.layers.0.mlp.down_proj"]
    assert down.at_run_time == []
    assert down.notes["order"] == "of the rows of model.layers.0.mlp.gate_proj and model.layers.0.mlp.up_proj"
    assert ours.model.layers[0].mlp.down_proj.permutation is None


def test_clusters_in_heads() -> None:
    """Two for each of four heads: then the order folds, the same for all heads of a key."""
    ours = quantized(loud(llama()), RPTQ(8, tile=2))
    o = ours.model.layers[0].self_attn.o_proj
    assert o.permutation is None
    assert len(o.groups) == 8
    assert o.groups[:2] == o.groups[2:4]
    assert layers(ours)["model.layers.0.self_attn.o_proj"].notes["order"] == "of the rows of model.layers.0.self_attn.v_proj"
    few = quantized(loud(llama()), RPTQ(4, tile=2)).model.layers[0].self_attn.o_proj
    assert few.permutation is not None
    assert len(few.groups) <= 4


def test_an_order_that_fails_on_the_real_model_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe is made to believe what is wrong; the proof on the real values does not."""
    honest = Carriers.sources
    monkeypatch.setattr(Carriers, "sources", lambda self, p: {n: s.flip(0) for n, s in (honest(self, p) or {}).items()} or None)
    model = loud(GELU())
    found = quantkit.discover(model, X, carriers=True)
    assert all(site.carriers is None for site in found.sites)
    monkeypatch.undo()
    monkeypatch.setattr("quantkit.pipeline.fold.Reorder.inverse", property(lambda self: torch.arange(len(self.permutation))))
    ours = quantized(model, RPTQ(4, tile=4), X)
    assert layers(ours)["fc2"].at_run_time == ["permutation"]
    assert relative_error(outputs(model, X), outputs(ours, X)) < 0.05


# ---- plans


@st.composite
def ranges(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    k = draw(st.integers(1, 70))
    values = st.sampled_from([0.0, 0.0, 1e-30, 0.1, 0.5, 1.0, 3.0, 900.0])
    low = -torch.tensor(draw(st.lists(values, min_size=k, max_size=k)))
    return low, torch.tensor(draw(st.lists(values, min_size=k, max_size=k)))


@given(ends=ranges(), count=st.integers(1, 12), tile=st.sampled_from([1, 4, 16, 64]))
def test_plans_hold_to_their_promises(ends: tuple[Tensor, Tensor], count: int, tile: int) -> None:
    low, high = ends
    k, live = len(low), high > low
    distinct = len(torch.stack([low, high], 1)[live].unique(dim=0))
    count = min(count, distinct)
    if count < 2:
        return
    for order, sizes in (
        by_kmeans(low, high, count, torch.Generator().manual_seed(0)),
        by_tiles(low, high, torch.rand(k), count, tile),
    ):
        assert sorted(order.tolist()) == list(range(k))
        assert sum(sizes) == k
        assert all(size > 0 for size in sizes)
        assert len(sizes) <= count
        for part in live[order].split(sizes):
            assert part.any()  # no cluster of dead channels only
    real = min(tile, max(1, 2 ** ((k // (2 * count)).bit_length() - 1)))
    assert all(size % real == 0 for size in sizes[1:-1])
    inverse = order.argsort()
    assert torch.equal(order[inverse], torch.arange(k))


@given(ends=ranges(), count=st.integers(2, 5))
def test_tiles_of_one_channel_are_cut_as_well_as_can_be(ends: tuple[Tensor, Tensor], count: int) -> None:
    """Against every way to cut the sorted channels."""
    live = ends[1] > ends[0]
    low, high = (end[live][:9].double() for end in ends)
    k = len(low)
    if k < 2:
        return
    weight = torch.rand(k, dtype=torch.float64)
    order, sizes = by_tiles(low, high, weight, min(count, k), 1)
    low, high, weight = low[order], high[order], weight[order]

    def noise(parts: list[int]) -> float:
        return sum(
            float(w.sum() * (b.max().clamp_min(0) - a.min().clamp_max(0)) ** 2)
            for a, b, w in zip(low.split(parts), high.split(parts), weight.split(parts), strict=True)
        )

    best = min(
        noise([b - a for a, b in itertools.pairwise((0, *cuts, k))])
        for n in range(min(count, k))
        for cuts in itertools.combinations(range(1, k), n)
    )
    assert noise(sizes) <= best * (1 + 1e-9) + 1e-300


def test_equal_channels_are_one_cluster() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 8))
    for by in ("tiles", "kmeans"):
        ours = quantized(model, RPTQ(4, by=by), torch.ones(4, 32))
        assert ours[0].groups == ()
        assert layers(ours)["0"].notes == {"clusters": 1}
    x = torch.ones(4, 32)
    x[:, 5] = 7
    assert sorted(quantized(model, RPTQ(4, by="kmeans"), x)[0].groups) == [1, 31]  # two distinct channels


@pytest.mark.parametrize("by", ["tiles", "kmeans"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dead_channels_get_a_scale_of_the_living(by: str, scheme: str) -> None:
    model, x = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(40, 64)
    x[:, 10:60] = 0
    ours = quantized(model, RPTQ(4, by=by, tile=8), x, scheme)
    y = x.clone()
    y[:, 30] = 0.5  # never seen in calibration
    with torch.no_grad():
        assert relative_error([model[0](y)], [ours[0](y)]) < 0.03


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("by", ["tiles", "kmeans"])
def test_tiny_widths(width: int, by: str) -> None:
    model, x = nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(20, width)
    ours = quantized(model, RPTQ(32, by=by), x, "w8a8-static-asym")
    assert len(ours[0].groups) <= width
    with torch.no_grad():
        assert relative_error([model(x)], [ours(x)]) < 0.05


@pytest.mark.parametrize("by", ["tiles", "kmeans"])
def test_deterministic(by: str) -> None:
    model = loud(llama())
    first, second = (quantized(model, RPTQ(8, by=by), scheme="w8a8-static-asym") for _ in range(2))
    assert_same(first.state_dict(), second.state_dict())
    assert [m.groups for m in first.modules() if isinstance(m, W8A8Linear)] == [
        m.groups for m in second.modules() if isinstance(m, W8A8Linear)
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_clusters_help_where_channels_differ(scheme: str) -> None:
    model, x = nn.Sequential(nn.Linear(96, 32), nn.Tanh(), nn.Linear(32, 8)), torch.randn(200, 96)
    x[:, 3] *= 60
    x[:, 50:53] = x[:, 50:53] * 5 + 30
    errors = {}
    for name, method in (("rtn", "rtn"), ("tiles", RPTQ(4, tile=16)), ("kmeans", RPTQ(4, by="kmeans"))):
        ours = quantized(model, method, x, scheme)
        with torch.no_grad():
            errors[name] = relative_error([model[0](x)], [ours[0](x)])
    assert errors["tiles"] < 0.5 * errors["rtn"]
    assert errors["kmeans"] < 0.5 * errors["rtn"]


def test_a_first_cluster_is_padded_only_where_that_pays() -> None:
    ramp, weight = torch.linspace(2, 1, 512), torch.ones(512)
    assert by_tiles(-ramp, ramp, weight, 4, 64)[1][0] % 64 == 0
    ramp[:3] *= 30
    assert by_tiles(-ramp, ramp, weight, 4, 64)[1][0] == 3


# ---- with others, in checkpoints, and what is refused


@pytest.mark.parametrize("scheme", SCHEMES)
def test_many_clusters_lose_nothing_at_their_borders(scheme: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(576, 64), nn.Tanh(), nn.Linear(64, 8)), torch.randn(200, 576)
    x *= torch.logspace(-1, 1.5, 576)[torch.randperm(576)]
    errors = []
    for count in (1, 2, 8, 32):
        ours = quantized(model, RPTQ(count), x, scheme)
        with torch.no_grad():
            errors.append(relative_error([model[0](x)], [ours[0](x)]))
    assert ours[0].groups is not None
    assert len(ours[0].groups) > 16
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.8 * errors[1]
    assert errors[3] < 1.05 * errors[2], errors


@pytest.mark.parametrize("scheme", SCHEMES)
def test_composes_and_saves(scheme: str, tmp_path: Path) -> None:
    model = loud(llama())
    method = ["smoothquant", LLMInt8(columns=3), RPTQ(8, tile=8)]
    ours = quantized(model, method, scheme=scheme)
    wanted = outputs(ours, tokens())
    assert relative_error(outputs(model, tokens()), wanted) < 0.05
    quantkit.save(ours, tmp_path / "saved")
    again = quantkit.load(tmp_path / "saved")
    assert_same(outputs(again, tokens()), wanted)
    assert_same(again.state_dict(), ours.state_dict())
    with use_backend("reference"):
        assert_same(outputs(again, tokens()), wanted)


def test_version_2_is_read_and_bad_groups_are_refused(tmp_path: Path) -> None:
    def rewrite(change: Any) -> None:
        body = json.loads((tmp_path / "m" / "quantkit.json").read_text())
        body.pop("digest")
        change(body)
        (tmp_path / "m" / "quantkit.json").write_text(json.dumps(body | {"digest": digest_of(body)}))

    def older(body: Any) -> None:
        body["format_version"] = 2
        for facts in body["layers"].values():
            del facts["groups"]

    model = mlp()
    ours = quantized(model, "rtn")
    quantkit.save(ours, tmp_path / "m")
    rewrite(older)
    assert_same(outputs(quantkit.load(tmp_path / "m", model=mlp()), example(model)), outputs(ours))
    quantkit.save(ours, tmp_path / "m")
    for groups in ([8, 7], [16, 0], [8.0, 8], ["16"], [True, 15], [17, -1]):
        rewrite(lambda body, groups=groups: body["layers"]["up"].update(groups=groups))
        with pytest.raises(CheckpointError, match=r"up.*groups"):
            quantkit.load(tmp_path / "m", model=mlp())
    rewrite(lambda body: body["layers"]["up"].update(groups=[8, 8]))
    with pytest.raises(CheckpointError, match="shape"):  # scales of one cluster
        quantkit.load(tmp_path / "m", model=mlp())


def test_rounding_after_it() -> None:
    """Codes of a calibrator after it have a unit and multiples for each row; anything else is refused."""

    class Round:
        name, stage, statistics = "round", Stage.ROUND, (Range,)
        wrong = 0

        def plan(self, view: Any) -> Plan:
            plan = Plan()
            for site in view.sites:
                for name, weight in site.weights():
                    codes, scale = quantize_weight(weight, groups=site.transform.groups or ())
                    plan.codes[name] = Codes(codes, {0: scale, 1: scale[:, 1:], 2: 2 * scale}[self.wrong].contiguous())
            return plan

    model, rounder = mlp(outliers=True), Round()
    plain, ours = (quantized(model, [RPTQ(4, tile=4), *more]) for more in ([], [rounder]))
    assert_same(ours.state_dict(), plain.state_dict())
    for rounder.wrong, why in ((1, r"scale is \[24, 4\]"), (2, "no odd numbers")):
        with pytest.raises(MethodError, match=why):
            quantized(model, [RPTQ(4, tile=4), rounder])


def blocks_apart() -> tuple[nn.Sequential, Tensor]:
    """Blocks of 16 channels, every other one 8 times louder, and in a quiet one a channel that is louder than its block."""
    torch.manual_seed(0)
    x = torch.randn(300, 256)
    x.view(300, 8, 2, 16)[:, :, 1] *= 8
    x[:, 5] *= 8
    return nn.Sequential(nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 8)), x


@pytest.mark.parametrize("scheme", SCHEMES)
def test_before_a_rotation_whole_blocks_move(scheme: str) -> None:
    model, x = blocks_apart()
    errors = {}
    for name, method in (("alone", Hadamard(16)), ("clusters", [RPTQ(2, tile=32), Hadamard(16)])):
        ours = quantized(model, method, x, scheme)
        with torch.no_grad():
            errors[name] = relative_error([model[0](x)], [ours[0](x)])
    assert ours[0].groups == (128, 128)
    order = ours[0].permutation.view(16, 16)
    assert torch.equal(order - order[:, :1], torch.arange(16).expand(16, 16))
    assert set((order[:8, 0] // 16).tolist()) == set(range(1, 16, 2)), "the loud blocks are the first cluster"
    assert errors["clusters"] < 0.9 * errors["alone"]


def test_a_rotation_behind_clusters_in_a_model(tmp_path: Path) -> None:
    model = loud(llama())
    ours = quantized(model, ["smoothquant", RPTQ(4, tile=16), Hadamard(8)], scheme="w8a8-static-asym")
    layers = [m for m in ours.modules() if isinstance(m, W8A8Linear)]
    assert any(m.groups for m in layers)
    assert all(m.rotation_block == 8 and all(size % 8 == 0 for size in m.groups or ()) for m in layers)
    wanted = outputs(ours, tokens())
    assert relative_error(outputs(model, tokens()), wanted) < 0.05
    quantkit.save(ours, tmp_path / "saved")
    assert_same(outputs(quantkit.load(tmp_path / "saved"), tokens()), wanted)
    with use_backend("reference"):
        assert_same(outputs(ours, tokens()), wanted)


def test_a_rotation_may_not_mix_clusters() -> None:
    class Even(Shuffle):
        groups = True

    class Uneven(PerSite):
        name, stage = "uneven", Stage.PARTITION

        def plan_site(self, site: Any) -> Any:
            return Transform(groups=(12, site.site.channels - 12)), {}

    model, x = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)), torch.randn(30, 32)
    ours = quantized(model, [Even(), Hadamard(16)], x)
    assert (ours[0].rotation_block, ours[0].groups) == (16, (16, 16))
    with torch.no_grad():
        assert relative_error([model(x)], [ours(x)]) < 0.03
    with pytest.raises(MethodError, match="rotation of 16 would mix groups of 12, 20"):
        quantized(model, [Uneven(), Hadamard(16)], x)


def test_plans_that_make_no_sense() -> None:
    class Own(PerSite):
        name, stage = "own", Stage.PARTITION
        answer = Transform()

        def plan_site(self, site: Any) -> Any:
            return self.answer, {}

    own, model, x = Own(), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(9, 8)
    for groups in ((4, 5), (8, 0), [4, 4], (4.0, 4.0), "44", ()):
        own.answer = Transform(groups=groups)  # type: ignore[arg-type]
        with pytest.raises(MethodError, match="groups"):
            quantized(model, own, x)
    own.answer = Transform(groups=(8,))
    assert quantized(model, own, x)[0].groups == ()
    own.answer = Transform(permutation=torch.arange(8))
    with pytest.raises(MethodError, match="break up"):
        quantized(model, [RPTQ(2, tile=2), own], x)
    with pytest.raises(MethodError, match="break up"):
        Transform(groups=(4, 4)).then(Transform(permutation=torch.arange(8)))
    with pytest.raises(MethodError, match="groups"):
        W8A8Linear(8, 8, groups=(4, 5))


@pytest.mark.parametrize("what", ["clusters", "tile", "seed"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "8", None])
def test_values_that_make_no_sense(what: str, value: Any) -> None:
    with pytest.raises(MethodError, match=what):
        RPTQ(**{what: value})
    with pytest.raises(MethodError, match="tiles"):
        RPTQ(by=value)


def test_nothing_happens_to_a_model_that_stays_float() -> None:
    model = mlp(outliers=True)
    ours = quantkit.quantize(copy.deepcopy(model), ["smoothquant", RPTQ()], calibration=[X], scheme=None, progress=False)
    assert relative_error(outputs(model), outputs(ours)) <= 1e-5


# ---- arithmetic


@given(data=st.data())
def test_groups_against_int64(data: st.DataObject) -> None:
    m, n, g = (data.draw(st.integers(1, 4)) for _ in range(3))
    groups = tuple(data.draw(st.lists(st.integers(1, 9), min_size=g, max_size=g)))
    k, random = sum(groups), torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    q, w = (torch.randint(-127, 128, (rows, k), generator=random, dtype=torch.int8) for rows in (m, n))
    zero = torch.randint(-128, 128, (m, g), generator=random, dtype=torch.int32)
    tokens, rows = (2 * torch.randint(0, 16, (count, g), generator=random) + 1 for count in (m, n))
    accs = [a.long() @ b.long().t() for a, b in zip(q.split(groups, 1), w.split(groups, 1), strict=True)]
    sums = torch.stack([b.long().sum(1) for b in w.split(groups, 1)])
    assert_same(reference.row_sums(w, groups), sums.int())
    for zeros in (zero, None):
        parts = [acc if zeros is None else acc - zeros[:, i : i + 1] * sums[i] for i, acc in enumerate(accs)]
        wanted = sum(part * tokens[:, i : i + 1] * rows[:, i] for i, part in enumerate(parts))
        assert wanted.abs().max() < 2**31
        got = reference.group_sum((a.int() for a in accs), tokens.float(), rows.float(), zeros, sums.int())
        assert_same(got, wanted.int())
        # as on tensor cores: one accumulator, multiplied from group to group by what undoes the next multipliers modulo 2**32
        acc = torch.zeros(m, n, dtype=torch.int64)
        for i, part in enumerate(parts):
            acc = modular(acc + part, tokens[:, i : i + 1], rows[:, i])
            if i + 1 < g:
                acc = modular(acc, undone(tokens[:, i + 1])[:, None], undone(rows[:, i + 1]))
        assert_same(acc.to(torch.int32), wanted.int())


def undone(odd: Tensor) -> Tensor:
    return torch.tensor([pow(int(v), -1, 2**32) for v in odd])


def modular(x: Tensor, *factors: Tensor) -> Tensor:
    """Product modulo 2**32, as a signed number: int64 itself wraps at 2**64."""
    for factor in factors:
        x = x * factor & 0xFFFFFFFF
    return torch.where(x >= 2**31, x - 2**32, x)


@given(st.lists(st.integers(1, 40_000), min_size=2, max_size=12), st.booleans(), st.sampled_from([127, 40, 1, 0]), st.data())
def test_no_sum_leaves_int32(groups: list[int], symmetric: bool, code: int, data: st.DataObject) -> None:
    """All codes of activations at their largest, of one sign, and clusters of any loudness; or sums are refused."""
    assume(sum(groups) <= (MAX_EXACT_K if symmetric else MAX_EXACT_K_ASYMMETRIC))
    codes = torch.full((2, sum(groups)), code, dtype=torch.int8)
    codes[1, : groups[0]] = -127  # the loudest row of the first cluster is not that of the others
    codes[1, groups[0] :] = 0
    rows = torch.tensor([[data.draw(st.sampled_from([1.0, 3.0, 31.0])) for _ in groups] for _ in range(2)])
    scale = torch.tensor([[data.draw(st.floats(2.0**-100, 2.0**100, width=32)) for _ in groups] for _ in range(3)])
    share = shares(codes, torch.cat([torch.ones(2, 1), rows], 1), tuple(groups), symmetric)
    if bool(share.isnan().any()):
        worst = sum(int(part.long().abs().sum(1).max()) * 31 for part in codes.split(groups, 1)) * 255
        assert worst * 2 > 2**31 * (1 - 2.0**-10)
        return
    unit, multiple = with_multipliers(scale, share).split([1, len(groups)], 1)
    assert bool((multiple % 2 == 1).all())
    assert bool((multiple >= 1).all())
    assert bool((unit * multiple >= scale * (1 - 2.0**-20)).all())
    most = 127 if symmetric else 255
    for row, times in zip(codes, rows, strict=True):
        sums = torch.stack([part.long().abs().sum() for part in row.split(groups)]) * times.long()
        assert bool((multiple.long() @ sums * most < 2**31).all())


@given(st.integers(1, MAX_EXACT_K), st.sampled_from([2, 3, 4, 6, 8]))
def test_weights_leave_room_for_tokens(k: int, bits: int) -> None:
    """Whatever the codes: no row of a weight is so full that multiples of its clusters leave none for those of tokens."""
    steps = steps_of(k, bits)
    assert steps == 1 or 2 * steps * k * (2 ** (bits - 1) - 1) * 255 < 2**31 * (1 - 2.0**-10)


@pytest.mark.parametrize(
    ("k", "steps", "rows", "tokens"),
    [(576, 19, 1.12, 1.11), (1536, 11, 1.18, 1.16), (4096, 1, 1.45, 1.06), (14_336, 1, 1.45, 1.09)],
)
def test_what_units_cost(k: int, steps: int, rows: float, tokens: float) -> None:
    """By how much squares of scales grow, of a weight's rows and of tokens, at lengths of rows that models have."""
    torch.manual_seed(0)
    groups = (k // 16, k // 4 - k // 16, k // 4, k // 2)
    weight = torch.randn(64, k)
    codes, scale = quantize_weight(weight, groups=groups)
    assert scale[:, 1:].max() == steps
    needed = torch.stack([part.abs().amax(1) for part in weight.split(groups, 1)], 1) / 127
    assert float(((scale[:, :1] * scale[:, 1:]).square().mean(0) / needed.square().mean(0)).mean()) < rows
    needed = (torch.rand(200, 4) + 0.5) * torch.logspace(1.3, 0, 4)
    given = with_multipliers(needed, shares(codes, scale, groups, True))
    assert float(((given[:, :1] * given[:, 1:]).square().mean(0) / needed.square().mean(0)).mean()) < tokens


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_weights_have_a_grid_for_each_cluster(bits: int) -> None:
    groups, most = (3, 16, 45), 2 ** (bits - 1) - 1
    weight = torch.randn(9, 64)
    weight[:, :3] *= 30
    weight[4] = 0
    codes, scale = quantize_weight(weight, bits, groups=groups)
    assert_same(codes[4], torch.zeros(64, dtype=torch.int8))
    assert_same(scale[4], torch.ones(4))
    assert bool((scale[:, 1:] % 2 == 1).all())
    assert int(codes.abs().max()) == most
    for g, (part, mine) in enumerate(zip(codes.split(groups, 1), weight.split(groups, 1), strict=True)):
        own = scale[:, :1] * scale[:, 1 + g : 2 + g]
        assert bool(((part * own - mine).abs() <= own / 2 * (1 + 1e-5)).all())
        needed = mine.abs().amax(1, keepdim=True) / most
        assert bool((own <= (needed + 2 * scale[:, :1]) * (1 + 1e-5)).all())


def test_scales_of_another_kind_are_refused() -> None:
    """A scale for each cluster, as before there were units: one column less, and it would mean something else."""
    layer = W8A8Linear(32, 4, groups=(16, 16))
    state = layer.state_dict() | {"weight_scale": torch.ones(4, 2)}
    with pytest.raises(RuntimeError, match="size mismatch for weight_scale"):
        layer.load_state_dict(state)

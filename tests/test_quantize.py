"""The public API: what quantize() accepts, what it does, and that it does the same every time."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import VOCAB, WIDTH, assert_same, gpt2, llama, mlp, normal, outputs, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import quantkit
from quantkit import RTN, Plan, Range, Scheme, SchemeError, SmoothQuant, Stage, TokenSample, Transform, W8A8Linear
from quantkit.calibration.observe import observe
from quantkit.calibrators import SiteView
from quantkit.calibrators.smoothquant import DEAD, smooth_scale
from quantkit.core.numerics import absmax_scale, range_scale
from quantkit.core.weights import quantize_weight
from quantkit.discovery.equivalence import relative_error
from quantkit.model.modules import linears_of, weight_of

EPS = 2.0**-24
BLOCK = {
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
}
ALL = {f"model.layers.{i}.{name}" for i in range(2) for name in BLOCK}


def quantized(model: nn.Module, method: Any = "smoothquant", **options: Any) -> Any:
    options.setdefault("calibration", [normal(2, 9, 16)] if not hasattr(model, "config") else [tokens()])
    return quantkit.quantize(model, method, progress=False, **options)


def int8(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, W8A8Linear)}


def test_in_place_and_returned() -> None:
    model = mlp()
    assert quantized(model) is model
    assert int8(model) == {"up", "down"}
    assert not model.training
    assert not quantized(mlp().eval()).up.training
    assert quantized(mlp().train()).up.training


def test_a_language_model() -> None:
    model = quantized(llama())
    assert int8(model) == ALL  # the head stays in floating point
    prompt = tokens(2, 4)
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert text.shape == (2, 10)
    assert_same(text[:, :4], prompt)


@pytest.mark.parametrize("build", [mlp, llama, gpt2])
def test_rtn_is_the_textbook(build: Any) -> None:
    """Codes, scales and bias of every layer, and not a bit of anything else."""
    model = build()
    before, original = {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(model)
    quantized(model, "rtn")
    for name in int8(model):
        layer, linear = model.get_submodule(name), original.get_submodule(name)
        assert_same([layer.weight, layer.weight_scale], list(quantize_weight(weight_of(linear))), name)
        assert_same(layer.bias, None if linear.bias is None else linear.bias.detach())
        assert not layer.rewrites_input
    for key, value in model.state_dict().items():
        if key.rpartition(".")[0] not in int8(model):
            assert_same(value, before[key], key)


METHODS = {
    "default": None,
    "name": "smoothquant",
    "instance": SmoothQuant(),
    "names": ["smoothquant", "rtn"],
    "mixed": (SmoothQuant(), "rtn"),
    "one": [SmoothQuant()],
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_ways_to_name_a_method(method: Any) -> None:
    torch.manual_seed(1)
    model = mlp(outliers=True)
    wanted = quantized(copy.deepcopy(model), [SmoothQuant("auto"), RTN()]).state_dict()
    data = [normal(2, 9, 16)]
    got = quantkit.quantize(model, calibration=data) if method is None else quantized(model, method)
    assert_same(got.state_dict(), wanted)


@pytest.mark.parametrize(
    "name", ["w8a8", "w8a8-asym", "w8a8-static", "w8a8-static-asym", "w8a8-pertensor", "w4a6", "w2a3-static-asym-pertensor"]
)
def test_schemes(name: str) -> None:
    scheme = Scheme.parse(name)
    assert scheme.name == name
    data, models = normal(2, 9, 16), [mlp() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = models[0].norm(data).detach()
    a, b = (quantized(m, "rtn", scheme=s, calibration=[data]) for m, s in zip(models, (name, scheme), strict=True))
    assert_same(a.state_dict(), b.state_dict())
    layer = a.up
    assert layer.scheme == scheme
    assert layer.weight.abs().max() == scheme.weight.number.qmax
    assert (layer.weight_scale.unique().numel() == 1) == isinstance(scheme.weight.granularity, PerTensor)
    if not scheme.is_static:
        assert layer.input_scale is None
    elif scheme.input.number.symmetric:
        assert_same(layer.input_scale, absmax_scale(x.abs().max()[None], scheme.input.number.bits))
        assert layer.input_zero_point is None
    else:
        assert_same(
            [layer.input_scale, layer.input_zero_point],
            list(range_scale(x.min()[None], x.max()[None], scheme.input.number.bits)),
        )


BITS = st.integers(2, 8) | st.just(16)


@given(st.integers(2, 8), *[st.booleans()] * 3, *[BITS] * 3, BITS | st.none())
def test_scheme_names_read_back(
    w: int, per_tensor: bool, static: bool, symmetric: bool, a: int, kv: int, attention: int, norm: int | None
) -> None:
    granularity: Any = ("tensor" if per_tensor else "channel", "tensor" if static else "token", symmetric)
    if {a, kv, attention, norm} <= {16, None} and (static or not symmetric):
        with pytest.raises(SchemeError, match="no activation is quantized"):
            Scheme(w, a, *granularity, kv, attention, norm)
        return
    scheme = Scheme(w, a, *granularity, kv, attention, norm)
    assert Scheme.parse(scheme.name) == Scheme.parse(scheme) == scheme
    assert scheme.is_simulation == ((w, a, kv, attention) != (8, 8, 16, 16) or norm not in (None, 8))
    for behind_norm in (False, True):
        own = scheme.of_linear(behind_norm=behind_norm)
        bits = norm if behind_norm and norm is not None else a
        assert own == Scheme(w, bits, granularity[0], *(granularity[1:] if bits != 16 else ()))
        assert own.of_linear() == own


def test_simulations_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "quantkit"):
        quantized(mlp(), "rtn")
        assert not caplog.records
        quantized(mlp(), "rtn", scheme="w4a8")
    assert "w4a8 is a simulation" in caplog.text


def test_without_a_scheme_the_model_stays_float() -> None:
    model = llama()
    original = copy.deepcopy(model)
    quantized(model, SmoothQuant(0.5), scheme=None)
    assert not int8(model)
    assert not torch.equal(model.model.layers[0].input_layernorm.weight, original.model.layers[0].input_layernorm.weight)
    assert quantkit.verify_equivalence(model, original, tokens(seed=5)).holds


LAYER0 = {name for name in ALL if ".0." in name}
DOWN = {name for name in ALL if name.endswith("down_proj")}
SELECTIONS: list[tuple[dict[str, Any], set[str]]] = [
    ({"ignore": ["model.layers.0.mlp.down_proj"]}, ALL - {"model.layers.0.mlp.down_proj"}),
    ({"ignore": ["*.down_proj"]}, ALL - DOWN),
    ({"ignore": ["down_proj", "model.layers.0"]}, ALL - DOWN - LAYER0),
    ({"ignore": ("q_proj",)}, {n for n in ALL if "q_proj" not in n}),
    ({"targets": ["down_proj"]}, DOWN),
    ({"targets": ["down_proj"], "ignore": ["model.layers.0.*"]}, DOWN - LAYER0),
    ({"targets": [nn.Linear]}, ALL | {"lm_head"}),
    ({"targets": ["lm_head"]}, {"lm_head"}),
]


@pytest.mark.parametrize(("options", "wanted"), SELECTIONS, ids=[str(options) for options, _ in SELECTIONS])
def test_selections(options: dict[str, Any], wanted: set[str]) -> None:
    model = quantized(llama(), **options)
    assert int8(model) == wanted
    kept = {r.name: r.reason for r in quantkit.report(model).layers if r.kind == "float"}
    assert kept.keys() == (ALL | {"lm_head"}) - wanted
    assert all(kept.values())


def test_partial_selections_keep_the_function() -> None:
    """What reads a smoothed activation in floating point must undo the scale too."""
    data, model = normal(4, 30, 16), mlp(outliers=True)
    original = copy.deepcopy(model)
    for ignored in ("up", "down"):
        got = outputs(quantized(copy.deepcopy(model), SmoothQuant(0.5), ignore=[ignored], calibration=[data]), data)
        signal, noise = outputs(original, data)[0], got[0] - outputs(original, data)[0]
        assert noise.norm() < 0.05 * signal.norm()


class Vocabulary:
    """A tokenizer, as far as quantkit asks: one token for each character."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": ([1] if add_special_tokens else []) + [3 + ord(c) % (VOCAB - 3) for c in text]}


def test_ways_to_pass_data() -> None:
    model, ids = llama(), tokens(1, 20)
    text = "".join(chr(int(i) - 3 + (VOCAB - 3)) for i in ids[0])
    wanted = quantized(copy.deepcopy(model), calibration=[ids]).state_dict()
    ways: dict[str, Any] = {
        "dict": [{"input_ids": ids}],
        "tuple": [(ids,)],
        "iterator": iter([ids]),
        "generator": (ids for _ in range(1)),
        "loader": torch.utils.data.DataLoader(ids, batch_size=1),
        "strings": [text[:7], text[7:]],
    }
    for way, data in ways.items():
        got = quantized(copy.deepcopy(model), calibration=data, tokenizer=Vocabulary()).state_dict()
        assert_same(got, wanted, way)


def test_every_batch_of_a_generator_counts() -> None:
    """The first one is looked at beforehand, and must not be lost."""
    batches, model = [normal(1, 4, 16, seed=i) * (3 - i) for i in range(3)], mlp()
    wanted = quantized(copy.deepcopy(model), scheme="w8a8-static", calibration=batches).state_dict()
    assert_same(quantized(copy.deepcopy(model), scheme="w8a8-static", calibration=(b for b in batches)).state_dict(), wanted)
    assert not torch.equal(
        quantized(model, scheme="w8a8-static", calibration=batches[1:]).up.input_scale, wanted["up.input_scale"]
    )


def test_a_language_model_samples_its_own_data() -> None:
    model = llama(max_position_embeddings=24)
    first, second, other = (quantized(copy.deepcopy(model), calibration=None, seed=seed) for seed in (1, 1, 2))
    assert_same(first.state_dict(), second.state_dict())
    assert not torch.equal(first.model.layers[0].input_layernorm.weight, other.model.layers[0].input_layernorm.weight)
    assert "sampled" in quantkit.report(first).calibration


def test_the_global_seed_is_neither_read_nor_moved() -> None:
    model = llama(max_position_embeddings=24)
    torch.manual_seed(5)
    first = quantized(copy.deepcopy(model), calibration=None).state_dict()
    after = torch.rand(1)
    assert_same(quantized(model, calibration=None).state_dict(), first)
    torch.manual_seed(5)
    assert_same(torch.rand(1), after)


@pytest.mark.parametrize("build", [mlp, llama, gpt2])
def test_every_linear_is_in_the_report(build: Any) -> None:
    model = build()
    names = linears_of(model).keys()
    record = quantkit.report(quantized(model))
    assert sorted(layer.name for layer in record.layers) == sorted(names)
    assert {layer.name for layer in record.layers if layer.kind == "int8"} == int8(model)
    assert all(layer.sqnr_db > 20 for layer in record.layers if layer.kind == "int8")
    assert all(name in str(record) for name in names)
    assert type(record).from_dict(record.to_dict()) == record
    with pytest.raises(quantkit.ModelError, match="not quantized"):
        quantkit.report(build())


# ---- SmoothQuant


def test_smoothquant_by_hand() -> None:
    """Paper, equation 4: s = a**0.5 / w**0.5; the norm is divided by s and the columns of its reader multiplied."""
    model, data = mlp(outliers=True), normal(3, 8, 16)
    old = copy.deepcopy(model)
    with torch.no_grad():
        hidden = old.norm(data)
        wide = old.up(hidden).relu()
    s1 = (hidden.abs().amax((0, 1)) / old.up.weight.abs().amax(0)).sqrt()
    s2 = (wide.abs().amax((0, 1)) / old.down.weight.abs().amax(0)).sqrt()
    assert (wide.amax((0, 1)) > 0).all()  # no dead channel among them
    quantized(model, SmoothQuant(alpha=0.5), scheme=None, calibration=list(data.split(1)))
    close = {"rtol": 16 * EPS, "atol": 0.0}  # two powers, a quotient and a product or two
    torch.testing.assert_close(model.norm.weight, old.norm.weight / s1, **close)
    torch.testing.assert_close(model.norm.bias, old.norm.bias / s1, **close)
    torch.testing.assert_close(model.up.weight, old.up.weight * s1 / s2[:, None], **close)
    torch.testing.assert_close(model.up.bias, old.up.bias / s2, **close)
    torch.testing.assert_close(model.down.weight, old.down.weight * s2, **close)


def views(model: nn.Module, batch: Tensor) -> list[SiteView]:
    found, linears = quantkit.discover(model, batch), linears_of(model)
    statistics = observe(model, [batch], found.sites, [Range, TokenSample], progress=False)
    return [
        SiteView(s, Scheme(), False, Transform(), {n: linears[n] for n in s.linears}, statistics[s.name]) for s in found.sites
    ]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_twice_is_smoothing_once(alpha: float) -> None:
    for view in views(llama(), tokens()):
        first = SmoothQuant(alpha).plan_site(view)[0]
        assert (first.scale - 1).abs().max() > 0.01
        view.transform = view.transform.then(first)
        again = SmoothQuant(alpha).plan_site(view)[0].scale
        torch.testing.assert_close(again, torch.ones_like(again), rtol=64 * EPS, atol=0)


def test_repeated_heads_share_a_scale() -> None:
    """Grouped-query attention: two query heads read one row of v, so their channels must agree on a scale."""
    shared = [view for view in views(llama(), tokens()) if view.site.producer and view.site.producer.module.endswith("v_proj")]
    assert len(shared) == 2
    for view in shared:
        rows = view.site.producer.rows
        assert rows.unique().numel() == WIDTH // 2
        for alpha in (0.5, "auto"):
            scale = SmoothQuant(alpha).plan_site(view)[0].scale
            assert_same(scale, view.site.tie(scale))


def test_dead_and_unread_channels() -> None:
    a, w = torch.tensor([0.0, DEAD / 2, 8.0, 1.0, 1.0, 0.5, 0.25]), torch.tensor([1.0, 1.0, 0.0, 4.0, 1.0, 0.0, 1.0])
    median = 0.5
    assert smooth_scale(a, w, 0.5).tolist() == [1, 1, 8 / median, 0.5, 1, 1, 0.5]
    for alpha in (0.0, 0.5, 1.0):
        for zeros in (torch.zeros(7), a * 0):
            assert_same(smooth_scale(zeros, w, alpha), torch.ones(7))  # all dead
        assert smooth_scale(a, zeros, alpha).isfinite().all()


positive = st.floats(2.0**-40, 2.0**40, width=32)


@given(st.lists(st.tuples(positive | st.just(0.0), positive | st.just(0.0)), min_size=1), st.floats(0, 1))
def test_scales_are_positive_numbers(pairs: list[tuple[float, float]], alpha: float) -> None:
    scale = smooth_scale(*torch.tensor(pairs).T, alpha)
    assert scale.isfinite().all()
    assert (scale > 0).all()


def test_smoothquant_beats_rounding_on_outliers() -> None:
    data, held_out = normal(4, 30, 16), normal(4, 30, 16, seed=9)
    model = mlp(outliers=True)
    wanted = outputs(model, held_out)[0]

    def error(method: str) -> Tensor:
        return (outputs(quantized(copy.deepcopy(model), method, calibration=[data]), held_out)[0] - wanted).norm()

    assert error("smoothquant") < error("rtn")


# ---- calibrators of others


class Halve:
    """Ten lines, no base class."""

    name, stage, statistics = "halve", Stage.SCALE, (Range,)

    def plan(self, view: Any) -> Plan:
        self.seen = {site.name: site.statistic(Range).absmax for site in view.sites}
        transforms = {site.name: Transform(scale=torch.full((site.site.channels,), 2.0)) for site in view.sites}
        return Plan(transforms, notes={site.name: {"factor": 2} for site in view.sites})


def test_calibrators_of_others() -> None:
    model, data, calibrator = mlp(), normal(2, 9, 16), Halve()
    original = copy.deepcopy(model)
    plain = outputs(quantized(copy.deepcopy(model), "rtn", calibration=[data]), data)
    quantized(model, [calibrator, "rtn"], calibration=[data])
    assert_same(calibrator.seen["up"], original.norm(data).abs().amax((0, 1)).detach())
    assert_same(model.norm.weight, original.norm.weight / 2)
    assert_same(outputs(model, data), plain)  # a power of two moves no rounding
    record = quantkit.report(model)
    assert record.method == ["halve", "rtn"]
    assert all(layer.notes == {"factor": 2} for layer in record.layers)


def test_calibrators_that_read_the_data_again() -> None:
    class Reader(Halve):
        def plan(self, view: Any) -> Plan:
            self.batches = [b for _ in range(2) for b in view.batches()]
            return Plan()

    data, reader = [normal(1, 3, 16)], Reader()
    quantized(mlp(), reader, calibration=data)
    assert_same(reader.batches, data * 2)
    with pytest.raises(quantkit.CalibrationError, match="more than once"):
        quantized(mlp(), reader, calibration=iter(data))


def test_shuffled_batches_give_the_same_ranges() -> None:
    def stream(order: list[int]) -> Iterator[Tensor]:
        return (normal(1, 4, 16, seed=i) for i in order)

    model = mlp()
    a, b = (quantized(copy.deepcopy(model), SmoothQuant(0.5), calibration=stream(o)) for o in ([0, 1, 2], [2, 0, 1]))
    assert_same(a.state_dict(), b.state_dict())


def test_shift_beside_a_folded_scale() -> None:
    """The shift is in units of the original activation, and what arrives is divided by the folded scale."""

    class ShiftAndScale(quantkit.PerSite):
        name, stage = "shift-and-scale", quantkit.Stage.SCALE

        def plan_site(self, site: quantkit.SiteView) -> tuple[quantkit.Transform, dict[str, object]]:
            k = site.site.channels
            scale = site.site.tie(torch.rand(k) * 8 + 0.5)
            return quantkit.Transform(shift=torch.randn(k) * 0.1, scale=scale), {}

    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 8))
    x = torch.randn(32, 64)
    wanted = model(x).detach()
    quantkit.quantize(model, ShiftAndScale(), calibration=[x], progress=False)
    assert quantkit.report(model).layers[0].folded_into == "0"
    error = (model(x) - wanted).pow(2).mean() / wanted.pow(2).mean()
    assert error < 1e-3  # 30 dB; a shift in the wrong units is off by more than the signal


class Shifts(quantkit.PerSite):
    """A shift and a scale for every channel, wherever a producer can take both."""

    name, stage, statistics = "shifts", quantkit.Stage.SCALE, (Range,)

    def plan_site(self, site: SiteView) -> tuple[Transform, dict[str, Any]]:
        producer = site.site.producer
        if producer is None or producer.bias is None:
            return Transform(), {}
        rows = normal(int(producer.rows.max()) + 1, seed=len(site.name))[producer.rows]
        size = site.site.tie(site.statistic(Range).absmax)
        return Transform(shift=rows * size / 2, scale=(rows / 2).exp()), {}


@pytest.mark.parametrize(
    ("name", "count"), [("gpt2", 6), ("opt", 6), ("gpt-neox", 6), ("llama-bias", 2), ("nanogpt", 6), ("bert", 2), ("llama", 0)]
)
def test_shifts_fold_where_biases_make_up_for_them(name: str, count: int) -> None:
    """Norms in front of linears, and values in front of the output of attention; not gates and curves."""
    family = FAMILIES[name]
    model, batch = family.build(), family.batch()
    wanted = copy.deepcopy(model)
    producers = [site.producer for site in quantkit.discover(model, batch).sites]
    assert sum(p is not None and p.bias is not None for p in producers) == count
    shifted = quantkit.quantize(model, Shifts(), scheme=None, calibration=[batch], progress=False)
    assert quantkit.verify_equivalence(shifted, wanted, batch).holds
    rtn, ours = (
        quantkit.quantize(copy.deepcopy(wanted), method, calibration=[batch], progress=False) for method in ("rtn", Shifts())
    )
    layers = [layer for layer in quantkit.report(ours).layers if layer.kind == "int8"]
    assert all("shift" not in layer.at_run_time and (layer.sqnr_db is None or layer.sqnr_db > 25) for layer in layers)
    errors = [relative_error(outputs(wanted, batch), outputs(quantized, batch)) for quantized in (rtn, ours)]
    assert errors[1] < max(2 * errors[0], 0.05)  # a bias that is wrong anywhere is off by more than the signal

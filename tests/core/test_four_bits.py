"""Weights of 4 bits in groups of channels: two codes in a byte, a multiplier for each row and group, one scale for each row."""

from __future__ import annotations

import copy
from pathlib import Path

import helpers
import pytest
import torch
from helpers import assert_same
from hypothesis import given
from hypothesis import strategies as st

import quantkit
from quantkit import GPTQ, RPTQ, CheckpointError, MethodError, Scheme, SchemeError, W8A8Linear
from quantkit.core.formats import Float, Int, PerGroup, PerTensor, PerToken, Quantized, Storage
from quantkit.core.operand import Operand, weight_tensors
from quantkit.core.weights import most_multiplier, round_weight
from quantkit.ops.linear import prepare

W4 = Quantized(Int(4), PerGroup(16), Storage.NIBBLES)


def operand(n: int, k: int, scheme: str = "w4a8-g16", *, seed: int = 0) -> tuple[Operand, torch.Tensor]:
    """A random weight, loud in some of its groups, and the operand of its codes."""
    own = Scheme.parse(scheme)
    weight = helpers.normal(n, k, seed=seed) * torch.logspace(-2, 2, k)[torch.randperm(k)]
    facts = W8A8Linear(k, n, scheme=own, bias=False).operand.facts
    tensors = weight_tensors(own.weight, *round_weight(weight, own.weight))
    if own.is_static:
        tensors["input_scale"] = torch.tensor([0.03])
        tensors |= {} if own.input.number.symmetric else {"input_zero_point": torch.tensor([5], dtype=torch.int32)}
    return Operand.of(facts, tensors), weight


@given(st.integers(0, 70), st.integers(0, 5), st.integers(0, 2**32))
def test_two_codes_in_a_byte(channels: int, rows: int, seed: int) -> None:
    codes = torch.randint(-7, 8, (rows, channels), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    stored = Storage.NIBBLES.pack(codes)
    assert (stored.dtype, tuple(stored.shape)) == (torch.uint8, (rows, Storage.NIBBLES.width(channels)))
    assert_same(Storage.NIBBLES.unpack(stored, channels), codes)


def test_the_order_of_halves() -> None:
    """The first channel is in the low half, and negative codes are in two's complement."""
    assert Storage.NIBBLES.pack(torch.tensor([[1, -1, -7, 7, 3]], dtype=torch.int8)).tolist() == [[0xF1, 0x79, 0x03]]


@pytest.mark.parametrize(
    "name", ["w4a8-g128", "w4a8-g64-asym", "w3a8-g32-static-asym", "w8a8-g128", "w4a16-g128", "w4a4-g16-kv4"]
)
def test_names(name: str) -> None:
    scheme = Scheme.parse(name)
    assert scheme.name == name
    assert isinstance(scheme.weight.granularity, PerGroup)
    assert scheme.weight.storage is (Storage.BYTES if name.startswith("w8") else Storage.NIBBLES)
    assert scheme.weight.groups(300)[-1] == 300 % scheme.weight.granularity.size or 300 % scheme.weight.granularity.size == 0
    assert sum(scheme.weight.groups(300)) == 300


def test_what_w4a8_meant_it_means() -> None:
    assert Scheme.parse("w4a8").weight == Quantized(Int(4))


def test_formats_that_cannot_be() -> None:
    with pytest.raises(SchemeError, match="two in a byte"):
        Quantized(Int(5), PerGroup(), Storage.NIBBLES)
    with pytest.raises(SchemeError, match="groups of its own"):
        W4.in_groups((8, 8))
    with pytest.raises(SchemeError, match="exclude"):
        Scheme.parse("w4a8-g128-pertensor")
    with pytest.raises(SchemeError, match="whole number"):
        Scheme.parse("w4a8-g0")
    with pytest.raises(SchemeError, match="activations"):
        Scheme(W4, W4)
    assert Scheme(W4, Float()).input == Float()


@given(st.integers(1, 9), st.integers(1, 75), st.integers(0, 2**32))
def test_rounding_is_within_half_a_step(n: int, k: int, seed: int) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    codes, scale = round_weight(weight, W4)
    multipliers = scale[:, 1:]
    assert codes.abs().max() <= 7
    assert ((multipliers >= 1) & (multipliers <= 127) & (multipliers == multipliers.round())).all()
    sizes = torch.tensor(W4.groups(k))
    steps = (scale[:, :1] * multipliers).repeat_interleave(sizes, dim=1)
    assert ((codes * steps - weight).abs() <= steps * (0.5 + 1e-4)).all()
    assert not codes[0].any()


@pytest.mark.parametrize(
    "scheme", ["w4a8-g16", "w4a8-g16-asym", "w4a8-g16-static", "w4a8-g16-static-asym", "w4a16-g16", "w4a4-g16"]
)
@pytest.mark.parametrize(("n", "k"), [(5, 1), (7, 16), (19, 40), (3, 577)])
def test_the_reference_runs_it(scheme: str, n: int, k: int) -> None:
    """Exactly: int64 sums of codes times multipliers, and float64 products of what they stand for."""
    product, _ = operand(n, k, scheme)
    x = helpers.normal(6, k, seed=1)
    x[2] = 0
    ready = prepare(product)
    got = ready.run(x)
    if isinstance(product.input, Float):
        torch.testing.assert_close(got, (x.double() @ product.dequantized().double().t()).float(), rtol=1e-5, atol=1e-5)
        return
    q, scale, zero = ready.quantized(x)
    shifted = q.long() - (0 if zero is None else zero.long())
    sums = [
        a @ b.long().t() for a, b in zip(shifted.split(product.groups, 1), product.codes.split(product.groups, 1), strict=True)
    ]
    acc = sum(s * m.long()[None, :] for s, m in zip(sums, product.multipliers.t(), strict=True))
    assert acc.abs().max() < 2**31
    assert_same(got, acc.float() * scale * product.scale.t())
    assert_same(torch.cat([ready.run(row[None]) for row in x]), got)


@pytest.mark.parametrize("k", [4096, 19_000, 28_672, 60_000])
def test_no_sum_leaves_int32(k: int) -> None:
    """All codes as large as they get, all groups as loud as the loudest."""
    most = most_multiplier(k, 4)
    assert most >= 1
    assert most * 7 * 255 * k < 2**31
    codes, scale = round_weight(torch.ones(2, k), Quantized(Int(4), PerGroup(128), Storage.NIBBLES))
    assert (scale[:, 1:] == most).all()
    assert (codes == 7).all()


def test_sums_that_could_leave_int32_are_refused() -> None:
    tensors = weight_tensors(W4, torch.full((1, 60_000), 7, dtype=torch.int8), torch.full((1, 1 + 3750), 127.0))
    with pytest.raises(MethodError, match="int32"):
        Operand.of(W8A8Linear(60_000, 1, scheme=Scheme(W4), bias=False).operand.facts, tensors).check_sums()


def test_only_the_reference_runs_it_so_far() -> None:
    assert quantkit.why_simulated("w4a8-g128")
    product, _ = operand(4, 32)
    assert type(prepare(product)).__name__ == "PlainPrepared"


def test_a_layer_is_half_as_large(tmp_path: Path) -> None:
    model, data = helpers.llama(hidden_size=64, intermediate_size=96), [helpers.tokens(2, 24, seed=i) for i in range(3)]
    wide = quantkit.quantize(copy.deepcopy(model), calibration=data, progress=False, scheme="w4a8")
    packed = quantkit.quantize(copy.deepcopy(model), calibration=data, progress=False, scheme="w4a8-g32")
    layer, other = packed.model.layers[0].mlp.up_proj, wide.model.layers[0].mlp.up_proj
    assert layer.weight.nbytes * 2 == other.weight.nbytes
    assert (layer.weight_multipliers.dtype, tuple(layer.weight_multipliers.shape)) == (torch.int8, (96, 2))
    sqnr = {name: quantkit.report(m).layers[0].sqnr_db for name, m in (("groups", packed), ("rows", wide))}
    assert sqnr["groups"] > sqnr["rows"]
    with torch.no_grad():
        wanted = packed(data[0]).logits
        assert_same(quantkit.load(quantkit.save(packed, tmp_path / "w4"))(data[0]).logits, wanted)
        assert_same(copy.deepcopy(packed)(data[0]).logits, wanted)
    folder = quantkit.save_plan(quantkit.plan(model, calibration=data, progress=False, scheme="w4a8-g32"), tmp_path / "plan")
    again = quantkit.convert(copy.deepcopy(model), quantkit.load_plan(folder), progress=False)
    assert_same(again.state_dict(), packed.state_dict())


def test_methods_with_it() -> None:
    """GPTQ rounds to it; clusters of RPTQ would need groups of their own, and are refused before anything has changed."""
    model, data = helpers.llama(), [helpers.tokens(2, 48, seed=i) for i in range(4)]
    done = quantkit.quantize(copy.deepcopy(model), ["smoothquant", GPTQ()], calibration=data, progress=False, scheme="w4a8-g16")
    assert any("gptq error" in layer.notes for layer in quantkit.report(done).layers)
    before = helpers.state(model)
    with pytest.raises(MethodError, match="groups of their own"):
        quantkit.quantize(model, RPTQ(clusters=4), calibration=data, progress=False, scheme="w4a8-g16")
    assert_same(helpers.state(model)["bits"], before["bits"])


def test_an_engine_layout_refuses_it(tmp_path: Path) -> None:
    model = quantkit.quantize(helpers.llama(), "rtn", calibration=[helpers.tokens()], progress=False, scheme="w4a8-g16")
    with pytest.raises((quantkit.ModelError, CheckpointError), match="8"):
        quantkit.export(model, tmp_path / "out")


def test_rows_columns_and_moving() -> None:
    product, _ = operand(12, 80)
    assert_same(product.rows(slice(3, 7)).codes, product.codes[3:7])
    share = product.columns(16, 48)
    assert share.in_features == 32
    assert_same(share.dequantized(), product.dequantized()[:, 16:48])
    assert isinstance(share.input.granularity, PerToken)
    assert product.to("meta").stored.is_meta
    assert PerTensor() != share.weight.granularity

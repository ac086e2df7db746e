"""Operands: cut by rows and by columns, joined, stacked, written and read back, each against the product of the whole."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from helpers import assert_same, hostile, normal, operand
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantkit import MethodError, ModelError, QuantkitError, Rotation
from quantkit.core.combine import Stack, joined
from quantkit.core.facts import OPTIONAL, TENSORS, Facts
from quantkit.core.formats import PerToken, Quantized
from quantkit.core.numerics import MAX_EXACT_K
from quantkit.core.operand import Operand, empty_operand
from quantkit.core.rewrite import Rewrite
from quantkit.core.weights import quantize_weight
from quantkit.ops.linear import prepare
from quantkit.ops.table import use_backend

K, N = 48, 14
SCHEMES = ["w8a8", "w8a8-asym", "w8a8-static", "w8a8-static-asym", "w4a6", "w4a16", "w8a8-pertensor"]
STEPS = ("shift", "pre_scale", "permutation", "rotation", "outliers", "groups")
schemes = st.sampled_from(SCHEMES)
steps = st.lists(st.sampled_from(STEPS), unique=True).map(tuple)
seeds = st.integers(0, 10**6)


def run(what: Operand, x: Tensor) -> Tensor:
    with use_backend("reference"):
        return prepare(what).run(x)


def same(one: Operand, other: Operand) -> None:
    assert one.facts == other.facts
    assert (one.weight, one.input) == (other.weight, other.input)
    assert one.rewrite.steps == other.rewrite.steps
    assert_same(one.tensors(), other.tensors())


def tokens_for(scheme: str) -> Tensor:
    """Near overflow, sums of floats depend on the order of additions."""
    return normal(15, K) if "a16" in scheme else hostile(15, K)


# ---- rows


@given(schemes, steps.filter(lambda s: "groups" not in s), seeds, st.lists(st.integers(0, N - 1), min_size=1))
def test_rows_are_rows_of_the_whole(scheme: str, steps: tuple[str, ...], seed: int, index: list[int]) -> None:
    """What each of several devices computes, bit for bit; in any order, and a row may come twice."""
    whole, x = operand(K, N, scheme, steps, seed=seed), tokens_for(scheme)
    wanted = run(whole, x)
    close = assert_same if scheme != "w4a16" else nearly
    close(run(whole.rows(torch.tensor(index)), x), wanted[:, index])
    for at in (slice(0, N // 2), slice(N // 2, N), slice(3, 9)):
        close(run(whole.rows(at), x), wanted[:, at])
    same(whole.rows(slice(None)), whole)


def nearly(got: Tensor, wanted: Tensor) -> None:
    """Products of floats, whose order of additions is the library's."""
    torch.testing.assert_close(got, wanted, rtol=2.0**-18, atol=2.0**-18 * float(wanted.abs().max()))


@given(st.sampled_from(["w8a8", "w8a8-asym"]), seeds)
def test_rows_in_groups(scheme: str, seed: int) -> None:
    """How finely scales of groups of a token are counted depends on the rows, so these agree but for rounding."""
    whole, x = operand(K, N, scheme, ("groups",), seed=seed), normal(9, K)
    got, wanted = run(whole.rows(slice(0, 7)), x), run(whole, x)[:, :7]
    assert (got - wanted).norm() <= 0.02 * wanted.norm()


# ---- columns


def at_borders(groups: bool, rotation: bool) -> list[int]:
    return [0, 16, 32, K] if rotation else [0, 16, 17, 32, K] if groups else [0, 5, 32, 33, K]


@given(
    st.sampled_from(["w8a8-static", "w8a8-static-asym", "w4a16"]),
    st.lists(st.sampled_from([s for s in STEPS if s not in ("permutation", "groups")]), unique=True).map(tuple),
    seeds,
)
def test_columns_add_up_to_the_whole(scheme: str, steps: tuple[str, ...], seed: int) -> None:
    whole, x = operand(K, N, scheme, steps, seed=seed), normal(9, K)
    borders = at_borders(False, "rotation" in steps)
    parts = [(a, b, whole.columns(a, b)) for a, b in itertools.pairwise(borders)]
    assert all(part.bias is None and part.in_features == b - a for a, b, part in parts)
    total = sum(run(part, x[:, a:b]).double() for a, b, part in parts) + whole.bias.double()  # type: ignore[union-attr]
    wanted = run(whole, x).double()
    torch.testing.assert_close(total, wanted, rtol=2.0**-18, atol=2.0**-18 * float(wanted.abs().max()))


@given(schemes, steps.filter(lambda s: "permutation" not in s), seeds)
def test_columns_of_what_the_codes_stand_for(scheme: str, steps: tuple[str, ...], seed: int) -> None:
    whole = operand(K, N, scheme, steps, seed=seed)
    parts = [whole.columns(a, b) for a, b in itertools.pairwise(at_borders("groups" in steps, "rotation" in steps))]
    assert_same(torch.cat([part.dequantized() for part in parts], 1), whole.dequantized())
    assert sum(part.in_features for part in parts) == K
    if "outliers" in steps:
        assert sum(len(part.rewrite.outliers) for part in parts) == len(whole.rewrite.outliers)  # type: ignore[arg-type]
    if "groups" in steps:
        assert all(sum(part.groups) == part.in_features for part in parts)


def test_columns_with_an_order_of_their_own() -> None:
    order = torch.cat([torch.randperm(16), 16 + torch.randperm(32)])
    whole = replace(operand(K, N, "w8a8-static"), rewrite=Rewrite(permutation=order))
    x = normal(5, K)
    total = run(whole.columns(0, 16), x[:, :16]) + run(whole.columns(16, K), x[:, 16:]) + whole.bias
    torch.testing.assert_close(total, run(whole, x), rtol=2.0**-18, atol=2.0**-12)


CUTS: dict[str, tuple[tuple[str, ...], tuple[int, int], str]] = {
    "before": ((), (-1, 4), "from 0 to 48"),
    "beyond": ((), (4, 49), "from 0 to 48"),
    "empty": ((), (4, 4), "from 0 to 48"),
    "backwards": ((), (5, 4), "from 0 to 48"),
    "through a permutation": (("permutation",), (0, 16), "permutation"),
    "through a rotation": (("rotation",), (0, 8), "rotation of blocks of 16"),
    "into a rotation": (("rotation",), (8, 48), "rotation of blocks of 16"),
}


@pytest.mark.parametrize("case", CUTS)
def test_columns_that_cannot_be_cut(case: str) -> None:
    steps, (start, stop), says = CUTS[case]
    with pytest.raises(MethodError, match=says):
        operand(K, N, steps=steps).columns(start, stop)


# ---- joined


def three(scheme: str, steps: tuple[str, ...], seed: int, bias: tuple[bool, ...]) -> list[Operand]:
    """q, k and v: other weights, the same treatment of what they read."""
    first = operand(K, N, scheme, steps, seed=seed, bias=bias[0])
    others = [operand(K, n, scheme, steps, seed=seed + n, bias=b) for n, b in zip((4, 6), bias[1:], strict=True)]
    shared = {"input_scale": first.input_scale, "input_zero_point": first.input_zero_point, "rewrite": first.rewrite}
    return [first, *(replace(other, **shared) for other in others)]


@given(schemes, steps.filter(lambda s: "groups" not in s), seeds, st.tuples(*[st.booleans()] * 3))
def test_joined_is_each_of_them(scheme: str, steps: tuple[str, ...], seed: int, bias: tuple[bool, ...]) -> None:
    parts, x = three(scheme, steps, seed, bias), tokens_for(scheme)
    whole = joined(parts)
    assert (whole.bias is None) == (not any(bias))
    got = run(whole, x).split([part.out_features for part in parts], dim=1)
    for part, own in zip(parts, got, strict=True):
        (assert_same if scheme != "w4a16" else nearly)(own, run(part, x))
    assert_same(whole.dequantized(), torch.cat([part.dequantized() for part in parts]))


def test_joined_keeps_groups() -> None:
    parts = three("w8a8", ("groups",), 3, (True, True, True))
    whole, x = joined(parts), normal(9, K)
    assert whole.groups == parts[0].groups
    wanted = torch.cat([run(part, x) for part in parts], 1)
    assert (run(whole, x) - wanted).norm() <= 0.02 * wanted.norm()


DIFFERENCES: dict[str, Operand] = {
    "weight": operand(K, N, "w4a8", ("shift",)),
    "input": operand(K, N, "w8a8-asym", ("shift",)),
    "shift": operand(K, N, "w8a8", ("shift",), seed=9),
    "pre_scale": operand(K, N, "w8a8", ("shift", "pre_scale")),
    "rotation": operand(K, N, "w8a8", ("shift", "rotation")),
    "permutation": operand(K, N, "w8a8", ("shift", "permutation")),
    "outliers": operand(K, N, "w8a8", ("shift", "outliers")),
    "threshold": operand(K, N, "w8a8", ("shift", "threshold")),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_what_cannot_be_joined(what: str) -> None:
    first = operand(K, N, "w8a8", ("shift",))
    with pytest.raises(MethodError, match=f"differ in {what}"):
        joined([first, first, DIFFERENCES[what]])
    static = [operand(K, N, "w8a8-static", seed=seed) for seed in (0, 1)]
    with pytest.raises(MethodError, match="differ in input input_scale"):
        joined(static)


# ---- stacked, moved, written


@given(schemes, steps, seeds, st.booleans())
def test_stacks_give_back_what_they_took(scheme: str, steps: tuple[str, ...], seed: int, bias: bool) -> None:
    experts = [operand(K, N, scheme, steps, seed=seed + i, bias=bias) for i in range(3)]
    stack = Stack.of(experts)
    assert len(stack) == 3
    for i, expert in enumerate(experts):
        same(stack[i], expert)
    assert all(tensor.shape[0] == 3 for tensor in stack.tensors.values())


@pytest.mark.parametrize(
    "other",
    [operand(K, N + 1), operand(K, N, "w4a8"), operand(K, N, bias=False), operand(K, N, steps=("shift",)),
     operand(K, N, steps=("groups",)), operand(K, N, steps=("threshold",))],
    ids=["rows", "format", "bias", "shift", "groups", "threshold"],
)  # fmt: skip
def test_what_cannot_be_stacked(other: Operand) -> None:
    with pytest.raises(MethodError, match="cannot be stacked"):
        Stack.of([operand(K, N), other])
    with pytest.raises(MethodError, match="no operand"):
        Stack.of([])


def test_moving_takes_everything_along() -> None:
    here = operand(K, N, "w8a8-static-asym", STEPS)
    there = here.to("meta")
    assert set(here.tensors()) == set(TENSORS) - {"weight_multipliers"}
    assert all(tensor.is_meta for tensor in there.tensors().values())
    assert there.facts == here.facts
    assert there.device.type == "meta"
    assert not any(tensor.is_meta for tensor in here.tensors().values())
    same(here.to("cpu"), here)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_written_and_read_back(scheme: str, bias: bool) -> None:
    """Every combination of optional parts."""
    for count in range(len(STEPS) + 1):
        for chosen in itertools.combinations(STEPS, count):
            before = operand(K, N, scheme, chosen, bias=bias)
            tensors = before.tensors()
            assert list(tensors) == [name for name in TENSORS if name in tensors]
            outliers = 0 if before.rewrite.outliers is None else len(before.rewrite.outliers)
            record = json.loads(json.dumps(before.facts.record(list(tensors), outliers)))
            facts = Facts.read(record)
            assert facts == before.facts
            same(Operand.of(facts, tensors), before)
            room = empty_operand(
                facts, bias=record["bias"], optional=record["buffers"], outliers=record["outliers"], dtype=torch.float32
            )
            shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
            assert {name: (tensor.shape, tensor.dtype) for name, tensor in room.tensors().items()} == shapes


def test_a_threshold_is_written_and_read_back() -> None:
    before = operand(K, N, steps=("threshold",))
    same(Operand.of(Facts.read(before.facts.record(list(before.tensors()), 0)), before.tensors()), before)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "groups that do not add up": ({"groups": [16, 16]}, "sum to 32"),
    "no group": ({"groups": [48, 0]}, "positive sizes"),
    "rotation across groups": ({"groups": [8, 40], "rotation_block": 16}, "borders"),
    "rotation of 3": ({"rotation_block": 3}, "blocks of 3"),
    "rotation of 32": ({"rotation_block": 32}, "blocks of 32"),
    "rotation of -16": ({"rotation_block": -16}, "blocks of -16"),
    "outliers": ({"outliers": 49}, "49 outliers"),
    "fewer than no outliers": ({"outliers": -1}, "-1 outliers"),
    "threshold": ({"threshold": -1.0}, "threshold"),
    "endless threshold": ({"threshold": float("inf")}, "threshold"),
    "threshold beside a shift": ({"threshold": 6.0, "buffers": ["shift"]}, "threshold"),
    "threshold of a zero point": ({"threshold": 6.0, "scheme": "w8a8-asym"}, "threshold"),
    "scheme of attention": ({"scheme": "w8a8-kv8"}, "more than a linear"),
    "unknown scheme": ({"scheme": "w8a9"}, "w8a9"),
    "negative size": ({"out_features": -1}, "-1 outputs"),
    "too many channels": ({"in_features": MAX_EXACT_K + 1}, str(MAX_EXACT_K)),
    "unknown tensor": ({"buffers": ["shifts"]}, "'shifts'"),
    "half an outlier": ({"buffers": ["outlier_index"]}, "without the other"),
}


@pytest.mark.parametrize("case", WRONG)
def test_facts_that_make_no_sense(case: str) -> None:
    change, says = WRONG[case]
    record = operand(K, N).facts.record(["bias"], 0)
    with pytest.raises(QuantkitError, match=says):
        Facts.read(record | change)


# ---- what it stands for


@given(schemes.filter(lambda s: "pertensor" not in s), seeds, st.booleans())
def test_what_the_codes_stand_for(scheme: str, seed: int, groups: bool) -> None:
    own = operand(K, N, scheme, ("groups",) if groups else (), seed=seed)
    wanted, at = torch.empty(N, K), 0
    for g, size in enumerate(own.groups or (K,)):
        factor = own.scale if own.multipliers is None else own.scale * own.multipliers[:, g : g + 1]
        wanted[:, at : at + size] = own.codes[:, at : at + size].float() * factor
        at += size
    assert_same(own.dequantized(), wanted)


@given(steps.filter(lambda s: "groups" not in s), seeds)
def test_gradients_are_those_of_the_float_product(steps: tuple[str, ...], seed: int) -> None:
    own, x, gradient = operand(K, N, "w8a16", steps, seed=seed), normal(5, K).requires_grad_(), normal(5, N, seed=1)
    run(own, x).backward(gradient)
    got = own.input_gradient(gradient)
    torch.testing.assert_close(got, x.grad, rtol=1e-4, atol=1e-4 * float(got.abs().max()))


def test_sums_that_leave_int32_are_refused() -> None:
    own = operand(K, N, steps=("groups",))
    own.check_sums()
    assert own.multipliers is not None
    huge = replace(own, stored=torch.full_like(own.stored, 127), multipliers=torch.full_like(own.multipliers, 2.0**20 + 1))
    with pytest.raises(MethodError, match="more than int32"):
        huge.check_sums()
    replace(huge, input=operand(K, N, "w8a16", ("groups",)).input).check_sums()  # floats are not added up as integers
    replace(huge, multipliers=torch.ones_like(own.multipliers)).check_sums()


def test_sums_of_real_weights_fit() -> None:
    for sizes in ((16, 32), (1,) * 48, (47, 1)):
        codes, scale = quantize_weight(torch.ones(3, K), groups=sizes)
        Operand.of(Facts(K, 3, operand(K, 3).scheme, sizes), {"weight": codes, "weight_scale": scale}).check_sums()


# ---- what goes together


WHOLE = operand(K, N, "w8a8-static-asym", STEPS)
FAULTS: dict[str, tuple[Operand, dict[str, Any], str]] = {
    "scale": (WHOLE, {"scale": torch.ones(N)}, r"scale is \[14\], not \[14, 1\]"),
    "codes": (WHOLE, {"stored": torch.zeros(N, K - 1, dtype=torch.int8)}, r"stored is \[14, 47\]"),
    "bias": (WHOLE, {"bias": torch.ones(N + 1)}, "bias is"),
    "multipliers": (WHOLE, {"multipliers": torch.ones(N, 1)}, "multipliers is"),
    "no multipliers": (WHOLE, {"multipliers": None}, "multipliers go together"),
    "no groups": (WHOLE, {"weight": WHOLE.weight.without_groups}, "multipliers"),
    "groups": (WHOLE, {"weight": WHOLE.weight.without_groups.in_groups((16, 16))}, "sum to 32"),
    "input scale": (WHOLE, {"input_scale": torch.ones(1)}, "input_scale is"),
    "no input scale": (WHOLE, {"input_scale": None}, "static input has an input_scale"),
    "dynamic": (operand(K, N), {"input_scale": torch.ones(1)}, "static input has an input_scale"),
    "zero point": (WHOLE, {"input_zero_point": torch.zeros(2, dtype=torch.int32)}, "input_zero_point is"),
    "shift": (WHOLE, {"rewrite": replace(WHOLE.rewrite, shift=torch.ones(2))}, "shift is"),
    "permutation": (WHOLE, {"rewrite": replace(WHOLE.rewrite, permutation=torch.arange(2))}, "permutation is"),
    "outliers": (WHOLE, {"outlier_weight": None}, "outlier channels and outlier_weight"),
    "outlier weight": (operand(K, N), {"outlier_weight": torch.ones(N, 2)}, "outlier channels and outlier_weight"),
    "columns of outliers": (WHOLE, {"outlier_weight": torch.ones(N, 1)}, "outlier_weight is"),
    "rotation": (WHOLE, {"rewrite": replace(WHOLE.rewrite, rotation=Rotation(32))}, "rotation of 32"),
    "groups of the input alone": (operand(K, N), {"input": Quantized(granularity=PerToken((16, 32)))}, "groups"),
    "no zero point": (WHOLE, {"input_zero_point": None}, "zero point"),
    "zero point of symmetric codes": (
        operand(K, N, "w8a8-static"), {"input_zero_point": torch.zeros(1, dtype=torch.int32)}, "zero point",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_what_does_not_go_together(case: str) -> None:
    own, change, says = FAULTS[case]
    with pytest.raises(MethodError, match=says):
        replace(own, **change)


def test_too_many_channels() -> None:
    with pytest.raises(ModelError, match=str(MAX_EXACT_K)):
        empty_operand(replace(operand(K, N).facts, in_features=MAX_EXACT_K + 1), device="meta")


def test_an_operand_is_frozen_and_keeps_its_tensors() -> None:
    own = operand(K, N, "w8a8-static-asym", STEPS)
    with pytest.raises(AttributeError):
        own.scale = torch.ones(N, 1)  # type: ignore[misc]
    names = {f.name for f in fields(own)}
    assert {"stored", "scale", "weight", "input", "rewrite"} <= names
    assert own.tensors()["weight"].data_ptr() == own.stored.data_ptr()
    assert set(OPTIONAL) < set(TENSORS)

"""Every family of models: sites found as derived by hand, function preserved, INT8 close to floating point."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from randomised import build, worst_sqnr
from torch import nn

import quantkit
from quantkit.core.numerics import absmax_scale, decode, encode
from quantkit.core.sites import Discovery
from quantkit.core.weights import quantize_weight
from quantkit.discovery import discover
from quantkit.discovery.equivalence import outputs_of
from quantkit.model.experts import unfuse
from quantkit.model.modules import first_input, linears_of, map_tensors, weight_of

pytestmark = pytest.mark.usefixtures("found_once")

transformers.logging.set_verbosity_error()
every_family = pytest.mark.parametrize("name", FAMILIES)


@functools.cache
def discovered(name: str) -> Discovery:
    return discover(build(name), FAMILIES[name].batch())


@functools.cache
def quantized_names(name: str) -> list[str]:
    """Linears that become INT8: those of fused experts too, if some token of the batch is routed to them."""
    model, batch = build(name), FAMILIES[name].batch()
    found = discover(model, batch) if unfuse(model) else discovered(name)
    ran: set[str] = set()
    for linear, module in linears_of(model).items():
        module.register_forward_pre_hook(lambda _, args, linear=linear: ran.add(linear))
    outputs_of(model, batch)
    return [linear for site in found.sites for linear in site.linears if linear not in found.kept and linear in ran]


@every_family
def test_discovery(name: str) -> None:
    family, model = FAMILIES[name], build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = discover(model, family.batch())
    foldable = [site for site in found.sites if site.producer]
    assert (len(found.sites), len(foldable)) == (family.sites, family.foldable)
    assert all(site.reason for site in found.sites if not site.producer)

    for kept, reason in found.kept.items():
        assert any(fnmatchcase(kept, glob) and reason.startswith(start) for glob, start in family.kept.items()), (kept, reason)
    for glob in family.kept:
        assert any(fnmatchcase(kept, glob) for kept in found.kept), glob
    listed = [linear for site in found.sites for linear in site.linears]
    assert len(listed) == len(set(listed))
    assert set(listed) | found.kept.keys() == linears_of(model).keys()

    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@every_family
def test_function_is_preserved(name: str) -> None:
    family, model, original = FAMILIES[name], build(name, outliers=True), build(name, outliers=True)
    batch = family.batch()
    quantkit.quantize(model, quantkit.SmoothQuant(alpha=0.5), scheme=None, calibration=[batch], progress=False)

    assert all(type(model.get_submodule(n)) is type(m) for n, m in original.named_modules())
    wanted = outputs_of(original, batch)
    equivalence = quantkit.verify_equivalence(model, wanted, batch)
    assert equivalence.error <= 1e-5, equivalence
    for site in discovered(name).sites:
        if site.producer:  # its scale is at work, and the comparison would notice if only one side had it
            linear, old = model.get_submodule(site.linears[0]), original.get_submodule(site.linears[0])
            folded = linear.weight.detach().clone()
            linear.weight.data.copy_(old.weight)
            assert quantkit.verify_equivalence(model, wanted, batch).error > 1e-4, site.name
            linear.weight.data.copy_(folded)


@contextmanager
def simulated(model: nn.Module, names: list[str]) -> Iterator[None]:
    """W8A8 by the book, in floating point: what round-to-nearest INT8 must amount to."""

    def rounded(module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = first_input(args, kwargs)
        absmax = x.abs().amax(-1, keepdim=True)
        return (decode(encode(x, absmax), absmax_scale(absmax)), *args[1:]), {k: v for k, v in kwargs.items() if k != "input"}

    with ExitStack() as stack:
        for name in names:
            linear = model.get_submodule(name)
            stack.callback(linear.weight.data.copy_, linear.weight.detach().clone())
            weight_of(linear).copy_(decode(*quantize_weight(weight_of(linear))))
            stack.callback(linear.register_forward_pre_hook(rounded, with_kwargs=True).remove)
        yield


def int8_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, quantkit.W8A8Linear)}


@every_family
def test_int8(name: str) -> None:
    """INT8 arithmetic equals its simulation but for ties of rounding, and smoothing keeps the output close.

    20 dB: one product of 8-bit operands has 40 dB (a step is absmax / 127, and absmax about 3 sigma), twenty in a row 27.
    """
    batch, names, original = FAMILIES[name].batch(), quantized_names(name), build(name)
    wanted = outputs_of(original, batch)
    unfuse(original)
    with simulated(original, names):
        by_the_book = outputs_of(original, batch)
    expected = worst_sqnr(wanted, by_the_book)

    rtn = quantkit.quantize(build(name), "rtn", calibration=[batch], progress=False)
    assert int8_names(rtn) == set(names)
    assert worst_sqnr(by_the_book, outputs_of(rtn, batch)) > expected + 10

    smooth = quantkit.quantize(build(name), quantkit.SmoothQuant(alpha=0.5), calibration=[batch], progress=False)
    assert int8_names(smooth) == set(names)
    assert worst_sqnr(wanted, outputs_of(smooth, batch)) > 20


@every_family
def test_int8_in_bfloat16(name: str) -> None:
    batch = map_tensors(FAMILIES[name].batch(), lambda t: t.bfloat16() if t.is_floating_point() else t)
    model = build(name).bfloat16()
    wanted = outputs_of(model, batch)
    quantkit.quantize(model, quantkit.SmoothQuant(alpha=0.5), calibration=[batch], progress=False)
    assert int8_names(model) == set(quantized_names(name))
    assert worst_sqnr(wanted, outputs_of(model, batch)) > 20

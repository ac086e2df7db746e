"""Schemes: each name of the grammar means what it always meant, what makes no sense is refused, and old names warn."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from quantkit import Scheme, SchemeError
from quantkit.core.formats import Float, Format, Int, PerChannel, PerTensor, PerToken, Quantized

BITS, SOME = (2, 3, 4, 5, 6, 7, 8), (2, 5, 8)


def activation(bits: int, static: bool, asymmetric: bool) -> Format:
    return Float() if bits == 16 else Quantized(Int(bits, not asymmetric), PerTensor() if static else PerToken())


def name_of(w: int, a: int, static: bool, asymmetric: bool, per_tensor: bool, norm: Any, kv: Any, attention: Any) -> str:
    parts = [f"w{w}a{a}", *(["static"] if static else []), *(["asym"] if asymmetric else [])]
    parts += ["pertensor"] if per_tensor else []
    optional = (("norm", norm), ("kv", kv), ("attention", attention))
    return "-".join([*parts, *(f"{name}{bits}" for name, bits in optional if bits is not None)])


@pytest.mark.parametrize("w", BITS)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("per_tensor", [False, True], ids=["perchannel", "pertensor"])
def test_every_name_of_the_grammar(w: int, static: bool, asymmetric: bool, per_tensor: bool) -> None:
    for a, norm, kv, attention in itertools.product((*BITS, 16), (None, *SOME, 16), (None, *SOME), (None, *SOME)):
        name = name_of(w, a, static, asymmetric, per_tensor, norm, kv, attention)
        if {a, norm, kv, attention} <= {None, 16} and (static or asymmetric):
            with pytest.raises(SchemeError, match="no activation is quantized"):
                Scheme.parse(name)
            continue
        scheme = Scheme.parse(name)
        assert scheme.name == name
        assert Scheme.parse(scheme) is scheme
        assert scheme == Scheme(
            Quantized(Int(w), PerTensor() if per_tensor else PerChannel()),
            activation(a, static, asymmetric),
            None if norm is None else activation(norm, static, asymmetric),
            activation(kv or 16, static, asymmetric),
            activation(attention or 16, static, asymmetric),
        )
        assert scheme.is_static == static
        assert scheme.quantizes_attention == (kv is not None or attention is not None)
        assert scheme.takes_threshold == (a != 16 and not static and not asymmetric)
        for behind_norm in (False, True):
            own = scheme.of_linear(behind_norm=behind_norm)
            bits = norm if behind_norm and norm is not None else a
            assert own == Scheme(scheme.weight, activation(bits, static, asymmetric))
            assert own.of_linear() == own.of_linear(behind_norm=True) == own


@pytest.mark.parametrize(
    "name",
    ["w16a8", "w8a9", "w8a12", "w4a16-kv16", "w4a16-kv", "w4a16-kv4-norm8", "w8a8-attention16", "w4a16-asym", "a8", "w9a8",
     "w1a8", "w8a8-asym-static", "w8a8-kv8-norm8", "w8a8-norm1", "W8A8", "w8a8 ", "", "w8a8-static-static", None, 8, b"w8a8"],
)  # fmt: skip
def test_names_of_no_scheme(name: Any) -> None:
    with pytest.raises(SchemeError):
        Scheme.parse(name)


TOKENS, STATIC = Quantized(Int(), PerToken()), Quantized(Int(), PerTensor())
IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "float weights": {"weight": Float()},
    "weights per token": {"weight": TOKENS},
    "weights with a zero point": {"weight": Quantized(Int(8, symmetric=False))},
    "no input": {"input": None},
    "input as a number": {"input": 8.0},
    "input per channel": {"input": Quantized(Int(), PerChannel())},
    "keys per channel": {"kv": Quantized()},
    "no keys": {"kv": None},
    "no queries": {"queries": None},
    "static and dynamic": {"input": TOKENS, "kv": STATIC},
    "norms static": {"input": TOKENS, "norm_input": STATIC},
    "one zero point": {"input": TOKENS, "queries": Quantized(Int(8, symmetric=False), PerToken())},
}


@pytest.mark.parametrize("formats", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_formats_that_make_no_scheme(formats: dict[str, Any]) -> None:
    with pytest.raises(SchemeError):
        Scheme(**formats)


# ---- names of earlier versions


def old(**options: Any) -> Scheme:
    with pytest.warns(DeprecationWarning, match=r"Scheme\(weight_bits=..., ...\) is going away"):
        return Scheme(**options)


@pytest.mark.parametrize("bits", [1, 9, 0, -8, 8.0, "8", True, None])
def test_bits(bits: Any) -> None:
    for name in ("weight_bits", "activation_bits", "kv_bits", "attention_bits", *(["norm_bits"] if bits is not None else [])):
        with pytest.raises(SchemeError, match=name):
            old(**{name: bits})


@pytest.mark.parametrize("options", [{"weights": "row"}, {"activations": "channel"}, {"weights": None}])
def test_granularities(options: dict[str, Any]) -> None:
    with pytest.raises(SchemeError, match=next(iter(options))):
        old(**options)


OLD: list[tuple[dict[str, Any], str]] = [
    ({"weight_bits": 4}, "w4a8"),
    ({"weight_bits": 4, "kv_bits": 8}, "w4a8-kv8"),
    ({"activation_bits": 16, "weight_bits": 3}, "w3a16"),
    ({"activations": "tensor"}, "w8a8-static"),
    ({"symmetric": False, "weights": "tensor"}, "w8a8-asym-pertensor"),
    ({"norm_bits": 8, "activation_bits": 4, "weight_bits": 4}, "w4a4-norm8"),
    ({"norm_bits": 16}, "w8a8-norm16"),
    ({"attention_bits": 4, "kv_bits": 4, "activations": "tensor", "symmetric": False}, "w8a8-static-asym-kv4-attention4"),
]


@pytest.mark.parametrize(("options", "name"), OLD, ids=[name for _, name in OLD])
def test_old_arguments_and_attributes(options: dict[str, Any], name: str) -> None:
    scheme = old(**options)
    assert scheme == Scheme.parse(name)
    defaults = {
        "weight_bits": 8, "activation_bits": 8, "weights": "channel", "activations": "token", "symmetric": True, "kv_bits": 16,
        "attention_bits": 16, "norm_bits": None,
    }  # fmt: skip
    wanted = defaults | options
    bits = [wanted[key] for key in ("weight_bits", "activation_bits", "norm_bits", "kv_bits", "attention_bits")]
    wanted["quantizes_activations"] = bits[1] != 16
    wanted["is_simulation"] = bits[:2] != [8, 8] or bits[2] not in (None, 8) or bits[3:] != [16, 16]
    for attribute, value in wanted.items():
        with pytest.warns(DeprecationWarning, match=rf"Scheme\.{attribute} is going away"):
            assert getattr(scheme, attribute) == value, attribute


def test_old_arguments_by_place() -> None:
    with pytest.warns(DeprecationWarning, match="is going away"):
        scheme = Scheme(4, 6, "tensor", "tensor", False, 8, 5, 7)  # type: ignore[arg-type]  # what they once were
    assert scheme.name == "w4a6-static-asym-pertensor-norm7-kv8-attention5"


def test_attributes_that_never_were() -> None:
    with pytest.raises(AttributeError, match="'Scheme' has no attribute 'bits'"):
        Scheme().bits  # noqa: B018

"""Names of earlier versions, which work for one more version and warn.

A :class:`~quantkit.core.scheme.Scheme` was once made of numbers of bits, with 16 for floating point. It is made of formats now.
The old arguments are translated here, and the old attributes read here, so that nothing else knows about them.
"""

from __future__ import annotations

import warnings
from typing import Any

from quantkit.core.errors import SchemeError

OLD_ARGUMENTS = (
    "weight_bits",
    "activation_bits",
    "weights",
    "activations",
    "symmetric",
    "kv_bits",
    "attention_bits",
    "norm_bits",
)
OLD_ATTRIBUTES = (*OLD_ARGUMENTS, "is_simulation", "quantizes_activations")


def renamed(old: str, new: str) -> property:
    """A property for the old name of an attribute, such as ``"SiteView.turned"``, that reads ``new`` and warns."""

    def read(self: Any) -> Any:
        warnings.warn(f"{old} is going away: it is called {new} now", DeprecationWarning, stacklevel=2)
        return getattr(self, new)

    return property(read, doc=f"The old name of ``{new}``.")


class OldArguments(type):
    """Metaclass of ``Scheme``, which also takes the arguments of earlier versions: ``Scheme(weight_bits=4, kv_bits=8)``."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        if not any(isinstance(value, int) for value in args) and not options.keys() & set(OLD_ARGUMENTS):
            return super().__call__(*args, **options)
        given = dict(zip(OLD_ARGUMENTS, args, strict=False)) | options
        warnings.warn(
            "Scheme(weight_bits=..., ...) is going away: pass a name, such as Scheme.parse('w4a8-kv8'), or "
            "formats, Scheme(weight=Quantized(Int(4)), ...)",
            DeprecationWarning,
            stacklevel=2,
        )
        try:
            return _translated(cls, **given)
        except SchemeError as error:
            said = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise SchemeError(f"Scheme({said}): {error}") from None


def _translated(
    scheme: Any, weight_bits: int = 8, activation_bits: int = 8, weights: str = "channel", activations: str = "token",
    symmetric: bool = True, kv_bits: int = 16, attention_bits: int = 16, norm_bits: int | None = None,
) -> Any:  # fmt: skip
    """One function because it has the parameters that there once were."""
    if not all(type(bits) is int for bits in (weight_bits, activation_bits, kv_bits, attention_bits, norm_bits or 8)):
        raise SchemeError("bits are whole numbers from 2 to 8")
    parts = [f"w{weight_bits}a{activation_bits}"]
    parts += {"token": [], "tensor": ["static"]}.get(activations, [f"activations={activations!r}"])
    parts += [] if symmetric else ["asym"]
    parts += {"channel": [], "tensor": ["pertensor"]}.get(weights, [f"weights={weights!r}"])
    parts += [] if norm_bits is None else [f"norm{norm_bits}"]
    parts += [] if kv_bits == 16 else [f"kv{kv_bits}"]
    parts += [] if attention_bits == 16 else [f"attention{attention_bits}"]
    return scheme.parse("-".join(parts))


def old_attribute(scheme: Any, name: str) -> object:
    """What an attribute of earlier versions says about ``scheme``.

    Raises:
        AttributeError: there never was one of this name.
    """
    if name not in OLD_ATTRIBUTES:
        raise AttributeError(f"{type(scheme).__name__!r} has no attribute {name!r}")
    value, instead = _values(scheme)[name]
    warnings.warn(f"Scheme.{name} is going away: read {instead}", DeprecationWarning, stacklevel=3)
    return value


def _values(scheme: Any) -> dict[str, tuple[object, str]]:
    activations = scheme._activations

    def bits(format: Any) -> int | None:
        return None if format is None else format.number.bits if hasattr(format, "number") else 16

    linear = [bits(f) for f in (scheme.weight, scheme.input, scheme.norm_input) if f is not None]
    other = set(linear) != {8} or scheme.quantizes_attention
    return {
        "weight_bits": (bits(scheme.weight), "Scheme.weight.number.bits"),
        "activation_bits": (bits(scheme.input), "Scheme.input, a Float() or a Quantized(...) with number.bits"),
        "weights": ("tensor" if scheme.weight.is_static else "channel", "Scheme.weight.granularity"),
        "activations": ("tensor" if scheme.is_static else "token", "Scheme.is_static"),
        "symmetric": (all(f.number.symmetric for f in activations), "Scheme.input.number.symmetric"),
        "kv_bits": (bits(scheme.kv), "Scheme.kv"),
        "attention_bits": (bits(scheme.queries), "Scheme.queries"),
        "norm_bits": (bits(scheme.norm_input), "Scheme.norm_input"),
        "is_simulation": (other, "quantkit.why_simulated(scheme), which says what no backend runs, or None"),
        "quantizes_activations": (bits(scheme.input) != 16, "isinstance(Scheme.input, Quantized)"),
    }  # fmt: skip

"""Which tensor of a model has which number format, and the short names of the usual choices.

A :class:`Scheme` holds one format of :mod:`quantkit.core.formats` for each kind of tensor: the weights of linears, what linears
read, and what attention reads. Most users pass a name; :meth:`Scheme.parse` says what it stands for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantkit.core.deprecated import OldArguments, old_attribute
from quantkit.core.errors import SchemeError, did_you_mean
from quantkit.core.formats import Float, Format, Int, PerChannel, PerGroup, PerTensor, PerToken, Quantized, Storage

NAME = re.compile(r"w(\d)a(\d|16)(?:-g(\d+))?(-static)?(-asym)?(-pertensor)?(?:-norm(\d|16))?(?:-kv(\d))?(?:-attention(\d))?")
SCHEMES = (
    "w8a8", "w8a8-asym", "w8a8-static", "w8a8-static-asym", "w8a8-static-pertensor", "w4a8", "w4a8-g128", "w6a6", "w4a16",
    "w4a16-kv4", "w4a4-static-asym-norm8-kv4-attention4",
)  # fmt: skip
"""Names that are used most, for hints and completion. There are many more."""
FLOAT_BITS = "16"
"""How a name says that a tensor is left in floating point, in whatever dtype it has."""


@dataclass(frozen=True)
class Scheme(metaclass=OldArguments):
    """How weights, activations and attention are represented.

    Weights are symmetric, with one scale for each output channel (:class:`~quantkit.core.formats.PerChannel`), with one for
    each group of its input channels (:class:`~quantkit.core.formats.PerGroup`), or with one in all
    (:class:`~quantkit.core.formats.PerTensor`, the naive baseline). All activations that are quantized agree on two things.
    They have a scale for each token, found at run time (:class:`~quantkit.core.formats.PerToken`), or one for everything,
    fixed at calibration (:class:`~quantkit.core.formats.PerTensor`, *static*); and they have a zero point or not. In
    attention a scale is one of each head (and of each cluster of its channels) besides.

    Attributes:
        weight: of the weights of linears.
        input: of what linears read. :class:`~quantkit.core.formats.Float` leaves it as it is; it is then multiplied by what the
            codes of the weight stand for.
        norm_input: of what linears read that is the output of a norm which no other reads; None for the same as ``input``.
        kv: of keys and values as attention reads them, which is what a cache holds.
        queries: of queries. If they are quantized, so are the probabilities of attention, on 255 steps from 0 to 1.

    Raises:
        SchemeError: a combination that does not exist.
    """

    weight: Quantized = Quantized()
    input: Format = Quantized(Int(), PerToken())
    norm_input: Format | None = None
    kv: Format = Float()
    queries: Format = Float()

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Quantized) or isinstance(self.weight.granularity, PerToken):
            raise SchemeError(f"Scheme(weight={self.weight!r}): weights have codes, with scales PerChannel() or PerTensor()")
        if not self.weight.number.symmetric:
            raise SchemeError("Scheme: weights are symmetric, a zero point of theirs would not be in an integer product")
        for name, value in (("input", self.input), ("norm_input", self.norm_input), ("kv", self.kv), ("queries", self.queries)):
            missing = value is None and name == "norm_input"
            if not missing and not isinstance(value, (Quantized, Float)):
                raise SchemeError(f"Scheme({name}={value!r}): use a Quantized(...) or Float() of quantkit.core.formats")
            if isinstance(value, Quantized) and isinstance(value.granularity, (PerChannel, PerGroup)):
                raise SchemeError(
                    f"Scheme({name}={value!r}): activations have scales PerToken() (dynamic) or PerTensor() (static)"
                )
        if len({(type(f.granularity), f.number.symmetric) for f in self._activations}) > 1:
            raise SchemeError("Scheme: all activations are static or none is, and all have a zero point or none has")

    @property
    def _activations(self) -> list[Quantized]:
        """Formats of the activations that are quantized."""
        return [f for f in (self.input, self.norm_input, self.kv, self.queries) if isinstance(f, Quantized)]

    @property
    def is_static(self) -> bool:
        """Whether activation scales are fixed at calibration."""
        return any(f.is_static for f in self._activations)

    @property
    def quantizes_attention(self) -> bool:
        """Whether keys and values, or queries and probabilities, are rounded."""
        return isinstance(self.kv, Quantized) or isinstance(self.queries, Quantized)

    @property
    def takes_threshold(self) -> bool:
        """Whether columns may leave the product at run time, where they reach a threshold."""
        return isinstance(self.input, Quantized) and self.input.takes_threshold

    def of_linear(self, *, behind_norm: bool = False) -> Scheme:
        """The part that is about one linear, which may read the output of a norm."""
        own = self.norm_input if behind_norm and self.norm_input is not None else self.input
        return Scheme(self.weight, own)

    @property
    def name(self) -> str:
        """Short name that :meth:`parse` reads back, such as ``w8a8`` or ``w4a8-static-asym-kv4``."""
        activations = self._activations
        parts = [f"w{self.weight.number.bits}a{_bits(self.input)}"]
        grouped = self.weight.granularity
        parts += [f"g{grouped.size}"] if isinstance(grouped, PerGroup) else []
        parts += ["static"] if self.is_static else []
        parts += ["asym"] if any(not f.number.symmetric for f in activations) else []
        parts += ["pertensor"] if isinstance(self.weight.granularity, PerTensor) else []
        parts += [] if self.norm_input is None else [f"norm{_bits(self.norm_input)}"]
        parts += [] if isinstance(self.kv, Float) else [f"kv{_bits(self.kv)}"]
        parts += [] if isinstance(self.queries, Float) else [f"attention{_bits(self.queries)}"]
        return "-".join(parts)

    @classmethod
    def parse(cls, scheme: str | Scheme) -> Scheme:
        """A :class:`Scheme` from itself or from a name.

        A name is ``wXaY[-gN][-static][-asym][-pertensor][-normB][-kvB][-attentionB]``: bits from 2 to 8 of weights and of what
        linears read, of what norms write, of keys and values, and of queries. With 16 bits, what linears read stays in floating
        point. With ``-gN`` a weight has a scale for each N of its input channels, and codes of up to 4 bits are stored two in a
        byte.

        Raises:
            SchemeError: it is no such name, or the formats that it names make no scheme.
        """
        if isinstance(scheme, Scheme):
            return scheme
        match = NAME.fullmatch(scheme) if isinstance(scheme, str) else None
        if match is None:
            raise SchemeError(
                f"scheme={scheme!r} is not known{did_you_mean(scheme, SCHEMES)}: pass a quantkit.Scheme or a name such as "
                "'w8a8' (dynamic per token), 'w8a8-asym', 'w8a8-static', 'w8a8-static-asym', 'w4a8', 'w6a6', 'w4a16' (weights "
                "only), 'w4a16-kv4', 'w4a4-static-asym-norm8-kv4-attention4'; None leaves the model in floating point"
            )
        weight, activation, group, static, asymmetric, per_tensor, norm, kv, attention = match.groups()

        def activations(bits: str | None) -> Format:
            if bits is None or bits == FLOAT_BITS:
                return Float()
            return Quantized(Int(int(bits), not asymmetric), PerTensor() if static else PerToken())

        try:
            made = cls(
                _weights(int(weight), group, bool(per_tensor)),
                activations(activation),
                None if norm is None else activations(norm),
                activations(kv),
                activations(attention),
            )
        except SchemeError as error:
            raise SchemeError(f"scheme={scheme!r}: {error}") from None
        if (static or asymmetric) and not made._activations:
            raise SchemeError(
                f"scheme={scheme!r}: no activation is quantized, so none is {'static' if static else 'asymmetric'}; leave that "
                "out, or add keys and values with -kv8"
            )
        return made

    def __getattr__(self, name: str) -> object:
        return old_attribute(self, name)


def _weights(bits: int, group: str | None, per_tensor: bool) -> Quantized:
    if group is None:
        return Quantized(Int(bits), PerTensor() if per_tensor else PerChannel())
    if per_tensor:
        raise SchemeError("a scale for each group and one scale for the whole weight exclude each other")
    return Quantized(Int(bits), PerGroup(int(group)), Storage.NIBBLES if bits <= 4 else Storage.BYTES)


def _bits(format: Format) -> str:
    return FLOAT_BITS if isinstance(format, Float) else str(format.number.bits)

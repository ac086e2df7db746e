"""Everything that a kernel needs to know about one quantized matrix product, as one value.

``y = x W^T + b``, where the weight is stored as codes and the activation ``x`` is rewritten and quantized on its way in. An
:class:`Operand` holds the codes with their scales and formats, the rewrite of the input, and the bias. It is frozen, and knows
no ``nn.Module``: layers hold one, backends prepare and run one, files store one, and exporters and engines may make their own.

Scales of a weight row are one *base scale*. Where groups of channels have scales of their own, each row has a whole number for
each group besides, its *multiplier*: the scale of row n in group g is ``scale[n] * multipliers[n, g]``, and sums over all
channels, multipliers included, are exact integers. In files both lie side by side in one tensor, ``weight_scale [N, 1 + G]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.core.errors import MethodError, ModelError
from quantkit.core.facts import Facts, check_exact
from quantkit.core.formats import Float, Format, PerGroup, Quantized, groups_fault
from quantkit.core.groups import shares
from quantkit.core.rewrite import Rewrite
from quantkit.core.rotation import Rotation
from quantkit.core.scheme import Scheme
from quantkit.core.tracing import in_memory

WHOLE = ("permutation", "outliers", "input_zero_point")
FLOATING = ("shift", "pre_scale", "outlier_weight", "bias")


@dataclass(frozen=True, eq=False)
class Operand:
    """One quantized matrix product. N are its output features, K its input features, G its groups, n its outlier columns.

    Attributes:
        in_features: K.
        stored: the codes as the storage of the weight's format has them, ``[N, K]`` int8 with a byte for each.
        scale: ``[N, 1]`` float32, the base scale of each row.
        weight: format of the weight.
        input: format of the activation; :class:`Float` leaves it as it is, and multiplies it by what the codes stand for.
        multipliers: ``[N, G]`` whole numbers, where the format of the weight has groups; else None. They are odd and float32
            if the input has the same groups, and int8 if only the weight has.
        input_scale: ``[1]``, or ``[G]`` where the format of the input has groups, float32; None unless it is static.
        input_zero_point: the same as int32; None unless it is static and asymmetric.
        rewrite: what is done to the activation before it is quantized.
        outlier_weight: ``[N, n]`` in the model's dtype, by which the outlier channels of the rewrite are multiplied; else None.
        bias: ``[N]`` float, or None.

    Raises:
        MethodError: shapes that do not go together.
        ModelError: K is beyond the exact range of an int32 accumulator.
    """

    in_features: int
    stored: Tensor
    scale: Tensor
    weight: Quantized = Quantized()
    input: Format = Scheme().input
    multipliers: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    rewrite: Rewrite = Rewrite()
    outlier_weight: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        fault = self._fault()
        if fault:
            raise MethodError(f"an operand of {self.out_features} x {self.in_features}: {fault}")
        check_exact(self.in_features, self.input, "operand")

    def _fault(self) -> str | None:
        n, k, groups = self.out_features, self.in_features, self.groups
        if groups and (fault := groups_fault(groups, k)):
            return fault
        wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            "stored": (self.stored, (n, self.weight.storage.width(k))),
            "scale": (self.scale, (n, 1)),
            "multipliers": (self.multipliers, (n, len(groups))),
            "input_scale": (self.input_scale, (max(1, len(self.input_groups)),)),
            "input_zero_point": (self.input_zero_point, (max(1, len(self.input_groups)),)),
            "bias": (self.bias, (n,)),
            **{name: (getattr(self.rewrite, name), (k,)) for name in ("shift", "pre_scale", "permutation")},
        }
        if (rotation := self.rewrite.rotation) is not None:
            wanted["signs"] = (rotation.signs, (k,))
        if (outliers := self.rewrite.outliers) is not None:
            wanted |= {
                "outliers": (outliers, (outliers.numel(),)),
                "outlier_weight": (self.outlier_weight, (n, outliers.numel())),
            }
        kinds = {"stored": self.weight.storage.dtype, "scale": torch.float32, "input_scale": torch.float32}
        real = in_memory(self.stored) and not self.stored.is_meta
        for name, (tensor, shape) in wanted.items():
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                return f"{name} is {list(tensor.shape)}, not {list(shape)}"
            if name in WHOLE or name in FLOATING:
                fits = tensor.dtype in (torch.int32, torch.int64) if name in WHOLE else tensor.is_floating_point()
            else:
                fits = tensor.dtype == kinds.get(name, tensor.dtype) and not tensor.is_complex()
            if not fits:
                return f"{name} is {tensor.dtype}"
            if tensor.device != self.device or tensor.layout != torch.strided:
                return f"{name} is a {tensor.layout} tensor on {tensor.device}, and its codes are on {self.device}"
            if real and not tensor.data_ptr() and tensor.numel():
                return f"{name} has no memory: its storage was given back, or never was"
        if bool(groups) != (self.multipliers is not None):
            return f"groups {groups} and multipliers go together"
        if self.input_groups not in ((), groups):
            return f"the input has groups {self.input_groups}, which are not those of the weight, {groups}"
        alone = bool(groups) and not self.input_groups and isinstance(self.input, Quantized)
        if alone and not isinstance(self.weight.granularity, PerGroup):
            return f"the weight has groups {groups} and the input has none: that takes a weight PerGroup()"
        if self.is_static != (self.input_scale is not None):
            return "a static input has an input_scale, and no other has one"
        symmetric = isinstance(self.input, Float) or self.input.number.symmetric
        if (self.is_static and not symmetric) != (self.input_zero_point is not None):
            return "a static, asymmetric input has a zero point, and no other has one"
        if (self.rewrite.outliers is None) != (self.outlier_weight is None):
            return "outlier channels and outlier_weight go together"
        if rotation is not None and (k % rotation.block or any(size % rotation.block for size in self.input_groups)):
            return f"a rotation of {rotation.block} divides neither {k} channels nor groups of {groups}"
        return None

    # ---- what it is

    @property
    def out_features(self) -> int:
        """N."""
        return self.stored.shape[0]

    @property
    def codes(self) -> Tensor:
        """``[N, K]`` int8: the codes, one in a byte."""
        return self.weight.storage.unpack(self.stored, self.in_features)

    @property
    def device(self) -> torch.device:
        return self.stored.device

    @property
    def groups(self) -> tuple[int, ...]:
        """Sizes of the groups of channels in which rows of the weight have multipliers; empty for one scale."""
        return self.weight.groups(self.in_features)

    @property
    def input_groups(self) -> tuple[int, ...]:
        """Sizes of the groups of channels in which the activation has scales of its own; empty for one scale."""
        return () if isinstance(self.input, Float) else self.input.groups(self.in_features)

    @property
    def is_static(self) -> bool:
        """Whether the scale of the activation was fixed at calibration."""
        return isinstance(self.input, Quantized) and self.input.is_static

    @property
    def scheme(self) -> Scheme:
        """The formats of a scheme that this operand has, without its groups."""
        input_ = self.input
        return Scheme(self.weight.without_groups, input_.without_groups if isinstance(input_, Quantized) else input_)

    @property
    def weight_scale(self) -> Tensor:
        """``[N, 1]``, or base scale and multipliers side by side, ``[N, 1 + G]`` float32."""
        return self.scale if self.multipliers is None else torch.cat([self.scale, self.multipliers.float()], 1)

    def dequantized(self) -> Tensor:
        """``[N, K]`` float32: what the codes stand for, in the channels of the rewritten activation."""
        if self.multipliers is None:
            return self.codes.float() * self.scale
        scale = self.scale * self.multipliers
        return self.codes.float() * scale.repeat_interleave(
            torch.tensor(self.groups, device=scale.device, dtype=torch.int64), dim=1
        )

    def matrix(self) -> Tensor:
        """``[N, K]`` float32: by what the input is multiplied if it is not rounded, with all that is done to it."""
        return self._of_input(self.dequantized(), self.outlier_weight)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """``[M, N]`` to ``[M, K]``: the gradient of the input as if nothing were rounded (straight through)."""
        given, side = gradient.float(), self.outlier_weight
        return self._of_input(given @ self.dequantized(), None if side is None else given @ side.float()).to(gradient.dtype)

    def _of_input(self, inner: Tensor, side: Tensor | None) -> Tensor:
        """``[M, K]`` in the channels of the input, of ``inner [M, K]`` and ``side [M, n]`` in those of the rewritten one."""
        inner, outliers = self.rewrite.transposed(inner), self.rewrite.outliers
        return inner if outliers is None or side is None else inner.index_add(1, outliers, side.float())

    def check_sums(self) -> None:
        """Raises MethodError where sums over groups, times their multipliers, may leave int32. Looks at all codes."""
        if self.multipliers is None or isinstance(self.input, Float):
            return
        if not self.input_groups:
            sums = torch.stack([part.abs().sum(1, dtype=torch.int64) for part in self.codes.split(self.groups, 1)], 1)
            most = int((sums * self.multipliers.long()).sum(1).amax()) if len(sums) else 0
            if most * self.input.number.reach >= 2**31:
                raise MethodError(f"codes in groups of {self.groups} and their multipliers add up to more than int32 holds")
            return
        if bool(shares(self.codes, self.weight_scale, self.groups, self.input.number.symmetric).isnan().any()):
            raise MethodError(f"codes in groups of {self.groups} and their multipliers add up to more than int32 holds")

    # ---- other operands

    def to(self, device: torch.device | str) -> Operand:
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Operand:
        def changed(value: Any) -> Any:
            if isinstance(value, Rotation):
                return value if value.signs is None else replace(value, signs=change(value.signs))
            if isinstance(value, Rewrite):
                return Rewrite(**{f.name: changed(getattr(value, f.name)) for f in fields(value)})
            return change(value) if isinstance(value, Tensor) else value

        return Operand(**{f.name: changed(getattr(self, f.name)) for f in fields(self)})

    def rows(self, index: slice | Tensor) -> Operand:
        """The product with these output features only, in this order: what one of several devices computes, or q of q, k and v.

        The bits are those of the whole, but for one case: where the input has groups and a scale for each token, its base scale
        depends on how much room the weight's rows take up in int32, and some rows may take up less than all.

        Args:
            index: a slice, or ``[m]`` int64.
        """

        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index]

        return replace(
            self,
            stored=self.stored[index],
            scale=self.scale[index],
            multipliers=some(self.multipliers),
            outlier_weight=some(self.outlier_weight),
            bias=some(self.bias),
        )

    def columns(self, start: int, stop: int) -> Operand:
        """The product of input features from ``start`` up to ``stop`` only, without the bias: a share of the whole sum.

        The shares of all columns add up to the whole product, but for the rounding of activations whose scale is found at run
        time: each share finds its own.

        Raises:
            MethodError: channels change places with others outside, or the borders cut through a rotation or a group.
        """
        if not 0 <= start < stop <= self.in_features:
            raise MethodError(f"columns({start}, {stop}): there are input features from 0 to {self.in_features}")
        weight, input_, kept = self.weight, self.input, slice(None)
        if self.groups:
            kept, sizes = _groups_between(self.groups, start, stop)
            if not isinstance(weight.granularity, PerGroup):
                weight = weight.without_groups.in_groups(sizes)
            elif start % weight.granularity.size:
                raise MethodError(f"columns({start}, {stop}): this cuts through a group of {weight.granularity.size} channels")
            if self.input_groups and isinstance(input_, Quantized):
                input_ = input_.without_groups.in_groups(sizes)
        of_input = kept if self.input_groups else slice(None)
        outliers, side = self.rewrite.outliers, self.outlier_weight
        if outliers is not None and side is not None:
            side = side[:, (outliers >= start) & (outliers < stop)]
        return Operand(
            in_features=stop - start,
            stored=weight.storage.pack(self.codes[:, start:stop]),
            scale=self.scale,
            weight=weight,
            input=input_,
            multipliers=None if self.multipliers is None else self.multipliers[:, kept],
            input_scale=None if self.input_scale is None else self.input_scale[of_input],
            input_zero_point=None if self.input_zero_point is None else self.input_zero_point[of_input],
            rewrite=self.rewrite.columns(start, stop),
            outlier_weight=side,
        )

    # ---- files and layers

    @property
    def facts(self) -> Facts:
        """What is not in its tensors."""
        rotation = self.rewrite.rotation
        return Facts(
            self.in_features,
            self.out_features,
            self.scheme,
            () if isinstance(self.weight.granularity, PerGroup) else self.groups,
            None if rotation is None else rotation.block,
            self.rewrite.threshold,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, by their names in files and layers (:data:`TENSORS`)."""
        rewrite = self.rewrite
        found = {
            "weight": self.stored,
            **_scale_tensors(self.weight, self.weight_scale),
            "bias": self.bias,
            "input_scale": self.input_scale,
            "input_zero_point": self.input_zero_point,
            "pre_scale": rewrite.pre_scale,
            "shift": rewrite.shift,
            "permutation": rewrite.permutation,
            "rotation_signs": None if rewrite.rotation is None else rewrite.rotation.signs,
            "outlier_index": rewrite.outliers,
            "outlier_weight": self.outlier_weight,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def of(cls, facts: Facts, tensors: Mapping[str, Tensor | None]) -> Operand:
        """From what :attr:`facts` and :meth:`tensors` gave; the tensors are used, not copied."""
        weight, groups = facts.scheme.weight, facts.groups
        scale, stored = tensors.get("weight_scale"), tensors.get("weight")
        if scale is None or stored is None:
            raise ModelError(f"an INT8 layer has no {'weight' if stored is None else 'weight_scale'}: somebody took it away")
        input_ = facts.scheme.input
        rotation = None if facts.rotation_block is None else Rotation(facts.rotation_block, tensors.get("rotation_signs"))
        return cls(
            in_features=facts.in_features,
            stored=stored,
            scale=scale[:, :1],
            weight=weight.in_groups(groups),
            input=input_.in_groups(groups) if isinstance(input_, Quantized) else input_,
            multipliers=scale[:, 1:] if groups else tensors.get("weight_multipliers"),
            input_scale=tensors.get("input_scale"),
            input_zero_point=tensors.get("input_zero_point"),
            rewrite=Rewrite(
                shift=tensors.get("shift"),
                outliers=tensors.get("outlier_index"),
                pre_scale=tensors.get("pre_scale"),
                permutation=tensors.get("permutation"),
                rotation=rotation,
                threshold=facts.threshold,
            ),
            outlier_weight=tensors.get("outlier_weight"),
            bias=tensors.get("bias"),
        )


def weight_tensors(own: Quantized, codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The tensors of a weight, by their names in files and layers.

    Args:
        own: its format.
        codes: ``[N, K]`` int8, one in a byte.
        scale: ``[N, 1]`` float32; with groups ``[N, 1 + G]``, a base scale and multipliers.
    """
    return {"weight": own.storage.pack(codes), **_scale_tensors(own, scale)}


def _scale_tensors(own: Quantized, scale: Tensor) -> dict[str, Tensor]:
    if not isinstance(own.granularity, PerGroup):
        return {"weight_scale": scale}
    return {"weight_scale": scale[:, :1].contiguous(), "weight_multipliers": scale[:, 1:].to(torch.int8)}


def empty_operand(
    facts: Facts,
    *,
    bias: bool = False,
    optional: Sequence[str] = (),
    outliers: int = 0,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Operand:
    """An operand of these facts with room for its values: codes of 0, scales of 1.

    Args:
        facts: what it is.
        bias: whether it has one.
        optional: which of :data:`OPTIONAL` it has.
        outliers: columns that stay outside of the integer product.
        device: of all tensors.
        dtype: of bias and ``outlier_weight``.
    """
    k, n, g = facts.in_features, facts.out_features, len(facts.groups)
    input_, storage = facts.scheme.input, facts.scheme.weight.storage
    static = isinstance(input_, Quantized) and input_.is_static
    zero = static and isinstance(input_, Quantized) and not input_.number.symmetric
    where: dict[str, Any] = {"device": device}
    apart = len(facts.scheme.weight.groups(k)) if isinstance(facts.scheme.weight.granularity, PerGroup) else 0
    tensors: dict[str, Tensor | None] = {
        "weight_multipliers": torch.ones(n, apart, dtype=torch.int8, **where) if apart else None,
        "weight": torch.zeros(n, storage.width(k), dtype=storage.dtype, **where),
        "weight_scale": torch.ones(n, 1 + g, dtype=torch.float32, **where),
        "bias": torch.zeros(n, dtype=dtype, **where) if bias else None,
        "input_scale": torch.ones(max(1, g), dtype=torch.float32, **where) if static else None,
        "input_zero_point": torch.zeros(max(1, g), dtype=torch.int32, **where) if zero else None,
    }
    room = {
        "pre_scale": ((k,), torch.float32),
        "shift": ((k,), torch.float32),
        "permutation": ((k,), torch.int64),
        "rotation_signs": ((k,), torch.float32),
        "outlier_index": ((outliers,), torch.int64),
        "outlier_weight": ((n, outliers), dtype),
    }
    tensors |= {name: torch.zeros(shape, dtype=kind, **where) for name, (shape, kind) in room.items() if name in optional}
    return Operand.of(facts, tensors)


def _groups_between(groups: tuple[int, ...], start: int, stop: int) -> tuple[slice, tuple[int, ...]]:
    """Which of the groups lie between two channels, and their sizes there; a group may be cut."""
    first, sizes, at = None, [], 0
    for index, size in enumerate(groups):
        inside = min(at + size, stop) - max(at, start)
        if inside > 0:
            first = index if first is None else first
            sizes.append(inside)
        at += size
    assert first is not None
    return slice(first, first + len(sizes)), tuple(sizes)

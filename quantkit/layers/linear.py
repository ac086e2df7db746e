"""The module that quantkit puts in place of linears. It holds one operand and lets the kernels run it.

All arithmetic is elsewhere: :mod:`quantkit.core.operand` says what the product is, :mod:`quantkit.ops` computes it. This
module is what PyTorch needs besides: buffers that move with the model and are saved with it, and a ``forward``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.deprecated import renamed
from quantkit.core.errors import MethodError, QuantkitError
from quantkit.core.facts import FLOAT32, TENSORS, Facts, check_exact
from quantkit.core.formats import Format, Quantized, groups_fault
from quantkit.core.numerics import absmax_scale, range_scale
from quantkit.core.operand import Operand, empty_operand, weight_tensors
from quantkit.core.scheme import Scheme
from quantkit.core.tracing import apart, not_compiled_alone
from quantkit.core.transform import Transform
from quantkit.core.validity import value_fault
from quantkit.model.modules import applied_but_float32, weight_of
from quantkit.ops.linear import linear, prepare
from quantkit.ops.table import Prepared, forced

PLACEHOLDER = "placeholder"
"""The name of a parameter without elements, see :func:`placeholder`."""
METADATA = "quantkit"
"""Where the metadata of a ``state_dict()`` says what a layer is."""


def placeholder(dtype: torch.dtype | None, device: torch.device) -> nn.Parameter:
    """What an INT8 layer has for a parameter: empty, in the dtype and on the device of the model.

    Code around a layer asks ``next(part.parameters())`` for them, as ``model.dtype`` of transformers does. With two dimensions,
    since a vector for each channel is the sign of a norm.
    """
    return nn.Parameter(torch.empty(0, 0, dtype=dtype, device=device), requires_grad=False)


class W8A8Linear(nn.Linear):
    """``y = x W^T + b`` with INT8 weights and INT8 activations.

    The activation is rewritten by what could not be folded into its producer (usually nothing), quantized per token (or with
    the static scale), multiplied exactly in int32, and rescaled in float32 to the dtype of ``x``. Where the scheme leaves
    activations in floating point, the activation is multiplied by :meth:`dequantized_weight` in float32.

    Args:
        in_features, out_features: K and N.
        scheme: number formats, W8A8 if left out.
        bias: whether there is one.
        groups: sizes of G groups of consecutive channels, each with scales of its own; none for one scale for all channels.
        device, dtype: of the bias and of the side product.

    Attributes:
        operand: all of it as one value, see :class:`quantkit.core.operand.Operand`.
        rotation_block: channels of a block of the rotation, 0 for none.
        threshold: columns that reach this value anywhere in a batch are multiplied without rounding, 0 for never.
        groups: as given; never a single one.

    Buffers:
        weight: ``[N, K]`` int8, or as the storage of the weight's format has it. weight_scale: ``[N, 1]`` float32; with groups
            ``[N, 1 + G]``, a base scale and multipliers. weight_multipliers: ``[N, G]`` int8 where only the weight has groups.
        bias: ``[N]`` float or None.
        input_scale, input_zero_point: ``[1]`` (``[G]``) float32 and int32, static schemes only.
        pre_scale: ``[K]`` float32 or None, ``1 / s`` of a scale that no producer could take.
        shift, permutation, rotation_signs: ``[K]`` or None, see :class:`quantkit.Transform`.
        outlier_index ``[n]`` int64, outlier_weight ``[N, n]``, in the model's dtype: columns outside of the INT8 product.

    Parameters:
        placeholder: an empty one that answers for the dtype and the device of the model. It is in no state dict.

    Raises:
        ModelError: K is beyond the exact range of an int32 accumulator.
        MethodError: groups that are not sizes which sum to K.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_multipliers: Tensor | None
    bias: Tensor | None  # type: ignore[assignment]
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    pre_scale: Tensor | None
    shift: Tensor | None
    permutation: Tensor | None
    rotation_signs: Tensor | None
    outlier_index: Tensor | None
    outlier_weight: Tensor | None
    placeholder: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scheme: Scheme | None = None,
        bias: bool = True,
        groups: tuple[int, ...] = (),
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        scheme = scheme or Scheme()
        check_exact(in_features, scheme.input, "W8A8Linear")
        fault = groups_fault(groups, in_features) if groups else None
        if fault:
            raise MethodError(f"W8A8Linear: {fault}")
        facts = Facts(in_features, out_features, scheme, tuple(groups) if len(groups) > 1 else ())
        self._hold(empty_operand(facts, bias=bias, device=device, dtype=dtype), dtype)

    @classmethod
    def from_operand(cls, operand: Operand, dtype: torch.dtype | None = None) -> W8A8Linear:
        """A layer that holds ``operand``; its tensors are used, not copied.

        Args:
            operand: what is run.
            dtype: of the model; left out, that of the bias.
        """
        layer = cls.__new__(cls)
        layer._hold(operand, dtype)
        return layer

    @classmethod
    def from_float(
        cls,
        linear: nn.Module,
        *,
        scheme: Scheme | None = None,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        leftover: Transform | None = None,
        outlier_weight: Tensor | None = None,
        input_range: tuple[Tensor, Tensor] | None = None,
    ) -> W8A8Linear:
        """A W8A8Linear in place of ``linear``.

        Args:
            linear: the ``nn.Linear`` or ``Conv1D`` to stand in for; gives dtype and device.
            scheme: number formats, W8A8 if left out.
            codes, weight_scale: ``[N, K]`` int8 and ``[N, 1]`` (``[N, 1 + G]``) float32 of the transformed weight.
            bias: ``[N]`` float32 or None, after the transformation.
            leftover: what is done to the activation at run time, and its groups.
            outlier_weight: ``[N, n]``, with ``leftover.outliers``.
            input_range: for static schemes, minimum and maximum of the transformed activation, or of each group ``[G]``.

        Raises:
            MethodError: sums of groups may leave int32.
        """
        like, leftover, scheme = weight_of(linear), leftover or Transform(), scheme or Scheme()
        facts = Facts(
            like.shape[1],
            like.shape[0],
            scheme,
            (leftover.groups or ()) if len(leftover.groups or ()) > 1 else (),
            None if leftover.rotation is None else leftover.rotation.block,
            leftover.threshold,
        )

        def own(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
            """A copy: linears of one site get one transform, and save_pretrained refuses tensors that are shared."""
            return None if tensor is None else tensor.to(like.device, dtype or tensor.dtype, copy=True)

        signs = None if leftover.rotation is None else leftover.rotation.signs
        tensors = {
            **{name: own(t) for name, t in weight_tensors(scheme.weight, codes.to(torch.int8), weight_scale.float()).items()},
            "bias": own(bias, like.dtype),
            **{name: own(t) for name, t in _static_input(scheme.input, input_range, max(1, len(facts.groups))).items()},
            # The side product sees channels before their scale, so its weight takes the scale back.
            "outlier_weight": None if leftover.outliers is None else own(outlier_weight, like.dtype),
            "outlier_index": own(leftover.outliers),
            "shift": own(leftover.shift),
            "permutation": own(leftover.permutation),
            "pre_scale": None if leftover.scale is None else own(1.0 / leftover.scale.float()),
            "rotation_signs": own(signs, torch.float32),
        }
        operand = Operand.of(facts, tensors)
        operand.check_sums()
        layer = cls.from_operand(operand, like.dtype)
        layer.train(linear.training)
        return layer

    def _hold(self, operand: Operand, dtype: torch.dtype | None) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a float weight
        self.in_features, self.out_features = operand.in_features, operand.out_features
        self._facts = operand.facts
        tensors = operand.tensors()
        for name in TENSORS:
            self.register_buffer(name, tensors.get(name))
        dtype = dtype if operand.bias is None else operand.bias.dtype
        self.register_parameter(PLACEHOLDER, placeholder(dtype, operand.device))
        self._operand: Operand | None = None
        self._prepared: tuple[Prepared, str | None] | None = None  # with the backend that was asked for

    # ---- what it holds

    @property
    def operand(self) -> Operand:
        """The buffers and what they mean, as one value. Made again when a buffer was replaced."""
        known = self._operand
        weight: Any = self._buffers["weight"]
        if known is None or known.stored is not weight:
            known = apart(weight, Operand.of, self._facts, self._buffers)
            if type(weight) is Tensor:  # no fake one, which stands here for a while
                self._operand = known
        return known

    @property
    def scheme(self) -> Scheme:
        """Number formats of weight and input."""
        return self._facts.scheme

    @property
    def groups(self) -> tuple[int, ...]:
        return self._facts.groups

    @property
    def rotation_block(self) -> int:
        return self._facts.rotation_block or 0

    @rotation_block.setter
    def rotation_block(self, block: int) -> None:
        self._facts = replace(self._facts, rotation_block=block or None)
        self._forget()

    @property
    def threshold(self) -> float:
        return self._facts.threshold or 0.0

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        self._facts = replace(self._facts, threshold=threshold or None)
        self._forget()

    @property
    def rewrites_input(self) -> bool:
        """Whether anything is done to the activation before it is quantized, beside a threshold."""
        return bool(set(self.operand.rewrite.steps) - {"threshold"})

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in TENSORS:
            self._forget()
            if name in ("weight", "bias") and value is not None:  # what is loaded may have another dtype and device
                dtype = value.dtype if name == "bias" else self.placeholder.dtype
                self._parameters[PLACEHOLDER] = placeholder(dtype, value.device)

    def _forget(self) -> None:
        """A buffer is another one: what was made of it is out of date."""
        self._operand = self._prepared = None

    # ---- what it does

    def forward(self, input: Tensor) -> Tensor:
        """``[..., K]`` floating point to ``[..., N]`` in the same dtype. Rows with NaN or Inf come out as NaN.

        With activations in floating point, as after any product of floats: infinities may stay such.
        """
        return linear(self.prepared, input)

    @property
    @not_compiled_alone
    def prepared(self) -> Prepared:
        """The operand as the backend of its device runs it, made at first use."""
        # not self.weight: Module.__getattr__ costs a microsecond, of which a token has few
        known, asked = self._prepared, forced()
        if known is None or known[1] != asked or known[0].operand.stored is not self._buffers["weight"]:
            weight: Any = self._buffers["weight"]
            known = apart(weight, prepare, self.operand), asked
            if type(weight) is Tensor:
                self._prepared = known  # at once: other threads may be here, with another backend
        return known[0]

    packed = renamed("W8A8Linear.packed", "prepared")

    def prepare_input(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is quantized ``[M, K]`` (float) and the side product's input ``[M, n]`` of ``x [M, K]``."""
        return self.operand.rewrite.apply(x)

    def dequantized_weight(self) -> Tensor:
        """``[N, K]`` float32: what the integers stand for, in the channels of the rewritten activation."""
        return self.operand.dequantized()

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The ``nn.Linear`` that computes the same but for the rounding of activations, in ``dtype`` (default: float32)."""
        operand = self.operand
        weight = operand.matrix()
        linear = nn.Linear(self.in_features, self.out_features, bias=operand.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(dtype or torch.float32), requires_grad=False)
        if operand.bias is not None:
            shift = operand.rewrite.shift
            bias = operand.bias.float() if shift is None else operand.bias.float() - weight @ shift
            linear.bias = nn.Parameter(bias.to(dtype or torch.float32), requires_grad=False)
        return linear.train(self.training)

    # ---- what PyTorch does with it

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_operand": None, "_prepared": None}  # a copy prepares its own

    def _apply(self, fn: Any, recurse: bool = True) -> W8A8Linear:
        applied_but_float32(self, fn, self._buffers.keys() & FLOAT32)
        self._forget()
        return self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The placeholder. Without recursion nothing: whoever asks so, as accelerate, looks it up in a state dict."""
        return super().named_parameters(prefix, recurse, remove_duplicate) if recurse else iter(())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + PLACEHOLDER]
        if hasattr(destination, "_metadata"):  # what tensors do not say; torch.save keeps it, and safetensors do not
            destination._metadata.setdefault(prefix[:-1], {})[METADATA] = self._facts.record(*self._held(self._buffers))

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, strict: bool, *rest: Any) -> None:
        """Takes what belongs to this layer, after a look at whether it does: another layer's would load just as well."""
        codes = state.get(f"{prefix}weight")
        if codes is not None and codes.shape[2:] == (1,):  # as files hold them
            state[f"{prefix}weight"] = codes.flatten(1)
        saved = {name: t for name in TENSORS if isinstance(t := state.get(prefix + name), Tensor)}
        fault = self._foreign(saved, metadata.get(METADATA)) if saved else None
        if saved and not fault and (damage := self.damage_in(saved)):
            rest[-1].append(f"{prefix[:-1]!r} cannot hold this state, which is damaged: {damage}")
            return
        if fault:
            rest[-1].append(
                f"{prefix[:-1]!r} is quantized, and the state is not that of a layer quantized in the same way: {fault}"
            )
            return
        for name, tensor in saved.items():  # optional ones that a fresh module lacks, or has in another size
            if (own := self._buffers[name]) is None or own.shape != tensor.shape:
                setattr(self, name, torch.empty_like(tensor, device=self.weight.device))
        state[prefix + PLACEHOLDER] = self.placeholder  # which no state has
        super()._load_from_state_dict(state, prefix, metadata, strict, *rest)
        self._forget()

    def damage_in(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What is wrong with the values of ``tensors``, whose shapes and types fit this layer; None if nothing is."""
        held = {name: tensors.get(name) for name in TENSORS} | {"weight": tensors["weight"].flatten(1)}
        return value_fault(Operand.of(self._facts, held))

    def _foreign(self, saved: dict[str, Tensor], record: dict[str, Any] | None) -> str | None:
        """What speaks against these tensors, which were of a layer with this ``record``, if it is known."""
        names, outliers = self._held(saved)
        wanted = self._facts.record(names, outliers)
        if record is not None and record != wanted:
            differ = [key for key in wanted if record.get(key) != wanted[key]]
            return "; ".join(f"its {key} is {record.get(key)!r}, not {wanted[key]!r}" for key in differ)
        try:
            room = empty_operand(
                self._facts, bias="bias" in saved, optional=names, outliers=outliers, device="meta", dtype=torch.float32
            ).tensors()
        except QuantkitError as error:
            return str(error)
        for name, tensor in saved.items():
            if name not in room:
                return f"it has {name}, for which a layer of scheme {self.scheme.name} has no use"
            if tensor.shape != room[name].shape:
                return f"size mismatch for {name}: {list(tensor.shape)}, not {list(room[name].shape)}"
            if tensor.dtype != room[name].dtype and (name in FLOAT32 or not tensor.is_floating_point()):
                return f"its {name} is {tensor.dtype}, not {room[name].dtype}"
        lost = [name for name in TENSORS if self._buffers[name] is not None and name not in saved]
        return f"it has no {' and no '.join(lost)}" if lost else None

    @staticmethod
    def _held(tensors: Mapping[str, Tensor | None]) -> tuple[list[str], int]:
        """Names of the tensors that are there, and the number of outlier channels."""
        outliers = tensors.get("outlier_index")
        return [name for name in TENSORS if tensors.get(name) is not None], 0 if outliers is None else len(outliers)

    def extra_repr(self) -> str:
        operand, facts = self.operand, self._facts
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}", f"bias={operand.bias is not None}"]
        parts.append(f"scheme={self.scheme.name}")
        rewrite = operand.rewrite
        extra = [name for name in ("shift", "pre_scale", "permutation") if getattr(rewrite, name) is not None]
        extra += [f"rotation({facts.rotation_block})"] if facts.rotation_block else []
        extra += [f"outliers({len(rewrite.outliers)})"] if rewrite.outliers is not None else []
        parts += [f"groups={self.groups}"] if self.groups else []
        extra += [f"threshold({self.threshold:g})"] if self.threshold else []
        if extra:
            parts.append(f"at run time: {'+'.join(extra)}")
        return ", ".join(parts)


def _static_input(input_: Format, ends: tuple[Tensor, Tensor] | None, groups: int) -> dict[str, Tensor]:
    """Scales and zero points of so many ``groups``, from least and largest values; nothing for a dynamic format."""
    if not isinstance(input_, Quantized) or not input_.is_static:
        return {}
    assert ends is not None
    low, high = (end.view(-1).expand(groups) for end in ends)
    if input_.number.symmetric:
        return {"input_scale": absmax_scale(torch.maximum(-low, high), input_.number.bits)}
    scale, zero = range_scale(low, high, input_.number.bits)
    return {"input_scale": scale, "input_zero_point": zero}

"""The module that quantkit puts in place of linears: it multiplies INT8 by INT8."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from quantkit import ops
from quantkit.core.errors import MethodError, ModelError
from quantkit.core.numerics import MAX_EXACT_K, MAX_EXACT_K_ASYMMETRIC, absmax_scale, of_clusters, range_scale, shares
from quantkit.core.rotation import Rotation
from quantkit.core.scheme import Scheme
from quantkit.core.transform import Transform, groups_fault
from quantkit.model.modules import applied_but_float32, weight_of

log = logging.getLogger("quantkit")


class W8A8Linear(nn.Linear):
    """``y = x W^T + b`` with INT8 weights and INT8 activations.

    The activation is rewritten by what could not be folded into its producer (usually nothing), quantized per
    token (or with the static scale), multiplied exactly in int32, and rescaled in float32 to the dtype of ``x``. Where the
    scheme leaves activations in floating point, it is multiplied by :meth:`dequantized_weight` in float32.

    Args:
        in_features, out_features: K and N.
        scheme: number formats.
        bias: whether there is one.
        groups: sizes of G clusters of consecutive channels, each with scales of its own; none for one of all channels.
        device, dtype: of the bias and of the side product.

    Attributes:
        rotation_block: channels of a block of the rotation, 0 for none.
        threshold: columns that reach this value anywhere in a batch are multiplied without rounding, 0 for never.
        groups: as given; never a single one.

    Buffers:
        weight: ``[N, K]`` int8. weight_scale: ``[N, 1]`` float32, ``[N, 1 + G]`` with groups, a unit and multiples of it.
        bias: ``[N]`` float or None.
        input_scale, input_zero_point: ``[1]`` (``[G]``) float32 and int32, static schemes only.
        pre_scale: ``[K]`` float32 or None, ``1 / s`` of a scale that no producer could take.
        shift, permutation, rotation_signs: ``[K]`` or None, see :class:`quantkit.Transform`.
        outlier_index ``[n]`` int64, outlier_weight ``[N, n]``, in the model's dtype: columns outside of the INT8 product.

    Raises:
        ModelError: K is beyond the exact range of an int32 accumulator.
        MethodError: groups that are not sizes which sum to K.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None  # type: ignore[assignment]
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    pre_scale: Tensor | None
    shift: Tensor | None
    permutation: Tensor | None
    rotation_signs: Tensor | None
    outlier_index: Tensor | None
    outlier_weight: Tensor | None

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
        nn.Module.__init__(self)  # not nn.Linear's, which would make a float weight
        scheme = scheme or Scheme()
        check_exact(in_features, scheme, "W8A8Linear")
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.rotation_block = 0
        self.threshold = 0.0
        fault = groups_fault(groups, in_features) if groups else None
        if fault:
            raise MethodError(f"W8A8Linear: {fault}")
        self.groups = tuple(groups) if len(groups) > 1 else ()
        count, width = max(1, len(self.groups)), 1 + len(self.groups)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(out_features, width, device=device, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=dtype) if bias else None)
        static = torch.ones(count, device=device, dtype=torch.float32) if scheme.is_static else None
        self.register_buffer("input_scale", static)
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
        zero = zeros if scheme.is_static and not scheme.symmetric else None
        self.register_buffer("input_zero_point", zero)
        for name in ("pre_scale", "shift", "permutation", "rotation_signs", "outlier_index", "outlier_weight"):
            self.register_buffer(name, None)
        self._packed: Any = None
        self._packed_for: str | None = None
        self._register_load_state_dict_pre_hook(self._make_room)

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
            linear: the ``nn.Linear`` or ``Conv1D`` to stand in for; gives dtype, device and sizes.
            scheme: number formats.
            codes, weight_scale: ``[N, K]`` int8 and ``[N, 1]`` (``[N, 1 + G]``) float32 of the transformed weight.
            bias: ``[N]`` float32 or None, after the transformation.
            leftover: what is done to the activation at run time, and its clusters.
            outlier_weight: ``[N, n]``, with ``leftover.outliers``.
            input_range: for static schemes, minimum and maximum of the transformed activation, or of each cluster ``[G]``.

        Raises:
            MethodError: sums of clusters may leave int32.
        """
        rows, channels = weight_of(linear).shape
        like = weight_of(linear)
        leftover = leftover or Transform()
        groups, where = leftover.groups or (), {"device": like.device, "dtype": like.dtype}
        new = cls(channels, rows, scheme=scheme, bias=bias is not None, groups=groups, **where)  # type: ignore[arg-type]
        new.train(linear.training)
        new.weight.copy_(codes)
        new.weight_scale.copy_(weight_scale)
        if new.groups and bool(shares(new.weight, new.weight_scale, new.groups, new.scheme.symmetric).isnan().any()):
            raise MethodError(
                f"W8A8Linear: codes in clusters of {new.groups} and their multiples add up to more than int32 holds"
            )
        if bias is not None and new.bias is not None:
            new.bias.copy_(bias)
        if new.scheme.is_static:
            assert input_range is not None
            new._set_static_range(*input_range)
        new._set_leftover(leftover, outlier_weight, like)
        return new

    def _set_static_range(self, low: Tensor, high: Tensor) -> None:
        assert self.input_scale is not None
        if self.input_zero_point is None:
            absmax = torch.maximum(-low, high).view(-1)
            self.input_scale.copy_(absmax_scale(absmax, self.scheme.activation_bits))
        else:
            scale, zero = range_scale(low.view(-1), high.view(-1), self.scheme.activation_bits)
            self.input_scale.copy_(scale)
            self.input_zero_point.copy_(zero)

    def _set_leftover(self, leftover: Transform, outlier_weight: Tensor | None, like: Tensor) -> None:
        def own(tensor: Tensor | None) -> Tensor | None:
            """Linears of one site get one transform, and formats without aliases (save_pretrained) refuse shared tensors."""
            return None if tensor is None else tensor.to(like.device, copy=True)

        self.shift, self.permutation = own(leftover.shift), own(leftover.permutation)
        self.pre_scale = None if leftover.scale is None else own(1.0 / leftover.scale.float())
        self.outlier_index = own(leftover.outliers)
        if self.outlier_index is not None:
            assert outlier_weight is not None
            # The side product sees the channel before the scale, so its weight takes the scale back.
            self.outlier_weight = outlier_weight.to(like.dtype)
        self.threshold = leftover.threshold or 0.0
        if leftover.rotation is not None:
            self.rotation_block = leftover.rotation.block
            signs = leftover.rotation.signs
            self.rotation_signs = None if signs is None else own(signs.float())

    def reorder_rows(self, source: Tensor) -> None:
        """Put the output rows ``source [n]`` int64 in the place of the first n, in place."""
        for rows in (self.weight, self.weight_scale, self.bias, self.outlier_weight):
            if rows is not None:
                rows[: len(source)] = rows[source.to(rows.device)]
        self._packed = None

    @property
    def rewrites_input(self) -> bool:
        """Whether anything is done to the activation before it is quantized."""
        rewrites = (self.pre_scale, self.shift, self.permutation, self.outlier_index)
        return self.rotation_block > 0 or any(v is not None for v in rewrites)

    def prepare_input(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The INT8 side ``[M, K]`` (float) and the side product's input ``[M, n]`` of ``x [M, K]``."""
        dtype = x.dtype
        if self.shift is not None:
            x = x - self.shift  # float32: bf16 would round the difference
        side = None if self.outlier_index is None else x.index_select(1, self.outlier_index).to(dtype)
        if self.pre_scale is not None:
            x = x * self.pre_scale  # float32: bf16 would round the scale
        if self.outlier_index is not None:
            x = x.index_fill(1, self.outlier_index, 0.0)
        if self.permutation is not None:
            x = x.index_select(1, self.permutation)
        if self.rotation_block:
            if torch.compiler.is_compiling():
                x = torch.ops.quantkit.rotate(x.float(), self.rotation_block, self.rotation_signs)
            else:
                x = Rotation(self.rotation_block, self.rotation_signs).apply(x.float())
        return x, side

    def forward(self, input: Tensor) -> Tensor:
        """``[..., K]`` floating point to ``[..., N]`` in the same dtype. Rows with NaN or Inf come out as NaN.

        With activations in floating point, as after any product of floats: infinities may stay such.
        """
        return ops.linear(self, input.reshape(-1, self.in_features)).view(*input.shape[:-1], self.out_features)

    def dequantized_weight(self) -> Tensor:
        """``[N, K]`` float32: what the integers stand for, in the channels of the rewritten activation."""
        scale = of_clusters(self.weight_scale)
        if self.groups:
            scale = scale.repeat_interleave(torch.tensor(self.groups, device=scale.device), dim=1)
        return self.weight.float() * scale

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The ``nn.Linear`` that computes the same but for the rounding of activations, in ``dtype`` (default: float32)."""
        weight = self.input_gradient(torch.eye(self.out_features, device=self.weight.device))
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(dtype or torch.float32), requires_grad=False)
        if self.bias is not None:
            bias = self.bias.float() if self.shift is None else self.bias.float() - weight @ self.shift
            linear.bias = nn.Parameter(bias.to(dtype or torch.float32), requires_grad=False)
        return linear.train(self.training)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """``[M, N]`` to ``[M, K]``: the gradient as if nothing were rounded (straight through), step by step backwards."""
        inner = gradient.float() @ self.dequantized_weight()
        if self.rotation_block:
            inner = Rotation(self.rotation_block).apply(inner)  # symmetric but for the signs
            inner = inner if self.rotation_signs is None else inner * self.rotation_signs
        if self.permutation is not None:
            inner = inner.index_select(1, self.permutation.argsort())
        if self.pre_scale is not None:
            inner = inner * self.pre_scale
        if self.outlier_index is not None:
            assert self.outlier_weight is not None
            inner = inner.index_add(1, self.outlier_index, gradient.float() @ self.outlier_weight.float())
        return inner.to(gradient.dtype)

    @property
    def packed(self) -> Any:
        """The weight as the backend of its device wants it, made at first use."""
        # not self.weight: Module.__getattr__ costs a microsecond, of which a token has few
        forced = ops.forced()
        if self._packed is None or self._packed.weight is not self._buffers["weight"] or self._packed_for != forced:
            self._packed, self._packed_for = ops.pack(self), forced
        return self._packed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # a copy packs its own weight

    def _apply(self, fn: Any, recurse: bool = True) -> W8A8Linear:
        applied_but_float32(self, fn, self._buffers.keys() - {"bias", "outlier_weight"})
        self._packed = None
        return self

    def _make_room(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Optional buffers that the checkpoint has and a fresh module lacks."""
        self._packed = None
        for name, buffer in list(self._buffers.items()):
            saved = state.get(prefix + name)
            if saved is not None and (buffer is None or buffer.shape != saved.shape) and not name.startswith("weight"):
                setattr(self, name, torch.empty_like(saved, device=self.weight.device))

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}", f"bias={self.bias is not None}"]
        parts.append(f"scheme={self.scheme.name}")
        names = ("shift", "pre_scale", "permutation")
        extra = [n for n in names if getattr(self, n) is not None]
        extra += [f"rotation({self.rotation_block})"] if self.rotation_block else []
        extra += [f"outliers({len(self.outlier_index)})"] if self.outlier_index is not None else []
        parts += [f"groups={self.groups}"] if self.groups else []
        extra += [f"threshold({self.threshold:g})"] if self.threshold else []
        if extra:
            parts.append(f"at run time: {'+'.join(extra)}")
        return ", ".join(parts)


def check_exact(channels: int, scheme: Scheme, name: str) -> None:
    """Raises ModelError where an int32 accumulator of ``channels`` products could overflow."""
    limit = MAX_EXACT_K if scheme.symmetric else MAX_EXACT_K_ASYMMETRIC
    if channels > limit:
        raise ModelError(
            f"{name}: K = {channels} input features are beyond {limit}, up to which int32 sums of {scheme.name} products are "
            f"exact; leave the layer in floating point with ignore=[{name!r}]"
        )

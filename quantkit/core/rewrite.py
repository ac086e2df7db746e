"""What is done to an activation before it is quantized, as data and in plain torch.

A calibrator may decide that the channels of an activation are shifted, scaled, put in another order or rotated, and that some
of them stay out of the integer product. What of that cannot be written into the module that produces the activation is done at
run time: this is a :class:`Rewrite`. :func:`rewritten` is the one definition of it, also for the
:class:`~quantkit.core.transform.Transform` that calibrators return; kernels do the same in fewer passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from quantkit.core.errors import MethodError
from quantkit.core.rotation import Rotation


def rewritten(
    x: Tensor,
    *,
    shift: Tensor | None = None,
    outliers: Tensor | None = None,
    scaled: Callable[[Tensor], Tensor] | None = None,
    permutation: Tensor | None = None,
    rotated: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The steps of a rewrite, in the only order in which they are ever done.

    Args:
        x: ``[..., K]``.
        shift: ``[K]``, subtracted.
        outliers: ``[n]`` int64, channels that are taken aside, before the scale, and are 0 from then on.
        scaled: what else happens to each channel.
        permutation: ``[K]`` int64: channel i is then what ``permutation[i]`` was.
        rotated: what mixes the channels at last.

    Returns:
        what is quantized ``[..., K]``, and what was taken aside ``[..., n]``, with NaN for infinities; None without outliers.
    """
    if shift is not None:
        x = x - shift
    # Infinities become NaN, for a product of floats could leave them as they are, and no other channel does.
    aside = None if outliers is None else x.index_select(-1, outliers).nan_to_num(math.nan, math.nan, math.nan)
    if scaled is not None:
        x = scaled(x)
    if outliers is not None:
        x = x.index_fill(-1, outliers, 0.0)
    if permutation is not None:
        x = x.index_select(-1, permutation)
    return (x if rotated is None else rotated(x)), aside


@dataclass(frozen=True, eq=False)
class Rewrite:
    """What happens to an activation ``[M, K]`` at run time. Every field is optional; their order is that of the steps.

    Attributes:
        shift: ``[K]`` float32, subtracted.
        outliers: ``[n]`` int64, channels that are multiplied in floating point, beside the integer product.
        pre_scale: ``[K]`` float32, by which channels are multiplied.
        permutation: ``[K]`` int64: channel i is then what ``permutation[i]`` was.
        rotation: mixes blocks of channels.
        threshold: channels with a value of at least this size anywhere in a batch are multiplied in floating point (LLM.int8()
            as published). Which these are is known only when the batch is there, so it is no step of :meth:`apply`.
    """

    shift: Tensor | None = None
    outliers: Tensor | None = None
    pre_scale: Tensor | None = None
    permutation: Tensor | None = None
    rotation: Rotation | None = None
    threshold: float | None = None

    @property
    def steps(self) -> list[str]:
        """Names of the fields that do something."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def apply(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What of ``x [M, K]`` is quantized, ``[M, K]`` float, and what is taken aside, ``[M, n]`` in the dtype of ``x``.

        Shift and scale are float32, and so is what they make of a 16-bit ``x``, which would round the result once more.
        """
        pre_scale = self.pre_scale
        inner, aside = rewritten(
            x,
            shift=self.shift,
            outliers=self.outliers,
            scaled=None if pre_scale is None else lambda value: value * pre_scale,
            permutation=self.permutation,
            rotated=None if self.rotation is None else self._rotated,
        )
        return inner, None if aside is None else aside.to(x.dtype)

    def _rotated(self, x: Tensor) -> Tensor:
        assert self.rotation is not None
        if torch.compiler.is_compiling():
            return torch.ops.quantkit.rotate(x.float(), self.rotation.block, self.rotation.signs)
        return self.rotation.apply(x.float())

    def columns(self, start: int, stop: int) -> Rewrite:
        """The same of the channels from ``start`` up to ``stop`` only.

        Raises:
            MethodError: the order brings channels from outside, or the borders cut through a rotation.
        """

        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:stop]

        order, outliers, rotation = some(self.permutation), self.outliers, self.rotation
        if order is not None and bool(((order < start) | (order >= stop)).any()):
            raise MethodError(
                f"columns({start}, {stop}): a permutation brings channels from outside, so they cannot be cut out"
            )
        if rotation is not None and (start % rotation.block or stop % rotation.block):
            raise MethodError(f"columns({start}, {stop}): this cuts through a rotation of blocks of {rotation.block} channels")
        return Rewrite(
            shift=some(self.shift),
            outliers=None if outliers is None else outliers[(outliers >= start) & (outliers < stop)] - start,
            pre_scale=some(self.pre_scale),
            permutation=None if order is None else order - start,
            rotation=None if rotation is None else Rotation(rotation.block, some(rotation.signs)),
            threshold=self.threshold,
        )

    def transposed(self, gradient: Tensor) -> Tensor:
        """The gradient of the input, ``[M, K]`` float32, from that of :meth:`apply`'s first result.

        Channels that were taken aside are not in it: they have a path of their own.
        """
        if self.rotation is not None:
            gradient = Rotation(self.rotation.block).apply(gradient)  # a Hadamard matrix is symmetric, the signs come after it
            gradient = gradient if self.rotation.signs is None else gradient * self.rotation.signs
        if self.permutation is not None:
            gradient = gradient.index_select(1, self.permutation.argsort())
        if self.outliers is not None:
            gradient = gradient.index_fill(1, self.outliers, 0.0)  # a rotation has brought something back to them
        return gradient if self.pre_scale is None else gradient * self.pre_scale


# Under torch.compile a rotation is one operator: Inductor takes seconds for each layer to compile what it only runs slower.
_library = torch.library.Library("quantkit", "FRAGMENT")
_library.define("rotate(Tensor x, int block, Tensor? signs) -> Tensor")
_library.impl("rotate", lambda x, block, signs: Rotation(block, signs).apply(x), "CompositeExplicitAutograd")


@torch.library.register_fake("quantkit::rotate")
def _(x: Tensor, block: int, signs: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)

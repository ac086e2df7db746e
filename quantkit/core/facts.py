"""What an operand is but for the values in its tensors: sizes, formats, groups, and which steps its rewrite has.

With these facts and the tensors, an operand can be written to a file and made again. :meth:`Facts.record` and
:meth:`Facts.read` are the JSON of a layer in a checkpoint; :data:`TENSORS` are the names of its tensors there, and in the
layers of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.core.errors import ModelError, QuantkitError
from quantkit.core.formats import Float, Format, groups_fault
from quantkit.core.numerics import MAX_EXACT_K, MAX_EXACT_K_ASYMMETRIC
from quantkit.core.scheme import Scheme

OPTIONAL = ("pre_scale", "shift", "permutation", "rotation_signs", "outlier_index", "outlier_weight")
"""Names, in files and layers, of the tensors that an operand may have or not whatever its formats are."""
TENSORS = ("weight", "weight_scale", "weight_multipliers", "bias", "input_scale", "input_zero_point", *OPTIONAL)
"""Names, in files and layers, of all tensors of an operand."""
FLOAT32 = frozenset(TENSORS) - {"bias", "outlier_weight"}
"""Those that are float32 (or whole numbers) whatever the dtype of the model is."""


@dataclass(frozen=True)
class Facts:
    """What an operand is, but for the values in its tensors: with these it can be written to JSON and made again.

    Attributes:
        in_features, out_features: K and N.
        scheme: formats of weight and input.
        groups: sizes of the groups of channels that have scales of their own; empty for one scale.
        rotation_block: channels of a block that the rewrite rotates, None for no rotation.
        threshold: of the rewrite, None for none.
    """

    in_features: int
    out_features: int
    scheme: Scheme
    groups: tuple[int, ...] = ()
    rotation_block: int | None = None
    threshold: float | None = None

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Facts:
        """From the JSON of :meth:`record`.

        Raises:
            QuantkitError: the values make no sense; says which.
        """
        k, n, block = record["in_features"], record["out_features"], record["rotation_block"]
        threshold, groups, count = record["threshold"], tuple(record["groups"]), record["outliers"]
        if groups and (fault := groups_fault(groups, k)):
            raise QuantkitError(fault)
        if block and any(size % block for size in groups):
            raise QuantkitError(f"it rotates blocks of {block} across the borders of its groups {groups}")
        if block < 0 or (block and (k % block or block & (block - 1))):
            raise QuantkitError(f"it rotates blocks of {block}, which does not go with {k} channels")
        if not 0 <= count <= k or not 0 <= threshold < float("inf"):
            raise QuantkitError(f"it has {count} outliers of {k} channels and a threshold of {threshold}")
        scheme = Scheme.parse(record["scheme"])
        if scheme != scheme.of_linear():
            raise QuantkitError(f"it has the scheme {record['scheme']!r}, which says more than a linear does")
        if k < 0 or n < 0:
            raise QuantkitError(f"it has {k} inputs and {n} outputs")
        check_exact(k, scheme.input, "it")
        buffers = record["buffers"]
        unknown = next((name for name in buffers if name not in OPTIONAL), None)
        if unknown is not None:
            raise QuantkitError(f"it has {unknown!r}, which this quantkit does not know")
        if ("outlier_index" in buffers) != ("outlier_weight" in buffers):
            raise QuantkitError("it has outlier_index or outlier_weight without the other")
        if threshold and (buffers or block or groups or not scheme.takes_threshold):
            raise QuantkitError("it has a threshold, which goes with symmetric scales per token and nothing else")
        return cls(k, n, scheme, groups, block or None, threshold or None)

    def record(self, tensors: Sequence[str], outliers: int) -> dict[str, Any]:
        """As plain JSON; ``tensors`` are the names that the operand has, and ``outliers`` is how many columns stay outside.

        In files, 0 stands for no rotation and for no threshold.
        """
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "scheme": self.scheme.name,
            "bias": "bias" in tensors,
            "rotation_block": self.rotation_block or 0,
            "threshold": float(self.threshold or 0.0),
            "outliers": outliers,
            "buffers": [name for name in OPTIONAL if name in tensors],
            "groups": list(self.groups),
        }


def check_exact(channels: int, input_: Format, name: str) -> None:
    """Raises ModelError where an int32 accumulator of ``channels`` products could overflow."""
    symmetric = isinstance(input_, Float) or input_.number.symmetric
    limit = MAX_EXACT_K if symmetric else MAX_EXACT_K_ASYMMETRIC
    if channels > limit:
        raise ModelError(
            f"{name}: K = {channels} input features are beyond {limit}, up to which int32 sums of products are exact; leave "
            f"the layer in floating point with ignore=[{name!r}]"
        )

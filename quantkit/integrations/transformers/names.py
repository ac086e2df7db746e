"""What the files of a transformers model call its tensors.

transformers renames and joins tensors while it reads a checkpoint, and undoes this in ``save_pretrained``, so that the names in
the files of a model are not always those in its state dict. Experts in particular are many small tensors in most files and one
large tensor in the model, which quantkit takes apart again.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor
from transformers import core_model_loading as loading
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, revert_weight_conversion

from quantkit.core.errors import ModelError
from quantkit.model.experts import Experts

NUMBER: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
"""How the numbers are made that are sent through conversions. It must not depend on the defaults that transformers sets."""


def checkpoint_names(model: Any) -> dict[str, str]:
    """What each tensor of ``model`` is called in a checkpoint of transformers, experts that quantkit took apart included.

    Found by sending one number in place of every tensor through the conversion that ``save_pretrained`` does, and looking under
    which name it arrives.

    Raises:
        ModelError: a checkpoint stores some tensor in another form than the model holds it.
    """
    apart = {name: m for name, m in model.named_modules() if isinstance(m, Experts)}
    names = [n for n in model.state_dict() if not any(n.startswith(f"{prefix}.") for prefix in apart)]
    numbers: dict[str, Tensor] = {name: torch.tensor([float(i)], **NUMBER) for i, name in enumerate(names)}
    made = revert_weight_conversion(model, dict(numbers))
    by_number = {float(tensor): name for name, tensor in made.items() if tensor.numel() == 1}
    missing = [name for i, name in enumerate(names) if float(i) not in by_number]
    if missing or len(made) != len(names):
        raise ModelError(
            f"checkpoints of this architecture store {(missing or names)[0]!r} in another form than the model holds it: save "
            "it with quantkit.save()"
        )
    found = {name: by_number[float(i)] for i, name in enumerate(names)}
    for prefix, experts in apart.items():
        for name, source in _expert_names(model, prefix, experts).items():
            for tensor in model.get_submodule(f"{prefix}.{name}").state_dict():
                found[f"{prefix}.{name}.{tensor}"] = f"{source}.{tensor}"
    return found


def _expert_names(model: Any, prefix: str, experts: Experts) -> dict[str, str]:
    """``0.gate_proj`` -> what a checkpoint calls it, for every linear of every expert.

    The joined tensors are sent through the conversion with a number for each expert and each of its linears.
    """
    e = experts.num_experts
    leaves = ["gate_proj", "up_proj"] if experts.has_gate else ["up_proj"]
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    rows = torch.arange(e * len(leaves), **NUMBER).view(e, len(leaves), 1)
    down = torch.arange(e, **NUMBER).view(e, 1, 1) + rows.numel()
    made = revert_weight_conversion(model, {f"{prefix}.{first}": rows, f"{prefix}.down_proj": down})
    by_number = {float(t): n.removesuffix(".weight") for n, t in made.items() if t.numel() == 1}
    order = {f"{i}.{leaf}": float(i * len(leaves) + j) for i in range(e) for j, leaf in enumerate(leaves)}
    order |= {f"{i}.down_proj": float(rows.numel() + i) for i in range(e)}
    # A checkpoint that stores experts as one tensor has no names for its parts: these are what other tools call them.
    return {name: by_number.get(number, f"{prefix}.{name}") for name, number in order.items()}


def one_by_one(conversion: Any) -> list[Any]:
    """What a model whose experts are taken apart needs in place of a conversion that would join their weights while reading.

    Returns:
        Renamings for the parts; the conversion itself if it joins no experts.
    """
    if not isinstance(conversion, WeightConverter) or not all("*" in p for p in conversion.source_patterns):
        return [conversion]
    (target,) = conversion.target_patterns
    stem, _, leaf = target.rpartition(".")
    leaves = {"gate_up_proj": ["gate_proj", "up_proj"]}.get(leaf, [leaf])
    if len(leaves) != len(conversion.source_patterns):
        return [conversion]
    renamings = []
    for source, name in zip(conversion.source_patterns, leaves, strict=True):
        pattern = source.removesuffix("weight").rstrip(".").replace("\\", "").split("*")
        renamings.append(WeightRenaming(rf"{re.escape(pattern[0])}(\d+){re.escape(pattern[1])}\.", rf"{stem}.\1.{name}."))
    return renamings


class SplitAsHeld(ConversionOps):  # type: ignore[misc]
    """What transformers' ``Split`` does, for pieces that are not parameters.

    ``Split`` asks the parameters of the model how large the pieces are, and INT8 codes and their scales are buffers.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        model: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        ((_, value),) = input_dict.items()
        whole: Tensor = value[0] if isinstance(value, list) else value
        names = [full_layer_name.replace(target_patterns[0], target) for target in target_patterns]
        sizes = [model.get_parameter_or_buffer(name).shape[self.dim] for name in names]
        pieces = whole.split(sizes, self.dim)
        return {target: piece.contiguous() for target, piece in zip(target_patterns, pieces, strict=True)}

    @property
    def reverse_op(self) -> Any:
        return loading.Concatenate(self.dim)


def splits_buffers(conversion: Any) -> Any:
    """``conversion``, able to split tensors whose pieces are buffers of the model."""
    split = getattr(loading, "Split", None)  # older transformers have none
    if split is None or not any(isinstance(op, split) for op in getattr(conversion, "operations", None) or []):
        return conversion
    conversion = copy.copy(conversion)
    conversion.operations = [SplitAsHeld(op.dim) if isinstance(op, split) else op for op in conversion.operations]
    return conversion

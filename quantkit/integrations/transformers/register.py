"""How transformers gets to know quantkit.

transformers keeps two tables: from the name of a quantization method to its configuration, and to its quantizer.
``from_pretrained`` looks there when a ``config.json`` names a method. A library that is imported should not reach into
another one, so quantkit puts itself into the tables only when it is asked to, or when it has a model of transformers in its
hands anyway.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import Tensor, nn

from quantkit.checkpoint.record import codes_apart
from quantkit.integrations.transformers.files import PIP_HINT
from quantkit.layers.linear import W8A8Linear


def register_with_transformers() -> None:
    """Make quantkit known to ``from_pretrained`` of transformers, so that it opens what ``save_pretrained`` wrote.

    Needed once in a process that only opens such folders::

        quantkit.register_with_transformers()
        model = AutoModelForCausalLM.from_pretrained("int8/")

    :func:`quantkit.quantize` and :func:`quantkit.load` of a transformers model, ``quantkit.QuantKitConfig``, and
    :func:`quantkit.compressed_tensors_as_int8` do it by themselves. Calling it again changes nothing. It imports
    transformers, which takes seconds.

    Raises:
        ImportError: transformers is not installed, or is older than quantkit supports.
    """
    try:
        from quantkit.integrations.transformers.quantizer import enter_tables
    except ImportError as error:
        raise ImportError(f"quantkit.register_with_transformers: {PIP_HINT} ({error})") from error
    enter_tables()


def prepare_for_saving(model: nn.Module) -> None:
    """Let whoever saves a model that quantkit just quantized or loaded write files that cannot be misread.

    Called with every model that gets a report. ``save_pretrained`` of transformers models writes what ``from_pretrained``
    needs; in all else that is saved, codes have the shape that they have in quantkit's own files. Where transformers is not
    imported no model can be one of its models: it is never imported for this.
    """
    if _shaped not in model._state_dict_hooks.values():
        model.register_state_dict_post_hook(_shaped)
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not any(isinstance(m, modeling.PreTrainedModel) for m in model.modules()):
        return
    register_with_transformers()
    from quantkit.integrations.transformers.quantizer import mark, mark_parts

    if isinstance(model, modeling.PreTrainedModel):
        mark(model)
    mark_parts(model)


def _shaped(model: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Codes as files hold them, in the state dict of a larger model and of one whose library saves it in its own way."""
    if prefix or (hasattr(model, "save_pretrained") and not hasattr(model, "hf_quantizer")):
        codes_apart(model, state, prefix)


def count_parameters(model: nn.Module) -> None:
    """Let ``num_parameters()`` of all models of transformers within a model that gets a report say what it said before."""
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    for part in () if modeling is None else model.modules():
        if isinstance(part, modeling.PreTrainedModel):
            part.num_parameters = functools.partial(num_parameters, part)


def num_parameters(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """``model.num_parameters()`` of transformers, with the weights of INT8 layers, which are no parameters."""
    count: int = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    layers = [] if only_trainable else [m for m in model.modules() if isinstance(m, W8A8Linear)]
    return count + sum(layer.out_features * (layer.in_features + (layer.bias is not None)) for layer in layers)

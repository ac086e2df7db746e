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

from torch import nn

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
    """Let ``save_pretrained`` of a model that quantkit just quantized or loaded write what ``from_pretrained`` needs.

    Called with every model that gets a report. Only models of transformers are touched, and where transformers is not imported
    no model can be one: it is never imported for this.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return
    register_with_transformers()
    from quantkit.integrations.transformers.quantizer import mark

    mark(model)


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

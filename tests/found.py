"""What discovery finds in a model, found once: most of the time of quantizing a tiny model goes into it.

For tests of what comes after discovery, which quantize copies of one model in many ways. Models count as copies if their code,
configuration, weights and batch are the same.
"""

from __future__ import annotations

import hashlib
from typing import Any

from digests import digest
from torch import Tensor, nn

from quantkit.core.sites import Discovery
from quantkit.discovery import discover
from quantkit.model.modules import tensors_in

FOUND: dict[tuple[str, bool], Discovery] = {}
PARTS = {"_parameters", "_buffers", "_modules"}
ALIVE: list[tuple[type, dict[str, Any]]] = []
"""Classes and attributes of models that were searched: nothing else gets an address that is part of a key."""


def find(model: nn.Module, batch: Any, *, carriers: bool = False, heads: bool = False, real: Any = frozenset()) -> Discovery:
    """As :func:`quantkit.discover`."""
    code = [(name, id(type(m)), said(m)) for name, m in model.named_modules()]
    values = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {id(tensor): name for name, tensor in reversed(values)}
    shared = [first[id(tensor)] for _, tensor in values]
    given = [
        type(batch),
        *(batch if isinstance(batch, dict) else ()),
        digest((str(i), t) for i, t in enumerate(tensors_in(batch))),
    ]
    facts = (
        code,
        getattr(getattr(model, "config", None), "_attn_implementation", ""),
        digest(values),
        shared,
        given,
        sorted(real),
        heads,
    )
    key = hashlib.sha256(repr(facts).encode()).hexdigest()
    for with_carriers in {carriers, True}:  # what asks for no carriers does not look at them
        if (key, with_carriers) in FOUND:
            return FOUND[key, with_carriers]
    FOUND[key, carriers] = discover(model, batch, carriers=carriers, heads=heads, real=real)
    ALIVE.extend((type(module), own(module)) for module in model.modules())
    return FOUND[key, carriers]


def said(module: nn.Module) -> list[tuple[str, str]]:
    """Attributes of a module beside its parts: two encoders may differ in a flag alone. What has no value of its own as text
    has its address there, and is like nothing else."""
    return [(name, digest([(name, v)]) if isinstance(v, Tensor) else repr(v)) for name, v in own(module).items()]


def own(module: nn.Module) -> dict[str, Any]:
    """All that is kept in a module, hooks included, but for its parts."""
    return {name: value for name, value in vars(module).items() if name not in PARTS}

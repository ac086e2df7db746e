"""Frozen values as plain JSON and tensors, and back: for plans, which are dataclasses within dataclasses.

Only the kinds of values that a caller lists are read, so that a file can ask for nothing but data. Tensors are taken out of the
JSON and numbered; whoever writes it keeps them beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from torch import Tensor

from quantkit.core.errors import QuantkitError


def written(value: Any, tensors: dict[str, Tensor]) -> Any:
    """``value`` as plain JSON; its tensors go into ``tensors``, each under a name of its own.

    Raises:
        QuantkitError: it holds something that is neither a dataclass, an enum, a container, a tensor nor a plain value.
    """
    if isinstance(value, Enum):
        return {"enum": type(value).__name__, "member": value.name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        name = f"tensor-{len(tensors):06d}"
        tensors[name] = value.detach()
        return {"tensor": name}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        return {"kind": type(value).__name__, "fields": {name: written(getattr(value, name), tensors) for name in names}}
    if isinstance(value, Mapping):
        return {"dict": [[written(key, tensors), written(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [written(item, tensors) for item in value]}
    raise QuantkitError(f"a {type(value).__name__} cannot be written down as data")


def read(data: Any, tensors: Mapping[str, Tensor], kinds: Sequence[type]) -> Any:
    """The value that :func:`written` wrote down.

    Args:
        data: plain JSON.
        tensors: by the names in it.
        kinds: the dataclasses and enums that may be in it.

    Raises:
        QuantkitError: it was not written by :func:`written`, or holds another kind.
    """
    known = {kind.__name__: kind for kind in kinds}
    try:
        return _read(data, tensors, known)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, QuantkitError):
            raise
        raise QuantkitError(f"this is no value that quantkit wrote: {error!r}") from None


def _read(data: Any, tensors: Mapping[str, Tensor], kinds: Mapping[str, Any]) -> Any:
    if not isinstance(data, dict):
        if isinstance(data, list):
            raise QuantkitError("this is no value that quantkit wrote: it holds a bare list")
        return data
    match data:
        case {"tensor": name}:
            return tensors[name]
        case {"enum": kind, "member": name}:
            return kinds[kind][name]
        case {"kind": kind, "fields": fields}:
            return kinds[kind](**{name: _read(item, tensors, kinds) for name, item in fields.items()})
        case {"dict": items}:
            return {_read(key, tensors, kinds): _read(item, tensors, kinds) for key, item in items}
        case {"tuple": items}:
            return tuple(_read(item, tensors, kinds) for item in items)
        case {"list": items}:
            return [_read(item, tensors, kinds) for item in items]
    raise QuantkitError(f"this is no value that quantkit wrote: it has the keys {', '.join(map(str, data))}")

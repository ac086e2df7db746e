"""What a kernel tells the door: what it is called, which fields of a request it handles, and whether it takes one.

A request is a named tuple whose optional fields have defaults. A kernel lists the fields that it looks at. A field that is not
in the list has to be at its default, or the kernel does not take the request. So a new field is refused by every kernel until
each one that handles it says so, and nothing that was asked for can get lost on the way.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, ClassVar


class Kernel:
    """Base of the kernels on both sides; a subclass has ``why_not(request)`` and ``launch(request, ...)`` besides.

    Attributes:
        name: as in the log and in error messages.
        request: the class of the requests.
        handles: names of the fields of a request that this kernel handles.
    """

    name: ClassVar[str]
    request: ClassVar[Any]
    handles: ClassVar[frozenset[str]]
    _others: ClassVar[dict[str, Any]]
    _values: ClassVar[Any]
    _defaults: ClassVar[tuple[Any, ...]]

    def __init_subclass__(cls) -> None:
        """Prepare the comparison with defaults. A request is made in each call, so that this has to be quick."""
        fields, defaults = cls.request._fields, cls.request._field_defaults
        if unknown := cls.handles - set(fields):
            raise TypeError(f"kernel {cls.name!r} handles {sorted(unknown)}, which no request has")
        cls._others = {name: defaults[name] for name in fields if name not in cls.handles}
        indices = [fields.index(name) for name in cls._others]
        cls._values = staticmethod(itemgetter(*indices, *indices) if indices else lambda request: ())  # of one, no tuple
        cls._defaults = tuple(cls._others.values()) * 2

    def unhandled(self, request: Any) -> str | None:
        """None where every field that is set is one that this kernel handles; else which one is not."""
        if self._values(request) == self._defaults:
            return None
        names = [name for name, default in self._others.items() if getattr(request, name) != default]
        return f"it does not handle {', '.join(names)}"

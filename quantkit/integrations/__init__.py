"""Other libraries. Nothing here is imported before the library itself is."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

QUANTIZERS = "transformers.quantizers.auto"
QUANTIZER = "quantkit.integrations.transformers.quantizer"


def register_with_transformers() -> None:
    """Make quantkit known to ``from_pretrained``: now, or when transformers loads its list of quantizers."""
    if QUANTIZERS in sys.modules:
        importlib.import_module(QUANTIZER)
    else:
        sys.meta_path.insert(0, _Watch())


@contextmanager
def compressed_tensors_as_int8() -> Iterator[None]:
    """Inside, ``from_pretrained`` of transformers gives W8A8 checkpoints of compressed-tensors INT8 layers that stay INT8.

    Outside, and by default, transformers turns them into 16 bit at the first forward. The tables of transformers come back as
    they were, whatever happens inside.

    Raises:
        ImportError: transformers is not installed.
    """
    from quantkit.integrations.compressed.load import replaced

    with replaced():
        yield


class _Watch(importlib.abc.MetaPathFinder):
    """Registers right after transformers has its list: ``import quantkit`` must not take the seconds of importing it."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                importlib.import_module(QUANTIZER)  # which registers at its end; it may be what imports transformers now

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

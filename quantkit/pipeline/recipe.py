"""A recipe: everything that decides the integers but the model and the data, as plain data that can be written down.

A recipe is what :func:`quantkit.quantize` was called with, in a form that YAML and JSON can hold. People write recipes as
files, and every quantized model carries its own, so that it can be made again to the same bits. Calibrators are written by name
with all of their options. That works for every calibrator that a method of the same name makes, whether it is quantkit's, was
registered by the program (:func:`quantkit.register_method`) or comes from an installed package. A calibrator of any other class
is written as the place to import it from, and reading such a recipe runs code, so whoever reads it has to allow that.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from quantkit.calibrators import Calibrator, kind_of, methods, resolve
from quantkit.core.errors import CheckpointError, MethodError, SchemeError
from quantkit.core.scheme import Scheme
from quantkit.core.text import read_text

DEEPEST = 20
MOST = 2**20
"""Bytes of a recipe. The record of a checkpoint has a report beside it."""
KEYS = ("method", "scheme", "seed", "ignore", "targets", "heads")


@dataclass(frozen=True)
class Recipe:
    """The arguments of :func:`quantkit.quantize` that decide how, as one value that reads and writes plain data.

    With the same model, data and machine it gives the same bits. Quantized models carry theirs in ``report(model).recipe``.

    Attributes:
        method: calibrators, in order.
        scheme: number format; None leaves the model in floating point.
        seed: of everything random.
        ignore, targets, heads: which layers, see :func:`quantkit.quantize`.
    """

    method: tuple[Calibrator, ...]
    scheme: Scheme | None = Scheme()
    seed: int = 0
    ignore: tuple[str, ...] = ()
    targets: tuple[str, ...] | None = None
    heads: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """For ``quantkit.quantize(model, **recipe.arguments, calibration=...)``."""
        return {key: getattr(self, key) for key in KEYS}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: calibrators by name with all their options, so that a later default changes nothing."""
        return {
            "method": [calibrator_dict(c) for c in self.method],
            "scheme": None if self.scheme is None else self.scheme.name,
            "seed": self.seed,
            "ignore": list(self.ignore),
            "targets": None if self.targets is None else list(self.targets),
            "heads": self.heads,
        }

    @classmethod
    def from_dict(cls, data: Any, *, imports: bool = False) -> Recipe:
        """What :meth:`to_dict` wrote, or a person: ``method`` is a name, ``{"name": ..., option: value}``, or a list of both.

        Args:
            data: a mapping with ``method``, and any of ``scheme``, ``seed``, ``ignore``, ``targets`` and ``heads``.
            imports: allow calibrators that no method is named after, given as ``{"import": "package.module:Class", ...}``. This
                runs their code: never for a recipe that you have not read.

        Raises:
            MethodError: something is missing, mistyped or unknown.
            SchemeError: the scheme does not exist.
        """
        return cls._made(data, imports, written=False)

    @classmethod
    def _made(cls, data: Any, imports: bool, written: bool) -> Recipe:
        """``written`` is for data out of a checkpoint, which names no folders: nobody has read it."""
        if not isinstance(data, Mapping) or "method" not in data:
            raise MethodError(
                "a recipe is a mapping with the key 'method', such as {method: [smoothquant, gptq], scheme: w8a8}"
            )
        unknown = [str(key) for key in data if key not in KEYS]
        if unknown:
            raise MethodError(f"the recipe has {', '.join(unknown)}, which is not known: there are {', '.join(KEYS)}")
        method, scheme, seed = data["method"], data.get("scheme", "w8a8"), data.get("seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise MethodError(f"the recipe has seed {seed!r}, which is no whole number")
        if scheme is not None and not isinstance(scheme, str):
            raise SchemeError(f"the recipe has scheme {scheme!r}: write its name, such as w8a8, or null for floating point")
        if not isinstance(heads := data.get("heads", False), bool):
            raise MethodError(f"the recipe has heads {heads!r}: write true or false")
        parts = method if isinstance(method, Sequence) and not isinstance(method, str) else [method]
        return cls(
            tuple(resolve([_calibrator(part, imports, written) for part in parts])),
            None if scheme is None else Scheme.parse(scheme),
            seed,
            _names(data, "ignore") or (),
            _names(data, "targets"),
            heads,
        )

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, imports: bool = False) -> Recipe:
        """From a ``.yaml`` or ``.json`` file, or from a quantkit checkpoint (its folder): the recipe that it was made by.

        Raises:
            MethodError: as :meth:`from_dict`, or the file cannot be parsed, or YAML cannot be read here.
            CheckpointError: a folder that holds no recipe.
        """
        file = Path(path)
        if file.is_dir():
            return cls._made(_of_checkpoint(file), imports, written=True)
        text = read_text(file, MOST, MethodError)
        if file.suffix == ".json":
            try:
                return cls.from_dict(json.loads(text), imports=imports)
            except (json.JSONDecodeError, RecursionError) as error:
                raise MethodError(f"{file} is no JSON: {error}") from None
        try:
            import yaml  # type: ignore[import-untyped]  # its types are a package of their own
        except ImportError:
            raise MethodError(f"{file}: reading YAML needs PyYAML: pip install pyyaml, or write the recipe as .json") from None
        try:
            depth = 0
            for event in yaml.parse(text, yaml.SafeLoader):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
                    raise MethodError(
                        f"{file} has {'lists in lists in lists' if depth > DEEPEST else 'an alias (*name)'}, of which a small "
                        "file can make a huge recipe: write it out"
                    )
            return cls.from_dict(yaml.safe_load(text), imports=imports)
        except (yaml.YAMLError, RecursionError) as error:
            raise MethodError(f"{file} is no YAML: {' '.join(str(error).split())}") from None


def calibrator_dict(calibrator: Calibrator) -> dict[str, Any]:
    """Its name, or where to import it from, and its options. One that plain data cannot say gets a reason in their place."""
    kind = type(calibrator)
    known = kind_of(calibrator.name) is kind
    where = {"name": calibrator.name} if known else {"import": f"{kind.__module__}:{kind.__qualname__}"}
    if is_dataclass(calibrator):
        options = {f.name: getattr(calibrator, f.name) for f in options_of(kind)}
    else:
        options = dict(getattr(calibrator, "__dict__", {}))
        if options:
            return {**where, "lost": "options of a class that is no dataclass"}
    try:
        same = json.loads(json.dumps(options)) == options
    except (TypeError, ValueError):
        same = False
    if not same:
        return {**where, "lost": "options that JSON cannot hold"}
    if not known and ("<locals>" in kind.__qualname__ or kind.__module__ == "__main__"):
        return {**where, "lost": "a class that cannot be imported"}
    return {**where, **options}


def options_of(kind: Any, *, everything: bool = False) -> list[Field[Any]]:
    """Fields that decide something; a field with ``metadata={"recipe": False}``, such as a working folder, does not."""
    return [f for f in fields(kind) if f.init and (everything or f.metadata.get("recipe", True))]


def _calibrator(part: Any, imports: bool, written: bool) -> Any:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or not all(isinstance(key, str) for key in part):
        raise MethodError(f"the recipe's method holds {part!r}: write a name, or a mapping of name and options")
    options = dict(part)
    if "lost" in options:
        who = options.get("name", options.get("import"))
        raise MethodError(f"the recipe cannot be repeated: it could not write down {who!r} ({options['lost']})")
    if "import" in options:
        kind = _imported(options.pop("import"), imports)
    else:
        name = options.pop("name", None)
        if not isinstance(name, str) or name not in methods():
            raise MethodError(f"the recipe's method names {name!r}: there are {', '.join(methods())}")
        kind = kind_of(name)
        if kind is None:
            raise MethodError(f"the recipe's method names {name!r}, which makes calibrators of other names: name one of those")
    known = {f.name: f for f in options_of(kind, everything=not written)} if is_dataclass(kind) else {}
    wrong = [key for key in options if key not in known]
    missing = [key for key, f in known.items() if key not in options and f.default is MISSING and f.default_factory is MISSING]
    if wrong or missing:
        raise MethodError(
            f"the recipe's {kind.__name__} has no option {wrong[0]!r}: there are {', '.join(known) or 'none'}"
            if wrong
            else f"the recipe's {kind.__name__} lacks the option {missing[0]!r}"
        )
    return kind(**options)


def _imported(where: Any, allowed: bool) -> Any:
    if not allowed:
        raise MethodError(
            f"the recipe imports {where!r}, which runs code that is not quantkit's: if you trust it, pass imports=True, or "
            "--import-calibrators on the command line"
        )
    module, _, name = where.partition(":") if isinstance(where, str) else ("", "", "")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise MethodError(f"the recipe imports {where!r}, which is not there: write package.module:Class ({error})") from None
    if not isinstance(found, type):
        raise MethodError(f"the recipe imports {where!r}, which is no class")
    return found


def _names(data: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    names = data.get(key)
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise MethodError(f"the recipe has {key} {names!r}: write a list of layer names or globs")
    return tuple(names)


def _of_checkpoint(folder: Path) -> Any:
    file = folder / "quantkit.json"
    try:
        recipe = json.loads(read_text(file, 64 * MOST, CheckpointError))["report"]["recipe"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        recipe = None
    if recipe is None:
        raise CheckpointError(f"{folder} holds no recipe: it is no quantkit checkpoint, or one of an older version")
    return recipe

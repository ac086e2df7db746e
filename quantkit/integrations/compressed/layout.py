"""The compressed-tensors layout of INT8 checkpoints, as vLLM, SGLang and transformers read it: what its JSON says.

The ``quantization_config`` in ``config.json`` says which layers are quantized and how: groups of layers, each with a format
for weights and one for activations, and a list of layers to ignore. Layers are called by name, by class, or by a regular
expression. Nothing here touches a tensor or needs the package compressed-tensors; ``export`` writes the layout and ``load``
runs it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from quantkit.core.errors import CheckpointError
from quantkit.core.formats import Format, Int, PerChannel, PerTensor, PerToken, Quantized
from quantkit.core.scheme import Scheme
from quantkit.integrations.transformers.files import PIP_HINT

METHOD, FORMAT = "compressed-tensors", "int-quantized"
LAYOUTS = (FORMAT, "naive-quantized")
"""Formats that store INT8 codes as they are, one in a byte. Others pack them, or hold other numbers."""
LONGEST = 500
"""Characters of an expression."""
PATIENCE = 2.0
"""Seconds that all expressions of a checkpoint may take to be matched: they come from a stranger, and some take for ever."""


@dataclass
class Compressed:
    """What a ``quantization_config`` asks for.

    Attributes:
        groups: the targets and the number format of each group of layers.
        ignore: layers that stay in floating point, in the same notation as targets.
    """

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...]
    _left: float = PATIENCE

    def scheme_of(self, names: Collection[str], module: nn.Module) -> Scheme | None:
        """The number format of a linear, or None if it stays in floating point.

        Args:
            names: all names that the linear has: the one in the model, and the one in the files.
            module: the linear.

        Raises:
            CheckpointError: groups of layers contradict each other, or an expression takes for ever to match.
        """
        if any(self._matches(pattern, names, module) for pattern in self.ignore):
            return None
        found = {scheme for targets, scheme in self.groups if any(self._matches(t, names, module) for t in targets)}
        if len(found) > 1:
            raise CheckpointError(f"config_groups give {next(iter(names))!r} more than one number format")
        return next(iter(found), None)

    def _matches(self, pattern: str, names: Collection[str], module: nn.Module) -> bool:
        """Whether a target means this module.

        A target is the full name of a module, the name of its class, or ``re:`` and an expression that a name starts with.
        """
        if not pattern.startswith("re:"):
            return pattern in names or any(pattern == cls.__name__ for cls in type(module).__mro__)
        import regex

        start = time.perf_counter()
        try:
            return any(regex.match(pattern[3:], name, timeout=max(self._left, 1e-3)) is not None for name in names)
        except (TimeoutError, MemoryError, RecursionError):
            raise CheckpointError(f"the expression {pattern[3:83]!r} takes too long to match: refused") from None
        finally:
            self._left -= time.perf_counter() - start


def describe(layers: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
    """The smallest ``quantization_config`` that every reader takes.

    Args:
        layers: the number format of each quantized layer, by its name in the files. Those with the same format make a group.
        ignore: names of what stays in floating point.
    """
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in layers.items():
        by_scheme.setdefault(scheme, []).append(name)
    groups = {}
    for index, (scheme, names) in enumerate(by_scheme.items()):
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(by_scheme) == 1 else names,
            "weights": _arguments(scheme.weight, dynamic=False),
            "input_activations": _arguments(scheme.input, dynamic=not scheme.is_static),
        }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        # Without this, transformers takes the codes for weights, and says nothing.
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": groups,
    }


def _arguments(format: Format, *, dynamic: bool) -> dict[str, Any]:
    assert isinstance(format, Quantized)
    strategy = {PerTensor: "tensor", PerChannel: "channel", PerToken: "token"}[type(format.granularity)]
    symmetric = format.number.symmetric
    return {"num_bits": format.number.bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": dynamic}


def parse(config: Any) -> Compressed:
    """What the ``quantization_config`` of a checkpoint means, if quantkit can run it.

    Raises:
        CheckpointError: it is malformed, or asks for what W8A8 INT8 kernels do not compute; says which key.
    """
    if not isinstance(config, dict) or config.get("quant_method") != METHOD:
        raise CheckpointError(f"quantization_config is none of {METHOD}")
    _only(config, "format", (*LAYOUTS, None), "as quantkit reads INT8 codes, one byte each")
    _only(config, "quantization_status", ("compressed", None), "so its files hold no INT8 codes")
    _only(config, "kv_cache_scheme", (None,), "and quantkit does not quantize the KV cache")
    sparsity = config.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") in (None, "dense")):
        raise CheckpointError("quantization_config has a sparsity_config: quantkit multiplies dense weights only")
    if config.get("transform_config"):
        raise CheckpointError("quantization_config has a transform_config: quantkit does not read rotations of that package")
    groups, ignore = config.get("config_groups"), config.get("ignore")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError("quantization_config has no config_groups, each a dict")
    return Compressed(
        tuple((_patterns(f"{name}.targets", group.get("targets")), _scheme(name, group)) for name, group in groups.items()),
        _patterns("ignore", [] if ignore is None else ignore),
    )


def _scheme(name: str, group: dict[str, Any]) -> Scheme:
    _only(group, "format", (*LAYOUTS, None), f"in {name}, as quantkit reads INT8 codes, one byte each")
    _only(group, "output_activations", (None,), f"in {name}, and quantkit quantizes no outputs")
    weights, inputs = group.get("weights"), group.get("input_activations")
    for what, arguments in (("weights", weights), ("input_activations", inputs)):
        where = f"in {name}.{what}: quantkit runs INT8 weights with INT8 activations"
        if not isinstance(arguments, dict):
            raise CheckpointError(f"quantization_config has {arguments!r} {where}")
        _only(arguments, "num_bits", (8,), where)
        _only(arguments, "type", ("int", None), where)
        _only(arguments, "group_size", (None, -1), f"in {name}.{what}: groups of channels have no exact INT8 product")
        _only(arguments, "block_structure", (None,), f"in {name}.{what}: blocks have no exact INT8 product")
        _only(arguments, "actorder", (None, False), f"in {name}.{what}: quantkit reads columns in their own order")
    assert isinstance(weights, dict)
    assert isinstance(inputs, dict)
    _only(weights, "symmetric", (True, None), f"in {name}.weights: a zero point of weights is not in an INT8 product")
    _only(weights, "strategy", ("channel", "tensor"), f"in {name}.weights: one scale per row, or one in all")
    _only(weights, "dynamic", (False, None), f"in {name}.weights")
    _only(inputs, "symmetric", (True, False, None), f"in {name}.input_activations")
    kind = (inputs.get("strategy"), inputs.get("dynamic") or False)
    if kind not in (("token", True), ("tensor", False)) or not isinstance(kind[1], bool):
        raise CheckpointError(
            f"quantization_config has strategy {kind[0]!r} with dynamic {kind[1]!r} in {name}.input_activations: quantkit "
            "runs 'token' with true (a scale per token), or 'tensor' with false (one fixed scale)"
        )
    return Scheme(
        weight=Quantized(Int(), PerTensor() if weights["strategy"] == "tensor" else PerChannel()),
        input=Quantized(
            Int(symmetric=inputs.get("symmetric") is not False), PerTensor() if inputs["strategy"] == "tensor" else PerToken()
        ),
    )


def _only(config: dict[str, Any], key: str, allowed: tuple[Any, ...], why: str) -> None:
    value = config.get(key)
    if not any(type(value) is type(a) and value == a for a in allowed):
        shown = repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
        raise CheckpointError(f"quantization_config has {key} {shown[:80]} {why}")


def _patterns(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"quantization_config has {where} that is no list of names")
    for item in value:
        if item.startswith("re:"):
            _check_expression(item[3:])
    return tuple(value)


def _check_expression(expression: str) -> None:
    """Raise a CheckpointError if a regular expression is none, or much too long."""
    if len(expression) > LONGEST:
        raise CheckpointError(f"the expression {expression[:80]!r} has {len(expression)} characters: refused")
    try:
        import regex  # comes with transformers, and unlike re it can be told when to give up
    except ImportError as error:
        raise CheckpointError(f"its expressions need a package that is not installed: {PIP_HINT} ({error})") from None
    try:
        regex.compile(expression)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"the expression {expression[:80]!r} is none: {error}") from None

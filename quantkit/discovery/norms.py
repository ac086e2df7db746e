"""What the parameters of a norm do, learned by replaying the norm alone on an input that it had in the probe.

There are norms with a gain of w, with a gain of 1 + w, with and without a bias, and layer scales that only multiply. No class
is known by name: parameters are changed, and the output tells what each of them does.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.errors import MethodError
from quantkit.core.sites import AbsorbRule, Producer, absorb
from quantkit.core.spaces import Gain
from quantkit.discovery.distances import near
from quantkit.discovery.probe import Trace
from quantkit.model.modules import map_tensors

RULES: tuple[AbsorbRule, ...] = ("scale", "offset")


class Replay:
    """A norm on the input of its first call in the probe, in float32 at least, with parameters of one's choice.

    Args:
        norm: the module.
        call: the positional and keyword arguments of that call.

    Attributes:
        own: name of a parameter -> its value, in float32 at least.
        plain: the output with these.
    """

    def __init__(self, norm: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        self.norm = norm
        self.args, self.kwargs = map_tensors(call, precise)
        self.own = {name: precise(p.detach()) for name, p in norm.named_parameters()}
        self.plain = self.output({})

    def output(self, changed: Mapping[str, Tensor]) -> Tensor:
        """What the norm puts out with some of its parameters changed."""
        args, kwargs = map_tensors((self.args, self.kwargs), Tensor.clone)  # some norms change their input in place
        with torch.no_grad():
            output: Tensor = torch.func.functional_call(self.norm, self.own | dict(changed), args, kwargs)
        return output

    def gives(self, changed: Mapping[str, Tensor], wanted: Tensor) -> bool:
        """Whether this is what it puts out, but for the rounding of float32."""
        return near(self.output(changed), wanted)


def with_absorb_rules(producer: Producer, norm: nn.Module, reference: Trace) -> Producer | None:
    """``producer`` with the rules by which the norm's parameters take a factor over, and the name of its bias.

    Returns:
        None if no choice of rules multiplies the output by a factor for each channel.
    """
    replay = Replay(norm, reference.norm_calls[producer.module])
    channels = replay.plain.shape[-1]
    names = [name for name, p in replay.own.items() if p.numel() == channels]
    random = torch.Generator().manual_seed(1)
    c = torch.rand(channels, generator=random, dtype=torch.float32, device="cpu").to(replay.plain) + 0.5
    for choice in itertools.product(RULES, repeat=len(names)) if names else ():
        rules = dict(zip(names, choice, strict=True))
        if replay.gives({name: absorb(replay.own[name], c, rule) for name, rule in rules.items()}, replay.plain * c):
            bias = next((name for name in names if replay.gives({name: replay.own[name] + c}, replay.plain + c)), None)
            return replace(producer, parameters=rules, bias=bias)
    return None


def gain_of(name: str, norm: nn.Module, width: int, reference: Trace) -> Gain:
    """Which parameter of the norm called ``name`` is its gain, which one its bias.

    Raises:
        MethodError: it has parameters that are neither, or that do not have ``width`` elements.
    """
    unclear = MethodError(f"the norm {name!r} is no plain one: its parameters are not a gain and a bias of its channels")
    if name not in reference.norm_calls:
        raise unclear
    replay = Replay(norm, reference.norm_calls[name])
    own, plain = replay.own, replay.plain
    if any(p.numel() != width for p in own.values()):
        raise unclear
    random = torch.Generator().manual_seed(4)
    moves = {key: torch.rand(width, generator=random, dtype=torch.float32, device="cpu").to(p) + 0.5 for key, p in own.items()}
    added = [key for key, move in moves.items() if replay.gives({key: own[key] + move}, plain + move)]
    scaling = [key for key in own if key not in added]
    if len(added) > 1 or len(scaling) > 1:
        raise unclear
    bias = added[0] if added else None
    if not scaling:
        return Gain(None, bias=bias)
    without_bias = {bias: torch.zeros_like(own[bias])} if bias else {}
    for rule in RULES:
        gain = Gain(scaling[0], rule, bias)
        normalized = replay.output({scaling[0]: torch.full_like(own[scaling[0]], gain.neutral)} | without_bias)
        factor = own[scaling[0]] + (1.0 - gain.neutral)
        if near(normalized * factor + (own[bias] if bias else 0.0), plain):
            return gain
    raise unclear


def values_of(norm: nn.Module, gain: Gain) -> tuple[Tensor, Tensor | None]:
    """By what a norm multiplies its normalized channels, and what it adds then, as ``[H]`` float64 on its device.

    Without a weight the first is ``[1]``, a one; without a bias the second is None.
    """
    bias = None if gain.bias is None else norm.get_parameter(gain.bias).detach().to(torch.float64, copy=True)
    if gain.weight is None:
        device = bias.device if bias is not None else None
        return torch.ones(1, dtype=torch.float64, device=device), bias
    return norm.get_parameter(gain.weight).detach().double() + (1.0 - gain.neutral), bias


def is_neutral(norm: nn.Module, gain: Gain) -> bool:
    """Whether the norm only normalizes: its gain is one everywhere, and it adds nothing."""
    plain = gain.weight is None or bool((norm.get_parameter(gain.weight) == gain.neutral).all())
    return plain and (gain.bias is None or not bool(norm.get_parameter(gain.bias).any()))


def neutral_twin(norm: nn.Module, gain: Gain) -> nn.Module:
    """A copy of the norm that only normalizes."""
    twin = copy.deepcopy(norm)
    with torch.no_grad():
        if gain.weight is not None:
            twin.get_parameter(gain.weight).fill_(gain.neutral)
        if gain.bias is not None:
            twin.get_parameter(gain.bias).zero_()
    return twin


def precise(tensor: Tensor) -> Tensor:
    """In float32, if it is floating and shorter; else as it is."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor

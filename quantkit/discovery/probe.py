"""A model under the microscope: every linear answers with made-up values that do not depend on its input.

In a real forward pass a change spreads to everything behind it. Here it stops at the next linear, because that puts out the
same values whatever it reads. So if the output of one module is multiplied by something, this shows at the linears that read
it, and nowhere else, and one pass can ask all blocks of a model at once. The products of matrices are skipped, so that a pass
costs no more than attention and the element-wise functions.

Multipliers are powers of two. These stay exact in every floating-point format, so that channels can be told by their bits.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.tracing import FunctionMode
from quantkit.layers.linear import PLACEHOLDER, placeholder
from quantkit.model.experts import running_everywhere
from quantkit.model.modules import call, evaluating, tensors_in, weight_of


@dataclass
class Trace:
    """What one probed forward pass showed.

    Attributes:
        inputs: name of a linear -> what it read, ``[..., K]``, call by call. Linears that did not run are absent. Those that
            read the very same tensor have the very same copy of it.
        identities: name of a linear -> for each call, which tensor it read: storage, view and version. Linears with an equal
            entry read the very same tensor.
        outputs: the floating-point tensors among the model's outputs.
        norm_calls: name of a norm -> the positional and keyword arguments of its first call.
        norm_widths: name of a norm -> its number of channels. Norms that did not run are absent.
        reached: names of linears and norms that ran on at least one token.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    identities: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    norm_calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    norm_widths: dict[str, int] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    _copies: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    _alive: list[Tensor] = field(default_factory=list)  # so that no address in `identities` is used twice within the pass


PATIENCE = 2.0
"""For how many seconds a first pass may go on before it is compared with the model itself."""
SLOWER = 20
"""How many times as long as the model itself a first pass may take, where it takes longer than that, and how many times as long
as the first one later passes may take."""
LONGEST = 20.0
"""For how many seconds a later pass may go on in any case."""


class EndlessError(Exception):
    """A pass with made-up values takes too long: such values may stand for the length of something."""


class Probe:
    """Runs a model with made-up outputs of linears, and with changes of one's choice to the outputs of modules.

    Args:
        model: any module.
        linears: name -> linear, for all linears of the model; their matrix products are skipped.
        norms: name -> module with parameters for each channel, such as :func:`norms_of` finds.
        batch: a small batch, see :func:`quantkit.model.modules.call`.
    """

    def __init__(self, model: nn.Module, linears: dict[str, nn.Module], norms: dict[str, nn.Module], batch: Any):
        self.model, self.linears, self.norms, self.batch = model, linears, norms, batch
        self._made_up: dict[tuple[str, int], Tensor] = {}
        self._limit: float | None = None

    def run(
        self,
        multipliers: Mapping[str, Tensor],
        *,
        orders: Mapping[str, Tensor] = MappingProxyType({}),
        edits: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
        watch: TopKWatch | None = None,
        hidden: Collection[str] = (),
    ) -> Trace:
        """One forward pass in eval mode; modules that are not named in an argument are left as they are.

        Args:
            multipliers: name of a linear or norm -> ``[N]``, by which its output channels are multiplied.
            orders: name of a linear -> ``[N]`` int64, which of its output channels comes at each place.
            edits: name of a linear -> a function from its output ``[..., N]`` to another one.
            watch: is told the outputs of linears, and follows them.
            hidden: names of linears that have the parameters of an INT8 layer meanwhile, see :func:`parameters_hidden`.

        Raises:
            EndlessError: the first pass takes far longer than one of the model itself, or this one than the first.
        """
        if self._limit is None:
            self._pace()
        trace = Trace()

        def change(name: str, y: Tensor) -> Tensor:
            y = y * multipliers[name].to(y) if name in multipliers else y.clone()
            y = y[..., orders[name].to(y.device)] if name in orders else y
            y = edits[name](y) if name in edits else y
            if watch is not None:
                watch.mark(name, y)
            return y

        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(self._limited())
            stack.enter_context(running_everywhere(self.model))
            for name, linear in self.linears.items():
                stack.enter_context(forward_replaced(linear, self._stand_in(name, linear, trace, change)))
            for name in hidden:
                stack.enter_context(parameters_hidden(self.linears[name]))
            for name, norm in self.norms.items():
                handle = norm.register_forward_hook(_norm_hook(name, trace, multipliers.get(name)), with_kwargs=True)
                stack.callback(handle.remove)
            if watch is not None:
                stack.enter_context(watch)
            trace.outputs = [t.detach() for t in tensors_in(call(self.model, self.batch))]
        return trace

    def _pace(self) -> None:
        """See to it that passes end: made-up durations of sounds, say, can be a thousand times too long."""
        self._limit = PATIENCE
        start = time.monotonic()
        if not self._ends():
            start = time.monotonic()
            with evaluating(self.model):
                call(self.model, self.batch)
            itself, start = time.monotonic() - start, time.monotonic()
            self._limit = SLOWER * itself
            if self._limit < PATIENCE or not self._ends():
                raise EndlessError(
                    f"a pass was not over after {max(PATIENCE, self._limit):.0f} s, where the model itself takes {itself:.1f} s"
                )
        self._limit = max(LONGEST, SLOWER * (time.monotonic() - start))

    def _ends(self) -> bool:
        """Whether a pass is over within the limit."""
        try:
            self.run({})
        except EndlessError:
            return False
        return True

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """While the context is open, the model runs until the limit at most."""
        assert self._limit is not None
        start, limit = time.monotonic(), self._limit

        def check(*_: Any) -> None:
            if time.monotonic() - start > limit:
                raise EndlessError(f"a pass was not over after {limit:.0f} s")

        with ExitStack() as stack:
            for module in self.model.modules():
                if next(module.children(), None) is None:
                    stack.callback(module.register_forward_pre_hook(check).remove)
            yield

    def _stand_in(self, name: str, linear: nn.Module, trace: Trace, change: Callable[[str, Tensor], Tensor]) -> Any:
        """The forward of a linear in the probe: notes what it reads in ``trace``, and puts out changed made-up values."""
        weight = weight_of(linear)

        def forward(input: Tensor) -> Tensor:
            x = input
            calls = trace.inputs.setdefault(name, [])
            y = self._values(name, len(calls), (*x.shape[:-1], len(weight)), weight)
            if x.numel():
                trace.reached.add(name)
            key = (x.data_ptr(), x.numel(), x.stride(-1), 0 if x.is_inference() else x._version)
            whole = (*key, x.shape, x.stride(), x.dtype)
            if whole not in trace._copies or x.is_inference():  # whose writes are not counted
                trace._copies[whole] = x.clone()
            calls.append(trace._copies[whole])
            trace.identities.setdefault(name, []).append(key)
            trace._alive.append(x)
            return change(name, y)

        return forward

    def _values(self, name: str, index: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Made-up outputs, the same in every pass: 1/8 to 8 in size and of both signs in every channel.

        So a curve, a clipping or a branch that is zero for one sign shows itself in any channel.
        """
        known = self._made_up.get((name, index))
        if known is None or known.shape != shape:
            random = torch.Generator().manual_seed(zlib.crc32(f"{name}/{index}".encode()))
            size = torch.exp2(torch.rand(shape, generator=random, dtype=torch.float32, device="cpu") * 6 - 3)
            sign = torch.randint(0, 2, shape, generator=random, dtype=torch.int64, device="cpu").float() * 2 - 1
            if len(flat := sign.view(-1, shape[-1])) > 1:
                flat[0], flat[1] = 1.0, -1.0
            known = (size * sign).to(like.dtype).to(like.device)
            self._made_up[name, index] = known
        return known


def _norm_hook(name: str, trace: Trace, multiplier: Tensor | None) -> Any:
    """A forward hook that notes a norm's first call and its width in ``trace``, and multiplies its output."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if isinstance(output, Tensor) and any(p.numel() == output.shape[-1] for p in module.parameters()):
            trace.norm_calls.setdefault(name, (args, kwargs))
            trace.norm_widths[name] = output.shape[-1]
            if output.numel():
                trace.reached.add(name)
            return output if multiplier is None else output * multiplier.to(output)
        return output

    return hook


class TopKWatch(FunctionMode):
    """Notes from which linears' outputs a few are chosen, by top-k, argmax or sorting: these linears are routers.

    An output is followed through functions that keep its number of elements and its last dimension, such as softmax, casts
    and biases. So neither scores of attention nor logits of a vocabulary count, since nothing chooses from them here.

    Attributes:
        routers: names of these linears.
    """

    def __init__(self) -> None:
        super().__init__()
        self.routers: set[str] = set()
        self._origin: dict[int, str] = {}
        self._alive: list[Tensor] = []  # keeps ids unique for the length of the pass

    def mark(self, name: str, y: Tensor) -> None:
        """Follow ``y``, which is the output of the linear called ``name`` or was computed from it."""
        self._origin[id(y)] = name
        self._alive.append(y)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        source = next((a for a in args if isinstance(a, Tensor) and id(a) in self._origin), None)
        if source is not None:
            name = self._origin[id(source)]
            if getattr(func, "__name__", "") in ("topk", "argmax", "sort", "argsort"):
                self.routers.add(name)
            elif isinstance(result, Tensor) and result.numel() == source.numel() and result.shape[-1:] == source.shape[-1:]:
                self.mark(name, result)
        return result


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, for modules without children whose only floating-point parameters are vectors.

    That is every kind of norm, and layer scales.
    """
    found = {}
    for name, module in model.named_modules():
        parameters = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        plain = next(module.children(), None) is None and not isinstance(module, torch.jit.ScriptModule)  # that takes no hooks
        if plain and parameters and all(p.dim() == 1 for p in parameters):
            found[name] = module
    return found


@contextmanager
def forward_replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """While the context is open, calling ``module`` calls ``forward``."""
    own = module.__dict__.get("forward")  # accelerate and others put one on the instance as well
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def parameters_hidden(linear: Any) -> Iterator[None]:
    """While the context is open, whoever reads the weight and the bias of ``linear`` finds what an INT8 layer has there.

    That is integers, here all of them zero, a bias that a fold may have changed, and no parameter but an empty one.
    """
    weight, bias = weight_of(linear), linear.bias
    codes = torch.zeros((), dtype=torch.int8, device=weight.device).expand(weight.shape)
    own = linear._parameters, linear._buffers
    linear._parameters = {PLACEHOLDER: placeholder(weight.dtype, weight.device)}
    linear._buffers = {**linear._buffers, "weight": codes, "bias": None if bias is None else torch.full_like(bias, 0.5)}
    try:
        yield
    finally:
        linear._parameters, linear._buffers = own

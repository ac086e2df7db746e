"""The residual stream, and heads of attention, as spaces that may be rotated: found by probing, refused with the reason.

In a pre-norm model every branch reads the stream through a norm and adds its output to it. An orthogonal R that keeps the
mean commutes with every norm that has no gain. So R can be written into the weights: into all that writes the stream (rows of
embeddings, outputs of linears) and, transposed, into all that reads it. That holds only if nothing else does either.

1. *Writers.* The output of each class of linears is moved along a channel vector of its own. Where the sum of an embedding and
   of such moves arrives, undistorted, at some module, there is the stream, and the classes in the sum are its writers.
2. *Gains.* A norm whose input is the stream is replayed alone, to tell gain and bias from each other. The probe of
   :mod:`.discover` proves that nothing but linears read its output.
3. *Readers.* All writers are rotated at once, with norms of gain one. Each linear's input must now be rotated, or be what it
   was. Anything else, and any change of the model's outputs, means that the stream does not rotate. Routers that hold a bare
   matrix are asked by themselves whether they multiply by it.

Heads: the output rows of a value projection are rotated in blocks of d, for each d, the widest first. Where the output
projection then reads what it read before, rotated in the same blocks, d is the width of a head.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantkit.core.errors import MethodError
from quantkit.core.rotation import BlockRotation
from quantkit.core.sites import Site
from quantkit.discovery.discover import _classes, _distance, _Prober
from quantkit.discovery.probe import Probe, Trace, forward_replaced, norms_of
from quantkit.model.modules import linears_of, map_tensors, tensors_in, weight_of

SMALLEST_HEAD = 8


@dataclass(frozen=True)
class Gain:
    """How a norm scales and shifts what it has normalized.

    Attributes:
        weight: name of the parameter that scales, None if there is none.
        rule: ``"scale"`` for a gain of w, ``"offset"`` for one of 1 + w.
        bias: name of the parameter that is added, None if there is none.
    """

    weight: str | None
    rule: Literal["scale", "offset"] = "scale"
    bias: str | None = None

    @property
    def neutral(self) -> float:
        """What the weight is where it does nothing."""
        return 1.0 if self.rule == "scale" else 0.0


@dataclass(frozen=True)
class Stream:
    """A residual stream that may be rotated as a whole.

    Attributes:
        width: its channels.
        embeddings, writers: whose rows, and linears whose outputs, add up to it.
        readers: linear -> the norm in front of it whose gain it has to take over, or None. Routers that are no
            ``nn.Linear`` but multiply their input by a ``weight [E, H]`` count as linears here.
        gains: the parameters of each of these norms.
    """

    width: int
    embeddings: tuple[str, ...]
    writers: tuple[str, ...]
    readers: Mapping[str, str | None]
    gains: Mapping[str, Gain]


@dataclass(frozen=True)
class Heads:
    """A value projection and the linears that read its rows, mixed over tokens but not over the channels of a head.

    Attributes:
        writer: name of the value projection, or of the fused one that holds it.
        rows: ``[K]`` int64, its row behind each channel of the readers.
        readers: output projections.
        width: channels of a head.
    """

    writer: str
    rows: Tensor
    readers: tuple[str, ...]
    width: int


def find_stream(model: nn.Module, batch: Any) -> Stream:
    """The residual stream of ``model``, proven to rotate; the model is only watched.

    Raises:
        MethodError: it has none, or something reads or writes it channel by channel; the message says what.
    """
    return _Search(model, batch).stream()


def find_heads(model: nn.Module, batch: Any, sites: Sequence[Site]) -> list[Heads]:
    """Value projections among the producers of ``sites``, with the width of their heads; the model is only watched."""
    search = _Search(model, batch)
    makers = [site.producer.module for site in sites if site.producer]
    pending = {
        site.name: site for site in sites
        if site.producer and site.producer.kind == "linear" and site.producer.power == 1
        and makers.count(site.producer.module) == 1
    }  # fmt: skip
    found: dict[str, Heads] = {}
    reference, _ = search.run()
    widths = {d for site in pending.values() for d in range(SMALLEST_HEAD, site.channels + 1) if site.channels % d == 0}
    for width in sorted(widths, reverse=True):
        rotation = BlockRotation(width)
        tried = {name: heads for name, site in pending.items() if (heads := _in_blocks(site, width)) is not None}
        if not tried:
            continue
        trace, _ = search.run({heads.writer: _rows_rotated(heads, rotation) for heads in tried.values()})
        for name, heads in tried.items():
            if all(search.rotated(reference, trace, reader, rotation) for reader in heads.readers):
                found[name] = heads
                del pending[name]
    return [found[site.name] for site in sites if site.name in found]


def blocks_of(heads: Heads) -> Tensor:
    """``[heads, width]`` int64: the rows of each value head, once, in the order of their first readers."""
    return torch.stack(list({int(block[0]): block for block in heads.rows.view(-1, heads.width)}.values()))


def _in_blocks(site: Site, width: int) -> Heads | None:
    """``site`` as heads of ``width``; None where a row would belong to two of them."""
    assert site.producer is not None
    if site.channels % width:
        return None
    heads = Heads(site.producer.module, site.producer.rows, site.linears, width)
    distinct = {tuple(block.tolist()) for block in heads.rows.view(-1, width)}
    return heads if sum(map(len, distinct)) == len(heads.rows.unique()) == sum(len(set(b)) for b in distinct) else None


def _rows_rotated(heads: Heads, rotation: BlockRotation) -> Callable[[Tensor], Tensor]:
    blocks = blocks_of(heads)

    def edit(y: Tensor) -> Tensor:
        y = y.clone()
        y[..., blocks.flatten()] = rotation.apply(y[..., blocks.flatten()]).to(y)
        return y

    return edit


class _Search:
    """Asks the questions of the module docstring."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self.model, self.linears, self.norms = model, linears_of(model), norms_of(model)
        self.probe = Probe(model, self.linears, self.norms, batch)
        # of the shortest format: what passed through it is no better, whatever it is added to
        kinds = {p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1}
        self.eps = max((torch.finfo(kind).eps for kind in kinds), default=torch.finfo(torch.float32).eps)

    def run(
        self,
        edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        *,
        width: int | None = None,
        twins: Mapping[str, nn.Module] | None = None,
        multipliers: dict[str, Tensor] | None = None,
    ) -> tuple[Trace, dict[tuple[str, int, int], Tensor]]:
        """One pass with the outputs of linears and embeddings edited and norms replaced by their ``twins``.

        Also returns every tensor ``[..., width]`` that some module was called on, by (module, call, argument).
        """
        edits, seen = edits or {}, {}
        calls: dict[str, int] = {}

        def watch(name: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                calls[name] = calls.get(name, -1) + 1
                for index, tensor in enumerate(tensors_in([*args, *kwargs.values()])):
                    if tensor.dim() > 1 and tensor.shape[-1] == width:
                        seen[name, calls[name], index] = tensor.detach().clone()

            return hook

        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if width is not None:
                    stack.callback(module.register_forward_pre_hook(watch(name), with_kwargs=True).remove)
                if isinstance(module, nn.Embedding) and name in edits:
                    stack.callback(module.register_forward_hook(lambda _, args, y, edit=edits[name]: edit(y)).remove)
            for name, twin in (twins or {}).items():
                stack.enter_context(forward_replaced(self.model.get_submodule(name), twin.forward))
            trace = self.probe.run(multipliers or {}, edits=edits)
        return trace, seen

    def rotated(self, before: Trace, after: Trace, name: str, rotation: BlockRotation) -> bool:
        """Whether every input of this linear is that of ``before``, rotated."""
        return self._agree([_turned(x, rotation) for x in before.inputs[name]], after.inputs[name])

    def _agree(self, wanted: Sequence[Tensor], got: Sequence[Tensor]) -> bool:
        def near(a: Tensor, b: Tensor) -> bool:
            if a.shape != b.shape:
                return False
            return bool((a.double() - b.double()).norm() <= max(1e-5, 4 * self.eps) * a.double().norm())

        return len(wanted) == len(got) and all(near(a, b) for a, b in zip(wanted, got, strict=True))

    def stream(self) -> Stream:
        width, embeddings = self._width()
        writers, behind = self._writers(width, embeddings)
        reference, _ = self.run()
        gains = {name: self._gain(name, width, reference) for name in behind}
        absorbed = self._absorbed(gains, reference)
        readers, routers = self._readers(width, embeddings, writers, gains)
        for linear, norm in absorbed.items():
            if linear not in readers:
                raise MethodError(f"{linear!r} reads the norm {norm!r}, and not only its channels")
        absorbed |= self._in_front(routers, width, gains)
        return Stream(width, embeddings, writers, {name: absorbed.get(name) for name in (*readers, *routers)}, gains)

    def _width(self) -> tuple[int, tuple[str, ...]]:
        """Of the embeddings that most linears read or write, and their names."""
        widths = {name: m.embedding_dim for name, m in self.model.named_modules() if isinstance(m, nn.Embedding)}
        if not widths:
            raise MethodError(f"{type(self.model).__name__} has no embedding that begins a residual stream")
        shapes = [weight_of(linear).shape for linear in self.linears.values()]
        width = max(widths.values(), key=lambda w: sum(shape.count(w) for shape in map(list, shapes)))
        return width, tuple(name for name, w in widths.items() if w == width)

    def _writers(self, width: int, embeddings: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
        """Linears that add to the stream, and norms with parameters that read it."""
        rows = {n: width for n, m in self.linears.items() if weight_of(m).shape[0] == width}
        classes = _classes(self.model, rows)
        random = torch.Generator().manual_seed(3)
        along = torch.randn(1 + len(classes), width, generator=random, dtype=torch.float64)  # one direction for each class
        _, before = self.run(width=width)

        def arriving(moves: Mapping[str, Tensor]) -> dict[tuple[str, int, int], set[int]]:
            """The directions of which the change of each tensor is made."""
            _, after = self.run({name: _moved(name, direction) for name, direction in moves.items()}, width=width)
            same = [key for key, tensor in before.items() if key in after and after[key].shape == tensor.shape]
            return {key: _parts(before[key], after[key], along, self.eps) for key in same}

        begun = arriving(dict.fromkeys(embeddings, along[-1]))
        sums = arriving({name: along[i] for i, names in enumerate(classes) for name in names})
        met = [parts for key, parts in sums.items() if len(parts) > 1 or begun.get(key)]
        adding: set[int] = set().union(*met)
        if not adding:
            raise MethodError(
                f"no linear adds its output to a residual stream of {width} channels: a norm comes between, or there is none"
            )
        stream = {key[0] for key in sums if begun[key] or (sums[key] and sums[key] <= adding)}
        return tuple(name for i in sorted(adding) for name in classes[i]), [name for name in self.norms if name in stream]

    def _gain(self, name: str, width: int, reference: Trace) -> Gain:
        """Tell the parameters of a norm from each other by replaying it alone."""
        norm = self.norms[name]
        unclear = MethodError(f"the norm {name!r} is no plain one: its parameters are not a gain and a bias of its channels")
        if name not in reference.norm_calls:
            raise unclear
        args, kwargs = map_tensors(reference.norm_calls[name], _precise)
        own = {key: _precise(p.detach()) for key, p in norm.named_parameters()}

        def replay(**changed: Tensor) -> Tensor:
            with torch.no_grad():
                out: Tensor = torch.func.functional_call(norm, {**own, **changed}, args, kwargs)
            return out

        plain = replay()
        if any(p.numel() != width for p in own.values()):
            raise unclear
        random = torch.Generator().manual_seed(4)
        moves = {key: torch.rand(width, generator=random).to(p) + 0.5 for key, p in own.items()}
        added = [key for key, move in moves.items() if _near(replay(**{key: own[key] + move}), plain + move)]
        scaling = [key for key in own if key not in added]
        if len(added) > 1 or len(scaling) > 1:
            raise unclear
        bias = added[0] if added else None
        nothing = {bias: torch.zeros_like(own[bias])} if bias else {}
        if not scaling:
            return Gain(None, bias=bias)
        rules: tuple[Literal["scale", "offset"], ...] = ("scale", "offset")
        for rule in rules:
            gain = Gain(scaling[0], rule, bias)
            inner = replay(**{scaling[0]: torch.full_like(own[scaling[0]], gain.neutral)}, **nothing)
            factor = own[scaling[0]] + (1.0 - gain.neutral)
            if _near(inner * factor + (own[bias] if bias else 0.0), plain):
                return gain
        raise unclear

    def _absorbed(self, gains: Mapping[str, Gain], reference: Trace) -> dict[str, str]:
        """Linear -> norm, once nothing but linears reads the output of any norm that has to lose its gain."""
        prober = _Prober(self.probe, reference)
        prober.rows = {name: reference.norm_widths[name] for name in gains}
        found, _ = prober.producers()
        plain = torch.arange(max(prober.rows.values(), default=0))
        fed = {linear: norm for linear, (norm, rows, power) in found.items() if power == 1 and torch.equal(rows, plain)}
        for name, gain in gains.items():
            if name not in fed.values() and not is_neutral(self.norms[name], gain):
                raise MethodError(
                    f"the output of the norm {name!r} is read by something besides linears, so its gain must stay"
                )
        return fed

    def _readers(
        self, width: int, embeddings: Sequence[str], writers: Sequence[str], gains: Mapping[str, Gain]
    ) -> tuple[list[str], list[str]]:
        """Linears and routers whose input rotates with all that writes the stream; everything else must stay what it is."""
        rotation = BlockRotation(width)
        twins = {name: _neutral_twin(self.norms[name], gain) for name, gain in gains.items()}
        before, inputs = self.run(twins=twins, width=width)
        edits = {name: lambda y: _turned(y, rotation) for name in (*embeddings, *writers)}
        after, turned = self.run(edits, twins=twins, width=width)
        readers, routers = [], []
        for name, linear in self.linears.items():
            if name not in before.inputs:
                if width in weight_of(linear).shape:
                    raise MethodError(f"{name!r} never ran in the probe and may belong to the stream of {width} channels")
            elif self._agree(before.inputs[name], after.inputs.get(name, [])):
                continue
            elif weight_of(linear).shape[1] == width and self.rotated(before, after, name, rotation):
                readers.append(name)
            else:
                raise MethodError(
                    f"the input of {name!r} does not turn with the stream of {width} channels: something on the way to it "
                    "works on single channels, or writes to the stream and is no linear and no embedding"
                )
        for key, x in inputs.items():
            if self._is_router(key[0], width) and not self._agree([x], [turned[key]]):
                if key[1:] != (0, 0) or not self._multiplies(key[0], x, rotation):
                    raise MethodError(
                        f"{key[0]!r} reads the stream of {width} channels, and does not only multiply by its weight"
                    )
                routers.append(key[0])
        noise = max((_distance(a, b) for a, b in zip(before.outputs, self.run(twins=twins)[0].outputs, strict=True)), default=0)
        if len(before.outputs) != len(after.outputs) or any(
            _distance(a, b) > 10 * noise for a, b in zip(before.outputs, after.outputs, strict=True)
        ):
            raise MethodError(f"an output of the model reads the stream of {width} channels, and not through a linear")
        return readers, routers

    def _is_router(self, name: str, width: int) -> bool:
        """Whether this is a leaf with a bare matrix of its own for ``width`` channels."""
        module = self.model.get_submodule(name)
        weight = getattr(module, "weight", None)
        plain = isinstance(weight, nn.Parameter) and weight.dim() == 2 and weight.shape[1] == width
        return plain and name not in self.linears and not isinstance(module, nn.Embedding) and not any(module.children())

    def _multiplies(self, name: str, x: Tensor, rotation: BlockRotation) -> bool:
        """Whether the module computes the same from a scaled and rotated input with its weight rewritten to match."""
        module = self.model.get_submodule(name)
        random = torch.Generator().manual_seed(5)
        scale = (torch.rand(rotation.width, generator=random, dtype=torch.float64) + 0.5).to(x.device)
        own = {key: _precise(p.detach()) for key, p in module.named_parameters()}
        wide = _precise(x)
        changed = {"weight": _turned(own["weight"] * scale.to(wide), rotation)}
        with torch.no_grad():
            wanted = list(tensors_in(torch.func.functional_call(module, own, (wide,))))
            got = list(
                tensors_in(torch.func.functional_call(module, own | changed, (_turned(wide / scale.to(wide), rotation),)))
            )
        return len(wanted) == len(got) and all(_near(b, a) for a, b in zip(wanted, got, strict=True))

    def _in_front(self, routers: Sequence[str], width: int, gains: Mapping[str, Gain]) -> dict[str, str]:
        """Router -> the norm that it reads, told by the size that its input takes when each norm is given one of its own."""
        if not routers:
            return {}
        sizes = dict(zip(gains, torch.linspace(1.5, 3.0, len(gains)).tolist(), strict=True))
        _, before = self.run(width=width)
        _, after = self.run(width=width, multipliers={name: torch.full((width,), size) for name, size in sizes.items()})
        found = {}
        for router in routers:
            ratio = float(after[router, 0, 0].double().norm() / before[router, 0, 0].double().norm())
            norm, size = min(sizes.items(), key=lambda item: abs(item[1] - ratio), default=("", 1.0))
            if abs(ratio - size) < 0.2 / len(sizes):  # and not 1, for a router that reads no norm with parameters
                found[router] = norm
        return found


def is_neutral(norm: nn.Module, gain: Gain) -> bool:
    """Whether the norm only normalizes: gain one, and no bias."""
    plain = gain.weight is None or bool((norm.get_parameter(gain.weight) == gain.neutral).all())
    return plain and (gain.bias is None or not bool(norm.get_parameter(gain.bias).any()))


def _neutral_twin(norm: nn.Module, gain: Gain) -> nn.Module:
    twin = copy.deepcopy(norm)
    with torch.no_grad():
        if gain.weight is not None:
            twin.get_parameter(gain.weight).fill_(gain.neutral)
        if gain.bias is not None:
            twin.get_parameter(gain.bias).zero_()
    return twin


def _moved(name: str, direction: Tensor) -> Callable[[Tensor], Tensor]:
    """Adds ``direction`` to every token, as often as a random number says."""

    def edit(y: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        size = torch.randn(y.shape[:-1], generator=random, dtype=torch.float64)[..., None]
        return (y.double() + (4 * size * direction).to(y.device)).to(y)

    return edit


def _parts(before: Tensor, after: Tensor, along: Tensor, eps: float) -> set[int]:
    """The directions ``along [n, H]`` that span the difference of two ``[..., H]`` token by token; none where they do not."""
    rows = (after.double() - before.double()).reshape(-1, along.shape[1]).cpu()
    share = torch.linalg.lstsq(along.T, rows.T).solution  # [n, rows]
    bound = max(1e-4, 16 * eps)
    if not bool((share.T @ along - rows).norm() <= bound * rows.norm()):
        return set()
    size = share.norm(dim=1)
    return set((size > max(0.01, bound / 2) * size.max()).nonzero()[:, 0].tolist())


def _turned(x: Tensor, rotation: BlockRotation) -> Tensor:
    return rotation.apply(x).to(x.dtype)


def _near(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-5 * b.abs().amax()).all())


def _precise(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor

"""The residual stream of a model, proven to rotate, or refused with the reason.

In a pre-norm model every branch reads the residual stream through a norm, and adds its output to it. An orthogonal matrix R
that keeps the mean commutes with every norm that has no gain. So R can be written into the weights: into all that writes the
stream (the rows of embeddings, the outputs of linears) and, transposed, into all that reads it. That is right only if nothing
else writes or reads it, and the probe is asked in four steps.

1. *Who writes?* To the output of the linears at each place, a direction of its own is added, a random vector of channels. Where
   the sum of an embedding and of such directions arrives undistorted at some module, there is the stream, and the linears whose
   directions are in the sum write it.
2. *Which norms?* A norm whose input is the stream is replayed alone, which tells its gain from its bias (:mod:`.norms`).
   The gain has to move into the linears behind, so nothing else may read the norm's output (:mod:`.prober`).
3. *Who reads?* All writers are rotated at once, with norms that have no gain. The input of each linear then has to be rotated,
   or to be what it was. Anything else, or a change of the model's outputs, means that the stream does not rotate.
4. *Which routers?* Some are no linears, but modules that hold a bare matrix. Each is run by itself on a rotated input with its
   matrix rotated, and has to give what it gave.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.errors import MethodError
from quantkit.core.rotation import BlockRotation
from quantkit.core.spaces import Gain, ResidualStream
from quantkit.discovery.distances import largest_distance, near
from quantkit.discovery.norms import gain_of, is_neutral, neutral_twin, precise
from quantkit.discovery.places import peers_of
from quantkit.discovery.probe import Trace
from quantkit.discovery.prober import Prober
from quantkit.discovery.rotating import Edits, RotationProbe, Seen, rotate
from quantkit.model.modules import tensors_in, weight_of


def find_stream(model: nn.Module, batch: Any) -> ResidualStream:
    """The residual stream of ``model``, proven to rotate; the model is only watched.

    Args:
        model: any module.
        batch: a small batch.

    Raises:
        MethodError: it has no residual stream, or something reads or writes it channel by channel; the message says what.
    """
    probe = RotationProbe(model, batch)
    return _Search(probe, *_embeddings(model, probe.linears)).stream()


def _embeddings(model: nn.Module, linears: Mapping[str, nn.Module]) -> tuple[int, tuple[str, ...]]:
    """The width of the stream, which is that of the embeddings that most linears read or write, and their names."""
    widths = {
        name: m.embedding_dim
        for name, m in model.named_modules()
        if isinstance(m, nn.Embedding) and "weight" in m._parameters  # else it is computed, and nothing can be written to it
    }
    if not widths:
        raise MethodError(f"{type(model).__name__} has no embedding that begins a residual stream and holds its own weight")
    shapes = [tuple(weight_of(linear).shape) for linear in linears.values()]
    width = max(widths.values(), key=lambda w: sum(shape.count(w) for shape in shapes))
    return width, tuple(name for name, w in widths.items() if w == width)


class _Search:
    """Takes the steps of the page above for one model and one width."""

    def __init__(self, probe: RotationProbe, width: int, embeddings: tuple[str, ...]) -> None:
        self.probe, self.width, self.embeddings = probe, width, embeddings
        self.rotation = BlockRotation(width)

    def stream(self) -> ResidualStream:
        writers, norms = self._writers()
        reference = self.probe.run()
        gains = {name: gain_of(name, self.probe.norms[name], self.width, reference) for name in norms}
        norm_of = self._readers_of_norms(gains, reference)
        readers, routers = self._readers(writers, gains)
        for linear, norm in norm_of.items():
            if linear not in readers:
                raise MethodError(f"{linear!r} reads the norm {norm!r}, and not only its channels")
        norm_of |= self._norms_of_routers(routers, gains)
        by_reader = {name: norm_of.get(name) for name in (*readers, *routers)}
        return ResidualStream(self.width, self.embeddings, writers, by_reader, gains)

    def _run(self, edits: Edits, **options: Any) -> tuple[Trace, Seen]:
        with self.probe.watching(self.width) as seen:
            return self.probe.run(edits, **options), seen

    def _writers(self) -> tuple[tuple[str, ...], list[str]]:
        """Names of the linears that write the stream, and of the norms with parameters that read it."""
        rows = {n: self.width for n, m in self.probe.linears.items() if weight_of(m).shape[0] == self.width}
        places = peers_of(self.probe.model, rows)
        random = torch.Generator().manual_seed(3)
        directions = torch.randn(1 + len(places), self.width, generator=random, dtype=torch.float64, device="cpu")
        _, before = self._run({})

        def arriving(added: Mapping[str, Tensor]) -> dict[tuple[str, int, int], set[int]]:
            """What modules are called on -> numbers of the directions that its change is made of."""
            _, after = self._run({name: _adding(name, direction) for name, direction in added.items()})
            same = [key for key, tensor in before.items() if key in after and after[key].shape == tensor.shape]
            return {key: _directions_in(before[key], after[key], directions, self.probe.eps) for key in same}

        embedded = arriving(dict.fromkeys(self.embeddings, directions[-1]))
        sums = arriving({name: directions[i] for i, names in enumerate(places) for name in names})
        meeting = [found for key, found in sums.items() if len(found) > 1 or embedded.get(key)]
        writing: set[int] = set().union(*meeting)
        if not writing:
            raise MethodError(
                f"no linear adds its output to a residual stream of {self.width} channels: a norm comes between, or there is "
                "none"
            )
        on_stream = {key[0] for key in sums if embedded[key] or (sums[key] and sums[key] <= writing)}
        writers = tuple(name for i in sorted(writing) for name in places[i])
        return writers, [name for name in self.probe.norms if name in on_stream]

    def _readers_of_norms(self, gains: Mapping[str, Gain], reference: Trace) -> dict[str, str]:
        """Name of a linear -> name of the norm that it reads, once nothing else reads a norm that has to lose its gain."""
        rows = {name: reference.norm_widths[name] for name in gains}
        origins, _ = Prober(self.probe.probe, reference, rows).origins()
        plain = torch.arange(self.width, dtype=torch.int64, device="cpu")
        norm_of = {n: origin.module for n, origin in origins.items() if origin.power == 1 and torch.equal(origin.rows, plain)}
        for name, gain in gains.items():
            if name not in norm_of.values() and not is_neutral(self.probe.norms[name], gain):
                raise MethodError(
                    f"the output of the norm {name!r} is read by something besides linears, so its gain must stay"
                )
        return norm_of

    def _readers(self, writers: Sequence[str], gains: Mapping[str, Gain]) -> tuple[list[str], list[str]]:
        """Names of the linears, and of the routers, whose input rotates with all that writes the stream."""
        twins = {name: neutral_twin(self.probe.norms[name], gain) for name, gain in gains.items()}
        before, inputs = self._run({}, twins=twins)
        rotated = {name: lambda y: rotate(y, self.rotation) for name in (*self.embeddings, *writers)}
        after, rotated_inputs = self._run(rotated, twins=twins)
        readers = [name for name in self.probe.linears if self._reads(name, before, after)]
        routers = []
        for key, x in inputs.items():
            name = key[0]
            if self._is_router(name) and not self.probe.agree([x], [rotated_inputs[key]]):
                if key != (name, 0, 0) or not self._multiplies(name, x):
                    raise MethodError(
                        f"{name!r} reads the stream of {self.width} channels, and does not only multiply by its weight"
                    )
                routers.append(name)
        noise = largest_distance(before.outputs, self.probe.run(twins=twins).outputs)
        if largest_distance(before.outputs, after.outputs) > 10 * noise:
            raise MethodError(f"an output of the model reads the stream of {self.width} channels, and not through a linear")
        return readers, routers

    def _reads(self, name: str, before: Trace, after: Trace) -> bool:
        """Whether the input of this linear was rotated, rather than left alone; raises MethodError for anything else."""
        shape = weight_of(self.probe.linears[name]).shape
        if name not in before.inputs:
            if self.width in shape:
                raise MethodError(f"{name!r} never ran in the probe and may belong to the stream of {self.width} channels")
            return False
        if self.probe.agree(before.inputs[name], after.inputs.get(name, [])):
            return False
        if shape[1] == self.width and self.probe.rotated(before, after, name, self.rotation):
            return True
        raise MethodError(
            f"the input of {name!r} does not rotate with the stream of {self.width} channels: something on the way to it "
            "works on single channels, or writes to the stream and is no linear and no embedding"
        )

    def _is_router(self, name: str) -> bool:
        """Whether this module has no children and holds a bare matrix for the channels of the stream, but is no linear."""
        module = self.probe.model.get_submodule(name)
        weight = getattr(module, "weight", None)
        bare = isinstance(weight, nn.Parameter) and weight.dim() == 2 and weight.shape[1] == self.width
        return bare and name not in self.probe.linears and not isinstance(module, nn.Embedding) and not any(module.children())

    def _multiplies(self, name: str, x: Tensor) -> bool:
        """Whether a module gives the same for a scaled and rotated input, if its weight is rewritten to match."""
        module = self.probe.model.get_submodule(name)
        random = torch.Generator().manual_seed(5)
        scale = (torch.rand(self.width, generator=random, dtype=torch.float64, device="cpu") + 0.5).to(x.device)
        own = {key: precise(p.detach()) for key, p in module.named_parameters()}
        x = precise(x)
        scale = scale.to(x)
        changed = own | {"weight": rotate(own["weight"] * scale, self.rotation)}
        with torch.no_grad():
            wanted = list(tensors_in(torch.func.functional_call(module, own, (x,))))
            got = list(tensors_in(torch.func.functional_call(module, changed, (rotate(x / scale, self.rotation),))))
        return len(wanted) == len(got) and all(map(near, got, wanted))

    def _norms_of_routers(self, routers: Sequence[str], gains: Mapping[str, Gain]) -> dict[str, str]:
        """Name of a router -> name of the norm that it reads.

        The output of each norm is multiplied by a number of its own, from 1.5 to 3, by which the router's input grows. It stays
        as it is for a router that reads no norm with parameters, and such a router is left out.
        """
        if not routers:
            return {}
        numbers = dict(
            zip(gains, torch.linspace(1.5, 3.0, len(gains), dtype=torch.float32, device="cpu").tolist(), strict=True)
        )
        _, before = self._run({})
        _, after = self._run(
            {},
            multipliers={
                name: torch.full((self.width,), number, dtype=torch.float32, device="cpu") for name, number in numbers.items()
            },
        )
        found = {}
        for router in routers:
            ratio = float(after[router, 0, 0].double().norm() / before[router, 0, 0].double().norm())
            norm, number = min(numbers.items(), key=lambda item: abs(item[1] - ratio), default=("", 1.0))
            if abs(ratio - number) < 0.2 / len(numbers):
                found[router] = norm
        return found


def _adding(name: str, direction: Tensor) -> Callable[[Tensor], Tensor]:
    """Adds ``direction [H]`` to the output ``[..., H]`` of this module, times another random number for every token."""

    def edit(y: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        size = torch.randn(y.shape[:-1], generator=random, dtype=torch.float64, device="cpu")[..., None]
        return (y.double() + (4 * size * direction).to(y.device)).to(y)

    return edit


def _directions_in(before: Tensor, after: Tensor, directions: Tensor, eps: float) -> set[int]:
    """Numbers of those ``directions [n, H]`` that the difference of two ``[..., H]`` is a sum of, token by token.

    Found by least squares. Empty if something is left that is no sum of them.
    """
    rows = (after.double() - before.double()).reshape(-1, directions.shape[1]).cpu()
    share = torch.linalg.lstsq(directions.T, rows.T).solution  # [n, tokens]
    bound = max(1e-4, 16 * eps)
    if not bool((share.T @ directions - rows).norm() <= bound * rows.norm()):
        return set()
    size = share.norm(dim=1)
    return set((size > max(0.01, bound / 2) * size.max()).nonzero()[:, 0].tolist())

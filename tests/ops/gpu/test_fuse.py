"""Under torch.compile, linears share codes, and norms and gates move into the kernel that makes them."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantkit

pytest.importorskip("triton")

K, INNER = 64, 128


class WrittenOut(nn.Module):
    """RMSNorm as transformers' models spell it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(K) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + 1e-5)
        return self.weight * x.to(dtype)


class Block(nn.Module):
    def __init__(self, norm: type[nn.Module] | Any, act: Any, router: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2, self.act = norm(), norm(), act
        self.q, self.k, self.o = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, K)
        self.gate, self.up, self.down = nn.Linear(K, INNER), nn.Linear(K, INNER), nn.Linear(INNER, K)
        self.router = router

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.o(torch.tanh(self.q(h) * self.k(h)))
        h = self.norm2(x)
        x = x + self.down(self.act(self.gate(h)) * self.up(h))
        return x + h.mean() if self.router else x


def graph_and_result(block: nn.Module, x: Tensor) -> tuple[list[Any], Tensor]:
    from quantkit.ops.gpu import fuse

    seen: list[Any] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        fuse.fuse(module.graph)
        module.graph.lint()
        module.recompile()
        seen.extend(node.kwargs.get("source", "") for node in fuse.calls_of(module.graph))
        return module.forward

    torch.compiler.reset()
    with quantkit.use_backend("triton"), torch.inference_mode():
        return seen, torch.compile(block, backend=backend, fullgraph=True)(x)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


NORMS = {
    "rms": lambda: nn.RMSNorm(K, 1e-5),
    "written out": WrittenOut,
    "layer": lambda: nn.LayerNorm(K),
}


@pytest.mark.parametrize("act", [F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh")], ids=["silu", "gelu", "tanh"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.usefixtures("interpreter")
def test_norms_and_gates_move_into_the_call(norm: str, act: Any) -> None:
    torch.manual_seed(0)
    block = quantkit.quantize(Block(NORMS[norm], act), "rtn", calibration=[torch.randn(1, 5, K)], progress=False)
    x = torch.randn(2, 5, K)
    with quantkit.use_backend("triton"), torch.inference_mode():
        eager = block(x)
    sources, fused = graph_and_result(block, x)
    kind = "layer" if norm == "layer" else "rms"
    assert len(sources) == 4  # of q and k, of o, of gate and up, of down
    assert sources[0] == sources[2] == kind
    assert sources[1] == ""
    assert sources[3] in ("silu", "gelu", "gelu_tanh")
    torch.testing.assert_close(fused, eager, rtol=0, atol=0.02 * float(eager.abs().max()))


@pytest.mark.usefixtures("interpreter")
def test_a_norm_that_others_read_stays() -> None:
    torch.manual_seed(0)
    block = quantkit.quantize(
        Block(NORMS["rms"], F.silu, router=True), "rtn", calibration=[torch.randn(1, 5, K)], progress=False
    )
    x = torch.randn(2, 5, K)
    with quantkit.use_backend("triton"), torch.inference_mode():
        eager = block(x)
    sources, fused = graph_and_result(block, x)
    assert sources == ["rms", "", "", "silu"]
    torch.testing.assert_close(fused, eager, rtol=0, atol=0.02 * float(eager.abs().max()))


@pytest.mark.usefixtures("interpreter")
def test_other_arguments_are_not_merged() -> None:
    """Linears with scales of their own keep their own codes."""
    block = quantkit.quantize(Block(NORMS["rms"], F.silu), "rtn", calibration=[torch.randn(1, 5, K)], progress=False)
    block.q.pre_scale = torch.rand(K) + 0.5
    x = torch.randn(2, 5, K)
    with quantkit.use_backend("triton"), torch.inference_mode():
        eager = block(x)
    sources, fused = graph_and_result(block, x)
    assert sources[:3] == ["", "", ""]  # q and k read the norm apart, so that it stays
    torch.testing.assert_close(fused, eager, rtol=0, atol=0.02 * float(eager.abs().max()))


class Restless(Block):
    """Writes to what q has read before k reads it, and to what a gate would be moved past."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q = self.q(h)
        h.add_(1)
        gate, up = self.gate(x), self.up(x)
        y = self.act(gate) * up
        up.mul_(0)
        return x + self.down(y) + (q * self.k(h)).mean()


@pytest.mark.usefixtures("interpreter")
def test_nothing_moves_past_a_write() -> None:
    torch.manual_seed(0)
    calibration = [torch.randn(1, 5, K)]
    block = quantkit.quantize(Restless(NORMS["rms"], F.silu), "rtn", calibration=calibration, ignore=["o"], progress=False)
    x = torch.randn(2, 5, K)
    with quantkit.use_backend("triton"), torch.inference_mode():
        eager = block(x)
    sources, fused = graph_and_result(block, x)
    assert sources == [""] * 4  # q, gate and up together, k, down
    torch.testing.assert_close(fused, eager, rtol=0, atol=0.02 * float(eager.abs().max()))


def test_graphs_without_quantized_layers_are_left_alone() -> None:
    from quantkit.ops.gpu import fuse

    graph = torch.fx.Graph()
    graph.output(graph.call_function(operator.add, (graph.placeholder("a"), 1)))
    before = str(graph)
    fuse.fuse(graph)
    assert str(graph) == before

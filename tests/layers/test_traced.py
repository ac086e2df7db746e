"""Quantized layers where PyTorch records, replaces or transforms operators instead of just computing.

Kernels read and write memory by its address, which nothing of this sees. So everything here either gives what the layer gives
when it is simply called, or is refused with a reason.
"""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import assert_same
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import quantkit
from quantkit import BackendError, W8A8Linear

RECIPES: dict[str, tuple[Any, str]] = {
    "fused": ("smoothquant", "w8a8"),
    "static": ("smoothquant", "w8a8-static"),
    "clusters": (quantkit.RPTQ(4, tile=16), "w8a8-asym"),
    "rotation": ("hadamard", "w8a8"),
    "threshold": (quantkit.LLMInt8(threshold=2.0), "w8a8"),
    "float input": ("rtn", "w8a16"),
}

torch.manual_seed(0)
X, Y, ONE = torch.randn(9, 64), torch.randn(5, 64), torch.randn(1, 64)


@pytest.fixture(params=RECIPES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Its layers have never run, so that what they prepare at first is prepared under what is tested."""
    method, scheme = RECIPES[request.param]
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 8))
    quantkit.quantize(model.eval(), method, scheme=scheme, calibration=[X], progress=False)
    for layer in int8(model):
        layer._forget()
    return model


def int8(model: nn.Module) -> list[W8A8Linear]:
    return [module for module in model.modules() if isinstance(module, W8A8Linear)]


def alone(model: nn.Module, x: Tensor) -> Tensor:
    """What the model gives, by layers of its own."""
    return copy.deepcopy(model)(x)


def test_fake_tensors(model: nn.Module) -> None:
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            inside = model(mode.from_tensor(X))
        outside = model(mode.from_tensor(X))  # such a tensor may leave its mode
    assert isinstance(inside, FakeTensor)
    assert isinstance(outside, FakeTensor)
    assert inside.shape == outside.shape == (9, 8)
    assert_same(model(Y), alone(model, Y))  # nothing fake has stayed


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.parametrize("grad", [False, True])
def test_graphs_of_make_fx(model: nn.Module, mode: str, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        graph = make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(X)
        for x in (-X, Y) if mode == "symbolic" else (-X,):
            assert_same(graph(x), alone(model, x))


def test_exported_programs(model: nn.Module) -> None:
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    for x in (X, Y):
        assert_same(program.module()(x), alone(model, x))
    assert_same(model(Y), alone(model, Y))


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")  # numbers of channels, which are constant
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("example", [X, ONE], ids=["tokens", "token"])
def test_traces_of_jit(model: nn.Module, example: Tensor, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (example,), check_trace=False)
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    stored.seek(0)
    loaded = torch.jit.load(stored)
    for x in (X, Y, ONE):
        assert_same(loaded(x), alone(model, x))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_vmap(model: nn.Module, at: int) -> None:
    batches = torch.stack([X, 3 * X, -X])
    got = torch.vmap(model, in_dims=at)(batches.movedim(0, at))
    for one, x in zip(got, batches, strict=True):
        torch.testing.assert_close(one, alone(model, x), rtol=2.0**-20, atol=2.0**-20)  # of the norm, which is PyTorch's
    assert_same(model(Y), alone(model, Y))


def test_gradients_of_torch_func(model: nn.Module) -> None:
    """They are those of ``backward()``, as if nothing were rounded."""

    def loss(x: Tensor) -> Tensor:
        return model(x).square().sum()

    x = X.clone().requires_grad_()
    got = torch.func.grad(loss)(X)  # first of all calls
    loss(x).backward()
    torch.testing.assert_close(got, x.grad)
    near = {"rtol": 1e-4, "atol": 1e-4}
    jacobian = torch.autograd.functional.jacobian(model, X[0])
    torch.testing.assert_close(torch.func.jacrev(model)(X[0]), jacobian, **near)
    torch.testing.assert_close(torch.func.jacfwd(model)(X[0]), jacobian, **near)
    value, tangent = torch.func.jvp(model, (X[0],), (Y[0],))
    torch.testing.assert_close(tangent, jacobian @ Y[0], **near)
    torch.testing.assert_close(value, alone(model, X[0]))
    single = torch.vmap(torch.func.grad(loss))(X[:, None])[:, 0]
    rows = torch.stack([torch.func.grad(loss)(row[None])[0] for row in X])
    torch.testing.assert_close(single, rows, **near)


def test_forward_derivatives(model: nn.Module) -> None:
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        y = forward.unpack_dual(model(forward.make_dual(X, -X)))
    torch.testing.assert_close(y.tangent, torch.func.jvp(model, (X,), (-X,))[1])


def test_stacked_models_are_refused(model: nn.Module) -> None:
    parameters, buffers = torch.func.stack_module_state([model, copy.deepcopy(model)])

    def call(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(model, (parameters, buffers), (X,))

    with pytest.raises(BackendError, match="made of integers: leave its buffers out"):
        torch.vmap(call)(parameters, buffers)
    assert_same(model(Y), alone(model, Y))


def test_buffers_of_functional_call(model: nn.Module) -> None:
    twin = {name: tensor.clone() for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()}
    assert_same(torch.func.functional_call(model, twin, (X,)), alone(model, X))


class Named(torch.Tensor):
    """A subclass that only has a name."""


def test_subclasses(model: nn.Module) -> None:
    named = model(X.as_subclass(Named))
    assert type(named) is Named
    assert_same(named.as_subclass(Tensor), alone(model, X))
    both = model(TwoTensor(X, -X))
    assert_same(both.a, alone(model, X))
    assert_same(both.b, alone(model, -X))


def test_dispatch_modes(model: nn.Module) -> None:
    with FlopCounterMode(display=False), torch.no_grad():
        assert_same(model(X), alone(model, X))


@pytest.mark.parametrize("where", [torch.inference_mode, torch.no_grad])
def test_first_call_in_inference_mode(model: nn.Module, where: Any) -> None:
    with where():
        first = model(X)
    x = X.clone().requires_grad_()
    y = model(x)
    y.sum().backward()
    assert_same(first, y.detach())
    assert x.grad is not None


def test_compiled_with_gradients(model: nn.Module) -> None:
    torch.compiler.reset()
    got, wanted = X.clone().requires_grad_(), X.clone().requires_grad_()
    torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")(got).sum().backward()
    model(wanted).sum().backward()
    torch.testing.assert_close(got.grad, wanted.grad)


def test_compiled_where_the_compiler_gave_up(model: nn.Module) -> None:
    """A frame that could not be traced once is never tried again, but what it calls is."""
    eval_frame, graphs = torch._C._dynamo.eval_frame, []
    strategy, action, code = eval_frame._FrameExecStrategy, eval_frame._FrameAction, W8A8Linear.forward.__code__

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch.compiler.reset()
    eval_frame.set_code_exec_strategy(code, strategy(action.SKIP, action.DEFAULT))
    try:
        with torch.no_grad():
            for x in (X, ONE):
                assert_same(torch.compile(int8(model)[0], backend=backend)(x), int8(model)[0](x))
    finally:
        eval_frame.set_code_exec_strategy(code, strategy())
    assert not graphs  # no pieces: its operators are called as without a compiler


def test_inputs_on_other_devices(model: nn.Module) -> None:
    for layer in int8(model):
        try:
            y = layer(torch.empty(3, layer.in_features, device="meta", dtype=torch.float32))
        except (BackendError, RuntimeError):
            continue
        assert y.device.type == "meta"


def test_backends_of_threads(model: nn.Module) -> None:
    """Each thread has the backend that it asks for, on the same layers at the same time."""
    wanted = alone(model, X)

    def run(number: int) -> tuple[Tensor, str]:
        if number % 3 == 2:
            return model(X), "cpu"
        name = "reference" if number % 3 else "cpu"
        with quantkit.use_backend(name):
            return model(X), name

    with ThreadPoolExecutor(8) as pool:
        for y, _ in pool.map(run, range(300)):
            assert_same(y, wanted)

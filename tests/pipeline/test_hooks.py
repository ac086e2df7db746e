"""What users put on a linear, hooks and forwards, and weights that hooks compute: the function of the model stays."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import accelerate.hooks
import pytest
import torch
from helpers import Fixed, assert_same, int8, llama, normal, quantized, tokens
from nets import INNER, WIDTH, Net, X
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import quantkit
from quantkit import RPTQ, Transform
from quantkit.model.modules import weight_of

DATA = [normal(40, 9, WIDTH), normal(40, 9, WIDTH, seed=1)]


def net(between: Callable[[Tensor], Tensor] = F.relu) -> Net:
    model = Net(lambda n, x: n.out(torch.tanh(n.b(between(n.a(n.norm(x))))))).eval()
    model.norm.weight.data[:2] *= 4
    return model


def error(model: nn.Module, wanted: Tensor, x: Tensor = X) -> float:
    with torch.no_grad():
        return float((model(x) - wanted).norm() / wanted.norm())


def reasons(model: nn.Module) -> dict[str, str]:
    return {layer.name: layer.reason for layer in quantkit.report(model).layers if layer.kind == "float"}


# ---- hooks


def adds(m: nn.Module, args: Any, y: Tensor) -> Tensor:
    return y + 1


def doubles(m: nn.Module, args: Any, y: Tensor) -> Tensor:
    return 2 * y


def bends(m: nn.Module, args: Any, y: Tensor) -> Tensor:
    return torch.sin(y)


def by_channel(m: nn.Module, args: Any, y: Tensor) -> Tensor:
    return y * torch.linspace(1, 2, y.shape[-1])


def by_attribute(m: Any, args: Any, y: Tensor) -> Tensor:
    return y * m.gain


def triples(m: nn.Module, args: Any) -> Any:
    return (args[0] * 3,)


def lifts(m: nn.Module, args: Any, kwargs: Any) -> Any:
    return (args[0] + 1,), kwargs


def bends_input(m: nn.Module, args: Any) -> Any:
    return (torch.sin(args[0]),)


HOOKS: dict[str, Callable[[Any], Any]] = {
    "a adds": lambda n: n.a.register_forward_hook(adds),
    "a doubles": lambda n: n.a.register_forward_hook(doubles),
    "a bends": lambda n: n.a.register_forward_hook(bends, always_call=True),
    "a by channel": lambda n: n.a.register_forward_hook(by_channel, prepend=True),
    "a by attribute": lambda n: (setattr(n.a, "gain", 5.0), n.a.register_forward_hook(by_attribute))[1],
    "a with kwargs": lambda n: n.a.register_forward_hook(lambda m, args, kwargs, y: y - 1, with_kwargs=True),
    "b triples": lambda n: n.b.register_forward_pre_hook(triples),
    "b lifts": lambda n: n.b.register_forward_pre_hook(lifts, with_kwargs=True),
    "b bends": lambda n: n.b.register_forward_pre_hook(bends_input),
    "a lifts": lambda n: n.a.register_forward_pre_hook(lifts, with_kwargs=True, prepend=True),
    "norm adds": lambda n: n.norm.register_forward_hook(adds),
    "norm doubles": lambda n: n.norm.register_forward_hook(doubles),
    "norm bends": lambda n: n.norm.register_forward_hook(bends),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_run_on_the_quantized_linear_until_they_are_removed(hook: str) -> None:
    model, plain = net(), net()
    handle = HOOKS[hook](model)
    with torch.no_grad():
        wanted = model(X)
        assert error(plain, wanted) > 0.1
    quantized(model, calibration=DATA)
    assert int8(model) == {"a", "b"}
    assert error(model, wanted) < 0.05
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert error(model, wanted) > 0.1


@pytest.mark.parametrize("method", ["smoothquant", RPTQ(3)], ids=str)
@pytest.mark.parametrize("hook", HOOKS)
def test_folds_and_orders_go_around_hooks(hook: str, method: Any) -> None:
    """Shifts as well, which pass from ``a`` to ``b`` since nothing is in between: what a hook makes of a shift is seen."""
    model = net(torch.clone)
    HOOKS[hook](model)
    with torch.no_grad():
        wanted = model(X)
    if isinstance(method, str):
        scale = {"a": torch.linspace(0.5, 2, WIDTH), "b": torch.linspace(0.5, 2, INNER)}
        shift = {"a": normal(WIDTH), "b": normal(INNER, seed=2)}
        method = Fixed(transforms={name: Transform(scale=scale[name], shift=shift[name]) for name in scale})
        quantized(model, method, calibration=DATA, scheme=None)
        assert error(model, wanted) < 1e-5
    else:
        quantized(model, method, calibration=DATA)
        assert error(model, wanted) < 0.05


def test_statistics_are_of_what_arrives() -> None:
    """A hook in front of the linear makes its channels a thousand times larger, which a static scale has to know."""
    model = net()
    model.b.weight.data /= 1000
    model.b.register_forward_pre_hook(lambda m, args: (args[0] * 1000,))
    with torch.no_grad():
        wanted = model(X)
    quantized(model, calibration=[X], scheme="w8a8-static")
    assert error(model, wanted) < 0.05


def test_hooks_in_a_model_of_transformers() -> None:
    model = llama()
    q, down = model.model.layers[0].self_attn.q_proj, model.model.layers[1].mlp.down_proj
    handles = [q.register_forward_pre_hook(triples), down.register_forward_hook(doubles)]
    with torch.no_grad():
        wanted = model(tokens()).logits
        quantized(model)
        assert (model(tokens()).logits - wanted).norm() < 0.05 * wanted.norm()
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gradients_pass_backward_hooks() -> None:
    model, seen = net(), []
    model.b.register_full_backward_hook(lambda m, into, out: seen.append((m, into[0].shape, out[0].shape)))
    quantized(model, calibration=DATA)
    model(X.clone().requires_grad_()).sum().backward()
    assert seen == [(model.b, (*X.shape[:-1], INNER), (*X.shape[:-1], WIDTH))]


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_where_they_were_when_nothing_is_converted(fails: bool) -> None:
    model = net()
    handles = [HOOKS[hook](model) for hook in ("a adds", "b triples")]
    dictionaries = [m._forward_hooks for m in model.modules()]
    if fails:
        with pytest.raises(quantkit.CalibrationError):
            quantized(model, calibration=[X * torch.nan])
    else:
        quantkit.plan(model, calibration=DATA)
    assert all(m._forward_hooks is hooks for m, hooks in zip(model.modules(), dictionaries, strict=True))
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_of_a_fresh_model_run_after_a_checkpoint_was_put_in(tmp_path: Any) -> None:
    model, fresh = net(), net()
    for one in (model, fresh):
        HOOKS["a by attribute"](one)
    quantkit.save(quantized(model, calibration=DATA), tmp_path / "saved")
    assert_same(quantkit.load(tmp_path / "saved", model=fresh)(X), model(X))


# ---- forwards


def on_instance(model: Any) -> None:
    own = model.a.forward
    model.a.forward = lambda x: 2 * own(x)


def of_another(model: Any) -> None:
    model.a.forward = copy.deepcopy(model.a).forward


def by_a_changing_hook(model: Any) -> None:
    class Doubles(accelerate.hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return 2 * output

    accelerate.hooks.add_hook_to_module(model.a, Doubles())


def under_a_moving_hook(model: Any) -> None:
    on_instance(model)
    accelerate.hooks.add_hook_to_module(model.a, accelerate.hooks.AlignDevicesHook("cpu"))


def on_a_moving_hook(model: Any) -> None:
    accelerate.hooks.add_hook_to_module(model.a, accelerate.hooks.AlignDevicesHook("cpu"))
    on_instance(model)


def chained(model: Any) -> None:
    accelerate.hooks.add_hook_to_module(model.a, accelerate.hooks.AlignDevicesHook("cpu"))
    accelerate.hooks.add_hook_to_module(
        model.a, accelerate.hooks.LayerwiseCastingHook(torch.float32, torch.float32, False), append=True
    )


@pytest.mark.parametrize("put", [on_instance, of_another, by_a_changing_hook, under_a_moving_hook, on_a_moving_hook, chained])
def test_a_forward_put_on_a_linear_keeps_it_in_float(put: Any) -> None:
    model = net()
    put(model)
    own, weight = model.a.forward, model.a.weight.detach().clone()
    with torch.no_grad():
        wanted = model(X)
    quantized(model, calibration=DATA)
    assert int8(model) == {"b"}
    assert "a forward put on" in reasons(model)["a"]
    assert model.a.forward is own
    assert torch.equal(model.a.weight, weight)
    assert error(model, wanted) < 0.03


def test_hooks_of_accelerate_that_move_inputs_move_along() -> None:
    model = net()
    for name in ("a", "b"):
        accelerate.hooks.add_hook_to_module(
            model.get_submodule(name), accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True)
        )
    accelerate.hooks.add_hook_to_module(model.b, accelerate.hooks.AlignDevicesHook("cpu"), append=True)
    hooks = model.a._hf_hook, model.b._hf_hook
    assert_same(quantized(model, calibration=DATA)(X), quantized(net(), calibration=DATA)(X))
    assert int8(model) == {"a", "b"}
    assert (model.a._hf_hook, model.b._hf_hook) == hooks
    assert isinstance(model.a.forward, functools.partial)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert not any("forward" in vars(m) and isinstance(m.forward, functools.partial) for m in model.modules())
    assert_same(model(X), quantized(net(), calibration=DATA)(X))


def test_its_own_forward_put_on_a_linear_is_nothing() -> None:
    model = net()
    model.a.forward = model.a.forward
    assert int8(quantized(model, calibration=DATA)) == {"a", "b"}
    assert "forward" not in vars(model.a)


# ---- weights that are computed


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def equalized(m: Any) -> Any:
    """The trick of StyleGAN: a hook makes the weight."""
    m.register_parameter("weight_raw", m._parameters.pop("weight"))
    m.weight = m.weight_raw.detach() * 1.5
    m.register_forward_pre_hook(lambda m, args: setattr(m, "weight", m.weight_raw * 1.5))
    return m


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "pruned bias": lambda m: prune.l1_unstructured(m, "bias", 0.5),
    "parametrized": lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
    "parametrized bias": lambda m: parametrize.register_parametrization(m, "bias", Doubled()),
    "new weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "equalized": equalized,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.filterwarnings("ignore:.*spectral_norm")
@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_are_computed_are_left_alone(kind: str, name: str) -> None:
    for options in ({"scheme": None}, {"ignore": [name]}, {}, {"method": RPTQ(3)}):
        model = net()
        COMPUTED[kind](model.get_submodule(name))
        model.eval()
        layer = model.get_submodule(name)
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        with torch.no_grad():
            wanted = model(X)
        quantized(model, calibration=DATA, **options)
        assert error(model, wanted) < (1e-5 if "scheme" in options else 0.05), options
        assert_same(dict(layer.state_dict()), before, str(options))
        assert model.get_submodule(name) is layer
        assert "computed from others" in reasons(model)[name]


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("kind", ["weight norm", "pruned", "pruned bias", "parametrized", "parametrized bias", "equalized"])
def test_norms_whose_weight_is_computed(kind: str) -> None:
    for options in ({"scheme": None}, {}):
        model = net()
        COMPUTED[kind](model.norm)
        with torch.no_grad():
            wanted = model(X)
        quantized(model, calibration=DATA, **options)
        assert error(model, wanted) < (1e-5 if options else 0.05), options


def test_what_is_no_longer_pruned_is_a_linear() -> None:
    model = net()
    prune.remove(prune.l1_unstructured(model.a, "weight", 0.5), "weight")
    assert int8(quantized(model, calibration=DATA)) == {"a", "b"}
    assert weight_of(net().a).shape == model.a.weight.shape

"""Tensors and states of every kind at the door of a layer: the right numbers, or an error, and never a read of foreign memory.

A layer is asked in a process that may die: with tensors that have no memory, no dtype that a product knows, another device or
an odd layout, under other default dtypes and devices, and after its own buffers were replaced by such.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import isolated
import torch
from helpers import mlp, normal
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import quantkit
from quantkit import W8A8Linear

OUTCOMES = ("right", "an error of ours", "an error of torch's", "no memory: shapes only")


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def one_bit_off(x: Tensor) -> Tensor:
    """At an address that is no multiple of the size of a number."""
    room = torch.zeros(x.nbytes + 8, dtype=torch.uint8)
    place = torch.frombuffer(memoryview(room.numpy())[1 : 1 + x.nbytes], dtype=x.dtype).view(x.shape)
    return place.copy_(x)


INPUTS: dict[str, Callable[[Tensor], Any]] = {
    "as it is": lambda x: x,
    "meta": lambda x: x.to("meta"),
    "fake": lambda x: FakeTensorMode().from_tensor(x),
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "freed": freed,
    "negated view": lambda x: torch.view_as_complex(torch.stack([x, -x], -1).contiguous()).conj().imag,
    "complex": lambda x: torch.complex(x, x),
    "integers": lambda x: x.long(),
    "bytes": lambda x: x.to(torch.uint8),
    "bool": lambda x: x > 0,
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
    "unaligned": one_bit_off,
    "empty": lambda x: x[:0],
    "one token": lambda x: x[0],
    "too narrow": lambda x: x[:, :-1],
    "too wide": lambda x: torch.cat([x, x], 1),
    "a number": lambda x: x[0, 0],
    "sparse": lambda x: x.to_sparse(),
    "compressed rows": lambda x: x.to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor([x, x[:1]]),
    "mkldnn": lambda x: x.to_mkldnn(),
    "a parameter": lambda x: nn.Parameter(x),
    "a subclass": lambda x: x.as_subclass(Named),
    "a list": lambda x: x.tolist(),
    "None": lambda x: None,
    "NaN": lambda x: x.index_fill(1, torch.tensor([0]), float("nan")),
    "Inf": lambda x: x.index_fill(1, torch.tensor([1]), float("inf")),
    "huge": lambda x: x * 1e38,
    "denormal": lambda x: x * 1e-42,
}


class Named(Tensor):
    """A subclass without anything of its own."""


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


STATES: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float16": lambda: default_dtype(torch.float16),
    "default float64": lambda: default_dtype(torch.float64),
    "default meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: torch.autograd.set_detect_anomaly(False),
}
RECIPES: list[tuple[Any, str]] = [
    ("rtn", "w8a8"), ("rtn", "w8a8-static-asym"), ("smoothquant", "w8a8-asym"), ("hadamard", "w8a8"), ("rptq", "w8a8"),
    ("llm_int8", "w8a8"), (quantkit.LLMInt8(columns=3), "w8a8"), ("rtn", "w4a8-g16"), ("rtn", "w4a4"), ("rtn", "w8a16"),
    (["llm_int8", "rptq", "hadamard"], "w8a8"),
]  # fmt: skip


@functools.cache
def layer(index: int) -> W8A8Linear:
    method, scheme = RECIPES[index]
    model = quantkit.quantize(mlp(), method, calibration=[normal(2, 9, 16)], scheme=scheme, progress=False)
    return next(m for m in model.modules() if isinstance(m, W8A8Linear))


def attack(count: int, seed: int = 0) -> dict[str, Any]:
    """Ask so often."""
    logging.disable(logging.CRITICAL)
    for index in range(len(RECIPES)):
        layer(index)
    return isolated.run_all(count, functools.partial(one, seed), OUTCOMES)


def one(seed: int, case: int) -> str:
    dice = random.Random(f"{seed} {case}")
    module = layer(dice.randrange(len(RECIPES)))
    kind, state = dice.choice(list(INPUTS)), dice.choice(list(STATES))
    victim = dice.choice([*module._buffers, *[None] * 12])
    fresh, clean = (
        copy.deepcopy(module),
        torch.randn(dice.choice((1, 2, 7, 33)), 16, generator=torch.Generator().manual_seed(case)),
    )
    what = f"{module} {kind}, {state}, {victim}"
    try:
        if victim is not None and (held := getattr(fresh, victim)) is not None and held.numel():
            planted = dice.choice(list(INPUTS))
            what += f" {planted}"
            setattr(fresh, victim, INPUTS[planted](held))
        x = INPUTS[kind](clean)
    except Exception:  # noqa: BLE001  torch cannot make this of that, or a layer does not take it
        return "an error of torch's"
    both = []
    for backend in ("cpu", "reference"):
        try:
            with quantkit.use_backend(backend), STATES[state]():
                both.append(fresh(x))
        except quantkit.QuantkitError:
            both.append("an error of ours")
        except (KeyError, AssertionError) as error:
            if "FakeTensor" not in str(error):
                raise
            both.append("an error of torch's")
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AttributeError):
            both.append("an error of torch's")
    got, wanted = both
    if isinstance(got, str):
        return got
    if got.is_meta or type(got) not in (Tensor, nn.Parameter, Named):
        return "no memory: shapes only"
    if isinstance(wanted, str):
        return f"{what}: the reference ends in {wanted}"
    got, wanted = got.detach(), wanted.detach()
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"{what}: {got.dtype} {list(got.shape)}, and the reference {wanted.dtype} {list(wanted.shape)}"
    same = torch.equal(got.double().nan_to_num(), wanted.double().nan_to_num())
    return "right" if same else f"{what}: computes something else than the reference"

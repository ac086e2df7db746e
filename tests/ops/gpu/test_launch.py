"""Calls that are recorded and launched again, on a driver whose device is the main memory; all else is the real thing."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quantkit.ops.gpu import launch
from quantkit.ops.gpu.launch import PARAMETER, STEP

HEADER = Path(sysconfig.get_path("include"), "Python.h")
pytestmark = pytest.mark.skipif(shutil.which("cc") is None or not HEADER.exists(), reason="no C compiler, or no Python.h")
guards: Any = torch._C._dynamo.guards
K, N = 4, 2


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("driver") / "libdriver.so"
    headers = [flag for flag in launch.source().flags if flag.startswith("-I")]
    source = Path(__file__).with_name("driver.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", *headers, str(source), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture
def module(driver: ctypes.CDLL) -> Iterator[Any]:
    yield launch.loaded(driver._name, guards._empty_strided_cpu)
    driver.set_fail(0)
    driver.set_device(0)
    driver.set_capturing(0)


class Kernel:
    """Looks to us like one of Triton's, and runs a function of the driver."""

    def __init__(self, driver: ctypes.CDLL, name: str, signature: dict[str, str], ptx: str) -> None:
        self.function: Any = getattr(driver, name)
        self.arg_names = list(signature)
        meta = SimpleNamespace(
            num_ctas=1, launch_cooperative_grid=False, global_scratch_size=0, profile_scratch_size=0, num_warps=4, shared=0,
            launch_pdl=True, tensordesc_meta=[{"fp4_padded": False, "elem_size": 4, "swizzle": 3, "block_size": [1, 4]}],
        )  # fmt: skip
        address = ctypes.cast(self.function, ctypes.c_void_p).value
        self.compiled = SimpleNamespace(
            src=SimpleNamespace(signature=signature), metadata=meta, asm={"ptx": ptx}, function=address, name=name
        )

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            given = [
                ctypes.c_uint64(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a)
                for a, kind in zip(args, self.compiled.src.signature.values(), strict=True) if kind != "constexpr"
            ]  # fmt: skip
            pointers = (ctypes.c_void_p * len(given))(*[ctypes.addressof(value) for value in given])
            for row in range(grid[0]):
                self.function(pointers, row)
            return self.compiled

        return run


class Silent(Kernel):
    """Runs nothing the first time, for which Triton makes maps by itself."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args, **options: self.compiled


def parameters(*widths: str) -> str:
    return ".visible .entry kernel(\n" + ",\n".join(f"  .param {w} kernel_param_{i}" for i, w in enumerate(widths)) + "\n)\n{"


POINTER = ".u64 .ptr .global .align 1"


@pytest.fixture
def scaled(driver: ctypes.CDLL) -> Kernel:
    signature = {"X": "*fp32", "SCALE": "*fp32", "Y": "*fp32", "TOTAL": "*fp32", "stride": "i64", "N": "constexpr"}
    return Kernel(driver, "scaled", signature, parameters(*[POINTER] * 4, ".u64", POINTER, POINTER))


class Layer:
    """Two channels, scaled, with the number of rows so far: zeros and scratch memory are part of it."""

    def __init__(self, module: Any, kernel: Kernel, scale: float) -> None:
        self.kernel, self.scale = kernel, torch.tensor([scale])
        self.family = module.Family(K, N, 1, 0, 1, 1 if self.scale.data_ptr() % 16 == 0 else 0)
        self.runner = module.Runner(self.family, (self.scale,))

    def call(self, x: Tensor) -> Tensor:
        scratch = x.new_empty((3, 100))  # which nothing reads
        total = x.new_zeros(8)
        y = x.new_empty((x.shape[0], N))
        launch.launch(self.kernel, (x.shape[0],), x, self.scale, y, total[4:], x.stride(0), N, num_warps=4)
        return y if scratch is not None else scratch

    def record(self, x: Tensor) -> Tensor:
        return launch.recorded(self.family, x, (self.scale,), self.call)


def wanted(x: Tensor, scale: float) -> Tensor:
    rows = x.reshape(-1, K)
    y = rows[:, :N] * scale + torch.arange(1, len(rows) + 1)[:, None]
    return y.view(*x.shape[:-1], N)


def test_a_plan_serves_other_tensors_and_other_layers(module: Any, scaled: Kernel, driver: ctypes.CDLL) -> None:
    one = Layer(module, scaled, 2.0)
    x = torch.randn(3, K)
    assert one.runner(x) is None  # no plan yet
    torch.testing.assert_close(one.record(x), wanted(x, 2.0))
    assert x in one.family
    assert len(one.family) == 1
    before, early = driver.count_launches(), driver.count_early()
    for other in (torch.randn(3, K), torch.randn(1, 3, K), torch.randn(3, 1, 1, K)):
        got = one.runner(other)
        torch.testing.assert_close(got, wanted(other, 2.0))
        assert got.is_contiguous()
        assert not got.requires_grad
    assert (driver.count_launches(), driver.count_early()) == (before + 3, early + 3)
    scale = torch.tensor([-1.0])
    if (scale.data_ptr() % 16 == 0) == (one.scale.data_ptr() % 16 == 0):
        torch.testing.assert_close(module.Runner(one.family, (scale,))(x), wanted(x, -1.0))
    one.family.clear()
    assert one.runner(x) is None
    assert len(one.family) == 0


def test_what_it_is_not_for(module: Any, scaled: Kernel, driver: ctypes.CDLL) -> None:
    layer = Layer(module, scaled, 2.0)
    layer.record(torch.randn(3, K))
    for x in (
        torch.randn(2, K), torch.randn(3, K).double(), torch.randn(3, 2 * K)[:, ::2], torch.randn(3, 2 * K)[:, :K],
        torch.randn(3, K + 1), torch.randn(0, K), torch.tensor(1.0), torch.randn(3, K).to_sparse(),
        torch.randn(3, K).to("meta"), torch.nn.Parameter(torch.randn(3, K)), 3, None, torch.randn(5, 2, 3, K)[:, :, :1],
    ):  # fmt: skip
        assert layer.runner(x) is None
    assert layer.runner(torch.randn(2, 3, K)[1]) is not None
    off = torch.randn(3 * K + 1)[1:].view(3, K)  # no longer at a multiple of 16 bytes
    assert layer.runner(off) is None
    torch.testing.assert_close(layer.record(off), wanted(off, 2.0))
    torch.testing.assert_close(layer.runner(off), wanted(off, 2.0))
    driver.set_device(1)
    assert layer.runner(torch.randn(3, K)) is None
    with pytest.raises(TypeError, match="one tensor"):
        layer.runner(off, off)


def test_tensors_that_were_freed_or_moved(module: Any, scaled: Kernel) -> None:
    layer = Layer(module, scaled, 2.0)
    x = torch.randn(3, K)
    layer.record(x)
    layer.scale.data = torch.tensor([5.0, 0.0, 0.0, 0.0])[:1]
    got = layer.runner(x)
    if got is not None:  # it lies as the first one did
        torch.testing.assert_close(got, wanted(x, 5.0))
    layer.scale.untyped_storage().resize_(0)
    assert layer.runner(x) is None


def test_rows_with_other_strides(module: Any, scaled: Kernel) -> None:
    layer, x = Layer(module, scaled, 2.0), torch.randn(5, 3 * K)[:, K : 2 * K]
    layer.record(x)
    other = torch.randn(5, 3 * K)[:, 2 * K :]
    torch.testing.assert_close(layer.runner(other), wanted(other, 2.0))
    single = torch.randn(2, 3 * K)[:1, :K]  # a single row, however far the next one is
    layer.record(single)
    torch.testing.assert_close(layer.runner(torch.ones(1, K)), wanted(torch.ones(1, K), 2.0))


def test_the_oldest_plan_makes_room(module: Any, scaled: Kernel) -> None:
    layer = Layer(module, scaled, 2.0)
    for m in range(1, 300):
        layer.record(torch.ones(m, K))
    assert len(layer.family) == 256
    assert layer.runner(torch.ones(20, K)) is None
    for m in (44, 150, 299):
        torch.testing.assert_close(layer.runner(torch.ones(m, K)), wanted(torch.ones(m, K), 2.0))
    layer.record(torch.ones(299, K))  # again: it is there
    assert len(layer.family) == 256


def test_a_driver_that_fails(module: Any, scaled: Kernel, driver: ctypes.CDLL) -> None:
    layer, x = Layer(module, scaled, 2.0), torch.randn(3, K)
    layer.record(x)
    driver.set_fail(1)
    with pytest.raises(RuntimeError, match="CUDA error in a kernel of quantkit: the test wanted it"):
        layer.runner(x)
    driver.set_fail(0)
    assert layer.runner(x) is not None


def test_nothing_is_leaked(module: Any, scaled: Kernel) -> None:
    layer, x = Layer(module, scaled, 2.0), torch.randn(3, K)
    layer.record(x)
    gc.collect()
    values = x, layer.scale, torch.float32, torch.uint8, layer.family
    counts = [sys.getrefcount(value) for value in values]
    for _ in range(1000):
        assert layer.runner(x) is not None
        assert layer.runner(x.double()) is None
        layer.runner(x[None])
    gc.collect()
    grown = [sys.getrefcount(value) - before for value, before in zip(values, counts, strict=True)]
    assert max(grown) < 500, grown  # others hold and drop dtypes meanwhile


def in_threads(work: Callable[[int], None]) -> None:
    """Four of them, each with a seed of its own."""
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_many_threads(module: Any, scaled: Kernel) -> None:
    """Plans come and go while others use them."""
    layer, wrong = Layer(module, scaled, 2.0), list[str]()

    def work(seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        for _ in range(300):
            x = torch.randn(int(torch.randint(1, 9, (), generator=random)), K)
            got = layer.runner(x)
            if got is None:
                got = layer.record(x)
            if not torch.equal(got, wanted(x, 2.0)):
                wrong.append(f"{len(x)} rows")

    in_threads(work)
    assert not wrong


def test_maps_of_matrices(module: Any, driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the result and of scratch memory move with them."""
    monkeypatch.setattr(launch, "library", lambda: module)
    signature = {"m": "tensordesc<fp32[1, 4],layout>", "Y": "*fp32", "X": "*fp32"}
    ptx = parameters(".align 64 .b8", ".u32", ".u32", ".u64", ".u64", POINTER, POINTER, POINTER, POINTER)
    kernel = Silent(driver, "looked", signature, ptx.replace(".b8 kernel_param_0", ".b8 kernel_param_0[128]"))
    family = module.Family(K, N, 1, 0, 0, 0)

    def call(x: Tensor) -> Tensor:
        y = x.new_empty((1, N))
        described = SimpleNamespace(base=x, shape=x.shape, strides=x.stride(), padding="zero")
        launch.launch(kernel, (1,), described, y, x)
        return y

    launch.recorded(family, torch.randn(1, K), (), call)
    for _ in range(3):
        assert module.Runner(family, ())(torch.randn(1, K)).tolist() == [[1.0, 1.0]]
    with pytest.raises(RuntimeError, match="the test wanted it"):
        module.tensor_map(7, 4, 3, 0, K, 1, 4)


REFUSED: dict[str, tuple[Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor], str]] = {
    "an operator": (lambda x, call: call(x + 0), "aten.add.Tensor runs beside its kernels"),
    "a copy": (lambda x, call: call(x.clone()), "aten.clone.default runs beside"),
    "a result of others": (lambda x, call: torch.ones(3, N) if call(x) is not None else x, "aten.ones.default runs beside"),
    "a part of a result": (lambda x, call: call(x)[1:], "its result is not made by it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_calls_that_do_more_go_the_long_way(
    case: str, module: Any, scaled: Kernel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="quantkit")
    monkeypatch.setattr(launch, "_said", set())
    layer, (wrapped, why) = Layer(module, scaled, 2.0), REFUSED[case]
    x = torch.randn(3, K)
    for _ in range(2):
        got = launch.recorded(layer.family, x, (layer.scale,), lambda x: wrapped(x, layer.call))
        assert got.shape[1] == N
    assert layer.runner(x) is None
    assert caplog.text.count(why) == 1


def test_another_triton(module: Any, scaled: Kernel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that passes other parameters is not guessed at."""
    caplog.set_level("INFO", logger="quantkit")
    x = torch.randn(3, K)
    for ptx in (parameters(*[POINTER] * 4, ".u32", POINTER, POINTER), parameters(*[POINTER] * 4, ".u64", POINTER), ""):
        monkeypatch.setattr(launch, "_said", set())
        monkeypatch.setitem(scaled.compiled.asm, "ptx", ptx)
        layer = Layer(module, scaled, 2.0)
        layer.record(x)
        assert layer.runner(x) is None
        assert "takes other parameters than this version of Triton is known to pass" in caplog.text
        caplog.clear()
    monkeypatch.undo()
    for name, value in (("num_ctas", 2), ("launch_cooperative_grid", True), ("global_scratch_size", 16)):
        monkeypatch.setattr(scaled.compiled.metadata, name, value)
        layer = Layer(module, scaled, 2.0)
        layer.record(x)
        monkeypatch.undo()
        assert layer.runner(x) is None


def test_tensors_that_share_memory(module: Any, scaled: Kernel) -> None:
    """Where one lies says nothing about where the other does in another layer."""
    layer, x, both = Layer(module, scaled, 2.0), torch.randn(3, K), torch.zeros(8)
    layer.scale = both[4:5]
    assert launch.recorded(layer.family, x, (layer.scale, both), layer.call) is not None
    assert layer.runner(x) is None


def test_a_tensor_that_nobody_knows(module: Any, scaled: Kernel) -> None:
    layer, x = Layer(module, scaled, 2.0), torch.randn(3, K)
    for _ in range(2):
        assert launch.recorded(layer.family, x, (), layer.call) is not None  # without its scale
    assert layer.runner(x) is None


def test_tensors_that_last(module: Any, scaled: Kernel) -> None:
    @launch.lasting
    def three(value: float) -> Tensor:
        return torch.full((8,), value)

    layer, x = Layer(module, scaled, 2.0), torch.randn(3, K)

    def call(x: Tensor) -> Tensor:
        layer.scale = three(3.0)
        return layer.call(x)

    for _ in range(2):
        layer.family.clear()
        launch.recorded(layer.family, x, (), call)
        assert x in layer.family
        layer.scale = torch.tensor([2.0])
        torch.testing.assert_close(module.Runner(layer.family, (layer.scale,))(x), wanted(x, 3.0))


def test_plans_that_are_no_plans(module: Any) -> None:
    family, x = module.Family(K, N, 1, 0, 0, 0), torch.randn(3, K)
    value = PARAMETER.pack(0, 0, 0, bytes(8))
    for steps, parameters in (
        (STEP.pack(1, 0, 1, 1, 1, 32, 0, 0, 0, 2), value),  # more than there are
        (STEP.pack(1, 0, 1, 1, 1, 32, 0, 0, 0, 65), value * 65),
        (STEP.pack(0, 8, 0, 0, 0, 0, 0, 0, 0, 1), value),  # zeros to no address
        (STEP.pack(1, 0, 1, 1, 1, 32, 0, 0, 0, 1), PARAMETER.pack(1, 4, 0, b"")),  # a tensor that no layer has
        (STEP.pack(1, 0, 1, 1, 1, 32, 0, 0, 0, 7), PARAMETER.pack(2, 0, 0, b"") * 7),
    ):
        with pytest.raises(ValueError, match="than a plan holds"):
            family.add(x, torch.float32, 0, 0, steps, parameters, 0, 0)
    with pytest.raises(ValueError, match="no plan can be found again"):
        family.add(torch.randn(3, K + 1), torch.float32, 0, 0, b"", b"", 0, 0)
    for codes, apart, share in ((0, 0, 1), (256, 1, 0), (256, -1, 0), (-256, 0, 0)):
        with pytest.raises(ValueError, match="codes are made by some of the steps"):
            family.add(x, torch.float32, codes, 0, b"", b"", apart, share)
    with pytest.raises(ValueError, match="more than 24"):
        module.Family(K, N, 1, 0, 25, 0)
    with pytest.raises(ValueError, match="has 0 tensors"):
        module.Runner(family, (x,))


# ---- codes that several layers share


class Member(Layer):
    """Makes codes of its input, and multiplies them."""

    making: tuple[int, ...] = ()

    def __init__(self, module: Any, driver: ctypes.CDLL, scale: float) -> None:
        super().__init__(module, Kernel(driver, "multiplied", {"C": "*fp32", "SCALE": "*fp32", "Y": "*fp32"}, FIVE), scale)
        self.coded = Kernel(driver, "coded", {"X": "*fp32", "C": "*fp32"}, parameters(*[POINTER] * 4))

    def call(self, x: Tensor) -> Tensor:
        codes = x.new_empty((x.shape[0], K))
        launch.launch(self.coded, (x.shape[0],), x, codes, *self.making, num_warps=4)
        launch.codes_made()
        return self.multiplied(codes, x)

    def multiplied(self, codes: Tensor, x: Tensor) -> Tensor:
        return self.launched(codes, x)

    def launched(self, codes: Tensor, x: Tensor, *more: Tensor) -> Tensor:
        y, scratch = x.new_empty((x.shape[0], N)), x.new_empty(5)
        launch.launch(self.kernel, (x.shape[0],), codes, self.scale, y, *more, num_warps=4)
        return y if scratch is not None else codes


FIVE = parameters(*[POINTER] * 5)


@pytest.fixture
def site(module: Any, driver: ctypes.CDLL) -> list[Member]:
    """Three layers that were called once with one tensor of three rows."""
    members = [Member(module, driver, scale) for scale in (1.0, -3.0, 0.5)]
    x = torch.randn(3, K)
    for member in members:
        member.record(x)
    return members


def launches(driver: ctypes.CDLL, members: list[Member], *inputs: Tensor) -> int:
    """How many kernels ran; checks results."""
    before: int = driver.count_launches()
    for member, x in zip(members, inputs, strict=True):
        torch.testing.assert_close(member.runner(x), 2 * x[:, :N] * member.scale)
    return driver.count_launches() - before


def test_layers_of_one_activation_share_its_codes(site: list[Member], driver: ctypes.CDLL) -> None:
    assert launches(driver, site, *[torch.randn(3, K)] * 3) == 6  # who shares is not known yet
    for _ in range(3):
        assert launches(driver, site, *[torch.randn(3, K)] * 3) == 4
    assert launches(driver, site[:2], *[torch.randn(3, K)] * 2) == 3  # one of them stays away
    assert launches(driver, site, *[torch.randn(3, K)] * 3) == 5  # is not waited for
    assert launches(driver, site, *[torch.randn(3, K)] * 3) == 4  # and is welcome again
    other = [torch.randn(3, K) for _ in range(3)]
    assert launches(driver, site, *other) == 6
    assert launches(driver, site[::-1], *[other[0]] * 3) == 6  # another order: another one makes them
    assert launches(driver, site[::-1], *[other[0]] * 3) == 4


def test_codes_are_not_shared_if_the_input_may_be_another(site: list[Member], driver: ctypes.CDLL) -> None:
    for _ in range(2):
        launches(driver, site, *[torch.randn(3, K)] * 3)

    def between(change: Callable[[Tensor], Any]) -> int:
        x = torch.randn(3, K)
        count = launches(driver, site[:1], x)
        change(x)
        return count + launches(driver, site[1:2], x)

    assert between(lambda x: None) == 3
    for change in (
        torch.Tensor.neg_,
        lambda x: x[1:, :2].zero_(),
        lambda x: x.view(-1)[:1].add_(1),
        lambda x: x.detach().neg_(),
    ):
        assert between(change) == 4
    assert between(lambda x: setattr(x, "data", torch.randn(3, K))) == 4
    assert between(lambda x: driver.set_capturing(1)) == 4
    assert launches(driver, site, *[torch.randn(3, K)] * 3) == 6
    driver.set_capturing(0)
    for _ in range(2):
        count = launches(driver, site, *[torch.randn(3, K)] * 3)
    assert count == 4
    with torch.inference_mode():
        for _ in range(3):
            assert launches(driver, site, *[torch.randn(3, K)] * 3) == 6
    assert between(lambda x: site[1].runner(torch.randn(3, K))) == 4


def test_codes_do_not_outlive_their_use(site: list[Member], module: Any, driver: ctypes.CDLL) -> None:
    for _ in range(2):
        launches(driver, site, *[torch.randn(3, K)] * 3)
    x = torch.randn(3, K)
    before = sys.getrefcount(x)
    launches(driver, site[:1], x)
    assert sys.getrefcount(x) == before
    del x
    assert launches(driver, site[1:2], torch.randn(3, K)) == 2
    launches(driver, site[:1], torch.randn(3, K))  # codes that wait for two others
    counts = sys.getrefcount(site[0].family)
    site[0].runner = None
    counts -= sys.getrefcount(site[0].family)
    assert counts == 1
    gc.collect()
    assert launches(driver, site[1:], *[torch.randn(3, K)] * 2) == 4


class Other(Member):
    """Its codes are made with one more number."""

    def __init__(self, module: Any, driver: ctypes.CDLL, scale: float) -> None:
        super().__init__(module, driver, scale)
        signature = {"X": "*fp32", "C": "*fp32", "more": "i64"}
        self.coded = Kernel(driver, "coded", signature, parameters(POINTER, POINTER, ".u64", POINTER, POINTER))

    making = (7,)


class Reader(Member):
    """Looks at its input once more when it multiplies, as an operator with a threshold does."""

    def __init__(self, module: Any, driver: ctypes.CDLL, scale: float) -> None:
        super().__init__(module, driver, scale)
        signature = {"C": "*fp32", "SCALE": "*fp32", "Y": "*fp32", "X": "*fp32"}
        self.kernel = Kernel(driver, "multiplied", signature, parameters(*[POINTER] * 6))

    def multiplied(self, codes: Tensor, x: Tensor) -> Tensor:
        return self.launched(codes, x, x)


@pytest.mark.parametrize("kind", [Other, Reader])
def test_other_codes_of_one_activation(kind: type[Member], site: list[Member], module: Any, driver: ctypes.CDLL) -> None:
    strange = kind(module, driver, 2.0)
    strange.record(torch.randn(3, K))
    counts = [launches(driver, [site[0], strange, site[1]], *[torch.randn(3, K)] * 3) for _ in range(3)]
    assert counts == ([6, 6, 6] if kind is Other else [6, 5, 5])  # what makes none is not in the way of others


def test_many_threads_share(module: Any, driver: ctypes.CDLL) -> None:
    members, wrong = [Member(module, driver, scale) for scale in (1.0, -3.0, 0.5)], list[str]()
    for rows in (1, 2, 3):
        for member in members:
            member.record(torch.randn(rows, K))

    def work(seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        for _ in range(500):
            x = torch.randn(int(torch.randint(1, 4, (), generator=random)), K)
            for member in members:
                if not torch.equal(member.runner(x), 2 * x[:, :N] * member.scale):
                    wrong.append(f"{len(x)} rows")

    in_threads(work)
    assert not wrong


def test_without_a_driver() -> None:
    with pytest.raises(OSError, match="nowhere"):
        launch.loaded("libnowhere.so", torch.empty_strided)
    with pytest.raises(OSError, match="has no cuLaunchKernelEx"):
        launch.loaded("libc.so.6", torch.empty_strided)

"""Launching kernels: through Triton the first time, and from a plan of what it launched after that.

Triton's Python takes tens of microseconds for a launch, a hundred where there are descriptors of matrices, and a layer needs
two launches. So the first call of a layer with some number of tokens is recorded: which kernels, on which grid, and where each
argument comes from, which is the input, the result, scratch memory, or a tensor of the layer. ``launch.c`` does the same again
for other tensors, also for those of other layers that differ in nothing but their values.

Layers that read one activation make the same codes of it, with the same kernels. The second one takes those of the first, if it
is called with the same tensor, and nobody wrote to that in between as far as PyTorch counts such writes, for gradients; not in
inference mode, where it does not count them.

What a call does beside launching kernels of ours and allocating (an operator of PyTorch's, say) cannot be in a plan. Such calls
go through Triton every time, and the log says why, once.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import re
import struct
import sysconfig
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit.core.tracing import EMPTY
from quantkit.ops.build import BuildError, Source

log = logging.getLogger("quantkit")

INPUT, RESULT, CODES, SCRATCH, TENSORS = range(5)
VALUE, ADDRESS, MAP = range(3)
"""As in ``launch.c``."""
STEP, PARAMETER = struct.Struct("QQ3IIIIII"), struct.Struct("IIQ128s")
NUMBERS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
           "fp32": "f", "fp64": "d"}  # fmt: skip
"""What Triton calls a number -> how it is packed."""
MAP_TYPES = {torch.int8: 0, torch.uint8: 0, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
"""The numbers of CUtensorMapDataType."""
ALIGNMENT = 256
"""Bytes between pieces of the scratch memory: Triton compiles for what is aligned as its allocator aligns it."""
MOST_TENSORS = 24

aten = torch.ops.aten
ZEROS = (aten.new_zeros.default, aten.zeros.default)


class PlanError(Exception):
    """A call does what no plan can; the message says what."""


# ---- recording


class _Local(threading.local):
    recording: Recording | None = None


_local = _Local()


def codes_made() -> None:
    """Says that all that was launched and allocated so far in this call made codes of its input."""
    if _local.recording is not None:
        _local.recording.codes = len(_local.recording.steps), len(_local.recording.allocated)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``, all parameters by position. Every launch of ours goes through here."""
    compiled = kernel[grid](*args, **options)
    if _local.recording is not None:
        _local.recording.launched(kernel, compiled, grid, args)


def lasting(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function whose results are made once and last as long as the process: plans may hold their addresses."""

    @functools.cache
    def made(*args: Any) -> Tensor:
        recording, _local.recording = _local.recording, None
        try:
            with torch.utils._python_dispatch._disable_current_modes():
                return function(*args)
        finally:
            _local.recording = recording

    @functools.wraps(function)
    def call(*args: Any) -> Tensor:
        tensor = made(*args)
        if _local.recording is not None:
            _local.recording.lasting.append(tensor)
        return tensor

    return call


class Recording(TorchDispatchMode):
    """What a call launches and allocates, in order.

    Attributes:
        steps: for each launch the kernel, what Triton compiled, the grid and the arguments; for zeros None and the tensor.
        allocated, lasting: tensors that the call made, and others that it read and that last as long as the process.
        codes: how many of the steps, and of what was allocated, make codes of the input.
        refused: why there can be no plan, if so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, ...]] = []
        self.allocated: list[Tensor] = []
        self.lasting: list[Tensor] = []
        self.codes = 0, 0
        self.refused: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in EMPTY or func in ZEROS:
            self.allocated.append(out)
            if func in ZEROS:
                self.steps.append((None, out))
        elif not func.is_view:
            self.refused = self.refused or f"{func} runs beside its kernels"
        return out

    def launched(self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        if compiled is None:
            self.refused = self.refused or "Triton's interpreter runs it"
        self.steps.append((kernel, compiled, grid, args))

    def plan(self, x: Tensor, result: Tensor, tensors: tuple[Tensor, ...]) -> tuple[int, int, bytes, bytes, int, int]:
        """Bytes of codes and of scratch memory, steps and parameters, how many steps make codes, and a number of these.

        The number is 0 for codes that no other layer can take, and else the same where all launches that make them are.

        Raises:
            PlanError: the call did what no plan can.
        """
        if self.refused:
            raise PlanError(self.refused)
        apart, allocated = self.codes
        where = Places(x, result, self.allocated[:allocated], self.allocated[allocated:], tensors, self.lasting)
        steps, parameters, making = b"", list[bytes](), list[bytes]()
        for i, step in enumerate(self.steps):
            if i == apart:
                making = [steps, *parameters]
            first = len(parameters)
            if step[0] is None:
                zeros = step[1]
                parameters.append(where.address(zeros))
                steps += STEP.pack(0, zeros.numel() * zeros.element_size(), 0, 0, 0, 0, 0, 0, first, 1)
                continue
            kernel, compiled, grid, args = step
            parameters += parameters_of(kernel, compiled, args, where)
            meta = compiled.metadata
            grid = (*grid, 1, 1)[:3]
            steps += STEP.pack(
                compiled.function, 0, *grid, 32 * meta.num_warps, meta.shared, meta.launch_pdl, first, len(parameters) - first
            )
        slots = [[PARAMETER.unpack(p)[1] for p in part if PARAMETER.unpack(p)[0] != VALUE]
                 for part in (making[1:], parameters[len(making) - 1 :])]  # fmt: skip
        shares = making and where.codes and set(slots[0]) <= {INPUT, CODES} and INPUT not in slots[1]
        digest = hashlib.blake2b(b"".join([*making, where.codes.to_bytes(8, "little")]), digest_size=8).digest()
        share = int.from_bytes(digest, "little") | 1 if shares else 0
        return where.codes, where.scratch, steps, b"".join(parameters), apart, share


class Places:
    """Where tensors of a call are: relative to the input, the result, codes, the scratch memory, or a tensor of the layer."""

    def __init__(
        self,
        x: Tensor,
        result: Tensor,
        codes: list[Tensor],
        allocated: list[Tensor],
        tensors: tuple[Tensor, ...],
        lasting: list[Tensor],
    ) -> None:
        self._known: dict[int, tuple[int, int]] = {}
        self._lasting = {tensor.data_ptr() for tensor in lasting}
        for i, tensor in enumerate(tensors):
            self._add(tensor, TENSORS + i, -_offset(tensor))
        self._add(x, INPUT, -_offset(x))
        self.codes = self._room(codes, CODES, result)
        self.scratch = self._room(allocated, SCRATCH, result)
        if (
            not any(_begin(tensor) == _begin(result) for tensor in (*codes, *allocated))
            or _offset(result)
            or not result.is_contiguous()
        ):
            raise PlanError("its result is not made by it")
        self._add(result, RESULT, 0)

    def _room(self, allocated: list[Tensor], slot: int, result: Tensor) -> int:
        """Places for all but the result, one after another; how many bytes they take."""
        room = 0
        for tensor in allocated:
            if _begin(tensor) != _begin(result):
                self._add(tensor, slot, room - _offset(tensor))
                room += -(-tensor.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
        return room

    def _add(self, tensor: Tensor, slot: int, offset: int) -> None:
        if tensor.numel() and self._known.setdefault(_begin(tensor), (slot, offset)) != (slot, offset):
            raise PlanError("two of its tensors share memory")

    def address(self, tensor: Tensor | None, value: bytes = b"", kind: int = ADDRESS) -> bytes:
        """The parameter for the address of ``tensor``, or of the map ``value`` of it."""
        if tensor is None:
            return PARAMETER.pack(VALUE, 0, 0, bytes(8))
        if kind == ADDRESS and tensor.data_ptr() in self._lasting:
            return PARAMETER.pack(VALUE, 0, 0, struct.pack("Q", tensor.data_ptr()))
        if not tensor.numel():  # which is not read
            return PARAMETER.pack(VALUE, 0, 0, bytes(8))
        known = self._known.get(_begin(tensor))
        if known is None:
            raise PlanError(f"it reads a tensor of {list(tensor.shape)} that is neither its own nor lasting")
        slot, offset = known
        return PARAMETER.pack(kind, slot, (offset + _offset(tensor)) % 2**64, value)


def _begin(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _offset(tensor: Tensor) -> int:
    return tensor.data_ptr() - _begin(tensor)


# ---- what Triton's kernels take


def signature_of(compiled: Any) -> Iterator[tuple[str, str]]:
    """Name and type of each parameter that is no constant; those of tensor maps are ``tensordesc<...>``."""
    for name, kind in compiled.src.signature.items():
        if not isinstance(kind, str):
            raise PlanError(f"its parameter {name} is a tuple")
        if kind != "constexpr":
            yield name, kind


def sizes_of(compiled: Any) -> list[int]:
    """Bytes of each parameter in machine code, as plans pass them."""
    sizes = list[int]()
    for _, kind in signature_of(compiled):
        if kind.startswith("tensordesc"):
            dimensions = kind[kind.index("[") : kind.index("]")].count(",") + 1
            sizes += [128, *[4] * dimensions, *[8] * dimensions]
        else:
            sizes.append(8 if kind.startswith("*") else struct.calcsize(NUMBERS[kind]))
    return [*sizes, 8, 8]  # two pointers to memory that none of ours uses


def sizes_in_code(compiled: Any) -> list[int]:
    """Bytes of each parameter, read from the assembler text of the kernel."""
    header = re.search(r"\.entry[^(]*\((.*?)\)\s*[.{]", compiled.asm["ptx"], re.DOTALL)
    widths = {"8": 1, "16": 2, "32": 4, "64": 8}
    found = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z](\d+)[^\n,\[]*(?:\[(\d+)\])?", header[1] if header else "")
    return [widths[bits] * int(count or 1) for bits, count in found]


def parameters_of(kernel: Any, compiled: Any, args: tuple[Any, ...], where: Places) -> Iterator[bytes]:
    """One launch's parameters, in the order of the machine code.

    Raises:
        PlanError: another Triton passes them in another way.
    """
    meta = compiled.metadata
    if meta.num_ctas != 1 or meta.launch_cooperative_grid or meta.global_scratch_size or meta.profile_scratch_size:
        raise PlanError(f"{compiled.name} is launched in a special way")
    if sizes_in_code(compiled) != sizes_of(compiled):
        raise PlanError(f"{compiled.name} takes other parameters than this version of Triton is known to pass")
    given = dict(zip(kernel.arg_names, args, strict=True))
    maps = iter(meta.tensordesc_meta or ())
    for name, kind in signature_of(compiled):
        value = given[name]
        if kind.startswith("*"):
            yield where.address(value)
        elif kind.startswith("tensordesc"):
            rows, columns = value.shape
            yield where.address(value.base, _map(value, next(maps)), MAP)
            for number, form in ((rows, "i"), (columns, "i"), (columns, "q"), (1, "q")):
                yield PARAMETER.pack(VALUE, 0, 0, struct.pack(form, number))
        else:
            yield PARAMETER.pack(VALUE, 0, 0, struct.pack(NUMBERS[kind], value))
    yield from (PARAMETER.pack(VALUE, 0, 0, bytes(8)) for _ in range(2))


def _map(described: Any, about: dict[str, Any]) -> bytes:
    base, (rows, columns) = described.base, described.shape
    if about["fp4_padded"] or described.padding != "zero" or tuple(described.strides) != (columns, 1):
        raise PlanError("it moves a matrix in a special way")
    code: bytes = library().tensor_map(
        MAP_TYPES[base.dtype], about["elem_size"], about["swizzle"], rows, columns, *about["block_size"]
    )
    return code


# ---- the library


def source() -> Source:
    """``launch.c``, which needs headers of Python, torch and Triton."""
    import triton

    headers = (
        sysconfig.get_path("include"), str(Path(torch.__file__).parent / "include"),
        str(Path(triton.__file__).parent / "backends" / "nvidia" / "include"),
    )  # fmt: skip
    flags = ("-std=gnu11", "-O2", "-fPIC", *(f"-I{header}" for header in headers))
    return Source("launch", Path(__file__).with_name("launch.c"), flags=flags)


def loaded(driver: str, empty_strided: Callable[..., Tensor]) -> Any:
    """The module of ``launch.c``, bound to a driver.

    Raises:
        BuildError: it cannot be built.
        OSError: the driver lacks something.
    """

    def opened(path: Path) -> Any:
        loader = ExtensionFileLoader("quantkit_launch", str(path))
        spec = importlib.util.spec_from_file_location("quantkit_launch", path, loader=loader)
        assert spec is not None
        try:
            module = importlib.util.module_from_spec(spec)
            loader.exec_module(module)
        except ImportError as error:
            raise OSError(str(error)) from error
        return module

    module = source().load(opened)
    module.load(driver, Tensor, empty_strided, torch.uint8)
    return module


@functools.cache
def library() -> Any:
    """The module of ``launch.c`` for NVIDIA's driver, or None where there cannot be one; says once why."""
    if os.environ.get("QUANTKIT_NATIVE") == "0":
        log.info("QUANTKIT_NATIVE=0: every launch goes through Triton's Python, which takes longer")
        return None
    try:
        guards: Any = torch._C._dynamo.guards
        return loaded("libcuda.so.1", guards._empty_strided_cuda)  # Inductor's: it goes past the dispatcher
    except (BuildError, OSError, AttributeError) as error:
        log.warning("launches go through Triton's Python, which takes longer in eager mode: %s", error)
    return None


# ---- layers

_families: dict[Any, Any] = {}
_said: set[str] = set()


def forget() -> None:
    """Forget all plans, as when other settings of kernels are to be used from now on."""
    for family in _families.values():
        family.clear()


def family_of(kind: tuple[Any, ...], x: Tensor, out_features: int, tensors: tuple[Tensor, ...]) -> Any:
    """Plans of all layers that are alike in what their calls depend on; None where there can be none.

    Args:
        kind: what the calls of a layer depend on, beside its tensors.
        x: ``[M, K]``, such as the layer is called with.
        out_features: N.
        tensors: those of the layer that its kernels read.
    """
    module = library() if x.is_cuda and len(tensors) <= MOST_TENSORS else None
    if module is None:
        return None
    key = (kind, x.device, x.shape[1], out_features, *((t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors))
    family = _families.get(key)
    if family is None:
        aligned = sum(1 << i for i, t in enumerate(tensors) if t.data_ptr() % 16 == 0)
        device, index = x.__dlpack_device__()
        family = _families[key] = module.Family(x.shape[1], out_features, int(device), index, len(tensors), aligned)
    return family


def recorded(family: Any, x: Tensor, tensors: tuple[Tensor, ...], call: Callable[[Tensor], Tensor]) -> Tensor:
    """``call(x)``, and a plan of it in ``family`` unless there is one, or can be none."""
    if x in family:
        return call(x)
    record = Recording()
    before, _local.recording = _local.recording, record
    try:
        with record:
            result = call(x)
    finally:
        _local.recording = before
    try:
        family.add(x, result.dtype, *record.plan(x, result, tensors))
    except (PlanError, ValueError) as error:
        family.refuse(x)
        if str(error) not in _said:
            _said.add(str(error))
            log.info("some layers on %s are launched through Triton's Python every time: %s", x.device, error)
    return result

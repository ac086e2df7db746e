"""Compile every GPU kernel for every architecture, without a GPU, and print as JSON what came out. Run by test_gpu.py."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from quantkit.ops.gpu.codes import order, rows, shapes
from quantkit.ops.gpu.codes.portable import quantize_kernel
from quantkit.ops.gpu.codes.reached import list_kernel
from quantkit.ops.gpu.launch import sizes_in_code, sizes_of
from quantkit.ops.gpu.layout import BLOCK, SIDE
from quantkit.ops.gpu.product import columns, few, many, tiles
from quantkit.ops.gpu.product.kernels import box
from quantkit.ops.gpu.product.portable import matmul_kernel
from quantkit.ops.gpu.product.vector import gemv_kernel

SIXTEENS = ("N", "K", "K4", "places", "padded", "stride_xm", "stride_x", "stride_2")  # multiples of 16 in a usual layer
SHARED = {80: 163_840, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes that one program may have
NAMES = {torch.int8: "i8", torch.bfloat16: "bf16", torch.float16: "fp16"}


def compiled(
    kernel: Any, arch: int, types: dict[str, str], constants: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """Arguments that are in neither ``types`` nor ``constants`` are left out (None)."""
    constants = {name: constants.get(name) for name in kernel.arg_names if name not in types}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # What Triton itself finds out about pointers and the sizes of a usual layer.
    sixteen = [types.get(name, "")[:1] == "*" or name in SIXTEENS for name in kernel.arg_names]
    aligned = {(i,): [["tt.divisibility", 16]] for i, yes in enumerate(sixteen) if yes}
    indexed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, indexed, aligned)
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False, **options})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(result.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    ptx = result.asm["ptx"]
    return {
        "mma": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma|dp4a)[.\w:]*", ptx))),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]), "local": int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "passed": sizes_of(result), "taken": sizes_in_code(result),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]), "shared": result.metadata.shared,
    }  # fmt: skip


def quantize(arch: int, **features: Any) -> dict[str, Any]:
    types = dict.fromkeys(
        ("M", "K", "places", "padded", "stride_xm", "stride_2m", "stride_2k", "side_count", "side_stride"), "i32"
    ) | {
        "X": "*bf16",
        "Q": "*i8",
        "S": "*fp32",
    }
    types |= dict.fromkeys(("eps", "offset", "threshold"), "fp32") | {
        n: t for n, t in features.items() if isinstance(t, str) and n != "SOURCE"
    }
    constants = {
        "SOURCE": "",
        "QMAX": 127,
        "SYMMETRIC": True,
        "ROTATION": 0,
        "SIDES": 0,
        "GROUPS": 1,
        "COUNT": 1,
        "R": 1,
        "B": 4096,
        "EVEN": True,
    }
    constants |= {"PDL": arch >= 90, "stride_xk": 1} | {n: v for n, v in features.items() if n in constants}
    return compiled(quantize_kernel, arch, types, constants, {"num_warps": 8})


def one_row(arch: int, k: int, m: int = 8192, **features: Any) -> dict[str, Any]:
    types = dict.fromkeys(("M", "K", "padded", "stride_x", "stride_2"), "i32") | {"X": "*bf16", "Q": "*i8", "S": "*fp32"}
    pointers = {name: kind for name, kind in features.items() if isinstance(kind, str) and name != "SOURCE"}
    types |= dict.fromkeys(("eps", "offset"), "fp32") | pointers
    rotation = features.get("ROTATION", 0)
    source, order = features.get("SOURCE", ""), "PERM" in types
    gate = "X2" in types and source not in ("rms", "layer")
    shape = shapes.rows(
        features.get("places", k), rotation, m, two="X2" in types, gate=gate, order=order,
        vectors=bool(types.keys() & {"GAIN", "PRE", "PERM"}),
    )  # fmt: skip
    ring = shape.ring and shape.bytes(2, order) <= SHARED[arch]
    constants = {"SOURCE": source, "QMAX": 127, "ROTATION": rotation, "PDL": arch >= 90}
    constants |= {"L": shape.line, "B": shape.block, "EVEN": shape.block == k, "AHEAD": shape.ahead and not ring}
    constants |= {"RING": shapes.RING if ring else 0, "ROUNDED": gate and "PRE" not in types}
    constants |= {"GROUPS": features.get("GROUPS", 1), "COUNT": features.get("GROUPS", 1)}
    return compiled(rows.rows_kernel, arch, types, constants, {"num_warps": shape.warps})


def ordered(arch: int, k: int, **features: Any) -> dict[str, Any]:
    types = dict.fromkeys(("M", "K", "padded", "stride_x", "stride_2"), "i32") | {"X": "*bf16", "Q": "*i8", "S": "*fp32"}
    types |= dict.fromkeys(("eps", "offset"), "fp32") | {"PERM": "*i16"}
    types |= {name: kind for name, kind in features.items() if isinstance(kind, str) and name != "SOURCE"}
    block, groups = triton.next_power_of_2(features.get("places", k)), features.get("GROUPS", 1)
    constants = {"SOURCE": features.get("SOURCE", ""), "QMAX": 127, "GROUPS": groups, "COUNT": groups}
    constants |= {"B": block, "EVEN": block == k, "PDL": arch >= 90}
    return compiled(order.order_kernel, arch, types, constants, {"num_warps": shapes.order_warps(block)})


def matmul(arch: int, tile: tiles.Tile, **features: str | int) -> dict[str, Any]:
    types = dict.fromkeys(("M", "N", "K", "zero_stride", "side_count", "side_m"), "i32")
    types |= {"Q": "*i8", "W": "*i8", "Y": "*bf16", "SX": "*fp32", "SW": "*fp32"}
    types |= {n: t for n, t in features.items() if isinstance(t, str)}
    constants = {"GROUPS": 1, "BY_ROW": False, "BM": tile.m, "BN": tile.n, "BK": tile.k, "BAND": tile.group, "EVEN_K": True}
    constants |= {"side_k": 1, "ROOM": 0}
    constants |= {n: v for n, v in features.items() if isinstance(v, int)}
    return compiled(matmul_kernel, arch, types, constants, {"num_warps": tile.warps, "num_stages": tile.stages})


def listed(arch: int) -> dict[str, Any]:
    types, constants = {"REACHED": "*i32", "ACTIVE": "*i32", "K": "i32"}, {"B": 1024, "WHOLE": 4096, "PDL": arch >= 90}
    return compiled(list_kernel, arch, types, constants, {"num_warps": 8})


def gathered() -> dict[str, Any]:
    types = {"X": "*bf16", "Q": "*i8", "SX": "*fp32", "W": "*i8", "SW": "*fp32", "ACTIVE": "*i32", "XS": "*bf16", "WS": "*bf16"}
    types |= dict.fromkeys(("M", "N", "K", "stride_m"), "i32")
    constants = {"stride_k": 1, "ROOM": columns.ROOM, "SIDE": SIDE, "R": columns.ROWS}
    return compiled(columns.gather_kernel, 90, types, constants, {"num_warps": 4})


def gemv(arch: int, k: int, given: bool, groups: int = 1, by_row: bool = False) -> dict[str, Any]:
    config = tiles.vector(k, given=given, in_groups=groups > 1)
    types = {"X": "*bf16", "W": "*i32", "Y": "*bf16", "SW": "*fp32", "N": "i32", "K": "i32", "K4": "i32"}
    types |= {"X": "*i32", "SX": "*fp32"} if given else {}
    types |= {"BORDERS": "*i32"} if groups > 1 else {}
    block = triton.next_power_of_2(k // 4)
    constants = {
        "stride_xk": 1,
        "GROUPS": groups,
        "BY_ROW": by_row,
        "QMAX": 127,
        "ROWS": config.rows,
        "ROUNDS": config.groups,
        "B4": block,
        "EVEN_N": True,
        "EVEN_K": block == k // 4,
    }
    return compiled(gemv_kernel, arch, types, constants | {"NATIVE": True, "PDL": arch >= 90}, {"num_warps": config.warps})


def described(rows: int, columns: int, dtype: torch.dtype = torch.int8) -> str:
    return f"tensordesc<{NAMES[dtype]}[{rows}, {columns}],{box(rows, columns, dtype)!r}>"


def gluon(
    config: tiles.Gemm | tiles.Decode,
    dtype: torch.dtype = torch.bfloat16,
    sides: int = 0,
    groups: int = 1,
    by_row: bool = False,
    **extra: str,
) -> dict[str, Any]:
    types = dict.fromkeys(("M", "N", "K", "zero_stride"), "i32") | {"SX": "*fp32", "SW": "*fp32"} | extra
    tokens, rows = (64, config.part) if isinstance(config, tiles.Gemm) else (config.tokens, 64)
    if sides:
        types |= {"x_desc": described(tokens, SIDE, dtype), "v_desc": described(rows, SIDE, dtype)}
    options: dict[str, Any] = {"num_warps": 4, "launch_pdl": config.early}
    if isinstance(config, tiles.Gemm):
        types |= {
            "q_desc": described(64, 128),
            "w_desc": described(config.part, 128),
            "y_desc": described(64, config.width, dtype),
        }
        constants = {"BAND": config.group, "BN": config.columns, "BK": 128, "STAGES": config.stages, "WIDTH": config.width}
        constants |= {
            "SLOTS": 1 if extra.keys() & {"ZP", "B"} else 2,
            "SIDES": sides,
            "GROUPS": groups,
            "BY_ROW": by_row,
            "PDL": config.early,
        }
        return compiled(many.gemm_kernel, 90, types, constants, options)
    types |= {
        "q_desc": described(config.tokens, BLOCK),
        "w_desc": described(64, BLOCK),
        "Y": f"*{NAMES[dtype]}",
    } | ({"y_desc": described(config.tokens, 64, dtype)} if config.staged else {})
    constants = {"TOKENS": config.tokens, "BK": config.block_k, "STAGES": config.stages, "SIDES": sides, "PDL": config.early}
    constants |= {"GROUPS": groups, "BY_ROW": by_row}
    return compiled(few.decode_kernel, 90, types, constants, options | {"maxnreg": config.registers(groups)})


def chosen(*, in_groups: bool = False) -> list[Any]:
    """Every Hopper kernel that the table can choose."""
    sizes = [(m, n) for m in (1, 8, 16, 32, 64, 100, 128, 256, 512, 4096) for n in (1024, 4096, 28672)]
    return sorted({tiles.hopper(m, n, in_groups=in_groups) for m, n in sizes}, key=str)


def main() -> None:
    out: dict[str, Any] = {}
    zero, bias = {"ZERO": "*i32", "WSUM": "*i32"}, {"BIAS": "*bf16"}
    for arch in (80, 89, 90, 100):
        out[f"quantize {arch}"] = quantize(arch)
        out[f"quantize norm {arch}"] = quantize(arch, SOURCE="rms", X2="*bf16", GAIN="*bf16", SUM="*bf16", B=8192, EVEN=False)
        out[f"quantize gate {arch}"] = quantize(arch, SOURCE="silu", X2="*bf16", PRE="*fp32", B=16384, EVEN=False)
        out[f"quantize rotate {arch}"] = quantize(arch, ROTATION=64, PRE="*fp32", PERM="*i16")
        rotated = {"ROTATION": 64, "MATRIX": "*bf16"}
        norm = {"SOURCE": "rms", "X2": "*bf16", "SUM": "*bf16", "GAIN": "*bf16"}
        out[f"rows {arch}"] = one_row(arch, 4096)
        out[f"rows rotate {arch}"] = one_row(arch, 14336, **rotated)
        out[f"rows norm rotate {arch}"] = one_row(arch, 4096, **norm, **rotated)
        out[f"rows gate {arch}"] = one_row(arch, 14336, SOURCE="silu", X2="*bf16")
        grouped = {"PERM": "*i16", "GROUP": "*i32", "SHARES": "*fp32", "GROUPS": 8}
        out[f"rows norm groups {arch}"] = one_row(arch, 4096, places=4224, SOURCE="rms", GAIN="*bf16", **grouped)
        out[f"rows gate rotate few {arch}"] = one_row(arch, 14336, 16, SOURCE="silu", X2="*bf16", **rotated)
        for k in (512, 4096, 8192) if arch == 90 else (8192,):
            out[f"order {k} {arch}"] = ordered(arch, k)
            out[f"order norm {k} {arch}"] = ordered(arch, k, **norm, PRE="*fp32")
            out[f"order norm groups {k} {arch}"] = ordered(arch, k, SOURCE="rms", GAIN="*bf16", **grouped)
        if arch != 89:  # which has too little shared memory for them: the portable kernel takes these
            out[f"rows gate groups {arch}"] = one_row(arch, 8192, SOURCE="silu", X2="*bf16", **grouped)
            out[f"rows gate rotate {arch}"] = one_row(arch, 14336, SOURCE="silu", X2="*bf16", PRE="*fp32", **rotated)
        out[f"quantize asymmetric {arch}"] = quantize(arch, SYMMETRIC=False, Z="*i32")
        groups = {"GROUP": "*i32", "SHARES": "*fp32", "GROUPS": 8, "COUNT": 8}
        out[f"quantize groups {arch}"] = quantize(arch, PERM="*i16", **groups)
        out[f"quantize asymmetric groups {arch}"] = quantize(arch, SYMMETRIC=False, Z="*i32", **groups)
        out[f"quantize threshold {arch}"] = quantize(arch, REACHED="*i32")
        out[f"columns list {arch}"] = listed(arch)
        for k, given in itertools.product((4096, 14336), (False, True)):
            out[f"gemv {k} {given} {arch}"] = gemv(arch, k, given)
        for k, by_row in itertools.product((4096, 14336), (False, True)):
            out[f"gemv {k} groups {by_row} {arch}"] = gemv(arch, k, True, 4, by_row)
        some = sorted({tiles.portable(arch, m, n) for m in (1, 32, 64, 128, 256, 8192) for n in (4096, 28672)}, key=astuple)
        for tile in some:
            out[f"matmul {arch} {tile}"] = matmul(arch, tile)
        for tile in (some[0], tiles.portable(arch, 8192, 4096, in_groups=True)):
            out[f"matmul {arch} {tile} zero bias"] = matmul(arch, tile, **zero, **bias)
            out[f"matmul {arch} {tile} groups"] = matmul(arch, tile, BORDERS="*i32", GROUPS=4, BY_ROW=True)
        for tile in some:
            out[f"matmul {arch} {tile} side"] = matmul(arch, tile, SIDE="*bf16", SIDEW="*bf16")
            out[f"matmul {arch} {tile} threshold"] = matmul(arch, tile, SIDE="*bf16", ACTIVE="*i32")
    for k, block, m in itertools.product((576, 4096, 14336, 28672), (0, 64, 256), (16, 8192)):
        out[f"rows {k} {block} {m} 90"] = one_row(90, k, m, ROTATION=block, **({"MATRIX": "*bf16"} if block else {}))
    out["rows layer norm rotate 90"] = one_row(90, 8192, **norm | rotated | {"SOURCE": "layer"}, BIAS="*bf16")
    grouped = {"PERM": "*i16", "GROUP": "*i32", "SHARES": "*fp32", "GROUPS": 8}
    for m in (16, 8192):
        out[f"rows gate groups 14336 {m} 90"] = one_row(90, 14336, m, SOURCE="silu", X2="*bf16", **grouped)
    out["rows norm permuted 90"] = one_row(90, 4096, **norm, PERM="*i16")
    out["columns gather 90"] = gathered()
    for m in (1, 32, 64, 128, 8192):  # what runs after a Hopper kernel that had no room for all
        tile = tiles.portable(90, m, 28672, in_groups=True)
        out[f"matmul 90 {tile} more"] = matmul(90, tile, SIDE="*bf16", ACTIVE="*i32", ROOM=columns.ROOM)
    for config in chosen(in_groups=True):
        groups = {"BORDERS": "*i32"}
        out[f"hopper 90 {config} groups"] = gluon(config, groups=4, **groups)
        out[f"hopper 90 {config} groups by row"] = gluon(config, groups=4, by_row=True, **groups)
        zeros = {"ZP": "*i32", "WSUM": "*i32", "B": "*bf16"} | groups
        out[f"hopper 90 {config} groups side zero bias"] = gluon(config, sides=1, groups=2, by_row=True, **zeros)
    for config in chosen():
        out[f"hopper 90 {config}"] = gluon(config)
        out[f"hopper 90 {config} zero bias"] = gluon(config, torch.float16, ZP="*i32", WSUM="*i32", B="*fp32")
        for sides in (1, 2):
            out[f"hopper 90 {config} {sides} sides"] = gluon(config, sides=sides)
        out[f"hopper 90 {config} threshold"] = gluon(config, sides=columns.ROOM // SIDE, ACTIVE="*i32")
        out[f"hopper 90 {config} side zero bias"] = gluon(config, sides=1, ZP="*i32", WSUM="*i32", B="*bf16")
    json.dump(out, sys.stdout, indent=1)


if __name__ == "__main__":
    main()

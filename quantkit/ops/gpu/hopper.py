"""Two INT8 products for Hopper (sm_90), in Gluon: a warp-specialised persistent GEMM, and its mirror image for few tokens.

Both stream tiles through shared memory with the tensor memory accelerator (TMA): one producer warp loads, one or two groups of
four warps multiply (wgmma) and rescale. TMA fills with zeros beyond M, N and K and clips stores, so there is no code for tails;
it needs 16-byte rows: K a multiple of 16, and N of 8 for a 16-bit result.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.ops.gpu import configs
from quantkit.ops.gpu.configs import Decode, Gemm

renamed = hasattr(tma, "async_load")  # in Triton 3.9
load = tma.async_load if renamed else tma.async_copy_global_to_shared
store = tma.async_store if renamed else tma.async_copy_shared_to_global
ROWS = gl.constexpr(64)  # rows of a wgmma
SIDE = gl.constexpr(configs.SIDE)
PIECE = gl.constexpr(configs.BLOCK)  # of K, in a box of TMA; segments start at multiples of it


@gluon.jit
def tile_of(t, tiles_m, tiles_n, GROUP: gl.constexpr):
    """Row and column of tile ``t``: columns within groups of GROUP rows, so that neighbours in time share what is in L2."""
    first = t // (GROUP * tiles_n) * GROUP
    height = gl.minimum(tiles_m - first, GROUP)
    rest = t % (GROUP * tiles_n)
    return first + rest % height, rest // height


@gluon.jit
def first_row(tile, M, HEIGHT: gl.constexpr):
    """Where a tile of tokens starts. The last one moves up to end at M: TMA is slow at filling with zeros, and a token that
    is computed twice gets the same bits twice."""
    return gl.minimum(tile * HEIGHT, gl.maximum(M - HEIGHT, 0))


@gluon.jit
def following(stage, phase, STAGES: gl.constexpr):
    """The next slot of the ring, and the parity to wait for there."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def side_of(buffer, desc):
    """A slot of the ring as a tile of 16-bit columns."""
    return buffer._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)


@gluon.jit
def active_tiles(ACTIVE, SIDES: gl.constexpr):
    """Tiles of side columns that hold the active ones of this batch."""
    return gl.minimum(gl.cdiv(gl.load(ACTIVE), SIDE), SIDES)


# ---- many tokens: y = q W^T, 128 tokens (64 for each of two consumers) by BN columns, in accumulators of 2 WIDTH columns


@gluon.jit
def gemm_producer(q_desc, w_desc, x_desc, v_desc, q_ring, w_ring, full, empty, ACTIVE, M, N, KT,
                  GROUP: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
                  WIDTH: gl.constexpr, SIDES: gl.constexpr):  # fmt: skip
    PART: gl.constexpr = 2 * WIDTH
    PARTS: gl.constexpr = BN // PART
    tiles_m, tiles_n = gl.cdiv(M, 2 * ROWS), gl.cdiv(N, BN)
    stage, phase = 0, 1
    for t in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tm, tn = tile_of(t, tiles_m, tiles_n, GROUP)
        for k in range(KT):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, (2 * ROWS + BN) * BK)
            for p in gl.static_range(PARTS):
                load(w_desc, [tn * BN + p * PART, k * BK], bar, w_ring.index(stage * PARTS + p))
            for c in gl.static_range(2):
                load(q_desc, [first_row(tm, M, 2 * ROWS) + c * ROWS, k * BK], bar, q_ring.index(stage * 2 + c))
            stage, phase = following(stage, phase, STAGES)
        if SIDES > 0:
            sides = SIDES
            if ACTIVE is not None:
                sides = active_tiles(ACTIVE, SIDES)
            for s in range(sides):
                mbarrier.wait(empty.index(stage), phase)
                bar = full.index(stage)
                mbarrier.expect(bar, (2 * ROWS + BN) * 2 * SIDE)
                for p in gl.static_range(PARTS):
                    slot = side_of(w_ring.index(stage * PARTS + p), v_desc)
                    load(v_desc, [tn * BN + p * PART, s * SIDE], bar, slot)
                for c in gl.static_range(2):
                    row = first_row(tm, M, 2 * ROWS) + c * ROWS
                    load(x_desc, [row, s * SIDE], bar, side_of(q_ring.index(stage * 2 + c), x_desc))
                stage, phase = following(stage, phase, STAGES)


@gluon.jit
def halves(x, BN: gl.constexpr, layout: gl.constexpr):
    """Left and right half of ``x [64, BN]``; each thread keeps its own values."""
    left, right = x.reshape([ROWS, 2, BN // 2]).permute([0, 2, 1]).split()
    return gl.convert_layout(left, layout), gl.convert_layout(right, layout)


@gluon.jit
def centred(acc, column: gl.constexpr, zero, columns, ZERO: gl.constexpr):
    """``acc [64, n]``, which starts at ``column`` of the tile, without the share of the zero point."""
    if ZERO:
        sums = columns.index(2).slice(column, acc.shape[1]).load(gl.SliceLayout(0, acc.type.layout))
        acc = acc - zero[:, None] * sums.to(gl.int32, bitcast=True)[None, :]
    return acc


@gluon.jit
def rescaled(acc, column: gl.constexpr, sx, times, zero, columns, last, ZERO: gl.constexpr, SEGMENTS: gl.constexpr,
             BY_ROW: gl.constexpr):  # fmt: skip
    """``acc [64, n]``, which starts at ``column`` of the tile, in float32."""
    acc = centred(acc, column, zero, columns, ZERO)
    if SEGMENTS > 1:
        acc = acc * times[:, None]
    if BY_ROW:
        acc = acc * last.slice(column, acc.shape[1]).load(gl.SliceLayout(0, acc.type.layout)).to(gl.int32)[None, :]
    sw = columns.index(0).slice(column, acc.shape[1]).load(gl.SliceLayout(0, acc.type.layout))
    return acc.to(gl.float32) * sx[:, None] * sw[None, :]


@gluon.jit
def put(y, column: gl.constexpr, row, first, sx, times, zero, columns, last, y_desc, staging, slot: gl.constexpr,
        WIDTH: gl.constexpr, SLOTS: gl.constexpr, ZERO: gl.constexpr, BIAS: gl.constexpr, SIDES: gl.constexpr,
        SEGMENTS: gl.constexpr, BY_ROW: gl.constexpr):  # fmt: skip
    """Finish ``y [64, WIDTH]``, which starts at ``column`` of the tile, and send it out through a staging tile."""
    if SIDES == 0:
        y = rescaled(y, column, sx, times, zero, columns, last, ZERO, SEGMENTS, BY_ROW)
    if BIAS:
        y = y + columns.index(1).slice(column, WIDTH).load(gl.SliceLayout(0, y.type.layout))[None, :]
    tma.store_wait(SLOTS - 1)  # until this staging tile is free again
    buffer = staging.index(slot % SLOTS)
    buffer.store(y.to(y_desc.dtype))
    fence_async_shared()
    store(y_desc, [row, first + column], buffer)


@gluon.constexpr_function
def by_fours(columns: int) -> gl.SharedLinearLayout:
    """How values of ``columns`` lie in shared memory: a thread's of two neighbouring matrices of 8 beside each other."""
    bits = [1, 8, 2, 4, *(1 << i for i in range(4, columns.bit_length() - 1))]
    return gl.SharedLinearLayout([[bit] for bit in bits])


@gluon.jit
def inverse(odd):
    """Modulo 2**32: an odd number is its own in 3 bits, and each round makes twice as many right."""
    x = odd
    for _ in gl.static_range(4):
        x = x * (2 - odd * x)
    return x


@gluon.jit
def multiplied(accs, q, w_ring, stage, USE: gl.constexpr, PARTS: gl.constexpr):
    """Start to multiply a slot of the ring."""
    out = gl.tuple(())
    for p in gl.static_range(PARTS):
        w = w_ring.index(stage * PARTS + p).permute((1, 0))
        out += (warpgroup_mma(q, w, accs[p], is_async=True, use_acc=USE),)
    return out


@gluon.jit
def until(accs, pending: gl.constexpr, PARTS: gl.constexpr):
    """Wait until products with no more than ``pending`` parts are under way."""
    out = gl.tuple(())
    if PARTS == 1:
        out += (warpgroup_mma_init(warpgroup_mma_wait(pending, deps=[accs[0]])),)
    else:
        a, b = warpgroup_mma_wait(pending, deps=[accs[0], accs[1]])
        out += (warpgroup_mma_init(a), warpgroup_mma_init(b))
    return out


@gluon.jit
def multiple_of(SX, m, g, M, SEGMENTS: gl.constexpr):
    """How often segment ``g``, or the last one, counts for tokens ``m``."""
    g = gl.minimum(g, SEGMENTS - 1)
    return gl.load(SX + m * (1 + SEGMENTS) + 1 + g, mask=m < M, other=1.0).to(gl.int32)


@gluon.jit
def of_row(SW, n, g, N, SEGMENTS: gl.constexpr):
    """How often segment ``g``, or the last one, counts for rows ``n`` of the weight."""
    return gl.load(SW + (1 + gl.minimum(g, SEGMENTS - 1)) * N + n, mask=n < N, other=1.0).to(gl.int32)


@gluon.jit
def gemm_consumer(c: gl.constexpr, x_desc, v_desc, q_ring, w_ring, full, empty, staging, columns, of_last, y_desc, SX, SW,
                  ZP, WSUM, B, ACTIVE, BORDERS, M, N, KT, zero_stride, GROUP: gl.constexpr, BN: gl.constexpr,
                  BK: gl.constexpr, STAGES: gl.constexpr, WIDTH: gl.constexpr, SLOTS: gl.constexpr, ZERO: gl.constexpr,
                  BIAS: gl.constexpr, SIDES: gl.constexpr, SEGMENTS: gl.constexpr, BY_ROW: gl.constexpr):  # fmt: skip
    PART: gl.constexpr = 2 * WIDTH
    PARTS: gl.constexpr = BN // PART
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 32])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])  # of the 16-bit product
    last: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    flat: gl.constexpr = gl.BlockedLayout([max(BN // 128, 1)], [32], [4], [0])
    tiles_m, tiles_n = gl.cdiv(M, 2 * ROWS), gl.cdiv(N, BN)
    stage, phase = 0, 0
    for t in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tm, tn = tile_of(t, tiles_m, tiles_n, GROUP)
        first, row = tn * BN, first_row(tm, M, 2 * ROWS) + c * ROWS
        m = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        n = first + gl.arange(0, BN, flat)
        sx, zero = gl.load(SX + m * (1 if SEGMENTS == 1 else 1 + SEGMENTS), mask=m < M, other=0.0), m
        times, steps = m, KT
        sw = gl.load(SW + n, mask=n < N, other=0.0)
        if ZERO:
            sums = gl.load(WSUM + n, mask=n < N, other=0)
        if SEGMENTS > 1:
            # what a border needs is on its way a segment before: nothing waits for memory, however short segments are
            times, next_times = multiple_of(SX, m, 0, M, SEGMENTS), multiple_of(SX, m, 1, M, SEGMENTS)
            end, next_end = gl.load(BORDERS + 1), gl.load(BORDERS + 2)
            steps = end // BK
        if BY_ROW:
            of_rows, next_of_rows = of_row(SW, n, 0, N, SEGMENTS), of_row(SW, n, 1, N, SEGMENTS)
            later_of_rows = of_row(SW, n, 2, N, SEGMENTS)
        accs = gl.tuple(())
        for _part in gl.static_range(PARTS):
            accs += (gl.zeros([ROWS, PART], gl.int32, layout),)
        mbarrier.wait(full.index(stage), phase)
        accs = multiplied(accs, q_ring.index(stage * 2 + c), w_ring, stage, False, PARTS)
        if BIAS:
            columns.index(1).store(gl.load(B + n, mask=n < N, other=0.0).to(gl.float32))
        if BY_ROW:
            columns.index(0).store((of_rows * inverse(next_of_rows)).to(gl.float32, bitcast=True))
        else:
            columns.index(0).store(sw)
        if ZERO:
            columns.index(2).store(sums.to(gl.float32, bitcast=True))
        before = stage
        stage, phase = following(stage, phase, STAGES)
        if SEGMENTS > 1:
            for g in range(SEGMENTS - 1):
                if ZERO:
                    zero = gl.load(ZP + m * zero_stride + g, mask=m < M, other=0)
                for _ in range(1, steps):
                    mbarrier.wait(full.index(stage), phase)
                    accs = until(multiplied(accs, q_ring.index(stage * 2 + c), w_ring, stage, True, PARTS), PARTS, PARTS)
                    mbarrier.arrive(empty.index(before), count=1)
                    before = stage
                    stage, phase = following(stage, phase, STAGES)
                # one accumulator serves all: from here on it is in what the next segment counts, modulo 2**32
                step = times * inverse(next_times)
                mbarrier.wait(full.index(stage), phase)
                # One part is multiplied again while the next is rescaled. Before the first both end: ptxas makes all products
                # wait for each other if one that began before the loop's last round is read while another is under way.
                rescaled_accs = gl.tuple(())
                for p in gl.static_range(PARTS):
                    acc = warpgroup_mma_wait(p, deps=[accs[p]])
                    if p == 0:
                        mbarrier.arrive(empty.index(before), count=1)
                    acc = centred(acc, p * PART, zero, columns, ZERO) * step[:, None]
                    if BY_ROW:
                        ratios = columns.index(0).slice(p * PART, PART).load(gl.SliceLayout(0, layout))
                        acc = acc * ratios.to(gl.int32, bitcast=True)[None, :]
                    acc = warpgroup_mma_init(acc)
                    w = w_ring.index(stage * PARTS + p).permute((1, 0))
                    rescaled_accs += (warpgroup_mma(q_ring.index(stage * 2 + c), w, acc, is_async=True),)
                accs = rescaled_accs
                before, times = stage, next_times
                stage, phase = following(stage, phase, STAGES)
                steps = (next_end - end) // BK
                end, next_end = next_end, gl.load(BORDERS + gl.minimum(g + 3, SEGMENTS))
                next_times = multiple_of(SX, m, g + 2, M, SEGMENTS)
                if BY_ROW:
                    of_rows, next_of_rows = next_of_rows, later_of_rows
                    columns.index(0).store((of_rows * inverse(next_of_rows)).to(gl.float32, bitcast=True))
                    later_of_rows = of_row(SW, n, g + 3, N, SEGMENTS)
                if ZERO:
                    sums = gl.load(WSUM + (g + 1) * N + n, mask=n < N, other=0)
                    columns.index(2).store(sums.to(gl.float32, bitcast=True))
            if BY_ROW:
                columns.index(0).store(sw)
                of_last.store(of_rows.to(gl.int8))
        for _ in range(1, steps):
            mbarrier.wait(full.index(stage), phase)
            accs = until(multiplied(accs, q_ring.index(stage * 2 + c), w_ring, stage, True, PARTS), PARTS, PARTS)
            mbarrier.arrive(empty.index(before), count=1)
            before = stage
            stage, phase = following(stage, phase, STAGES)
        if ZERO:
            zero = gl.load(ZP + m * zero_stride + SEGMENTS - 1, mask=m < M, other=0)
        if SIDES > 0:
            # The INT32 registers become float32 ones, and take the 16-bit product on top.
            accs = until(accs, 0, PARTS)
            mbarrier.arrive(empty.index(before), count=1)
            floats = gl.tuple(())
            for p in gl.static_range(PARTS):
                acc = warpgroup_mma_wait(0, deps=[accs[p]])
                acc = rescaled(acc, p * PART, sx, times, zero, columns, of_last, ZERO, SEGMENTS, BY_ROW)
                floats += (warpgroup_mma_init(gl.convert_layout(acc, wide)),)
            sides = SIDES
            if ACTIVE is not None:
                sides = active_tiles(ACTIVE, SIDES)
            for _ in range(sides):
                mbarrier.wait(full.index(stage), phase)
                x = side_of(q_ring.index(stage * 2 + c), x_desc)
                sums_of_parts = gl.tuple(())
                for p in gl.static_range(PARTS):
                    v = side_of(w_ring.index(stage * PARTS + p), v_desc).permute((1, 0))
                    sums_of_parts += (warpgroup_mma(x, v, floats[p], is_async=True),)
                floats = until(sums_of_parts, 0, PARTS)
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = following(stage, phase, STAGES)
        end_sx, end_zero = gl.convert_layout(sx, gl.SliceLayout(1, last)), gl.convert_layout(zero, gl.SliceLayout(1, last))
        end_times = gl.convert_layout(times, gl.SliceLayout(1, last))
        for p in gl.static_range(PARTS):
            if SIDES > 0:
                acc = gl.convert_layout(warpgroup_mma_wait(0, deps=[floats[p]]), layout)
            else:
                acc = warpgroup_mma_wait(PARTS - 1 - p, deps=[accs[p]])
                if p == PARTS - 1:
                    mbarrier.arrive(empty.index(before), count=1)
            left, right = halves(acc, PART, last)
            for half in gl.static_range(2):
                put(left if half == 0 else right, p * PART + half * WIDTH, row, first, end_sx, end_times, end_zero, columns,
                    of_last, y_desc, staging, 2 * p + half, WIDTH, SLOTS, ZERO, BIAS, SIDES, SEGMENTS, BY_ROW)  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "K", "zero_stride"])
def gemm_kernel(q_desc, w_desc, x_desc, v_desc, y_desc, SX, SW, ZP, WSUM, B, ACTIVE, BORDERS, M, N, K, zero_stride,
                GROUP: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, WIDTH: gl.constexpr,
                SLOTS: gl.constexpr, SIDES: gl.constexpr, SEGMENTS: gl.constexpr, BY_ROW: gl.constexpr,
                PDL: gl.constexpr):  # fmt: skip
    """``y [M, N]`` in 16 bit from descriptors of ``q [M, K]`` (boxes of 64 x BK), ``w [N, K]`` (2 WIDTH x BK) and y
    (64 x WIDTH); with SIDES > 0 of ``x [M, 64 SIDES]`` (64 x 64) and ``v [N, 64 SIDES]`` (2 WIDTH x 64) in 16 bit, whose
    product is added."""
    ZERO: gl.constexpr = ZP is not None
    BIAS: gl.constexpr = B is not None
    fours: gl.constexpr = by_fours(BN)
    q_ring = gl.allocate_shared_memory(gl.int8, [STAGES * 2, ROWS, BK], q_desc.layout)
    PARTS: gl.constexpr = BN // (2 * WIDTH)
    w_ring = gl.allocate_shared_memory(gl.int8, [STAGES * PARTS, 2 * WIDTH, BK], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    staging0 = gl.allocate_shared_memory(y_desc.dtype, [SLOTS, ROWS, WIDTH], y_desc.layout)
    staging1 = gl.allocate_shared_memory(y_desc.dtype, [SLOTS, ROWS, WIDTH], y_desc.layout)
    kinds: gl.constexpr = 3 if ZERO else (2 if BIAS else 1)
    columns0 = gl.allocate_shared_memory(gl.float32, [kinds, BN], fours)
    columns1 = gl.allocate_shared_memory(gl.float32, [kinds, BN], fours)
    # in bytes: the widest tile leaves no room for more
    last0 = gl.allocate_shared_memory(gl.int8, [BN if BY_ROW else 16], fours if BY_ROW else by_fours(16))
    last1 = gl.allocate_shared_memory(gl.int8, [BN if BY_ROW else 16], fours if BY_ROW else by_fours(16))
    KT = gl.cdiv(K, BK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gl.warp_specialize([
        (gemm_consumer, (0, x_desc, v_desc, q_ring, w_ring, full, empty, staging0, columns0, last0, y_desc, SX, SW, ZP, WSUM,
                         B, ACTIVE, BORDERS, M, N, KT, zero_stride, GROUP, BN, BK, STAGES, WIDTH, SLOTS, ZERO, BIAS, SIDES,
                         SEGMENTS, BY_ROW)),
        (gemm_consumer, (1, x_desc, v_desc, q_ring, w_ring, full, empty, staging1, columns1, last1, y_desc, SX, SW, ZP, WSUM,
                         B, ACTIVE, BORDERS, M, N, KT, zero_stride, GROUP, BN, BK, STAGES, WIDTH, SLOTS, ZERO, BIAS, SIDES,
                         SEGMENTS, BY_ROW)),
        (gemm_producer, (q_desc, w_desc, x_desc, v_desc, q_ring, w_ring, full, empty, ACTIVE, M, N, KT, GROUP, BN, BK, STAGES,
                         WIDTH, SIDES)),
    ], [4, 1], [232, 24])  # fmt: skip


# ---- few tokens: y^T = W q^T, 64 weight rows by TOKENS tokens, so that no matrix instruction is wasted on empty rows


@gluon.jit
def decode_producer(q_desc, w_desc, x_desc, v_desc, q_ring, w_ring, full, empty, ACTIVE, M, N, KT, TOKENS: gl.constexpr,
                    BK: gl.constexpr, STAGES: gl.constexpr, SIDES: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    PIECES: gl.constexpr = BK // PIECE
    token = first_row(gl.program_id(0), M, TOKENS)
    stage, phase = 0, 1
    fetched = 0
    if PDL:
        # The weight does not depend on the kernel before: fill the ring with it, then wait, then fetch the tokens.
        row = gl.program_id(1) * ROWS
        fetched = gl.minimum(KT, STAGES)
        for k in range(fetched):
            mbarrier.expect(full.index(k), (ROWS + TOKENS) * BK)
            for p in gl.static_range(PIECES):
                load(w_desc, [row, k * BK + p * PIECE], full.index(k), w_ring.index(k * PIECES + p))
        gdc_wait()
        for k in range(fetched):
            for p in gl.static_range(PIECES):
                load(q_desc, [token, k * BK + p * PIECE], full.index(k), q_ring.index(k * PIECES + p))
        if fetched == STAGES:
            phase ^= 1
        else:
            stage = fetched
    for t in range(gl.program_id(1), gl.cdiv(N, ROWS), gl.num_programs(1)):
        # (a plain 0 assigned to ``fetched`` here would be lost: the compiler does not carry it into the next tile)
        for k in range(fetched * (t == gl.program_id(1)).to(gl.int32), KT):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, (ROWS + TOKENS) * BK)
            for p in gl.static_range(PIECES):
                load(w_desc, [t * ROWS, k * BK + p * PIECE], bar, w_ring.index(stage * PIECES + p))
                load(q_desc, [token, k * BK + p * PIECE], bar, q_ring.index(stage * PIECES + p))
            stage, phase = following(stage, phase, STAGES)
        if SIDES > 0:
            sides = SIDES
            if ACTIVE is not None:
                sides = active_tiles(ACTIVE, SIDES)
            for s in range(sides):
                mbarrier.wait(empty.index(stage), phase)
                bar = full.index(stage)
                mbarrier.expect(bar, (ROWS + TOKENS) * 2 * SIDE)
                load(v_desc, [t * ROWS, s * SIDE], bar, side_of(w_ring.index(stage * PIECES), v_desc))
                load(x_desc, [token, s * SIDE], bar, side_of(q_ring.index(stage * PIECES), x_desc))
                stage, phase = following(stage, phase, STAGES)


@gluon.jit
def scales_of(SW, tile, N, layout: gl.constexpr, SEGMENTS: gl.constexpr, BY_ROW: gl.constexpr):
    """Scales of the weight rows of a tile, and how often each segment counts there."""
    n = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    of_rows = gl.tuple(())
    if BY_ROW:
        for g in gl.static_range(SEGMENTS):
            of_rows += (of_row(SW, n, g, N, SEGMENTS),)
    return gl.load(SW + n, mask=n < N, other=0.0), of_rows


@gluon.jit
def end_of(g: gl.constexpr, BORDERS, KT, PIECES: gl.constexpr, SEGMENTS: gl.constexpr):
    """The piece of K behind a segment."""
    end = KT * PIECES
    if g < SEGMENTS - 1:
        end = gl.load(BORDERS + g + 1) // PIECE
    return end


@gluon.jit
def product_of(acc, w_ring, q_ring, piece):
    """Start to multiply a piece of a slot."""
    return warpgroup_mma(w_ring.index(piece), q_ring.index(piece).permute((1, 0)), acc, is_async=True)


@gluon.jit
def decode_consumer(x_desc, v_desc, q_ring, w_ring, full, empty, staging, y_desc, Y, SX, SW, ZP, WSUM, B, ACTIVE,
                    BORDERS, M, N, KT, zero_stride, TOKENS: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
                    SIDES: gl.constexpr, SEGMENTS: gl.constexpr, BY_ROW: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    PIECES: gl.constexpr = BK // PIECE
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])  # of the 16-bit product
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 32])
    token = first_row(gl.program_id(0), M, TOKENS)
    m = token + gl.arange(0, TOKENS, gl.SliceLayout(0, layout))
    stage, phase = 0, 0
    # What the ends of segments need is on its way before the tokens are there, all of it if there are registers.
    AHEAD: gl.constexpr = SEGMENTS * TOKENS <= 128
    sw, of_rows = scales_of(SW, gl.program_id(1), N, layout, SEGMENTS, BY_ROW)
    ends, multiples = gl.tuple(()), gl.tuple(())
    if AHEAD:
        for g in gl.static_range(SEGMENTS - 1):
            ends += (end_of(g, BORDERS, KT, PIECES, SEGMENTS),)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    sx = gl.load(SX + m * (1 if SEGMENTS == 1 else 1 + SEGMENTS), mask=m < M, other=0.0)
    if SEGMENTS > 1:
        for g in gl.static_range(SEGMENTS if AHEAD else 1):
            multiples += (multiple_of(SX, m, g, M, SEGMENTS),)
    for t in range(gl.program_id(1), gl.cdiv(N, ROWS), gl.num_programs(1)):
        n = t * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        acc = warpgroup_mma_init(gl.zeros([ROWS, TOKENS], gl.int32, layout))
        before, start = 0, 0
        if SEGMENTS > 1:
            times = multiples[0]
        for g in gl.static_range(SEGMENTS):
            if AHEAD and g < SEGMENTS - 1:
                upto, next_times = ends[g], multiples[g + 1]
            else:
                upto = end_of(g, BORDERS, KT, PIECES, SEGMENTS)
                if g < SEGMENTS - 1:
                    next_times = multiple_of(SX, m, g + 1, M, SEGMENTS)
            if ZP is not None:
                zero = gl.load(ZP + m * zero_stride + g, mask=m < M, other=0)
                sums = gl.load(WSUM + g * N + n, mask=n < N, other=0)
            if SEGMENTS > 1 and PIECES > 1:  # the rest of a slot in which the segment before ended
                for _ in range(start % PIECES):
                    acc = warpgroup_mma_wait(0, deps=[product_of(acc, w_ring, q_ring, stage * PIECES + 1)])
                    acc = warpgroup_mma_init(acc)
                    mbarrier.arrive(empty.index(stage), count=1)
                    stage, phase = following(stage, phase, STAGES)
            first = gl.cdiv(start, PIECES)
            for k in range(first, upto // PIECES):
                mbarrier.wait(full.index(stage), phase)
                for p in gl.static_range(PIECES):
                    acc = product_of(acc, w_ring, q_ring, stage * PIECES + p)
                acc = warpgroup_mma_init(warpgroup_mma_wait(PIECES, deps=[acc]))
                mbarrier.arrive(empty.index(before), count=1, pred=k > first)
                before = stage
                stage, phase = following(stage, phase, STAGES)
            acc = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[acc]))
            mbarrier.arrive(empty.index(before), count=1, pred=upto // PIECES > first)
            if g < SEGMENTS - 1 and PIECES > 1:  # the beginning of a slot in which the next one goes on
                for _ in range(upto % PIECES):
                    mbarrier.wait(full.index(stage), phase)
                    acc = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[product_of(acc, w_ring, q_ring, stage * PIECES)]))
            total = warpgroup_mma_wait(0, deps=[acc])
            if ZP is not None:
                total = total - sums[:, None] * zero[None, :]
            if g < SEGMENTS - 1:
                total = total * (times * inverse(next_times))[None, :]
                if BY_ROW:
                    total = total * (of_rows[g] * inverse(of_rows[g + 1]))[:, None]
                acc = warpgroup_mma_init(total)
                start, times = upto, next_times
        if SEGMENTS > 1:
            total = total * times[None, :]
        if BY_ROW:
            total = total * of_rows[SEGMENTS - 1][:, None]
        y = (total.to(gl.float32) * sx[None, :]) * sw[:, None]
        sw, of_rows = scales_of(SW, t + gl.num_programs(1), N, layout, SEGMENTS, BY_ROW)  # of the next tile
        if SIDES > 0:
            y = gl.convert_layout(y, wide)
            sides = SIDES
            if ACTIVE is not None:
                sides = active_tiles(ACTIVE, SIDES)
            for _ in range(sides):
                mbarrier.wait(full.index(stage), phase)
                x, v = side_of(q_ring.index(stage * PIECES), x_desc), side_of(w_ring.index(stage * PIECES), v_desc)
                y = warpgroup_mma_wait(0, deps=[warpgroup_mma(v, x.permute((1, 0)), y, is_async=True)])
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = following(stage, phase, STAGES)
            y = gl.convert_layout(y, layout)
        if B is not None:
            y = y + gl.load(B + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
        y = y.to(Y.dtype.element_ty)
        if y_desc is not None:
            tma.store_wait(0)
            staging.store(y.permute((1, 0)))
            fence_async_shared()
            store(y_desc, [token, t * ROWS], staging)
        else:
            gl.store(Y + m[None, :].to(gl.int64) * N + n[:, None], y, mask=(n < N)[:, None] & (m < M)[None, :])
    if y_desc is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "K", "zero_stride"])
def decode_kernel(q_desc, w_desc, x_desc, v_desc, y_desc, Y, SX, SW, ZP, WSUM, B, ACTIVE, BORDERS, M, N, K, zero_stride,
                  TOKENS: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, SIDES: gl.constexpr, SEGMENTS: gl.constexpr,
                  BY_ROW: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """``y [M, N]`` from descriptors of ``q [M, K]`` (boxes of TOKENS x 128) and ``w [N, K]`` (64 x 128); with SIDES > 0 of
    ``x [M, 64 SIDES]`` (TOKENS x 64) and ``v [N, 64 SIDES]`` (64 x 64) in 16 bit, whose product is added."""
    q_ring = gl.allocate_shared_memory(gl.int8, [STAGES * (BK // PIECE), TOKENS, PIECE], q_desc.layout)
    w_ring = gl.allocate_shared_memory(gl.int8, [STAGES * (BK // PIECE), ROWS, PIECE], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    if y_desc is None:
        staging: gl.constexpr = None
    else:
        staging = gl.allocate_shared_memory(y_desc.dtype, [TOKENS, ROWS], y_desc.layout)
    KT = gl.cdiv(K, BK)
    gl.warp_specialize([
        (decode_consumer, (x_desc, v_desc, q_ring, w_ring, full, empty, staging, y_desc, Y, SX, SW, ZP, WSUM, B, ACTIVE,
                           BORDERS, M, N, KT, zero_stride, TOKENS, BK, STAGES, SIDES, SEGMENTS, BY_ROW, PDL)),
        (decode_producer, (q_desc, w_desc, x_desc, v_desc, q_ring, w_ring, full, empty, ACTIVE, M, N, KT, TOKENS, BK, STAGES,
                           SIDES, PDL)),
    ], [1], [40])  # fmt: skip


# ---- launching


@functools.cache
def box(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], TYPES[dtype])


TYPES = {torch.int8: gl.int8, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def described(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What TMA needs to know of a contiguous matrix that is moved in boxes of ``rows x columns``."""
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), [rows, columns], box(rows, columns, tensor.dtype))


def multiply(
    q: Tensor,
    sx: Tensor,
    weight: Tensor,
    sw: Tensor,
    dtype: torch.dtype,
    *,
    zero: Tensor | None = None,
    wsum: Tensor | None = None,
    bias: Tensor | None = None,
    side: Tensor | None = None,
    side_weight: Tensor | None = None,
    active: Tensor | None = None,
    borders: Tensor | None = None,
    config: Gemm | Decode,
) -> Tensor:
    """``[M, N]`` of a 16-bit ``dtype`` (any float with :class:`Decode`); arguments as those of the portable ``matmul``.

    Side columns are in 16 bit, and a multiple of ``configs.SIDE``; with ``active [1 + K]`` int32 only its first entry of them.
    Segments of K are none of them empty, and start at multiples of the config's ``block_k``.
    """
    (m, k), n = q.shape, len(weight)
    y = q.new_empty((m, n), dtype=dtype)
    segments, by_row = 1 if borders is None else len(borders) - 1, sw.dim() == 2
    zero_stride = segments if zero is not None and zero.numel() > segments else 0
    sides = 0 if side is None else side.shape[1] // configs.SIDE

    def described_sides(rows: int, weight_rows: int) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
        if side is None or side_weight is None:
            return None, None
        return described(side, rows, configs.SIDE), described(side_weight, weight_rows, configs.SIDE)

    options = {"num_warps": 4, "enable_fp_fusion": False, "launch_pdl": config.early}
    if isinstance(config, Gemm):
        tiles = triton.cdiv(m, 128) * triton.cdiv(n, config.columns)
        gemm_kernel[(min(processors(q.device), tiles),)](
            described(q, 64, config.block_k), described(weight, config.part, config.block_k),
            *described_sides(64, config.part), described(y, 64, config.width),
            sx, sw, zero, wsum, bias, active, borders, m, n, k, zero_stride,
            config.group, config.columns, config.block_k, config.stages, config.width,
            2 if bias is None and zero is None else 1, sides, segments, by_row, config.early, **options,
        )  # fmt: skip
    else:
        groups = triton.cdiv(m, config.tokens)
        staged = config.staged and n % 8 == 0 and dtype in TYPES
        decode_kernel[(groups, max(1, min(processors(q.device) // groups, triton.cdiv(n, 64))))](
            described(q, config.tokens, configs.BLOCK), described(weight, 64, configs.BLOCK),
            *described_sides(config.tokens, 64), described(y, config.tokens, 64) if staged else None,
            y, sx, sw, zero, wsum, bias, active, borders, m, n, k, zero_stride,
            config.tokens, config.block_k, config.stages, sides, segments, by_row, config.early,
            maxnreg=config.registers(segments), **options,
        )  # fmt: skip
    return y


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count

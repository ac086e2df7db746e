"""Device code, in Gluon, for many tokens on Hopper (sm_90): a warp-specialised persistent matrix product.

``y = q W^T`` in tiles of 128 tokens, 64 for each of two consumers, by BN columns, in accumulators of 2 WIDTH columns.
"""

from __future__ import annotations

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.ops.gpu.product.ring import (
    ROWS,
    SIDE,
    active_tiles,
    first_row,
    following,
    inverse,
    load,
    row_multiplier,
    side_of,
    store,
    token_multiplier,
)
from quantkit.ops.gpu.product.walk import tile_of


@gluon.jit
def gemm_producer(q_desc, w_desc, x_desc, v_desc, q_ring, w_ring, full, empty, ACTIVE, M, N, KT,
                  BAND: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
                  WIDTH: gl.constexpr, SIDES: gl.constexpr):  # fmt: skip
    PART: gl.constexpr = 2 * WIDTH
    PARTS: gl.constexpr = BN // PART
    tiles_m, tiles_n = gl.cdiv(M, 2 * ROWS), gl.cdiv(N, BN)
    stage, phase = 0, 1
    for t in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tm, tn = tile_of(t, tiles_m, tiles_n, BAND)
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
def rescaled(acc, column: gl.constexpr, sx, multiplier, zero, columns, last, ZERO: gl.constexpr, GROUPS: gl.constexpr,
             BY_ROW: gl.constexpr):  # fmt: skip
    """``acc [64, n]``, which starts at ``column`` of the tile, in float32."""
    acc = centred(acc, column, zero, columns, ZERO)
    if GROUPS > 1:
        acc = acc * multiplier[:, None]
    if BY_ROW:
        acc = acc * last.slice(column, acc.shape[1]).load(gl.SliceLayout(0, acc.type.layout)).to(gl.int32)[None, :]
    sw = columns.index(0).slice(column, acc.shape[1]).load(gl.SliceLayout(0, acc.type.layout))
    return acc.to(gl.float32) * sx[:, None] * sw[None, :]


@gluon.jit
def put(y, column: gl.constexpr, row, first, sx, multiplier, zero, columns, last, y_desc, staging, slot: gl.constexpr,
        WIDTH: gl.constexpr, SLOTS: gl.constexpr, ZERO: gl.constexpr, BIAS: gl.constexpr, SIDES: gl.constexpr,
        GROUPS: gl.constexpr, BY_ROW: gl.constexpr):  # fmt: skip
    """Finish ``y [64, WIDTH]``, which starts at ``column`` of the tile, and send it out through a staging tile."""
    if SIDES == 0:
        y = rescaled(y, column, sx, multiplier, zero, columns, last, ZERO, GROUPS, BY_ROW)
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
def gemm_consumer(c: gl.constexpr, x_desc, v_desc, q_ring, w_ring, full, empty, staging, columns, of_last, y_desc, SX, SW,
                  ZP, WSUM, B, ACTIVE, BORDERS, M, N, KT, zero_stride, BAND: gl.constexpr, BN: gl.constexpr,
                  BK: gl.constexpr, STAGES: gl.constexpr, WIDTH: gl.constexpr, SLOTS: gl.constexpr, ZERO: gl.constexpr,
                  BIAS: gl.constexpr, SIDES: gl.constexpr, GROUPS: gl.constexpr, BY_ROW: gl.constexpr):  # fmt: skip
    PART: gl.constexpr = 2 * WIDTH
    PARTS: gl.constexpr = BN // PART
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 32])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])  # of the 16-bit product
    last: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    flat: gl.constexpr = gl.BlockedLayout([max(BN // 128, 1)], [32], [4], [0])
    tiles_m, tiles_n = gl.cdiv(M, 2 * ROWS), gl.cdiv(N, BN)
    stage, phase = 0, 0
    for t in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tm, tn = tile_of(t, tiles_m, tiles_n, BAND)
        first, row = tn * BN, first_row(tm, M, 2 * ROWS) + c * ROWS
        m = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        n = first + gl.arange(0, BN, flat)
        sx, zero = gl.load(SX + m * (1 if GROUPS == 1 else 1 + GROUPS), mask=m < M, other=0.0), m
        multiplier, steps = m, KT
        sw = gl.load(SW + n, mask=n < N, other=0.0)
        if ZERO:
            sums = gl.load(WSUM + n, mask=n < N, other=0)
        if GROUPS > 1:
            # what a border needs is on its way a group before: nothing waits for memory, however short groups are
            multiplier, next_multiplier = token_multiplier(SX, m, 0, M, GROUPS), token_multiplier(SX, m, 1, M, GROUPS)
            end, next_end = gl.load(BORDERS + 1), gl.load(BORDERS + 2)
            steps = end // BK
        if BY_ROW:
            row_multipliers, next_row_multipliers = row_multiplier(SW, n, 0, N, GROUPS), row_multiplier(SW, n, 1, N, GROUPS)
            later_row_multipliers = row_multiplier(SW, n, 2, N, GROUPS)
        accs = gl.tuple(())
        for _part in gl.static_range(PARTS):
            accs += (gl.zeros([ROWS, PART], gl.int32, layout),)
        mbarrier.wait(full.index(stage), phase)
        accs = multiplied(accs, q_ring.index(stage * 2 + c), w_ring, stage, False, PARTS)
        if BIAS:
            columns.index(1).store(gl.load(B + n, mask=n < N, other=0.0).to(gl.float32))
        if BY_ROW:
            columns.index(0).store((row_multipliers * inverse(next_row_multipliers)).to(gl.float32, bitcast=True))
        else:
            columns.index(0).store(sw)
        if ZERO:
            columns.index(2).store(sums.to(gl.float32, bitcast=True))
        before = stage
        stage, phase = following(stage, phase, STAGES)
        if GROUPS > 1:
            for g in range(GROUPS - 1):
                if ZERO:
                    zero = gl.load(ZP + m * zero_stride + g, mask=m < M, other=0)
                for _ in range(1, steps):
                    mbarrier.wait(full.index(stage), phase)
                    accs = until(multiplied(accs, q_ring.index(stage * 2 + c), w_ring, stage, True, PARTS), PARTS, PARTS)
                    mbarrier.arrive(empty.index(before), count=1)
                    before = stage
                    stage, phase = following(stage, phase, STAGES)
                # one accumulator serves all: from here on it is in what the next group counts, modulo 2**32
                step = multiplier * inverse(next_multiplier)
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
                before, multiplier = stage, next_multiplier
                stage, phase = following(stage, phase, STAGES)
                steps = (next_end - end) // BK
                end, next_end = next_end, gl.load(BORDERS + gl.minimum(g + 3, GROUPS))
                next_multiplier = token_multiplier(SX, m, g + 2, M, GROUPS)
                if BY_ROW:
                    row_multipliers, next_row_multipliers = next_row_multipliers, later_row_multipliers
                    columns.index(0).store((row_multipliers * inverse(next_row_multipliers)).to(gl.float32, bitcast=True))
                    later_row_multipliers = row_multiplier(SW, n, g + 3, N, GROUPS)
                if ZERO:
                    sums = gl.load(WSUM + (g + 1) * N + n, mask=n < N, other=0)
                    columns.index(2).store(sums.to(gl.float32, bitcast=True))
            if BY_ROW:
                columns.index(0).store(sw)
                of_last.store(row_multipliers.to(gl.int8))
        for _ in range(1, steps):
            mbarrier.wait(full.index(stage), phase)
            accs = until(multiplied(accs, q_ring.index(stage * 2 + c), w_ring, stage, True, PARTS), PARTS, PARTS)
            mbarrier.arrive(empty.index(before), count=1)
            before = stage
            stage, phase = following(stage, phase, STAGES)
        if ZERO:
            zero = gl.load(ZP + m * zero_stride + GROUPS - 1, mask=m < M, other=0)
        if SIDES > 0:
            # The INT32 registers become float32 ones, and take the 16-bit product on top.
            accs = until(accs, 0, PARTS)
            mbarrier.arrive(empty.index(before), count=1)
            floats = gl.tuple(())
            for p in gl.static_range(PARTS):
                acc = warpgroup_mma_wait(0, deps=[accs[p]])
                acc = rescaled(acc, p * PART, sx, multiplier, zero, columns, of_last, ZERO, GROUPS, BY_ROW)
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
        end_multiplier = gl.convert_layout(multiplier, gl.SliceLayout(1, last))
        for p in gl.static_range(PARTS):
            if SIDES > 0:
                acc = gl.convert_layout(warpgroup_mma_wait(0, deps=[floats[p]]), layout)
            else:
                acc = warpgroup_mma_wait(PARTS - 1 - p, deps=[accs[p]])
                if p == PARTS - 1:
                    mbarrier.arrive(empty.index(before), count=1)
            left, right = halves(acc, PART, last)
            for half in gl.static_range(2):
                put(left if half == 0 else right, p * PART + half * WIDTH, row, first, end_sx, end_multiplier, end_zero,
                    columns, of_last, y_desc, staging, 2 * p + half, WIDTH, SLOTS, ZERO, BIAS, SIDES, GROUPS,
                    BY_ROW)  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "K", "zero_stride"])
def gemm_kernel(q_desc, w_desc, x_desc, v_desc, y_desc, SX, SW, ZP, WSUM, B, ACTIVE, BORDERS, M, N, K, zero_stride,
                BAND: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, WIDTH: gl.constexpr,
                SLOTS: gl.constexpr, SIDES: gl.constexpr, GROUPS: gl.constexpr, BY_ROW: gl.constexpr,
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
                         B, ACTIVE, BORDERS, M, N, KT, zero_stride, BAND, BN, BK, STAGES, WIDTH, SLOTS, ZERO, BIAS, SIDES,
                         GROUPS, BY_ROW)),
        (gemm_consumer, (1, x_desc, v_desc, q_ring, w_ring, full, empty, staging1, columns1, last1, y_desc, SX, SW, ZP, WSUM,
                         B, ACTIVE, BORDERS, M, N, KT, zero_stride, BAND, BN, BK, STAGES, WIDTH, SLOTS, ZERO, BIAS, SIDES,
                         GROUPS, BY_ROW)),
        (gemm_producer, (q_desc, w_desc, x_desc, v_desc, q_ring, w_ring, full, empty, ACTIVE, M, N, KT, BAND, BN, BK, STAGES,
                         WIDTH, SIDES)),
    ], [4, 1], [232, 24])  # fmt: skip

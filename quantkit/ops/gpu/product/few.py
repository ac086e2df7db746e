"""Device code, in Gluon, for few tokens on Hopper (sm_90): the mirror image of :mod:`.many`.

``y^T = W q^T`` in tiles of 64 rows of the weight by TOKENS tokens, so that no matrix instruction is wasted on empty rows.
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
    PIECE,
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
def scales_of(SW, tile, N, layout: gl.constexpr, GROUPS: gl.constexpr, BY_ROW: gl.constexpr):
    """Scales of the weight rows of a tile, and how often each group counts there."""
    n = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    row_multipliers = gl.tuple(())
    if BY_ROW:
        for g in gl.static_range(GROUPS):
            row_multipliers += (row_multiplier(SW, n, g, N, GROUPS),)
    return gl.load(SW + n, mask=n < N, other=0.0), row_multipliers


@gluon.jit
def end_of(g: gl.constexpr, BORDERS, KT, PIECES: gl.constexpr, GROUPS: gl.constexpr):
    """The piece of K behind a group."""
    end = KT * PIECES
    if g < GROUPS - 1:
        end = gl.load(BORDERS + g + 1) // PIECE
    return end


@gluon.jit
def product_of(acc, w_ring, q_ring, piece):
    """Start to multiply a piece of a slot."""
    return warpgroup_mma(w_ring.index(piece), q_ring.index(piece).permute((1, 0)), acc, is_async=True)


@gluon.jit
def decode_consumer(x_desc, v_desc, q_ring, w_ring, full, empty, staging, y_desc, Y, SX, SW, ZP, WSUM, B, ACTIVE,
                    BORDERS, M, N, KT, zero_stride, TOKENS: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
                    SIDES: gl.constexpr, GROUPS: gl.constexpr, BY_ROW: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    PIECES: gl.constexpr = BK // PIECE
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])  # of the 16-bit product
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 32])
    token = first_row(gl.program_id(0), M, TOKENS)
    m = token + gl.arange(0, TOKENS, gl.SliceLayout(0, layout))
    stage, phase = 0, 0
    # What the ends of groups need is on its way before the tokens are there, all of it if there are registers.
    AHEAD: gl.constexpr = GROUPS * TOKENS <= 128
    sw, row_multipliers = scales_of(SW, gl.program_id(1), N, layout, GROUPS, BY_ROW)
    ends, multipliers = gl.tuple(()), gl.tuple(())
    if AHEAD:
        for g in gl.static_range(GROUPS - 1):
            ends += (end_of(g, BORDERS, KT, PIECES, GROUPS),)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    sx = gl.load(SX + m * (1 if GROUPS == 1 else 1 + GROUPS), mask=m < M, other=0.0)
    if GROUPS > 1:
        for g in gl.static_range(GROUPS if AHEAD else 1):
            multipliers += (token_multiplier(SX, m, g, M, GROUPS),)
    for t in range(gl.program_id(1), gl.cdiv(N, ROWS), gl.num_programs(1)):
        n = t * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        acc = warpgroup_mma_init(gl.zeros([ROWS, TOKENS], gl.int32, layout))
        before, start = 0, 0
        if GROUPS > 1:
            multiplier = multipliers[0]
        for g in gl.static_range(GROUPS):
            if AHEAD and g < GROUPS - 1:
                upto, next_multiplier = ends[g], multipliers[g + 1]
            else:
                upto = end_of(g, BORDERS, KT, PIECES, GROUPS)
                if g < GROUPS - 1:
                    next_multiplier = token_multiplier(SX, m, g + 1, M, GROUPS)
            if ZP is not None:
                zero = gl.load(ZP + m * zero_stride + g, mask=m < M, other=0)
                sums = gl.load(WSUM + g * N + n, mask=n < N, other=0)
            if GROUPS > 1 and PIECES > 1:  # the rest of a slot in which the group before ended
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
            if g < GROUPS - 1 and PIECES > 1:  # the beginning of a slot in which the next one goes on
                for _ in range(upto % PIECES):
                    mbarrier.wait(full.index(stage), phase)
                    acc = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[product_of(acc, w_ring, q_ring, stage * PIECES)]))
            total = warpgroup_mma_wait(0, deps=[acc])
            if ZP is not None:
                total = total - sums[:, None] * zero[None, :]
            if g < GROUPS - 1:
                total = total * (multiplier * inverse(next_multiplier))[None, :]
                if BY_ROW:
                    total = total * (row_multipliers[g] * inverse(row_multipliers[g + 1]))[:, None]
                acc = warpgroup_mma_init(total)
                start, multiplier = upto, next_multiplier
        if GROUPS > 1:
            total = total * multiplier[None, :]
        if BY_ROW:
            total = total * row_multipliers[GROUPS - 1][:, None]
        y = (total.to(gl.float32) * sx[None, :]) * sw[:, None]
        sw, row_multipliers = scales_of(SW, t + gl.num_programs(1), N, layout, GROUPS, BY_ROW)  # of the next tile
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
                  TOKENS: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, SIDES: gl.constexpr, GROUPS: gl.constexpr,
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
                           BORDERS, M, N, KT, zero_stride, TOKENS, BK, STAGES, SIDES, GROUPS, BY_ROW, PDL)),
        (decode_producer, (q_desc, w_desc, x_desc, v_desc, q_ring, w_ring, full, empty, ACTIVE, M, N, KT, TOKENS, BK, STAGES,
                           SIDES, PDL)),
    ], [1], [40])  # fmt: skip

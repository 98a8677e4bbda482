"""Gradients of offset and mask: four dot products per sample.

Receives grad_output and the weight, or column gradients, with the pixels of the input and the sample arrays. Hands on
grad_offset and grad_mask.

With g the gradient of a sample's column (all its channels) and x_j the four corner pixels, only the dot products
d_j = <g, x_j>, zero for corners outside the image, run over the channels. The rest are scalars of the sample:

    grad_mask = sum_j d_j * bilinear_j        grad_y = scale * ((1 - lx) * (d10 - d00) + lx * (d11 - d01))
                                              grad_x = scale * ((1 - ly) * (d01 - d00) + ly * (d11 - d10))

Letters, names and sample arrays: see `sampling`.
"""

import triton
import triton.language as tl

from triton_dcn.kernels.arithmetic import contract, round_to
from triton_dcn.kernels.jit import kernel
from triton_dcn.kernels.register_order import corner_pointers, from_result, product_row
from triton_dcn.kernels.sampling import (
    blend,
    column_offset,
    corner_rows,
    corner_weights,
    load_corners,
    swizzle,
    swizzle_chunk,
    widen,
)


@triton.jit
def runs(x, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return a tile (BLOCK_P, BLOCK_C) as runs of eight channels, (BLOCK_P, BLOCK_C // 8, 8), in float32.

    A run is what one thread loads at once; a block of fewer channels is one run. Column gradients come from a product
    in another register layout, and are converted to the layout of the runs here, once and in their narrow dtype. If
    they were multiplied first, the compiler would convert all four corner tiles to the layout of the product, and four
    tiles of float32 back.
    """
    RUNS: tl.constexpr = (BLOCK_C + 7) // 8
    return tl.reshape(widen(x), (BLOCK_P, RUNS, BLOCK_C // RUNS))


@triton.jit
def partial_dot(grad, x, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return grad * x summed over each run, (BLOCK_P, BLOCK_C // 8).

    Sums across runs follow after the channel loop, so that its threads exchange no values.

    Args:
        grad: from `runs`.
        x: (BLOCK_P, BLOCK_C), or words of two, see `widen`.
    """
    return tl.sum(grad * runs(x, BLOCK_P, BLOCK_C), 2)


@triton.jit
def store_gradients(
    d00,
    d01,
    d10,
    d11,
    cell,
    ly,
    lx,
    scale,
    grad_offset_ptr,
    grad_mask_ptr,
    stride_ob,
    stride_mb,
    position,
    positions_per_image,
    plane,
    live,
    WANT_OFFSET: tl.constexpr,
    WANT_MASK: tl.constexpr,
    MASK_LOGITS: tl.constexpr,
):
    """Combine the four dot products of each sample and store its gradients at its output position.

    d00 to scale, `position`, `plane` and `live` have one shape, or shapes that broadcast to it. A corner exists where
    the flags of its row and column are set.
    """
    d00 = tl.where((cell & 10) == 10, d00, 0.0)
    d01 = tl.where((cell & 9) == 9, d01, 0.0)
    d10 = tl.where((cell & 6) == 6, d10, 0.0)
    d11 = tl.where((cell & 5) == 5, d11, 0.0)

    b = (position // positions_per_image).to(tl.int64)
    position_in_image = position % positions_per_image
    if WANT_OFFSET:
        grad_ptr = grad_offset_ptr + b * stride_ob + (2 * plane).to(tl.int64) * positions_per_image + position_in_image
        grad_y = scale * ((1 - lx) * (d10 - d00) + lx * (d11 - d01))
        grad_x = scale * ((1 - ly) * (d01 - d00) + ly * (d11 - d10))
        tl.store(grad_ptr, round_to(grad_y, grad_offset_ptr.dtype.element_ty), mask=live)
        tl.store(grad_ptr + positions_per_image, round_to(grad_x, grad_offset_ptr.dtype.element_ty), mask=live)
    if WANT_MASK:
        grad = (1 - ly) * ((1 - lx) * d00 + lx * d01) + ly * ((1 - lx) * d10 + lx * d11)
        if MASK_LOGITS:
            grad = grad * scale * (1 - scale)
        grad_ptr = grad_mask_ptr + b * stride_mb + plane.to(tl.int64) * positions_per_image + position_in_image
        tl.store(grad_ptr, round_to(grad, grad_mask_ptr.dtype.element_ty), mask=live)


@triton.jit
def column_block(tile, index: tl.constexpr, BLOCKS: tl.constexpr):
    """Return one of the BLOCKS, one or two, equal blocks of columns of a tile."""
    if BLOCKS == 2:
        halves = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
        first, second = tl.split(tl.permute(halves, (0, 2, 1)))
        tile = first if index == 0 else second
    return tile


@triton.jit
def sum_by_group(d, LANES: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr):
    """Return (BLOCK_P * LANES // SLOTS,), for each thread the sum over all threads of its offset group in its row.

    Of each SLOTS rows that a thread has, one is its own: the threads of a row and offset group take turns.
    """
    d = tl.reshape(d, (d.shape[0] * GROUPS // LANES, LANES // GROUPS))
    total = tl.broadcast_to(tl.sum(d, 1)[:, None], d.shape)
    total = tl.reshape(total, (SLOTS, d.shape[0] * d.shape[1] // SLOTS))
    own_slot = tl.arange(0, total.shape[1])[None, :] % SLOTS
    return tl.sum(tl.where(tl.arange(0, SLOTS)[:, None] == own_slot, total, 0.0), 0)


@triton.jit
def dot_by_thread(grad, x):
    """Return grad * x summed over the channels that one thread loads at once, (BLOCK_P * LANES,).

    Sums across threads follow after the channel loop, so that they exchange no values.

    Args:
        grad: (BLOCK_P * LANES, RUN).
        x: (BLOCK_P, LANES * RUN), or words of two, see `widen`.
    """
    return tl.sum(grad * tl.reshape(widen(x), grad.shape), 1)


@kernel
def grad_sample_fused_kernel(
    grad_output_ptr,
    input_ptr,
    cell_ptr,
    ly_ptr,
    lx_ptr,
    scale_ptr,
    weight_ptr,
    grad_offset_ptr,
    grad_mask_ptr,
    positions,
    out_height,
    out_width,
    width,
    taps_per_program,
    stride_ob,
    stride_mb,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    OFFSET_GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    WANT_OFFSET: tl.constexpr,
    WANT_MASK: tl.constexpr,
    MASK_LOGITS: tl.constexpr,
    STRIP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WARPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Compute the column gradients tile by tile from grad_output and weight, and reduce them at once.

    The channels of a product's result are in the threads that load the same channels of the corners (`register_order`),
    so that column gradients never move; where eight threads share a row, half of them do. grad_output is read once for
    all taps of a program. The dot products are float32: their differences, which give the gradients, would lose too
    much in half precision.

    Where an offset group has whole blocks of channels, a program owns one offset group. Where it has fewer channels, a
    program owns one block of channels, which spans several offset groups, one or more of its quarters each.

    Grid: (ceil(M / BLOCK_P) * min(D, C / BLOCK_C) * ceil(K / taps_per_program),); a program owns BLOCK_P positions.
    Reads: grad_output (M, O), input (B, H, W, C) or int32 (B, H, W, C/2), the sample arrays; weight (O, K, C), where
        WARPS is not 0 that of `result_weight`, for TF32 rounded.
    Writes: grad_offset (B, 2*D*K, Ho, Wo) and grad_mask (B, D*K, Ho, Wo), in full; contiguous except for the batch.
    Assumes: one channel group, O <= BLOCK_O. LANES threads, 4 or 8, share a row. BLOCK_C is what they load at once or
        twice that and divides C/D, or it is what they load at once and divides C, and C/D is all, a half or a quarter
        of it. WARPS: those of a program, BLOCK_P is a multiple of 16 * WARPS; 0 where the registers of a result have
        another order, and the compiler moves it, rounded as the weight is.
    """
    PACK: tl.constexpr = 2 if input_ptr.dtype.element_ty == tl.int32 else 1
    PER_OFFSET: tl.constexpr = CHANNELS // OFFSET_GROUPS
    LOAD: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    RUN: tl.constexpr = LOAD if BLOCK_C >= LANES * LOAD else BLOCK_C // LANES
    BLOCKS: tl.constexpr = BLOCK_C // (LANES * RUN)
    GROUPS: tl.constexpr = 1 if PER_OFFSET % BLOCK_C == 0 else BLOCK_C // PER_OFFSET  # offset groups of a program
    SPAN: tl.constexpr = GROUPS * PER_OFFSET
    THREAD_ROWS: tl.constexpr = BLOCK_P * LANES // (32 * WARPS) if WARPS > 0 else 1
    SLOTS: tl.constexpr = THREAD_ROWS if THREAD_ROWS * GROUPS < LANES else LANES // GROUPS
    tap_blocks = tl.cdiv(TAPS, taps_per_program)
    first_tap = tl.program_id(0) % tap_blocks * taps_per_program
    first_c = tl.program_id(0) // tap_blocks % (CHANNELS // SPAN) * SPAN
    first_index = tl.program_id(0) // (tap_blocks * (CHANNELS // SPAN)) * BLOCK_P

    o = tl.arange(0, BLOCK_O)
    live_o = o < OUT_CHANNELS
    weight_block_ptr = weight_ptr + o[:, None] * (TAPS * CHANNELS) + tl.arange(0, BLOCK_C)[None, :]
    index = first_index + tl.arange(0, BLOCK_P)
    position = swizzle(tl.where(index < positions, index, 0), out_height, out_width, STRIP)
    grad_out_ptr = grad_output_ptr + position.to(tl.int64)[:, None] * OUT_CHANNELS + o[None, :]
    grad_out = tl.load(grad_out_ptr, mask=live_o[None, :], other=0.0)  # (BLOCK_P, BLOCK_O)

    # from here on in the order of the gathered rows, each of them in LANES threads
    slot = tl.arange(0, BLOCK_P * LANES)
    lane = slot % LANES
    word = tl.arange(0, LANES * RUN // PACK)[None, :]
    row = slot // LANES
    if WARPS > 0:
        row = product_row(row, WARPS, LANES)
    index = first_index + row
    position = swizzle(tl.where(index < positions, index, 0), out_height, out_width, STRIP)

    # of SLOTS rows in its registers, a thread stores the gradients of one
    thread = tl.arange(0, BLOCK_P * LANES // SLOTS)
    own_row = (thread % SLOTS * (BLOCK_P * LANES // SLOTS) + thread) // LANES
    if WARPS > 0:
        own_row = product_row(own_row, WARPS, LANES)
    own_index = first_index + own_row
    own_position = swizzle(tl.where(own_index < positions, own_index, 0), out_height, out_width, STRIP)
    live = (own_index < positions) & (thread % (LANES // GROUPS) < SLOTS)

    for tap in tl.range(first_tap, tl.minimum(first_tap + taps_per_program, TAPS), num_stages=1):
        plane = (first_c // PER_OFFSET + lane * GROUPS // LANES) * TAPS + tap
        sample = plane * positions + position  # (BLOCK_P * LANES,)
        cell = tl.load(cell_ptr + sample)
        row00, row01, row10, row11 = corner_rows(cell, width, CHANNELS // PACK)
        ptr00 = corner_pointers(input_ptr, row00, word, LANES, RUN // PACK)
        ptr01 = corner_pointers(input_ptr, row01, word, LANES, RUN // PACK)
        ptr10 = corner_pointers(input_ptr, row10, word, LANES, RUN // PACK)
        ptr11 = corner_pointers(input_ptr, row11, word, LANES, RUN // PACK)
        d00 = tl.zeros((BLOCK_P * LANES,), tl.float32)
        d01 = tl.zeros((BLOCK_P * LANES,), tl.float32)
        d10 = tl.zeros((BLOCK_P * LANES,), tl.float32)
        d11 = tl.zeros((BLOCK_P * LANES,), tl.float32)
        for start in tl.range(0, SPAN, BLOCK_C, num_stages=1):
            weight_start = tap * CHANNELS + first_c + start
            weight = tl.load(weight_block_ptr + weight_start, mask=live_o[:, None], other=0.0)  # (BLOCK_O, BLOCK_C)
            grad = contract(grad_out, weight, tl.zeros((BLOCK_P, BLOCK_C), tl.float32), PRECISION, WARPS > 0)
            for block in tl.static_range(BLOCKS):
                block_start = (first_c + start + block * LANES * RUN) // PACK
                x00 = tl.load(ptr00 + block_start)
                x01 = tl.load(ptr01 + block_start)
                x10 = tl.load(ptr10 + block_start)
                x11 = tl.load(ptr11 + block_start)
                part = column_block(grad, block, BLOCKS)
                if WARPS == 0:
                    part = round_to(part, weight_ptr.dtype.element_ty).to(tl.float32)
                else:
                    part = from_result(part, WARPS, LANES)
                part = tl.reshape(part, (BLOCK_P * LANES, RUN))
                d00 += dot_by_thread(part, x00)
                d01 += dot_by_thread(part, x01)
                d10 += dot_by_thread(part, x10)
                d11 += dot_by_thread(part, x11)
        own_plane = (first_c // PER_OFFSET + thread % LANES * GROUPS // LANES) * TAPS + tap
        own_sample = own_plane * positions + own_position
        store_gradients(
            sum_by_group(d00, LANES, GROUPS, SLOTS),
            sum_by_group(d01, LANES, GROUPS, SLOTS),
            sum_by_group(d10, LANES, GROUPS, SLOTS),
            sum_by_group(d11, LANES, GROUPS, SLOTS),
            tl.load(cell_ptr + own_sample),
            tl.load(ly_ptr + own_sample),
            tl.load(lx_ptr + own_sample),
            tl.load(scale_ptr + own_sample),
            grad_offset_ptr,
            grad_mask_ptr,
            stride_ob,
            stride_mb,
            own_position,
            out_height * out_width,
            own_plane,
            live,
            WANT_OFFSET,
            WANT_MASK,
            MASK_LOGITS,
        )


@kernel
def grad_sample_kernel(
    grad_column_ptr,
    input_ptr,
    cell_ptr,
    ly_ptr,
    lx_ptr,
    scale_ptr,
    grad_offset_ptr,
    grad_mask_ptr,
    positions,
    first_position,
    rows,
    out_width,
    positions_per_image,
    width,
    taps_per_program,
    stride_ob,
    stride_mb,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    OFFSET_GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    WANT_OFFSET: tl.constexpr,
    WANT_MASK: tl.constexpr,
    MASK_LOGITS: tl.constexpr,
    WRITE_COLUMNS: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Reduce the column gradients of the positions [first_position, first_position + rows), from a library product.

    Offset groups and taps are walked through as in `columns_kernel`, and for the same reasons. The corners that it
    loads are all that columns are made of: with WRITE_COLUMNS it leaves the columns in place of the column gradients.

    Grid: (ceil(rows*D / BLOCK_P) * ceil(K / taps_per_program),); a program owns BLOCK_P (position, offset group) pairs.
    Reads: grad_column (G, rows, K, C/G), input (B, H, W, C) or int32 (B, H, W, C/2), the sample arrays.
    Writes: as `grad_sample_fused_kernel`, for these positions; WRITE_COLUMNS: grad_column, in full.
    Assumes: nothing, it works for any sizes.
    """
    PACK: tl.constexpr = 2 if input_ptr.dtype.element_ty == tl.int32 else 1
    PER_OFFSET: tl.constexpr = CHANNELS // OFFSET_GROUPS
    MASKED: tl.constexpr = PER_OFFSET % BLOCK_C != 0
    RUNS: tl.constexpr = (BLOCK_C + 7) // 8
    tap_blocks = tl.cdiv(TAPS, taps_per_program)
    first_tap = tl.program_id(0) % tap_blocks * taps_per_program
    index = tl.program_id(0) // tap_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    live = index < rows * OFFSET_GROUPS
    index = tl.where(live, index, 0)
    group = index % OFFSET_GROUPS
    row = swizzle_chunk(index // OFFSET_GROUPS, rows, out_width, STRIP)
    base_ptr = input_ptr + group[:, None] * (PER_OFFSET // PACK)
    for tap in tl.range(first_tap, tl.minimum(first_tap + taps_per_program, TAPS), num_stages=1):
        sample = (group * TAPS + tap) * positions + first_position + row
        cell = tl.load(cell_ptr + sample)
        ly = tl.load(ly_ptr + sample)
        lx = tl.load(lx_ptr + sample)
        scale = tl.load(scale_ptr + sample)
        row00, row01, row10, row11 = corner_rows(cell[:, None], width, CHANNELS // PACK)
        if WRITE_COLUMNS:
            w00, w01, w10, w11 = corner_weights(cell[:, None], ly[:, None], lx[:, None], scale[:, None])
        d00 = tl.zeros((BLOCK_P, RUNS), tl.float32)
        d01 = tl.zeros((BLOCK_P, RUNS), tl.float32)
        d10 = tl.zeros((BLOCK_P, RUNS), tl.float32)
        d11 = tl.zeros((BLOCK_P, RUNS), tl.float32)
        for start in tl.range(0, PER_OFFSET, BLOCK_C, num_stages=1):
            c_in_group = start + tl.arange(0, BLOCK_C)[None, :]
            live_c = c_in_group < PER_OFFSET
            c = group[:, None] * PER_OFFSET + c_in_group
            grad_ptr = grad_column_ptr + column_offset(row[:, None], tap, c, rows, CHANNELS, GROUPS, TAPS)
            grad = tl.load(grad_ptr, mask=live_c, other=0.0) if MASKED else tl.load(grad_ptr)  # (BLOCK_P, BLOCK_C)
            grad = runs(grad, BLOCK_P, BLOCK_C)
            word = start // PACK + tl.arange(0, BLOCK_C // PACK)[None, :]
            live_word = word < PER_OFFSET // PACK
            x00, x01, x10, x11 = load_corners(base_ptr, row00, row01, row10, row11, word, live_word, MASKED)
            d00 += partial_dot(grad, x00, BLOCK_P, BLOCK_C)
            d01 += partial_dot(grad, x01, BLOCK_P, BLOCK_C)
            d10 += partial_dot(grad, x10, BLOCK_P, BLOCK_C)
            d11 += partial_dot(grad, x11, BLOCK_P, BLOCK_C)
            if WRITE_COLUMNS:
                value = blend(w00, w01, w10, w11, x00, x01, x10, x11)
                tl.debug_barrier()  # every thread has its column gradients before another one overwrites them
                store_mask = live[:, None] & live_c
                tl.store(grad_ptr, round_to(value, grad_column_ptr.dtype.element_ty), mask=store_mask)
        store_gradients(
            tl.sum(d00, 1),
            tl.sum(d01, 1),
            tl.sum(d10, 1),
            tl.sum(d11, 1),
            cell,
            ly,
            lx,
            scale,
            grad_offset_ptr,
            grad_mask_ptr,
            stride_ob,
            stride_mb,
            first_position + row,
            positions_per_image,
            group * TAPS + tap,
            live,
            WANT_OFFSET,
            WANT_MASK,
            MASK_LOGITS,
        )

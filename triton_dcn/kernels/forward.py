"""Sample and multiply in one pass: output = sum over planes of sample(plane) @ weight(plane), no columns in memory.

Receives the pixels of the input, the sample arrays, weight and bias. Hands on the output (M, O).

There are two forms of the same product, and the tile table chooses one. `direct` gathers channels in the order in which
the tensor cores of NVIDIA take them from registers, so that a blended tile never moves; a block of channels may span
several offset groups. `prefetch` loads the corner pixels of the next step before it blends and multiplies those of this
step, so that loads and computation overlap. Both leave `num_stages` at 1: a pipelined load would bypass the L1 cache,
from which neighboring samples get the pixels that they share.

Letters, names and sample arrays: see `sampling`. One channel group (G = 1); C/D and O are multiples of the blocks.
"""

import triton
import triton.language as tl

from triton_dcn.kernels.arithmetic import contract, round_to, round_to_tf32
from triton_dcn.kernels.jit import kernel
from triton_dcn.kernels.register_order import QUARTERS, blend_pairs, product_row, to_operand
from triton_dcn.kernels.sampling import blend, corner_rows, corner_weights, load_corners, swizzle


@triton.jit
def epilogue(
    acc,
    bias_ptr,
    output_ptr,
    position,
    o,
    live,
    OUT_CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
):
    """Add the bias, apply the ReLU and store a (BLOCK_P, BLOCK_O) tile of the output (M, O)."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # NaN stays, as in torch
    store_at = position.to(tl.int64)[:, None] * OUT_CHANNELS + o[None, :]
    tl.store(output_ptr + store_at, round_to(acc, output_ptr.dtype.element_ty), mask=live[:, None])


@kernel
def forward_prefetch_kernel(
    input_ptr,
    cell_ptr,
    ly_ptr,
    lx_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    positions,
    out_height,
    out_width,
    width,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    OFFSET_GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    STRIP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute an output tile; corners are loaded one channel block ahead of the product, also across planes.

    Grid: (ceil(M / BLOCK_P) * O / BLOCK_O,); a program owns a (BLOCK_P, BLOCK_O) tile.
    Reads: input (B, H, W, C), weight (O, K, C), bias (O,), the sample arrays.
    Writes: output (M, O), in full.
    Assumes: BLOCK_C divides C/D, BLOCK_O divides O.
    """
    PER_OFFSET: tl.constexpr = CHANNELS // OFFSET_GROUPS
    BLOCKS_O: tl.constexpr = OUT_CHANNELS // BLOCK_O
    PLANES: tl.constexpr = OFFSET_GROUPS * TAPS
    index = tl.program_id(0) // BLOCKS_O * BLOCK_P + tl.arange(0, BLOCK_P)
    live = index < positions
    position = swizzle(tl.where(live, index, 0), out_height, out_width, STRIP)
    o = tl.program_id(0) % BLOCKS_O * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.arange(0, BLOCK_C)
    weight_rows = o[None, :] * (TAPS * CHANNELS) + c[:, None]

    cell = tl.load(cell_ptr + position)[:, None]
    row00, row01, row10, row11 = corner_rows(cell, width, CHANNELS)
    x00, x01, x10, x11 = load_corners(input_ptr, row00, row01, row10, row11, c[None, :], True, False)
    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for plane in tl.range(0, PLANES, num_stages=1):
        sample = plane * positions + position
        ly = tl.load(ly_ptr + sample)[:, None]
        lx = tl.load(lx_ptr + sample)[:, None]
        w00, w01, w10, w11 = corner_weights(cell, ly, lx, tl.load(scale_ptr + sample)[:, None])
        first_c = plane // TAPS * PER_OFFSET
        weight_tap_ptr = weight_ptr + (plane % TAPS * CHANNELS + first_c) + weight_rows
        next_plane = tl.minimum(plane + 1, PLANES - 1)
        cell = tl.load(cell_ptr + next_plane * positions + position)[:, None]
        for start in tl.static_range(0, PER_OFFSET, BLOCK_C):
            value = round_to(blend(w00, w01, w10, w11, x00, x01, x10, x11), weight_ptr.dtype.element_ty)
            if start + BLOCK_C < PER_OFFSET:
                next_ptr = input_ptr + (first_c + start + BLOCK_C)
            else:
                next_ptr = input_ptr + next_plane // TAPS * PER_OFFSET
                row00, row01, row10, row11 = corner_rows(cell, width, CHANNELS)
            x00, x01, x10, x11 = load_corners(next_ptr, row00, row01, row10, row11, c[None, :], True, False)
            weight = tl.load(weight_tap_ptr + start)  # (BLOCK_C, BLOCK_O)
            acc = contract(value, weight, acc, PRECISION)
    epilogue(acc, bias_ptr, output_ptr, position, o, live, OUT_CHANNELS, HAS_BIAS, RELU)


@triton.jit
def spread(values, RUN: tl.constexpr):
    """Repeat values of the quarters of a gathered tile, (BLOCK_P * QUARTERS,), for the RUN channels of each."""
    BLOCK_P: tl.constexpr = values.shape[0] // QUARTERS
    tile = tl.broadcast_to(tl.reshape(values, (BLOCK_P, QUARTERS, 1)), (BLOCK_P, QUARTERS, RUN))
    return tl.reshape(tile, (BLOCK_P, QUARTERS * RUN))


@triton.jit
def corner_pointers(input_ptr, row, c, RUN: tl.constexpr):
    """Return pointers (BLOCK_P, BLOCK_C) to channels `c` (1, BLOCK_C), from the rows of `corner_rows` by quarter.

    The compiler has to be told that a quarter loads RUN neighboring channels, and that their place is a multiple of
    RUN, because each pixel has a multiple of RUN channels.
    """
    at = spread(row, RUN) + c
    return input_ptr + tl.max_contiguous(tl.multiple_of(at, (1, RUN)), (1, RUN))


@kernel
def forward_direct_kernel(
    input_ptr,
    cell_ptr,
    ly_ptr,
    lx_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    positions,
    out_height,
    out_width,
    width,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    OFFSET_GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    STRIP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WARPS: tl.constexpr,
    BLEND_IN_PAIRS: tl.constexpr,
):
    """Compute an output tile; the blended tile is the left operand of the product, straight from registers.

    Where an offset group has whole blocks of channels, its samples are read once for a tap. Where it has fewer
    channels, a block spans several offset groups: samples are read for each block, for each quarter of it those of its
    offset group.

    Grid: (ceil(M / BLOCK_P) * O / BLOCK_O,); a program owns a (BLOCK_P, BLOCK_O) tile.
    Reads: input (B, H, W, C), bias (O,), the sample arrays; weight (O, K, C) from `permute_weight` with blocks of
        BLOCK_C channels, for TF32 rounded.
    Writes: output (M, O), in full.
    Assumes: BLOCK_O divides O, BLOCK_C divides C/D, or BLOCK_C divides C and its quarter divides C/D; BLOCK_P is a
        multiple of 16 * WARPS, the warps of a program. BLEND_IN_PAIRS: input is of half precision.
    """
    PER_OFFSET: tl.constexpr = CHANNELS // OFFSET_GROUPS
    BLOCKS_O: tl.constexpr = OUT_CHANNELS // BLOCK_O
    RUN: tl.constexpr = BLOCK_C // QUARTERS
    BLOCKS_IN_GROUP: tl.constexpr = PER_OFFSET % BLOCK_C == 0
    first_index = tl.program_id(0) // BLOCKS_O * BLOCK_P
    slot = tl.arange(0, BLOCK_P * QUARTERS)  # a quarter of a gathered row: what one thread loads at once
    index = first_index + product_row(slot // QUARTERS, BLOCK_P, WARPS)
    position = swizzle(tl.where(index < positions, index, 0), out_height, out_width, STRIP)
    slot_c = slot % QUARTERS * RUN
    c = tl.arange(0, BLOCK_C)[None, :]
    o = tl.program_id(0) % BLOCKS_O * BLOCK_O + tl.arange(0, BLOCK_O)
    weight_rows = o[None, :] * (TAPS * CHANNELS) + tl.arange(0, BLOCK_C)[:, None]

    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for tap in tl.range(0, TAPS, num_stages=1):
        weight_tap_ptr = weight_ptr + tap * CHANNELS + weight_rows
        for start in tl.static_range(0, CHANNELS, BLOCK_C):
            if start % PER_OFFSET == 0 or not BLOCKS_IN_GROUP:
                group = start // PER_OFFSET if BLOCKS_IN_GROUP else (start + slot_c) // PER_OFFSET
                sample = (group * TAPS + tap) * positions + position
                cell = tl.load(cell_ptr + sample)
                ly = tl.load(ly_ptr + sample)
                lx = tl.load(lx_ptr + sample)
                w00, w01, w10, w11 = corner_weights(cell, ly, lx, tl.load(scale_ptr + sample))
                w00, w01, w10, w11 = spread(w00, RUN), spread(w01, RUN), spread(w10, RUN), spread(w11, RUN)
                row00, row01, row10, row11 = corner_rows(cell, width, CHANNELS)
                ptr00 = corner_pointers(input_ptr, row00, c, RUN)
                ptr01 = corner_pointers(input_ptr, row01, c, RUN)
                ptr10 = corner_pointers(input_ptr, row10, c, RUN)
                ptr11 = corner_pointers(input_ptr, row11, c, RUN)
            x00 = tl.load(ptr00 + start)
            x01 = tl.load(ptr01 + start)
            x10 = tl.load(ptr10 + start)
            x11 = tl.load(ptr11 + start)
            if BLEND_IN_PAIRS:
                value = blend_pairs(w00, w01, w10, w11, x00, x01, x10, x11)
            else:
                value = round_to(blend(w00, w01, w10, w11, x00, x01, x10, x11), weight_ptr.dtype.element_ty)
            if PRECISION == "tf32":
                value = round_to_tf32(value, PRECISION)  # here, no other warp reads it
            value = to_operand(value, WARPS)
            weight = tl.load(weight_tap_ptr + start)  # (BLOCK_C, BLOCK_O)
            acc = contract(value, weight, acc, PRECISION, B_IS_ROUNDED=True)

    index = first_index + tl.arange(0, BLOCK_P)  # the rows of the result are those of the product
    live = index < positions
    position = swizzle(tl.where(live, index, 0), out_height, out_width, STRIP)
    epilogue(acc, bias_ptr, output_ptr, position, o, live, OUT_CHANNELS, HAS_BIAS, RELU)

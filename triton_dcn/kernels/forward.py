"""Sample and multiply in one pass: output = sum over planes of sample(plane) @ weight(plane), no columns in memory.

Receives the pixels of the input, the sample arrays, weight and bias. Hands on the output (M, O).

There are two forms of the same product, and the tile table chooses one. Both gather channels in the order in which the
tensor cores of NVIDIA take them from registers (`register_order`), and leave `num_stages` at 1: a pipelined load would
bypass the L1 cache, from which neighboring samples get the pixels that they share. `direct` has the fewest registers,
and its blocks of channels may span several offset groups. `prefetch` loads the corners of the next block before it
multiplies those of this one, which pays where few warps are resident.

Letters, names and sample arrays: see `sampling`. One channel group (G = 1); C/D and O are multiples of the blocks.
"""

import triton
import triton.language as tl

from triton_dcn.kernels.arithmetic import contract, round_to, round_to_tf32
from triton_dcn.kernels.jit import kernel
from triton_dcn.kernels.register_order import blend_pairs, corner_pointers, product_row, spread, to_operand
from triton_dcn.kernels.sampling import blend, corner_rows, corner_weights, swizzle


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


@triton.jit
def weights_by_thread(cell, ly, lx, scale, LANES: tl.constexpr, RUN: tl.constexpr):
    """Return the four weights of `corner_weights` (BLOCK_P, LANES * RUN) from samples by thread (BLOCK_P * LANES,)."""
    w00, w01, w10, w11 = corner_weights(cell, ly, lx, scale)
    return spread(w00, LANES, RUN), spread(w01, LANES, RUN), spread(w10, LANES, RUN), spread(w11, LANES, RUN)


@triton.jit
def operand(
    w00,
    w01,
    w10,
    w11,
    x00,
    x01,
    x10,
    x11,
    PRECISION: tl.constexpr,
    BLEND_IN_PAIRS: tl.constexpr,
    WARPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Return the blended tile, in the dtype of the corners, as the left operand of the product.

    Args:
        w00, w01, w10, w11: of `weights_by_thread`.
        x00, x01, x10, x11: gathered tiles (BLOCK_P, BLOCK_C).
        WARPS: of the program.
    """
    if BLEND_IN_PAIRS:
        value = blend_pairs(w00, w01, w10, w11, x00, x01, x10, x11)
    else:
        value = round_to(blend(w00, w01, w10, w11, x00, x01, x10, x11), x00.dtype)
    if PRECISION == "tf32":
        value = round_to_tf32(value, PRECISION)  # here, no other warp reads it
    return to_operand(value, WARPS, LANES)


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
    LANES: tl.constexpr,
    BLEND_IN_PAIRS: tl.constexpr,
):
    """Compute an output tile; the blended tile is the left operand of the product, straight from registers.

    Where an offset group has whole blocks of channels, its samples are read once for a tap. Where it has fewer
    channels, a block spans several offset groups: samples are read for each block, and each thread reads those of the
    offset group of its own channels.

    Grid: (ceil(M / BLOCK_P) * O / BLOCK_O,); a program owns a (BLOCK_P, BLOCK_O) tile.
    Reads: input (B, H, W, C), bias (O,), the sample arrays; weight (K, C/BLOCK_C, O, BLOCK_C) from `operand_weight`,
        for TF32 rounded.
    Writes: output (M, O), in full.
    Assumes: BLOCK_O divides O, BLOCK_C divides C/D, or BLOCK_C divides C and the channels of a thread, BLOCK_C / LANES,
        divide C/D; BLOCK_P is a multiple of 16 * WARPS, the warps of a program. BLEND_IN_PAIRS: input is of half
        precision.
    """
    PER_OFFSET: tl.constexpr = CHANNELS // OFFSET_GROUPS
    BLOCKS_O: tl.constexpr = OUT_CHANNELS // BLOCK_O
    RUN: tl.constexpr = BLOCK_C // LANES
    BLOCKS_IN_GROUP: tl.constexpr = PER_OFFSET % BLOCK_C == 0
    first_index = tl.program_id(0) // BLOCKS_O * BLOCK_P
    slot = tl.arange(0, BLOCK_P * LANES)  # what one thread loads at once of a gathered row
    index = first_index + product_row(slot // LANES, WARPS, LANES)
    position = swizzle(tl.where(index < positions, index, 0), out_height, out_width, STRIP)
    slot_c = slot % LANES * RUN
    c = tl.arange(0, BLOCK_C)[None, :]
    o = tl.program_id(0) % BLOCKS_O * BLOCK_O + tl.arange(0, BLOCK_O)
    weight_tile_ptr = weight_ptr + o[None, :] * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]

    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for tap in tl.range(0, TAPS, num_stages=1):
        weight_tap_ptr = weight_tile_ptr + tap * (CHANNELS * OUT_CHANNELS)
        for start in tl.static_range(0, CHANNELS, BLOCK_C):
            if start % PER_OFFSET == 0 or not BLOCKS_IN_GROUP:
                group = start // PER_OFFSET if BLOCKS_IN_GROUP else (start + slot_c) // PER_OFFSET
                sample = (group * TAPS + tap) * positions + position
                cell = tl.load(cell_ptr + sample)
                ly = tl.load(ly_ptr + sample)
                lx = tl.load(lx_ptr + sample)
                scale = tl.load(scale_ptr + sample)
                w00, w01, w10, w11 = weights_by_thread(cell, ly, lx, scale, LANES, RUN)
                row00, row01, row10, row11 = corner_rows(cell, width, CHANNELS)
                ptr00 = corner_pointers(input_ptr, row00, c, LANES, RUN)
                ptr01 = corner_pointers(input_ptr, row01, c, LANES, RUN)
                ptr10 = corner_pointers(input_ptr, row10, c, LANES, RUN)
                ptr11 = corner_pointers(input_ptr, row11, c, LANES, RUN)
            x00 = tl.load(ptr00 + start)
            x01 = tl.load(ptr01 + start)
            x10 = tl.load(ptr10 + start)
            x11 = tl.load(ptr11 + start)
            value = operand(w00, w01, w10, w11, x00, x01, x10, x11, PRECISION, BLEND_IN_PAIRS, WARPS, LANES)
            weight = tl.load(weight_tap_ptr + start * OUT_CHANNELS)  # (BLOCK_C, BLOCK_O)
            acc = contract(value, weight, acc, PRECISION, B_IS_ROUNDED=True)

    index = first_index + tl.arange(0, BLOCK_P)  # the rows of the result are those of the product
    live = index < positions
    position = swizzle(tl.where(live, index, 0), out_height, out_width, STRIP)
    epilogue(acc, bias_ptr, output_ptr, position, o, live, OUT_CHANNELS, HAS_BIAS, RELU)


@triton.jit
def load_by_thread(input_ptr, row00, row01, row10, row11, c, LANES: tl.constexpr):
    """Load channels `c` (1, BLOCK_C) of the four corners, from the rows of `corner_rows` by thread."""
    RUN: tl.constexpr = c.shape[1] // LANES
    x00 = tl.load(corner_pointers(input_ptr, row00, c, LANES, RUN))
    x01 = tl.load(corner_pointers(input_ptr, row01, c, LANES, RUN))
    x10 = tl.load(corner_pointers(input_ptr, row10, c, LANES, RUN))
    x11 = tl.load(corner_pointers(input_ptr, row11, c, LANES, RUN))
    return x00, x01, x10, x11


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
    WARPS: tl.constexpr,
    LANES: tl.constexpr,
    BLEND_IN_PAIRS: tl.constexpr,
):
    """Compute an output tile; corners are loaded one channel block ahead of the product, also across planes.

    Grid: (ceil(M / BLOCK_P) * O / BLOCK_O,); a program owns a (BLOCK_P, BLOCK_O) tile.
    Reads: input (B, H, W, C), bias (O,), the sample arrays; weight (K, C/BLOCK_C, O, BLOCK_C) from `operand_weight`,
        for TF32 rounded.
    Writes: output (M, O), in full.
    Assumes: BLOCK_C divides C/D, BLOCK_O divides O; BLOCK_P is a multiple of 16 * WARPS, the warps of a program.
        BLEND_IN_PAIRS: input is of half precision.
    """
    PER_OFFSET: tl.constexpr = CHANNELS // OFFSET_GROUPS
    BLOCKS_O: tl.constexpr = OUT_CHANNELS // BLOCK_O
    PLANES: tl.constexpr = OFFSET_GROUPS * TAPS
    first_index = tl.program_id(0) // BLOCKS_O * BLOCK_P
    slot = tl.arange(0, BLOCK_P * LANES)  # what one thread loads at once of a gathered row
    index = first_index + product_row(slot // LANES, WARPS, LANES)
    position = swizzle(tl.where(index < positions, index, 0), out_height, out_width, STRIP)
    c = tl.arange(0, BLOCK_C)[None, :]
    o = tl.program_id(0) % BLOCKS_O * BLOCK_O + tl.arange(0, BLOCK_O)
    weight_tile_ptr = weight_ptr + o[None, :] * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]

    cell = tl.load(cell_ptr + position)
    row00, row01, row10, row11 = corner_rows(cell, width, CHANNELS)
    x00, x01, x10, x11 = load_by_thread(input_ptr, row00, row01, row10, row11, c, LANES)
    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for plane in tl.range(0, PLANES, num_stages=1):
        sample = plane * positions + position
        ly = tl.load(ly_ptr + sample)
        lx = tl.load(lx_ptr + sample)
        scale = tl.load(scale_ptr + sample)
        w00, w01, w10, w11 = weights_by_thread(cell, ly, lx, scale, LANES, BLOCK_C // LANES)
        first_c = plane // TAPS * PER_OFFSET
        weight_plane_ptr = weight_tile_ptr + (plane % TAPS * CHANNELS + first_c) * OUT_CHANNELS
        next_plane = tl.minimum(plane + 1, PLANES - 1)
        cell = tl.load(cell_ptr + next_plane * positions + position)
        for start in tl.static_range(0, PER_OFFSET, BLOCK_C):
            value = operand(w00, w01, w10, w11, x00, x01, x10, x11, PRECISION, BLEND_IN_PAIRS, WARPS, LANES)
            if start + BLOCK_C < PER_OFFSET:
                next_ptr = input_ptr + (first_c + start + BLOCK_C)
            else:
                next_ptr = input_ptr + next_plane // TAPS * PER_OFFSET
                row00, row01, row10, row11 = corner_rows(cell, width, CHANNELS)
            x00, x01, x10, x11 = load_by_thread(next_ptr, row00, row01, row10, row11, c, LANES)
            weight = tl.load(weight_plane_ptr + start * OUT_CHANNELS)  # (BLOCK_C, BLOCK_O)
            acc = contract(value, weight, acc, PRECISION, B_IS_ROUNDED=True)

    index = first_index + tl.arange(0, BLOCK_P)
    live = index < positions
    position = swizzle(tl.where(live, index, 0), out_height, out_width, STRIP)
    epilogue(acc, bias_ptr, output_ptr, position, o, live, OUT_CHANNELS, HAS_BIAS, RELU)

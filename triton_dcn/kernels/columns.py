"""The columns: all samples times their masks, as the left operand of a library matrix product.

Receives the pixels of the input and the sample arrays. Hands on a column buffer (G, rows, K, C/G).

Letters, names and sample arrays: see `sampling`.
"""

import triton.language as tl

from triton_dcn.kernels.arithmetic import round_to
from triton_dcn.kernels.jit import kernel
from triton_dcn.kernels.register_order import blend_pairs
from triton_dcn.kernels.sampling import (
    blend,
    column_offset,
    corner_rows,
    corner_weights,
    load_corners,
    swizzle_chunk,
)


@kernel
def columns_kernel(
    input_ptr,
    cell_ptr,
    ly_ptr,
    lx_ptr,
    scale_ptr,
    column_ptr,
    positions,
    first_position,
    rows,
    out_width,
    width,
    taps_per_program,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    OFFSET_GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLEND_IN_PAIRS: tl.constexpr,
):
    """Compute the columns of the positions [first_position, first_position + rows).

    The taps of a position sample neighboring pixels: one program walks through them and finds most pixels in L1. At
    one position the offset groups follow each other, so that narrow ones are written side by side, too.

    Grid: (ceil(rows*D / BLOCK_P) * ceil(C/D / BLOCK_C) * ceil(K / taps_per_program),); a program owns BLOCK_P
        (position, offset group) pairs and a block of channels.
    Reads: input (B, H, W, C), the sample arrays, (D*K, M).
    Writes: columns (G, rows, K, C/G), in full.
    Assumes: any sizes. BLEND_IN_PAIRS: input is of half precision.
    """
    PER_OFFSET: tl.constexpr = CHANNELS // OFFSET_GROUPS
    BLOCKS_C: tl.constexpr = (PER_OFFSET + BLOCK_C - 1) // BLOCK_C
    tap_blocks = tl.cdiv(TAPS, taps_per_program)
    first_tap = tl.program_id(0) % tap_blocks * taps_per_program
    start = tl.program_id(0) // tap_blocks % BLOCKS_C * BLOCK_C
    index = tl.program_id(0) // (tap_blocks * BLOCKS_C) * BLOCK_P + tl.arange(0, BLOCK_P)
    live = index < rows * OFFSET_GROUPS
    index = tl.where(live, index, 0)
    group = index % OFFSET_GROUPS
    row = swizzle_chunk(index // OFFSET_GROUPS, rows, out_width, STRIP)

    c_in_group = start + tl.arange(0, BLOCK_C)[None, :]
    live_c = c_in_group < PER_OFFSET
    c = group[:, None] * PER_OFFSET + c_in_group
    base_ptr = input_ptr + group[:, None] * PER_OFFSET
    for tap in tl.range(first_tap, tl.minimum(first_tap + taps_per_program, TAPS), num_stages=1):
        sample = (group * TAPS + tap) * positions + first_position + row
        cell = tl.load(cell_ptr + sample)[:, None]
        row00, row01, row10, row11 = corner_rows(cell, width, CHANNELS)
        w00, w01, w10, w11 = corner_weights(
            cell,
            tl.load(ly_ptr + sample)[:, None],
            tl.load(lx_ptr + sample)[:, None],
            tl.load(scale_ptr + sample)[:, None],
        )
        x00, x01, x10, x11 = load_corners(
            base_ptr, row00, row01, row10, row11, c_in_group, live_c, PER_OFFSET % BLOCK_C != 0
        )
        if BLEND_IN_PAIRS:
            value = blend_pairs(w00, w01, w10, w11, x00, x01, x10, x11)
        else:
            value = round_to(blend(w00, w01, w10, w11, x00, x01, x10, x11), column_ptr.dtype.element_ty)
        store_at = column_offset(row[:, None], tap, c, rows, CHANNELS, GROUPS, TAPS)
        tl.store(column_ptr + store_at, value, mask=live[:, None] & live_c)

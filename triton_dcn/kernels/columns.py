"""The columns: all samples times their masks, as the left operand of a library matrix product.

Receives the pixels of the input and the sample arrays. Hands on a column buffer (G, rows, K, C/G).

Letters, names and sample arrays: see `sampling`.
"""

import triton.language as tl

from triton_dcn.kernels.arithmetic import round_to
from triton_dcn.kernels.jit import kernel
from triton_dcn.kernels.sampling import blend, column_offset, corner_rows, corner_weights, load_corners


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
    width,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    OFFSET_GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the columns of the positions [first_position, first_position + rows).

    Grid: (ceil(rows / BLOCK_P) * D*K,); a program owns BLOCK_P positions of one plane.
    Reads: input (B, H, W, C), or int32 (B, H, W, C/2), see `widen`; the sample arrays, (D*K, M).
    Writes: columns (G, rows, K, C/G), in full.
    """
    PACK: tl.constexpr = 2 if input_ptr.dtype.element_ty == tl.int32 else 1
    PER_OFFSET: tl.constexpr = CHANNELS // OFFSET_GROUPS
    plane = tl.program_id(0) % (OFFSET_GROUPS * TAPS)
    row = tl.program_id(0) // (OFFSET_GROUPS * TAPS) * BLOCK_P + tl.arange(0, BLOCK_P)
    live_row = row < rows
    sample = plane * positions + first_position + tl.where(live_row, row, 0)

    cell = tl.load(cell_ptr + sample)[:, None]
    row00, row01, row10, row11 = corner_rows(cell, width, CHANNELS // PACK)
    w00, w01, w10, w11 = corner_weights(
        cell,
        tl.load(ly_ptr + sample)[:, None],
        tl.load(lx_ptr + sample)[:, None],
        tl.load(scale_ptr + sample)[:, None],
    )

    base_ptr = input_ptr + plane // TAPS * (PER_OFFSET // PACK)
    for start in range(0, PER_OFFSET, BLOCK_C):
        word = start // PACK + tl.arange(0, BLOCK_C // PACK)[None, :]
        live_word = word < PER_OFFSET // PACK
        x00, x01, x10, x11 = load_corners(
            base_ptr, row00, row01, row10, row11, word, live_word, PER_OFFSET % BLOCK_C != 0
        )
        value = round_to(blend(w00, w01, w10, w11, x00, x01, x10, x11), column_ptr.dtype.element_ty)

        c_in_group = start + tl.arange(0, BLOCK_C)[None, :]
        c = plane // TAPS * PER_OFFSET + c_in_group
        store_at = column_offset(row[:, None], plane % TAPS, c, rows, CHANNELS, GROUPS, TAPS)
        tl.store(column_ptr + store_at, value, mask=live_row[:, None] & (c_in_group < PER_OFFSET))

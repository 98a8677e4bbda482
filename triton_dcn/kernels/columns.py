"""The columns: every sample, blended and scaled, as the left operand of a library matrix product.

Letters and sample arrays: see `sampling`.
"""

import triton
import triton.language as tl

from triton_dcn.kernels.arithmetic import narrow
from triton_dcn.kernels.sampling import blend, column_offset, corner_rows, corner_weights, load_corners


@triton.jit
def columns_kernel(
    input_ptr,
    cell_ptr,
    ly_ptr,
    lx_ptr,
    scale_ptr,
    column_ptr,
    positions,
    first,
    rows,
    width,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    OFFSET_GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sample the input at positions [first, first + rows).

    Grid: (ceil(rows / BLOCK_P) * D*K,); a program owns BLOCK_P positions of one (offset group, tap).
    Reads: input (B, H, W, C); the sample arrays, (D*K, M).
    Writes: columns (G, rows, K, C/G), dtype of input, in full.
    """
    PER_OFFSET: tl.constexpr = CHANNELS // OFFSET_GROUPS
    pid_s = tl.program_id(0) % (OFFSET_GROUPS * TAPS)
    row = tl.program_id(0) // (OFFSET_GROUPS * TAPS) * BLOCK_P + tl.arange(0, BLOCK_P)
    live = row < rows
    at = pid_s * positions + first + tl.where(live, row, 0)
    cell = tl.load(cell_ptr + at)
    row00, row01, row10, row11 = corner_rows(cell, width, CHANNELS)
    w00, w01, w10, w11 = corner_weights(cell, tl.load(ly_ptr + at), tl.load(lx_ptr + at), tl.load(scale_ptr + at))
    for start in range(0, PER_OFFSET, BLOCK_C):
        local = start + tl.arange(0, BLOCK_C)
        c = (pid_s // TAPS * PER_OFFSET + local)[None, :]
        live_c = (local < PER_OFFSET)[None, :]
        x00, x01, x10, x11 = load_corners(
            input_ptr,
            row00[:, None],
            row01[:, None],
            row10[:, None],
            row11[:, None],
            c,
            live_c,
            PER_OFFSET % BLOCK_C != 0,
        )
        value = blend(w00[:, None], w01[:, None], w10[:, None], w11[:, None], x00, x01, x10, x11)
        to = column_offset(row[:, None], pid_s % TAPS, c, rows, CHANNELS, GROUPS, TAPS)
        tl.store(column_ptr + to, narrow(value, column_ptr.dtype.element_ty), mask=live[:, None] & live_c)

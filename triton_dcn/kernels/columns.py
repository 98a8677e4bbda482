"""The columns: every sample, blended and scaled, as the left operand of a library matrix product.

Letters and sample arrays: see `sampling`.
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
    Reads: input (B, H, W, C), or int32 (B, H, W, C/2), see `widen`; the sample arrays, (D*K, M).
    Writes: columns (G, rows, K, C/G), in full.
    """
    PACK: tl.constexpr = 2 if input_ptr.dtype.element_ty == tl.int32 else 1
    PER_OFFSET: tl.constexpr = CHANNELS // OFFSET_GROUPS
    pid_s = tl.program_id(0) % (OFFSET_GROUPS * TAPS)
    row = tl.program_id(0) // (OFFSET_GROUPS * TAPS) * BLOCK_P + tl.arange(0, BLOCK_P)
    live = row < rows
    at = pid_s * positions + first + tl.where(live, row, 0)
    cell = tl.load(cell_ptr + at)[:, None]
    row00, row01, row10, row11 = corner_rows(cell, width, CHANNELS // PACK)
    w00, w01, w10, w11 = corner_weights(
        cell, tl.load(ly_ptr + at)[:, None], tl.load(lx_ptr + at)[:, None], tl.load(scale_ptr + at)[:, None]
    )
    base = input_ptr + pid_s // TAPS * (PER_OFFSET // PACK)
    for start in range(0, PER_OFFSET, BLOCK_C):
        word = start // PACK + tl.arange(0, BLOCK_C // PACK)[None, :]
        inside = word < PER_OFFSET // PACK
        x00, x01, x10, x11 = load_corners(
            base, row00, row01, row10, row11, word, inside, PER_OFFSET % BLOCK_C != 0
        )  # fmt: skip
        value = round_to(blend(w00, w01, w10, w11, x00, x01, x10, x11), column_ptr.dtype.element_ty)
        local = start + tl.arange(0, BLOCK_C)[None, :]
        c = pid_s // TAPS * PER_OFFSET + local
        to = column_offset(row[:, None], pid_s % TAPS, c, rows, CHANNELS, GROUPS, TAPS)
        tl.store(column_ptr + to, value, mask=live[:, None] & (local < PER_OFFSET))

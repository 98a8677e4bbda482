"""The gradient of the input as a matrix product over the samples of a bin, one program per tile of input pixels.

Receives grad_output or column gradients, the sample arrays and the bins. Hands on T, from which a library product makes
the gradient, or the gradient itself.

The gradient of pixel q is the sum over samples s of hat(q, s) * grad_column(s), with

    hat(q, s) = scale(s) * max(0, 1 - |p_y(s) - q_y|) * max(0, 1 - |p_x(s) - q_x|),

non-zero only at the four corners of s. For a tile of pixels and the entries of its bin, hat is a small dense matrix,
and the sum is a product for tensor cores. There are no atomics, no buffer has to be cleared first, and results are
written once, in their own dtype.

T-columns put hat between grad_output and weight: with T(q, k) = sum_s hat(q, s) * grad_output(s) over the bin of tap k,

    grad_input = sum_k T(k) @ weight(k)        grad_weight(k) = T(k)^T @ input,

two library products on one buffer, for one offset group. The G-form, from column gradients, is for any number of them.

Letters, names and sample arrays: see `sampling`; bins: see `binning`.
"""

import triton
import triton.language as tl

from triton_dcn.kernels.arithmetic import contract, round_to
from triton_dcn.kernels.binning import cell_origin
from triton_dcn.kernels.jit import kernel
from triton_dcn.kernels.sampling import column_offset


@triton.jit
def hat_matrix(
    cell_ptr,
    ly_ptr,
    lx_ptr,
    scale_ptr,
    sample,
    live,
    first_pixel,
    tile_y,
    tile_x,
    width,
    dtype: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    """Return hat(q, s) in `dtype`, (TILE_H * TILE_W, BLOCK_S), for the pixels of a tile; zero where not `live`.

    Its two factors are computed separately, for the rows and for the columns of the tile, and multiplied last. They
    come from distances, not from comparisons with the corners of the cell, which take more instructions.

    Args:
        sample: (BLOCK_S,), indices into the sample arrays; all lie in the image that begins at `first_pixel`.
        live: (BLOCK_S,), whether the entry belongs to the bin.
        tile_y, tile_x: row and column of the tile, in tiles.
    """
    cell = tl.load(cell_ptr + sample)
    ly = tl.load(ly_ptr + sample)
    lx = tl.load(lx_ptr + sample)
    scale = tl.where(live, tl.load(scale_ptr + sample), 0.0)
    y, x = cell_origin(cell, (cell >> 4) - first_pixel, width)
    y_in_tile = (y - tile_y * TILE_H).to(tl.float32) + ly
    x_in_tile = (x - tile_x * TILE_W).to(tl.float32) + lx
    distance_y = tl.abs(tl.arange(0, TILE_H).to(tl.float32)[:, None] - y_in_tile[None, :])
    distance_x = tl.abs(tl.arange(0, TILE_W).to(tl.float32)[:, None] - x_in_tile[None, :])
    hat_y = tl.clamp(1 - distance_y, 0.0, 1.0) * scale
    hat_x = tl.clamp(1 - distance_x, 0.0, 1.0)  # clamped, not a maximum: one instruction with the subtraction
    hat = round_to(hat_y[:, None, :] * hat_x[None, :, :], dtype)
    return tl.reshape(hat, (TILE_H * TILE_W, sample.shape[0]))


@kernel
def t_columns_kernel(
    grad_output_ptr,
    cell_ptr,
    ly_ptr,
    lx_ptr,
    scale_ptr,
    start_ptr,
    entry_ptr,
    t_ptr,
    positions,
    height,
    width,
    tiles_y,
    tiles_x,
    first_image,
    first_tile_row,
    tile_rows,
    first_pixel,
    rows,
    OUT_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Compute T for a chunk of the input tiles: `tile_rows` rows of tiles from `first_tile_row` on, of some images.

    Grid: (images * tile_rows * tiles_x * K * ceil(O / BLOCK_O),); a program owns a tile, a tap and BLOCK_O channels.
    Reads: grad_output (M, O), the sample arrays, start (bins + 1,), entry.
    Writes: T (G, rows, K, O/G) for the `rows` pixels from `first_pixel` on, in full.
    """
    EVEN: tl.constexpr = OUT_CHANNELS % BLOCK_O == 0
    BLOCKS_O: tl.constexpr = (OUT_CHANNELS + BLOCK_O - 1) // BLOCK_O
    o = tl.program_id(0) % BLOCKS_O * BLOCK_O + tl.arange(0, BLOCK_O)
    tap = tl.program_id(0) // BLOCKS_O % TAPS
    tile = tl.program_id(0) // (BLOCKS_O * TAPS)
    tile_x = tile % tiles_x
    tile_y = first_tile_row + tile // tiles_x % tile_rows
    b = first_image + tile // (tiles_x * tile_rows)
    q = tl.arange(0, TILE_H * TILE_W)
    y = tile_y * TILE_H + q // TILE_W
    x = tile_x * TILE_W + q % TILE_W
    bin = ((b * tiles_y + tile_y) * tiles_x + tile_x) * TAPS + tap
    begin = tl.load(start_ptr + bin)
    end = tl.load(start_ptr + bin + 1)
    live_o = (o < OUT_CHANNELS)[None, :]
    acc = tl.zeros((TILE_H * TILE_W, BLOCK_O), tl.float32)
    for first_slot in tl.range(begin, end, BLOCK_S, num_stages=1):
        slot = first_slot + tl.arange(0, BLOCK_S)
        live = slot < end
        entry = tl.load(entry_ptr + tl.minimum(slot, end - 1))  # the last one in place of those beyond it
        hat = hat_matrix(
            cell_ptr,
            ly_ptr,
            lx_ptr,
            scale_ptr,
            entry,
            live,
            b * height * width,
            tile_y,
            tile_x,
            width,
            grad_output_ptr.dtype.element_ty,
            TILE_H,
            TILE_W,
        )
        position = (entry - tap * positions).to(tl.int64)[:, None]
        grad_ptr = grad_output_ptr + position * OUT_CHANNELS + o[None, :]
        grad = tl.load(grad_ptr) if EVEN else tl.load(grad_ptr, mask=live_o, other=0.0)  # (BLOCK_S, BLOCK_O)
        acc = contract(hat, grad, acc, PRECISION)

    row = (b * height + y) * width + x - first_pixel
    store_at = column_offset(row[:, None], tap, o[None, :], rows, OUT_CHANNELS, GROUPS, TAPS)
    inside = ((y < height) & (x < width))[:, None] & live_o
    tl.store(t_ptr + store_at, round_to(acc, t_ptr.dtype.element_ty), mask=inside)


@kernel
def g_form_kernel(
    grad_column_ptr,
    cell_ptr,
    ly_ptr,
    lx_ptr,
    scale_ptr,
    start_ptr,
    entry_ptr,
    grad_input_ptr,
    positions,
    first_position,
    rows,
    height,
    width,
    tiles_y,
    tiles_x,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    OFFSET_GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    PART: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute grad_input from the column gradients of the positions [first_position, first_position + rows).

    Grid: (B * D * tiles_y * tiles_x * ceil(C/D / BLOCK_C),); a program owns a tile and BLOCK_C channels.
    Reads: grad_column (G, rows, K, C/G), the sample arrays, start (bins + 1,), entry.
    Writes: grad_input (B, H, W, C), in full; with ADD, adds to it. PART: these are not all positions, rows < M.
    """
    PER_OFFSET: tl.constexpr = CHANNELS // OFFSET_GROUPS
    EVEN: tl.constexpr = PER_OFFSET % BLOCK_C == 0
    BLOCKS_C: tl.constexpr = (PER_OFFSET + BLOCK_C - 1) // BLOCK_C
    c_in_group = tl.program_id(0) % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = tl.program_id(0) // BLOCKS_C  # of (image, offset group, tile); its bins, one per tap, are adjacent
    tile_x = tile % tiles_x
    tile_y = tile // tiles_x % tiles_y
    offset_group = tile // (tiles_x * tiles_y) % OFFSET_GROUPS
    b = tile // (tiles_x * tiles_y * OFFSET_GROUPS)
    c = offset_group * PER_OFFSET + c_in_group
    q = tl.arange(0, TILE_H * TILE_W)
    y = tile_y * TILE_H + q // TILE_W
    x = tile_x * TILE_W + q % TILE_W
    begin = tl.load(start_ptr + tile * TAPS)
    end = tl.load(start_ptr + tile * TAPS + TAPS)
    first_sample = offset_group * TAPS * positions
    live_c = (c_in_group < PER_OFFSET)[None, :]
    acc = tl.zeros((TILE_H * TILE_W, BLOCK_C), tl.float32)
    for first_slot in tl.range(begin, end, BLOCK_S, num_stages=1):
        slot = first_slot + tl.arange(0, BLOCK_S)
        live = slot < end
        entry = tl.load(entry_ptr + tl.minimum(slot, end - 1))  # the last one in place of those beyond it
        row = entry % positions
        needed = True
        if PART:
            row -= first_position
            live = live & (row >= 0) & (row < rows)
            row = tl.where(live, row, 0)
            # a chunk is a band of the image, and most tiles have no sample there
            needed = tl.max(live.to(tl.int32), 0) > 0
        if needed:
            hat = hat_matrix(
                cell_ptr,
                ly_ptr,
                lx_ptr,
                scale_ptr,
                first_sample + entry,
                live,
                b * height * width,
                tile_y,
                tile_x,
                width,
                grad_column_ptr.dtype.element_ty,
                TILE_H,
                TILE_W,
            )
            tap = (entry // positions)[:, None]
            grad_ptr = grad_column_ptr + column_offset(row[:, None], tap, c[None, :], rows, CHANNELS, GROUPS, TAPS)
            if PART:
                grad = tl.load(grad_ptr, mask=live[:, None] & live_c, other=0.0)  # (BLOCK_S, BLOCK_C)
            else:
                grad = tl.load(grad_ptr) if EVEN else tl.load(grad_ptr, mask=live_c, other=0.0)
            acc = contract(hat, grad, acc, PRECISION)

    store_ptr = grad_input_ptr + ((b * height + y) * width + x).to(tl.int64)[:, None] * CHANNELS + c[None, :]
    inside = ((y < height) & (x < width))[:, None] & live_c
    if ADD:
        acc += tl.load(store_ptr, mask=inside, other=0.0).to(tl.float32)
    tl.store(store_ptr, round_to(acc, grad_input_ptr.dtype.element_ty), mask=inside)

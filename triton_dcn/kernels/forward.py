"""Gather and contract in one pass: output = sum over taps of sample(tap) @ weight(tap), the columns never in memory.

Two forms of the same product, chosen by the tile table. `prefetch` carries the raw corner pixels of the next step
across the loop, so that their latency hides behind the blend and the product; it is portable. `transposed` computes the
transposed product with the gathered tile as right operand, which on sm_90 saves the register-to-register layout change
of every blended tile. Both leave `num_stages` at 1: a pipelined gather would bypass the L1 cache, where neighboring
samples meet.

Letters and sample arrays: see `sampling`. One channel group (G = 1); C/D and O are multiples of the blocks.
"""

import triton
import triton.language as tl

from triton_dcn.kernels.arithmetic import contract, round_to
from triton_dcn.kernels.jit import kernel
from triton_dcn.kernels.sampling import blend, corner_rows, corner_weights, load_corners, swizzle


@triton.jit
def epilogue(
    acc, bias_ptr, output_ptr, p, o, live, OUT_CHANNELS: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr
):
    """Add the bias, rectify and store a (BLOCK_P, BLOCK_O) tile of the output (M, O)."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # NaN stays, as in torch
    to = p.to(tl.int64)[:, None] * OUT_CHANNELS + o[None, :]
    tl.store(output_ptr + to, round_to(acc, output_ptr.dtype.element_ty), mask=live[:, None])


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
    """Compute an output tile, gathering one channel block ahead of the product, across taps, too.

    Grid: (ceil(M / BLOCK_P) * O / BLOCK_O,); a program owns a (BLOCK_P, BLOCK_O) tile.
    Reads: input (B, H, W, C), weight (O, K, C), bias (O,), the sample arrays.
    Writes: output (M, O), in full.
    Assumes: BLOCK_C divides C/D, BLOCK_O divides O.
    """
    PER_OFFSET: tl.constexpr = CHANNELS // OFFSET_GROUPS
    BLOCKS_O: tl.constexpr = OUT_CHANNELS // BLOCK_O
    SAMPLES: tl.constexpr = OFFSET_GROUPS * TAPS
    index = tl.program_id(0) // BLOCKS_O * BLOCK_P + tl.arange(0, BLOCK_P)
    live = index < positions
    p = swizzle(tl.where(live, index, 0), out_height, out_width, STRIP)
    o = tl.program_id(0) % BLOCKS_O * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.arange(0, BLOCK_C)
    weight_rows = o[None, :] * (TAPS * CHANNELS) + c[:, None]

    cell = tl.load(cell_ptr + p)[:, None]
    row00, row01, row10, row11 = corner_rows(cell, width, CHANNELS)
    x00, x01, x10, x11 = load_corners(input_ptr, row00, row01, row10, row11, c[None, :], True, False)
    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for sample in tl.range(0, SAMPLES, num_stages=1):
        at = sample * positions + p
        ly = tl.load(ly_ptr + at)[:, None]
        lx = tl.load(lx_ptr + at)[:, None]
        w00, w01, w10, w11 = corner_weights(cell, ly, lx, tl.load(scale_ptr + at)[:, None])
        first = sample // TAPS * PER_OFFSET
        weight_tap = weight_ptr + (sample % TAPS * CHANNELS + first) + weight_rows
        ahead = tl.minimum(sample + 1, SAMPLES - 1)
        cell = tl.load(cell_ptr + ahead * positions + p)[:, None]
        for start in tl.static_range(0, PER_OFFSET, BLOCK_C):
            value = round_to(blend(w00, w01, w10, w11, x00, x01, x10, x11), weight_ptr.dtype.element_ty)
            if start + BLOCK_C < PER_OFFSET:
                base = input_ptr + (first + start + BLOCK_C)
            else:
                base = input_ptr + ahead // TAPS * PER_OFFSET
                row00, row01, row10, row11 = corner_rows(cell, width, CHANNELS)
            x00, x01, x10, x11 = load_corners(base, row00, row01, row10, row11, c[None, :], True, False)
            weight = tl.load(weight_tap + start)  # (BLOCK_C, BLOCK_O)
            acc = contract(value, weight, acc, PRECISION)
    epilogue(acc, bias_ptr, output_ptr, p, o, live, OUT_CHANNELS, HAS_BIAS, RELU)


@kernel
def forward_transposed_kernel(
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
    """Compute the transposed output tile, weight on the left, channel blocks unrolled inside the loop over samples.

    Grid, reads, writes, assumes: as `forward_prefetch_kernel`; or input int32 (B, H, W, C/2), see `widen`.
    """
    PACK: tl.constexpr = 2 if input_ptr.dtype.element_ty == tl.int32 else 1
    PER_OFFSET: tl.constexpr = CHANNELS // OFFSET_GROUPS
    BLOCKS_O: tl.constexpr = OUT_CHANNELS // BLOCK_O
    index = tl.program_id(0) // BLOCKS_O * BLOCK_P + tl.arange(0, BLOCK_P)
    live = index < positions
    p = swizzle(tl.where(live, index, 0), out_height, out_width, STRIP)
    o = tl.program_id(0) % BLOCKS_O * BLOCK_O + tl.arange(0, BLOCK_O)
    word = tl.arange(0, BLOCK_C // PACK)[None, :]
    weight_rows = o[:, None] * (TAPS * CHANNELS) + tl.arange(0, BLOCK_C)[None, :]

    acc = tl.zeros((BLOCK_O, BLOCK_P), tl.float32)
    for sample in tl.range(0, OFFSET_GROUPS * TAPS, num_stages=1):
        at = sample * positions + p
        cell = tl.load(cell_ptr + at)[:, None]
        ly = tl.load(ly_ptr + at)[:, None]
        lx = tl.load(lx_ptr + at)[:, None]
        w00, w01, w10, w11 = corner_weights(cell, ly, lx, tl.load(scale_ptr + at)[:, None])
        row00, row01, row10, row11 = corner_rows(cell, width, CHANNELS // PACK)
        first = sample // TAPS * PER_OFFSET
        weight_tap = weight_ptr + (sample % TAPS * CHANNELS + first) + weight_rows
        for start in tl.static_range(0, PER_OFFSET, BLOCK_C):
            base = input_ptr + (first + start) // PACK
            x00, x01, x10, x11 = load_corners(base, row00, row01, row10, row11, word, True, False)
            value = round_to(blend(w00, w01, w10, w11, x00, x01, x10, x11), weight_ptr.dtype.element_ty)
            weight = tl.load(weight_tap + start)  # (BLOCK_O, BLOCK_C)
            acc = contract(weight, tl.trans(value), acc, PRECISION)
    epilogue(tl.trans(acc), bias_ptr, output_ptr, p, o, live, OUT_CHANNELS, HAS_BIAS, RELU)

"""Gathered channels as operand of a matrix product, and its result back, with little or nothing moved between threads.

Threads of a warp, numbered 4 r + q with q = 0..3 ("quarter"), share a tile of 8 rows r and 16 words of 32 bits. A word
is two neighboring channels in half precision or one in float32: a block is 32 or 16 channels. A load of 128 bits
gives a thread four neighboring words of its row. The tensor core wants from the same thread four words of the same
row, but every fourth one (words of a row, by the quarter that holds them):

    loaded    0 0 0 0  1 1 1 1  2 2 2 2  3 3 3 3
    wanted    0 1 2 3  0 1 2 3  0 1 2 3  0 1 2 3

So every thread has the right number of words, and word 4 q + i is only called 4 i + q. The product sums over channels,
and a sum may run in any order: the channels of the weight are stored in that order once (`operand_weight`), and the
tile is renamed (`to_operand`), for which the compiler has nothing to do. Without it, every tile goes through shared
memory with two barriers. Rows alike: the product wants rows r and r + 8 of 16 from one thread, the loads give it rows
that lie 8 * warps apart, so row m of the gathered tile is row `product_row(m)` of the product.

The result of a product, g = a @ weight, is divided among the threads in pairs of columns, whatever its dtype:

    columns   0 0 1 1 2 2 3 3  0 0 1 1 2 2 3 3  ...

With the channels of the weight in that order (`result_weight`), thread (r, q) ends up with the channels that it would
load (`from_result`). In half precision this is the order of the operand, because there a word is a pair; in float32 it
is another one.

LANES is the number of threads that share a gathered row. With four, a load of a warp touches 8 rows, 64 bytes of each.
The first-level cache takes a clock for each line of 128 bytes that a load touches, so with eight threads a row, two
blocks of channels wide, the same bytes take half the clocks: 4 instead of 8 for 512 bytes. The second four threads then
hold the second block of a row that the product wants from the first four: each thread exchanges half of its words, of a
tile already blended, with the thread four places away, one shuffle for a word. `product_row` puts the two rows of such
threads side by side, so that the compiler finds this exchange.

All of it holds for wgmma (sm_90) and mma (sm_80) where the warps stand one below the other: BLOCK_P is a multiple of 16
rows a warp. Elsewhere the results are the same, and the compiler moves the tile.

Here, too: arithmetic on two half-precision channels at once, one instruction for both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_dcn.kernels.arithmetic import INTERPRETED, round_to

QUARTERS = tl.constexpr(4)
"""Threads that share a row."""


def block_channels(dtype: torch.dtype) -> int:
    """Return the channels that the four threads of a row load at once, 128 bits each: 32 or, in float32, 16."""
    return 4 * 16 // dtype.itemsize


def operand_weight(weight: Tensor, width: int, lanes: int) -> Tensor:
    """Copy a weight (O, K, C) to the order of products that sum over the channels, for `to_operand`.

    Args:
        weight: any strides; C is a multiple of `width`.
        width: channels of a gathered tile.
        lanes: threads that share a gathered row, 4 or 8.

    Returns:
        (K, C/width, O, width): the weight of a tap and a gathered tile is in one piece.
    """
    out_channels, taps, channels = weight.shape
    word = 1 if weight.dtype == torch.float32 else 2  # channels that stay side by side
    blocks = lanes // 4
    by_thread = weight.reshape(out_channels, taps, channels // width, blocks, 4, width // (lanes * word), word)
    return by_thread.permute(1, 2, 0, 3, 5, 4, 6).reshape(taps, channels // width, out_channels, width)


def result_weight(weight: Tensor, block: int) -> Tensor:
    """Copy a weight (O, K, C) to the order of products whose columns are the channels, for `from_result`.

    Args:
        weight: any strides; C is a multiple of the block.
        block: channels that four threads load at once, `block_channels` or fewer.
    """
    out_channels, taps, channels = weight.shape
    by_thread = weight.reshape(out_channels, taps, channels // block, 4, block // 8, 2)
    return by_thread.transpose(3, 4).reshape(out_channels, taps, channels)


def round_weight(weight: Tensor) -> Tensor:
    """Return a float32 weight rounded to TF32, as `arithmetic.round_to_tf32` rounds in a kernel."""
    bits = weight.view(torch.int32)
    rounded = (bits + 0x1000) & -0x2000
    return torch.where(weight.isnan(), bits, rounded).view(torch.float32)


@triton.jit
def product_row(row, WARPS: tl.constexpr, LANES: tl.constexpr):
    """Return which row of a product the gathered row `row` is, where LANES threads, 4 or 8, share a gathered row."""
    ROWS: tl.constexpr = 32 // LANES  # of one load of a warp
    NEIGHBORS: tl.constexpr = LANES // QUARTERS  # rows between which threads exchange blocks
    lane = row % ROWS
    warp = row // ROWS % WARPS
    register = row // (ROWS * WARPS)
    in_eight = lane * NEIGHBORS + register % NEIGHBORS
    eight = register // NEIGHBORS
    return (eight // 2 * WARPS + warp) * 16 + eight % 2 * 8 + in_eight


@triton.jit
def pin(tile):
    """Return `tile` as it is; the compiler changes the order of its values after this, not before what computes it.

    It would rather exchange the four corner tiles than the one that is blended from them. For NVIDIA.
    """
    if INTERPRETED:
        result = tile
    else:
        WORD: tl.constexpr = 32 // tile.dtype.primitive_bitwidth
        result = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=False, pack=WORD
        )
    return result


@triton.jit
def to_operand(tile, WARPS: tl.constexpr, LANES: tl.constexpr):
    """Rename a gathered tile (BLOCK_P, LANES / 4 blocks of channels) to a product's left operand."""
    BLOCK_P: tl.constexpr = tile.shape[0]
    BLOCK_C: tl.constexpr = tile.shape[1]
    WORD: tl.constexpr = 32 // tile.dtype.primitive_bitwidth
    ROWS: tl.constexpr = 32 // LANES
    BLOCKS: tl.constexpr = LANES // QUARTERS
    WORDS: tl.constexpr = BLOCK_C // (LANES * WORD)
    if BLOCKS > 1:
        tile = pin(tile)
    tile = tl.reshape(tile, (BLOCK_P // (16 * WARPS), 2, BLOCKS, WARPS, ROWS, BLOCKS, QUARTERS, WORDS, WORD))
    tile = tl.permute(tile, (0, 3, 1, 4, 2, 5, 7, 6, 8))
    return tl.reshape(tile, (BLOCK_P, BLOCK_C))


@triton.jit
def from_result(tile, WARPS: tl.constexpr, LANES: tl.constexpr):
    """Rename a product's result (BLOCK_P, LANES / 4 blocks of channels) to the rows and channels of a gathered tile.

    A block is that of the gathered channels: 32 columns beside half precision, 16 beside float32.
    """
    BLOCK_P: tl.constexpr = tile.shape[0]
    BLOCK_C: tl.constexpr = tile.shape[1]
    ROWS: tl.constexpr = 32 // LANES
    BLOCKS: tl.constexpr = LANES // QUARTERS
    tile = tl.reshape(
        tile, (BLOCK_P // (16 * WARPS), WARPS, 2, ROWS, BLOCKS, BLOCKS, BLOCK_C // (LANES * 2), QUARTERS, 2)
    )
    tile = tl.permute(tile, (0, 2, 4, 1, 3, 5, 7, 6, 8))
    return tl.reshape(tile, (BLOCK_P, BLOCK_C))


@triton.jit
def spread(values, LANES: tl.constexpr, RUN: tl.constexpr):
    """Repeat the values of the threads of a gathered tile, (BLOCK_P * LANES,), for the RUN channels of each."""
    BLOCK_P: tl.constexpr = values.shape[0] // LANES
    tile = tl.broadcast_to(tl.reshape(values, (BLOCK_P, LANES, 1)), (BLOCK_P, LANES, RUN))
    return tl.reshape(tile, (BLOCK_P, LANES * RUN))


@triton.jit
def corner_pointers(input_ptr, row, c, LANES: tl.constexpr, RUN: tl.constexpr):
    """Return pointers (BLOCK_P, LANES * RUN) to channels `c` (1, LANES * RUN), from `corner_rows` by thread.

    The compiler has to be told that a thread loads RUN neighboring channels, and that their place is a multiple of
    RUN, because each pixel has a multiple of RUN channels.
    """
    at = spread(row, LANES, RUN) + c
    return input_ptr + tl.max_contiguous(tl.multiple_of(at, (1, RUN)), (1, RUN))


@triton.jit
def fma_pairs(a, b, c):
    """Return a * b + c, rounded once, for tiles of one half-precision dtype: one instruction for two elements."""
    if INTERPRETED:
        result = round_to(add_to_odd(a.to(tl.float32) * b.to(tl.float32), c.to(tl.float32)), a.dtype)
    elif a.dtype == tl.bfloat16:
        result = tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        result = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=True, pack=2
        )
    return result


@triton.jit
def multiply_pairs(a, b):
    """Return a * b, rounded once, for tiles of one half-precision dtype: one instruction for two elements."""
    return fma_pairs(a, b, tl.full(a.shape, -0.0, a.dtype))  # sm_80 has no multiplication of bfloat16 pairs


@triton.jit
def add_to_odd(a, b):
    """Return a + b in float32, where it is not exact the neighbor whose last bit is 1.

    Rounded to a narrower dtype, this gives what one rounding of the exact sum gives; two roundings to nearest may not.
    """
    total = a + b
    b_in_total = total - a
    error = (a - (total - b_in_total)) + (b - b_in_total)
    bits = total.to(tl.int32, bitcast=True)
    step = tl.where((error > 0) == (total > 0), 1, -1)
    inexact = (error > 0) | (error < 0)  # not where the sum is infinite or NaN
    odd = bits + tl.where(inexact & (bits & 1 == 0), step, 0)
    return odd.to(tl.float32, bitcast=True)


@triton.jit
def blend_pairs(w00, w01, w10, w11, x00, x01, x10, x11):
    """Return the weighted sum of four corner tiles in their half precision, rounded after every product.

    The weights are float32, of shapes that broadcast to those of the tiles, and are rounded first.
    """
    dtype: tl.constexpr = x00.dtype
    w00 = tl.broadcast_to(round_to(w00, dtype), x00.shape)
    w01 = tl.broadcast_to(round_to(w01, dtype), x00.shape)
    w10 = tl.broadcast_to(round_to(w10, dtype), x00.shape)
    w11 = tl.broadcast_to(round_to(w11, dtype), x00.shape)
    return fma_pairs(w11, x11, fma_pairs(w10, x10, fma_pairs(w01, x01, multiply_pairs(w00, x00))))

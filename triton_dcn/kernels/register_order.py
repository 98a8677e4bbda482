"""Gathered channels as operand of a matrix product, and its result back, with nothing moved between threads.

Threads of a warp, numbered 4 r + q with q = 0..3 ("quarter"), share a tile of 8 rows r and 16 words of 32 bits. A word
is two neighboring channels in half precision or one in float32: a block is 32 or 16 channels. A load of 128 bits
gives a thread four neighboring words of its row. The tensor core wants from the same thread four words of the same
row, but every fourth one (words of a row, by the quarter that holds them):

    loaded    0 0 0 0  1 1 1 1  2 2 2 2  3 3 3 3
    wanted    0 1 2 3  0 1 2 3  0 1 2 3  0 1 2 3

So every thread has the right number of words, and word 4 q + i is only called 4 i + q. The product sums over channels,
and a sum may run in any order: the channels of the weight are stored in that order once (`permute_weight`), and the
tile is renamed (`to_operand`), for which the compiler has nothing to do. Without it, every tile goes through shared
memory with two barriers. Rows alike: the product wants rows r and r + 8 of 16 from one thread, the loads give it rows
that lie 8 * warps apart, so row m of the gathered tile is row `product_row(m)` of the product.

The result of a product, g = a @ weight, is divided among the threads in pairs of columns, whatever its dtype:

    columns   0 0 1 1 2 2 3 3  0 0 1 1 2 2 3 3  ...

With the channels of the weight in that order, thread (r, q) ends up with the channels that it would load
(`from_result`). In half precision this is the order of the operand, because there a word is a pair; in float32 it is
another one.

All of it holds for wgmma (sm_90) and mma (sm_80) where the warps stand one below the other: BLOCK_P is a multiple of 16
rows a warp. Elsewhere the results are the same, and the compiler moves the tile.

Here, too: arithmetic on two half-precision channels at once, one instruction for both.
"""

from typing import Literal

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


def permute_weight(weight: Tensor, side: Literal["operand", "result"] = "operand", block: int | None = None) -> Tensor:
    """Copy a weight (O, K, C) to the order of the product, for `to_operand` or for `from_result`.

    Args:
        weight: any strides; C is a multiple of the block.
        side: "operand" where the product sums over the channels, "result" where they are its columns.
        block: channels of a gathered tile, by default `block_channels`; fewer where a thread loads fewer at once.
    """
    out_channels, taps, channels = weight.shape
    block = block or block_channels(weight.dtype)
    together = 1 if side == "operand" and weight.dtype == torch.float32 else 2  # channels that stay side by side
    by_thread = weight.reshape(out_channels, taps, channels // block, 4, block // 4 // together, together)
    return by_thread.transpose(3, 4).reshape(out_channels, taps, channels)


def round_weight(weight: Tensor) -> Tensor:
    """Return a float32 weight rounded to TF32, as `arithmetic.round_to_tf32` rounds in a kernel."""
    bits = weight.view(torch.int32)
    rounded = (bits + 0x1000) & -0x2000
    return torch.where(weight.isnan(), bits, rounded).view(torch.float32)


@triton.jit
def product_row(row, BLOCK_P: tl.constexpr, WARPS: tl.constexpr):
    """Return which row of a product of BLOCK_P rows the gathered row `row` is."""
    lane = row % 8
    warp = row // 8 % WARPS
    register = row // (8 * WARPS)
    return (register // 2 * WARPS + warp) * 16 + register % 2 * 8 + lane


@triton.jit
def to_operand(tile, WARPS: tl.constexpr):
    """Rename a gathered tile (BLOCK_P, one block of channels) to rows and columns of a product's left operand."""
    BLOCK_P: tl.constexpr = tile.shape[0]
    BLOCK_C: tl.constexpr = tile.shape[1]
    WORD: tl.constexpr = 32 // tile.dtype.primitive_bitwidth
    tile = tl.reshape(tile, (BLOCK_P // (16 * WARPS), 2, WARPS, 8, QUARTERS, BLOCK_C // (QUARTERS * WORD), WORD))
    tile = tl.permute(tile, (0, 2, 1, 3, 5, 4, 6))
    return tl.reshape(tile, (BLOCK_P, BLOCK_C))


@triton.jit
def from_result(tile, WARPS: tl.constexpr):
    """Rename a product's result (BLOCK_P, one block of channels) to the rows and channels of a gathered tile.

    The block is that of the gathered channels: 32 columns beside half precision, 16 beside float32.
    """
    BLOCK_P: tl.constexpr = tile.shape[0]
    BLOCK_C: tl.constexpr = tile.shape[1]
    tile = tl.reshape(tile, (BLOCK_P // (16 * WARPS), WARPS, 2, 8, BLOCK_C // (QUARTERS * 2), QUARTERS, 2))
    tile = tl.permute(tile, (0, 2, 1, 3, 5, 4, 6))
    return tl.reshape(tile, (BLOCK_P, BLOCK_C))


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

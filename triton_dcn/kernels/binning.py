"""Bins: for every tile of input pixels, the samples whose cells touch it.

Receives the cells of the samples. Hands the entries of all bins on to `grad_input`.

A bin belongs to one (image, offset group, tile, tap), and bins are numbered in that order. Each lists its samples as
entries `tap * M + position`; a place in the list of all entries is a slot. A sample enters the bin of every tile that
has one of its corners, one to four tiles, so that the gradient of a tile needs only its own bins. There is memory for
four entries of each sample, so that the host need not read how many there are.

There are two ways to the same bins. With keys and a stable sort, the entries of a bin are in the order of the samples,
and sums along a bin are reproducible bit by bit. The other way counts with integer atomics, takes a cumulative sum and
fills the bins by more atomics; it moves fewer bytes, but the hardware decides the order inside a bin.

Letters, names and sample arrays: see `sampling`.
"""

import triton
import triton.language as tl

from triton_dcn.kernels.jit import kernel


@triton.jit
def cell_origin(cell, pixel, width):
    """Return y and x of the top left corner of each cell, -1 where it is outside.

    Args:
        cell: of the samples, (n,) int32.
        pixel: (n,), index of each cell's pixel within its image.
        width: of the image.
    """
    y = pixel // width
    x = pixel - y * width
    return tl.where((cell & 8) != 0, y, -1), tl.where((cell & 2) != 0, x, -1)


@triton.jit
def entry_bin(
    cell,
    y,
    x,
    image_group,
    tap,
    tiles_y,
    tiles_x,
    DY: tl.constexpr,
    DX: tl.constexpr,
    TAPS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    """Return the bin of the entry for corner (DY, DX) of each sample, and whether there is such an entry.

    There is none for a corner outside the image, nor for one in the same tile as an earlier corner.

    Args:
        y, x: of the top left corner, from `cell_origin`.
        image_group: image * D + offset group.
    """
    live_y = (cell & (4 if DY else 8)) != 0
    live_x = (cell & (1 if DX else 2)) != 0
    if DY == 1:
        live_y = live_y & ((y < 0) | ((y + 1) % TILE_H == 0))
    if DX == 1:
        live_x = live_x & ((x < 0) | ((x + 1) % TILE_W == 0))
    tile_y = tl.maximum(y + DY, 0) // TILE_H
    tile_x = tl.maximum(x + DX, 0) // TILE_W
    return ((image_group * tiles_y + tile_y) * tiles_x + tile_x) * TAPS + tap, live_y & live_x


@kernel
def bin_kernel(
    cell_ptr,
    key_ptr,
    count_ptr,
    entry_ptr,
    samples,
    positions,
    height,
    width,
    tiles_y,
    tiles_x,
    bins,
    OFFSET_GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    PASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Run one pass over the samples: "keys" for the stable sort, or "count" and later "fill".

    Grid: (ceil(D*K*M / BLOCK),); a program owns BLOCK samples.
    Reads: cell (D*K, M).
    Writes: keys: key (D*K, M, 4), the bin of every possible entry or `bins` for none, in full. count: count (bins,) by
        integer atomics. fill: entry (4*D*K*M,) at slots that integer atomics take from count, which holds the first
        slot of every bin at the beginning.
    """
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live_sample = sample < samples
    plane = sample // positions
    cell = tl.load(cell_ptr + sample, mask=live_sample, other=0)
    image = (cell >> 4) // (height * width)
    y, x = cell_origin(cell, (cell >> 4) - image * (height * width), width)
    image_group = image * OFFSET_GROUPS + plane // TAPS
    tap = plane % TAPS

    for corner in tl.static_range(4):
        bin, live = entry_bin(
            cell, y, x, image_group, tap, tiles_y, tiles_x, corner // 2, corner % 2, TAPS, TILE_H, TILE_W
        )
        live = live & live_sample
        if PASS == "keys":
            tl.store(key_ptr + sample * 4 + corner, tl.where(live, bin, bins), mask=live_sample)
        elif PASS == "count":
            tl.atomic_add(count_ptr + bin, 1, mask=live, sem="relaxed")
        else:
            slot = tl.atomic_add(count_ptr + bin, 1, mask=live, sem="relaxed")
            tl.store(entry_ptr + slot, sample - plane // TAPS * (TAPS * positions), mask=live)

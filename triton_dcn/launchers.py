"""One function per kernel: allocate, choose the tile, compute the grid, call.

Sizes of zero never reach a kernel. Letters: see `triton_dcn.kernels.sampling`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triton_dcn import tile_table
from triton_dcn.geometry import ConvGeometry
from triton_dcn.kernels.binning import bin_kernel
from triton_dcn.kernels.columns import columns_kernel
from triton_dcn.kernels.forward import forward_prefetch_kernel, forward_transposed_kernel
from triton_dcn.kernels.grad_input import g_form_kernel, t_columns_kernel
from triton_dcn.kernels.grad_sample import grad_sample_fused_kernel, grad_sample_kernel
from triton_dcn.kernels.sampling import PAIRS, sampling_kernel

FORWARD_KERNELS = {"forward_prefetch": forward_prefetch_kernel, "forward_transposed": forward_transposed_kernel}


class SampleArrays(NamedTuple):
    """The sample arrays of a slice of images, each (D*K, M); see `triton_dcn.kernels.sampling`."""

    cell: Tensor
    ly: Tensor
    lx: Tensor
    scale: Tensor


class Bins(NamedTuple):
    """Samples by tile of input pixels; see `triton_dcn.kernels.binning`."""

    start: Tensor
    entry: Tensor


def sample(geom: ConvGeometry, offset: Tensor, mask: Tensor | None, mask_logits: bool) -> SampleArrays:
    """Launch `sampling_kernel`."""
    positions, count = geom.batch * geom.positions, geom.offset_groups * geom.taps
    samples = SampleArrays(
        offset.new_empty(count, positions, dtype=torch.int32),
        *(offset.new_empty(count, positions, dtype=torch.float32) for _ in range(3)),
    )
    tile, any_mask = tile_for("sampling", geom, offset), offset if mask is None else mask
    sampling_kernel[(_cdiv(count * positions, tile.block_p),)](
        offset, any_mask, *samples, count * positions, positions, geom.out_height, geom.out_width,
        geom.height, geom.width, geom.kernel[1], *offset.stride(), *any_mask.stride(),
        *geom.stride, *geom.padding, *geom.dilation,
        TAPS=geom.taps, HAS_MASK=mask is not None, MASK_LOGITS=mask_logits,
        BLOCK=tile.block_p, **tile.options,
    )  # fmt: skip
    return samples


def columns(geom: ConvGeometry, x: Tensor, samples: SampleArrays, first: int, rows: int) -> Tensor:
    """Launch `columns_kernel` for `rows` positions from `first` on: (G, rows, K*C/G)."""
    buffer = x.new_empty(geom.groups, rows, geom.taps * geom.in_channels // geom.groups)
    tile = tile_for("columns", geom, x)
    columns_kernel[(_cdiv(rows, tile.block_p) * geom.offset_groups * geom.taps,)](
        _words(geom, x), *samples, buffer, geom.batch * geom.positions, first, rows, geom.width,
        CHANNELS=geom.in_channels, GROUPS=geom.groups, OFFSET_GROUPS=geom.offset_groups, TAPS=geom.taps,
        BLOCK_P=tile.block_p, BLOCK_C=tile.block_c, **tile.options,
    )  # fmt: skip
    return buffer


def forward_fused(
    geom: ConvGeometry,
    row: tile_table.TileRow,
    x: Tensor,
    samples: SampleArrays,
    w: Tensor,
    bias: Tensor | None,
    output: Tensor,
    relu: bool,
) -> None:
    """Fill `output` (M, O) by the forward kernel of the table's row."""
    positions, tile = geom.batch * geom.positions, row.tile
    pixels = _words(geom, x) if row.kernel in tile_table.WORD_KERNELS else x
    FORWARD_KERNELS[row.kernel][(_cdiv(positions, tile.block_p) * (geom.out_channels // tile.block_o),)](
        pixels, *samples, w, w if bias is None else bias, output,
        positions, geom.out_height, geom.out_width, geom.width,
        CHANNELS=geom.in_channels, OUT_CHANNELS=geom.out_channels, OFFSET_GROUPS=geom.offset_groups, TAPS=geom.taps,
        HAS_BIAS=bias is not None, RELU=relu, STRIP=tile_table.strip(geom.out_width), PRECISION=_precision(x),
        BLOCK_P=tile.block_p, BLOCK_O=tile.block_o, BLOCK_C=tile.block_c, **tile.options,
    )  # fmt: skip


def grad_sample_fused(
    geom: ConvGeometry,
    row: tile_table.TileRow,
    grad: Tensor,
    x: Tensor,
    samples: SampleArrays,
    w: Tensor,
    grad_offset: Tensor | None,
    grad_mask: Tensor | None,
    mask_logits: bool,
) -> None:
    """Launch `grad_sample_fused_kernel`: fill grad_offset and grad_mask from grad_output."""
    positions, tile = geom.batch * geom.positions, row.tile
    grad_sample_fused_kernel[(_cdiv(positions, tile.block_p) * geom.offset_groups * geom.taps,)](
        grad, _words(geom, x), *samples, w, *_sample_outputs(samples, grad_offset, grad_mask),
        positions, geom.out_height, geom.out_width, geom.width, *_batch_strides(grad_offset, grad_mask),
        CHANNELS=geom.in_channels, OUT_CHANNELS=geom.out_channels, OFFSET_GROUPS=geom.offset_groups, TAPS=geom.taps,
        WANT_OFFSET=grad_offset is not None, WANT_MASK=grad_mask is not None, MASK_LOGITS=mask_logits,
        STRIP=tile_table.strip(geom.out_width), PRECISION=_precision(x),
        BLOCK_P=tile.block_p, BLOCK_O=tile.block_o, BLOCK_C=tile.block_c, **tile.options,
    )  # fmt: skip


def grad_sample(
    geom: ConvGeometry,
    grad_columns: Tensor,
    x: Tensor,
    samples: SampleArrays,
    first: int,
    grad_offset: Tensor | None,
    grad_mask: Tensor | None,
    mask_logits: bool,
) -> None:
    """Launch `grad_sample_kernel`: grad_offset and grad_mask of the positions that `grad_columns` is for."""
    rows, tile = grad_columns.shape[1], tile_for("grad_sample", geom, x)
    grad_sample_kernel[(_cdiv(rows, tile.block_p) * geom.offset_groups * geom.taps,)](
        grad_columns, _words(geom, x), *samples, *_sample_outputs(samples, grad_offset, grad_mask),
        geom.batch * geom.positions, first, rows, geom.positions, geom.width, *_batch_strides(grad_offset, grad_mask),
        CHANNELS=geom.in_channels, GROUPS=geom.groups, OFFSET_GROUPS=geom.offset_groups, TAPS=geom.taps,
        WANT_OFFSET=grad_offset is not None, WANT_MASK=grad_mask is not None, MASK_LOGITS=mask_logits,
        BLOCK_P=tile.block_p, BLOCK_C=tile.block_c, **tile.options,
    )  # fmt: skip


def bins_by() -> str:
    """How samples are sorted into bins: by a stable "sort" if determinism is asked for, else by "ranks" of atomics."""
    return "sort" if torch.are_deterministic_algorithms_enabled() else "ranks"


def bin_samples(geom: ConvGeometry, samples: SampleArrays) -> Bins:
    """Sort the samples into bins, see `bins_by`."""
    positions, tile = geom.batch * geom.positions, tile_for("bins", geom, samples.scale)
    tiles = input_tiles(geom)
    bins = geom.batch * geom.offset_groups * tiles[0] * tiles[1] * geom.taps
    cell = samples.cell
    entries = 4 * cell.numel()

    def run(stage: str, key: Tensor, counts: Tensor, start: Tensor, entry: Tensor) -> None:
        bin_kernel[(_cdiv(cell.numel(), tile.block_p),)](
            cell, key, counts, start, entry, cell.numel(), positions, geom.height, geom.width, *tiles, bins,
            OFFSET_GROUPS=geom.offset_groups, TAPS=geom.taps, TILE_H=tile_table.TILE_H, TILE_W=tile_table.TILE_W,
            PASS=stage, BLOCK=tile.block_p, **tile.options,
        )  # fmt: skip

    if bins_by() == "sort":
        key = cell.new_empty(entries)
        run("keys", key, key, key, key)
        key, order = torch.sort(key, stable=True)
        start = torch.searchsorted(key, torch.arange(bins + 1, device=cell.device, dtype=torch.int32), out_int32=True)
        return Bins(start, (order // 4 % (geom.taps * positions)).to(torch.int32))
    counts = cell.new_zeros(bins + 1)
    run("count", cell, counts, cell, cell)
    start = counts.cumsum(0, dtype=torch.int32) - counts
    entry = cell.new_empty(entries)
    run("fill", cell, counts.zero_(), start, entry)
    return Bins(start, entry)


def t_columns(
    geom: ConvGeometry,
    grad: Tensor,
    samples: SampleArrays,
    bins: Bins,
    image: int,
    images: int,
    tile_row: int,
    tile_rows: int,
) -> tuple[Tensor, int]:
    """Launch `t_columns_kernel` for some rows of tiles of some images.

    Returns:
        T (G, rows, K*O/G) and the first of the `rows` input pixels it is for.
    """
    tiles = input_tiles(geom)
    tile = tile_for("t_columns", geom, grad)
    first = (image * geom.height + tile_row * tile_table.TILE_H) * geom.width
    rows = images * geom.width * min(geom.height - tile_row * tile_table.TILE_H, tile_rows * tile_table.TILE_H)
    t = grad.new_empty(geom.groups, rows, geom.taps * geom.out_channels // geom.groups)
    blocks = _cdiv(geom.out_channels, tile.block_o)
    t_columns_kernel[(images * tile_rows * tiles[1] * geom.taps * blocks,)](
        grad, *samples, *bins, t, geom.batch * geom.positions, geom.height, geom.width, *tiles,
        image, tile_row, tile_rows, first, rows,
        OUT_CHANNELS=geom.out_channels, GROUPS=geom.groups, TAPS=geom.taps,
        TILE_H=tile_table.TILE_H, TILE_W=tile_table.TILE_W, PRECISION=_precision(grad),
        BLOCK_S=tile.block_p, BLOCK_O=tile.block_o, **tile.options,
    )  # fmt: skip
    return t, first


def g_form(
    geom: ConvGeometry, grad_columns: Tensor, samples: SampleArrays, bins: Bins, first: int, grad_x: Tensor
) -> None:
    """Launch `g_form_kernel`: fill grad_x (B, H, W, C) from the column gradients of the positions from `first` on.

    Column gradients of later positions, `first` above 0, add to what the earlier ones have filled.
    """
    tiles = input_tiles(geom)
    tile, rows = tile_for("g_form", geom, grad_columns), grad_columns.shape[1]
    blocks = _cdiv(geom.in_channels // geom.offset_groups, tile.block_c)
    g_form_kernel[(geom.batch * geom.offset_groups * tiles[0] * tiles[1] * blocks,)](
        grad_columns, *samples, *bins, grad_x, geom.batch * geom.positions, first, rows,
        geom.height, geom.width, *tiles,
        CHANNELS=geom.in_channels, GROUPS=geom.groups, OFFSET_GROUPS=geom.offset_groups, TAPS=geom.taps,
        TILE_H=tile_table.TILE_H, TILE_W=tile_table.TILE_W, PART=rows < geom.batch * geom.positions,
        ADD=first > 0, PRECISION=_precision(grad_columns),
        BLOCK_S=tile.block_p, BLOCK_C=tile.block_c, **tile.options,
    )  # fmt: skip


def input_tiles(geom: ConvGeometry) -> tuple[int, int]:
    """Return the rows and columns of tiles of one image."""
    return _cdiv(geom.height, tile_table.TILE_H), _cdiv(geom.width, tile_table.TILE_W)


def row_for(stage: str, geom: ConvGeometry, x: Tensor) -> tile_table.TileRow | None:
    """Return the table's row for `stage`, or None where the stage has no kernel for these sizes."""
    if stage in tile_table.EXACT_STAGES and geom.groups > 1:
        return None
    arch, kind = tile_table.architecture(x.device), tile_table.arithmetic(x)
    return tile_table.choose(stage, arch, kind, geom.in_channels // geom.offset_groups, geom.out_channels)


def tile_for(stage: str, geom: ConvGeometry, x: Tensor) -> tile_table.Tile:
    """Return the tile for `stage`, one of those that have a kernel for all sizes."""
    row = row_for(stage, geom, x)
    assert row is not None, stage
    return row.tile


def _words(geom: ConvGeometry, x: Tensor) -> Tensor:
    """View bfloat16 (B, H, W, C) as int32 (B*H*W*C/2,) where pairs of channels allow it; see `sampling.widen`."""
    if not PAIRS or x.dtype != torch.bfloat16 or geom.in_channels // geom.offset_groups % 2:
        return x
    aligned = x.data_ptr() % 4 == 0 and x.storage_offset() % 2 == 0
    return x.view(-1).view(torch.int32) if aligned else x  # flat, for the strides of sizes of 1 need not be even


def _cdiv(count: int, block: int) -> int:
    """Return the blocks that cover `count`; triton.cdiv may be called in kernels, too, and takes 3 us."""
    return -(-count // block)


def _precision(x: Tensor) -> str:
    return tile_table.precision(tile_table.architecture(x.device), tile_table.arithmetic(x))


def _sample_outputs(
    samples: SampleArrays, grad_offset: Tensor | None, grad_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return both, an unused one replaced by a tensor that is there."""
    return (
        samples.scale if grad_offset is None else grad_offset,
        samples.scale if grad_mask is None else grad_mask,
    )


def _batch_strides(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.stride(0) for tensor in tensors)

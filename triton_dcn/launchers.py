"""One function per kernel: allocate what it writes, find its tile, compute the grid, launch.

Receives channels-last tensors of one slice of images from `triton_backend`: the input `x` (B, H, W, C), the weight `w`
(O, K, C/G), grad_output `grad` (M, O). Hands pointers and sizes to `kernels`. No size is zero here.

Letters: see `triton_dcn.kernels.sampling`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triton_dcn.geometry import ConvGeometry
from triton_dcn.kernels.binning import bin_kernel
from triton_dcn.kernels.columns import columns_kernel
from triton_dcn.kernels.forward import forward_direct_kernel, forward_prefetch_kernel
from triton_dcn.kernels.grad_input import g_form_kernel, t_columns_kernel
from triton_dcn.kernels.grad_sample import grad_sample_fused_kernel, grad_sample_kernel
from triton_dcn.kernels.launch import launch
from triton_dcn.kernels.register_order import block_channels, operand_weight, result_weight, round_weight
from triton_dcn.kernels.sampling import PAIRS, TRITON_VERSION, sampling_kernel
from triton_dcn.offset_mask import OffsetMask, OffsetMaskGrad
from triton_dcn.tile_table import (
    REGISTER_ORDER,
    TF32,
    TILE_W,
    Tile,
    TileRow,
    architecture,
    dot_precision,
    find_tile,
    narrowed,
    strip_width,
)
from triton_dcn.workspace import TileChunk, input_tiles, sample_buffer_shape

FULL_WARPS = 4096
"""With fewer warps, 32 for each of 132 multiprocessors, a launch divides its taps among more programs."""

FORWARD_KERNELS = {
    "forward_direct": forward_direct_kernel,
    "forward_prefetch": forward_prefetch_kernel,
}


class SampleArrays(NamedTuple):
    """Where the samples of a slice of images lie, and their masks: what the kernels read instead of offset and mask.

    `triton_dcn.kernels.sampling` explains the values.

    Attributes:
        cell: (D*K, M) int32, the first existing corner pixel and four flags.
        ly: (D*K, M) float32, y inside the cell.
        lx: (D*K, M) float32, x inside the cell.
        scale: (D*K, M) float32, the mask; 0 outside the image.
    """

    cell: Tensor
    ly: Tensor
    lx: Tensor
    scale: Tensor


class Bins(NamedTuple):
    """Samples by tile of input pixels; see `triton_dcn.kernels.binning`.

    Attributes:
        tile_h: height of the tiles of input pixels.
        start: (bins + 1,) int32, where the entries of each bin begin.
        entry: (4*D*K*M,) int32, the entries of all bins, then unused ones.
    """

    tile_h: int
    start: Tensor
    entry: Tensor


class BinSizes(NamedTuple):
    """The run-time integers of `bin_kernel`, in the order of its parameters.

    Attributes:
        samples: D * K * M.
        positions: M.
        height: of the input.
        width: of the input.
        tiles_y: rows of tiles that cover an image.
        tiles_x: columns of tiles.
        bins: number of bins.
    """

    samples: int
    positions: int
    height: int
    width: int
    tiles_y: int
    tiles_x: int
    bins: int


def sample(geom: ConvGeometry, offset_mask: OffsetMask) -> SampleArrays:
    """Launch `sampling_kernel`: return the sample arrays of a slice of images."""
    buffer = offset_mask.offset.new_empty(sample_buffer_shape(geom), dtype=torch.int32)
    return sample_into(buffer, geom, offset_mask)


def sample_into(buffer: Tensor, geom: ConvGeometry, offset_mask: OffsetMask) -> SampleArrays:
    """Do as `sample` in a buffer of the shape `sample_buffer_shape`."""
    offset = offset_mask.offset
    has_mask = offset_mask.mask is not None
    mask = offset if offset_mask.mask is None else offset_mask.mask  # without a mask, a pointer that is not read
    samples = view_samples(buffer, geom)
    positions = geom.batch * geom.positions
    count = geom.offset_groups * geom.taps * positions
    tile = find_tile("sampling", geom, offset)
    launch(
        sampling_kernel, _cdiv(count, tile.block_p),
        (offset, mask, *samples),
        (count, positions, geom.out_height, geom.out_width,
         geom.height, geom.width, geom.kernel[1], *offset.stride(), *mask.stride(),
         *geom.stride, *geom.padding, *geom.dilation),
        TAPS=geom.taps, HAS_MASK=has_mask, MASK_LOGITS=offset_mask.mask_logits,
        BLOCK=tile.block_p, **tile.options,
    )  # fmt: skip
    return samples


def view_samples(buffer: Tensor, geom: ConvGeometry) -> SampleArrays:
    """View a buffer of the shape `sample_buffer_shape` as sample arrays."""
    planes = geom.offset_groups * geom.taps
    positions = geom.batch * geom.positions
    arrays = buffer.as_strided((4, planes, positions), (buffer.shape[1], positions, 1))
    _, ly, lx, scale = arrays.view(torch.float32).unbind()
    return SampleArrays(arrays[0], ly, lx, scale)


def columns(geom: ConvGeometry, x: Tensor, samples: SampleArrays, chunk: slice) -> Tensor:
    """Launch `columns_kernel`: return the columns (G, rows, K*C/G) of a chunk of the positions, dtype of `x`."""
    rows = chunk.stop - chunk.start
    columns = x.new_empty(geom.groups, rows, geom.taps * geom.in_channels // geom.groups)
    per_offset = geom.in_channels // geom.offset_groups
    tile = narrowed(find_tile("columns", geom, x), per_offset)
    blocks = _cdiv(rows * geom.offset_groups, tile.block_p) * _cdiv(per_offset, tile.block_c)
    taps = _taps_per_program(geom, blocks, tile)
    launch(
        columns_kernel, blocks * _cdiv(geom.taps, taps),
        (x, *samples, columns),
        (geom.batch * geom.positions, chunk.start, rows, geom.out_width, geom.width, taps),
        CHANNELS=geom.in_channels, GROUPS=geom.groups, OFFSET_GROUPS=geom.offset_groups, TAPS=geom.taps,
        STRIP=strip_width(geom.out_width), BLOCK_P=tile.block_p, BLOCK_C=tile.block_c,
        BLEND_IN_PAIRS=_blends_in_pairs(x), **tile.options,
    )  # fmt: skip
    return columns


def forward_weight(row: TileRow, weight: Tensor) -> Tensor:
    """Return a weight (O, C, kh, kw) of any strides in tiles, as the kernel of a row of "forward" reads it."""
    w = operand_weight(weight.flatten(2).transpose(1, 2), row.tile.block_c, row.tile.lanes)
    return round_weight(w) if dot_precision(weight) in TF32 else w


def forward_fused(
    geom: ConvGeometry,
    row: TileRow,
    x: Tensor,
    samples: SampleArrays,
    w: Tensor,
    bias: Tensor | None,
    output: Tensor,
    relu: bool,
) -> None:
    """Launch the forward kernel of the table's row: fill `output` (M, O). `w` comes from `forward_weight`.

    Half-precision channels are blended in pairs, rounding after every product; where the user asks for determinism, in
    float32.
    """
    tile = row.tile
    options = tile.options
    in_pairs = _blends_in_pairs(x)
    if x.dtype != torch.float32 and not in_pairs:
        options = {"num_warps": tile.num_warps}  # float32 needs more registers
    has_bias = bias is not None
    bias = w if bias is None else bias  # without a bias, a pointer that is not read
    positions = geom.batch * geom.positions
    launch(
        FORWARD_KERNELS[row.kernel], _cdiv(positions, tile.block_p) * (geom.out_channels // tile.block_o),
        (x, *samples, w, bias, output),
        (positions, geom.out_height, geom.out_width, geom.width),
        CHANNELS=geom.in_channels, OUT_CHANNELS=geom.out_channels, OFFSET_GROUPS=geom.offset_groups, TAPS=geom.taps,
        HAS_BIAS=has_bias, RELU=relu, STRIP=strip_width(geom.out_width), PRECISION=dot_precision(x),
        BLOCK_P=tile.block_p, BLOCK_O=tile.block_o, BLOCK_C=tile.block_c,
        WARPS=tile.num_warps, LANES=tile.lanes, BLEND_IN_PAIRS=in_pairs, **options,
    )  # fmt: skip


def grad_sample_weight(row: TileRow, w: Tensor) -> Tensor:
    """Return a weight (O, K, C) as the kernel of a row of "grad_sample_fused" reads it."""
    if architecture(w.device) not in REGISTER_ORDER:
        return w
    loaded_by_four = row.tile.block_c * 4 // row.tile.lanes
    w = result_weight(w, min(loaded_by_four, block_channels(w.dtype)))
    return round_weight(w) if dot_precision(w) in TF32 else w


def grad_sample_fused(
    geom: ConvGeometry,
    row: TileRow,
    grad: Tensor,
    x: Tensor,
    samples: SampleArrays,
    w: Tensor,
    grad_offset_mask: OffsetMaskGrad,
) -> None:
    """Launch `grad_sample_fused_kernel`: fill the gradients of offset and mask from grad_output.

    `w` comes from `grad_sample_weight`.
    """
    tile = row.tile
    warps_in_order = tile.num_warps if architecture(x.device) in REGISTER_ORDER else 0
    positions = geom.batch * geom.positions
    blocks = _cdiv(positions, tile.block_p) * min(geom.offset_groups, geom.in_channels // tile.block_c)
    taps = _taps_per_program(geom, blocks, tile)
    launch(
        grad_sample_fused_kernel, blocks * _cdiv(geom.taps, taps),
        (grad, _words(geom, x), *samples, w, *_gradient_tensors(grad_offset_mask, samples)),
        (positions, geom.out_height, geom.out_width, geom.width, taps, *_gradient_batch_strides(grad_offset_mask)),
        CHANNELS=geom.in_channels, OUT_CHANNELS=geom.out_channels, OFFSET_GROUPS=geom.offset_groups, TAPS=geom.taps,
        **_gradient_flags(grad_offset_mask), STRIP=strip_width(geom.out_width), PRECISION=dot_precision(x),
        BLOCK_P=tile.block_p, BLOCK_O=tile.block_o, BLOCK_C=tile.block_c, WARPS=warps_in_order,
        LANES=tile.lanes, **tile.options,
    )  # fmt: skip


def grad_sample(
    geom: ConvGeometry,
    grad_columns: Tensor,
    x: Tensor,
    samples: SampleArrays,
    chunk: slice,
    grad_offset_mask: OffsetMaskGrad,
    *,
    write_columns: bool = False,
) -> None:
    """Launch `grad_sample_kernel`: fill the gradients of offset and mask of a chunk of the positions.

    Args:
        geom: of the slice.
        grad_columns: the column gradients of the chunk, (G, rows, K*C/G), contiguous.
        x: the input.
        samples: of the slice.
        chunk: of the positions.
        grad_offset_mask: written for the positions of the chunk.
        write_columns: leave the columns of the chunk in `grad_columns`, in place of the column gradients.
    """
    rows = chunk.stop - chunk.start
    tile = narrowed(find_tile("grad_sample", geom, x), geom.in_channels // geom.offset_groups)
    blocks = _cdiv(rows * geom.offset_groups, tile.block_p)
    taps = _taps_per_program(geom, blocks, tile)
    launch(
        grad_sample_kernel, blocks * _cdiv(geom.taps, taps),
        (grad_columns, _words(geom, x), *samples, *_gradient_tensors(grad_offset_mask, samples)),
        (geom.batch * geom.positions, chunk.start, rows, geom.out_width, geom.positions, geom.width, taps,
         *_gradient_batch_strides(grad_offset_mask)),
        CHANNELS=geom.in_channels, GROUPS=geom.groups, OFFSET_GROUPS=geom.offset_groups, TAPS=geom.taps,
        **_gradient_flags(grad_offset_mask), WRITE_COLUMNS=write_columns, STRIP=strip_width(geom.out_width),
        BLOCK_P=tile.block_p, BLOCK_C=tile.block_c, **tile.options,
    )  # fmt: skip


def binning_method() -> str:
    """Return how samples get into bins: by a stable "sort" if the user asks for determinism, else by "ranks"."""
    return "sort" if torch.are_deterministic_algorithms_enabled() else "ranks"


def bin_samples(geom: ConvGeometry, samples: SampleArrays, tile_h: int) -> Bins:
    """Put the samples into the bins of tiles that are `tile_h` pixels high, by the `binning_method`."""
    if binning_method() == "sort":
        return _bins_by_sort(geom, samples.cell, tile_h)
    return _bins_by_ranks(geom, samples.cell, tile_h)


def _bins_by_sort(geom: ConvGeometry, cell: Tensor, tile_h: int) -> Bins:
    """Sort the bin numbers of all possible entries, four of each sample; the order in a bin is that of the samples."""
    sizes = _bin_sizes(geom, tile_h)
    key = cell.new_empty(4 * sizes.samples)
    _bin_pass("keys", geom, tile_h, sizes, find_tile("bins", geom, cell), cell=cell, key=key)
    key, order = torch.sort(key, stable=True)
    bin_numbers = torch.arange(sizes.bins + 1, device=cell.device, dtype=torch.int32)
    start = torch.searchsorted(key, bin_numbers, out_int32=True)
    # 4 * sample + corner -> tap * M + position
    entry = order // 4 % (geom.taps * geom.batch * geom.positions)
    return Bins(tile_h, start, entry.to(torch.int32))


def _bins_by_ranks(geom: ConvGeometry, cell: Tensor, tile_h: int) -> Bins:
    """Count the entries of every bin, then fill the bins; the order in a bin is that of the atomics."""
    sizes = _bin_sizes(geom, tile_h)
    tile = find_tile("bins", geom, cell)
    count = cell.new_zeros(sizes.bins + 1)
    _bin_pass("count", geom, tile_h, sizes, tile, cell=cell, count=count)
    start = count.cumsum(0, dtype=torch.int32) - count
    entry = cell.new_empty(4 * sizes.samples)
    _bin_pass("fill", geom, tile_h, sizes, tile, cell=cell, count=start.clone(), entry=entry)
    return Bins(tile_h, start, entry)


def _bin_sizes(geom: ConvGeometry, tile_h: int) -> BinSizes:
    positions = geom.batch * geom.positions
    planes = geom.offset_groups * geom.taps
    tiles_y, tiles_x = input_tiles(geom, tile_h)
    bins = geom.batch * tiles_y * tiles_x * planes
    return BinSizes(planes * positions, positions, geom.height, geom.width, tiles_y, tiles_x, bins)


def _bin_pass(
    name: str,
    geom: ConvGeometry,
    tile_h: int,
    sizes: BinSizes,
    tile: Tile,
    *,
    cell: Tensor,
    key: Tensor | None = None,
    count: Tensor | None = None,
    entry: Tensor | None = None,
) -> None:
    """Launch `bin_kernel` for one of its passes, with the tensors that this pass reads or writes."""
    # without a tensor, a pointer that is not used
    key = cell if key is None else key
    count = cell if count is None else count
    entry = cell if entry is None else entry
    launch(
        bin_kernel, _cdiv(sizes.samples, tile.block_p),
        (cell, key, count, entry),
        sizes,
        OFFSET_GROUPS=geom.offset_groups, TAPS=geom.taps, TILE_H=tile_h, TILE_W=TILE_W,
        PASS=name, BLOCK=tile.block_p, **tile.options,
    )  # fmt: skip


def t_columns(
    geom: ConvGeometry, grad: Tensor, samples: SampleArrays, bins: Bins, tiles: TileChunk
) -> tuple[Tensor, slice]:
    """Launch `t_columns_kernel` for a chunk of the input tiles.

    Returns:
        T (G, rows, K*O/G), dtype of `grad`, and the input pixels of its rows, counted over all images of the slice.
    """
    first_y = tiles.tile_row * bins.tile_h
    height = min(geom.height - first_y, tiles.tile_rows * bins.tile_h)
    first_pixel = (tiles.image * geom.height + first_y) * geom.width
    rows = tiles.images * height * geom.width
    t = grad.new_empty(geom.groups, rows, geom.taps * geom.out_channels // geom.groups)

    tiles_y, tiles_x = input_tiles(geom, bins.tile_h)
    tile = find_tile("t_columns", geom, grad)
    blocks = _cdiv(geom.out_channels, tile.block_o)
    launch(
        t_columns_kernel, tiles.images * tiles.tile_rows * tiles_x * geom.taps * blocks,
        (grad, *samples, bins.start, bins.entry, t),
        (geom.batch * geom.positions, geom.height, geom.width, tiles_y, tiles_x,
         tiles.image, tiles.tile_row, tiles.tile_rows, first_pixel, rows),
        OUT_CHANNELS=geom.out_channels, GROUPS=geom.groups, TAPS=geom.taps,
        TILE_H=bins.tile_h, TILE_W=TILE_W, PRECISION=dot_precision(grad),
        BLOCK_S=tile.block_p, BLOCK_O=tile.block_o, **tile.options,
    )  # fmt: skip
    return t, slice(first_pixel, first_pixel + rows)


def g_form(
    geom: ConvGeometry, grad_columns: Tensor, samples: SampleArrays, bins: Bins, chunk: slice, grad_input: Tensor
) -> None:
    """Launch `g_form_kernel`: fill grad_input (B, H, W, C) from the column gradients of a chunk of the positions.

    The first chunk writes grad_input in full, the later ones add to it.
    """
    rows = chunk.stop - chunk.start
    positions = geom.batch * geom.positions
    tiles_y, tiles_x = input_tiles(geom, bins.tile_h)
    tile = find_tile("g_form", geom, grad_columns)
    per_offset = geom.in_channels // geom.offset_groups
    # columns of a matrix instruction; before 3.3, Triton wanted 16 of every product
    narrowest = 16 if torch.version.hip or TRITON_VERSION < (3, 3) else 8
    block_c = min(tile.block_c, max(narrowest, _next_power_of_2(per_offset)))
    blocks = _cdiv(per_offset, block_c)
    launch(
        g_form_kernel, geom.batch * geom.offset_groups * tiles_y * tiles_x * blocks,
        (grad_columns, *samples, bins.start, bins.entry, grad_input),
        (positions, chunk.start, rows, geom.height, geom.width, tiles_y, tiles_x),
        CHANNELS=geom.in_channels, GROUPS=geom.groups, OFFSET_GROUPS=geom.offset_groups, TAPS=geom.taps,
        TILE_H=bins.tile_h, TILE_W=TILE_W, PART=rows < positions, ADD=chunk.start > 0,
        PRECISION=dot_precision(grad_columns),
        BLOCK_S=tile.block_p, BLOCK_C=block_c, **tile.options,
    )  # fmt: skip


def _words(geom: ConvGeometry, x: Tensor) -> Tensor:
    """View bfloat16 (B, H, W, C) as int32 (B*H*W*C/2,) where pairs of channels allow it; see `sampling.widen`."""
    if not PAIRS or x.dtype != torch.bfloat16 or geom.in_channels // geom.offset_groups % 2:
        return x
    aligned = x.data_ptr() % 4 == 0 and x.storage_offset() % 2 == 0
    return x.view(-1).view(torch.int32) if aligned else x  # flat: a dimension of size 1 may have an odd stride


def _cdiv(count: int, block: int) -> int:
    """Return how many blocks cover `count`. A call of triton.cdiv on the host takes 3 us."""
    return -(-count // block)


def _next_power_of_2(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _blends_in_pairs(x: Tensor) -> bool:
    """Tell whether two channels are blended by one instruction, rounding after every product; not in float32.

    Where the user asks for determinism, blending is in float32 as well, and the result rounded once.
    """
    nvidia = torch.version.hip is None  # the instruction is one of NVIDIA's
    return nvidia and x.dtype != torch.float32 and not torch.are_deterministic_algorithms_enabled()


def _taps_per_program(geom: ConvGeometry, blocks: int, tile: Tile) -> int:
    """Return how many taps a program walks through: all, or fewer where `blocks` programs are too few for a GPU."""
    parts = min(geom.taps, _cdiv(FULL_WARPS, blocks * tile.num_warps))
    return _cdiv(geom.taps, parts)


def _gradient_tensors(grads: OffsetMaskGrad, samples: SampleArrays) -> tuple[Tensor, Tensor]:
    """Return the tensors to fill; for a gradient that is not needed, a pointer that is not used."""
    grad_offset = samples.scale if grads.offset is None else grads.offset
    grad_mask = samples.scale if grads.mask is None else grads.mask
    return grad_offset, grad_mask


def _gradient_batch_strides(grads: OffsetMaskGrad) -> tuple[int, int]:
    offset_stride = 0 if grads.offset is None else grads.offset.stride(0)
    mask_stride = 0 if grads.mask is None else grads.mask.stride(0)
    return offset_stride, mask_stride


def _gradient_flags(grads: OffsetMaskGrad) -> dict[str, bool]:
    return {
        "WANT_OFFSET": grads.offset is not None,
        "WANT_MASK": grads.mask is not None,
        "MASK_LOGITS": grads.mask_logits,
    }

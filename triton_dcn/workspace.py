"""How `triton_backend` divides its work, so that indices fit in 32 bits and buffers in a bounded workspace.

Receives the geometry of a call. Hands back slices of images, and within one of them chunks of output positions or of
input tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from triton_dcn.geometry import ConvGeometry, even_slices
from triton_dcn.tile_table import T_TILE_H, TILE_W

WORKSPACE_BYTES = 128 << 20
"""The most that one chunk of columns, of column gradients or of T may take."""
MAX_PIXELS = 1 << 27
"""Input pixels of the images in one slice: a pixel index shares 32 bits with four flags."""
MAX_SAMPLES = 1 << 29
"""Samples of the images in one slice: a sample has up to four entries in the bins, which are counted in 32 bits."""
KEPT_SAMPLE_BYTES = 64 << 20
"""The most that the sample arrays of a call may take which are kept for its backward pass."""
SAMPLE_BYTES = {"arrays": 16, "ranks": 32, "sort": 160}
"""Bytes of one sample, by what a slice keeps of it.

"arrays": its sample arrays alone. "ranks": with its entries in the bins. "sort": with what the stable sort of the bins
takes at its peak: the keys and their copy, the order in int64, and the buffers of the sort for both.
"""


class TileChunk(NamedTuple):
    """The input tiles of some images, or of some rows of tiles of one image.

    Attributes:
        image: the first image, counted within the slice.
        images: number of images.
        tile_row: the first row of tiles.
        tile_rows: number of rows of tiles, in each image.
    """

    image: int
    images: int
    tile_row: int
    tile_rows: int


def image_slices(geom: ConvGeometry, kept: str, column_itemsize: int = 0) -> list[tuple[ConvGeometry, slice]]:
    """Return slices of images, each with its geometry, whose indices fit 32 bits and whose buffers fit the workspace.

    They are of nearly the same length. One image is a slice even if its buffers exceed the workspace. Where one slice
    holds all images, its geometry is `geom` itself.

    Args:
        geom: of all images.
        kept: what the slice keeps of each sample, a key of `SAMPLE_BYTES`.
        column_itemsize: bytes of an element of the column gradients from which the G-form computes the gradient of the
            input, 0 without them. They should be one chunk, because each chunk goes through all bins of the slice.

    Raises:
        ValueError: one image has too many pixels or samples.
    """
    pixels = geom.height * geom.width
    samples = geom.positions * geom.offset_groups * geom.taps
    if pixels >= MAX_PIXELS:
        raise _too_many(geom, "pixels", pixels, MAX_PIXELS)
    if samples >= MAX_SAMPLES:
        raise _too_many(geom, "samples", samples, MAX_SAMPLES)

    column_bytes = geom.positions * geom.taps * geom.in_channels * column_itemsize
    bytes_per_image = max(samples * SAMPLE_BYTES[kept], column_bytes)
    images_by_pixels = (MAX_PIXELS - 1) // pixels
    images_by_bytes = WORKSPACE_BYTES // bytes_per_image
    longest = max(1, min(images_by_pixels, images_by_bytes))

    if 0 < geom.batch <= longest:
        return [(geom, slice(0, geom.batch))]
    return [(replace(geom, batch=images.stop - images.start), images) for images in even_slices(geom.batch, longest)]


def keeps_samples(geom: ConvGeometry) -> bool:
    """Tell whether the sample arrays of a forward pass are kept for the backward pass, so that samples come once.

    Then the forward pass has one slice, and so has the backward pass unless its column gradients or a stable sort of
    the bins need more memory; where it has several slices, each computes its own samples.
    """
    samples = geom.batch * geom.positions * geom.offset_groups * geom.taps
    pixels = geom.batch * geom.height * geom.width
    return samples * SAMPLE_BYTES["arrays"] <= KEPT_SAMPLE_BYTES and pixels < MAX_PIXELS


def sample_buffer_shape(geom: ConvGeometry) -> tuple[int, int]:
    """Return the shape of an int32 buffer for four sample arrays, each from a multiple of 16 bytes on.

    int32, because hooks on saved tensors may round floating-point ones, and a cell is an address.
    """
    samples = geom.batch * geom.positions * geom.offset_groups * geom.taps
    return 4, (samples + 3) // 4 * 4


def column_chunks(geom: ConvGeometry, x: Tensor) -> list[slice]:
    """Return chunks of the output positions of all images, whose columns in the dtype of `x` fit the workspace.

    They are of nearly the same length: a short rest would leave most of the GPU idle.
    """
    position_bytes = geom.taps * geom.in_channels * x.element_size()
    return even_slices(geom.batch * geom.positions, max(1, WORKSPACE_BYTES // position_bytes))


def tile_chunks(geom: ConvGeometry, x: Tensor) -> Iterator[TileChunk]:
    """Yield chunks of input tiles whose T in the dtype of `x` fits the workspace: whole images, or rows of one.

    They are of nearly the same size, as those of `column_chunks`.
    """
    rows_per_image, _ = input_tiles(geom, T_TILE_H)
    row_bytes = T_TILE_H * geom.width * geom.taps * geom.out_channels * x.element_size()
    rows_that_fit = max(1, WORKSPACE_BYTES // row_bytes)
    images_that_fit = max(1, rows_that_fit // rows_per_image)

    for images in even_slices(geom.batch, images_that_fit):
        for tile_rows in even_slices(rows_per_image, rows_that_fit):
            yield TileChunk(
                image=images.start,
                images=images.stop - images.start,
                tile_row=tile_rows.start,
                tile_rows=tile_rows.stop - tile_rows.start,
            )


def prefers_t_columns(geom: ConvGeometry, *, needs_samples: bool, fused_samples: bool, needs_weight: bool) -> bool:
    """Tell whether T-columns, not the G-form, should compute the gradient of the input, by what each way moves.

    Both ways are right for one offset group, and both are bound by the elements that they write to memory and read
    back. T has a row for each input pixel, columns have one for each output position:

        T-columns: T is written, read for the gradient of the input, and read once more for that of the weight.
            Gradients of offset and mask, where no fused kernel computes them, need column gradients, written and read.
        G-form: column gradients are written, read for the gradient of the input, and read for those of offset and mask.
            Columns for the gradient of the weight are written and read.

    With a stride of 2, or with many more output than input channels, columns are the smaller ones. Where both ways move
    the same, the G-form has one product less: that of the column gradients serves all gradients.

    Args:
        geom: of the call, or of a part of its images.
        needs_samples: whether gradients of offset or mask are needed.
        fused_samples: whether a fused kernel computes them, without column gradients in memory.
        needs_weight: whether the gradient of the weight is needed.
    """
    if geom.offset_groups > 1:
        return False
    t_elements = geom.height * geom.width * geom.out_channels
    column_elements = geom.positions * geom.in_channels
    t_moved = (2 + needs_weight) * t_elements
    if needs_samples and not fused_samples:
        t_moved += 2 * column_elements
    g_moved = (2 + needs_samples + 2 * needs_weight) * column_elements
    return t_moved < g_moved


def input_tiles(geom: ConvGeometry, tile_h: int) -> tuple[int, int]:
    """Return how many rows and columns of tiles, `tile_h` pixels high, cover one image of the input."""
    return -(-geom.height // tile_h), -(-geom.width // TILE_W)


def _too_many(geom: ConvGeometry, unit: str, count: int, limit: int) -> ValueError:
    return ValueError(
        f"input: expected fewer than {limit} {unit} an image, got {count} from {geom.height}x{geom.width}"
    )

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
from triton_dcn.tile_table import TILE_H, TILE_W

WORKSPACE_BYTES = 128 << 20
"""The most that one chunk of columns, of column gradients or of T may take."""
MAX_PIXELS = 1 << 27
"""Input pixels of the images in one slice: a pixel index shares 32 bits with four flags."""
MAX_SAMPLES = 1 << 29
"""Samples of the images in one slice: a sample has up to four entries in the bins, which are counted in 32 bits."""
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


def image_slices(geom: ConvGeometry, kept: str) -> Iterator[tuple[ConvGeometry, slice]]:
    """Yield slices of images, each with its geometry, whose indices fit 32 bits and whose buffers fit the workspace.

    They are of nearly the same length. One image is a slice even if its buffers exceed the workspace.

    Args:
        geom: of all images.
        kept: what the slice keeps of each sample, a key of `SAMPLE_BYTES`.

    Raises:
        ValueError: one image has too many pixels or samples.
    """
    pixels = geom.height * geom.width
    samples = geom.positions * geom.offset_groups * geom.taps
    _check_count(geom, "pixels", pixels, MAX_PIXELS)
    _check_count(geom, "samples", samples, MAX_SAMPLES)

    bytes_per_image = samples * SAMPLE_BYTES[kept]
    if geom.offset_groups > 1 and kept != "arrays":
        # one chunk of column gradients per slice, because every chunk reads all bins of the slice
        column_bytes = geom.positions * geom.taps * geom.in_channels * 4
        bytes_per_image = max(bytes_per_image, column_bytes)
    images_by_pixels = (MAX_PIXELS - 1) // pixels
    images_by_bytes = WORKSPACE_BYTES // bytes_per_image
    longest = max(1, min(images_by_pixels, images_by_bytes))

    for images in even_slices(geom.batch, longest):
        yield replace(geom, batch=images.stop - images.start), images


def column_chunks(geom: ConvGeometry, x: Tensor) -> Iterator[slice]:
    """Yield chunks of the output positions of all images, whose columns in the dtype of `x` fit the workspace."""
    positions = geom.batch * geom.positions
    position_bytes = geom.taps * geom.in_channels * x.element_size()
    length = max(1, WORKSPACE_BYTES // position_bytes)
    for start in range(0, positions, length):
        yield slice(start, min(start + length, positions))


def tile_chunks(geom: ConvGeometry, x: Tensor) -> Iterator[TileChunk]:
    """Yield chunks of input tiles whose T in the dtype of `x` fits the workspace: whole images, or rows of one."""
    rows_per_image, _ = input_tiles(geom)
    row_bytes = TILE_H * geom.width * geom.taps * geom.out_channels * x.element_size()
    rows_that_fit = max(1, WORKSPACE_BYTES // row_bytes)
    images = max(1, rows_that_fit // rows_per_image)
    tile_rows = min(rows_that_fit, rows_per_image)

    for image in range(0, geom.batch, images):
        for tile_row in range(0, rows_per_image, tile_rows):
            yield TileChunk(image, min(images, geom.batch - image), tile_row, min(tile_rows, rows_per_image - tile_row))


def input_tiles(geom: ConvGeometry) -> tuple[int, int]:
    """Return how many rows and columns of tiles cover one image of the input."""
    return -(-geom.height // TILE_H), -(-geom.width // TILE_W)


def _check_count(geom: ConvGeometry, unit: str, count: int, limit: int) -> None:
    if count >= limit:
        raise ValueError(
            f"input: expected fewer than {limit} {unit} an image, got {count} from {geom.height}x{geom.width}"
        )

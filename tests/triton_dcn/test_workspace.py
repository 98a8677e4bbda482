"""How the Triton backend divides its work: every image, position and tile once, within the bounds."""

import pytest
import torch

from triton_dcn import workspace
from triton_dcn.geometry import ConvGeometry


def geometry(batch, size, offset_groups=1):
    """Return the geometry of a 3x3 convolution of 4 to 4 channels that keeps the size."""
    return ConvGeometry(batch, 4, *size, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1, offset_groups, *size)


@pytest.mark.parametrize("workspace_bytes", [1, 5_000, 20_000, workspace.WORKSPACE_BYTES])
@pytest.mark.parametrize("offset_groups", [1, 2])
def test_slices_and_chunks_cover_everything_once(offset_groups, workspace_bytes, monkeypatch):
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", workspace_bytes)
    geom = geometry(5, (20, 17), offset_groups)
    x = torch.empty(0, dtype=torch.float16)
    images = []
    for part, slice_of_images in workspace.image_slices(geom, "ranks"):
        numbers = range(5)[slice_of_images]
        assert part.batch == len(numbers)
        images += numbers
    assert images == list(range(5))

    positions = range(geom.batch * geom.positions)
    chunks = list(workspace.column_chunks(geom, x))
    assert [position for chunk in chunks for position in positions[chunk]] == list(positions)
    column_bytes = geom.taps * geom.in_channels * x.element_size()
    assert all(chunk.stop - chunk.start <= max(1, workspace_bytes // column_bytes) for chunk in chunks)

    rows_of_tiles = []
    for tiles in workspace.tile_chunks(geom, x):
        for image in range(tiles.image, tiles.image + tiles.images):
            rows_of_tiles += [(image, row) for row in range(tiles.tile_row, tiles.tile_row + tiles.tile_rows)]
    assert rows_of_tiles == [(image, row) for image in range(5) for row in range(3)]


@pytest.mark.parametrize(
    ("size", "message"), [((1 << 14, 1 << 13), "pixels"), ((1 << 13, (1 << 13) - 1), "samples")], ids=str
)
def test_too_large_an_image_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        next(workspace.image_slices(geometry(1, size), "arrays"))

"""How the Triton backend divides its work: every image, position and tile once, within the bounds, in even parts."""

from dataclasses import replace

import pytest
import torch

from triton_dcn import tile_table, workspace
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
    for part, slice_of_images in workspace.image_slices(geom, "ranks", x.element_size()):
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
    rows = -(-geom.height // tile_table.T_TILE_H)
    assert rows_of_tiles == [(image, row) for image in range(5) for row in range(rows)]


def test_chunks_are_even():
    """At c5 of ResNet-50, 16 images in half precision, 14563 positions fit: two halves, not 14563 and a rest."""
    geom = replace(geometry(16, (25, 42)), in_channels=512, out_channels=512)
    x = torch.empty(0, dtype=torch.bfloat16)
    assert list(workspace.column_chunks(geom, x)) == [slice(0, 8400), slice(8400, 16800)]
    assert [tiles.images for tiles in workspace.tile_chunks(geom, x)] == [8, 8]


def test_rows_of_tiles_are_even(monkeypatch):
    """Three rows of tiles of one image, of which two fit: two and one, in every image."""
    geom = geometry(2, (2 * tile_table.T_TILE_H + 1, 17))
    x = torch.empty(0, dtype=torch.float16)
    row_bytes = tile_table.T_TILE_H * 17 * geom.taps * geom.out_channels * x.element_size()
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 2 * row_bytes)
    rows = [(tiles.image, tiles.tile_row, tiles.tile_rows) for tiles in workspace.tile_chunks(geom, x)]
    assert rows == [(0, 0, 2), (0, 2, 1), (1, 0, 2), (1, 2, 1)]


def test_slices_of_the_g_form_hold_one_chunk():
    """At c5 in half precision the column gradients of 13 images fit, so 16 are two slices, each with one chunk."""
    geom = replace(geometry(16, (25, 42)), in_channels=512, out_channels=512)
    x = torch.empty(0, dtype=torch.bfloat16)
    parts = [part for part, _ in workspace.image_slices(geom, "ranks", x.element_size())]
    assert [part.batch for part in parts] == [8, 8]
    assert [len(list(workspace.column_chunks(part, x))) for part in parts] == [1, 1]
    assert [part.batch for part, _ in workspace.image_slices(geom, "ranks")] == [16]


EVERY = {"needs_samples": True, "needs_weight": True}


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({}, {**EVERY, "fused_samples": True}, True),
        ({}, {**EVERY, "fused_samples": False}, False),
        ({}, {"needs_samples": False, "needs_weight": True, "fused_samples": False}, True),
        ({"in_channels": 64, "out_channels": 256}, {**EVERY, "fused_samples": True}, False),
        ({"in_channels": 256, "out_channels": 64}, {**EVERY, "fused_samples": False}, True),
        ({"out_height": 10, "out_width": 8}, {**EVERY, "fused_samples": True}, False),
        ({"offset_groups": 2}, {**EVERY, "fused_samples": True}, False),
    ],
    ids=["as many", "no fused kernel", "frozen offsets", "more output", "more input", "stride 2", "offset groups"],
)
def test_way_to_the_gradient_of_the_input(changes, options, expected):
    """T where it moves fewer elements than column gradients and columns do."""
    geom = replace(geometry(2, (20, 17)), **changes)
    assert workspace.prefers_t_columns(geom, **options) == expected


@pytest.mark.parametrize(
    ("size", "message"), [((1 << 14, 1 << 13), "pixels"), ((1 << 13, (1 << 13) - 1), "samples")], ids=str
)
def test_too_large_an_image_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        next(workspace.image_slices(geometry(1, size), "arrays"))

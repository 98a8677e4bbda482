"""Masks of boxes pasted into an image, against a direct definition."""

import math

import pytest
import torch

from detector.ops.paste_masks import paste_masks


def mask_coordinate(pixel, low, high, side):
    """Return where the center of a pixel lies among the cells of a mask of `side` cells between `low` and `high`."""
    position = (pixel + 0.5 - low) / (high - low) * 2 - 1 if high > low else 0.0
    return (position + 1) * side / 2 - 0.5


def bilinear(mask, y, x):
    """Read a mask at a point between its cells; it is 0 outside."""
    side = len(mask)
    value = 0.0
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < side and 0 <= j < side:
                value += float(mask[i, j]) * (1 - abs(y - i)) * (1 - abs(x - j))
    return value


def paste_by_definition(mask, box, height, width, threshold):
    """MMDetection's rule pixel by pixel: bilinear between the cells of the mask, nothing beyond one pixel outside."""
    x1, y1, x2, y2 = box
    side = len(mask)
    image = torch.zeros(height, width, dtype=torch.bool)
    for row in range(max(math.floor(y1) - 1, 0), min(math.ceil(y2) + 1, height)):
        for column in range(max(math.floor(x1) - 1, 0), min(math.ceil(x2) + 1, width)):
            y = mask_coordinate(row, y1, y2, side)
            x = mask_coordinate(column, x1, x2, side)
            image[row, column] = bilinear(mask, y, x) >= threshold
    return image


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_paste_by_definition(threshold):
    boxes = torch.tensor(
        [
            [3.2, 4.7, 30.9, 25.1],  # inside
            [-10.5, -3.25, 12.0, 18.6],  # over two borders
            [30.0, 20.0, 60.0, 50.0],  # over the others
            [-5.0, 10.0, 45.0, 12.0],  # flat, wider than the image
            [10.25, 6.0, 10.25, 22.0],  # without width
            [50.0, 3.0, 60.0, 9.0],  # outside
            [0.0, 0.0, 40.0, 30.0],  # everything
        ],
        dtype=torch.float64,
    )
    masks = torch.rand(len(boxes), 28, 28, dtype=torch.float64)
    pasted = paste_masks(masks, boxes, 30, 40, threshold)
    assert pasted.shape == (len(boxes), 30, 40)
    for mask, box, image in zip(masks, boxes.tolist(), pasted, strict=True):
        assert torch.equal(image, paste_by_definition(mask, box, 30, 40, threshold))
    assert pasted[:5].flatten(1).any(1).all()
    assert not pasted[5].any()


def test_no_masks():
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), 5, 6).shape == (0, 5, 6)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(2, 28, 28\), \(1, 4\)"):
        paste_masks(torch.zeros(2, 28, 28), torch.zeros(1, 4), 5, 6)


@pytest.mark.gpu
def test_paste_on_gpu():
    low = torch.rand(30, 2) * 80 - 20
    high = low + torch.rand(30, 2) * 60
    boxes = torch.cat([low, high], 1)
    masks = torch.rand(30, 28, 28)
    expected = paste_masks(masks, boxes, 75, 90)
    pasted = paste_masks(masks.cuda(), boxes.cuda(), 75, 90).cpu()
    assert (pasted != expected).double().mean() < 1e-5  # pixels where rounding decides


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_far_outside_and_without_numbers(dtype):
    """None of them becomes a window outside of the image."""
    ends = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e9, 5.0]
    boxes = torch.cartesian_prod(*[torch.tensor(ends, dtype=dtype)] * 4)
    pasted = paste_masks(torch.ones(len(boxes), 4, 4, dtype=dtype), boxes, 9, 11)
    assert not pasted[boxes.isnan().any(1)].any()
    everywhere = (boxes[:, :2] == -1e9).all(1) & (boxes[:, 2:] == 1e9).all(1)
    assert pasted[everywhere].all()
    assert not pasted[(boxes[:, 2:] <= -1e9).any(1)].any()

"""From the 28 x 28 masks of detections to masks of the whole image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GPU_BYTES = 1 << 30  # of sampled images at a time, on a GPU
OUTSIDE = -3.0  # a position beyond the border, where `grid_sample` reads 0


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5) -> Tensor:
    """Draw predicted masks into an image: sample each bilinearly at the centers of the pixels in and around its box.

    To draw into an image as it was before a resize, divide the boxes by the factors of the resize first.

    Args:
        masks: (N, M, M) probabilities, of `Detections`.
        boxes: (N, 4), x1 y1 x2 y2 in pixels of the image to draw into; parts outside it are cut off. A box with a NaN
            stays empty.
        height, width: of that image.
        threshold: a pixel with at least this probability is inside.

    Returns:
        (N, height, width) bool.

    Raises:
        ValueError: `masks` and `boxes` do not have these shapes.

    Source:
        MMDetection's FCNMaskHead (`_do_paste_mask`), in its variant for the CPU: beyond one pixel around its box a mask
        is empty. For a box without width or height the center of the mask is drawn, as there.
    """
    if masks.dim() != 3 or boxes.shape != (len(masks), 4):
        shapes = f"{tuple(masks.shape)}, {tuple(boxes.shape)}"
        raise ValueError(f"masks, boxes: expected (N, M, M) and (N, 4), got {shapes}")

    dtype = torch.promote_types(masks.dtype, torch.float32)
    masks = masks.to(dtype)
    boxes = boxes.to(dtype)
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    if masks.is_cuda:
        _paste_whole_images(pasted, masks, boxes, threshold)
    else:
        _paste_around_boxes(pasted, masks, boxes, threshold)
    return pasted


def _paste_whole_images(pasted: Tensor, masks: Tensor, boxes: Tensor, threshold: float) -> None:
    """Fill `pasted` many masks at a time, in every pixel of the image: the fast way on a GPU."""
    _, height, width = pasted.shape
    bytes_per_mask = masks.element_size() * height * width
    step = max(GPU_BYTES // max(bytes_per_mask, 1), 1)
    for start in range(0, len(masks), step):
        part = slice(start, start + step)
        sampled = _sample(masks[part], boxes[part], (0, height), (0, width))
        pasted[part] = sampled >= threshold


def _paste_around_boxes(pasted: Tensor, masks: Tensor, boxes: Tensor, threshold: float) -> None:
    """Fill `pasted` one mask at a time, only in the pixels that it may reach: the fast way on a CPU."""
    _, height, width = pasted.shape
    for index, (x1, y1, x2, y2) in enumerate(_reached_pixels(boxes, height, width).tolist()):
        if x1 < x2 and y1 < y2:
            part = slice(index, index + 1)
            sampled = _sample(masks[part], boxes[part], (y1, y2), (x1, x2))
            pasted[index, y1:y2, x1:x2] = sampled[0] >= threshold


def _reached_pixels(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return (N, 4) int64: the pixels x1 <= x < x2, y1 <= y < y2 that a mask may reach."""
    sides = boxes.new_tensor([width, height])
    low = (boxes[:, :2].floor() - 1).clamp(boxes.new_zeros(2), sides)
    high = (boxes[:, 2:].ceil() + 1).clamp(boxes.new_zeros(2), sides)
    return torch.cat([low, high], 1).nan_to_num(0).long()


def _sample(masks: Tensor, boxes: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Return the probabilities (N, rows, columns) at the pixels of a window of the image.

    Args:
        masks: (N, M, M).
        boxes: (N, 4).
        rows, columns: first and one past the last of the window.
    """
    x = _mask_positions(boxes[:, 0::2], *columns)[:, None, :]
    y = _mask_positions(boxes[:, 1::2], *rows)[:, :, None]
    grid = torch.stack(torch.broadcast_tensors(x, y), 3)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


def _mask_positions(sides: Tensor, first: int, last: int) -> Tensor:
    """Return where `grid_sample` reads the masks for pixels `first` <= i < `last` along one axis.

    Args:
        sides: (N, 2), low and high end of the boxes along this axis, which are the positions -1 and 1.

    Returns:
        (N, last - first), positions of the centers of the pixels.
    """
    center = torch.arange(first, last, dtype=sides.dtype, device=sides.device) + 0.5
    low = sides[:, :1]
    high = sides[:, 1:]

    position = (center - low) / (high - low) * 2 - 1
    position = torch.where(position.isfinite(), position, 0)
    is_reached = (center > low.floor() - 1) & (center < high.ceil() + 1)
    return torch.where(is_reached, position, OUTSIDE)

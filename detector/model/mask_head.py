"""Masks of regions: the convolutional head, its targets and loss, and the way from 28 x 28 maps back to the image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.model.matching import SamplingResult
from detector.ops.roi_align import roi_align
from detector.structures import Target

CONVS = 4
POOLED = 14  # side of the window pooled from the pyramid
SIZE = 2 * POOLED  # side of a predicted mask
PASTE_BYTES = 1 << 30  # float32 images held at a time while pasting on a GPU


class MaskHead(nn.Module):
    """Four 3x3 convolutions, a transposed one that doubles the side, and one logit map per class.

    Args:
        channels: of the pyramid, and of every layer.
        num_classes: without background, which has no mask.

    Source:
        He et al., Mask R-CNN, ICCV 2017; MMDetection's FCNMaskHead, whose parameter names and initial values it has.
    """

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, channels, 3, padding=1), activate=nn.ReLU(inplace=True)))
            for _ in range(CONVS)
        )
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)
        for layer in (*(conv.conv for conv in self.convs), self.upsample, self.conv_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Return the logits (R, 2 S, 2 S) of class `labels` (R,) int64 for pooled features (R, C, S, S)."""
        for conv in self.convs:
            pooled = conv(pooled)
        logits = self.conv_logits(F.relu(self.upsample(pooled), inplace=True))
        return logits.gather(1, labels[:, None, None, None].expand(-1, 1, *logits.shape[2:]))[:, 0]


def pad_masks(targets: Sequence[Target], count: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Put the bitmaps of a batch into one tensor, zero where there is none.

    Args:
        targets: with masks.
        count: of ground truths per image after padding, G.
        size: height and width of the padded images. RoIAlign repeats the last pixels of a bitmap beyond its border, so
            this extent, MMDetection's, matters to objects that touch the border of their image.
        dtype: of the result.

    Returns:
        (B, G, H, W), 0 or 1.
    """
    bitmaps = torch.zeros(len(targets), count, *size, dtype=dtype, device=targets[0].boxes.device)
    for bitmap, target in zip(bitmaps, targets, strict=True):
        number, height, width = target.masks.shape
        bitmap[:number, :height, :width] = target.masks
    return bitmaps


@torch.no_grad()
def mask_targets(bitmaps: Tensor, boxes: Tensor, samples: SamplingResult) -> Tensor:
    """Cut the ground truth of each positive region out of its bitmap.

    Args:
        bitmaps: (B, G, H, W) of `pad_masks`.
        boxes: (B, S, 4), regions in pixels.
        samples: of the same regions; only positives have a target.

    Returns:
        (B, S, 28, 28) bool, inside where at least half of a cell is; false everywhere where not positive.

    Source:
        MMDetection's BitmapMasks.crop_and_resize: RoIAlign at the scale of the image, then a threshold.
    """
    images, count, height, width = bitmaps.shape
    owner = torch.arange(images, device=boxes.device)[:, None] * count + samples.target
    owner = torch.where(samples.positive, owner, -1).to(boxes.dtype)
    x1, y1, x2, y2 = boxes.unbind(2)
    boxes = torch.stack([x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)], 2)
    rois = torch.cat([owner[:, :, None], boxes], 2).flatten(0, 1)
    level = torch.zeros(len(rois), dtype=torch.int64, device=rois.device)
    covered = roi_align([bitmaps.flatten(0, 1)[:, None]], rois, level, strides=(1,), output_size=SIZE)
    return (covered[:, 0] >= 0.5).unflatten(0, samples.positive.shape)


def mask_loss(logits: Tensor, goal: Tensor, positive: Tensor) -> Tensor:
    """Return the mean binary cross-entropy over all pixels of all positive regions, 0 without any.

    Args:
        logits: (B, S, 28, 28), of the classes of the ground truths.
        goal: (B, S, 28, 28) bool of `mask_targets`.
        positive: (B, S) bool.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, goal.to(logits.dtype), reduction="none").mean((2, 3))
    return torch.where(positive, entropy, 0).sum() / positive.sum().clamp(min=1)


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5) -> Tensor:
    """Draw predicted masks into an image: sample each bilinearly at the centers of the pixels in and around its box.

    For masks in the pixels of an original image give the boxes divided by the scale of its resize, and its size.

    Args:
        masks: (N, M, M) probabilities, of `Detections`.
        boxes: (N, 4), x1 y1 x2 y2 in pixels of the image to draw into; parts outside it are cut off.
        height, width: of that image.
        threshold: a pixel is inside from this probability on.

    Returns:
        (N, height, width) bool.

    Raises:
        ValueError: `masks` and `boxes` do not have these shapes.

    Source:
        MMDetection's FCNMaskHead (`_do_paste_mask`), in the variant it has for the CPU: beyond one pixel around its box
        a mask is empty. On a box without width or height the center of the mask is drawn, as there.
    """
    if masks.dim() != 3 or boxes.shape != (len(masks), 4):
        raise ValueError(
            f"masks, boxes: expected (N, M, M) and (N, 4), found {tuple(masks.shape)}, {tuple(boxes.shape)}"
        )
    dtype = torch.promote_types(masks.dtype, torch.float32)
    masks, boxes = masks[:, None].to(dtype), boxes.to(dtype)
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    if masks.is_cuda:  # whole images, many masks at a time
        step = max(PASTE_BYTES // max(masks.element_size() * height * width, 1), 1)
        for start in range(0, len(masks), step):
            part = slice(start, start + step)
            grid = _grid(boxes[part], (0, height), (0, width))
            pasted[part] = F.grid_sample(masks[part], grid, align_corners=False)[:, 0] >= threshold
        return pasted
    for index, (x1, y1, x2, y2) in enumerate(_surroundings(boxes, height, width).tolist()):  # only around the box
        if x1 < x2 and y1 < y2:
            grid = _grid(boxes[index : index + 1], (y1, y2), (x1, x2))
            sampled = F.grid_sample(masks[index : index + 1], grid, align_corners=False)[0, 0]
            pasted[index, y1:y2, x1:x2] = sampled >= threshold
    return pasted


def _surroundings(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return (N, 4) int64: the pixels x1 <= x < x2, y1 <= y < y2 that a mask may reach."""
    low, high = (boxes[:, :2].floor() - 1).clamp(min=0), boxes[:, 2:].ceil() + 1
    return torch.stack([low[:, 0], low[:, 1], high[:, 0].clamp(max=width), high[:, 1].clamp(max=height)], 1).long()


def _grid(boxes: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Return where `grid_sample` reads each mask for the pixels of a window: (N, rows, columns, 2), x and y."""
    x = _positions(boxes[:, 0::2], *columns)[:, None, :]
    y = _positions(boxes[:, 1::2], *rows)[:, :, None]
    return torch.stack(torch.broadcast_tensors(x, y), 3)


def _positions(ends: Tensor, first: int, last: int) -> Tensor:
    """Return (N, last - first) positions of pixel centers between the ends (N, 2) of a side, which are -1 and 1."""
    center = torch.arange(first, last, dtype=ends.dtype, device=ends.device) + 0.5
    start, stop = ends[:, :1], ends[:, 1:]
    position = (center - start) / (stop - start) * 2 - 1
    position = torch.where(position.isfinite(), position, 0)
    reach = (center > start.floor() - 1) & (center < stop.ceil() + 1)
    return torch.where(reach, position, -3)  # beyond the border, where `grid_sample` reads 0

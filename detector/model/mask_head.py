"""The mask head: pooled features of a region to a 28 x 28 mask; its targets and its loss.

Letters: B images, G padded ground truths, S samples.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.model.initialization import kaiming_init
from detector.model.sampler import SamplingResult
from detector.ops.roi_align import roi_align

NUM_CONVS = 4
POOL_SIZE = 14  # side of the window pooled from the pyramid
MASK_SIZE = 2 * POOL_SIZE  # side of a predicted mask


class MaskHead(nn.Module):
    """Four 3x3 convolutions, a transposed one that doubles the side, and one logit map per class.

    Args:
        channels: of the pyramid, and of every layer.
        num_classes: without background, which has no mask.

    Source:
        He et al., Mask R-CNN, ICCV 2017; MMDetection's FCNMaskHead, whose parameter names and initial values it has.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(NUM_CONVS)]
        self.convs = nn.ModuleList()
        for conv in convs:
            self.convs.append(nn.Sequential(OrderedDict(conv=conv, activate=nn.ReLU(inplace=True))))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)

        layers: list[nn.Conv2d | nn.ConvTranspose2d] = [*convs, self.upsample, self.conv_logits]
        for layer in layers:
            kaiming_init(layer)

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Predict the masks of regions.

        Args:
            pooled: (R, C, 14, 14).
            labels: (R,) int64, the class to predict the mask of.

        Returns:
            (R, 28, 28) logits.
        """
        for conv in self.convs:
            pooled = conv(pooled)
        upsampled = F.relu(self.upsample(pooled), inplace=True)
        logits: Tensor = self.conv_logits(upsampled)  # (R, classes, 28, 28)
        index = labels[:, None, None, None].expand(-1, 1, *logits.shape[2:])
        return logits.gather(1, index)[:, 0]


@torch.no_grad()
def mask_targets(bitmaps: Tensor, boxes: Tensor, samples: SamplingResult) -> Tensor:
    """Cut the ground truth of each positive region out of its bitmap.

    Args:
        bitmaps: (B, G, H, W) of `pad_masks`.
        boxes: (B, S, 4), regions in pixels.
        samples: of the same regions; only positives have a target.

    Returns:
        (B, S, 28, 28) bool, true where the object covers at least half of a cell of the region; all false for samples
        that are not positive.

    Source:
        MMDetection's BitmapMasks.crop_and_resize: RoIAlign at the scale of the image, then a threshold.
    """
    num_images, num_targets, height, width = bitmaps.shape
    image_index = torch.arange(num_images, device=boxes.device)[:, None]
    bitmap_index = image_index * num_targets + samples.target
    bitmap_index = torch.where(samples.positive, bitmap_index, -1).to(boxes.dtype)

    x1, y1, x2, y2 = boxes.unbind(2)
    x1 = x1.clamp(0, width)
    y1 = y1.clamp(0, height)
    x2 = x2.clamp(0, width)
    y2 = y2.clamp(0, height)
    rois = torch.stack([bitmap_index, x1, y1, x2, y2], 2).flatten(0, 1)

    features = [bitmaps.flatten(0, 1)[:, None]]  # every bitmap is an image of one channel
    levels = torch.zeros(len(rois), dtype=torch.int64, device=rois.device)
    coverage = roi_align(features, rois, levels, strides=(1,), output_size=MASK_SIZE)
    is_inside = coverage[:, 0] >= 0.5
    targets: Tensor = is_inside.unflatten(0, samples.positive.shape)
    return targets


def mask_loss(logits: Tensor, targets: Tensor, positive: Tensor) -> Tensor:
    """Return the mean binary cross-entropy over all pixels of all positive regions, 0 without any.

    Args:
        logits: (B, S, 28, 28), of the classes of the ground truths.
        targets: (B, S, 28, 28) bool of `mask_targets`.
        positive: (B, S) bool.
    """
    targets = targets.to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean((2, 3))
    num_positives = positive.sum().clamp(min=1)
    return torch.where(positive, cross_entropy, 0).sum() / num_positives

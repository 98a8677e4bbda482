"""The RoI head: class, box and mask of every region; losses and detections for whole batches.

Letters: B images, R regions, S sampled regions, P proposals.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.model import box_head, mask_head
from detector.model.box_head import BoxHead
from detector.model.losses import average_loss
from detector.model.mask_head import MASK_SIZE, MaskHead, mask_loss, mask_targets
from detector.model.matcher import Matcher
from detector.model.padded_targets import PaddedTargets
from detector.model.sampler import BoxSampler, SamplingResult
from detector.model.selection import gather_boxes, top_scores
from detector.ops import boxes as box_ops
from detector.ops.nms import batched_nms
from detector.ops.roi_align import roi_align, roi_levels

DELTA_STDS = (0.1, 0.1, 0.2, 0.2)


class RoIHead(nn.Module):
    """Sampling, pooling, box head, losses and detections; masks if the model has them.

    Args:
        channels: of the pyramid.
        fc_channels: width of the box head.
        num_classes: without background.
        strides: of the pyramid levels that are pooled from, finest first.
        matcher: assigns regions to ground truths in training.
        sampler: chooses the regions of the loss.
        score_threshold: only boxes with a higher score become detections.
        nms_iou: a detection that overlaps a better one of its class by more is suppressed.
        max_detections: largest number of detections per image.
        mask: predict masks too, with a `MaskHead`.

    Source:
        MMDetection's StandardRoIHead.
    """

    def __init__(
        self,
        *,
        channels: int,
        fc_channels: int,
        num_classes: int,
        strides: Sequence[int],
        matcher: Matcher,
        sampler: BoxSampler,
        score_threshold: float,
        nms_iou: float,
        max_detections: int,
        mask: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.matcher = matcher
        self.sampler = sampler
        self.score_threshold = score_threshold
        self.nms_iou = nms_iou
        self.max_detections = max_detections
        self.bbox_head = BoxHead(channels, fc_channels, num_classes)
        if mask:
            self.mask_head = MaskHead(channels, num_classes)

    def forward(self, features: Sequence[Tensor], boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Classify and refine regions.

        Args:
            features: (B, C, H, W) per level of `strides`; further levels are not used.
            boxes: (B, R, 4) in pixels.
            valid: (B, R) bool.

        Returns:
            logits (B, R, classes + 1) and deltas (B, R, classes, 4); meaningless where not valid.
        """
        rois = _to_rois(boxes, valid)
        logits, deltas = self.bbox_head(self._pool(features, rois, box_head.POOL_SIZE))
        return logits.unflatten(0, valid.shape), deltas.unflatten(0, valid.shape)

    def predict_masks(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Predict the masks of regions.

        Args:
            features, boxes, valid: as in `forward`.
            labels: (B, R) int64, the class to predict the mask of.

        Returns:
            (B, R, 28, 28) logits; meaningless where not valid.
        """
        rois = _to_rois(boxes, valid)
        labels = labels.flatten()
        if rois.is_cuda or torch.compiler.is_compiling():
            logits = self._mask_logits(features, rois, labels)
        else:
            # On a CPU it is slow to compute regions that are padding, and fast to look which ones are not.
            index = valid.flatten().nonzero()[:, 0]
            valid_logits = self._mask_logits(features, rois[index], labels[index])
            logits = valid_logits.new_zeros(len(rois), MASK_SIZE, MASK_SIZE)
            logits = logits.index_copy(0, index, valid_logits)
        unflattened: Tensor = logits.unflatten(0, valid.shape)
        return unflattened

    def _mask_logits(self, features: Sequence[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        pooled = self._pool(features, rois, mask_head.POOL_SIZE)
        logits: Tensor = self.mask_head(pooled, labels)
        return logits

    def _pool(self, features: Sequence[Tensor], rois: Tensor, size: int) -> Tensor:
        num_levels = len(self.strides)
        levels = roi_levels(rois[:, 1:], num_levels)
        return roi_align(
            features[:num_levels],
            rois,
            levels,
            strides=self.strides,
            output_size=size,
            sampling_ratio=0,
        )

    @torch.no_grad()
    def sample(
        self,
        proposals: Tensor,
        valid: Tensor,
        targets: PaddedTargets,
        seeds: Tensor,
    ) -> tuple[Tensor, SamplingResult]:
        """Choose the regions of the loss among the ground truths and the proposals.

        Args:
            proposals: (B, P, 4).
            valid: (B, P) bool.
            targets: of the same images.
            seeds: (B,) int64, see `BoxSampler`.

        Returns:
            boxes (B, S, 4) and the samples, whose index counts the padded ground truths first.
        """
        num_targets = targets.valid.shape[1]
        target_numbers = torch.arange(1, num_targets + 1, device=valid.device)
        assigned_targets = torch.where(targets.valid, target_numbers, -1)  # every ground truth is assigned to itself
        assigned_proposals = self.matcher(targets, proposals, valid)

        assigned = torch.cat([assigned_targets, assigned_proposals], 1)
        samples = self.sampler(assigned, seeds, num_targets)
        boxes = torch.cat([targets.boxes, proposals], 1)
        return gather_boxes(boxes, samples.index), samples

    def losses(
        self,
        logits: Tensor,
        deltas: Tensor,
        boxes: Tensor,
        samples: SamplingResult,
        targets: PaddedTargets,
    ) -> dict[str, Tensor]:
        """Compute the two losses over the samples.

        Args:
            logits, deltas: of `forward` for `boxes`.
            boxes: (B, S, 4), the sampled regions of `sample`.
            samples: of `sample`.
            targets: of the same images.

        Returns:
            "loss_cls" and "loss_bbox", scalars.
        """
        positive = samples.positive
        num_samples = samples.valid.sum().to(boxes.dtype)
        target_labels = targets.labels.gather(1, samples.target)  # (B, S)

        class_logits = logits.flatten(0, 1).to(boxes.dtype)
        class_targets = torch.where(positive, target_labels, self.num_classes).flatten()
        cross_entropy = F.cross_entropy(class_logits, class_targets, reduction="none")

        class_index = target_labels[:, :, None, None].expand(-1, -1, 1, 4)
        class_deltas = deltas.gather(2, class_index)[:, :, 0].to(boxes.dtype)  # (B, S, 4)
        target_boxes = gather_boxes(targets.boxes, samples.target)
        target_boxes = torch.where(positive[:, :, None], target_boxes, boxes)
        target_deltas = box_ops.encode(boxes, target_boxes, DELTA_STDS)
        l1_distance = (class_deltas - target_deltas).abs().sum(2)

        return {
            "loss_cls": average_loss(cross_entropy, samples.valid.flatten(), num_samples.clamp(min=1)),
            "loss_bbox": average_loss(l1_distance, positive, num_samples),
        }

    def mask_losses(
        self,
        features: Sequence[Tensor],
        boxes: Tensor,
        samples: SamplingResult,
        targets: PaddedTargets,
        bitmaps: Tensor,
    ) -> dict[str, Tensor]:
        """Compute the loss of the masks of the positive samples.

        Args:
            features: of `forward`.
            boxes: (B, S, 4), the sampled regions of `sample`.
            samples: of `sample`.
            targets: of the same images.
            bitmaps: (B, G, H, W) of `pad_masks`, of the same `targets`.

        Returns:
            "loss_mask", a scalar.
        """
        samples = samples.first(self.sampler.max_positives)
        boxes = boxes[:, : self.sampler.max_positives]
        labels = targets.labels.gather(1, samples.target)
        logits = self.predict_masks(features, boxes, labels, samples.positive)
        cropped = mask_targets(bitmaps, boxes, samples)
        return {"loss_mask": mask_loss(logits.to(boxes.dtype), cropped, samples.positive)}

    def detect(
        self,
        logits: Tensor,
        deltas: Tensor,
        boxes: Tensor,
        valid: Tensor,
        sizes: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Turn predictions into detections.

        Args:
            logits, deltas: of `forward` for the proposals.
            boxes: (B, P, 4), the proposals.
            valid: (B, P) bool.
            sizes: (B, 2), height and width of the images; detections are clipped to them.

        Returns:
            boxes (B, n, 4), scores (B, n) descending, labels (B, n) and valid (B, n); n = `max_detections`.
        """
        num_images = boxes.shape[0]  # not len(boxes), which torch.export would make a constant
        scores = logits.to(boxes.dtype).softmax(2)[:, :, :-1]  # (B, P, classes)
        boxes = box_ops.decode(boxes[:, :, None], deltas.to(boxes.dtype), DELTA_STDS)
        boxes = box_ops.clip(boxes, sizes)  # (B, P, classes, 4)
        valid = valid[:, :, None] & (scores > self.score_threshold)

        # Each class of each image is one group of the suppression: (B * classes, P, ...).
        keep = batched_nms(
            boxes.transpose(1, 2).flatten(0, 1),
            scores.transpose(1, 2).flatten(0, 1),
            valid.transpose(1, 2).flatten(0, 1),
            self.nms_iou,
        )
        keep = keep.unflatten(0, (num_images, -1)).transpose(1, 2)  # (B, P, classes)

        scores, index = top_scores(scores, keep, self.max_detections)
        boxes = gather_boxes(boxes.flatten(1, 2), index)
        labels = index % self.num_classes
        return boxes, scores, labels, scores >= 0


def _to_rois(boxes: Tensor, valid: Tensor) -> Tensor:
    """Return (B * R, 5) regions as `roi_align` takes them, batch index -1 where not valid."""
    image_index = torch.arange(boxes.shape[0], device=boxes.device)[:, None]
    image_index = torch.where(valid, image_index, -1).to(boxes.dtype)
    return torch.cat([image_index[:, :, None], boxes], 2).flatten(0, 1)

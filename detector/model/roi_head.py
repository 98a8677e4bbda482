"""Second stage: pooled features, class, box and mask of every region; losses and detections for whole batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.model.mask_head import POOLED, SIZE, MaskHead, mask_loss, mask_targets
from detector.model.matching import Matcher, PaddedTargets, Sampler, SamplingResult
from detector.model.rpn import EPS
from detector.ops import boxes as box_ops
from detector.ops.nms import batched_nms
from detector.ops.roi_align import roi_align, roi_levels

STDS = (0.1, 0.1, 0.2, 0.2)


class BoxHead(nn.Module):
    """Two shared fully connected layers, then class logits and a box per class.

    Args:
        channels: of the pyramid.
        size: of the pooled window.
        hidden: width of the shared layers.
        num_classes: without background, which is the last logit.

    Source:
        MMDetection's Shared2FCBBoxHead; parameter names are its.
    """

    def __init__(self, channels: int, size: int, hidden: int, num_classes: int):
        super().__init__()
        self.shared_fcs = nn.ModuleList([nn.Linear(channels * size * size, hidden), nn.Linear(hidden, hidden)])
        self.fc_cls = nn.Linear(hidden, num_classes + 1)
        self.fc_reg = nn.Linear(hidden, num_classes * 4)
        for layer in self.shared_fcs:
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.normal_(self.fc_reg.weight, std=0.001)
        for layer in (*self.shared_fcs, self.fc_cls, self.fc_reg):
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (R, classes + 1) and deltas (R, classes, 4) of pooled features (R, C, size, size)."""
        hidden = pooled.flatten(1)
        for layer in self.shared_fcs:
            hidden = F.relu(layer(hidden), inplace=True)
        return self.fc_cls(hidden), self.fc_reg(hidden).unflatten(1, (-1, 4))


class RoIHead(nn.Module):
    """Sampling, pooling, box head, losses and detections; if asked for, masks.

    Args:
        channels, size, hidden, num_classes: of `BoxHead`.
        strides: of the pyramid levels that are pooled from, finest first.
        matcher, sampler: of the training targets.
        score_threshold, nms_iou, max_detections: of the evaluation; `max_detections` boxes are left per image.
        mask: with a `MaskHead`.

    Source:
        MMDetection's StandardRoIHead.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        hidden: int,
        num_classes: int,
        strides: Sequence[int],
        matcher: Matcher,
        sampler: Sampler,
        score_threshold: float,
        nms_iou: float,
        max_detections: int,
        mask: bool = False,
    ):
        super().__init__()
        self.size, self.strides, self.num_classes = size, tuple(strides), num_classes
        self.matcher, self.sampler = matcher, sampler
        self.score_threshold, self.nms_iou, self.max_detections = score_threshold, nms_iou, max_detections
        self.bbox_head = BoxHead(channels, size, hidden, num_classes)
        if mask:
            self.mask_head = MaskHead(channels, num_classes)

    def forward(self, features: Sequence[Tensor], boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Classify and refine regions.

        Args:
            features: (B, C, H, W) per level of `strides`.
            boxes: (B, R, 4) in pixels; valid: (B, R) bool.

        Returns:
            logits (B, R, classes + 1) and deltas (B, R, classes, 4); meaningless where not valid.
        """
        logits, deltas = self.bbox_head(self._pool(features, _rois(boxes, valid), self.size))
        return logits.unflatten(0, valid.shape), deltas.unflatten(0, valid.shape)

    def segment(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Predict the masks of regions.

        Args:
            features, boxes, valid: as in `forward`.
            labels: (B, R) int64, the class whose mask is wanted.

        Returns:
            (B, R, 28, 28) logits; meaningless where not valid.
        """
        rois, labels = _rois(boxes, valid), labels.flatten()
        if rois.is_cuda or torch.compiler.is_compiling():
            return self._mask_logits(features, rois, labels).unflatten(0, valid.shape)
        real = valid.flatten().nonzero()[:, 0]  # on a CPU padding is dear and reading a mask is not
        found = self._mask_logits(features, rois[real], labels[real])
        return found.new_zeros(len(rois), SIZE, SIZE).index_copy(0, real, found).unflatten(0, valid.shape)

    def _mask_logits(self, features: Sequence[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        return self.mask_head(self._pool(features, rois, POOLED), labels)

    def _pool(self, features: Sequence[Tensor], rois: Tensor, size: int) -> Tensor:
        levels = roi_levels(rois[:, 1:], len(self.strides))
        return roi_align(
            features[: len(self.strides)], rois, levels, strides=self.strides, output_size=size, sampling_ratio=0
        )

    @torch.no_grad()
    def sample(
        self, proposals: Tensor, valid: Tensor, targets: PaddedTargets, seeds: Tensor
    ) -> tuple[Tensor, SamplingResult]:
        """Choose the regions of the loss among the ground truths and the proposals.

        Args:
            proposals: (B, P, 4); valid: (B, P) bool.

        Returns:
            boxes (B, S, 4) and the samples, whose index counts the padded ground truths first.
        """
        assigned = self.matcher(targets, proposals, valid)
        own = torch.arange(1, targets.valid.shape[1] + 1, device=valid.device)
        assigned = torch.cat([torch.where(targets.valid, own, -1), assigned], 1)
        samples = self.sampler(assigned, seeds, ahead=targets.valid.shape[1])
        boxes = torch.cat([targets.boxes, proposals], 1)
        return boxes.gather(1, samples.index[:, :, None].expand(-1, -1, 4)), samples

    def losses(
        self, logits: Tensor, deltas: Tensor, boxes: Tensor, samples: SamplingResult, targets: PaddedTargets
    ) -> dict[str, Tensor]:
        """Compute the two losses over the samples.

        Args:
            logits, deltas: of `forward` for `boxes`, the sampled regions (B, S, 4).
        """
        label = targets.labels.gather(1, samples.target)  # (B, S)
        delta = deltas.gather(2, label[:, :, None, None].expand(-1, -1, 1, 4))[:, :, 0].to(boxes.dtype)
        goal = targets.boxes.gather(1, samples.target[:, :, None].expand(-1, -1, 4))
        goal = box_ops.encode(boxes, torch.where(samples.positive[:, :, None], goal, boxes), STDS)
        label = torch.where(samples.positive, label, self.num_classes)
        entropy = F.cross_entropy(logits.flatten(0, 1).to(boxes.dtype), label.flatten(), reduction="none")
        distance = torch.where(samples.positive, (delta - goal).abs().sum(2), 0)
        count = samples.valid.sum().to(boxes.dtype)
        return {
            "loss_cls": torch.where(samples.valid.flatten(), entropy, 0).sum() / (count.clamp(min=1) + EPS),
            "loss_bbox": distance.sum() / (count + EPS),
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
            boxes: (B, S, 4), the sampled regions.
            bitmaps: (B, G, H, W) of `pad_masks`, of the same `targets`.
        """
        samples = samples.first(self.sampler.most_positives)
        boxes = boxes[:, : self.sampler.most_positives]
        logits = self.segment(features, boxes, targets.labels.gather(1, samples.target), samples.positive)
        goal = mask_targets(bitmaps, boxes, samples)
        return {"loss_mask": mask_loss(logits.to(boxes.dtype), goal, samples.positive)}

    def detect(
        self, logits: Tensor, deltas: Tensor, boxes: Tensor, valid: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Turn predictions into detections.

        Args:
            logits, deltas: of `forward` for the proposals `boxes` (B, P, 4), `valid` (B, P).
            sizes: (B, 2), height and width; detections are clipped to them.

        Returns:
            boxes (B, n, 4), scores (B, n) falling, labels (B, n) and valid (B, n); n = `max_detections`.
        """
        scores = logits.to(boxes.dtype).softmax(2)[:, :, :-1]  # (B, P, classes)
        boxes = box_ops.decode(boxes[:, :, None], deltas.to(boxes.dtype), STDS)
        boxes = box_ops.clip(boxes, sizes)  # (B, P, classes, 4)
        valid = valid[:, :, None] & (scores > self.score_threshold)
        groups = [x.transpose(1, 2).flatten(0, 1) for x in (boxes, scores, valid)]  # (B * classes, P, ...)
        keep = batched_nms(*groups, self.nms_iou).unflatten(0, (boxes.shape[0], -1)).transpose(1, 2)
        best, order = torch.where(keep, scores, -1).flatten(1).sort(dim=1, descending=True, stable=True)
        best, order = best[:, : self.max_detections], order[:, : self.max_detections]
        boxes = boxes.flatten(1, 2).gather(1, order[:, :, None].expand(-1, -1, 4))
        return boxes, best, order % self.num_classes, best >= 0


def _rois(boxes: Tensor, valid: Tensor) -> Tensor:
    """Return (B * R, 5) regions as `roi_align` takes them, batch index -1 where not valid."""
    image = torch.arange(boxes.shape[0], device=boxes.device)[:, None]
    return torch.cat([torch.where(valid, image, -1)[:, :, None].to(boxes.dtype), boxes], 2).flatten(0, 1)

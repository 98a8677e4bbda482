"""The RoI head: class, box and mask of every region, in one stage or in the stages of a cascade.

Letters: B images, R regions, S sampled regions, P proposals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.model import box_head, mask_head
from detector.model.box_head import BoxHead
from detector.model.losses import average_loss, smooth_l1
from detector.model.mask_head import MASK_SIZE, MaskHead, mask_loss, mask_targets
from detector.model.matcher import Matcher
from detector.model.padded_targets import PaddedTargets
from detector.model.roi_extractor import RoIExtractor
from detector.model.sampler import BoxSampler, SamplingResult
from detector.model.selection import gather_boxes, top_scores
from detector.ops import boxes as box_ops
from detector.ops.nms import batched_nms

Stds = tuple[float, float, float, float]


@dataclass(frozen=True)
class RoIStage:
    """The rules of one box head (and mask head); a cascade has several.

    Attributes:
        matcher: assigns regions to ground truths in training.
        delta_stds: what the deltas of its boxes are divided by.
        loss_weight: factor of its losses.
    """

    matcher: Matcher
    delta_stds: Stds = (0.1, 0.1, 0.2, 0.2)
    loss_weight: float = 1.0


class RoIHead(nn.Module):
    """Sampling, pooling, box heads, losses and detections; masks if the model has them.

    With several stages it is a cascade: every box head predicts one box for all classes, which is the region of the
    next head. Detections have the mean of all heads' logits, and of all heads' mask probabilities.

    Args:
        channels: of the pyramid.
        fc_channels: width of the box heads.
        num_classes: without background.
        strides: of the pyramid levels that are pooled from, finest first.
        stages: one, or those of a cascade.
        sampler: chooses the regions of the loss.
        score_threshold: only boxes with a higher score become detections.
        nms_iou: a detection that overlaps a better one of its class by more is suppressed.
        max_detections: largest number of detections per image.
        mask: predict masks too, with a `MaskHead` in every stage.
        roi_layer: how the box heads pool, see `RoIExtractor`.
        roi_sampling_ratio: samples per bin and axis, of box and mask heads, see `RoIExtractor`.
        smooth_l1_beta: below this difference the loss of the boxes is quadratic; 0 is the L1 loss.

    Source:
        MMDetection's StandardRoIHead and CascadeRoIHead; Cai and Vasconcelos, Cascade R-CNN, CVPR 2018.
    """

    def __init__(
        self,
        *,
        channels: int,
        fc_channels: int,
        num_classes: int,
        strides: Sequence[int],
        stages: Sequence[RoIStage],
        sampler: BoxSampler,
        score_threshold: float,
        nms_iou: float,
        max_detections: int,
        mask: bool = False,
        roi_layer: str = "align",
        roi_sampling_ratio: int = 0,
        smooth_l1_beta: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stages = tuple(stages)
        self.is_cascade = len(self.stages) > 1
        self.sampler = sampler
        self.score_threshold = score_threshold
        self.nms_iou = nms_iou
        self.max_detections = max_detections
        self.smooth_l1_beta = smooth_l1_beta

        self.bbox_roi_extractor = self._per_stage(
            lambda: RoIExtractor(
                strides,
                box_head.POOL_SIZE,
                roi_layer,
                channels,
                fc_channels,
                sampling_ratio=roi_sampling_ratio,
            )
        )
        self.bbox_head = self._per_stage(
            lambda: BoxHead(channels, fc_channels, num_classes, class_agnostic=self.is_cascade)
        )
        if mask:
            self.mask_roi_extractor = RoIExtractor(strides, mask_head.POOL_SIZE, sampling_ratio=roi_sampling_ratio)
            self.mask_head = self._per_stage(lambda: MaskHead(channels, num_classes))

    def _per_stage(self, make: Callable[[], nn.Module]) -> nn.Module:
        """Build the module of the only stage, or a list with one for each stage: the names are MMDetection's."""
        if not self.is_cascade:
            return make()
        return nn.ModuleList([make() for _ in self.stages])

    def forward(
        self, features: Sequence[Tensor], boxes: Tensor, valid: Tensor, stage: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Classify and refine regions.

        Args:
            features: (B, C, H, W) per level of `strides`; further levels are not used.
            boxes: (B, R, 4) in pixels.
            valid: (B, R) bool.
            stage: whose head.

        Returns:
            logits (B, R, classes + 1) and deltas (B, R, boxes, 4), of one box per class or of one box for all;
            meaningless where not valid.
        """
        extractor = self.bbox_roi_extractor
        head = self.bbox_head
        if isinstance(extractor, nn.ModuleList) and isinstance(head, nn.ModuleList):
            extractor = extractor[stage]
            head = head[stage]
        rois = _to_rois(boxes, valid)
        logits, deltas = head(extractor(features, rois))
        return logits.unflatten(0, valid.shape), deltas.unflatten(0, valid.shape)

    def training_losses(
        self,
        features: Sequence[Tensor],
        proposals: Tensor,
        valid: Tensor,
        sizes: Tensor,
        targets: PaddedTargets,
        seeds: Tensor,
        bitmaps: Tensor | None,
    ) -> dict[str, Tensor]:
        """Compute the losses of all stages.

        Args:
            features: of `forward`.
            proposals: (B, P, 4).
            valid: (B, P) bool.
            sizes: (B, 2), height and width of the images; the regions of later stages are clipped to them.
            targets: of the same images.
            seeds: (B,) int64, see `BoxSampler`; every stage takes the next ones.
            bitmaps: (B, G, H, W) of `pad_masks`, of the same `targets`; None without masks.

        Returns:
            "loss_cls", "loss_bbox" and, with masks, "loss_mask", scalars. Those of a cascade begin with the number of
            their stage, "s0.", "s1." and "s2.".
        """
        num_targets = targets.valid.shape[1]
        losses = {}
        for stage, rules in enumerate(self.stages):
            boxes, samples = self.sample(proposals, valid, targets, seeds + stage, stage)
            logits, deltas = self(features, boxes, samples.valid, stage)
            stage_losses = self.losses(logits, deltas, boxes, samples, targets, stage)
            if bitmaps is not None:
                stage_losses |= self.mask_losses(features, boxes, samples, targets, bitmaps, stage)
            if not self.is_cascade:
                return stage_losses
            for name, loss in stage_losses.items():
                losses[f"s{stage}.{name}"] = loss * rules.loss_weight
            if stage + 1 < len(self.stages):  # whose sampler adds the ground truths again
                proposals = self.refine(deltas, boxes, sizes, stage)
                valid = samples.valid & (samples.index >= num_targets)
        return losses

    @torch.no_grad()
    def refine(self, deltas: Tensor, boxes: Tensor, sizes: Tensor, stage: int) -> Tensor:
        """Return the regions of the next stage of a cascade, (B, R, 4).

        Args:
            deltas: (B, R, 1, 4) of `forward` for `boxes`.
            boxes: (B, R, 4).
            sizes: (B, 2), height and width of the images, to which the regions are clipped.
            stage: that of `deltas`.
        """
        refined = box_ops.decode(boxes, deltas[:, :, 0].to(boxes.dtype), self.stages[stage].delta_stds)
        return box_ops.clip(refined, sizes)

    def predict(
        self, features: Sequence[Tensor], proposals: Tensor, valid: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Turn proposals into detections; arguments and result as of `forward` and `detect`."""
        boxes = proposals
        logits, deltas = self(features, boxes, valid)
        if self.is_cascade:
            total = logits.to(boxes.dtype)
            for stage in range(1, len(self.stages)):
                boxes = self.refine(deltas, boxes, sizes, stage - 1)
                logits, deltas = self(features, boxes, valid, stage)
                total = total + logits
            logits = total / len(self.stages)
        return self.detect(logits, deltas, boxes, valid, sizes)

    def predict_masks(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Predict the masks of detections.

        Args:
            features, boxes, valid: as in `forward`.
            labels: (B, R) int64, the class to predict the mask of.

        Returns:
            (B, R, 28, 28) probabilities, in a cascade the mean over the stages; meaningless where not valid.
        """

        def probabilities(pooled: Tensor, labels: Tensor) -> Tensor:
            masks = []
            for head in self._mask_heads():
                logits = head(pooled, labels)
                masks.append(logits.to(boxes.dtype).sigmoid())
            return torch.stack(masks).mean(0) if self.is_cascade else masks[0]

        return self._masks(features, boxes, labels, valid, probabilities)

    def mask_logits(
        self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor, valid: Tensor, stage: int = 0
    ) -> Tensor:
        """Predict the masks of regions by the head of one stage: (B, R, 28, 28) logits, else as `predict_masks`."""
        return self._masks(features, boxes, labels, valid, self._mask_heads()[stage])

    def _mask_heads(self) -> Sequence[nn.Module]:
        head = self.mask_head
        return list(head) if isinstance(head, nn.ModuleList) else [head]

    def _masks(
        self,
        features: Sequence[Tensor],
        boxes: Tensor,
        labels: Tensor,
        valid: Tensor,
        predict: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Pool the regions and call `predict` with features (R, C, 14, 14) and labels (R,); (B, R, 28, 28)."""
        rois = _to_rois(boxes, valid)
        labels = labels.flatten()
        if rois.is_cuda or torch.compiler.is_compiling():
            masks = predict(self.mask_roi_extractor(features, rois), labels)
        else:
            # On a CPU it is slow to compute regions that are padding, and fast to look which ones are not.
            index = valid.flatten().nonzero()[:, 0]
            masks_of_valid = predict(self.mask_roi_extractor(features, rois[index]), labels[index])
            masks = masks_of_valid.new_zeros(len(rois), MASK_SIZE, MASK_SIZE)
            masks = masks.index_copy(0, index, masks_of_valid)
        unflattened: Tensor = masks.unflatten(0, valid.shape)
        return unflattened

    @torch.no_grad()
    def sample(
        self,
        proposals: Tensor,
        valid: Tensor,
        targets: PaddedTargets,
        seeds: Tensor,
        stage: int = 0,
    ) -> tuple[Tensor, SamplingResult]:
        """Choose the regions of the loss among the ground truths and the proposals.

        Args:
            proposals: (B, P, 4).
            valid: (B, P) bool.
            targets: of the same images.
            seeds: (B,) int64, see `BoxSampler`.
            stage: whose matcher assigns the proposals.

        Returns:
            boxes (B, S, 4) and the samples, whose index counts the padded ground truths first.
        """
        num_targets = targets.valid.shape[1]
        target_numbers = torch.arange(1, num_targets + 1, device=valid.device)
        assigned_targets = torch.where(targets.valid, target_numbers, -1)  # every ground truth is assigned to itself
        assigned_proposals = self.stages[stage].matcher(targets, proposals, valid)

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
        stage: int = 0,
    ) -> dict[str, Tensor]:
        """Compute the two losses of a stage over the samples.

        Args:
            logits, deltas: of `forward` for `boxes`.
            boxes: (B, S, 4), the sampled regions of `sample`.
            samples: of `sample`.
            targets: of the same images.
            stage: that of the logits and deltas.

        Returns:
            "loss_cls" and "loss_bbox", scalars.
        """
        positive = samples.positive
        num_samples = samples.valid.sum().to(boxes.dtype)
        target_labels = targets.labels.gather(1, samples.target)  # (B, S)

        class_logits = logits.flatten(0, 1).to(boxes.dtype)
        class_targets = torch.where(positive, target_labels, self.num_classes).flatten()
        cross_entropy = F.cross_entropy(class_logits, class_targets, reduction="none")

        class_deltas = deltas[:, :, 0]  # (B, S, 4), for the class of each sample
        if not self.is_cascade:
            class_index = target_labels[:, :, None, None].expand(-1, -1, 1, 4)
            class_deltas = deltas.gather(2, class_index)[:, :, 0]
        target_boxes = gather_boxes(targets.boxes, samples.target)
        target_deltas = box_ops.encode(boxes, target_boxes, self.stages[stage].delta_stds)
        box_loss = smooth_l1(class_deltas.to(boxes.dtype), target_deltas, positive, self.smooth_l1_beta)

        return {
            "loss_cls": average_loss(cross_entropy, samples.valid.flatten(), num_samples.clamp(min=1)),
            "loss_bbox": average_loss(box_loss, positive, num_samples),
        }

    def mask_losses(
        self,
        features: Sequence[Tensor],
        boxes: Tensor,
        samples: SamplingResult,
        targets: PaddedTargets,
        bitmaps: Tensor,
        stage: int = 0,
    ) -> dict[str, Tensor]:
        """Compute the loss of the masks of a stage over the positive samples.

        Args:
            features: of `forward`.
            boxes: (B, S, 4), the sampled regions of `sample`.
            samples: of `sample`.
            targets: of the same images.
            bitmaps: (B, G, H, W) of `pad_masks`, of the same `targets`.
            stage: whose head.

        Returns:
            "loss_mask", a scalar.
        """
        samples = samples.first(self.sampler.max_positives)
        boxes = boxes[:, : self.sampler.max_positives]
        labels = targets.labels.gather(1, samples.target)
        logits = self.mask_logits(features, boxes, labels, samples.positive, stage)
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
            logits, deltas: of `forward` for `boxes`; in a cascade the mean of the logits of all stages, and the deltas
                of the last one.
            boxes: (B, P, 4), the proposals or, in a cascade, the regions of the last stage.
            valid: (B, P) bool.
            sizes: (B, 2), height and width of the images; detections are clipped to them.

        Returns:
            boxes (B, n, 4), scores (B, n) descending, labels (B, n) and valid (B, n); n = `max_detections`.
        """
        num_images = boxes.shape[0]  # not len(boxes), which torch.export would make a constant
        scores = logits.to(boxes.dtype).softmax(2)[:, :, :-1]  # (B, P, classes)
        boxes = box_ops.decode(boxes[:, :, None], deltas.to(boxes.dtype), self.stages[-1].delta_stds)
        boxes = box_ops.clip(boxes, sizes).expand(-1, -1, self.num_classes, -1)  # (B, P, classes, 4)
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

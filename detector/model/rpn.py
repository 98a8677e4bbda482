"""The RPN: objectness and box of every anchor; proposals and losses for whole batches.

Letters: B images, A anchors per cell, n anchors of a level, N anchors of all levels, S sampled anchors, P proposals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.model.anchors import AnchorGenerator
from detector.model.initialization import normal_init
from detector.model.losses import average_loss, smooth_l1
from detector.model.matcher import Matcher
from detector.model.padded_targets import PaddedTargets
from detector.model.sampler import BoxSampler, SamplingResult
from detector.model.selection import gather_boxes, top_k, top_scores
from detector.ops import boxes as box_ops
from detector.ops.nms import batched_nms
from detector.structures import SIZE_DIVISOR

DELTA_STDS = (1.0, 1.0, 1.0, 1.0)


class Predictions(NamedTuple):
    """What the RPN says of some anchors.

    Attributes:
        scores: (..., k).
        deltas: (..., k, 4), from the anchors to the boxes.
        anchors: (..., k, 4).
    """

    scores: Tensor
    deltas: Tensor
    anchors: Tensor


class RPN(nn.Module):
    """Region proposal network over all pyramid levels.

    Args:
        channels: of the pyramid.
        anchor_generator: its strides are those of the levels.
        matcher: assigns anchors to ground truths in training.
        sampler: chooses the anchors of the loss.
        nms_iou: threshold of the non-maximum suppression inside each level.
        pre_nms_top_n: boxes per level before the suppression, in training and in evaluation.
        post_nms_top_n: boxes per image after it, of all levels together, in training and in evaluation.
        inside_only: only anchors that lie inside the image are in the loss.
        smooth_l1_beta: below this difference the loss of the boxes is quadratic; 0 is the L1 loss.
        min_size: boxes must be wider and higher than this, pixels.

    Source:
        Ren et al., Faster R-CNN, 2015, as MMDetection's RPNHead, whose parameter names it has.
    """

    def __init__(
        self,
        *,
        channels: int,
        anchor_generator: AnchorGenerator,
        matcher: Matcher,
        sampler: BoxSampler,
        nms_iou: float,
        pre_nms_top_n: tuple[int, int],
        post_nms_top_n: tuple[int, int],
        inside_only: bool = False,
        smooth_l1_beta: float = 0.0,
        min_size: float = 0.0,
    ) -> None:
        super().__init__()
        self.anchor_generator = anchor_generator
        self.matcher = matcher
        self.sampler = sampler
        self.nms_iou = nms_iou
        self.pre_nms_top_n = pre_nms_top_n
        self.post_nms_top_n = post_nms_top_n
        self.inside_only = inside_only
        self.smooth_l1_beta = smooth_l1_beta
        self.min_size = min_size

        anchors_per_cell = anchor_generator.anchors_per_cell
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, anchors_per_cell, 1)
        self.rpn_reg = nn.Conv2d(channels, anchors_per_cell * 4, 1)
        for layer in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            normal_init(layer, std=0.01)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return per level the logits (B, n) and the deltas (B, n, 4), n = H * W * A in (y, x, anchor) order."""
        logits = []
        deltas = []
        for feature in features:
            hidden = F.relu(self.rpn_conv(feature), inplace=True)
            level_logits = self.rpn_cls(hidden).permute(0, 2, 3, 1)
            level_deltas = self.rpn_reg(hidden).permute(0, 2, 3, 1)
            logits.append(level_logits.flatten(1))
            deltas.append(level_deltas.reshape(hidden.shape[0], -1, 4))
        return logits, deltas

    @torch.no_grad()
    def propose(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        sizes: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turn predictions into proposals.

        Args:
            logits, deltas: of `forward`.
            anchors: (n, 4) per level.
            sizes: (B, 2), height and width of the images; proposals are clipped to them.

        Returns:
            boxes (B, P, 4), scores (B, P) descending, valid (B, P) bool; P is that of `post_nms_top_n` or the number of
            boxes before the suppression, if that is smaller.
        """
        levels = [self._top_of_level(*level) for level in zip(logits, deltas, anchors, strict=True)]
        tops = _stack_levels(levels)
        boxes = box_ops.decode(tops.anchors, tops.deltas, DELTA_STDS)  # (B, levels, max_boxes, 4)
        boxes = box_ops.clip(boxes, sizes)
        scores = tops.scores
        valid = (boxes[..., 2:] - boxes[..., :2] > self.min_size).all(-1)  # false on padding, whose boxes are empty

        # Each level of each image is one group of the suppression.
        keep = batched_nms(
            boxes.flatten(0, 1),
            scores.flatten(0, 1),
            valid.flatten(0, 1),
            self.nms_iou,
        )
        top_n_training, top_n_evaluation = self.post_nms_top_n
        top_n = top_n_training if self.training else top_n_evaluation
        scores, index = top_scores(scores, keep.view_as(valid), top_n)
        boxes = gather_boxes(boxes.flatten(1, 2), index)
        return boxes, scores, scores >= 0

    def _top_of_level(self, logits: Tensor, deltas: Tensor, anchors: Tensor) -> Predictions:
        """Return the predictions with the highest scores of one level, at most `pre_nms_top_n`."""
        top_n_training, top_n_evaluation = self.pre_nms_top_n
        top_n = top_n_training if self.training else top_n_evaluation
        count = min(top_n, logits.shape[1])
        scores, index = top_k(logits.to(anchors.dtype).sigmoid(), count)
        return Predictions(scores, gather_boxes(deltas.to(anchors.dtype), index), anchors[index])

    def valid_anchors(self, level_shapes: Sequence[tuple[int, int]], anchors: Tensor, sizes: Tensor) -> Tensor:
        """Tell which anchors can be in the loss: those with their cell on the image, or wholly inside the image.

        Args:
            level_shapes: height and width of the features of each level.
            anchors: (N, 4).
            sizes: (B, 2), height and width of the images before padding.

        Returns:
            (B, N) bool.
        """
        pad_sizes = (sizes + SIZE_DIVISOR - 1) // SIZE_DIVISOR * SIZE_DIVISOR
        valid: Tensor = self.anchor_generator.valid_flags(level_shapes, pad_sizes)
        if not self.inside_only:
            return valid
        begins_inside = (anchors[:, :2] >= 0).all(1)  # (N,)
        ends_inside = (anchors[:, 2:] < sizes.flip(1)[:, None]).all(2)  # (B, N)
        return valid & begins_inside & ends_inside

    def sample(self, anchors: Tensor, valid: Tensor, targets: PaddedTargets, seeds: Tensor) -> SamplingResult:
        """Choose the anchors of the loss.

        Args:
            anchors: (N, 4).
            valid: (B, N) bool.
            targets: of the same images.
            seeds: (B,) int64, see `BoxSampler`.
        """
        boxes = anchors.expand(len(valid), -1, -1)
        assigned = self.matcher(targets, boxes, valid)
        return self.sampler(assigned, seeds)

    def losses(
        self,
        logits: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        samples: SamplingResult,
        targets: PaddedTargets,
    ) -> dict[str, Tensor]:
        """Compute the two losses over the samples.

        Args:
            logits: (B, N), of all levels one after the other.
            deltas: (B, N, 4).
            anchors: (N, 4).
            samples: of `sample`.
            targets: of the same images.

        Returns:
            "loss_rpn_cls" and "loss_rpn_bbox", scalars.
        """
        positive = samples.positive
        negative = samples.valid & ~positive
        num_positives = positive.sum(1).clamp(min=1).sum()
        num_negatives = negative.sum(1).clamp(min=1).sum()
        num_samples = (num_positives + num_negatives).to(anchors.dtype)

        sampled_logits = logits.gather(1, samples.index).to(anchors.dtype)  # (B, S)
        objectness = positive.to(anchors.dtype)
        cross_entropy = F.binary_cross_entropy_with_logits(sampled_logits, objectness, reduction="none")

        sampled_anchors = anchors[samples.index]  # (B, S, 4)
        sampled_deltas = gather_boxes(deltas, samples.index).to(anchors.dtype)
        target_boxes = gather_boxes(targets.boxes, samples.target)
        target_deltas = box_ops.encode(sampled_anchors, target_boxes, DELTA_STDS)
        box_loss = smooth_l1(sampled_deltas, target_deltas, positive, self.smooth_l1_beta)

        return {
            "loss_rpn_cls": average_loss(cross_entropy, samples.valid, num_samples),
            "loss_rpn_bbox": average_loss(box_loss, positive, num_samples),
        }


def _stack_levels(levels: Sequence[Predictions]) -> Predictions:
    """Stack levels behind the batch dimension, padded with zeros to the level with the most boxes."""
    max_boxes = max(level.scores.shape[1] for level in levels)
    scores = []
    deltas = []
    anchors = []
    for level in levels:
        padding = max_boxes - level.scores.shape[1]
        # Without any, `pad` would only copy; but what is traced has to hold for images of other sizes.
        if torch.compiler.is_compiling() or padding:
            level = Predictions(*(_pad_boxes(tensor, padding) for tensor in level))
        scores.append(level.scores)
        deltas.append(level.deltas)
        anchors.append(level.anchors)
    return Predictions(torch.stack(scores, 1), torch.stack(deltas, 1), torch.stack(anchors, 1))


def _pad_boxes(tensor: Tensor, count: int) -> Tensor:
    """Add zeros for `count` boxes behind those of (B, k) or (B, k, 4)."""
    return F.pad(tensor, (0, count) if tensor.dim() == 2 else (0, 0, 0, count))

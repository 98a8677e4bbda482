"""Region proposal network: objectness and box of every anchor; proposals and losses for whole batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.model.anchors import AnchorGenerator
from detector.model.matching import Matcher, PaddedTargets, Sampler, SamplingResult
from detector.ops import boxes as box_ops
from detector.ops.nms import batched_nms

EPS = torch.finfo(torch.float32).eps  # MMDetection adds it to every average factor, in float64 too
STDS = (1.0, 1.0, 1.0, 1.0)


class RPN(nn.Module):
    """Region proposal network over all pyramid levels.

    Args:
        channels: of the pyramid.
        anchors: the anchor grid; its strides are the levels'.
        matcher, sampler: of the training targets.
        nms_iou: threshold of the suppression inside each level.
        candidates: boxes kept per level before suppression, in training and in evaluation.
        proposals: boxes left per image, of all levels together.
        min_size: boxes must be wider and higher than this, pixels.

    Source:
        Ren et al., Faster R-CNN, 2015, as MMDetection's RPNHead; parameter names are its.
    """

    def __init__(
        self,
        channels: int,
        anchors: AnchorGenerator,
        matcher: Matcher,
        sampler: Sampler,
        nms_iou: float,
        candidates: tuple[int, int],
        proposals: int,
        min_size: float = 0.0,
    ):
        super().__init__()
        self.anchors, self.matcher, self.sampler = anchors, matcher, sampler
        self.nms_iou, self.candidates, self.proposals, self.min_size = nms_iou, candidates, proposals, min_size
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, anchors.per_cell, 1)
        self.rpn_reg = nn.Conv2d(channels, anchors.per_cell * 4, 1)
        for layer in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return per level the logits (B, n) and the deltas (B, n, 4), n = H * W * A in (y, x, anchor) order."""
        logits, deltas = [], []
        for feature in features:
            hidden = F.relu(self.rpn_conv(feature), inplace=True)
            logits.append(self.rpn_cls(hidden).permute(0, 2, 3, 1).flatten(1))
            deltas.append(self.rpn_reg(hidden).permute(0, 2, 3, 1).reshape(hidden.shape[0], -1, 4))
        return logits, deltas

    @torch.no_grad()
    def propose(
        self, logits: Sequence[Tensor], deltas: Sequence[Tensor], anchors: Sequence[Tensor], sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turn predictions into proposals.

        Args:
            logits, deltas: of `forward`.
            anchors: (n, 4) per level.
            sizes: (B, 2), height and width of the images; proposals are clipped to them.

        Returns:
            boxes (B, P, 4), scores (B, P) falling, valid (B, P) bool; P = `proposals` or the number of candidates, if
            that is smaller.
        """
        found = []
        for logit, delta, anchor in zip(logits, deltas, anchors, strict=True):
            keep = min(self.candidates[0 if self.training else 1], logit.shape[1])
            score, index = logit.to(anchor.dtype).sigmoid().sort(dim=1, descending=True, stable=True)
            # copies: torch.export guards the layout of a slice, which is another one where a level has few candidates
            score, index = score.narrow_copy(1, 0, keep), index.narrow_copy(1, 0, keep)
            delta = delta.to(anchor.dtype).gather(1, index[:, :, None].expand(-1, -1, 4))
            found.append((box_ops.clip(box_ops.decode(anchor[index], delta, STDS), sizes), score))
        most = max(score.shape[1] for _, score in found)
        boxes = torch.stack([F.pad(box, (0, 0, 0, most - box.shape[1])) for box, _ in found], 1)  # (B, levels, most, 4)
        scores = torch.stack([F.pad(score, (0, most - score.shape[1])) for _, score in found], 1)
        valid = (boxes[..., 2:] - boxes[..., :2] > self.min_size).all(-1)  # padding is empty, so not valid
        keep = batched_nms(boxes.flatten(0, 1), scores.flatten(0, 1), valid.flatten(0, 1), self.nms_iou).view_as(valid)
        scores, order = torch.where(keep, scores, -1).flatten(1).sort(dim=1, descending=True, stable=True)
        scores, order = scores[:, : self.proposals], order[:, : self.proposals]
        return boxes.flatten(1, 2).gather(1, order[:, :, None].expand(-1, -1, 4)), scores, scores >= 0

    def sample(self, anchors: Tensor, valid: Tensor, targets: PaddedTargets, seeds: Tensor) -> SamplingResult:
        """Choose the anchors of the loss; `anchors` (N, 4), `valid` (B, N) bool, `seeds` (B,)."""
        assigned = self.matcher(targets, anchors.expand(len(valid), -1, -1), valid)
        return self.sampler(assigned, seeds)

    def losses(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, samples: SamplingResult, targets: PaddedTargets
    ) -> dict[str, Tensor]:
        """Compute the two losses over the samples.

        Args:
            logits: (B, N), deltas: (B, N, 4), anchors: (N, 4), of all levels one after the other.
        """
        logit = logits.gather(1, samples.index).to(anchors.dtype)  # (B, S)
        delta = deltas.gather(1, samples.index[:, :, None].expand(-1, -1, 4)).to(anchors.dtype)
        goal = targets.boxes.gather(1, samples.target[:, :, None].expand(-1, -1, 4))
        box = anchors[samples.index]
        goal = box_ops.encode(box, torch.where(samples.positive[:, :, None], goal, box), STDS)
        entropy = F.binary_cross_entropy_with_logits(logit, samples.positive.to(logit.dtype), reduction="none")
        distance = (delta - goal).abs().sum(2)
        negative = samples.valid & ~samples.positive
        average = samples.positive.sum(1).clamp(min=1).sum() + negative.sum(1).clamp(min=1).sum()
        average = average.to(logit.dtype) + EPS
        return {
            "loss_rpn_cls": torch.where(samples.valid, entropy, 0).sum() / average,
            "loss_rpn_bbox": torch.where(samples.positive, distance, 0).sum() / average,
        }

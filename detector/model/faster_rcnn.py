"""The detector: its configuration and the module that chains the parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from detector.model.anchors import AnchorGenerator
from detector.model.fpn import FPN
from detector.model.mask_head import pad_masks
from detector.model.matching import Matcher, PaddedTargets, Sampler
from detector.model.resnet import ResNet
from detector.model.roi_head import RoIHead
from detector.model.rpn import RPN
from detector.structures import Batch, Detections

STRIDES = (4, 8, 16, 32, 64)
SAMPLING_RULES = {"random": ("random", "random"), "deterministic": ("spread", "first")}  # of RPN and of RoI head


@dataclass(frozen=True)
class FasterRCNNConfig:
    """Everything that decides the network and its losses; the default is Faster R-CNN R50-FPN mdconv c3-c5.

    Attributes:
        depth: ResNet depth, 18, 50 or 101.
        num_classes: without background; training takes the number of classes in its data instead.
        dcn: deformable convolutions in the backbone: None, "v1" or "v2".
        dcn_stages: which of the stages c2..c5 have them.
        deform_groups: groups of channels that share offsets.
        mask: predict masks too, with the head of Mask R-CNN.
        frozen_stages: the stem and this many stages are not trained; -1 trains everything, 0 freezes the stem.
        norm: "bn" or, to train from scratch, "gn" with small batches, "syncbn" (statistics of all GPUs) with several.
        norm_eval: batch norms keep their running statistics in training.
        base_channels: width of the ResNet's stem; 64 is the published network.
        fpn_channels: width of the pyramid.
        fc_channels: width of the box head.
        anchor_scale: side of the square anchor in strides.
        anchor_ratios: height / width of the anchors.
        sampler: "random", or "deterministic", which compares runs with other programs.
        rpn_positive_iou: from here on an anchor is positive.
        rpn_negative_iou: below this an anchor is negative.
        rpn_batch_size: anchors in the loss, per image.
        rpn_positive_fraction: largest share of positive ones among them.
        rpn_pre_nms_top_n: boxes per level before suppression, in training and in evaluation.
        rpn_nms_iou: a box that overlaps a better one by more is suppressed.
        rpn_post_nms_top_n: boxes per image after suppression.
        rcnn_iou: from here on a region is positive, below negative.
        roi_batch_size: regions in the loss, per image.
        rcnn_positive_fraction: largest share of positive ones among them.
        score_threshold: detections below it are left out.
        nms_iou: a detection that overlaps a better one of its class by more is suppressed.
        max_detections: most detections per image.
        image_scale: images are resized to fit (long side, short side), ratio kept.
        pixel_mean: of R, G, B in 0..255.
        pixel_std: standard deviations, likewise.
    """

    depth: Literal[18, 50, 101] = 50
    num_classes: int = 80
    dcn: Literal["v1", "v2"] | None = "v2"
    dcn_stages: tuple[bool, bool, bool, bool] = (False, True, True, True)
    deform_groups: int = 1
    mask: bool = False
    frozen_stages: int = 1
    norm: Literal["bn", "gn", "syncbn"] = "bn"
    norm_eval: bool = True
    base_channels: int = 64
    fpn_channels: int = 256
    fc_channels: int = 1024
    anchor_scale: float = 8.0
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    sampler: Literal["random", "deterministic"] = "random"
    rpn_positive_iou: float = 0.7
    rpn_negative_iou: float = 0.3
    rpn_batch_size: int = 256
    rpn_positive_fraction: float = 0.5
    rpn_pre_nms_top_n: tuple[int, int] = (2000, 1000)
    rpn_nms_iou: float = 0.7
    rpn_post_nms_top_n: int = 1000
    rcnn_iou: float = 0.5
    roi_batch_size: int = 512
    rcnn_positive_fraction: float = 0.25
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    max_detections: int = 100
    image_scale: tuple[int, int] = (1333, 800)
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)


class FasterRCNN(nn.Module):
    """Faster R-CNN or Mask R-CNN with a ResNet-FPN backbone; state-dict names and numbers are MMDetection's.

    Args:
        config: see `FasterRCNNConfig`.

    Raises:
        ValueError: a field of `config` is out of its range.
    """

    def __init__(self, config: FasterRCNNConfig | None = None):
        super().__init__()
        self.config = config = config or FasterRCNNConfig()
        if config.sampler not in SAMPLING_RULES:
            raise ValueError(f"sampler must be one of {tuple(SAMPLING_RULES)}, got {config.sampler!r}")
        if config.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {config.num_classes}")
        self.backbone = ResNet(
            config.depth, config.dcn, config.dcn_stages, config.deform_groups, config.frozen_stages, config.norm,
            config.norm_eval, config.base_channels,
        )  # fmt: skip
        self.neck = FPN(self.backbone.out_channels, config.fpn_channels, len(STRIDES))
        rpn_rule, rcnn_rule = SAMPLING_RULES[config.sampler]
        self.rpn_head = RPN(
            config.fpn_channels,
            AnchorGenerator(STRIDES, config.anchor_scale, config.anchor_ratios),
            Matcher(config.rpn_positive_iou, config.rpn_negative_iou, low_quality=config.rpn_negative_iou),
            Sampler(config.rpn_batch_size, config.rpn_positive_fraction, rpn_rule),
            config.rpn_nms_iou,
            config.rpn_pre_nms_top_n,
            config.rpn_post_nms_top_n,
        )
        self.roi_head = RoIHead(
            config.fpn_channels,
            7,
            config.fc_channels,
            config.num_classes,
            STRIDES[:-1],
            Matcher(config.rcnn_iou, config.rcnn_iou),
            Sampler(config.roi_batch_size, config.rcnn_positive_fraction, rcnn_rule),
            config.score_threshold,
            config.nms_iou,
            config.max_detections,
            config.mask,
        )
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std).view(3, 1, 1), persistent=False)

    def normalize(self, batch: Batch) -> Tensor:
        """Return the images as the network's input: normalized in float32, zero on the padding, channels_last."""
        images = (batch.images.float() - self.pixel_mean.float()) / self.pixel_std.float()
        y = torch.arange(images.shape[2], device=images.device) < batch.sizes[:, :1]
        x = torch.arange(images.shape[3], device=images.device) < batch.sizes[:, 1:]
        images = torch.where((y[:, :, None] & x[:, None, :])[:, None], images, 0)
        return images.to(self.pixel_mean.dtype).contiguous(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the pyramid P2..P6 of normalized images (B, 3, H, W)."""
        return self.neck(self.backbone(images))

    def forward(self, batch: Batch) -> dict[str, Tensor] | list[Detections]:
        """Compute losses in training mode, detections in evaluation mode.

        Returns:
            training: {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"} and, of a model with masks,
                "loss_mask"; scalars.
            evaluation: one `Detections` per image, in pixels of the (resized) input.

        Raises:
            ValueError: images are not (B, 3, H, W) uint8 with sides that divide by 32, or training without targets, or
                without masks where the model predicts them.
        """
        _check(batch, self.training, self.config.mask)
        if self.training:
            return self.losses(batch)
        boxes, scores, labels, valid, *masks = self.detect(batch)
        counts = valid.sum(1).tolist()  # the one wait for the device
        columns = boxes, scores, labels, *masks
        return [Detections(*(column[image, :n] for column in columns)) for image, n in enumerate(counts)]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the losses of a batch with targets; on a GPU no tensor is read back to the host."""
        features = self.features(self.normalize(batch))
        logits, deltas = self.rpn_head(features)
        anchors, shapes = self._anchors(features)
        every = torch.cat(anchors)
        targets = PaddedTargets.of(batch.targets, every.dtype)
        seeds = batch.seeds
        if seeds is None:
            seeds = torch.randint(1 << 62, (len(batch.images),), device=every.device)
        valid = self.rpn_head.anchors.valid(shapes, (batch.sizes + 31) // 32 * 32)
        samples = self.rpn_head.sample(every, valid, targets, seeds)
        losses = self.rpn_head.losses(torch.cat(logits, 1), torch.cat(deltas, 1), every, samples, targets)
        proposals, _, valid = self.rpn_head.propose(logits, deltas, anchors, batch.sizes)
        regions, samples = self.roi_head.sample(proposals, valid, targets, seeds + 1)
        logits, deltas = self.roi_head(features, regions, samples.valid)
        losses |= self.roi_head.losses(logits, deltas, regions, samples, targets)
        if self.config.mask:
            bitmaps = pad_masks(batch.targets, targets.labels.shape[1], batch.images.shape[2:], every.dtype)
            losses |= self.roi_head.mask_losses(features, regions, samples, targets, bitmaps)
        return losses

    @torch.no_grad()
    def detect(self, batch: Batch) -> tuple[Tensor, ...]:
        """Detect with fixed shapes: boxes (B, n, 4), scores, labels, valid (B, n) and, if any, masks (B, n, 28, 28)."""
        features = self.features(self.normalize(batch))
        logits, deltas = self.rpn_head(features)
        anchors, _ = self._anchors(features)
        proposals, _, valid = self.rpn_head.propose(logits, deltas, anchors, batch.sizes)
        logits, deltas = self.roi_head(features, proposals, valid)
        boxes, scores, labels, valid = self.roi_head.detect(logits, deltas, proposals, valid, batch.sizes)
        if not self.config.mask:
            return boxes, scores, labels, valid
        masks = self.roi_head.segment(features, boxes, labels, valid).to(boxes.dtype).sigmoid()
        return boxes, scores, labels, valid, masks

    def _anchors(self, features: list[Tensor]) -> tuple[list[Tensor], list[tuple[int, int]]]:
        shapes = [tuple(feature.shape[2:]) for feature in features]
        return self.rpn_head.anchors(shapes), shapes


def _check(batch: Batch, training: bool, mask: bool) -> None:
    """Raise ValueError where a batch cannot be what the model works on."""
    images = batch.images
    if images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images must be (B, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}")
    if images.shape[0] == 0 or images.shape[2] % 32 or images.shape[3] % 32:
        raise ValueError(f"images must not be empty and have sides that divide by 32, got {tuple(images.shape)}")
    if tuple(batch.sizes.shape) != (len(images), 2):
        raise ValueError(f"sizes has shape {tuple(batch.sizes.shape)}, expected {(len(images), 2)}")
    if training and (batch.targets is None or len(batch.targets) != len(images)):
        found = None if batch.targets is None else len(batch.targets)
        raise ValueError(f"training needs one target per image: {len(images)} images, targets: {found}")
    for index, target in enumerate(batch.targets if training and mask else ()):
        masks, (height, width) = target.masks, images.shape[2:]
        if masks is None or masks.dtype not in (torch.uint8, torch.bool):
            raise ValueError(
                f"targets[{index}].masks: expected uint8 or bool, found {masks if masks is None else masks.dtype}"
            )
        if masks.dim() != 3 or len(masks) != len(target.labels) or masks.shape[1] > height or masks.shape[2] > width:
            expected = f"({len(target.labels)}, up to {height}, up to {width})"
            raise ValueError(f"targets[{index}].masks: expected {expected}, found {tuple(masks.shape)}")

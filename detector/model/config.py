"""The configuration of the detector, and the former names of its fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

RENAMED_FIELDS: dict[str, str] = {
    "rpn_samples": "rpn_batch_size",
    "rpn_candidates": "rpn_pre_nms_top_n",
    "rpn_proposals": "rpn_post_nms_top_n",
    "rcnn_iou": "roi_positive_iou",
    "rcnn_samples": "roi_batch_size",
    "rcnn_positive_fraction": "roi_positive_fraction",
    "detections": "max_detections",
}
"""Former name of a field -> its name in `FasterRCNNConfig`. Checkpoints and `config.json` files may have either."""


@dataclass(frozen=True)
class FasterRCNNConfig:
    """All values that the network and its losses depend on; the default is Faster R-CNN R50-FPN mdconv c3-c5.

    Attributes:
        depth: ResNet depth, 18, 50 or 101.
        num_classes: without background; training takes the number of classes in its data instead.
        dcn: deformable convolutions in the backbone: None, "v1" or "v2".
        dcn_stages: which of the stages c2..c5 have them.
        deform_groups: groups of channels that share offsets.
        mask: predict masks too, with the head of Mask R-CNN.
        frozen_stages: the stem and this many stages are not trained; -1 trains everything, 0 freezes the stem.
        norm: "bn", batch norm; to train from scratch "gn", group norm, for small batches, or "syncbn", batch norm with
            the statistics of all GPUs.
        norm_eval: batch norms keep their running statistics in training.
        base_channels: width of the ResNet's stem; 64 is the published network.
        fpn_channels: width of the pyramid.
        fc_channels: width of the box head.
        anchor_scale: side of the square anchor in strides.
        anchor_ratios: height / width of the anchors.
        sampler: "random", or "deterministic", for comparisons with other programs.
        rpn_positive_iou: an anchor with at least this IoU is positive.
        rpn_negative_iou: an anchor with a lower IoU is negative.
        rpn_batch_size: anchors in the loss, per image.
        rpn_positive_fraction: largest share of positive anchors among them.
        rpn_pre_nms_top_n: boxes per level before non-maximum suppression, in training and in evaluation.
        rpn_nms_iou: a box that overlaps a better one by more is suppressed.
        rpn_post_nms_top_n: boxes per image after non-maximum suppression.
        roi_positive_iou: a region with at least this IoU is positive, any other negative.
        roi_batch_size: regions in the loss, per image.
        roi_positive_fraction: largest share of positive regions among them.
        score_threshold: only boxes with a higher score become detections.
        nms_iou: a detection that overlaps a better one of its class by more is suppressed.
        max_detections: largest number of detections per image.
        image_scale: images are resized to fit (long side, short side), ratio kept.
        pixel_mean: mean of R, G and B, in 0..255.
        pixel_std: standard deviation of R, G and B, in 0..255.
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
    roi_positive_iou: float = 0.5
    roi_batch_size: int = 512
    roi_positive_fraction: float = 0.25
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    max_detections: int = 100
    image_scale: tuple[int, int] = (1333, 800)
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)


def rename_fields(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a stored configuration under their present names.

    Args:
        stored: field of `FasterRCNNConfig` -> value, with present or former names. Names that are neither stay as they
            are: the caller decides whether they are an error.
    """
    return {RENAMED_FIELDS.get(name, name): value for name, value in stored.items()}

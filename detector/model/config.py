"""The configuration of the detector, and the former names of its fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from detector.text import shown

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

CHOICES: dict[str, tuple[int | str | None, ...]] = {
    "depth": (18, 50, 101),
    "dcn": (None, "v1", "v2"),
    "frozen_stages": (-1, 0, 1, 2, 3, 4),
    "norm": ("bn", "gn", "syncbn"),
    "roi_layer": ("align", "dpool", "mdpool"),
    "sampler": ("random", "deterministic"),
}
"""Field -> its values."""

FLAGS = ("cascade", "mask", "norm_eval")  # True or False
FRACTIONS = (  # 0 to 1: thresholds of scores and IoUs, and shares
    "rpn_positive_iou",
    "rpn_negative_iou",
    "rpn_positive_fraction",
    "rpn_nms_iou",
    "roi_positive_iou",
    "roi_positive_fraction",
    "score_threshold",
    "nms_iou",
)
COUNTS: dict[str, int] = {
    "num_classes": 1_000_000,
    "groups": 65_536,
    "width_per_group": 65_536,
    "deform_groups": 65_536,
    "base_channels": 65_536,
    "fpn_channels": 65_536,
    "fc_channels": 65_536,
    "rpn_batch_size": 1_000_000,
    "rpn_post_nms_top_n": 1_000_000,
    "roi_batch_size": 1_000_000,
    "max_detections": 1_000_000,
}
"""Field that is a whole number from 1 on -> its upper bound."""

CASCADE_IOU_STEPS = (0.0, 0.1, 0.2)
"""What each head of a cascade adds to `roi_positive_iou`."""

MAX_SAMPLING_RATIO = 64  # samples per bin and axis of a RoI layer
MAX_TOP_N = 1_000_000  # upper bound of both numbers of `rpn_pre_nms_top_n`
MAX_IMAGE_PIXELS = 1 << 26  # upper bound of the product of `image_scale`; 67 million pixels
SMALLEST_SIZE, LARGEST_SIZE = 1e-4, 1e4  # of anchors and deviations: their products stay far from 0 and infinity


@dataclass(frozen=True)
class FasterRCNNConfig:
    """All values that the network and its losses depend on; the default is Faster R-CNN R50-FPN mdconv c3-c5.

    A field of another type or out of its range is a ValueError, which names the field.

    Attributes:
        depth: ResNet depth, 18, 50 or 101.
        num_classes: without background; training takes the number of classes in its data instead.
        dcn: deformable convolutions in the backbone: None, "v1" or "v2".
        dcn_stages: which of the stages c2..c5 have them.
        deform_groups: groups of channels that share offsets.
        groups: groups of channels of the 3x3 convolutions; 1 is ResNet, more is ResNeXt (32, with a `width_per_group`
            of 4, in ResNeXt-101 32x4d).
        width_per_group: channels of each of these groups in c2, for `base_channels` 64; they double with every stage.
        mask: predict masks too, with the head of Mask R-CNN.
        cascade: three box heads one after the other, as in Cascade R-CNN, and three mask heads with `mask`. The boxes
            of a head no longer depend on the class, and are the regions of the next one. The RPN then learns from
            anchors inside the image only, and proposes twice as many boxes in training.
        roi_layer: how the box heads read the pyramid: "align" (RoIAlign), "dpool" (deformable RoI pooling) or "mdpool"
            (modulated).
        roi_sampling_ratio: samples per bin and axis of RoIAlign and of deformable RoI pooling, in the box heads and the
            mask heads; 0 takes as many as a bin has cells.
        frozen_stages: the stem and this many stages are not trained; -1 trains everything, 0 freezes the stem.
        norm: "bn", batch norm; to train from scratch "gn", group norm, for small batches, or "syncbn", batch norm with
            the statistics of all GPUs.
        norm_eval: batch norms keep their running statistics in training.
        base_channels: width of the ResNet's stem; 64 is the published network.
        fpn_channels: width of the pyramid.
        fc_channels: width of the box head, and of the layers that predict the offsets of "dpool" and "mdpool".
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
        roi_positive_iou: a region with at least this IoU is positive, any other negative; of a cascade that of the
            first head, and 0.1 and 0.2 more for the others.
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
    groups: int = 1
    width_per_group: int = 64
    mask: bool = False
    cascade: bool = False
    roi_layer: Literal["align", "dpool", "mdpool"] = "align"
    roi_sampling_ratio: int = 0
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

    def __post_init__(self) -> None:
        for name, values in CHOICES.items():
            self._check(name, _is_one_of(getattr(self, name), values), f"one of {values}")
        for name in FLAGS:
            self._check(name, isinstance(getattr(self, name), bool), "True or False")
        for name, largest in COUNTS.items():
            self._check(name, _is_whole(getattr(self, name), 1, largest), f"a whole number from 1 to {largest}")
        is_ratio = _is_whole(self.roi_sampling_ratio, 0, MAX_SAMPLING_RATIO)
        self._check("roi_sampling_ratio", is_ratio, f"a whole number from 0 to {MAX_SAMPLING_RATIO}")
        for name in FRACTIONS:
            self._check(name, _is_number(getattr(self, name), 0, 1), "0 to 1")

        sizes = f"{SMALLEST_SIZE:g} to {LARGEST_SIZE:g}"
        self._check("anchor_scale", _is_number(self.anchor_scale, SMALLEST_SIZE, LARGEST_SIZE), sizes)
        self._check("anchor_ratios", _are_sizes(self.anchor_ratios, None), f"at least one number, each {sizes}")
        self._check("pixel_std", _are_sizes(self.pixel_std, 3), f"three numbers, each {sizes}")
        largest_iou = 1 - CASCADE_IOU_STEPS[-1] if self.cascade else 1
        is_iou = self.roi_positive_iou <= largest_iou
        self._check("roi_positive_iou", is_iou, f"0 to {largest_iou:g} with cascade True")
        self._check_tuples()

    @property
    def backbone_name(self) -> str:
        """The usual short name of the backbone: R50, or X101-32x4d of a ResNeXt."""
        if self.groups == 1:
            return f"R{self.depth}"
        return f"X{self.depth}-{self.groups}x{self.width_per_group}d"

    def _check_tuples(self) -> None:
        """Check the fields that hold several values of other kinds than sizes."""
        flags = _is_tuple(self.dcn_stages, 4) and all(isinstance(flag, bool) for flag in self.dcn_stages)
        self._check("dcn_stages", flags, "four of True or False")

        top_n = _is_tuple(self.rpn_pre_nms_top_n, 2)
        top_n = top_n and all(_is_whole(number, 1, MAX_TOP_N) for number in self.rpn_pre_nms_top_n)
        self._check("rpn_pre_nms_top_n", top_n, f"two whole numbers from 1 to {MAX_TOP_N}")

        scale = _is_tuple(self.image_scale, 2)
        scale = scale and all(_is_whole(side, 1, MAX_IMAGE_PIXELS) for side in self.image_scale)
        scale = scale and math.prod(self.image_scale) <= MAX_IMAGE_PIXELS
        self._check("image_scale", scale, f"two sides of at least 1 with a product up to {MAX_IMAGE_PIXELS}")

        mean = _is_tuple(self.pixel_mean, 3)
        mean = mean and all(_is_number(value, -LARGEST_SIZE, LARGEST_SIZE) for value in self.pixel_mean)
        self._check("pixel_mean", mean, f"three numbers, each {-LARGEST_SIZE:g} to {LARGEST_SIZE:g}")

    def _check(self, name: str, is_right: bool, expected: str) -> None:
        if not is_right:
            raise ValueError(f"config field '{name}': expected {expected}, got {shown(getattr(self, name))}")


def rename_fields(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a stored configuration under their present names.

    Args:
        stored: field of `FasterRCNNConfig` -> value, with present or former names. Names that are neither stay as they
            are: the caller decides whether they are an error.
    """
    return {RENAMED_FIELDS.get(name, name): value for name, value in stored.items()}


def _is_one_of(value: object, values: tuple[int | str | None, ...]) -> bool:
    if value is None or isinstance(value, str):
        return value in values
    return isinstance(value, Integral) and not isinstance(value, bool) and value in values


def _is_whole(value: object, smallest: int, largest: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and smallest <= int(value) <= largest


def _is_number(value: Any, smallest: float, largest: float) -> bool:
    """Tell whether a value is a number in a range; NaN is in none."""
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real and bool(smallest <= value <= largest)


def _is_tuple(value: object, length: int | None) -> bool:
    """Tell whether a value is a tuple (or list) of a length, or of at least one value if the length is None."""
    if not isinstance(value, tuple | list):
        return False
    return len(value) > 0 if length is None else len(value) == length


def _are_sizes(values: object, length: int | None) -> bool:
    """Tell whether values are so many numbers between the smallest and the largest size."""
    if not _is_tuple(values, length):
        return False
    assert isinstance(values, tuple | list)
    return all(_is_number(value, SMALLEST_SIZE, LARGEST_SIZE) for value in values)

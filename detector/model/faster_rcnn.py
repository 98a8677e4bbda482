"""The detector: connects backbone, pyramid, RPN and RoI head; receives a `Batch`, returns losses or `Detections`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

import torch
from torch import Tensor, nn

from detector.detect import DEFAULT_SCORE, ImageDetector, Start, name_images, start_copy
from detector.image import Image
from detector.model.anchors import AnchorGenerator
from detector.model.config import CASCADE_IOU_STEPS, FasterRCNNConfig
from detector.model.fpn import FPN
from detector.model.matcher import Matcher
from detector.model.padded_targets import pad_masks, pad_targets
from detector.model.resnet import ResNet
from detector.model.roi_head import RoIHead, RoIStage
from detector.model.rpn import RPN
from detector.model.sampler import BoxSampler, SamplingRule
from detector.results import ImageDetections, split_detections
from detector.structures import SIZE_DIVISOR, Batch, Detections, Target

AnyImage = TypeVar("AnyImage", bound=Image)

STRIDES = (4, 8, 16, 32, 64)

CASCADE_DELTA_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
CASCADE_LOSS_WEIGHTS = (1.0, 0.5, 0.25)

RPN_SAMPLING_RULES: dict[str, SamplingRule] = {"random": "random", "deterministic": "spread"}
ROI_SAMPLING_RULES: dict[str, SamplingRule] = {"random": "random", "deterministic": "first"}


class FasterRCNN(nn.Module):
    """Faster, Mask or Cascade R-CNN with a ResNet-FPN backbone; state-dict names and numbers are MMDetection's.

    Args:
        config: see `FasterRCNNConfig`.

    Attributes:
        class_names: by label, for `predict`; `detector.load` takes them from the file. None stands for "class 0", ...
            They are no part of the state dict.

    Raises:
        ValueError: fields of `config` do not go together.
    """

    class_names: Sequence[str] | None = None
    pixel_mean: Tensor  # (3, 1, 1)
    pixel_std: Tensor  # (3, 1, 1)

    def __init__(self, config: FasterRCNNConfig | None = None) -> None:
        super().__init__()
        config = config or FasterRCNNConfig()
        self.config = config

        self.backbone = ResNet(
            depth=config.depth,
            dcn=config.dcn,
            dcn_stages=config.dcn_stages,
            deform_groups=config.deform_groups,
            frozen_stages=config.frozen_stages,
            norm=config.norm,
            norm_eval=config.norm_eval,
            base_channels=config.base_channels,
            groups=config.groups,
            width_per_group=config.width_per_group,
        )
        self.neck = FPN(
            in_channels=self.backbone.out_channels,
            out_channels=config.fpn_channels,
            num_outs=len(STRIDES),
        )
        self.rpn_head = RPN(
            channels=config.fpn_channels,
            anchor_generator=AnchorGenerator(
                strides=STRIDES,
                scale=config.anchor_scale,
                ratios=config.anchor_ratios,
            ),
            matcher=Matcher(
                positive_iou=config.rpn_positive_iou,
                negative_iou=config.rpn_negative_iou,
                low_quality_iou=config.rpn_negative_iou,
            ),
            sampler=BoxSampler(
                num_samples=config.rpn_batch_size,
                positive_fraction=config.rpn_positive_fraction,
                rule=RPN_SAMPLING_RULES[config.sampler],
            ),
            nms_iou=config.rpn_nms_iou,
            pre_nms_top_n=config.rpn_pre_nms_top_n,
            post_nms_top_n=(config.rpn_post_nms_top_n * (2 if config.cascade else 1), config.rpn_post_nms_top_n),
            inside_only=config.cascade,
            smooth_l1_beta=1 / 9 if config.cascade else 0.0,
        )
        self.roi_head = RoIHead(
            channels=config.fpn_channels,
            fc_channels=config.fc_channels,
            num_classes=config.num_classes,
            strides=STRIDES[:-1],
            stages=_roi_stages(config),
            sampler=BoxSampler(
                num_samples=config.roi_batch_size,
                positive_fraction=config.roi_positive_fraction,
                rule=ROI_SAMPLING_RULES[config.sampler],
            ),
            score_threshold=config.score_threshold,
            nms_iou=config.nms_iou,
            max_detections=config.max_detections,
            mask=config.mask,
            roi_layer=config.roi_layer,
            roi_sampling_ratio=config.roi_sampling_ratio,
            smooth_l1_beta=1.0 if config.cascade else 0.0,
        )
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std).view(3, 1, 1), persistent=False)

    def forward(self, batch: Batch) -> dict[str, Tensor] | list[Detections]:
        """Compute losses in training mode, detections in evaluation mode.

        Returns:
            training: {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"} and, of a model with masks,
                "loss_mask"; scalars. Those of a cascade's heads are "s0.loss_cls", ..., "s2.loss_mask".
            evaluation: one `Detections` per image, in pixels of the (resized) input.

        Raises:
            ValueError: images are not (B, 3, H, W) uint8 with sides that divide by 32, or training without targets, or
                without masks where the model predicts them.
        """
        _check_images(batch)
        if self.training:
            _check_targets(batch, self.config.mask)
            return self.losses(batch)

        return split_detections(self.detect(batch))

    @overload
    def predict(self, images: Image, *, score: float = ..., batch_size: int = ...) -> ImageDetections: ...

    @overload
    def predict(
        self, images: list[AnyImage] | tuple[AnyImage, ...], *, score: float = ..., batch_size: int = ...
    ) -> list[ImageDetections]: ...

    def predict(
        self,
        images: Image | list[AnyImage] | tuple[AnyImage, ...],
        *,
        score: float = DEFAULT_SCORE,
        batch_size: int = 1,
    ) -> ImageDetections | list[ImageDetections]:
        """Detect in an image, or in each of a list.

            model, class_names = detector.load("best.pt")
            found = model.predict("photograph.jpg")
            print(found.names, found.scores, found.boxes)
            found.save("found.jpg")

        `detector.predict.predict_images` does the same for images that come one after the other, as in a video.

        Args:
            images: a path, a NumPy array (H, W, 3) uint8 RGB (OpenCV has BGR: give `frame[..., ::-1]`), a PIL image, a
                tensor (3, H, W) uint8 RGB, or a list or tuple of these.
            score: detections below it are left out; of 0 to 1.
            batch_size: images that go through the model at once. The padding of a batch changes scores a little.

        Returns:
            The detections, boxes in the pixels of the image; for a list, a list of them.

        Raises:
            OSError: a file cannot be opened.
            ValueError: a file is not an image; an array, a tensor or a PIL image has another shape, dtype or mode;
                `score` or `batch_size` is out of its range; the model is in training mode.
            TypeError: something is no image at all.
        """
        detector = self.image_detector()
        if isinstance(images, list | tuple):
            return list(detector.detect(name_images(images), score, batch_size))
        (detections,) = detector.detect([("images", images)], score, batch_size)
        return detections

    def image_detector(self, start: Start | None = None) -> ImageDetector:
        """Return what detects in images as users have them.

        Args:
            start: detects in a batch; None computes it here.

        Raises:
            ValueError: the model is in training mode, or has not one name for each class.
        """
        if self.training:
            raise ValueError("model: expected evaluation mode, got training mode; call model.eval() first")
        num_classes = self.config.num_classes
        class_names = default_class_names(num_classes) if self.class_names is None else tuple(self.class_names)
        if len(class_names) != num_classes:
            raise ValueError(f"class_names: expected {num_classes}, one per class, got {len(class_names)}")
        return ImageDetector(
            start=start or self._start,
            device=self.pixel_mean.device,
            image_scale=self.config.image_scale,
            class_names=class_names,
        )

    def _start(self, batch: Batch) -> Callable[[], list[Detections]]:
        wait = start_copy(self.detect(batch))
        return lambda: split_detections(wait())

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the losses of a batch with targets; on a GPU no tensor is read back to the host."""
        assert batch.targets is not None
        features = self.features(self.normalize(batch))
        level_shapes = _level_shapes(features)
        anchors = self.rpn_head.anchor_generator(level_shapes)
        all_anchors = self.rpn_head.anchor_generator.all_levels(level_shapes)
        targets = pad_targets(batch.targets, all_anchors.dtype)
        seeds = batch.seeds
        if seeds is None:
            seeds = torch.randint(1 << 62, (len(batch.images),), device=all_anchors.device)

        # RPN: from anchors to proposals.
        logits, deltas = self.rpn_head(features)
        valid_anchors = self.rpn_head.valid_anchors(level_shapes, all_anchors, batch.sizes)
        samples = self.rpn_head.sample(all_anchors, valid_anchors, targets, seeds)
        losses = self.rpn_head.losses(torch.cat(logits, 1), torch.cat(deltas, 1), all_anchors, samples, targets)
        proposals, _, valid = self.rpn_head.propose(logits, deltas, anchors, batch.sizes)

        # RoI head: from proposals to classes and boxes, and masks if the model has them.
        bitmaps = None
        if self.config.mask:
            num_targets = targets.labels.shape[1]
            height, width = batch.images.shape[2:]
            bitmaps = pad_masks(batch.targets, num_targets, (height, width), all_anchors.dtype)
        losses |= self.roi_head.training_losses(features, proposals, valid, batch.sizes, targets, seeds + 1, bitmaps)
        return losses

    @torch.no_grad()
    def detect(self, batch: Batch) -> tuple[Tensor, ...]:
        """Detect with fixed shapes: nothing waits for the device, and the whole method can be exported.

        Returns:
            boxes (B, n, 4), scores (B, n), labels (B, n), valid (B, n) and, of a model with masks, their
            probabilities (B, n, 28, 28); n = `max_detections`.
        """
        features = self.features(self.normalize(batch))

        # RPN: from anchors to proposals.
        anchors = self.rpn_head.anchor_generator(_level_shapes(features))
        logits, deltas = self.rpn_head(features)
        proposals, _, valid = self.rpn_head.propose(logits, deltas, anchors, batch.sizes)

        # RoI head: from proposals to classes and boxes, and masks if the model has them.
        boxes, scores, labels, valid = self.roi_head.predict(features, proposals, valid, batch.sizes)
        if not self.config.mask:
            return boxes, scores, labels, valid
        masks = self.roi_head.predict_masks(features, boxes, labels, valid)
        return boxes, scores, labels, valid, masks

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the pyramid P2..P6 of normalized images (B, 3, H, W)."""
        pyramid: list[Tensor] = self.neck(self.backbone(images))
        return pyramid

    def normalize(self, batch: Batch) -> Tensor:
        """Return the images as the network's input: normalized in float32, zero on the padding, channels_last."""
        images = (batch.images.float() - self.pixel_mean.float()) / self.pixel_std.float()
        height, width = images.shape[2:]
        inside_y = torch.arange(height, device=images.device) < batch.sizes[:, :1]  # (B, H)
        inside_x = torch.arange(width, device=images.device) < batch.sizes[:, 1:]  # (B, W)
        is_image = (inside_y[:, :, None] & inside_x[:, None, :])[:, None]
        images = torch.where(is_image, images, 0)
        return images.to(self.pixel_mean.dtype).contiguous(memory_format=torch.channels_last)


def default_class_names(num_classes: int) -> tuple[str, ...]:
    """Return names for the classes of a model that nobody has named."""
    return tuple(f"class {label}" for label in range(num_classes))


def _roi_stages(config: FasterRCNNConfig) -> list[RoIStage]:
    """Return the rules of the box heads: one, or three of a cascade, each stricter than the one before."""
    iou = config.roi_positive_iou
    if config.cascade:
        stages = zip(CASCADE_IOU_STEPS, CASCADE_DELTA_STDS, CASCADE_LOSS_WEIGHTS, strict=True)
        return [RoIStage(Matcher(iou + step, iou + step), stds, weight) for step, stds, weight in stages]
    # Mask R-CNN as in MMDetection: a ground truth also takes the regions that overlap it most, from others as well.
    return [RoIStage(Matcher(iou, iou, low_quality_iou=iou if config.mask else None))]


def _level_shapes(features: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return height and width of every level."""
    shapes = []
    for feature in features:
        height, width = feature.shape[2:]
        shapes.append((height, width))
    return shapes


def _check_images(batch: Batch) -> None:
    """Raise ValueError if images or sizes of a batch have another shape or dtype than the model takes."""
    images = batch.images
    shape = tuple(images.shape)
    if images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images: expected (B, 3, H, W) uint8, got {shape} {images.dtype}")
    if images.shape[0] == 0:
        raise ValueError(f"images: expected at least one, got {shape}")
    if images.shape[2] % SIZE_DIVISOR or images.shape[3] % SIZE_DIVISOR:
        raise ValueError(f"images: expected sides that divide by {SIZE_DIVISOR}, got {shape}")
    if batch.sizes.shape != (len(images), 2):
        raise ValueError(f"sizes: expected {(len(images), 2)}, got {tuple(batch.sizes.shape)}")


def _check_targets(batch: Batch, mask: bool) -> None:
    """Raise ValueError if a batch lacks what training needs: one target per image, with masks if the model has them."""
    num_images = len(batch.images)
    if batch.targets is None or len(batch.targets) != num_images:
        got = None if batch.targets is None else len(batch.targets)
        raise ValueError(f"targets: expected one per image in training ({num_images} images), got {got}")
    if mask:
        height, width = batch.images.shape[2:]
        for index, target in enumerate(batch.targets):
            _check_masks(f"targets[{index}].masks", target, height, width)


def _check_masks(name: str, target: Target, height: int, width: int) -> None:
    """Raise ValueError if a target has no masks, or masks of another dtype, number or size; `name` is for messages."""
    masks = target.masks
    if masks is None:
        raise ValueError(f"{name}: expected uint8 or bool, got None")
    if masks.dtype not in (torch.uint8, torch.bool):
        raise ValueError(f"{name}: expected uint8 or bool, got {masks.dtype}")
    num_targets = len(target.labels)
    if masks.dim() != 3 or len(masks) != num_targets or masks.shape[1] > height or masks.shape[2] > width:
        expected = f"({num_targets}, up to {height}, up to {width})"
        raise ValueError(f"{name}: expected {expected}, got {tuple(masks.shape)}")

"""The detectors that `bench.train_step` and `bench.inference` measure, ours and torchvision's, and their batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detector import Batch, FasterRCNN, FasterRCNNConfig, Target
from detector.model.box_head import BoxHead
from detector.structures import padded_side

try:
    from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
except (ImportError, RuntimeError):  # RuntimeError: a build for another torch
    TorchvisionFasterRCNN = None

BOXES_PER_IMAGE = 8


def build_detector(config: FasterRCNNConfig, device: torch.device) -> FasterRCNN:
    """Build our detector with random weights, the same each time."""
    torch.manual_seed(0)
    model = FasterRCNN(config)
    box_heads = [module for module in model.roi_head.modules() if isinstance(module, BoxHead)]
    _initialize_heads(model.rpn_head.rpn_reg, *[head.fc_cls for head in box_heads])
    return model.to(device)


def build_torchvision(config: FasterRCNNConfig, size: tuple[int, int], device: torch.device) -> nn.Module:
    """Build torchvision's Faster R-CNN of the same depth, with the same frozen layers and thresholds.

    It has no deformable layers, no groups, no masks and no cascade.
    """
    torch.manual_seed(0)
    trainable_layers = 4 - max(config.frozen_stages, 0)
    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{config.depth}", weights=None, trainable_layers=trainable_layers
    )
    train_pre_nms_top_n, test_pre_nms_top_n = config.rpn_pre_nms_top_n
    model = TorchvisionFasterRCNN(
        backbone,
        config.num_classes + 1,
        min_size=min(size),
        max_size=max(size),
        rpn_pre_nms_top_n_train=train_pre_nms_top_n,
        rpn_pre_nms_top_n_test=test_pre_nms_top_n,
        rpn_post_nms_top_n_train=config.rpn_post_nms_top_n,
        rpn_post_nms_top_n_test=config.rpn_post_nms_top_n,
        rpn_batch_size_per_image=config.rpn_batch_size,
        box_batch_size_per_image=config.roi_batch_size,
    )
    _initialize_heads(model.rpn.head.bbox_pred, model.roi_heads.box_predictor.cls_score)
    return model.to(device)


def _initialize_heads(regressor: nn.Module, *classifiers: nn.Linear) -> None:
    """Initialize layers so that random weights give the later steps as much to do as trained ones.

    The boxes stay near the anchors, of which suppression then leaves as many as it may, and some become detections.
    With torchvision's own initialization it would propose 199 boxes where ours proposes 1000.
    """
    nn.init.normal_(regressor.weight, std=1e-3)
    for classifier in classifiers:
        nn.init.normal_(classifier.weight, std=0.1)


def make_batch(config: FasterRCNNConfig, batch_size: int, size: tuple[int, int]) -> Batch:
    """Return images of noise with `BOXES_PER_IMAGE` boxes each, padded as `padded_side` says.

    Args:
        config: number of classes, and whether the boxes get masks.
        batch_size: images.
        size: height and width, pixels.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = size
    shape = (batch_size, 3, padded_side(height), padded_side(width))
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    targets = [_random_target(config, size, generator) for _ in range(batch_size)]
    return Batch(images, torch.tensor([size] * batch_size), targets, torch.arange(batch_size))


def _random_target(config: FasterRCNNConfig, size: tuple[int, int], generator: torch.Generator) -> Target:
    height, width = size
    image_size = torch.tensor([width, height])
    box_size = (0.1 + 0.4 * torch.rand(BOXES_PER_IMAGE, 2, generator=generator)) * image_size
    corner = torch.rand(BOXES_PER_IMAGE, 2, generator=generator) * (image_size - box_size)
    boxes = torch.cat([corner, corner + box_size], 1)
    masks = _box_masks(boxes, size) if config.mask else None
    labels = torch.randint(config.num_classes, (BOXES_PER_IMAGE,), generator=generator)
    return Target(boxes, labels, masks)


def _box_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return masks (N, H, W) that are set inside the boxes (N, 4)."""
    height, width = size
    x = torch.arange(width) + 0.5
    y = torch.arange(height) + 0.5
    inside_x = (x > boxes[:, 0:1]) & (x < boxes[:, 2:3])  # (N, W)
    inside_y = (y > boxes[:, 1:2]) & (y < boxes[:, 3:4])  # (N, H)
    return inside_y[:, :, None] & inside_x[:, None]


def torchvision_inputs(batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return the batch as torchvision takes it: images in [0, 1] of their own size, labels from 1."""
    images = []
    for image, (height, width) in zip(batch.images, batch.sizes.tolist(), strict=True):
        images.append(image[:, :height, :width].float() / 255)
    targets = [{"boxes": target.boxes, "labels": target.labels + 1} for target in batch.targets]
    return images, targets

"""The golden model: weights by formula, images, and comparison with summaries of large tensors."""

from __future__ import annotations

from collections.abc import Iterable
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from detector import Batch, FasterRCNN, FasterRCNNConfig, Target
from tests.golden.fill import fill, summary

FULL_GRADS = {  # parameters whose golden gradients have many samples
    "backbone.layer2.0.bn2.weight",
    "backbone.layer2.0.conv2.weight",
    "backbone.layer2.0.conv2.conv_offset.weight",
    "backbone.layer2.0.conv2.conv_offset.bias",
    "backbone.layer3.0.downsample.0.weight",
    "backbone.layer3.5.conv2.weight",
    "backbone.layer3.5.conv2.conv_offset.weight",
    "backbone.layer4.2.bn3.bias",
    "backbone.layer4.2.conv2.weight",
    "backbone.layer4.2.conv2.conv_offset.weight",
    "backbone.layer4.2.conv2.conv_offset.bias",
    "neck.lateral_convs.3.conv.weight",
    "neck.fpn_convs.0.conv.weight",
    "rpn_head.rpn_conv.weight",
    "rpn_head.rpn_cls.weight",
    "rpn_head.rpn_reg.weight",
    "roi_head.bbox_head.shared_fcs.0.weight",
    "roi_head.bbox_head.fc_cls.weight",
    "roi_head.bbox_head.fc_reg.weight",
}


def fill_model(model: nn.Module, salt: str) -> None:
    """Set all entries of the state dict to their values by formula, in place."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(torch.from_numpy(fill(name, tuple(value.shape), salt)))


def golden_detector(config: FasterRCNNConfig, salt: str) -> FasterRCNN:
    """Build a detector and fill it; its initial values, all of which are replaced, are not drawn."""

    def keep(tensor: Tensor, *_: object, **__: object) -> Tensor:
        return tensor

    with mock.patch.object(Tensor, "normal_", keep), mock.patch.object(Tensor, "uniform_", keep):
        model = FasterRCNN(config)
    fill_model(model, salt)
    return model


def padded_size(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the height and width, multiples of 32, that hold images of these (height, width)."""
    heights, widths = zip(*sizes, strict=True)
    return -(-max(heights) // 32) * 32, -(-max(widths) // 32) * 32


def make_batch(
    images: list[np.ndarray],
    boxes: list[np.ndarray],
    labels: list[np.ndarray],
    dtype: torch.dtype,
) -> Batch:
    """Pad (H, W, 3) BGR images into a batch."""
    sizes = [image.shape[:2] for image in images]
    height, width = padded_size(sizes)
    padded = torch.full((len(images), 3, height, width), 77, dtype=torch.uint8)  # the value of padding has no effect
    for index, image in enumerate(images):
        rows, columns = sizes[index]
        rgb = torch.from_numpy(image[:, :, ::-1].copy())
        padded[index, :, :rows, :columns] = rgb.permute(2, 0, 1)

    targets = []
    for box, label in zip(boxes, labels, strict=True):
        targets.append(Target(torch.from_numpy(box).to(dtype), torch.from_numpy(label).long()))
    return Batch(padded, torch.tensor(sizes), targets)


def assert_summary(
    arrays: dict[str, np.ndarray],
    name: str,
    tensor: Tensor,
    num_samples: int,
    limit: float,
    scale: float = 0.0,
) -> None:
    """Compare a tensor with its golden summary.

    Args:
        arrays: of the golden file.
        name: of the summary in it.
        tensor: to compare.
        num_samples: samples in the summary.
        limit: of the error of samples and l2 norm, relative to the norm of the samples and to the l2 norm.
        scale: added to the norms, for tensors that are small compared with the numbers they are sums of.
    """
    got = summary(tensor.detach().cpu().double().numpy(), num_samples)
    samples = arrays[f"{name}.samples"]
    error = np.linalg.norm(got["samples"] - samples)
    assert error <= limit * (np.linalg.norm(samples) + scale), f"{name}: samples differ by {error:.3g}"

    norm = arrays[f"{name}.stats"][2]
    error = abs(got["stats"][2] - norm)
    assert error <= limit * (norm + scale), f"{name}: l2 norm: expected {norm!r}, got {got['stats'][2]!r}"

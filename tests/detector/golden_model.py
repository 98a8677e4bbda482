"""The golden model: weights by formula, images, and comparison with summaries of large tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from detector import Batch, Target
from tests.golden.fill import fill, summary

FULL_GRADS = {
    "backbone": (
        "layer2.0.conv2.weight", "layer2.0.conv2.conv_offset.weight", "layer2.0.conv2.conv_offset.bias",
        "layer3.5.conv2.weight", "layer3.5.conv2.conv_offset.weight", "layer4.2.conv2.weight",
        "layer4.2.conv2.conv_offset.weight", "layer4.2.conv2.conv_offset.bias", "layer2.0.bn2.weight",
        "layer4.2.bn3.bias", "layer3.0.downsample.0.weight",
    ),
    "neck": ("lateral_convs.3.conv.weight", "fpn_convs.0.conv.weight"),
    "rpn_head": ("rpn_conv.weight", "rpn_cls.weight", "rpn_reg.weight"),
    "roi_head.bbox_head": ("shared_fcs.0.weight", "fc_cls.weight", "fc_reg.weight"),
}  # fmt: skip
FULL_GRADS = {f"{part}.{name}" for part, names in FULL_GRADS.items() for name in names}


def fill_model(model: nn.Module, salt: str) -> None:
    """Set every entry of the state dict to its value by formula, in place."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(torch.from_numpy(fill(name, tuple(value.shape), salt)))


def make_batch(
    images: list[np.ndarray], boxes: list[np.ndarray], labels: list[np.ndarray], dtype: torch.dtype
) -> Batch:
    """Pad (H, W, 3) BGR images into a batch."""
    height, width = (-(-max(image.shape[axis] for image in images) // 32) * 32 for axis in (0, 1))
    padded = torch.full((len(images), 3, height, width), 77, dtype=torch.uint8)  # what padding holds must not matter
    for row, image in zip(padded, images, strict=True):
        row[:, : image.shape[0], : image.shape[1]] = torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1)
    targets = [
        Target(torch.from_numpy(box).to(dtype), torch.from_numpy(label).long())
        for box, label in zip(boxes, labels, strict=True)
    ]
    return Batch(padded, torch.tensor([image.shape[:2] for image in images]), targets)


def assert_summary(arrays: dict, name: str, found: Tensor, n: int, limit: float, scale: float | None = None) -> None:
    """Compare a tensor with its golden summary.

    Args:
        limit: of the error of samples and l2 norm, relative to the norm of the samples and to the l2 norm.
        scale: added to the norms, for tensors that are small beside the numbers they are sums of.
    """
    got = summary(found.detach().cpu().double().numpy(), n)
    samples, stats = arrays[f"{name}.samples"], arrays[f"{name}.stats"]
    extra = scale or 0.0
    error = np.linalg.norm(got["samples"] - samples)
    assert error <= limit * (np.linalg.norm(samples) + extra), f"{name}: samples differ by {error:.3g}"
    error = abs(got["stats"][2] - stats[2])
    assert error <= limit * (stats[2] + extra), f"{name}: l2 norm {got['stats'][2]!r}, expected {stats[2]!r}"

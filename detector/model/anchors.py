"""Anchors of every pyramid level.

Letters: B images, A anchors per cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class AnchorGenerator(nn.Module):
    """Anchors centered on the corner (x * stride, y * stride) of each cell, one per ratio.

    Args:
        strides: of the levels, pixels; also the base size of an anchor.
        scale: side of the square anchor in strides.
        ratios: height / width.

    Source:
        MMDetection's AnchorGenerator; base anchors are computed in float32, as there.
    """

    base_anchors: Tensor  # (levels, A, 4)

    def __init__(self, strides: Sequence[int], scale: float, ratios: Sequence[float]) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.anchors_per_cell = len(ratios)

        root = torch.tensor(ratios, dtype=torch.float32).sqrt()
        shape = torch.stack([1 / root, root], -1)  # (A, 2): width and height of an anchor of area 1
        base_size = torch.tensor(self.strides).reshape(-1, 1, 1)
        half = shape[None] * base_size * scale * 0.5
        self.register_buffer("base_anchors", torch.cat([-half, half], -1), persistent=False)

    def forward(self, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return (H * W * A, 4) anchors for each level of `shapes` (H, W), in (y, x, anchor) order."""
        anchors = []
        for base, stride, (height, width) in zip(self.base_anchors, self.strides, shapes, strict=True):
            y = torch.arange(height, device=base.device) * stride
            x = torch.arange(width, device=base.device) * stride
            corner = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (H, W, 2): x y
            corner = corner.repeat(1, 1, 2)  # (H, W, 4): x y x y
            anchors.append((corner[:, :, None] + base).reshape(-1, 4))
        return anchors

    def valid_flags(self, shapes: Sequence[tuple[int, int]], pad_sizes: Tensor) -> Tensor:
        """Tell which anchors are on an image, not on padding that only larger images of the batch need.

        Args:
            shapes: (H, W) of each level.
            pad_sizes: (B, 2) int64, height and width of each image as it would be padded alone.

        Returns:
            (B, anchors of all levels) bool.
        """
        flags = []
        for stride, (height, width) in zip(self.strides, shapes, strict=True):
            cells = (pad_sizes + stride - 1) // stride  # (B, 2)
            y = torch.arange(height, device=cells.device) < cells[:, :1]
            x = torch.arange(width, device=cells.device) < cells[:, 1:]
            is_inside = y[:, :, None] & x[:, None, :]
            flags.append(is_inside.flatten(1).repeat_interleave(self.anchors_per_cell, 1))
        return torch.cat(flags, 1)

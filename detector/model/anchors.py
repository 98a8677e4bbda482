"""Anchors of every pyramid level.

Letters: B images, A anchors per cell. A cell is one position of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class AnchorGenerator(nn.Module):
    """Anchors of every cell (x, y), one per ratio, centered on the pixel (x * stride, y * stride).

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

        sqrt_ratios = torch.tensor(ratios, dtype=torch.float32).sqrt()
        unit_sizes = torch.stack([1 / sqrt_ratios, sqrt_ratios], -1)  # (A, 2): width and height at area 1
        base_sizes = torch.tensor(self.strides).reshape(-1, 1, 1)
        half_sizes = unit_sizes[None] * base_sizes * scale * 0.5
        base_anchors = torch.cat([-half_sizes, half_sizes], -1)
        self.register_buffer("base_anchors", base_anchors, persistent=False)

    def forward(self, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return (H * W * A, 4) anchors for each level of `shapes` (H, W), in (y, x, anchor) order."""
        anchors = []
        for base, stride, (height, width) in zip(self.base_anchors, self.strides, shapes, strict=True):
            y = torch.arange(height, device=base.device) * stride
            x = torch.arange(width, device=base.device) * stride
            centers = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (H, W, 2): x y
            shifts = centers.repeat(1, 1, 2)  # (H, W, 4): x y x y
            level_anchors = shifts[:, :, None] + base  # (H, W, A, 4)
            anchors.append(level_anchors.reshape(-1, 4))
        return anchors

    def valid_flags(self, shapes: Sequence[tuple[int, int]], pad_sizes: Tensor) -> Tensor:
        """Tell which anchors belong to an image, and not to padding that only larger images of the batch need.

        Args:
            shapes: (H, W) of each level.
            pad_sizes: (B, 2) int64, height and width of each image as it would be padded alone.

        Returns:
            (B, anchors of all levels) bool.
        """
        flags = []
        for stride, (height, width) in zip(self.strides, shapes, strict=True):
            cells = (pad_sizes + stride - 1) // stride  # (B, 2)
            inside_y = torch.arange(height, device=cells.device) < cells[:, :1]  # (B, H)
            inside_x = torch.arange(width, device=cells.device) < cells[:, 1:]  # (B, W)
            is_inside = inside_y[:, :, None] & inside_x[:, None, :]
            flags.append(is_inside.flatten(1).repeat_interleave(self.anchors_per_cell, 1))
        return torch.cat(flags, 1)

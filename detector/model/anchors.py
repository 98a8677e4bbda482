"""Anchors of every pyramid level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class AnchorGenerator(nn.Module):
    """Anchors centerd on the corner (x * stride, y * stride) of each cell, one per ratio.

    Args:
        strides: of the levels, pixels; also the base size of an anchor.
        scale: side of the square anchor in strides.
        ratios: height / width.

    Source:
        MMDetection's AnchorGenerator; base anchors are computed in float32, as there.
    """

    def __init__(self, strides: Sequence[int], scale: float, ratios: Sequence[float]):
        super().__init__()
        self.strides = tuple(strides)
        self.per_cell = len(ratios)
        root = torch.tensor(ratios, dtype=torch.float32).sqrt()
        half = torch.stack([1 / root, root], -1)[None] * torch.tensor(self.strides).reshape(-1, 1, 1) * scale * 0.5
        self.register_buffer("base", torch.cat([-half, half], -1), persistent=False)  # (levels, ratios, 4)

    def forward(self, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return (H * W * A, 4) anchors for each level of `shapes` (H, W), in (y, x, anchor) order."""
        anchors = []
        for base, stride, (height, width) in zip(self.base, self.strides, shapes, strict=True):
            y = torch.arange(height, device=base.device) * stride
            x = torch.arange(width, device=base.device) * stride
            shift = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).repeat(1, 1, 2)  # (H, W, 4): x y x y
            anchors.append((shift[:, :, None] + base).reshape(-1, 4))
        return anchors

    def valid(self, shapes: Sequence[tuple[int, int]], pad_sizes: Tensor) -> Tensor:
        """Tell which anchors stand on an image's own padded area.

        Args:
            shapes: (H, W) of each level.
            pad_sizes: (B, 2) int64, height and width of each image rounded up on its own.

        Returns:
            (B, anchors of all levels) bool.
        """
        flags = []
        for stride, (height, width) in zip(self.strides, shapes, strict=True):
            cells = (pad_sizes + stride - 1) // stride  # (B, 2)
            y = torch.arange(height, device=cells.device) < cells[:, :1]
            x = torch.arange(width, device=cells.device) < cells[:, 1:]
            inside = y[:, :, None] & x[:, None, :]
            flags.append(inside.flatten(1).repeat_interleave(self.per_cell, 1))
        return torch.cat(flags, 1)

"""Anchors of every pyramid level.

Letters: B images, A anchors per cell. A cell is one position of a feature map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from detector.ops.tensor_memory import TensorMemory

REMEMBERED_SHAPES = 16
"""Padded shapes of batches whose anchors are kept: at 800x1344, 10 MB each."""


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
        self._memory: TensorMemory[list[Tensor]] = TensorMemory(3 * REMEMBERED_SHAPES)

    def forward(self, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return (H * W * A, 4) anchors for each level of `shapes` (H, W), in (y, x, anchor) order."""
        return self._remember("levels", shapes, lambda: self._make_levels(shapes))

    def all_levels(self, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Return the anchors (N, 4) of all levels, one after the other."""
        return self._remember("all levels", shapes, lambda: [torch.cat(self(shapes))])[0]

    def valid_flags(self, shapes: Sequence[tuple[int, int]], pad_sizes: Tensor) -> Tensor:
        """Tell which anchors belong to an image, and not to padding that only larger images of the batch need.

        Args:
            shapes: (H, W) of each level.
            pad_sizes: (B, 2) int64, height and width of each image as it would be padded alone.

        Returns:
            (B, anchors of all levels) bool.
        """
        corners = self._remember("corners", shapes, lambda: [self._make_corners(shapes)])[0]
        return (corners < pad_sizes[:, None, :]).all(2)

    def _remember(self, name: str, shapes: Sequence[tuple[int, int]], make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return what `make` returns for the shapes, or has returned; a list that nobody changes."""
        return self._memory.get(self.base_anchors, (name, *map(tuple, shapes)), make)

    def _make_levels(self, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Compute the anchors of each level."""
        anchors = []
        for base, stride, (height, width) in zip(self.base_anchors, self.strides, shapes, strict=True):
            y = torch.arange(height, device=base.device) * stride
            x = torch.arange(width, device=base.device) * stride
            centers = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (H, W, 2): x y
            shifts = centers.repeat(1, 1, 2)  # (H, W, 4): x y x y
            level_anchors = shifts[:, :, None] + base  # (H, W, A, 4)
            anchors.append(level_anchors.reshape(-1, 4))
        return anchors

    def _make_corners(self, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Return (N, 2) int32: y and x of the first pixel of the cell of each anchor."""
        corners = []
        device = self.base_anchors.device
        for stride, (height, width) in zip(self.strides, shapes, strict=True):
            y = torch.arange(height, device=device, dtype=torch.int32) * stride
            x = torch.arange(width, device=device, dtype=torch.int32) * stride
            cells = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)  # (H, W, 2): y x
            corners.append(cells[:, :, None].expand(-1, -1, self.anchors_per_cell, -1).reshape(-1, 2))
        return torch.cat(corners)

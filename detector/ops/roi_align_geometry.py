"""The sizes of one RoIAlign, which the operator hands to the CPU path and to the GPU kernels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

MAX_ADAPTIVE_SAMPLES = 1 << 20
"""Adaptive sampling takes at most this many samples per bin and axis."""


@dataclass(frozen=True)
class RoIAlignGeometry:
    """The sizes of one RoIAlign over a pyramid.

    Attributes:
        batch: number of images.
        heights: height of each level, in cells.
        widths: width of each level, in cells.
        strides: pixels per cell of each level.
        bins: bins per side of the output, S.
        sampling_ratio: samples per bin and axis; 0 is adaptive.
    """

    batch: int
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    strides: tuple[float, ...]
    bins: int
    sampling_ratio: int

    @property
    def level_cells(self) -> list[int]:
        """Number of cells of each level, over all images."""
        return [self.batch * height * width for height, width in zip(self.heights, self.widths, strict=True)]

    @property
    def level_starts(self) -> list[int]:
        """Row where each level begins in the table (N, C) of the cells of all levels and images."""
        return list(accumulate(self.level_cells[:-1], initial=0))

    @property
    def num_cells(self) -> int:
        """Number of cells of all levels and images, N."""
        return sum(self.level_cells)

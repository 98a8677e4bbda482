"""The sizes of one RoI pooling, which the operator hands to its backends."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

MAX_ADAPTIVE_SAMPLES = 1 << 20
"""Adaptive sampling takes at most this many samples per bin and axis."""


@dataclass(frozen=True)
class RoIPoolGeometry:
    """The sizes of one RoI pooling over a pyramid, or over one map, which is a pyramid of one level.

    Attributes:
        batch: number of images.
        heights: height of each level, in cells.
        widths: width of each level, in cells.
        scales: cells per pixel of each level.
        bins: bins of the output, (y, x).
        sampling_ratio: samples per bin and axis; 0 is adaptive.
        gamma: what offsets are multiplied by, beside the size of the roi.
    """

    batch: int
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    scales: tuple[float, ...]
    bins: tuple[int, int]
    sampling_ratio: int
    gamma: float = 0.1

    @property
    def bins_per_roi(self) -> int:
        """Number of bins of a roi."""
        return self.bins[0] * self.bins[1]

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

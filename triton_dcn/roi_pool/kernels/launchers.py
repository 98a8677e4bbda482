"""RoI pooling on a GPU: from tensors to launches.

Receives checked tensors and a `RoIPoolGeometry` from `roi_pool.operator` and returns plain tensors to it.

Letters: R rois, Ph Pw bins of a roi, P their number, S the larger of them, C channels, N cells of all levels and
images, L the longest side of any level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from triton_dcn.roi_pool.geometry import MAX_ADAPTIVE_SAMPLES, RoIPoolGeometry
from triton_dcn.roi_pool.kernels.axis_weights import roi_weights_kernel
from triton_dcn.roi_pool.kernels.deformed import (
    deformed_bins_kernel,
    deformed_pool_grad_kernel,
    deformed_pool_grad_offset_kernel,
    deformed_pool_kernel,
)
from triton_dcn.roi_pool.kernels.pool import roi_pool_grad_kernel, roi_pool_kernel
from triton_dcn.roi_pool.kernels.sampling import ADAPTIVE_CANDIDATES, ADAPTIVE_SLOPE_CANDIDATES

TILE = (2, 4)  # height and width of the backward pass's tiles of cells
BLOCK_L = 32  # cells of an axis per program
MAX_BLOCK_C = 256


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the table that `forward` keeps for features of this dtype."""
    return dtype


def forward(
    geometry: RoIPoolGeometry,
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None,
    *,
    keep_cells: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Pool the features; see `roi_pool.functional`.

    Returns:
        (R, C, Ph, Pw) with channels_last strides; and, with `keep_cells`, the table (N, C) of all cells for `backward`.
    """
    cells = _cell_table(geometry, features) if keep_cells else None
    maps = _channels_last(features) if cells is None else cells.split(geometry.level_cells)
    channels = features[0].shape[1]
    out = features[0].new_empty(len(rois), *geometry.bins, channels)  # written in full
    if out.numel() == 0 or geometry.batch == 0:
        return out.zero_().permute(0, 3, 1, 2), cells

    rois = rois.float().contiguous()
    levels = levels.contiguous()
    heights, widths = level_sizes(geometry)
    block_c = _block_c(channels)
    grid = (len(rois) * geometry.bins_per_roi, triton.cdiv(channels, block_c))
    with torch.cuda.device_of(out):
        if offset is None:
            weights, bounds, _ = merge_samples(geometry, rois, levels)
            roi_pool_kernel[grid](
                out,
                maps,
                heights,
                widths,
                weights,
                bounds,
                rois,
                levels,
                channels,
                weights.shape[2],
                LEVELS=len(maps),
                BINS_Y=geometry.bins[0],
                BINS_X=geometry.bins[1],
                BINS=max(geometry.bins),
                BLOCK_C=block_c,
                num_warps=1,
                enable_fp_fusion=True,
            )
        else:
            bins = place_bins(geometry, rois, levels, offset)
            deformed_pool_kernel[grid](
                out,
                maps,
                heights,
                widths,
                bins.starts,
                bins.sizes,
                bins.bounds,
                rois,
                levels,
                channels,
                LEVELS=len(maps),
                BINS=geometry.bins_per_roi,
                SAMPLING_RATIO=geometry.sampling_ratio,
                CANDIDATES=geometry.sampling_ratio or ADAPTIVE_CANDIDATES,
                BLOCK_C=block_c,
                num_warps=1,
                enable_fp_fusion=True,
            )
    return out.permute(0, 3, 1, 2), cells


def backward(
    geometry: RoIPoolGeometry,
    grad: Tensor,
    cells: Tensor | None,
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None,
    *,
    needs_features: bool,
    needs_offset: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradient of all levels as one (N, C) table in the dtype of `grad`, and that of the offset.

    Args:
        geometry: of the call.
        grad: (R, C, Ph, Pw).
        cells: (N, C), what `forward` kept; read only for the gradient of the offset.
        rois, levels, offset: as in `forward`.
        needs_features, needs_offset: which gradients to compute; None takes the place of the other one.
    """
    grad = grad.permute(0, 2, 3, 1).contiguous()
    channels = grad.shape[3]
    table = grad.new_empty(geometry.num_cells, channels) if needs_features else None  # both are written in full
    grad_offset = None
    if needs_offset and offset is not None:
        grad_offset = torch.empty_like(offset, memory_format=torch.contiguous_format)
    if len(rois) == 0 or channels == 0 or geometry.num_cells == 0:
        return None if table is None else table.zero_(), None if grad_offset is None else grad_offset.zero_()

    rois = rois.float().contiguous()
    levels = levels.contiguous()
    with torch.cuda.device_of(grad):
        if offset is None:
            if table is not None:
                _gather_gradient(geometry, table, grad, rois, levels)
            return table, None
        bins = place_bins(geometry, rois, levels, offset)
        if table is not None:
            _gather_deformed_gradient(geometry, table, grad, rois, levels, bins)
        if grad_offset is not None and cells is not None:
            _sum_offset_gradient(geometry, grad_offset, grad, cells, rois, levels, bins)
    return table, grad_offset


def _gather_gradient(geometry: RoIPoolGeometry, out: Tensor, grad: Tensor, rois: Tensor, levels: Tensor) -> None:
    """Write the gradient (N, C) of features that were pooled without an offset."""
    channels = out.shape[1]
    order, begins = sort_by_image(geometry, rois, levels)
    heights, widths = level_sizes(geometry)
    block_c = _block_c(channels)
    weights, bounds, hulls = merge_samples(geometry, rois, levels)
    roi_pool_grad_kernel[(_count_tiles(geometry), triton.cdiv(channels, block_c))](
        out,
        grad,
        heights,
        widths,
        weights,
        bounds,
        hulls,
        order,
        begins,
        geometry.batch,
        channels,
        weights.shape[2],
        LEVELS=len(geometry.heights),
        BINS_Y=geometry.bins[0],
        BINS_X=geometry.bins[1],
        BINS=max(geometry.bins),
        TILE_H=TILE[0],
        TILE_W=TILE[1],
        BLOCK_C=block_c,
        BLOCK_S=triton.next_power_of_2(max(geometry.bins)),
        num_warps=1,
        enable_fp_fusion=True,
    )


def _gather_deformed_gradient(
    geometry: RoIPoolGeometry, out: Tensor, grad: Tensor, rois: Tensor, levels: Tensor, bins: DeformedBins
) -> None:
    """Write the gradient (N, C) of features that were pooled with an offset."""
    channels = out.shape[1]
    order, begins = sort_by_image(geometry, rois, levels)
    heights, widths = level_sizes(geometry)
    block_c = _block_c(channels)
    deformed_pool_grad_kernel[(_count_tiles(geometry), triton.cdiv(channels, block_c))](
        out,
        grad,
        heights,
        widths,
        bins.starts,
        bins.sizes,
        bins.bounds,
        bins.hulls,
        order,
        begins,
        geometry.batch,
        channels,
        LEVELS=len(geometry.heights),
        BINS=geometry.bins_per_roi,
        SAMPLING_RATIO=geometry.sampling_ratio,
        CANDIDATES=geometry.sampling_ratio or ADAPTIVE_CANDIDATES,
        TILE_H=TILE[0],
        TILE_W=TILE[1],
        BLOCK_C=block_c,
        BLOCK_P=triton.next_power_of_2(geometry.bins_per_roi),
        num_warps=1,
        enable_fp_fusion=True,
    )


def _sum_offset_gradient(
    geometry: RoIPoolGeometry,
    out: Tensor,
    grad: Tensor,
    cells: Tensor,
    rois: Tensor,
    levels: Tensor,
    bins: DeformedBins,
) -> None:
    """Write the gradient of the offset (R, 2, Ph, Pw)."""
    channels = grad.shape[3]
    heights, widths = level_sizes(geometry)
    maps = cells.split(geometry.level_cells)
    deformed_pool_grad_offset_kernel[(len(rois) * geometry.bins_per_roi,)](
        out,
        grad,
        maps,
        heights,
        widths,
        bins.starts,
        bins.sizes,
        bins.bounds,
        rois,
        levels,
        geometry.gamma,
        channels,
        LEVELS=len(geometry.scales),
        BINS=geometry.bins_per_roi,
        SAMPLING_RATIO=geometry.sampling_ratio,
        CANDIDATES=geometry.sampling_ratio or ADAPTIVE_SLOPE_CANDIDATES,
        BLOCK_C=_block_c(channels),
        num_warps=1,
        enable_fp_fusion=True,
    )


def merge_samples(geometry: RoIPoolGeometry, rois: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, bounds and hulls of `axis_weights`; rois (R, 5) float32, levels (R,) int64, contiguous; R > 0."""
    longest = max(geometry.heights + geometry.widths)
    bins = max(geometry.bins)
    weights = rois.new_empty(len(rois), 2, longest, bins)  # only inside the hulls
    bounds = levels.new_empty(len(rois), 2, bins, 2, dtype=torch.int32)  # written in full, as hulls
    hulls = levels.new_empty(len(rois), 2, 2, dtype=torch.int32)
    heights, widths = level_sizes(geometry)
    roi_weights_kernel[(2 * len(rois), triton.cdiv(longest, BLOCK_L))](
        weights,
        bounds,
        hulls,
        rois,
        levels,
        heights,
        widths,
        geometry.scales,
        geometry.batch,
        longest,
        LEVELS=len(geometry.scales),
        BINS_Y=geometry.bins[0],
        BINS_X=geometry.bins[1],
        BINS=bins,
        SAMPLING_RATIO=geometry.sampling_ratio,
        CANDIDATES=geometry.sampling_ratio or ADAPTIVE_CANDIDATES,
        MAX_SAMPLES=MAX_ADAPTIVE_SAMPLES,
        BLOCK_L=BLOCK_L,
        BLOCK_S=triton.next_power_of_2(bins),
        num_warps=1,
        enable_fp_fusion=False,  # the rounding of the CPU path: a sample at -1 or size must not move across
    )
    return weights, bounds, hulls


@dataclass(frozen=True)
class DeformedBins:
    """Where the bins of all rois lie; see `deformed`.

    Attributes:
        starts: (R, 2, P) float32.
        sizes: (R, 2, 3) float32.
        bounds: (R, 2, P, 2) int32.
        hulls: (R, 2, 2) int32.
    """

    starts: Tensor
    sizes: Tensor
    bounds: Tensor
    hulls: Tensor


def place_bins(geometry: RoIPoolGeometry, rois: Tensor, levels: Tensor, offset: Tensor) -> DeformedBins:
    """Return where the bins lie; rois (R, 5) float32 and levels (R,) int64, contiguous; R > 0."""
    num_bins = geometry.bins_per_roi
    bins = DeformedBins(  # all are written in full
        starts=rois.new_empty(len(rois), 2, num_bins),
        sizes=rois.new_empty(len(rois), 2, 3),
        bounds=levels.new_empty(len(rois), 2, num_bins, 2, dtype=torch.int32),
        hulls=levels.new_empty(len(rois), 2, 2, dtype=torch.int32),
    )
    heights, widths = level_sizes(geometry)
    deformed_bins_kernel[(len(rois),)](
        bins.starts,
        bins.sizes,
        bins.bounds,
        bins.hulls,
        rois,
        levels,
        offset.contiguous(),
        heights,
        widths,
        geometry.scales,
        geometry.gamma,
        geometry.batch,
        LEVELS=len(geometry.scales),
        BINS_Y=geometry.bins[0],
        BINS_X=geometry.bins[1],
        SAMPLING_RATIO=geometry.sampling_ratio,
        MAX_SAMPLES=MAX_ADAPTIVE_SAMPLES,
        BLOCK_P=triton.next_power_of_2(num_bins),
        num_warps=1,
        enable_fp_fusion=False,  # the rounding of the CPU path: a sample at -1 or size must not move across
    )
    return bins


def level_sizes(geometry: RoIPoolGeometry) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return heights and widths of the levels as the kernels take them."""
    return tuple(map(float, geometry.heights)), tuple(map(float, geometry.widths))


def sort_by_image(geometry: RoIPoolGeometry, rois: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the rois by (level, image); padding comes last.

    Returns:
        order (R,) int64, and begins (levels * B + 1,) int64, where each pair of level and image begins in it.
    """
    num_levels = len(geometry.scales)
    pairs = num_levels * geometry.batch
    image = rois[:, 0].clamp(-1, geometry.batch).nan_to_num(-1).long()
    exists = (image >= 0) & (image < geometry.batch) & (levels >= 0) & (levels < num_levels)
    pair = (levels * geometry.batch + image).where(exists, pairs)
    sorted_pair, order = pair.sort(stable=True)
    return order, torch.searchsorted(sorted_pair, torch.arange(pairs + 1, device=pair.device))


def _channels_last(features: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the features as (B, H, W, C), contiguous."""
    return tuple([feature.permute(0, 2, 3, 1).contiguous() for feature in features])


def _cell_table(geometry: RoIPoolGeometry, features: list[Tensor]) -> Tensor:
    """Copy the features into one (N, C) table, level after level, each in (B, Hl, Wl) order."""
    table = features[0].new_empty(geometry.num_cells, features[0].shape[1])
    for part, feature in zip(table.split(geometry.level_cells), features, strict=True):
        cells = feature.permute(0, 2, 3, 1)
        part.view(cells.shape).copy_(cells)
    return table


def _block_c(channels: int) -> int:
    """Return the channels that a program computes at once."""
    block: int = triton.next_power_of_2(channels)
    return min(block, MAX_BLOCK_C)


def _count_tiles(geometry: RoIPoolGeometry) -> int:
    """Return the number of tiles of all levels and images."""
    tiles_per_image = 0
    for height, width in zip(geometry.heights, geometry.widths, strict=True):
        tiles_per_image += triton.cdiv(height, TILE[0]) * triton.cdiv(width, TILE[1])
    return geometry.batch * tiles_per_image

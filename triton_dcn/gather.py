"""Deformable convolution from fast library calls: `embedding_bag` samples, convolutions and matrix products contract.

A bilinear sample is a weighted sum of four rows of a table with one row of channels per pixel, which is what
`embedding_bag` computes; its transpose, the gradient of the input, is another `embedding_bag` over the samples sorted
by the pixel they read. Columns exist for a bounded piece of the batch at a time. Works on any device; written for CPUs.

Letters: B batch, n images of a piece, C channels, G groups, D offset groups, K taps, P positions of an image, p those
of a piece, L = lcm(G, D) slices of the channels, J = L / G of them in a group. Samples are ordered (G, n, p, K, J).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_dcn.geometry import ConvGeometry

CHUNK_BYTES = 16 << 20
"""Size of the columns of one piece; backward holds them and their gradient."""

with warnings.catch_warnings():  # torch announces once per process that sparse tensors are in beta
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), check_invariants=False)


class _Samples(NamedTuple):
    """Four table rows and weights per sample, and the factors of the weights."""

    rows: Tensor  # (G, n, p, K, J, 4) int32 or int64
    weights: Tensor  # (G, n, p, K, J, 4)
    fractions: Tensor  # (2, n, p, K, D): y, x within the cell
    mask: Tensor | None  # (n, p, K, D)


@torch.no_grad()
def forward(
    geom: ConvGeometry, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Convolve with displaced taps.

    Args:
        geom: sizes, from the tensors below.
        input: (B, C, H, W), any floating dtype and strides; float16 and bfloat16 are computed in float32.
        offset: (B, 2*D*K, Ho, Wo), pixels, (dy, dx) per tap; values that are not finite read zeros.
        mask: (B, D*K, Ho, Wo) or None.
        weight: (O, C/G, kh, kw).
        bias: (O,) or None.

    Returns:
        (B, O, Ho, Wo), dtype of `input`; channels_last if `input` is, else contiguous.
    """
    dtype = _compute_dtype(input)
    kernel = _kernel(geom, weight.to(dtype))
    grid = _grid(geom, dtype, input.device)
    output = input.new_empty(geom.output_shape).to(memory_format=_format(input))
    rows_out = output.flatten(2).unflatten(1, (geom.groups, -1)).permute(1, 0, 3, 2)  # (G, B, P, O / G)
    for images, pieces in _pieces(geom, dtype.itemsize):
        table = _table(geom, input[images], dtype)
        for positions in pieces:
            samples = _samples(geom, offset, mask, images, positions, grid)
            part = _contract(_columns(geom, table, samples), kernel)  # (G, n * p, O / G)
            if bias is not None:
                part.add_(bias.view(geom.groups, 1, -1))
            target = rows_out[:, images, positions]
            target.copy_(part.view(target.shape))
    return output


@torch.no_grad()
def backward(
    geom: ConvGeometry,
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`; columns are sampled again where the gradient of the weight needs them.

    Args:
        geom, input, offset, mask, weight: as in `forward`.
        grad_output: (B, O, Ho, Wo), any strides, also expanded.
        needs: which gradients to compute: input, offset, mask, weight.

    Returns:
        Gradients of input, offset, mask and weight in the dtype of each, None where not needed. Those of offset and
        mask are 0 for samples at or beyond -1, H or W in either direction.
    """
    need_input, need_offset, need_mask, need_weight = needs
    need_mask = need_mask and mask is not None
    dtype = _compute_dtype(input)
    kernel = _kernel(geom, weight.to(dtype))
    grid = _grid(geom, dtype, input.device)
    grad_input = torch.empty_like(input, memory_format=_format(input)) if need_input else None
    grad_offset = torch.empty_like(offset, memory_format=_format(offset)) if need_offset else None
    grad_mask = torch.empty_like(mask, memory_format=_format(mask)) if need_mask else None
    grad_kernel = torch.zeros_like(kernel.mT, memory_format=torch.contiguous_format) if need_weight else None
    rows_in = grad_output.flatten(2).unflatten(1, (geom.groups, -1)).permute(1, 0, 3, 2)  # (G, B, P, O / G)
    for images, pieces in _pieces(geom, dtype.itemsize):
        table = _table(geom, input[images], dtype)
        grad_table = torch.zeros_like(table) if need_input else None
        for positions in pieces:
            samples = _samples(geom, offset, mask, images, positions, grid)
            grad = rows_in[:, images, positions].to(dtype).flatten(1, 2).contiguous()  # (G, n * p, O / G)
            if need_weight:
                grad_kernel.baddbmm_(_columns(geom, table, samples).mT, grad)
            if not (need_input or need_offset or need_mask):
                continue
            grad_columns = _spread(grad, kernel)
            if need_input:
                _scatter(geom, grad_columns, samples, grad_table)
            if need_offset or need_mask:
                slopes = _slopes(geom, _dots(geom, table, grad_columns, samples), samples)
                if need_mask:
                    _place(geom, grad_mask, images, positions).copy_(slopes[0])
                if need_offset:
                    scaled = slopes[1:] if mask is None else slopes[1:].mul_(samples.mask)
                    _place(geom, grad_offset, images, positions).copy_(scaled)
        if need_input:
            grad_input[images].copy_(_interior(geom, grad_table).permute(0, 3, 1, 2))
    grad_weight = None
    if need_weight:
        by_tap = grad_kernel.view(geom.groups, geom.taps, -1, geom.out_channels // geom.groups)
        grad_weight = by_tap.permute(0, 3, 2, 1).reshape(weight.shape).to(weight.dtype)
    return grad_input, grad_offset, grad_mask, grad_weight


def _compute_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _format(tensor: Tensor) -> torch.memory_format:
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _pieces(geom: ConvGeometry, itemsize: int) -> Iterator[tuple[slice, list[slice]]]:
    """Cut the work into images and, within, positions whose columns and table stay near CHUNK_BYTES."""
    positions = max(1, CHUNK_BYTES // (geom.taps * geom.in_channels * itemsize))
    pixels = max(geom.taps * geom.positions, (geom.height + 3) * (geom.width + 2))
    images = max(1, CHUNK_BYTES // (pixels * geom.in_channels * itemsize))
    spans = _spans(geom.positions, positions)
    for block in _spans(geom.batch, images):
        yield block, spans


def _spans(total: int, most: int) -> list[slice]:
    """Cut range(total) into even slices of at most `most`."""
    step = math.ceil(total / math.ceil(total / most)) if total else 1
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def _grid(geom: ConvGeometry, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Positions of the taps without offsets: (2, P, K)."""
    axes = []
    for axis, extent in enumerate((geom.out_height, geom.out_width)):
        start = torch.arange(extent, device=device) * geom.stride[axis] - geom.padding[axis]
        tap = torch.arange(geom.kernel[axis], device=device) * geom.dilation[axis]
        axes.append((start[:, None] + tap).to(dtype))
    y, x = axes
    full = (geom.out_height, geom.out_width, *geom.kernel)
    y, x = y[:, None, :, None].expand(full), x[None, :, None].expand(full)
    return torch.stack((y, x)).view(2, geom.positions, geom.taps)


def _kernel(geom: ConvGeometry, weight: Tensor) -> Tensor:
    """(G, O / G, K * C / G)."""
    return weight.permute(0, 2, 3, 1).reshape(geom.groups, geom.out_channels // geom.groups, -1)


def _table(geom: ConvGeometry, input: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay images out as rows of channels with zeros around: (R, C), R = (n * (H + 3) + 2) * (W + 2).

    Pixel (y, x) of image i is row (i * (H + 3) + y + 2) * (W + 2) + x + 1. All four corners exist for every cell with
    -2 <= y <= H, -1 <= x <= W (the right neighbour of the last column is the first of the next row), and they are zero
    for the cells at y = -2, y = H and x = W, which stand for everything outside.
    """
    n, c, h, w = input.shape
    table = input.new_zeros((n * (h + 3) + 2) * (w + 2), c, dtype=dtype)
    _interior(geom, table).copy_(input.permute(0, 2, 3, 1))
    return table


def _interior(geom: ConvGeometry, table: Tensor) -> Tensor:
    """The pixels of a table as a view (n, H, W, C)."""
    high, wide = geom.height + 3, geom.width + 2
    n = len(table) // (high * wide)
    return table[: n * high * wide].view(n, high, wide, -1)[:, 2:-1, 1:-1]


def _samples(
    geom: ConvGeometry, offset: Tensor, mask: Tensor | None, images: slice, positions: slice, grid: Tensor
) -> _Samples:
    """Compute which rows the samples of a piece read, and their weights."""
    slices = math.lcm(geom.groups, geom.offset_groups)
    pitch = geom.width + 2
    place = _place(geom, offset, images, positions).to(grid.dtype) + grid[:, None, positions, :, None]
    place.nan_to_num_(nan=-2)
    F.threshold_(place[0], -1, -2).clamp_(max=geom.height)
    F.threshold_(place[1], -1, geom.width).clamp_(max=geom.width)
    cell = place.floor()
    fractions = place.sub_(cell)
    index = torch.int32 if (geom.batch * (geom.height + 3) + 2) * pitch * slices < 2**31 else torch.int64
    cell = cell.to(index)
    image = torch.arange(len(cell[0]), dtype=index, device=grid.device).view(-1, 1, 1, 1)
    base = torch.add(cell[1], cell[0], alpha=pitch).add_((image * (geom.height + 3) + 2) * pitch + 1)
    ly, lx = fractions
    if mask is None:
        lower, upper = ly, 1 - ly
    else:
        mask = _place(geom, mask, images, positions).to(grid.dtype).contiguous()
        lower = ly * mask
        upper = mask - lower

    def split(x: Tensor) -> Tensor:  # (n, p, K, D) -> (n, p, K, G, J)
        if slices > geom.offset_groups:
            x = x.repeat_interleave(slices // geom.offset_groups, -1)
        return x.unflatten(-1, (geom.groups, -1))

    base, lower, upper, lx = split(base), split(lower), split(upper), split(lx)
    if slices > 1:
        base = base * slices + torch.arange(slices, dtype=index, device=grid.device).view(geom.groups, -1)
    shape = (geom.groups, *base.shape[:3], base.shape[4], 4)
    rows = base.new_empty(shape)
    weights = lower.new_empty(shape)
    row, part = rows.permute(5, 1, 2, 3, 0, 4), weights.permute(5, 1, 2, 3, 0, 4)
    for corner, step in enumerate((0, 1, pitch, pitch + 1)):
        torch.add(base, step * slices, out=row[corner])
    torch.mul(upper, lx, out=part[1])
    torch.sub(upper, part[1], out=part[0])
    torch.mul(lower, lx, out=part[3])
    torch.sub(lower, part[3], out=part[2])
    return _Samples(rows, weights, fractions, mask)


def _place(geom: ConvGeometry, tensor: Tensor, images: slice, positions: slice) -> Tensor:
    """Offsets (B, 2*D*K, Ho, Wo) of a piece as (2, n, p, K, D), masks (B, D*K, Ho, Wo) as (n, p, K, D)."""
    planes = tensor[images].flatten(2)[..., positions].unflatten(1, (geom.offset_groups, geom.taps, -1))
    planes = planes.permute(3, 0, 4, 2, 1)
    return planes if len(planes) == 2 else planes[0]


def _columns(geom: ConvGeometry, table: Tensor, samples: _Samples) -> Tensor:
    """Sample: (G, n * p, K * C / G)."""
    rows = samples.rows.flatten()
    starts = torch.arange(0, len(rows), 4, dtype=rows.dtype, device=rows.device)
    slices = math.lcm(geom.groups, geom.offset_groups)
    sampled, *_ = torch.embedding_bag(
        table.view(-1, geom.in_channels // slices), rows, starts, per_sample_weights=samples.weights.flatten()
    )
    return sampled.view(geom.groups, -1, geom.taps * geom.in_channels // geom.groups)


def _contract(columns: Tensor, kernel: Tensor) -> Tensor:
    """(G, M, N) times (G, O, N) transposed: (G, M, O); a 1x1 convolution where oneDNN is faster than BLAS."""
    if _convolves(columns):
        return F.conv2d(columns.mT[..., None], kernel[0, :, :, None, None])[..., 0].mT
    return torch.bmm(columns, kernel.mT)


def _spread(grad: Tensor, kernel: Tensor) -> Tensor:
    """(G, M, O) times (G, O, N): (G, M, N)."""
    if _convolves(grad):
        return F.conv_transpose2d(grad.mT[..., None], kernel[0, :, :, None, None])[..., 0].mT.contiguous()
    return torch.bmm(grad, kernel)


def _convolves(rows: Tensor) -> bool:
    return len(rows) == 1 and rows.dtype == torch.float32 and rows.device.type == "cpu"


def _scatter(geom: ConvGeometry, grad_columns: Tensor, samples: _Samples, grad_table: Tensor) -> None:
    """Add weight times gradient of each sample to the four rows that it read."""
    rows = samples.rows.flatten()
    low, high = (int(end) for end in rows.aminmax())
    rows = rows - low
    span = high - low + 1
    keys = (rows - 2**15).to(torch.int16) if span <= 2**16 else rows  # the sort takes one pass per byte
    order = torch.sort(keys, stable=True).indices
    counts = torch.bincount(rows, minlength=span)
    width = geom.in_channels // math.lcm(geom.groups, geom.offset_groups)
    summed, *_ = torch.embedding_bag(
        grad_columns.view(-1, width),
        order >> 2,
        counts.cumsum(0) - counts,
        per_sample_weights=samples.weights.flatten()[order],
    )
    grad_table.view(-1, width)[low : high + 1].add_(summed)


def _dots(geom: ConvGeometry, table: Tensor, grad_columns: Tensor, samples: _Samples) -> Tensor:
    """Inner products of the gradient of each sample with the four rows that it read: (G, n, p, K, J, 4)."""
    rows = samples.rows.flatten()
    slices = math.lcm(geom.groups, geom.offset_groups)
    table = table.view(-1, geom.in_channels // slices)
    grad_columns = grad_columns.view(-1, table.shape[1])
    if rows.device.type == "cpu":
        starts = torch.arange(0, len(rows) + 1, 4, dtype=rows.dtype)
        pattern = torch.sparse_csr_tensor(
            starts, rows, table.new_zeros(len(rows)), size=(len(grad_columns), len(table)), check_invariants=False
        )
        dots = torch.sparse.sampled_addmm(pattern, grad_columns, table.t(), beta=0).values()
    else:
        dots = torch.stack([(table[corner] * grad_columns).sum(-1) for corner in rows.view(-1, 4).unbind(1)], 1)
    return dots.view(samples.rows.shape)


def _slopes(geom: ConvGeometry, dots: Tensor, samples: _Samples) -> Tensor:
    """Derivative of the loss by mask, and by y and x at mask 1: (3, n, p, K, D)."""
    dots = dots.permute(5, 1, 2, 3, 0, 4).reshape(4, *samples.fractions.shape[1:], -1).sum(-1)
    ly, lx = samples.fractions
    slopes = dots.new_empty(3, *ly.shape)
    top = torch.lerp(dots[0], dots[1], lx)
    bottom = torch.lerp(dots[2], dots[3], lx)
    torch.lerp(top, bottom, ly, out=slopes[0])
    torch.sub(bottom, top, out=slopes[1])
    torch.lerp(dots[1] - dots[0], dots[3] - dots[2], ly, out=slopes[2])
    return slopes

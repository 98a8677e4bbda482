"""Backend "torch": fast library calls on any device, written for CPUs. Entry points: `forward` and `backward`.

Receives the tensors and the geometry of a call from `operator`. Returns the output or the gradients.

A bilinear sample is a weighted sum of four rows of a table that has one row of channels per pixel, which is what
`embedding_bag` computes. Its transpose, the gradient of the input, is another `embedding_bag` over the samples, sorted
by the pixel that they read. Convolutions and matrix products contract the columns, which exist for one chunk of the
positions at a time.

Letters: see `torch_samples`.
"""

from __future__ import annotations

import functools
import platform
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from triton_dcn import torch_planes
from triton_dcn.geometry import ConvGeometry
from triton_dcn.joined_groups import groups_to_join, join_weight, split_weight
from triton_dcn.offset_mask import OffsetMask, OffsetMaskGrad
from triton_dcn.torch_samples import (
    Corners,
    Samples,
    TapGrid,
    column_groups,
    corners_by_offset,
    divide_work,
    find_corners,
    find_samples,
    make_table,
    tap_grid,
    view_pixels,
    view_samples,
    view_slices,
)

CHOOSE_ONEDNN = 2
"""Dilation of a 1x1 kernel: changes no result, but with one thread torch has oneDNN compute dilated kernels alone."""

NARROW_PRODUCT = 32
"""On Intel's processors oneDNN is slower than MKL, with several threads, too, where a product has no more channels."""

LARGEST_IMAGE_WITHOUT_ONEDNN = 20480
"""Elements; from its conditions for oneDNN."""

JOINED_CHANNELS = 32
"""Channel groups of fewer input channels that have the same offsets are joined to groups of so many, or more."""


class Readers(NamedTuple):
    """The corners of a chunk in the order of the table rows that they read.

    Attributes:
        rows: from the first row that is read to the last one.
        first_of_row: (rows,), place of the first corner of each of these rows.
        samples: (Q * n * p * K * J * 4,), the sample of each corner.
        weights: (Q * n * p * K * J * 4,), its weight.
    """

    rows: slice
    first_of_row: Tensor
    samples: Tensor
    weights: Tensor


with warnings.catch_warnings():  # the first sparse tensor of a process makes torch warn that they are in beta
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), check_invariants=False)


@torch.no_grad()
def forward(
    geom: ConvGeometry,
    input: Tensor,
    offset_mask: OffsetMask,
    weight: Tensor,
    bias: Tensor | None,
    *,
    relu: bool = False,
) -> Tensor:
    """Compute the output of the deformable convolution.

    Args:
        geom: from `ConvGeometry.of` for these tensors.
        input: (B, C, H, W), any floating dtype and strides; float16 and bfloat16 are computed in float32.
        offset_mask: any strides; samples at offsets that are not finite are 0.
        weight: (O, C/G, kh, kw), dtype of `input`.
        bias: (O,), dtype of `input`, or None.
        relu: negative outputs become 0.

    Returns:
        (B, O, Ho, Wo), dtype of `input`; channels_last if `input` is, else contiguous.
    """
    dtype = _compute_dtype(input)
    mask = offset_mask.modulation()
    grid = tap_grid(geom, input.device, dtype)
    output = input.new_empty(geom.output_shape).to(memory_format=_memory_format(input))
    weight = weight.to(dtype)
    if torch_planes.suits(geom, input):
        torch_planes.forward(geom, input, offset_mask.offset, mask, weight, bias, grid, output, relu=relu)
        return output

    part_geom, count = _parts(geom)
    parts = zip(
        input.chunk(count, 1),
        offset_mask.offset.chunk(count, 1),
        _chunk(mask, count, 1),
        weight.chunk(count),
        _chunk(bias, count),
        output.chunk(count, 1),
        strict=True,
    )
    for part_input, part_offset, part_mask, part_weight, part_bias, part_output in parts:
        _forward(
            part_geom, part_input, part_offset, part_mask, part_weight, part_bias, grid, part_output, relu=relu
        )  # fmt: skip
    return output


@torch.no_grad()
def backward(
    geom: ConvGeometry,
    grad_output: Tensor,
    input: Tensor,
    offset_mask: OffsetMask,
    weight: Tensor,
    grad_offset_mask: OffsetMaskGrad,
    *,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of `forward`; the gradient of the weight needs the columns, which are sampled again.

    Args:
        geom: as for `forward`.
        grad_output: (B, O, Ho, Wo), any strides, also expanded.
        input: as for `forward`.
        offset_mask: as for `forward`.
        weight: as for `forward`.
        grad_offset_mask: receives the gradients of offset and mask, written in full; contiguous or channels_last,
            except for the stride of the batch. The gradients are 0 for samples outside the image.
        needs_input: whether to compute the gradient of the input.
        needs_weight: whether to compute the gradient of the weight.

    Returns:
        Gradients of input and weight in the dtype of each, None where not needed.
    """
    dtype = _compute_dtype(input)
    mask = offset_mask.modulation()
    grid = tap_grid(geom, input.device, dtype)
    grad_input = torch.empty_like(input, memory_format=_memory_format(input)) if needs_input else None
    backward_of = torch_planes.backward
    part_geom, count = geom, 1
    if not torch_planes.suits(geom, input):
        backward_of = _backward
        part_geom, count = _parts(geom)
    parts = zip(
        grad_output.chunk(count, 1),
        input.chunk(count, 1),
        offset_mask.offset.chunk(count, 1),
        _chunk(mask, count, 1),
        weight.to(dtype).chunk(count),
        _chunk(grad_input, count, 1),
        _chunk(grad_offset_mask.offset, count, 1),
        _chunk(grad_offset_mask.mask, count, 1),
        strict=True,
    )
    grads_of_weight = []
    for (
        part_grad, part_input, part_offset, part_mask, part_weight, part_grad_input, part_grad_offset, part_grad_mask
    ) in parts:  # fmt: skip
        part_grad_weight = backward_of(
            part_geom, part_grad, part_input, part_offset, part_mask, part_weight, grid, part_grad_input,
            OffsetMaskGrad(part_grad_offset, part_grad_mask), needs_weight=needs_weight,
        )  # fmt: skip
        if part_grad_weight is not None:
            grads_of_weight.append(part_grad_weight)
    grad_weight = None
    if needs_weight:
        grad_weight = grads_of_weight[0] if count == 1 else torch.cat(grads_of_weight)
    if offset_mask.mask_logits:
        _apply_sigmoid_gradient(grad_offset_mask.mask, mask)
    return grad_input, None if grad_weight is None else grad_weight.to(weight.dtype)


def _parts(geom: ConvGeometry) -> tuple[ConvGeometry, int]:
    """Return of how many equal convolutions side by side the call consists, and the geometry of each.

    Where offset groups have several channel groups each, every offset group is a convolution of its own.
    """
    count = geom.offset_groups
    if geom.groups <= count or geom.groups % count:
        count = 1
    if count == 1:
        return geom, 1
    part_geom = replace(
        geom,
        in_channels=geom.in_channels // count,
        out_channels=geom.out_channels // count,
        groups=geom.groups // count,
        offset_groups=1,
    )
    return part_geom, count


def _chunk(tensor: Tensor | None, count: int, dim: int = 0) -> Sequence[Tensor | None]:
    """Return equal parts of a tensor, or as many times None."""
    return [None] * count if tensor is None else tensor.chunk(count, dim)


def _join_narrow_groups(geom: ConvGeometry, weight: Tensor) -> tuple[ConvGeometry, Tensor, int]:
    """Return geometry and weight with narrow groups joined where all have the same offsets, and how many became one."""
    if geom.offset_groups > 1:
        return geom, weight, 1
    joined = groups_to_join(geom.groups, geom.in_channels // geom.groups, JOINED_CHANNELS)
    return replace(geom, groups=geom.groups // joined), join_weight(weight, geom.groups, joined), joined


def _tables(geom: ConvGeometry) -> tuple[ConvGeometry, int]:
    """Return how many tables hold the channels, and the geometry for one of them.

    Channel groups with the same offsets have a table each, so that their columns come apart. The samples are the same.
    """
    count = geom.groups if geom.offset_groups == 1 else 1
    if count == 1:
        return geom, 1
    table_geom = replace(geom, in_channels=geom.in_channels // count, out_channels=geom.out_channels // count, groups=1)
    return table_geom, count


def _forward(
    geom: ConvGeometry,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    grid: TapGrid,
    output: Tensor,
    *,
    relu: bool,
) -> None:
    """Fill the output (B, O, Ho, Wo); the weight has the dtype of the computation."""
    dtype = weight.dtype
    geom, weight, _ = _join_narrow_groups(geom, weight)
    table_geom, count = _tables(geom)
    matrices = _weight_matrix(geom, weight).chunk(count)
    biases = _chunk(bias, count)
    output_rows = _view_rows(geom, output).chunk(count)
    for images, blocks in divide_work(geom, dtype.itemsize, count):
        tables = [make_table(geom, part, dtype) for part in input[images].chunk(count, 1)]
        for block in blocks:
            _, corners = _sample_block(table_geom, offset, mask, images, block.positions, grid)
            for chunk in block.chunks:
                rows, weights = corners.chunk(chunk)
                for number, table in enumerate(tables):
                    block_rows = output_rows[number][:, images, block.positions]
                    # no variable holds the columns: so the next ones can reuse their memory, which is in the cache
                    _contract(
                        _sample_columns(table_geom, table, rows, weights),
                        matrices[number],
                        biases[number],
                        block_rows[:, chunk.images, chunk.positions],
                        relu=relu,
                    )


def _backward(
    geom: ConvGeometry,
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    grid: TapGrid,
    grad_input: Tensor | None,
    grad_offset_mask: OffsetMaskGrad,
    *,
    needs_weight: bool,
) -> Tensor | None:
    """Fill the gradients that are not None, and return that of the weight (O, C/G, kh, kw), if needed."""
    dtype = weight.dtype
    groups = geom.groups
    geom, weight, joined = _join_narrow_groups(geom, weight)
    table_geom, count = _tables(geom)
    weight_matrix = _weight_matrix(geom, weight)
    matrices = weight_matrix.chunk(count)
    grad_rows = _view_rows(geom, grad_output).chunk(count)
    grad_matrix = torch.zeros_like(weight_matrix, memory_format=torch.contiguous_format) if needs_weight else None
    grad_matrices = _chunk(grad_matrix, count)

    for images, blocks in divide_work(geom, dtype.itemsize, count):
        tables = [make_table(geom, part, dtype) for part in input[images].chunk(count, 1)]
        grad_tables = [None if grad_input is None else torch.zeros_like(table) for table in tables]
        for block in blocks:
            samples, corners = _sample_block(table_geom, offset, mask, images, block.positions, grid)
            corner_dots = torch.empty_like(corners.weights) if grad_offset_mask.needed else None
            for chunk in block.chunks:
                rows, weights = corners.chunk(chunk)
                readers = None if grad_input is None else _sort_readers(rows, weights)
                dots = None if corner_dots is None else weights.new_zeros(len(rows))
                for number, table in enumerate(tables):
                    block_grads = grad_rows[number][:, images, block.positions]
                    grad = block_grads[:, chunk.images, chunk.positions].to(dtype).flatten(1, 2)  # (G, n * p, O/G)
                    if _prefers_onednn(grad, matrices[number]):
                        grad = grad.contiguous()
                    grad_of_weight = grad_matrices[number]
                    if grad_of_weight is not None:
                        _add_product(grad_of_weight, grad, _sample_columns(table_geom, table, rows, weights))
                    if readers is None and dots is None:
                        continue

                    grad_columns = _join_groups(table_geom, _matmul(grad, matrices[number]))
                    grad_table = grad_tables[number]
                    if grad_table is not None and readers is not None:
                        _scatter_add(table_geom, grad_columns, readers, grad_table)
                    if dots is not None:
                        dots = _add_dots_with_corners(table_geom, dots, table, grad_columns, rows)
                if corner_dots is not None and dots is not None:
                    chunk_dots = corner_dots[:, chunk.images, chunk.positions]
                    chunk_dots.copy_(dots.view(chunk_dots.shape))
            if corner_dots is not None:
                _write_sample_gradients(table_geom, corner_dots, samples, grad_offset_mask, images, block.positions)
        if grad_input is not None:
            for part, grad_table in zip(grad_input[images].chunk(count, 1), grad_tables, strict=True):
                if grad_table is not None:
                    part.copy_(view_pixels(geom, grad_table).permute(0, 3, 1, 2))
    return None if grad_matrix is None else split_weight(_to_weight(geom, grad_matrix), groups, joined)


def _sample_block(
    geom: ConvGeometry, offset: Tensor, mask: Tensor | None, images: slice, positions: slice, grid: TapGrid
) -> tuple[Samples, Corners]:
    """Return the samples of a block of positions, and their corners."""
    offset = view_samples(geom, offset, images)[..., positions]
    if mask is not None:
        mask = view_samples(geom, mask, images)[0, ..., positions]
    samples = find_samples(offset, mask, grid.at(positions), geom.width + 2)
    return samples, find_corners(geom, samples)


def _compute_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Return channels_last if `tensor` is stored so and not also contiguous."""
    if tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _view_rows(geom: ConvGeometry, tensor: Tensor) -> Tensor:
    """View output or grad_output, (B, O, Ho, Wo), as one row of channels per position: (G, B, P, O/G)."""
    by_group: Tensor = tensor.flatten(2).unflatten(1, (geom.groups, -1))
    return by_group.permute(1, 0, 3, 2)


def _weight_matrix(geom: ConvGeometry, weight: Tensor) -> Tensor:
    """Return the weight as the matrix that multiplies columns: (G, O/G, K*C/G)."""
    return weight.permute(0, 2, 3, 1).reshape(geom.groups, geom.out_channels // geom.groups, -1)


def _to_weight(geom: ConvGeometry, matrix: Tensor) -> Tensor:
    """Undo `_weight_matrix`: return a view (O, C/G, kh, kw), which is channels-last in memory."""
    channels_last = matrix.view(geom.out_channels, *geom.kernel, -1)
    return channels_last.permute(0, 3, 1, 2)


def _sample_columns(geom: ConvGeometry, table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Compute the columns of a chunk: (G, n * p, K*C/G); rows and weights from `Corners.chunk`."""
    starts = torch.arange(0, len(rows), 4, dtype=rows.dtype, device=rows.device)
    columns, *_ = torch.embedding_bag(view_slices(geom, table), rows, starts, per_sample_weights=weights)
    return _split_groups(geom, columns)


def _split_groups(geom: ConvGeometry, columns: Tensor) -> Tensor:
    """Return columns (Q, n * p, K*C/Q), of any shape, as (G, n * p, K*C/G)."""
    channels = geom.in_channels // geom.groups
    if column_groups(geom) == geom.groups:
        return columns.view(geom.groups, -1, geom.taps * channels)
    by_tap = columns.view(-1, geom.taps, geom.groups, channels)
    return by_tap.permute(2, 0, 1, 3).contiguous().view(geom.groups, -1, geom.taps * channels)


def _join_groups(geom: ConvGeometry, columns: Tensor) -> Tensor:
    """Undo `_split_groups`."""
    if column_groups(geom) == geom.groups:
        return columns
    by_tap = columns.view(geom.groups, -1, geom.taps, geom.in_channels // geom.groups)
    return by_tap.permute(1, 2, 0, 3).contiguous().view(1, -1, geom.taps * geom.in_channels)


def _contract(columns: Tensor, weight_matrix: Tensor, bias: Tensor | None, output_rows: Tensor, *, relu: bool) -> None:
    """Write the product of columns and weight to the output of a chunk.

    Args:
        columns: (G, n * p, K*C/G).
        weight_matrix: (G, O/G, K*C/G).
        bias: (O,) or None.
        output_rows: (G, n, p, O/G), a view of the output.
        relu: negative outputs become 0.
    """
    groups, images, _, _ = output_rows.shape
    one_matrix = groups == images == 1  # MKL multiplies the groups at once if what it writes is contiguous
    in_place = one_matrix and output_rows.dtype == columns.dtype and not _prefers_onednn(columns, weight_matrix.mT)
    if in_place:
        product = output_rows.squeeze(1)
        torch.bmm(weight_matrix, columns.mT, out=product.mT)  # transposed, as the output lies in memory
    else:
        product = _matmul(columns, weight_matrix.mT)
    if bias is not None:
        product.add_(bias.view(groups, 1, -1))
    if relu:
        product.relu_()
    if not in_place:
        output_rows.copy_(product.view(output_rows.shape))


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return left (G, rows, k) @ right (G, k, n)."""
    if not _prefers_onednn(left, right):
        return torch.bmm(left, right)
    kernel = right[0].t()[:, :, None, None]
    product = F.conv2d(_as_image(left), kernel, dilation=CHOOSE_ONEDNN)
    return product.permute(0, 2, 3, 1).squeeze(2)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left (G, rows, m).mT @ right (G, rows, n) to the total (G, m, n)."""
    if not _onednn_takes(left) or not _onednn_takes(right) or not _is_amd_processor():
        total.baddbmm_(left.mT, right)
        return
    kernel_size = (left.shape[2], right.shape[2], 1, 1)
    product = conv2d_weight(_as_image(right), kernel_size, _as_image(left), dilation=CHOOSE_ONEDNN)
    total[0].add_(product[:, :, 0, 0])


def _as_image(rows: Tensor) -> Tensor:
    """View (1, rows, k) as an image (1, k, rows, 1) with the strides of channels_last, so that nothing is copied."""
    return rows.unsqueeze(2).permute(0, 3, 1, 2)


def _prefers_onednn(left: Tensor, right: Tensor) -> bool:
    """Tell whether `_matmul` multiplies these as a convolution, for which the left rows must be contiguous."""
    if not _onednn_takes(left):
        return False
    is_narrow = min(right.shape[1:]) <= NARROW_PRODUCT
    return _is_amd_processor() or (torch.get_num_threads() > 1 and not is_narrow)


def _onednn_takes(rows: Tensor) -> bool:
    """Tell whether torch would have oneDNN compute a 1x1 convolution of these rows (G, rows, k), without copies.

    It gives smaller ones to its own code. An image of one channel is contiguous in both formats, so that the output
    would not be channels_last.
    """
    if rows.dtype != torch.float32 or not rows.is_cpu or not torch.backends.mkldnn.is_available():
        return False
    return len(rows) == 1 and rows.shape[2] > 1 and rows.numel() > LARGEST_IMAGE_WITHOUT_ONEDNN


@functools.cache
def _is_amd_processor() -> bool:
    """Tell whether oneDNN multiplies faster than MKL, which has its fast code for Intel's processors alone."""
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        processor = platform.processor()
    return "AuthenticAMD" in processor


def _sort_readers(rows: Tensor, weights: Tensor) -> Readers:
    """Sort the corners of a chunk by the table row that they read; rows and weights from `Corners.chunk`."""
    low, high = (int(limit) for limit in rows.aminmax())
    from_lowest = rows - low
    keys = from_lowest
    if high - low < 2**16:
        keys = (from_lowest - 2**15).to(torch.int16)  # short keys are sorted faster
    order = torch.sort(keys, stable=True).indices

    corners_of_row = torch.bincount(from_lowest)
    first_of_row = corners_of_row.cumsum(0) - corners_of_row
    sample_of_corner = order >> 2  # four corners each
    return Readers(slice(low, high + 1), first_of_row, sample_of_corner, weights.index_select(0, order))


def _scatter_add(geom: ConvGeometry, grad_columns: Tensor, readers: Readers, grad_table: Tensor) -> None:
    """Add to each table row the weighted gradients of the samples that read it, in the order of the samples."""
    gradient, *_ = torch.embedding_bag(
        view_slices(geom, grad_columns), readers.samples, readers.first_of_row, per_sample_weights=readers.weights
    )
    view_slices(geom, grad_table)[readers.rows].add_(gradient)


def _add_dots_with_corners(
    geom: ConvGeometry, dots: Tensor, table: Tensor, grad_columns: Tensor, rows: Tensor
) -> Tensor:
    """Return `dots` plus the dot product of each sample's column gradient with each of its four corners.

    Args:
        geom: of the call.
        dots: (Q * n * p * K * J * 4,), in the order of `rows`.
        table: (R, C), from `make_table`.
        grad_columns: (Q, n * p, K*C/Q).
        rows: (Q * n * p * K * J * 4,), from `Corners.chunk`.
    """
    table = view_slices(geom, table)
    grads = view_slices(geom, grad_columns)
    if not rows.is_cpu:
        products = [(table[corner] * grads).sum(-1) for corner in rows.view(-1, 4).unbind(1)]
        return dots + torch.stack(products, 1).flatten()

    # only four entries of each row of grads @ table.T are computed
    starts = torch.arange(0, len(rows) + 1, 4, dtype=rows.dtype)
    entries = torch.sparse_csr_tensor(starts, rows, dots, size=(len(grads), len(table)), check_invariants=False)
    sums: Tensor = torch.sparse.sampled_addmm(entries, grads, table.t()).values()
    return sums


def _write_sample_gradients(
    geom: ConvGeometry,
    corner_dots: Tensor,
    samples: Samples,
    grad_offset_mask: OffsetMaskGrad,
    images: slice,
    positions: slice,
) -> None:
    """Write the gradients of offset and mask for a block of positions.

    Args:
        geom: of the call.
        corner_dots: (Q, n, p, K, J, 4), from `_add_dots_with_corners`.
        samples: of the block.
        grad_offset_mask: of the whole call.
        images, positions: what the block is of.
    """
    dots = corners_by_offset(corner_dots).flatten(2, 3).contiguous()  # (4, n, D, K, p)
    top_left, top_right, bottom_left, bottom_right = dots
    fraction_y, fraction_x = samples.fractions
    top = torch.lerp(top_left, top_right, fraction_x)
    bottom = torch.lerp(bottom_left, bottom_right, fraction_x)
    if grad_offset_mask.mask is not None:
        grad_mask = view_samples(geom, grad_offset_mask.mask, images)[..., positions]
        grad_mask[0].copy_(torch.lerp(top, bottom, fraction_y))
    if grad_offset_mask.offset is None:
        return

    grad_y = bottom.sub_(top)
    grad_x = top_right.sub_(top_left).lerp_(bottom_right.sub_(bottom_left), fraction_y)
    if samples.mask is not None:
        grad_y.mul_(samples.mask)
        grad_x.mul_(samples.mask)
    grad_offset = view_samples(geom, grad_offset_mask.offset, images)[..., positions]
    grad_offset[0].copy_(grad_y)
    grad_offset[1].copy_(grad_x)


def _apply_sigmoid_gradient(grad: Tensor | None, mask: Tensor | None) -> None:
    """Turn the gradient of the mask into that of its logits, in place.

    Outside the image the gradient of the mask is 0 and stays 0, even if the logit is NaN there.
    """
    if grad is None or mask is None:
        return
    grad_logits = grad * mask * (1 - mask)
    grad.copy_(grad_logits.where(grad != 0, 0))

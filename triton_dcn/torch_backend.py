"""Deformable convolution from fast library calls: `embedding_bag` samples, convolutions and matrix products contract.

A bilinear sample is a weighted sum of four rows of a table with one row of channels per pixel, which is what
`embedding_bag` computes; its transpose, the gradient of the input, is another `embedding_bag` over the samples sorted
by the pixel they read. Columns exist for a bounded piece of the batch at a time. Works on any device; written for CPUs.

Letters as in `samples`.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_dcn.geometry import ConvGeometry
from triton_dcn.torch_samples import (
    BilinearSamples,
    cut,
    make_samples,
    make_table,
    per_sample,
    pixels,
    sliced,
    tap_grid,
)

with warnings.catch_warnings():  # torch announces once per process that sparse tensors are in beta
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), check_invariants=False)


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
    grid = tap_grid(geom, input.device)
    output = input.new_empty(geom.output_shape).to(memory_format=_format(input))
    rows_out = output.flatten(2).unflatten(1, (geom.groups, -1)).permute(1, 0, 3, 2)  # (G, B, P, O / G)
    for images, blocks in cut(geom, dtype.itemsize):
        table = make_table(geom, input[images], dtype)
        for block, pieces in blocks:
            samples = make_samples(geom, offset, mask, images, block, grid, dtype)
            block_out = rows_out[:, images, block]
            for positions in pieces:
                part = _matmul(_columns(geom, table, *samples.piece(positions)), kernel.mT)  # (G, n * p, O / G)
                if bias is not None:
                    part.add_(bias.view(geom.groups, 1, -1))
                target = block_out[:, :, positions]
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
    """Compute the gradients of `forward`; columns are sampled again where the gradient of the weight needs them.

    Args:
        geom, input, offset, mask, weight: as in `forward`.
        grad_output: (B, O, Ho, Wo), any strides, also expanded.
        needs: which gradients to compute: input, offset, mask, weight.

    Returns:
        Gradients of input, offset, mask and weight in the dtype of each, None where not needed. Those of offset and
        mask are 0 for samples at or beyond -1, H or W in either direction.
    """
    need_input, need_offset, need_mask, need_weight = needs
    dtype = _compute_dtype(input)
    kernel = _kernel(geom, weight.to(dtype))
    grid = tap_grid(geom, input.device)
    grad_input = torch.empty_like(input, memory_format=_format(input)) if need_input else None
    grad_offset = torch.empty_like(offset, memory_format=_format(offset)) if need_offset else None
    grad_mask = torch.empty_like(mask, memory_format=_format(mask)) if mask is not None and need_mask else None
    grad_kernel = torch.zeros_like(kernel, memory_format=torch.contiguous_format) if need_weight else None
    rows_in = grad_output.flatten(2).unflatten(1, (geom.groups, -1)).permute(1, 0, 3, 2)  # (G, B, P, O / G)
    for images, blocks in cut(geom, dtype.itemsize):
        table = make_table(geom, input[images], dtype)
        grad_table = torch.zeros_like(table) if need_input else None
        for block, pieces in blocks:
            samples = make_samples(geom, offset, mask, images, block, grid, dtype)
            dots = None if grad_offset is None and grad_mask is None else torch.empty_like(samples.weights)
            block_in = rows_in[:, images, block]
            for positions in pieces:
                rows, weights = samples.piece(positions)
                grad = block_in[:, :, positions].to(dtype).flatten(1, 2).contiguous()  # (G, n * p, O / G)
                if grad_kernel is not None:
                    grad_kernel.baddbmm_(grad.mT, _columns(geom, table, rows, weights))
                if grad_table is None and dots is None:
                    continue
                grad_columns = _matmul(grad, kernel)
                if grad_table is not None:
                    _scatter(geom, grad_columns, rows, weights, grad_table)
                if dots is not None:
                    target = dots[:, :, positions]
                    target.copy_(_dots(geom, table, grad_columns, rows).view(target.shape))
            if dots is not None:
                slopes = _slopes(dots, samples)
                if grad_mask is not None:
                    per_sample(geom, grad_mask, images, block).copy_(slopes[0])
                if grad_offset is not None:
                    scaled = slopes[1:] if samples.mask is None else slopes[1:].mul_(samples.mask)
                    per_sample(geom, grad_offset, images, block).copy_(scaled)
        if grad_input is not None and grad_table is not None:
            grad_input[images].copy_(pixels(geom, grad_table).permute(0, 3, 1, 2))
    grad_weight = None
    if grad_kernel is not None:
        by_tap = grad_kernel.view(geom.out_channels, geom.taps, -1)
        grad_weight = by_tap.mT.reshape(weight.shape).to(weight.dtype).contiguous()
    return grad_input, grad_offset, grad_mask, grad_weight


def _compute_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _format(tensor: Tensor) -> torch.memory_format:
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _kernel(geom: ConvGeometry, weight: Tensor) -> Tensor:
    """(G, O / G, K * C / G)."""
    return weight.permute(0, 2, 3, 1).reshape(geom.groups, geom.out_channels // geom.groups, -1)


def _columns(geom: ConvGeometry, table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Sample: (G, n * p, K * C / G)."""
    starts = torch.arange(0, len(rows), 4, dtype=rows.dtype, device=rows.device)
    sampled, *_ = torch.embedding_bag(sliced(geom, table), rows, starts, per_sample_weights=weights)
    return sampled.view(geom.groups, -1, geom.taps * geom.in_channels // geom.groups)


def _matmul(rows: Tensor, matrix: Tensor) -> Tensor:
    """(G, M, N) times (G, N, O): (G, M, O)."""
    if not _convolves(rows):
        return torch.bmm(rows, matrix)
    image = rows.unsqueeze(2).permute(0, 3, 1, 2)  # (1, N, M, 1) with the strides of channels last: not copied
    return F.conv2d(image, matrix[0].t()[:, :, None, None]).permute(0, 2, 3, 1).squeeze(2)


def _convolves(rows: Tensor) -> bool:
    """Whether a 1x1 convolution runs in oneDNN, faster than BLAS; with one thread torch would not take it."""
    suits = len(rows) == 1 and rows.dtype == torch.float32 and rows.is_cpu
    suits = suits and rows.shape[2] > 1  # else the image is contiguous in both formats, and so is not what comes out
    return suits and torch.get_num_threads() > 1 and torch.backends.mkldnn.is_available()


def _scatter(geom: ConvGeometry, grad_columns: Tensor, rows: Tensor, weights: Tensor, grad_table: Tensor) -> None:
    """Add to each table row the gradients of the samples that read it, times their weights, in the samples' order."""
    low, high = (int(end) for end in rows.aminmax())
    middle = (low + high + 1) // 2
    key = torch.int16 if high - low < 2**16 else rows.dtype  # the sort takes time per byte
    ranked, order = torch.sort((rows - middle).to(key), stable=True)
    every = (torch.arange(low, high + 1, device=rows.device) - middle).to(key)
    summed, *_ = torch.embedding_bag(
        sliced(geom, grad_columns),
        order >> 2,
        torch.searchsorted(ranked, every),
        per_sample_weights=weights.index_select(0, order),
    )
    sliced(geom, grad_table)[low : high + 1].add_(summed)


def _dots(geom: ConvGeometry, table: Tensor, grad_columns: Tensor, rows: Tensor) -> Tensor:
    """Inner products of the gradient of each sample with the four rows that it read, in the order of the samples."""
    table, grads = sliced(geom, table), sliced(geom, grad_columns)
    if rows.is_cpu:  # entries of grads @ table.T, a row per sample
        starts = torch.arange(0, len(rows) + 1, 4, dtype=rows.dtype)
        zeros = table.new_zeros(len(rows))
        entries = torch.sparse_csr_tensor(starts, rows, zeros, size=(len(grads), len(table)), check_invariants=False)
        dots: Tensor = torch.sparse.sampled_addmm(entries, grads, table.t(), beta=0).values()
    else:
        dots = torch.stack([(table[corner] * grads).sum(-1) for corner in rows.view(-1, 4).unbind(1)], 1)
    return dots


def _slopes(dots: Tensor, samples: BilinearSamples) -> Tensor:
    """Derivatives by the mask, and by y and x before the mask: (3, n, p, K, D)."""
    dots = dots.permute(5, 1, 2, 3, 0, 4).reshape(4, *samples.fractions.shape[1:], -1).sum(-1)
    ly, lx = samples.fractions
    slopes = dots.new_empty(3, *ly.shape)
    top = torch.lerp(dots[0], dots[1], lx)
    bottom = torch.lerp(dots[2], dots[3], lx)
    torch.lerp(top, bottom, ly, out=slopes[0])
    torch.sub(bottom, top, out=slopes[1])
    torch.lerp(dots[1] - dots[0], dots[3] - dots[2], ly, out=slopes[2])
    return slopes

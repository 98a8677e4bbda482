"""From tensors to kernels: layouts, slices, chunks, the order of the stages. Entry points: `forward` and `backward`.

Everything inside is channels-last: input (B, H, W, C), weight (O, K, C/G), output (B, Ho, Wo, O). Work is cut into
slices of images so that indices fit, and the large buffers into chunks of bounded size. Nothing waits for the device.

Letters: see `triton_dcn.kernels.sampling`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from triton_dcn import launchers, tile_table
from triton_dcn.geometry import ConvGeometry, even_slices
from triton_dcn.launchers import SampleArrays
from triton_dcn.matmul import accumulate, multiply, multiply_groups


@dataclass(frozen=True)
class Gradients:
    """What `backward` writes, None where not needed: slices of images in all but the weight."""

    input: Tensor | None  # (B, H, W, C)
    offset: Tensor | None
    mask: Tensor | None
    weight: Tensor | None  # float32, added to chunk by chunk: (G, K*O/G, C/G) if by T, (G, O/G, K*C/G) if by columns

    def images(self, images: slice) -> Gradients:
        """Return the views of some images."""
        input, offset, mask = (None if grad is None else grad[images] for grad in (self.input, self.offset, self.mask))
        return Gradients(input, offset, mask, self.weight)


def forward(
    geom: ConvGeometry,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    mask_logits: bool = False,
    relu: bool = False,
) -> Tensor:
    """Compute the output, (B, O, Ho, Wo), dtype of `input`, stored channels-last.

    Args:
        geom: from `ConvGeometry.of` for these tensors.
        input, offset, mask, weight, bias: as in `triton_dcn.deform_conv2d`; float16, bfloat16 or float32, any strides.
        mask_logits: the mask is the sigmoid of `mask`.
        relu: negative outputs become 0.

    Raises:
        ValueError: one image has 2**27 pixels, or 2**29 samples, or more.
    """
    x, w = input.permute(0, 2, 3, 1).contiguous(), _taps_last(weight)
    bias = None if bias is None else bias.contiguous()
    output = x.new_empty(geom.batch * geom.positions, geom.out_channels)  # written in full
    row = launchers.row_for("forward", geom, x)
    with _on(x.device):
        for part, images in _slices(geom, "arrays"):
            rows = output[images.start * geom.positions : images.stop * geom.positions]
            samples = launchers.sample(part, offset[images], None if mask is None else mask[images], mask_logits)
            if row is not None:
                launchers.forward_fused(part, row, x[images], samples, w, bias, rows, relu)
            else:
                _forward_columns(part, x[images], samples, w, bias, rows)
                if relu:
                    rows.relu_()
    return output.view(geom.batch, geom.out_height, geom.out_width, geom.out_channels).permute(0, 3, 1, 2)


def backward(
    geom: ConvGeometry,
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    needs: tuple[bool, bool, bool, bool],
    *,
    mask_logits: bool = False,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of input, offset, mask and weight, None where `needs` is false.

    Args:
        grad_output: (B, O, Ho, Wo), any strides.
        geom, input, offset, mask, weight, mask_logits: as given to `forward`.
        into: where to write the gradients of offset and mask, as views of one map: contiguous but for the batch stride.

    Returns:
        Gradients in the shapes and dtypes of their tensors, that of the input stored channels-last.

    Raises:
        ValueError: one image has 2**27 pixels, or 2**29 samples, or more.
    """
    x, w = input.permute(0, 2, 3, 1).contiguous(), _taps_last(weight)
    grad = grad_output.permute(0, 2, 3, 1).contiguous().view(-1, geom.out_channels)
    by_t = needs[0] and geom.offset_groups == 1  # T gives the gradient of the weight, too
    weight_like = _rows_of_weight(geom, w) if by_t else _columns_of_weight(geom, w)
    grad_offset, grad_mask = into or (None, None)
    if into is None and needs[1]:
        grad_offset = torch.empty_like(offset, memory_format=torch.contiguous_format)
    if into is None and mask is not None and needs[2]:
        grad_mask = torch.empty_like(mask, memory_format=torch.contiguous_format)
    grads = Gradients(
        torch.empty_like(x) if needs[0] else None,
        grad_offset,
        grad_mask,
        torch.zeros_like(weight_like, dtype=torch.float32) if needs[3] else None,
    )  # all but the weight's are written in full
    with _on(x.device):
        for part, images in _slices(geom, launchers.bins_by() if needs[0] else "arrays"):
            rows = grad[images.start * geom.positions : images.stop * geom.positions]
            samples = launchers.sample(part, offset[images], None if mask is None else mask[images], mask_logits)
            step = _backward_by_t if by_t else _backward_by_columns
            step(part, rows, x[images], samples, w, grads.images(images), mask_logits)
    grad_input = None if grads.input is None else grads.input.permute(0, 3, 1, 2)
    grad_weight = None if grads.weight is None else _finish_weight(geom, grads.weight, by_t).to(weight.dtype)
    return grad_input, grads.offset, grads.mask, grad_weight


def _forward_columns(
    geom: ConvGeometry, x: Tensor, samples: SampleArrays, w: Tensor, bias: Tensor | None, output: Tensor
) -> None:
    """Fill `output` (M, O) by columns and a library product, chunk by chunk."""
    right = _columns_of_weight(geom, w).transpose(1, 2)
    for first, rows in _chunks(geom, x):
        multiply(output[first : first + rows], launchers.columns(geom, x, samples, first, rows), right, bias)


def _backward_by_t(
    geom: ConvGeometry, grad: Tensor, x: Tensor, samples: SampleArrays, w: Tensor, grads: Gradients, mask_logits: bool
) -> None:
    """Fill the gradients of one slice of images; one offset group, gradient of the input needed."""
    assert grads.input is not None
    _sample_gradients(geom, grad, x, samples, w, grads, mask_logits)
    bins = launchers.bin_samples(geom, samples)
    right = _rows_of_weight(geom, w)
    pixels, grad_pixels = x.view(-1, geom.groups, right.shape[2]), grads.input.view(-1, geom.in_channels)
    for image, images, tile_row, tile_rows in _tile_chunks(geom, x):
        t, first = launchers.t_columns(geom, grad, samples, bins, image, images, tile_row, tile_rows)
        rows = slice(first, first + t.shape[1])
        multiply(grad_pixels[rows], t, right, None)
        if grads.weight is not None:
            accumulate(grads.weight, t.transpose(1, 2), pixels[rows].transpose(0, 1))


def _backward_by_columns(
    geom: ConvGeometry, grad: Tensor, x: Tensor, samples: SampleArrays, w: Tensor, grads: Gradients, mask_logits: bool
) -> None:
    """Fill the gradients of one slice of images; any offset groups, from column gradients and recomputed columns."""
    if grads.input is None:
        _sample_gradients(geom, grad, x, samples, w, grads, mask_logits)
    else:
        bins, chunks = launchers.bin_samples(geom, samples), list(_chunks(geom, x))
        wide = grads.input if len(chunks) == 1 else torch.empty_like(grads.input, dtype=torch.float32)
        for first, rows in chunks:
            grad_columns = _grad_columns(geom, grad[first : first + rows], w)
            if grads.offset is not None or grads.mask is not None:
                launchers.grad_sample(geom, grad_columns, x, samples, first, grads.offset, grads.mask, mask_logits)
            launchers.g_form(geom, grad_columns, samples, bins, first, wide)
            del grad_columns  # before the next are there
        if wide is not grads.input:
            grads.input.copy_(wide)
    if grads.weight is not None:
        for first, rows in _chunks(geom, x):
            left = grad[first : first + rows].view(rows, geom.groups, -1).permute(1, 2, 0)
            accumulate(grads.weight, left, launchers.columns(geom, x, samples, first, rows))


def _sample_gradients(
    geom: ConvGeometry, grad: Tensor, x: Tensor, samples: SampleArrays, w: Tensor, grads: Gradients, mask_logits: bool
) -> None:
    """Fill the gradients of offset and mask where needed: in one pass, or from chunks of column gradients."""
    if grads.offset is None and grads.mask is None:
        return
    row = launchers.row_for("grad_sample_fused", geom, x)
    if row is not None:
        launchers.grad_sample_fused(geom, row, grad, x, samples, w, grads.offset, grads.mask, mask_logits)
        return
    for first, rows in _chunks(geom, x):
        grad_columns = _grad_columns(geom, grad[first : first + rows], w)
        launchers.grad_sample(geom, grad_columns, x, samples, first, grads.offset, grads.mask, mask_logits)


def _on(device: torch.device) -> AbstractContextManager[None]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _slices(geom: ConvGeometry, need: str) -> Iterator[tuple[ConvGeometry, slice]]:
    """Yield even slices of images whose pixels can be indexed and whose per-image buffers fit the workspace.

    `need` is of `tile_table.SAMPLE_BYTES`.
    """
    pixels, samples = geom.height * geom.width, geom.positions * geom.offset_groups * geom.taps
    for count, most, what in ((pixels, tile_table.MAX_PIXELS, "pixels"), (samples, tile_table.MAX_SAMPLES, "samples")):
        if count >= most:
            raise ValueError(f"input of {geom.height}x{geom.width} gives {count} {what} an image, expected < {most}")
    bytes_per_image = samples * tile_table.SAMPLE_BYTES[need]
    if geom.offset_groups > 1 and need != "arrays":
        # one chunk of column gradients a slice: each goes through all bins of the slice
        bytes_per_image = max(bytes_per_image, geom.positions * geom.taps * geom.in_channels * 4)
    fit = max(1, min((tile_table.MAX_PIXELS - 1) // pixels, tile_table.WORKSPACE_BYTES // bytes_per_image))
    for images in even_slices(geom.batch, fit):
        yield replace(geom, batch=images.stop - images.start), images


def _chunks(geom: ConvGeometry, x: Tensor) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of positions whose columns fit the workspace."""
    positions = geom.batch * geom.positions
    step = max(1, tile_table.WORKSPACE_BYTES // (geom.taps * geom.in_channels * x.element_size()))
    for first in range(0, positions, step):
        yield first, min(step, positions - first)


def _tile_chunks(geom: ConvGeometry, x: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Yield (image, images, tile row, tile rows) whose T fits the workspace: whole images, or rows of tiles of one."""
    total, _ = launchers.input_tiles(geom)
    row_bytes = tile_table.TILE_H * geom.width * geom.taps * geom.out_channels * x.element_size()
    fit = max(1, tile_table.WORKSPACE_BYTES // row_bytes)
    images, tile_rows = max(1, fit // total), min(fit, total)
    for image in range(0, geom.batch, images):
        for tile_row in range(0, total, tile_rows):
            yield image, min(images, geom.batch - image), tile_row, min(tile_rows, total - tile_row)


def _taps_last(weight: Tensor) -> Tensor:
    """Return the weight as (O, K, C/G); no copy if it is stored channels-last."""
    return weight.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


def _columns_of_weight(geom: ConvGeometry, w: Tensor) -> Tensor:
    """View (O, K, C/G) as (G, O/G, K*C/G)."""
    return w.view(geom.groups, -1, w.shape[1] * w.shape[2])


def _rows_of_weight(geom: ConvGeometry, w: Tensor) -> Tensor:
    """Copy (O, K, C/G) to (G, K*O/G, C/G)."""
    return w.view(geom.groups, -1, *w.shape[1:]).transpose(1, 2).flatten(1, 2)


def _finish_weight(geom: ConvGeometry, grad_weight: Tensor, by_t: bool) -> Tensor:
    """Return the weight gradient as (O, C/G, kh, kw), contiguous."""
    out, per_group = geom.out_channels // geom.groups, geom.in_channels // geom.groups
    if by_t:
        grad_weight = grad_weight.view(-1, *geom.kernel, out, per_group).permute(0, 3, 4, 1, 2)
    else:
        grad_weight = grad_weight.view(-1, out, *geom.kernel, per_group).permute(0, 1, 4, 2, 3)
    return grad_weight.flatten(0, 1).contiguous()


def _grad_columns(geom: ConvGeometry, grad: Tensor, w: Tensor) -> Tensor:
    """Return the column gradients (G, rows, K*C/G) of grad_output (rows, O)."""
    left = grad.view(-1, geom.groups, geom.out_channels // geom.groups).transpose(0, 1)
    return multiply_groups(left, _columns_of_weight(geom, w))

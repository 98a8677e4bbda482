"""Forward and backward on Triton kernels: layouts, slices, chunks, and the order of the launches.

Receives a `ConvGeometry`, an `OffsetMask` and tensors of any strides from `operator`. Hands slices of images, stored
channels-last, to `launchers`, and chunks of columns to the library products of `matmul`. Nothing waits for the device.

Inside, the input `x` is (B, H, W, C), the weight `w` (O, K, C/G), output and grad_output `grad` (M, O). For each slice,
the first launch computes the sample arrays, `SampleArrays`, from offsets and masks; nothing else reads these two.

Letters: see `triton_dcn.kernels.sampling`; B and M count the images, and their output positions, of one slice. The rows
of a column buffer are the output positions of one chunk.

Narrow channel groups are joined: the computation is that of fewer groups, whose weight has zeros where an input and an
output channel are of different groups. Columns of a few channels each would be written and read a few bytes at a time,
and products this narrow take as long as those with the zeros. Where all of them together have a fused kernel, which
needs no columns in memory, all become one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from triton_dcn import launchers, tile_table
from triton_dcn.geometry import ConvGeometry
from triton_dcn.joined_groups import groups_to_join, join_weight, split_weight
from triton_dcn.launchers import SampleArrays
from triton_dcn.matmul import accumulate, multiply, multiply_groups
from triton_dcn.offset_mask import OffsetMask, OffsetMaskGrad
from triton_dcn.workspace import column_chunks, image_slices, prefers_t_columns, sample_buffer_shape, tile_chunks

NO_CONTEXT = nullcontext()
NARROW_GROUP = 16
"""Channel groups of fewer input channels are joined."""
FUSED_CHANNELS = {("forward", "half"): 256}
FUSED_CHANNELS_ELSE = 128
"""With no more input channels all narrow groups become one if a fused kernel does the task, ..."""
JOINED_CHANNELS = {"half": 64, "tf32": 64, "float32": 32}
"""... else groups of at least so many input channels: as wide as a product may be that memory still bounds."""


def forward(
    geom: ConvGeometry,
    input: Tensor,
    offset_mask: OffsetMask,
    weight: Tensor,
    bias: Tensor | None,
    *,
    relu: bool = False,
) -> Tensor:
    """Compute the output, (B, O, Ho, Wo), dtype of `input`, stored channels-last; see `forward_with_samples`."""
    output, _ = forward_with_samples(geom, input, offset_mask, weight, bias, relu=relu)
    return output


def forward_with_samples(
    geom: ConvGeometry,
    input: Tensor,
    offset_mask: OffsetMask,
    weight: Tensor,
    bias: Tensor | None,
    *,
    relu: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute the output, (B, O, Ho, Wo), dtype of `input`, stored channels-last.

    Args:
        geom: from `ConvGeometry.of` for these tensors.
        input: (B, C, H, W), float16, bfloat16 or float32, any strides.
        offset_mask: any strides.
        weight: (O, C/G, kh, kw), dtype of `input`.
        bias: (O,), dtype of `input`, or None.
        relu: negative outputs become 0.

    Returns:
        The output, and what `backward` takes as `kept_samples`: the sample arrays in one buffer, None where there are
        several slices of images.

    Raises:
        ValueError: one image has 2**27 pixels, or 2**29 samples, or more.
    """
    x = _channels_last(input)
    if geom.groups > 1:
        geom, weight = _join_narrow_groups(geom, weight, "forward", x)
    row = tile_table.find_row("forward", geom, x)
    w = _taps_last(weight) if row is None else launchers.forward_weight(row, weight)
    bias = None if bias is None else bias.contiguous()
    output = x.new_empty(geom.batch * geom.positions, geom.out_channels)  # written in full
    buffer = None

    with _current_device(x.device):
        for slice_geom, images in image_slices(geom, "arrays"):
            slice_x, slice_offset_mask, slice_output = x, offset_mask, output
            if slice_geom is not geom:
                slice_x = x[images]
                slice_offset_mask = offset_mask.images(images)
                slice_output = output[_positions(geom, images)]
            slice_buffer = offset_mask.offset.new_empty(sample_buffer_shape(slice_geom), dtype=torch.int32)
            samples = launchers.sample_into(slice_buffer, slice_geom, slice_offset_mask)
            buffer = slice_buffer if slice_geom is geom else None
            if row is not None:
                launchers.forward_fused(slice_geom, row, slice_x, samples, w, bias, slice_output, relu)
            else:
                _forward_by_columns(slice_geom, slice_x, samples, w, bias, slice_output)
                if relu:
                    slice_output.relu_()
    output = output.view(geom.batch, geom.out_height, geom.out_width, geom.out_channels).permute(0, 3, 1, 2)
    return output, buffer


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
    kept_samples: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Fill the gradients of offset and mask; return those of input and weight, None where not needed.

    Args:
        geom: as given to `forward`.
        grad_output: (B, O, Ho, Wo), any strides.
        input, offset_mask, weight: as given to `forward`.
        grad_offset_mask: written in full; contiguous except for the stride of the batch.
        needs_input: whether to compute the gradient of `input`.
        needs_weight: whether to compute the gradient of `weight`.
        kept_samples: of `forward_with_samples`, or None.

    Returns:
        Gradients in the shapes and dtypes of their tensors, that of the input stored channels-last.

    Raises:
        ValueError: one image has 2**27 pixels, or 2**29 samples, or more.
    """
    x = _channels_last(input)
    groups = geom.groups
    joined_weight = weight
    if groups > 1:
        geom, joined_weight = _join_narrow_groups(geom, weight, "grad_sample_fused", x)
    w = _taps_last(joined_weight)
    grad = _channels_last(grad_output).view(-1, geom.out_channels)
    grad_input = torch.empty_like(x) if needs_input else None  # written in full
    kept = launchers.binning_method() if needs_input else "arrays"

    needs_samples = grad_offset_mask.needed
    fused_row = tile_table.find_row("grad_sample_fused", geom, x) if needs_samples else None
    use_t_columns = needs_input and prefers_t_columns(
        geom, needs_samples=needs_samples, fused_samples=fused_row is not None, needs_weight=needs_weight
    )
    column_itemsize = 0
    if needs_input and not use_t_columns:
        column_itemsize = x.element_size()
        fused_row = None  # the column gradients from which that of the input comes serve offset and mask, too
    # each kernel's order of the weight, once for all slices
    w_for_samples = w if fused_row is None else launchers.grad_sample_weight(fused_row, w)
    w_for_t = _weight_for_t(geom, w) if use_t_columns else w
    weight_matrix_grad = None  # each chunk adds its part

    with _current_device(x.device):
        for slice_geom, images in image_slices(geom, kept, column_itemsize):
            slice_x, slice_offset_mask, slice_grad = x, offset_mask, grad
            slice_grad_input, slice_grad_offset_mask = grad_input, grad_offset_mask
            if slice_geom is not geom:
                slice_x = x[images]
                slice_offset_mask = offset_mask.images(images)
                slice_grad = grad[_positions(geom, images)]
                slice_grad_input = None if grad_input is None else grad_input[images]
                slice_grad_offset_mask = grad_offset_mask.images(images)
            if kept_samples is not None and slice_geom is geom:
                samples = launchers.view_samples(kept_samples, geom)
            else:
                samples = launchers.sample(slice_geom, slice_offset_mask)

            tensors = (slice_grad, slice_x, samples)
            to_fill = slice_grad_offset_mask if needs_samples else None
            if to_fill is not None and fused_row is not None:
                launchers.grad_sample_fused(slice_geom, fused_row, *tensors, w_for_samples, to_fill)
                to_fill = None

            if use_t_columns:
                assert slice_grad_input is not None
                if to_fill is not None:
                    _backward_by_columns(slice_geom, *tensors, w, None, to_fill, None, needs_weight=False)
                weight_matrix_grad = _backward_by_t_columns(
                    slice_geom, *tensors, w_for_t, slice_grad_input, weight_matrix_grad, needs_weight=needs_weight
                )
            else:
                weight_matrix_grad = _backward_by_columns(
                    slice_geom, *tensors, w, slice_grad_input, to_fill, weight_matrix_grad, needs_weight=needs_weight
                )

    if grad_input is not None:
        grad_input = grad_input.permute(0, 3, 1, 2)
    grad_weight = None
    if weight_matrix_grad is not None:
        restore = _weight_from_t if use_t_columns else weight_from_columns
        grad = restore(geom, weight_matrix_grad)
        if groups > 1:
            grad = split_weight(grad, groups, groups // geom.groups)
        # one copy for the order of the dimensions, the dtype and the layout
        grad_weight = torch.empty_like(weight).copy_(grad)
    elif needs_weight:  # no images
        grad_weight = torch.zeros_like(weight)
    return grad_input, grad_weight


def _forward_by_columns(
    geom: ConvGeometry, x: Tensor, samples: SampleArrays, w: Tensor, bias: Tensor | None, output: Tensor
) -> None:
    """Fill `output` (M, O) by columns and a library product, chunk by chunk."""
    weight_matrix = _weight_for_columns(geom, w).transpose(1, 2)
    for chunk in column_chunks(geom, x):
        columns = launchers.columns(geom, x, samples, chunk)
        multiply(output[chunk], columns, weight_matrix, bias)


def _backward_by_t_columns(
    geom: ConvGeometry,
    grad: Tensor,
    x: Tensor,
    samples: SampleArrays,
    w: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor | None,
    *,
    needs_weight: bool,
) -> Tensor | None:
    """Fill the gradient of the input of one slice of images by T; the slice has one offset group.

    Args:
        geom, grad, x, samples: of the slice.
        w: of `_weight_for_t`.
        grad_input: (B, H, W, C), dtype of the input, written in full.
        grad_weight: (G, K*O/G, C/G), float32, the sum over the slices before; None before the first one.
        needs_weight: whether to add to `grad_weight`.

    Returns:
        The new sum, in `grad_weight` where there is one.
    """
    bins = launchers.bin_samples(geom, samples, tile_table.T_TILE_H)
    pixels = x.view(-1, geom.groups, geom.in_channels // geom.groups)
    grad_pixels = grad_input.view(-1, geom.in_channels)
    for tiles in tile_chunks(geom, x):
        t, chunk = launchers.t_columns(geom, grad, samples, bins, tiles)
        multiply(grad_pixels[chunk], t, w, None)
        if needs_weight:
            grad_weight = accumulate(grad_weight, t.transpose(1, 2), pixels[chunk].transpose(0, 1))
    return grad_weight


def _backward_by_columns(
    geom: ConvGeometry,
    grad: Tensor,
    x: Tensor,
    samples: SampleArrays,
    w: Tensor,
    grad_input: Tensor | None,
    grad_offset_mask: OffsetMaskGrad | None,
    grad_weight: Tensor | None,
    *,
    needs_weight: bool,
) -> Tensor | None:
    """Fill the gradients of one slice of images from column gradients and columns; any number of offset groups.

    The gradient of the input comes from column gradients by the G-form, and those of offset and mask from the same
    ones. That of the weight comes from columns: the pass that reads the column gradients last leaves the columns in
    their place, since it has loaded the pixels that they blend. Without such a pass they are computed on their own.

    Args:
        geom, grad, x, samples: of the slice.
        w: (O, K, C/G).
        grad_input: (B, H, W, C), dtype of the input, written in full; None where not needed.
        grad_offset_mask: written in full; None where not needed.
        grad_weight: (G, O/G, K*C/G), float32, the sum over the slices before; None before the first one.
        needs_weight: whether to add to `grad_weight`.

    Returns:
        The new sum, in `grad_weight` where there is one.
    """
    if grad_input is None and grad_offset_mask is None and not needs_weight:
        return grad_weight

    chunks = column_chunks(geom, x)
    if grad_input is not None:
        bins = launchers.bin_samples(geom, samples, tile_table.G_TILE_H)
        # several chunks are summed in float32
        grad_sum = grad_input if len(chunks) == 1 else torch.empty_like(grad_input, dtype=torch.float32)

    for chunk in chunks:
        columns = None  # frees those of the chunk before
        if grad_input is not None or grad_offset_mask is not None:
            grad_columns = column_gradients(geom, grad[chunk], w)
            if grad_input is not None:
                launchers.g_form(geom, grad_columns, samples, bins, chunk, grad_sum)
            if grad_offset_mask is not None:
                launchers.grad_sample(
                    geom, grad_columns, x, samples, chunk, grad_offset_mask, write_columns=needs_weight
                )
                columns = grad_columns
            del grad_columns
        if needs_weight:
            if columns is None:
                columns = launchers.columns(geom, x, samples, chunk)
            grad_weight = accumulate(grad_weight, by_group(geom, grad[chunk]).transpose(1, 2), columns)

    if grad_input is not None and grad_sum is not grad_input:
        grad_input.copy_(grad_sum)
    return grad_weight


def joined_geometry(geom: ConvGeometry, task: str, x: Tensor) -> ConvGeometry:
    """Return the geometry with narrow channel groups joined, `geom` itself if they are not narrow.

    Args:
        geom: of the call.
        task: for which fused kernels there may be one, "forward" or "grad_sample_fused".
        x: the input; only its device and dtype are used.
    """
    per_group = geom.in_channels // geom.groups
    if geom.groups == 1 or per_group >= NARROW_GROUP:
        return geom
    arithmetic = tile_table.arithmetic(x)
    whole = replace(geom, groups=1)
    is_small = geom.in_channels <= FUSED_CHANNELS.get((task, arithmetic), FUSED_CHANNELS_ELSE)
    if is_small and tile_table.find_row(task, whole, x) is not None:
        return whole
    return replace(geom, groups=geom.groups // groups_to_join(geom.groups, per_group, JOINED_CHANNELS[arithmetic]))


def _join_narrow_groups(geom: ConvGeometry, weight: Tensor, task: str, x: Tensor) -> tuple[ConvGeometry, Tensor]:
    """Return the joined geometry, and the weight (O, C/G, kh, kw) for it: zeros between the groups that were joined."""
    joined_geom = joined_geometry(geom, task, x)
    return joined_geom, join_weight(weight, geom.groups, geom.groups // joined_geom.groups)


def column_gradients(geom: ConvGeometry, grad: Tensor, w: Tensor) -> Tensor:
    """Return the column gradients (G, rows, K*C/G) of grad_output (rows, O)."""
    return multiply_groups(by_group(geom, grad), _weight_for_columns(geom, w))


def by_group(geom: ConvGeometry, grad: Tensor) -> Tensor:
    """View grad_output (rows, O) as (G, rows, O/G)."""
    return grad.view(-1, geom.groups, geom.out_channels // geom.groups).transpose(0, 1)


def weight_from_columns(geom: ConvGeometry, matrix: Tensor) -> Tensor:
    """Return (G, O/G, K*C/G) as (O, C/G, kh, kw), without a copy where that is possible."""
    out_per_group = geom.out_channels // geom.groups
    in_per_group = geom.in_channels // geom.groups
    taps_apart = matrix.view(-1, out_per_group, *geom.kernel, in_per_group)
    return taps_apart.permute(0, 1, 4, 2, 3).flatten(0, 1)


def _weight_for_columns(geom: ConvGeometry, w: Tensor) -> Tensor:
    """View (O, K, C/G) as (G, O/G, K*C/G)."""
    return w.view(geom.groups, -1, w.shape[1] * w.shape[2])


def _weight_for_t(geom: ConvGeometry, w: Tensor) -> Tensor:
    """Copy (O, K, C/G) to (G, K*O/G, C/G)."""
    return w.view(geom.groups, -1, *w.shape[1:]).transpose(1, 2).flatten(1, 2)


def _weight_from_t(geom: ConvGeometry, matrix: Tensor) -> Tensor:
    """Return (G, K*O/G, C/G) as (O, C/G, kh, kw), without a copy where there is one group."""
    out_per_group = geom.out_channels // geom.groups
    in_per_group = geom.in_channels // geom.groups
    taps_apart = matrix.view(-1, *geom.kernel, out_per_group, in_per_group)
    return taps_apart.permute(0, 3, 4, 1, 2).flatten(0, 1)


def _channels_last(tensor: Tensor) -> Tensor:
    """Return (B, H, W, C) of (B, C, H, W); no copy if it is stored channels-last."""
    return tensor.permute(0, 2, 3, 1).contiguous()


def _taps_last(weight: Tensor) -> Tensor:
    """Return (O, K, C/G) of (O, C/G, kh, kw); no copy if it is stored channels-last."""
    return _channels_last(weight).flatten(1, 2)


def _positions(geom: ConvGeometry, images: slice) -> slice:
    """Return the output positions of a slice of images, counted over all images."""
    return slice(images.start * geom.positions, images.stop * geom.positions)


def _current_device(device: torch.device) -> AbstractContextManager[None]:
    """Make `device` the current GPU, if it is not, because Triton launches on that one."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return NO_CONTEXT

"""Plain deformable convolution: the oracle of every test, written for reading.

Forward is made of differentiable torch functions, so autograd through it checks the gradients that backward spells out.

Letters: B batch, C input channels, O output channels, H W input, K taps, G groups, D offset groups.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from triton_dcn.geometry import ConvGeometry


def sampling_positions(geom: ConvGeometry, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and x of every sample, each (B, D, K, Ho, Wo), in input pixels and in float32 or better.

    p = out * stride - padding + tap * dilation + offset.
    """
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
    shape = geom.batch, geom.offset_groups, geom.taps, 2, geom.out_height, geom.out_width
    dy, dx = offset.reshape(shape).unbind(3)

    def grid(size: int, axis: int) -> Tensor:
        return torch.arange(size, device=offset.device, dtype=offset.dtype) * geom.stride[axis] - geom.padding[axis]

    def taps(axis: int) -> Tensor:
        return torch.arange(geom.kernel[axis], device=offset.device, dtype=offset.dtype) * geom.dilation[axis]

    tap_y, tap_x = (tap.reshape(-1, 1, 1) for tap in torch.meshgrid(taps(0), taps(1), indexing="ij"))
    return tap_y + grid(geom.out_height, 0)[:, None] + dy, tap_x + grid(geom.out_width, 1) + dx


def _corners(
    geom: ConvGeometry, input: Tensor, offset: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]]:
    """Yield the four neighbors of every sample.

    Each is (value, index of the pixel, whether it counts, weight in y, weight in x, and their derivatives, -1 or +1):
    value (B, D, C/D, K, Ho, Wo), the others (B, D, K, Ho, Wo). A sample at or beyond -1, H or W, or nowhere, has none.
    """
    y, x = sampling_positions(geom, offset)
    inside = (y > -1) & (y < geom.height) & (x > -1) & (x < geom.width)  # false for NaN
    y, x = torch.where(inside, y, 0), torch.where(inside, x, 0)
    y0, x0 = y.detach().floor(), x.detach().floor()
    shape = geom.batch, geom.offset_groups, geom.in_channels // geom.offset_groups, geom.height * geom.width
    pixels = input.reshape(shape)  # (B, D, C/D, H*W)
    for row, weight_y, slope_y in ((y0, y0 + 1 - y, -1), (y0 + 1, y - y0, 1)):
        for column, weight_x, slope_x in ((x0, x0 + 1 - x, -1), (x0 + 1, x - x0, 1)):
            exists = inside & (row >= 0) & (row < geom.height) & (column >= 0) & (column < geom.width)
            index = torch.where(exists, row.long() * geom.width + column.long(), 0)
            flat = index.flatten(2)[:, :, None].expand(-1, -1, pixels.shape[2], -1)
            value = pixels.gather(3, flat).unflatten(3, y.shape[2:])
            value = torch.where(exists[:, :, None], value, 0)
            yield value, index, exists, weight_y, weight_x, slope_y, slope_x


def _modulation(geom: ConvGeometry, mask: Tensor | None) -> Tensor | float:
    """Return the mask as (B, D, K, Ho, Wo), 1 without a mask."""
    shape = geom.batch, geom.offset_groups, geom.taps, geom.out_height, geom.out_width
    return 1.0 if mask is None else mask.reshape(shape).to(torch.promote_types(mask.dtype, torch.float32))


def columns(geom: ConvGeometry, input: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
    """Return the modulated bilinear samples, (B, C, K, Ho, Wo), in float32 or better."""
    parts = (
        value * torch.where(exists, weight_y * weight_x * _modulation(geom, mask), 0)[:, :, None]
        for value, _, exists, weight_y, weight_x, _, _ in _corners(geom, input, offset)
    )
    total = sum(parts, input.new_zeros(()))
    return total.flatten(1, 2)


def forward(
    geom: ConvGeometry, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Compute the output, (B, O, Ho, Wo), in the dtype of `input`; coordinates and blending in float32 or better.

    Args:
        geom: from `ConvGeometry.of` for these tensors.
        input, offset, mask, weight, bias: as in `triton_dcn.deform_conv2d`.

    Source:
        Zhu et al., Deformable ConvNets v2, CVPR 2019, section 3; the border rule is mmcv's.
    """
    cols = _columns_by_group(geom, columns(geom, input, offset, mask).to(input.dtype))
    output = torch.einsum("gok,bgkp->bgop", _by_group(geom, weight), cols).reshape(geom.output_shape)
    return output if bias is None else output + bias[:, None, None]


def backward(
    geom: ConvGeometry,
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of input, offset, mask and weight where `needs` says so, None elsewhere.

    Args:
        geom, input, offset, mask, weight: as in `forward`.
        grad_output: (B, O, Ho, Wo), any strides.
        needs: which gradients to compute; that of the mask needs a mask.

    Returns:
        Gradients in the shapes and dtypes of their tensors.
    """
    per_offset = geom.in_channels // geom.offset_groups
    grad = grad_output.reshape(geom.batch, geom.groups, geom.out_channels // geom.groups, geom.positions)
    grad_weight = None
    if needs[3]:
        cols = _columns_by_group(geom, columns(geom, input, offset, mask).to(input.dtype))
        grad_weight = torch.einsum("bgop,bgkp->gok", grad, cols).reshape(weight.shape)
    grad_column = torch.einsum("gok,bgop->bgkp", _by_group(geom, weight), grad)  # of modulated samples
    grad_column = grad_column.to(torch.promote_types(input.dtype, torch.float32)).reshape(
        geom.batch, geom.offset_groups, per_offset, geom.taps, geom.out_height, geom.out_width
    )
    scale = _modulation(geom, mask)
    grad_pixels = grad_column.new_zeros(geom.batch, geom.offset_groups, per_offset, geom.height * geom.width)
    grad_y = grad_x = grad_scale = grad_column.new_zeros(())
    for value, index, exists, weight_y, weight_x, slope_y, slope_x in _corners(geom, input, offset):
        dot = (grad_column * value).sum(2)  # (B, D, K, Ho, Wo)
        grad_y = grad_y + dot * torch.where(exists, slope_y * weight_x * scale, 0)
        grad_x = grad_x + dot * torch.where(exists, slope_x * weight_y * scale, 0)
        grad_scale = grad_scale + dot * weight_y * weight_x
        if needs[0]:
            share = grad_column * torch.where(exists, weight_y * weight_x * scale, 0)[:, :, None]
            flat = index.flatten(2)[:, :, None].expand(-1, -1, per_offset, -1)
            grad_pixels.scatter_add_(3, flat, share.flatten(3))
    grad_offset = torch.stack([grad_y, grad_x], 3)
    return (
        grad_pixels.reshape(input.shape).to(input.dtype) if needs[0] else None,
        grad_offset.reshape(offset.shape).to(offset.dtype) if needs[1] else None,
        grad_scale.reshape(mask.shape).to(mask.dtype) if mask is not None and needs[2] else None,
        grad_weight,
    )


def _columns_by_group(geom: ConvGeometry, columns: Tensor) -> Tensor:
    """Return the columns as (B, G, C/G * K, Ho*Wo)."""
    return columns.reshape(geom.batch, geom.groups, geom.in_channels // geom.groups * geom.taps, geom.positions)


def _by_group(geom: ConvGeometry, weight: Tensor) -> Tensor:
    """Return the weight as (G, O/G, C/G * K)."""
    return weight.reshape(geom.groups, geom.out_channels // geom.groups, -1)

"""The reference: deformable convolution in plain differentiable PyTorch, written to be read.

Receives the checked tensors of a call and their geometry, returns the output. Autograd does the rest: gradients, second
derivatives, forward mode, vmap. Every other backend is tested against this one.

Letters: B images, C input channels, O output channels, H W input, Ho Wo output, K kernel taps, G channel groups,
D offset groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_dcn.geometry import ConvGeometry
from triton_dcn.offset_mask import OffsetMask


def forward(geom: ConvGeometry, input: Tensor, offset_mask: OffsetMask, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the output, (B, O, Ho, Wo), in the dtype of `input`; positions and blending in float32 or better.

    Args:
        geom: from `ConvGeometry.of` for these tensors.
        input: (B, C, H, W).
        offset_mask: as in `OffsetMask`, in the dtype of `input` or in float32.
        weight: (O, C/G, kh, kw).
        bias: (O,) or None.

    Source:
        Zhu et al., Deformable ConvNets v2, CVPR 2019, section 3; the border rule is mmcv's.
    """
    channels_per_group = geom.in_channels // geom.groups
    columns = sample_columns(geom, input, offset_mask).to(input.dtype)
    columns = columns.reshape(geom.batch, geom.groups, channels_per_group * geom.taps, geom.positions)
    weight = weight.reshape(geom.groups, geom.out_channels // geom.groups, channels_per_group * geom.taps)

    output = torch.einsum("gok,bgkp->bgop", weight, columns).reshape(geom.output_shape)
    return output if bias is None else output + bias[:, None, None]


def sample_columns(geom: ConvGeometry, input: Tensor, offset_mask: OffsetMask) -> Tensor:
    """Return the modulated bilinear samples, (B, C, K, Ho, Wo), in float32 or better.

    A sample whose y or x is at or beyond -1, H or W, or is not finite, lies outside: it is 0, and its offset and mask
    have gradients of 0. Outside, y, x and the mask are replaced by 0 before anything is computed from them: a NaN there
    would otherwise reach the gradients, as 0 * NaN is NaN.
    """
    y, x = sampling_positions(geom, offset_mask.offset)
    inside = (y > -1) & (y < geom.height) & (x > -1) & (x < geom.width)  # False for NaN
    y = torch.where(inside, y, 0)
    x = torch.where(inside, x, 0)
    mask = _mask_inside(geom, offset_mask, inside)
    top = y.detach().floor()
    left = x.detach().floor()

    channels_per_offset_group = geom.in_channels // geom.offset_groups
    pixels = _at_least_float32(input).reshape(
        geom.batch, geom.offset_groups, channels_per_offset_group, geom.height * geom.width
    )
    columns = pixels.new_zeros(())
    for row, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
        for column, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
            exists = inside & (row >= 0) & (row < geom.height) & (column >= 0) & (column < geom.width)
            index = torch.where(exists, row.long() * geom.width + column.long(), 0)
            neighbor = torch.where(exists[:, :, None], _gather_pixels(pixels, index), 0)

            weight = weight_y * weight_x
            if mask is not None:
                weight = weight * mask
            weight = torch.where(exists, weight, 0)
            columns = columns + neighbor * weight[:, :, None]
    return columns.flatten(1, 2)


def sampling_positions(geom: ConvGeometry, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and x of every sample, each (B, D, K, Ho, Wo), in input pixels and in float32 or better.

    Along each axis: position = output position * stride - padding + tap * dilation + offset.
    """
    offset = _at_least_float32(offset)
    shape = (geom.batch, geom.offset_groups, geom.taps, 2, geom.out_height, geom.out_width)
    offset_y, offset_x = offset.reshape(shape).unbind(3)

    def steps(count: int, step: int) -> Tensor:
        return torch.arange(count, device=offset.device, dtype=offset.dtype) * step

    tap_y, tap_x = torch.meshgrid(
        steps(geom.kernel[0], geom.dilation[0]), steps(geom.kernel[1], geom.dilation[1]), indexing="ij"
    )
    window_y = steps(geom.out_height, geom.stride[0]) - geom.padding[0]  # where the first tap lies
    window_x = steps(geom.out_width, geom.stride[1]) - geom.padding[1]
    y = tap_y.reshape(-1, 1, 1) + window_y[:, None] + offset_y
    x = tap_x.reshape(-1, 1, 1) + window_x + offset_x
    return y, x


def _mask_inside(geom: ConvGeometry, offset_mask: OffsetMask, inside: Tensor) -> Tensor | None:
    """Return the factor of each sample inside, (B, D, K, Ho, Wo), in float32 or better; None in version 1."""
    if offset_mask.mask is None:
        return None
    mask = torch.where(inside, offset_mask.mask.reshape(inside.shape), 0)
    if offset_mask.mask_logits:
        mask = mask.sigmoid()
    return _at_least_float32(mask)


def _gather_pixels(pixels: Tensor, index: Tensor) -> Tensor:
    """Return one pixel per sample: from (B, D, C/D, H*W), by indices (B, D, K, Ho, Wo), (B, D, C/D, K, Ho, Wo)."""
    channels = pixels.shape[2]
    index_of_channels = index.flatten(2)[:, :, None].expand(-1, -1, channels, -1)
    samples = pixels.gather(3, index_of_channels)
    return samples.reshape(*samples.shape[:3], *index.shape[2:])


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

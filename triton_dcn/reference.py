"""Plain differentiable deformable convolution: the oracle of every test.

Written for reading. Gradients come from autograd, so they follow from the forward pass alone: a sample outside the
image is replaced by a constant zero, which makes its offset and mask gradients zero, and `floor` has no gradient, which
makes the offset gradient that of the cell floor(p).

Letters: B batch, C input channels, O output channels, H W input, P output positions, K taps, G groups, D offset groups.
"""

from __future__ import annotations

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


def columns(geom: ConvGeometry, input: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
    """Return the modulated bilinear samples, (B, C, K, Ho, Wo)."""
    y, x = sampling_positions(geom, offset)
    inside = (y > -1) & (y < geom.height) & (x > -1) & (x < geom.width)  # false for NaN
    y, x = torch.where(inside, y, 0), torch.where(inside, x, 0)
    y0, x0 = y.detach().floor(), x.detach().floor()
    pixels = input.reshape(geom.batch, geom.offset_groups, -1, geom.height * geom.width)  # (B, D, C/D, H*W)
    total = 0
    for corner_y, weight_y in ((y0, y0 + 1 - y), (y0 + 1, y - y0)):
        for corner_x, weight_x in ((x0, x0 + 1 - x), (x0 + 1, x - x0)):
            exists = inside & (corner_y >= 0) & (corner_y < geom.height) & (corner_x >= 0) & (corner_x < geom.width)
            index = torch.where(exists, corner_y * geom.width + corner_x, 0).long()  # (B, D, K, Ho, Wo)
            index = index.flatten(2)[:, :, None].expand(-1, -1, pixels.shape[2], -1)
            value = pixels.gather(3, index).unflatten(3, y.shape[2:])  # (B, D, C/D, K, Ho, Wo)
            total = total + torch.where(exists[:, :, None], value * (weight_y * weight_x)[:, :, None], 0)
    if mask is not None:
        mask = mask.reshape(geom.batch, geom.offset_groups, 1, *y.shape[2:])
        total = torch.where(inside[:, :, None], total * mask, 0)
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
    cols = columns(geom, input, offset, mask).to(input.dtype)
    cols = cols.reshape(geom.batch, geom.groups, -1, geom.positions)
    weight = weight.reshape(geom.groups, geom.out_channels // geom.groups, -1)
    output = torch.einsum("gok,bgkp->bgop", weight, cols).reshape(geom.output_shape)
    return output if bias is None else output + bias[:, None, None]


def backward(
    geom: ConvGeometry,
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of input, offset, mask and weight where `needs` says so, None elsewhere."""
    leaves = [
        None if tensor is None else tensor.detach().requires_grad_(need)
        for tensor, need in zip((input, offset, mask, weight), needs, strict=True)
    ]
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    if not wanted:
        return None, None, None, None
    with torch.enable_grad():
        output = forward(geom, *leaves, bias=None)
        grads = iter(torch.autograd.grad(output, wanted, grad_output))
    return tuple(next(grads) if need else None for need in needs)

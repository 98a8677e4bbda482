"""Drop-in replacements for mmcv's deformable operators, in mmcv, MMDetection and all that builds on them.

    from triton_dcn.compat import mmcv as compat

    compat.patch()                # every call from now on; `.undo()`, or `with compat.patch(): ...`
    compat.convert(model)         # the layers of one model; `compat.revert(model)`

Results and gradients agree. Any batch size works, whatever `im2col_step`. Deformable RoI pooling also works on a CPU.
As there, version 2 takes offsets and masks of a map larger than the output, see `shapes.read_map`; version 1 does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from triton_dcn.compat.shapes import check_groups, read_map
from triton_dcn.compat.swap import Patch, convert_layers, import_library, revert_layers
from triton_dcn.functional import deform_conv2d, pair, untraced
from triton_dcn.nn import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack
from triton_dcn.roi_pool import functional as roi_pool
from triton_dcn.roi_pool.nn import DeformRoIPool, DeformRoIPoolPack, ModulatedDeformRoIPoolPack

Pair = int | tuple[int, int]


def deform_conv2d_v1(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:
    """Convolve as `mmcv.ops.deform_conv2d` does, in the dtype of `offset`.

    Args:
        input, offset, weight, stride, padding, dilation: as in `triton_dcn.deform_conv2d`.
        groups, deform_groups: as they follow from the shapes.
        bias: False, as in mmcv.
        im2col_step: ignored.

    Raises:
        ValueError: shapes or groups disagree, or `bias` is not False.
    """
    if bias is not False:
        raise ValueError(f"bias: expected False, got {bias!r}")
    untraced(check_groups, input, offset, weight, groups, deform_groups)
    return deform_conv2d(input.to(offset.dtype), offset, weight.to(offset.dtype), None, stride, padding, dilation)


def deform_conv2d_v2(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """Convolve as `mmcv.ops.modulated_deform_conv2d` does, in the dtype of `offset`.

    Args:
        input, offset, mask, weight, bias, stride, padding, dilation: as in `triton_dcn.deform_conv2d`, but offset and
            mask may be higher and wider than the output: see `shapes.read_map`.
        groups, deform_groups: as they follow from the shapes.

    Raises:
        ValueError: shapes or groups disagree.
    """
    untraced(check_groups, input, offset, weight, groups, deform_groups)

    stride = pair("stride", stride)
    padding = pair("padding", padding)
    dilation = pair("dilation", dilation)
    input = input.to(offset.dtype)
    weight = weight.to(offset.dtype)
    bias = None if bias is None else bias.to(offset.dtype)
    offset = read_map("offset", offset, 2, deform_groups, input, weight, stride, padding, dilation)
    if mask is not None:
        mask = mask.to(offset.dtype)
        mask = read_map("mask", mask, 1, deform_groups, input, weight, stride, padding, dilation)
    return deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Tensor:
    """Pool as `mmcv.ops.deform_roi_pool` does.

    mmcv rounds `gamma` to float32 also for tensors in float64. An empty offset is none, as there.

    Args:
        input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma: as in `triton_dcn.deform_roi_pool`.

    Raises:
        ValueError, TypeError: as there.
    """
    return roi_pool.deform_roi_pool(
        input,
        rois,
        None if offset is None or offset.numel() == 0 else offset,
        output_size=output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        gamma=gamma,
    )


class ModulatedDeformConv2d(DeformConv2d):
    """Deformable convolution v2 that is given offsets and masks, also those of a map larger than the output.

    What `convert` makes of mmcv's layer of this name.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in
            `triton_dcn.DeformConv2d`.
        deform_groups: groups D of input channels that share offsets.

    Shape:
        input (B, C, H, W), offset (B, 2*D*K, h, w), mask (B, D*K, h, w) or None -> (B, O, Ho, Wo), where h * w is at
        least Ho * Wo; see `shapes.read_map`.

    Raises:
        ValueError: channels do not divide into the groups.

    Source:
        mmcv.ops.ModulatedDeformConv2d, also for the initial values.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
    ):
        if deform_groups < 1 or in_channels % deform_groups:
            raise ValueError(f"in_channels: expected a multiple of deform_groups = {deform_groups}, got {in_channels}")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.deform_groups = deform_groups

    def reset_parameters(self) -> None:
        """Draw `weight` from U(+-1/sqrt(C*K)) and set `bias` to zero, as mmcv does."""
        bound = 1 / math.sqrt(self.in_channels * self.kernel_size[0] * self.kernel_size[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, O, Ho, Wo).

        Raises:
            ValueError: shapes disagree.
        """
        sizes = (self.deform_groups, input, self.weight, self.stride, self.padding, self.dilation)
        offset = read_map("offset", offset, 2, *sizes)
        if mask is not None:
            mask = read_map("mask", mask, 1, *sizes)
        return super().forward(input, offset, mask)

    def extra_repr(self) -> str:
        """Describe the layer as torch.nn.Conv2d does."""
        return f"{super().extra_repr()}, deform_groups={self.deform_groups}"


FUNCTIONS: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("deform_conv", "deform_conv2d"): deform_conv2d_v1,
    ("modulated_deform_conv", "modulated_deform_conv2d"): deform_conv2d_v2,
    ("deform_roi_pool", "deform_roi_pool"): deform_roi_pool,
}
"""By module of mmcv.ops and name in it."""


def patch() -> Patch:
    """Replace mmcv's `deform_conv2d`, `modulated_deform_conv2d` and `deform_roi_pool` in all modules that have them.

    All layers that call them are reached: those of mmcv, also `SAConv2d`, and those of other packages.

    Returns:
        A handle with `undo()`, also a context manager; it tells the places, see `swap.Patch`.

    Raises:
        ImportError: mmcv cannot be imported.
    """
    import_library("mmcv.ops")
    modules = {name: import_library(f"mmcv.ops.{name}") for name, _ in FUNCTIONS}
    return Patch([(modules[module], name, function) for (module, name), function in FUNCTIONS.items()])


def _replacement_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Return mmcv's class -> ours."""
    ops = import_library("mmcv.ops")
    return {
        ops.DeformConv2d: DeformConv2d,
        ops.DeformConv2dPack: DeformConv2dPack,
        ops.ModulatedDeformConv2d: ModulatedDeformConv2d,
        ops.ModulatedDeformConv2dPack: ModulatedDeformConv2dPack,
        ops.DeformRoIPool: DeformRoIPool,
        ops.DeformRoIPoolPack: DeformRoIPoolPack,
        ops.ModulatedDeformRoIPoolPack: ModulatedDeformRoIPoolPack,
    }


def convert(model: nn.Module) -> list[str]:
    """Turn mmcv's `(Modulated)DeformConv2d`, `DeformRoIPool` and `...Pack` layers of a model into this package's.

    They change in place: parameters stay the same objects under the same names. Subclasses are left alone; `patch`
    reaches them.

    Returns:
        Names of the converted layers.

    Raises:
        ImportError: mmcv cannot be imported.

    Warns:
        UserWarning: the model has no such layers, or also layers of subclasses.
    """
    return convert_layers(model, "mmcv.ops", _replacement_classes())


def revert(model: nn.Module) -> list[str]:
    """Undo `convert`; return the names of the layers that are mmcv's again."""
    return revert_layers(model, _replacement_classes())

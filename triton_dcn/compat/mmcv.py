"""Drop-in replacements for mmcv's deformable operators, in mmcv, MMDetection and all that builds on them.

    from triton_dcn.compat import mmcv as compat

    compat.patch()                # every call from now on; `.undo()`, or `with compat.patch(): ...`
    compat.convert(model)         # the layers of one model; `compat.revert(model)`

Results and gradients agree. Any batch size works, whatever `im2col_step`. Deformable RoI pooling also works on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from triton_dcn.compat.swap import Patch, Replacement, convert_layers, import_library, revert_layers
from triton_dcn.functional import deform_conv2d
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
    return deform_conv2d_v2(input, offset, None, weight, None, stride, padding, dilation, groups, deform_groups)


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
        input, offset, mask, weight, bias, stride, padding, dilation: as in `triton_dcn.deform_conv2d`.
        groups, deform_groups: as they follow from the shapes.

    Raises:
        ValueError: shapes or groups disagree.
    """
    taps = weight.shape[2] * weight.shape[3]
    _check_groups("groups", groups, input.shape[1] / weight.shape[1])
    _check_groups("deform_groups", deform_groups, offset.shape[1] / (2 * taps))

    input = input.to(offset.dtype)
    weight = weight.to(offset.dtype)
    mask = None if mask is None else mask.to(offset.dtype)
    bias = None if bias is None else bias.to(offset.dtype)
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


def _check_groups(name: str, groups: int, groups_by_shapes: float) -> None:
    if groups != groups_by_shapes:
        raise ValueError(f"{name}: expected {groups_by_shapes:g} by the shapes, got {groups}")


FUNCTIONS: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("deform_conv", "deform_conv2d"): deform_conv2d_v1,
    ("modulated_deform_conv", "modulated_deform_conv2d"): deform_conv2d_v2,
    ("deform_roi_pool", "deform_roi_pool"): deform_roi_pool,
}
"""By module of mmcv.ops and name in it; mmcv.ops has the same names."""


def patch() -> Patch:
    """Replace `mmcv.ops.deform_conv2d`, `modulated_deform_conv2d` and `deform_roi_pool`, which mmcv's layers call.

    Code that imported one of the functions by name before keeps the original.

    Returns:
        A handle with `undo()`, also a context manager.

    Raises:
        ImportError: mmcv cannot be imported.
    """
    ops = import_library("mmcv.ops")
    replacements: list[Replacement] = []
    for (module_name, name), function in FUNCTIONS.items():
        module = import_library(f"mmcv.ops.{module_name}")
        replacements.append((ops, name, function))
        replacements.append((module, name, function))
    return Patch(replacements)


def _replacement_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Return mmcv's class -> ours."""
    ops = import_library("mmcv.ops")
    return {
        ops.DeformConv2d: DeformConv2d,
        ops.DeformConv2dPack: DeformConv2dPack,
        ops.ModulatedDeformConv2d: DeformConv2d,
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
    """
    return convert_layers(model, _replacement_classes())


def revert(model: nn.Module) -> list[str]:
    """Undo `convert`; return the names of the layers that are mmcv's again."""
    return revert_layers(model, _replacement_classes())

"""In the place of mmcv's deformable convolutions, in mmcv, MMDetection and everything else that builds on them.

    from triton_dcn.compat import mmcv as compat

    compat.patch()                # every call from now on; `.undo()`, or `with compat.patch(): ...`
    compat.convert(model)         # the layers of one model; `compat.revert(model)`

Results and gradients agree. Any batch size works, whatever `im2col_step`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from triton_dcn.compat.swap import Patch, convert_layers, import_library, revert_layers
from triton_dcn.functional import deform_conv2d
from triton_dcn.nn import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack

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
        groups, deform_groups: must agree with the shapes.
        bias: must be False, as in mmcv.
        im2col_step: without meaning here.

    Raises:
        ValueError: shapes or groups disagree, or `bias` is not False.
    """
    if bias is not False:
        raise ValueError(f"bias: expected False, found {bias!r}")
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
        groups, deform_groups: must agree with the shapes.

    Raises:
        ValueError: shapes or groups disagree.
    """
    taps = weight.shape[2] * weight.shape[3]
    for name, value, expected in (
        ("groups", groups, input.shape[1] / weight.shape[1]),
        ("deform_groups", deform_groups, offset.shape[1] / (2 * taps)),
    ):
        if value != expected:
            raise ValueError(f"{name}: expected {expected:g} by the shapes, found {value}")
    input, weight = input.to(offset.dtype), weight.to(offset.dtype)
    mask, bias = (None if tensor is None else tensor.to(offset.dtype) for tensor in (mask, bias))
    return deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)


FUNCTIONS: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("deform_conv", "deform_conv2d"): deform_conv2d_v1,
    ("modulated_deform_conv", "modulated_deform_conv2d"): deform_conv2d_v2,
}


def patch() -> Patch:
    """Replace `mmcv.ops.deform_conv2d` and `modulated_deform_conv2d`, and with them what all of mmcv's layers call.

    Code that imported one of the functions by name before keeps the original.

    Returns:
        A handle with `undo()`, also a context manager.

    Raises:
        ImportError: mmcv cannot be imported.
    """
    ops = import_library("mmcv.ops")
    return Patch(
        (module, name, function)
        for (file, name), function in FUNCTIONS.items()
        for module in (ops, import_library(f"mmcv.ops.{file}"))
    )


def _classes() -> dict[type[nn.Module], type[nn.Module]]:
    ops = import_library("mmcv.ops")
    return {
        ops.DeformConv2d: DeformConv2d,
        ops.DeformConv2dPack: DeformConv2dPack,
        ops.ModulatedDeformConv2d: DeformConv2d,
        ops.ModulatedDeformConv2dPack: ModulatedDeformConv2dPack,
    }


def convert(model: nn.Module) -> list[str]:
    """Turn mmcv's `(Modulated)DeformConv2d` and `...Pack` layers of a model into this package's, in place.

    Parameters stay the same objects under the same names. Subclasses are left alone; `patch` reaches them.

    Returns:
        Names of the converted layers.

    Raises:
        ImportError: mmcv cannot be imported.
    """
    return convert_layers(model, _classes())


def revert(model: nn.Module) -> list[str]:
    """Undo `convert`; return the names of the layers that are mmcv's again."""
    return revert_layers(model, _classes())

"""Drop-in replacement for torchvision's deformable convolution.

    from triton_dcn.compat import torchvision as compat

    compat.patch()                # every call from now on; `.undo()`, or `with compat.patch(): ...`
    compat.convert(model)         # the layers of one model; `compat.revert(model)`

Outputs and gradients agree except for one rule: where a sample lies exactly at -1 in y or x, torchvision gives the
offset the derivative from inside the image, while this package and mmcv give it 0; the sample is 0 in all of them. With
offsets of zero and a padding of 1, as at the start of training, all outputs at the top and left border have such
samples. Under autocast torchvision computes in float32, this package in the autocast dtype. Errors are ValueError and
TypeError instead of RuntimeError.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from triton_dcn.compat.shapes import check_groups
from triton_dcn.compat.swap import Patch, Replacement, convert_layers, import_library, revert_layers
from triton_dcn.functional import deform_conv2d, untraced
from triton_dcn.nn import DeformConv2d
from triton_dcn.operator import LIBRARY


def torchvision_deform_conv2d(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Tensor:
    """Convolve as the operator `torch.ops.torchvision.deform_conv2d` does, which some models call directly.

    This is an operator itself, `torch.ops.triton_dcn.torchvision_deform_conv2d`, so that what PyTorch does with
    operators works with it, too. It is composed of `triton_dcn.deform_conv2d`.

    Args:
        input, weight, offset, mask, bias: as in `triton_dcn.deform_conv2d`.
        stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w: its pairs, one by one.
        groups, offset_groups: as they follow from the shapes.
        use_mask: whether `mask` counts.

    Raises:
        ValueError: shapes or groups disagree.
    """
    untraced(check_groups, input, offset, weight, groups, offset_groups, "offset_groups")
    stride, padding, dilation = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w)
    return deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask if use_mask else None)


OPERATOR = torchvision_deform_conv2d.__name__
LIBRARY.define(OPERATOR + torch.library.infer_schema(torchvision_deform_conv2d, mutates_args=()))
LIBRARY.impl(OPERATOR, torchvision_deform_conv2d, "CompositeImplicitAutograd")


def patch() -> Patch:
    """Replace torchvision's `deform_conv2d` in all modules that have it, and the operator that it calls.

    With the function every `torchvision.ops.DeformConv2d` is replaced; with the operator, which is
    `torch.ops.torchvision.deform_conv2d`, also the function where something else than a module holds it.

    Returns:
        A handle with `undo()`, also a context manager; it tells the places, see `swap.Patch`.

    Raises:
        ImportError: torchvision cannot be imported.
    """
    import_library("torchvision.ops")
    module = import_library("torchvision.ops.deform_conv")
    replacements: list[Replacement] = [(module, "deform_conv2d", deform_conv2d)]
    if hasattr(torch.ops.torchvision, "deform_conv2d"):  # not where torchvision's compiled part did not load
        _look_up(torch.ops.torchvision.deform_conv2d)
        replacements.append((torch.ops.torchvision, "deform_conv2d", torch.ops.triton_dcn.torchvision_deform_conv2d))
    return Patch(replacements)


class _ReturnInput(TorchDispatchMode):
    """Takes every call of an operator, and returns its first argument."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0]


def _look_up(operator: Any) -> None:
    """Let PyTorch find the operator by its name, and remember it, before the name means another.

    PyTorch does so when an operator first comes to code in Python that takes the place of kernels, as in torch.compile.
    With ours for the name, such a call of the original, which a class may hold, would crash there, also after `undo`.
    """
    numbers = (1, 1, 0, 0, 1, 1, 1, 1, False)
    shapes = ((1, 1, 1, 1), (1, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 1), (1,))
    tensors = [torch.zeros(shape, device="cpu") for shape in shapes]
    with torch.no_grad(), _ReturnInput():  # type: ignore[no-untyped-call]
        operator(*tensors, *numbers)


def convert(model: nn.Module) -> list[str]:
    """Turn every `torchvision.ops.DeformConv2d` of a model into a `triton_dcn.DeformConv2d`, in place.

    Parameters stay the same objects under the same names. Subclasses are left alone; `patch` reaches them.

    Returns:
        Names of the converted layers.

    Raises:
        ImportError: torchvision cannot be imported.

    Warns:
        UserWarning: the model has no such layers, or also layers of subclasses.
    """
    ops = import_library("torchvision.ops")
    return convert_layers(model, "torchvision.ops", {ops.DeformConv2d: DeformConv2d})


def revert(model: nn.Module) -> list[str]:
    """Undo `convert`; return the names of the layers that are torchvision's again."""
    ops = import_library("torchvision.ops")
    return revert_layers(model, [ops.DeformConv2d])

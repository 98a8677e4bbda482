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

from torch import nn

from triton_dcn.compat.swap import Patch, convert_layers, import_library, revert_layers
from triton_dcn.functional import deform_conv2d
from triton_dcn.nn import DeformConv2d


def patch() -> Patch:
    """Replace `torchvision.ops.deform_conv2d`, and with it what every `torchvision.ops.DeformConv2d` calls.

    Code that ran `from torchvision.ops import deform_conv2d` before keeps the original function.

    Returns:
        A handle with `undo()`, also a context manager.

    Raises:
        ImportError: torchvision cannot be imported.
    """
    modules = [import_library("torchvision.ops"), import_library("torchvision.ops.deform_conv")]
    return Patch([(module, "deform_conv2d", deform_conv2d) for module in modules])


def convert(model: nn.Module) -> list[str]:
    """Turn every `torchvision.ops.DeformConv2d` of a model into a `triton_dcn.DeformConv2d`, in place.

    Parameters stay the same objects under the same names. Subclasses are left alone; `patch` reaches them.

    Returns:
        Names of the converted layers.

    Raises:
        ImportError: torchvision cannot be imported.
    """
    ops = import_library("torchvision.ops")
    return convert_layers(model, {ops.DeformConv2d: DeformConv2d})


def revert(model: nn.Module) -> list[str]:
    """Undo `convert`; return the names of the layers that are torchvision's again."""
    ops = import_library("torchvision.ops")
    return revert_layers(model, [ops.DeformConv2d])

"""Layers: `DeformConv2d` is given its offsets, the two packs predict them; and `fuse_batch_norm` for inference.

Receives a feature map, and for `DeformConv2d` its offsets. Hands both and the parameters of the layer to `functional`.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from triton_dcn.functional import convolve, pair
from triton_dcn.geometry import check_minimum


class DeformConv2d(nn.Module):
    """Deformable convolution whose offset (and mask) is given at each call.

    Args:
        in_channels, out_channels: C and O; both divisible by `groups`.
        kernel_size, stride, padding, dilation: int or (y, x).
        groups: channel groups of the contraction.
        bias: whether to learn a bias.

    Shape:
        input (B, C, H, W), offset (B, 2*D*K, Ho, Wo), mask (B, D*K, Ho, Wo) or None -> (B, O, Ho, Wo).

    Raises:
        ValueError: channels and groups do not fit.

    Source:
        The interface of torchvision.ops.DeformConv2d; initialized like torch.nn.Conv2d.
    """

    relu = False  # set by `fuse_batch_norm`

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        _check_channels(in_channels, out_channels, groups)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.groups = groups
        self.kernel_size = _checked_pair("kernel_size", kernel_size)
        self.stride = _checked_pair("stride", stride)
        self.padding = _checked_pair("padding", padding, minimum=0)
        self.dilation = _checked_pair("dilation", dilation)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as torch.nn.Conv2d does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, O, Ho, Wo); see `triton_dcn.deform_conv2d`.

        Raises:
            ValueError: as there, or `input` has another number of channels than `in_channels`.
        """
        return convolve(
            input,
            offset,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            mask,
            in_channels=self.in_channels,
            relu=self.relu,
        )

    def extra_repr(self) -> str:
        """Describe the layer as torch.nn.Conv2d does."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
            f"{', relu=True' if self.relu else ''}"
        )


class DeformConv2dPack(nn.Module):
    """Deformable convolution v1 that predicts its own offsets from its input.

    Parameters are mmcv's: `weight`, `bias`, `conv_offset.weight`, `conv_offset.bias`. `conv_offset` starts at zero, so
    that the layer starts as a plain convolution (version 2: half of one, because sigmoid(0) is 0.5).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in `DeformConv2d`.
        deform_groups: groups D of input channels that share offsets.
        bias: whether to learn a bias; None: as in mmcv, where version 2 has one and version 1 has none.

    Shape:
        (B, C, H, W) -> (B, O, Ho, Wo).

    Raises:
        ValueError: channels do not divide into the groups.

    Source:
        mmcv.ops.DeformConv2dPack; Dai et al., Deformable Convolutional Networks, ICCV 2017.
    """

    mask_logits = False
    bias_by_default = False
    relu = False  # set by `fuse_batch_norm`

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | None = None,
    ):
        super().__init__()
        _check_channels(in_channels, out_channels, groups)
        if deform_groups < 1 or in_channels % deform_groups:
            raise ValueError(f"in_channels: expected a multiple of deform_groups = {deform_groups}, got {in_channels}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.groups = groups
        self.deform_groups = deform_groups
        self.kernel_size = _checked_pair("kernel_size", kernel_size)
        self.stride = _checked_pair("stride", stride)
        self.padding = _checked_pair("padding", padding, minimum=0)
        self.dilation = _checked_pair("dilation", dilation)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        has_bias = self.bias_by_default if bias is None else bias
        self.bias = nn.Parameter(torch.empty(out_channels)) if has_bias else None

        taps = self.kernel_size[0] * self.kernel_size[1]
        channels_per_tap = 3 if self.mask_logits else 2  # dy, dx and the logit of the mask
        self.conv_offset = nn.Conv2d(
            in_channels,
            channels_per_tap * deform_groups * taps,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw `weight` and set everything else to zero, as mmcv does."""
        self.draw_weight()
        for parameter in (self.bias, self.conv_offset.weight, self.conv_offset.bias):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def draw_weight(self) -> None:
        """Draw `weight` from U(+-sqrt(6*G/(C*K))), as mmcv does."""
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, input: Tensor) -> Tensor:
        """Predict the offsets, and the masks of version 2, and convolve with them."""
        return convolve(
            input,
            self.conv_offset(input),
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            mask=None,
            mask_logits=self.mask_logits,
            relu=self.relu,
        )

    def extra_repr(self) -> str:
        """Describe the layer as torch.nn.Conv2d does."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"deform_groups={self.deform_groups}, bias={self.bias is not None}"
            f"{', relu=True' if self.relu else ''}"
        )


class ModulatedDeformConv2dPack(DeformConv2dPack):
    """Deformable convolution v2 that predicts its own offsets and masks from its input.

    `conv_offset` gives 3*D*K channels: the first two thirds are the offsets, the sigmoid of the last third the mask.
    Arguments and parameters as in `DeformConv2dPack`.

    Source:
        mmcv.ops.ModulatedDeformConv2dPack; Zhu et al., Deformable ConvNets v2, CVPR 2019.
    """

    mask_logits = True
    bias_by_default = True

    def draw_weight(self) -> None:
        """Draw `weight` from U(+-1/sqrt(C*K)), as mmcv does."""
        bound = 1 / math.sqrt(self.in_channels * self.kernel_size[0] * self.kernel_size[1])
        nn.init.uniform_(self.weight, -bound, bound)


def fuse_batch_norm(
    layer: DeformConv2d | DeformConv2dPack, norm: nn.BatchNorm2d | nn.SyncBatchNorm, relu: bool = False
) -> DeformConv2d | DeformConv2dPack:
    """Return a copy of `layer` that computes `norm(layer(...))`, for inference.

    The normalization is an affine map of each output channel, which goes into `weight` and `bias`; offsets and masks
    are predicted as before. Parametrizations of the two (`torch.nn.utils.parametrizations.weight_norm`, for example)
    are left out of the copy, which has their values.

    Args:
        layer: a `DeformConv2d` or one of the packs, any floating dtype; the copy keeps the dtype.
        norm: in evaluation mode, with running statistics, for the output channels of `layer`.
        relu: negative outputs become 0, before the kernel writes them.

    Raises:
        TypeError: `layer` or `norm` is another module.
        ValueError: `norm` is in training mode, keeps no statistics, or is for another number of channels; or `layer`
            has a ReLU already, or a weight that a hook of torch.nn.utils.weight_norm or spectral_norm computes.

    Source:
        Jacob et al., Quantization and Training of Neural Networks, CVPR 2018, section 3.2; interface of
        torch.nn.utils.fusion.fuse_conv_bn_eval.
    """
    if not isinstance(layer, (DeformConv2d, DeformConv2dPack)):
        raise TypeError(f"layer: expected a DeformConv2d or a pack, got {type(layer).__name__}")
    if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        raise TypeError(f"norm: expected a BatchNorm2d, got {type(norm).__name__}")
    if layer.relu:
        raise ValueError("layer: expected one without relu, got one that is fused already")
    if "weight" not in layer._parameters and not parametrize.is_parametrized(layer, "weight"):
        raise ValueError(
            "layer: expected a weight that is a parameter, got one that a hook computes; call "
            "torch.nn.utils.remove_weight_norm or remove_spectral_norm first"
        )
    if norm.training or norm.running_mean is None or norm.running_var is None:
        state = "training mode" if norm.training else "no running statistics"
        raise ValueError(f"norm: expected evaluation mode and running statistics, got {state}; call norm.eval() first")
    if norm.num_features != layer.out_channels:
        raise ValueError(
            f"norm: expected {layer.out_channels} channels like the output of the layer, got {norm.num_features}"
        )

    dtype = torch.promote_types(layer.weight.dtype, torch.float32)  # of the computation below
    scale = (norm.running_var.to(dtype) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().to(dtype)
    shift = -norm.running_mean.to(dtype) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().to(dtype)
    if layer.bias is not None:
        shift = shift + layer.bias.detach().to(dtype) * scale
    weight = layer.weight.detach().to(dtype) * scale[:, None, None, None]

    fused = copy.deepcopy(layer)
    if parametrize.is_parametrized(fused):
        # not remove_parametrizations, which changes the class: the copy has that of the layer
        fused.__class__ = parametrize.type_before_parametrizations(fused)
        del fused.parametrizations
    fused.relu = relu
    requires_grad = layer.weight.requires_grad
    fused.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad)
    fused.bias = nn.Parameter(shift.to(layer.weight.dtype), requires_grad)
    return fused


def _check_channels(in_channels: int, out_channels: int, groups: int) -> None:
    """Raise ValueError unless both are positive and divisible by `groups`."""
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels < 1 or groups < 1 or channels % groups:
            raise ValueError(f"{name}: expected a positive multiple of groups = {groups}, got {channels}")


def _checked_pair(name: str, value: int | tuple[int, int], minimum: int = 1) -> tuple[int, int]:
    """Return (y, x) of an argument.

    Raises:
        ValueError: it is not an int or a pair of ints, or below `minimum`.
    """
    values = pair(name, value)
    check_minimum(name, values, minimum)
    return values

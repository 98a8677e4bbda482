"""The interface of the DCNv2 extension, for CenterNet, FairMOT, YOLACT++ and others that were written with it.

    from triton_dcn.compat.dcnv2 import DCN          # was: from .DCNv2.dcn_v2 import DCN

Or, with the model's code as it is, before it is imported:

    import sys
    from triton_dcn.compat import dcnv2

    sys.modules["dcn_v2"] = dcnv2                    # for `from dcn_v2 import DCN`

Checkpoints are the same in both directions: `weight`, `bias`, `conv_offset_mask.weight`, `conv_offset_mask.bias`. `DCN`
also loads those of `triton_dcn.ModulatedDeformConv2dPack` and mmcv, which say `conv_offset` for it.

`DCNv2Pooling` and `DCNPooling` are missing: `triton_dcn.DeformRoIPool` in their place would not compute what their
checkpoints were trained for. They round the corners of boxes to whole pixels, take samples from the upper left ends of
the parts of a bin, and leave those outside the map out of the mean. The networks above do not use them.

Source:
    dcn_v2.py of github.com/CharlesShang/DCNv2; that of lbin/DCNv2 and those inside CenterNet and YOLACT++ do the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from triton_dcn.compat.mmcv import ModulatedDeformConv2d, Pair, deform_conv2d_v2
from triton_dcn.functional import convolve


def dcn_v2_conv(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    deformable_groups: int,
) -> Tensor:
    """Convolve with given offsets and masks.

    Args:
        input, offset, mask, weight, bias, stride, padding, dilation: as in `triton_dcn.deform_conv2d`; offset and mask
            may be larger than the output, see `shapes.read_map`.
        deformable_groups: D, as it follows from the shapes.

    Raises:
        ValueError: shapes or groups disagree.
    """
    return deform_conv2d_v2(input, offset, mask, weight, bias, stride, padding, dilation, 1, deformable_groups)


class DCNv2(ModulatedDeformConv2d):
    """Deformable convolution v2 that is given its offsets and masks.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation: as in `triton_dcn.DeformConv2d`, but stride
            and padding have no defaults.
        deformable_groups: groups D of input channels that share offsets.

    Shape:
        input (B, C, H, W), offset (B, 2*D*K, Ho, Wo), mask (B, D*K, Ho, Wo) -> (B, O, Ho, Wo).

    Raises:
        ValueError: channels do not divide into the groups.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair = 1,
        deformable_groups: int = 1,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, deform_groups=deformable_groups
        )

    @property
    def deformable_groups(self) -> int:
        """Groups D of input channels that share offsets."""
        return self.deform_groups


class DCN(DCNv2):
    """Deformable convolution v2 that predicts its own offsets and masks.

    `conv_offset_mask` gives 3*D*K channels: the first two thirds are the offsets, the sigmoid of the last third the
    mask. It starts at zero, so that the layer starts as half of a plain convolution.

    As in the extension, `conv_offset_mask` has no dilation. Where the layer has one, its map is larger than the output,
    and read from the start of each image; so do the extension's forward pass on a CPU and its backward pass. Its
    forward pass on a GPU does so for one image, and takes the offsets of further images from wrong places.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, deformable_groups: as in `DCNv2`.

    Shape:
        (B, C, H, W) -> (B, O, Ho, Wo).

    Raises:
        ValueError: channels do not divide into the groups.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair = 1,
        deformable_groups: int = 1,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, deformable_groups)
        channels = 3 * deformable_groups * self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset_mask = nn.Conv2d(in_channels, channels, self.kernel_size, self.stride, self.padding)
        self.init_offset()

    def init_offset(self) -> None:
        """Set `conv_offset_mask` to zero."""
        nn.init.zeros_(self.conv_offset_mask.weight)
        assert self.conv_offset_mask.bias is not None
        nn.init.zeros_(self.conv_offset_mask.bias)

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]  # as the extension's DCN does to its DCNv2
        """Predict offsets and masks, and convolve with them."""
        predicted = self.conv_offset_mask(input)
        if self.dilation == (1, 1):  # it has the size of the output
            return convolve(
                input,
                predicted,
                self.weight,
                self.bias,
                self.stride,
                self.padding,
                self.dilation,
                mask=None,
                mask_logits=True,
                relu=self.relu,
            )
        offset_channels = 2 * self.deform_groups * self.kernel_size[0] * self.kernel_size[1]
        offset, mask_logits = predicted[:, :offset_channels], predicted[:, offset_channels:]
        return super().forward(input, offset, mask_logits.sigmoid())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Take `conv_offset` for `conv_offset_mask` where that is missing."""
        for name in ("weight", "bias"):
            own_name = f"{prefix}conv_offset_mask.{name}"
            mmcv_name = f"{prefix}conv_offset.{name}"
            if mmcv_name in state_dict and own_name not in state_dict:
                state_dict[own_name] = state_dict.pop(mmcv_name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

"""The backbone: ResNet with deformable convolutions in chosen stages.

The modules have the names of MMDetection and, except `conv_offset`, of torchvision: weights of both load unchanged.
With group normalization they are still called `bn1`, `bn2`, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from triton_dcn.nn import DeformConv2dPack, ModulatedDeformConv2dPack

Norm = nn.BatchNorm2d | nn.GroupNorm

GROUP_CHANNELS = 16  # channels per group of a group normalization: Wu and He, ECCV 2018, table 3
RESNET_WIDTH = 64  # `width_per_group` of a ResNet: its bottlenecks have the width of the stage


@dataclass(frozen=True)
class Conv3x3:
    """The last 3x3 convolution of every block of a stage.

    Attributes:
        width: its channels, in and out.
        groups: groups of channels.
        dcn: None, "v1" or "v2".
        deform_groups: groups of channels that share offsets.
    """

    width: int
    groups: int
    dcn: str | None
    deform_groups: int

    def make(self, stride: int) -> nn.Module:
        """Build the layer."""
        if self.dcn is None:
            return nn.Conv2d(
                self.width,
                self.width,
                3,
                stride=stride,
                padding=1,
                groups=self.groups,
                bias=False,
            )
        return _DEFORMABLE[self.dcn](
            self.width,
            self.width,
            3,
            stride=stride,
            padding=1,
            groups=self.groups,
            deform_groups=self.deform_groups,
            bias=False,
        )


class ResNet(nn.Module):
    """Image to the feature maps C2 to C5, of strides 4, 8, 16 and 32; with `groups` a ResNeXt.

    The deformable layers take the place of the 3x3 `conv2` of every block of a stage: they predict their own offsets
    (and, in version 2, masks), starting from a regular grid.

    Args:
        depth: 18 (basic blocks), 50 or 101 (bottlenecks).
        dcn: None, "v1" (offsets) or "v2" (offsets and masks).
        dcn_stages: for each of the four stages, whether it is deformable; not used if `dcn` is None.
        deform_groups: groups of input channels that share offsets.
        frozen_stages: -1 trains everything, 0 freezes the stem, n freezes the stem and the first n stages.
        norm: "bn" (batch), "gn" (groups of 16 channels, for training from scratch with few images a step) or "syncbn",
            which is built as "bn"; training on several GPUs replaces it by one with the statistics of all of them.
        norm_eval: batch normalization uses its running statistics in training too; its scale and shift still train.
        base_channels: width of the stem and of the blocks of C2, which doubles with every stage; a multiple of 16.
        groups: groups of channels of the 3x3 convolutions; 1 for basic blocks.
        width_per_group: a bottleneck's 3x3 convolution has `groups * width_per_group / 64` times the block's width.

    Attributes:
        out_channels: channels of C2 to C5.

    Raises:
        ValueError: an argument is not one of the above.

    Source:
        He et al., Deep residual learning, CVPR 2016; the variant with the stride in the 3x3 convolution. Zhu et al.,
        Deformable ConvNets v2, CVPR 2019. Xie et al., Aggregated residual transformations, CVPR 2017 (ResNeXt).
        Initial values: mmdet 3.3.0 `ResNet`.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        depth: int = 50,
        dcn: str | None = None,
        dcn_stages: Sequence[bool] = (False, True, True, True),
        deform_groups: int = 1,
        frozen_stages: int = 1,
        norm: str = "bn",
        norm_eval: bool = True,
        base_channels: int = 64,
        groups: int = 1,
        width_per_group: int = 64,
    ) -> None:
        super().__init__()
        _check_choices(depth, dcn, frozen_stages, norm)
        _check_sizes(dcn_stages, base_channels)
        _check_groups(depth, norm, base_channels, groups, width_per_group)
        block, num_blocks = _LAYOUTS[depth]
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.out_channels = [(base_channels << stage) * block.expansion for stage in range(4)]

        self.conv1 = nn.Conv2d(3, base_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = _make_norm(norm, base_channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels = base_channels
        for stage in range(4):
            planes = base_channels << stage
            conv3x3 = Conv3x3(
                width=planes * width_per_group // RESNET_WIDTH * groups,
                groups=groups,
                dcn=dcn if dcn_stages[stage] else None,
                deform_groups=deform_groups,
            )
            blocks = []
            for index in range(num_blocks[stage]):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(in_channels, planes, stride, norm, conv3x3))
                in_channels = self.out_channels[stage]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

        self.reset_parameters()
        for module in self._frozen():
            module.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Draw initial weights for training without a checkpoint; every residual branch starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                module.reset_parameters()

        # In a second loop, because the convolutions that predict offsets are `nn.Conv2d` too.
        for module in self.modules():
            if isinstance(module, DeformConv2dPack | ModulatedDeformConv2dPack):
                module.reset_parameters()
            elif isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(module.last_norm.weight)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the features of normalized images.

        Args:
            images: (B, 3, H, W), floating point.

        Returns:
            [C2, C3, C4, C5], each (B, `out_channels[i]`, ceil(H / 2^(i+2)), ceil(W / 2^(i+2))).
        """
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.maxpool(x)
        features = []
        for stage in self._stages():
            x = stage(x)
            features.append(x)
        return features

    def train(self, mode: bool = True) -> ResNet:
        """Switch the mode; frozen stages, and with `norm_eval` every batch norm, stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def _stages(self) -> list[nn.Sequential]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.conv1, self.bn1, *self._stages()[: self.frozen_stages]]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the second is the deformable one."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        norm: str,
        conv3x3: Conv3x3,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = _make_norm(norm, planes)
        self.conv2 = conv3x3.make(stride=1)
        self.bn2 = _make_norm(norm, planes)
        self.downsample = _shortcut(in_channels, planes, stride, norm)

    @property
    def last_norm(self) -> Norm:
        """The norm before the sum; with scale 0 the block passes its input through."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, planes, ceil(H / stride), ceil(W / stride))."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        out += shortcut
        return F.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; stride and deformation sit in the 3x3."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        norm: str,
        conv3x3: Conv3x3,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, conv3x3.width, 1, bias=False)
        self.bn1 = _make_norm(norm, conv3x3.width)
        self.conv2 = conv3x3.make(stride)
        self.bn2 = _make_norm(norm, conv3x3.width)
        self.conv3 = nn.Conv2d(conv3x3.width, planes * self.expansion, 1, bias=False)
        self.bn3 = _make_norm(norm, planes * self.expansion)
        self.downsample = _shortcut(in_channels, planes * self.expansion, stride, norm)

    @property
    def last_norm(self) -> Norm:
        """The norm before the sum; with scale 0 the block passes its input through."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, 4 * planes, ceil(H / stride), ceil(W / stride))."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if not getattr(self.conv2, "relu", False):  # `fuse_batch_norms` can move the ReLU into the layer
            out = F.relu(out, inplace=True)
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        out += shortcut
        return F.relu(out, inplace=True)


_LAYOUTS: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}
"""Depth -> type and number of the blocks of each stage."""

_DEFORMABLE = {"v1": DeformConv2dPack, "v2": ModulatedDeformConv2dPack}


def _make_norm(norm: str, channels: int) -> Norm:
    if norm == "gn":
        return nn.GroupNorm(channels // GROUP_CHANNELS, channels)
    return nn.BatchNorm2d(channels)


def _shortcut(in_channels: int, out_channels: int, stride: int, norm: str) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
    return nn.Sequential(conv, _make_norm(norm, out_channels))


def _check_choices(depth: int, dcn: str | None, frozen_stages: int, norm: str) -> None:
    """Raise ValueError if an argument of `ResNet` is not among its choices."""
    choices: dict[str, tuple[object, tuple[object, ...]]] = {
        "depth": (depth, tuple(_LAYOUTS)),
        "dcn": (dcn, (None, *_DEFORMABLE)),
        "norm": (norm, ("bn", "gn", "syncbn")),
        "frozen_stages": (frozen_stages, (-1, 0, 1, 2, 3, 4)),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")


def _check_sizes(dcn_stages: Sequence[bool], base_channels: int) -> None:
    """Raise ValueError if there is not a flag for every stage, or the width does not divide into groups."""
    if len(dcn_stages) != 4:
        raise ValueError(f"dcn_stages: expected four flags, one per stage, got {tuple(dcn_stages)}")
    if base_channels < GROUP_CHANNELS or base_channels % GROUP_CHANNELS:
        raise ValueError(f"base_channels: expected a multiple of {GROUP_CHANNELS}, got {base_channels}")


def _check_groups(depth: int, norm: str, base_channels: int, groups: int, width_per_group: int) -> None:
    """Raise ValueError if the 3x3 convolutions cannot have these groups."""
    block, _ = _LAYOUTS[depth]
    if block is BasicBlock and (groups, width_per_group) != (1, RESNET_WIDTH):
        raise ValueError(
            f"groups: expected 1 with width_per_group {RESNET_WIDTH} for depth {depth}, whose blocks have no "
            f"bottleneck, got {groups} with {width_per_group}"
        )
    if groups < 1 or width_per_group < 1 or base_channels * width_per_group % RESNET_WIDTH:
        raise ValueError(
            f"width_per_group: expected a number whose product with base_channels {base_channels} divides by "
            f"{RESNET_WIDTH}, and groups from 1 on, got {width_per_group} and {groups}"
        )
    width = base_channels * width_per_group // RESNET_WIDTH * groups
    if norm == "gn" and width % GROUP_CHANNELS:
        raise ValueError(
            f"groups: expected groups * width_per_group * base_channels / {RESNET_WIDTH} to divide by "
            f"{GROUP_CHANNELS} with norm 'gn', got {width}"
        )

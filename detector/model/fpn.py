"""The feature pyramid: the backbone's four maps become five of equal width."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from detector.model.initialization import xavier_init


class FPN(nn.Module):
    """Pyramid P2, P3, ... from the maps C2, C3, ... of a backbone.

    Args:
        in_channels: channels of the backbone's maps, finest first.
        out_channels: channels of every level.
        num_outs: levels; those beyond `len(in_channels)` halve the last one by taking every second pixel.

    Raises:
        ValueError: `num_outs` is smaller than the number of inputs.

    Source:
        Lin et al., Feature pyramid networks, CVPR 2017; names and initial values of mmdet 3.3.0 `FPN`.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int = 256, num_outs: int = 5) -> None:
        super().__init__()
        if num_outs < len(in_channels):
            raise ValueError(f"num_outs: expected at least {len(in_channels)}, one per input, got {num_outs}")
        self.num_outs = num_outs
        self.lateral_convs = nn.ModuleList(_ConvModule(channels, out_channels, 1) for channels in in_channels)
        self.fpn_convs = nn.ModuleList(_ConvModule(out_channels, out_channels, 3) for _ in in_channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Merge maps from coarse to fine.

        Args:
            features: one (B, `in_channels[i]`, H_i, W_i) map per input, each about half the size of the one before.

        Returns:
            `num_outs` maps of `out_channels` channels: one of the size of each input, then the halved ones.
        """
        merged = [conv(feature) for conv, feature in zip(self.lateral_convs, features, strict=True)]
        for level in range(len(merged) - 2, -1, -1):
            fine = merged[level]
            fine += F.interpolate(merged[level + 1], size=fine.shape[-2:], mode="nearest")

        outputs = [conv(feature) for conv, feature in zip(self.fpn_convs, merged, strict=True)]
        while len(outputs) < self.num_outs:
            outputs.append(F.max_pool2d(outputs[-1], kernel_size=1, stride=2))
        return outputs


class _ConvModule(nn.Module):
    """Convolution with bias under the name `conv`, as in mmcv's `ConvModule`, Xavier uniform at the start."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        xavier_init(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.conv(x)
        return output

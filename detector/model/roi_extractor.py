"""Pools the pyramid in every region: RoIAlign, or deformable RoI pooling, whose bins move.

Letters: R regions, C channels, S bins per side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from detector.ops.roi_align import roi_align, roi_levels
from triton_dcn import DeformRoIPoolPack, ModulatedDeformRoIPoolPack

DEFORMABLE = {"dpool": DeformRoIPoolPack, "mdpool": ModulatedDeformRoIPoolPack}


class RoIExtractor(nn.Module):
    """Features of regions, each from the pyramid level that fits its size.

    With a deformable layer every level has one of its own. It predicts from the features of RoIAlign how far each bin
    moves, and with "mdpool" also a factor for each bin. All levels are pooled in one call.

    Args:
        strides: of the pyramid levels that are pooled from, finest first.
        output_size: bins per side, S.
        layer: "align", "dpool" or "mdpool".
        channels: of the pyramid, C; for the deformable layers only.
        fc_channels: width of the layers that predict the offsets.
        sampling_ratio: samples per bin and axis; 0 takes as many as a bin has cells.

    Source:
        MMDetection's SingleRoIExtractor with mmcv's RoIAlign, DeformRoIPoolPack or ModulatedDeformRoIPoolPack, whose
        parameter names and initial values it has.
    """

    def __init__(
        self,
        strides: Sequence[int],
        output_size: int,
        layer: str = "align",
        channels: int = 256,
        fc_channels: int = 1024,
        sampling_ratio: int = 0,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.output_size = output_size
        self.sampling_ratio = sampling_ratio
        self.is_deformable = layer in DEFORMABLE
        self.roi_layers = nn.ModuleList()
        if self.is_deformable:
            for stride in self.strides:
                self.roi_layers.append(
                    DEFORMABLE[layer](
                        output_size,
                        channels,
                        fc_channels,
                        spatial_scale=1 / stride,
                        sampling_ratio=sampling_ratio,
                    )
                )

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Pool the features.

        Args:
            features: (B, C, H, W) per level of `strides`; further levels are not used.
            rois: (R, 5), index of the image and box in pixels; index -1 gives 0.

        Returns:
            (R, C, S, S).
        """
        features = features[: len(self.strides)]
        levels = roi_levels(rois[:, 1:], len(self.strides))
        pool = partial(
            roi_align,
            features,
            rois,
            strides=self.strides,
            output_size=self.output_size,
            sampling_ratio=self.sampling_ratio,
        )
        aligned = pool(levels)
        if not self.is_deformable:
            return aligned

        levels = torch.where(rois[:, 0] >= 0, levels, -1)
        layers = [layer for layer in self.roi_layers if isinstance(layer, DeformRoIPoolPack)]
        offset = self._by_level([layer.predict_offset for layer in layers], aligned, levels)
        pooled = pool(levels, offset=offset, gamma=layers[0].gamma)
        modulated = [layer for layer in layers if isinstance(layer, ModulatedDeformRoIPoolPack)]
        if not modulated:
            return pooled
        return pooled * self._by_level([layer.predict_mask for layer in modulated], aligned, levels)

    def _by_level(self, layers: Sequence[Callable[[Tensor], Tensor]], aligned: Tensor, levels: Tensor) -> Tensor:
        """Give each region to the layer of its level; a layer without regions gets gradients of 0.

        Args:
            layers: one per level, (n, C, S, S) -> (n, k, S, S).
            aligned: (R, C, S, S).
            levels: (R,), -1 for regions that are padding.

        Returns:
            (R, k, S, S), 0 for padding.
        """
        if aligned.is_cuda or torch.compiler.is_compiling():
            # All regions go through all layers: to look how many a level has would make the host wait for the GPU.
            outputs = []
            for level, layer in enumerate(layers):
                of_level = (levels == level)[:, None, None, None]
                outputs.append(torch.where(of_level, layer(aligned), 0))
            return torch.stack(outputs).sum(0)

        indices = [(levels == level).nonzero()[:, 0] for level in range(len(layers))]
        outputs = [layer(aligned[index]) for index, layer in zip(indices, layers, strict=True)]
        by_level = torch.cat(outputs)
        return by_level.new_zeros(len(aligned), *by_level.shape[1:]).index_copy(0, torch.cat(indices), by_level)

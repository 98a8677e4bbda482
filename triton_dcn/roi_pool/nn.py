"""Layers of deformable RoI pooling: one that is given its offsets, and two that predict them.

Receives a feature map and rois. Hands both, and the offsets, to `roi_pool.functional`.

Letters: R rois, C channels, Ph Pw bins of a roi.
"""

from __future__ import annotations

from torch import Tensor, nn

from triton_dcn.functional import pair, untraced
from triton_dcn.geometry import check_minimum
from triton_dcn.roi_pool.functional import check_settings, deform_roi_pool


class DeformRoIPool(nn.Module):
    """Deformable RoI pooling whose offset is given at each call.

    Args:
        output_size: bins of a roi, int or (Ph, Pw).
        spatial_scale: cells of the feature map per pixel of the image.
        sampling_ratio: samples per bin and axis; 0 takes as many as the bin has cells, rounded up.
        gamma: what offsets are multiplied by, beside the size of the roi.

    Shape:
        input (B, C, H, W), rois (R, 5), offset (R, 2, Ph, Pw) or None -> (R, C, Ph, Pw).

    Raises:
        ValueError: `output_size` is not one or two positive integers, or another number is out of its range.

    Source:
        mmcv.ops.DeformRoIPool; Dai et al., Deformable Convolutional Networks, ICCV 2017, section 2.2.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
    ):
        super().__init__()
        self.output_size = pair("output_size", output_size)
        check_minimum("output_size", self.output_size, 1)
        check_settings(spatial_scale, sampling_ratio, gamma)
        self.spatial_scale = float(spatial_scale)
        self.sampling_ratio = int(sampling_ratio)
        self.gamma = float(gamma)

    def forward(self, input: Tensor, rois: Tensor, offset: Tensor | None = None) -> Tensor:
        """Return (R, C, Ph, Pw); see `triton_dcn.deform_roi_pool`."""
        return deform_roi_pool(
            input,
            rois,
            offset,
            output_size=self.output_size,
            spatial_scale=self.spatial_scale,
            sampling_ratio=self.sampling_ratio,
            gamma=self.gamma,
        )

    def extra_repr(self) -> str:
        """Describe the layer as torch.nn's do."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, gamma={self.gamma}"
        )


class DeformRoIPoolPack(DeformRoIPool):
    """Deformable RoI pooling that predicts its offsets from the rois' features, pooled without any.

    Parameters are mmcv's: `offset_fc.{0,2,4}.{weight,bias}`. The last layer starts at zero, so that the layer starts as
    RoIAlign.

    Args:
        output_size, spatial_scale, sampling_ratio, gamma: as in `DeformRoIPool`.
        output_channels: C.
        deform_fc_channels: width of the fully connected layers.

    Shape:
        input (B, C, H, W), rois (R, 5) -> (R, C, Ph, Pw).

    Raises:
        ValueError: a size is not positive.

    Source:
        mmcv.ops.DeformRoIPoolPack; Dai et al., Deformable Convolutional Networks, ICCV 2017, section 2.2.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
    ):
        super().__init__(output_size, spatial_scale, sampling_ratio, gamma)
        for name, channels in (("output_channels", output_channels), ("deform_fc_channels", deform_fc_channels)):
            if channels < 1:
                raise ValueError(f"{name}: expected at least 1, got {channels}")
        self.output_channels = output_channels
        self.deform_fc_channels = deform_fc_channels
        bins = self.output_size[0] * self.output_size[1]
        self.offset_fc = nn.Sequential(
            nn.Linear(output_channels * bins, deform_fc_channels),
            nn.ReLU(inplace=True),
            nn.Linear(deform_fc_channels, deform_fc_channels),
            nn.ReLU(inplace=True),
            nn.Linear(deform_fc_channels, 2 * bins),
        )
        _set_to_zero(self.offset_fc[4])

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:  # type: ignore[override]
        """Pool without an offset, predict the offsets, and pool with them.

        Raises:
            ValueError: as `triton_dcn.deform_roi_pool`, or `input` has another number of channels than
                `output_channels`.
        """
        self._check_channels(input)
        pooled = super().forward(input, rois)
        return super().forward(input, rois, self.predict_offset(pooled))

    def predict_offset(self, pooled: Tensor) -> Tensor:
        """Return the offsets (R, 2, Ph, Pw) for features (R, C, Ph, Pw) that were pooled without any.

        A detector that pools from all levels of a pyramid in one call has a layer for each level, and calls only this.
        """
        offset: Tensor = self.offset_fc(pooled.flatten(1))
        return offset.view(-1, 2, *self.output_size)

    def _check_channels(self, input: Tensor) -> None:
        if not isinstance(input, Tensor) or input.dim() != 4:
            return  # `deform_roi_pool` says what is wrong, or takes what stands for a tensor
        channels = untraced(input.size)[1]
        if channels != self.output_channels:
            raise ValueError(f"input: expected {self.output_channels} channels (output_channels), got {channels}")


class ModulatedDeformRoIPoolPack(DeformRoIPoolPack):
    """Deformable RoI pooling that predicts its offsets, and a factor for each bin.

    Parameters are those of `DeformRoIPoolPack` and `mask_fc.{0,2}.{weight,bias}`, whose last layer starts at zero, too:
    the layer starts as half of RoIAlign, because sigmoid(0) is 0.5. Arguments as there.

    Source:
        mmcv.ops.ModulatedDeformRoIPoolPack; Zhu et al., Deformable ConvNets v2, CVPR 2019, section 3.2.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
    ):
        super().__init__(output_size, output_channels, deform_fc_channels, spatial_scale, sampling_ratio, gamma)
        bins = self.output_size[0] * self.output_size[1]
        self.mask_fc = nn.Sequential(
            nn.Linear(output_channels * bins, deform_fc_channels),
            nn.ReLU(inplace=True),
            nn.Linear(deform_fc_channels, bins),
            nn.Sigmoid(),
        )
        _set_to_zero(self.mask_fc[2])

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:  # type: ignore[override]
        """Pool without an offset, predict offsets and masks, pool with the offsets and multiply by the masks.

        Raises:
            ValueError: as in `DeformRoIPoolPack`.
        """
        self._check_channels(input)
        pooled = DeformRoIPool.forward(self, input, rois)
        deformed = DeformRoIPool.forward(self, input, rois, self.predict_offset(pooled))
        return deformed * self.predict_mask(pooled)

    def predict_mask(self, pooled: Tensor) -> Tensor:
        """Return the factors (R, 1, Ph, Pw), between 0 and 1, for features (R, C, Ph, Pw) pooled without an offset."""
        mask: Tensor = self.mask_fc(pooled.flatten(1))
        return mask.view(-1, 1, *self.output_size)


def _set_to_zero(layer: nn.Module) -> None:
    """Set weight and bias to zero, as mmcv does with what predicts offsets and masks."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)

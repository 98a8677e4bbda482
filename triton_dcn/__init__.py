"""Deformable convolution and deformable RoI pooling, with Triton kernels, a fast CPU path and a plain reference."""

from triton_dcn.functional import HAS_TRITON, deform_conv2d
from triton_dcn.nn import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack, fuse_batch_norm
from triton_dcn.roi_pool.functional import deform_roi_pool
from triton_dcn.roi_pool.nn import DeformRoIPool, DeformRoIPoolPack, ModulatedDeformRoIPoolPack

if HAS_TRITON:  # without it, torch.utils.flop_counter logs a warning when it is imported
    from triton_dcn import flops  # noqa: F401  # registers the formulas

__version__ = "0.1.0"
__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "DeformRoIPool",
    "DeformRoIPoolPack",
    "ModulatedDeformConv2dPack",
    "ModulatedDeformRoIPoolPack",
    "deform_conv2d",
    "deform_roi_pool",
    "fuse_batch_norm",
]

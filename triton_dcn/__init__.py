"""Deformable convolution v1 and v2 as fused Triton kernels, with a fast CPU path and a plain reference."""

from triton_dcn.functional import deform_conv2d
from triton_dcn.nn import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack, fuse_batch_norm

__version__ = "0.1.0"
__all__ = ["DeformConv2d", "DeformConv2dPack", "ModulatedDeformConv2dPack", "deform_conv2d", "fuse_batch_norm"]

"""Deformable convolution v1 and v2 as fused Triton kernels, with a fast CPU path and a plain reference."""

from triton_dcn.functional import HAS_TRITON, deform_conv2d
from triton_dcn.nn import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack, fuse_batch_norm

if HAS_TRITON:  # without it, torch.utils.flop_counter logs a warning when it is imported
    from triton_dcn import flops  # noqa: F401  # registers the formulas

__version__ = "0.1.0"
__all__ = ["DeformConv2d", "DeformConv2dPack", "ModulatedDeformConv2dPack", "deform_conv2d", "fuse_batch_norm"]

"""Folds the batch norms of a detector into the convolutions before them, for inference."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from detector.model.faster_rcnn import FasterRCNN
from detector.model.resnet import Bottleneck
from triton_dcn import DeformConv2d, fuse_batch_norm
from triton_dcn.nn import DeformConv2dPack

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def fuse_batch_norms(model: FasterRCNN) -> FasterRCNN:
    """Return a copy of a detector without batch norms, which gives the same detections.

    The deformable layers of the copy also apply the ReLU after their norm. The parameters of the copy no longer have
    MMDetection's names: save the weights before.

    Args:
        model: in evaluation mode, of `FasterRCNNConfig.norm` "bn" or "syncbn", any floating dtype.

    Raises:
        ValueError: the model is in training mode, or has group norms, which depend on the input.
    """
    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode: call model.eval() first")
    if model.config.norm == "gn":
        raise ValueError("model: expected batch norms, which are fixed in evaluation, got group norms (norm 'gn')")
    model = copy.deepcopy(model)
    for module in list(model.backbone.modules()):
        if isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[1], BATCH_NORMS):
            _fuse_shortcut(module)
        _fuse_numbered_layers(module)
    return model


def _fuse_shortcut(shortcut: nn.Sequential) -> None:
    """Fuse the convolution and the norm of a residual block's shortcut, in place."""
    conv, norm = shortcut
    shortcut[0] = _fuse(conv, norm, relu=False)
    shortcut[1] = nn.Identity()


def _fuse_numbered_layers(module: nn.Module) -> None:
    """Fuse `conv1` and `bn1`, `conv2` and `bn2`, ... of a module, if it has them, in place."""
    for index in (1, 2, 3):
        norm = getattr(module, f"bn{index}", None)
        if norm is not None:
            conv = getattr(module, f"conv{index}")
            relu = isinstance(module, Bottleneck) and index == 2
            setattr(module, f"conv{index}", _fuse(conv, norm, relu))
            setattr(module, f"bn{index}", nn.Identity())


def _fuse(conv: nn.Module, norm: nn.Module, relu: bool) -> nn.Module:
    """Return a convolution with `norm` folded in; with `relu` a deformable one also applies the ReLU."""
    assert isinstance(norm, BATCH_NORMS)
    if isinstance(conv, nn.Conv2d):
        return fuse_conv_bn_eval(conv, norm)
    assert isinstance(conv, DeformConv2d | DeformConv2dPack)
    return fuse_batch_norm(conv, norm, relu=relu)

"""A detector for inference alone: its batch norms folded into the convolutions before them."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from detector.model.faster_rcnn import FasterRCNN
from detector.model.resnet import Bottleneck
from triton_dcn import fuse_batch_norm


def fuse_batch_norms(model: FasterRCNN) -> FasterRCNN:
    """Return a copy of a detector that finds the same, without batch norms.

    The deformable layers of the copy also take over the ReLU behind their norm. Its parameters no longer have
    MMDetection's names: save the weights before.

    Args:
        model: in evaluation mode, of `FasterRCNNConfig.norm` "bn" or "syncbn", any floating dtype.

    Raises:
        ValueError: the model is in training mode, or has group norms, which depend on the input.
    """
    if model.training:
        raise ValueError("model must be in evaluation mode: call model.eval() first")
    if model.config.norm == "gn":
        raise ValueError("model has group norms (norm 'gn'), expected batch norms: only those are fixed in evaluation")
    model = copy.deepcopy(model)
    for module in list(model.backbone.modules()):
        if isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[1], nn.BatchNorm2d):
            module[0], module[1] = _folded(module[0], module[1], False), nn.Identity()  # a shortcut
        for index in (1, 2, 3):
            norm = getattr(module, f"bn{index}", None)
            if norm is not None:
                relu = isinstance(module, Bottleneck) and index == 2
                setattr(module, f"conv{index}", _folded(getattr(module, f"conv{index}"), norm, relu))
                setattr(module, f"bn{index}", nn.Identity())
    return model


def _folded(conv: nn.Module, norm: nn.BatchNorm2d, relu: bool) -> nn.Module:
    if isinstance(conv, nn.Conv2d):
        return fuse_conv_bn_eval(conv, norm)
    return fuse_batch_norm(conv, norm, relu=relu)

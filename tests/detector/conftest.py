"""Fixtures of the detector's tests: the golden model's weights, input and feature maps."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from detector.model.fpn import FPN
from detector.model.resnet import ResNet
from tests.detector.golden_model import fill_model, padded_size

MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)


@pytest.fixture(scope="session")
def golden_images(golden):
    """The golden model's input: (2, 3, H, W) float64, normalized in float32 and padded with zeros."""
    arrays, parameters = golden("model")
    height, width = padded_size(parameters["spec"]["sizes"])
    batch = torch.zeros(2, 3, height, width, dtype=torch.float64)
    for i in range(2):
        rgb = arrays[f"img{i}.image_bgr"][..., ::-1]
        normalized = (rgb.astype(np.float32) - MEAN) / STD
        rows, columns, _ = normalized.shape
        batch[i, :, :rows, :columns] = torch.from_numpy(normalized.transpose(2, 0, 1).copy())
    return batch


class GoldenFeatures:
    """Feature maps of the golden weights in float64, computed once: in a training step or here, whatever is first."""

    def __init__(self, salt: str, images: torch.Tensor):
        self.salt = salt
        self.images = images
        self.maps = {}

    def keep(self, config: str, bottom_up: Sequence[torch.Tensor], pyramid: Sequence[torch.Tensor]) -> None:
        """Keep the maps of a whole model with the weights of `config`."""
        names = [f"C{level}" for level in range(2, 6)] + [f"P{level}" for level in range(2, 7)]
        maps = [feature.detach() for feature in (*bottom_up, *pyramid)]
        self.maps[config] = dict(zip(names, maps, strict=True))

    def __call__(self, config: str) -> dict[str, torch.Tensor]:
        """Return the maps "C2".."C5", "P2".."P6" of "dg1" or "dg4"."""
        if config not in self.maps:
            model = nn.Module()
            model.backbone = ResNet(50, dcn="v2", deform_groups=int(config[2:]))
            model.neck = FPN(model.backbone.out_channels)
            fill_model(model.double(), self.salt)
            with torch.no_grad():
                bottom_up = model.backbone.train()(self.images)
                self.keep(config, bottom_up, model.neck(bottom_up))
        return self.maps[config]


@pytest.fixture(scope="session")
def golden_features(golden, golden_images):
    return GoldenFeatures(golden("model")[1]["spec"]["salt"], golden_images)

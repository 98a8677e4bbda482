"""Fixtures of the detector's tests: the golden model's weights, input and feature maps."""

import numpy as np
import pytest
import torch

from detector.fpn import FPN
from detector.resnet import ResNet
from tests.golden.fill import fill

MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)


@pytest.fixture(scope="session")
def golden_images(golden):
    """The golden model's input: (2, 3, H, W) float64, normalised in float32 and padded with zeros."""
    arrays, parameters = golden("model")
    images = [(arrays[f"img{i}.image_bgr"][..., ::-1].astype(np.float32) - MEAN) / STD for i in (0, 1)]
    height, width = (-(-max(side) // 32) * 32 for side in zip(*parameters["spec"]["sizes"], strict=True))
    batch = torch.zeros(2, 3, height, width, dtype=torch.float64)
    for padded, image in zip(batch, images, strict=True):
        padded[:, : image.shape[0], : image.shape[1]] = torch.from_numpy(image.transpose(2, 0, 1).copy())
    return batch


@pytest.fixture(scope="session")
def golden_features(golden, golden_images):
    """Function: "dg1" or "dg4" -> feature maps "C2".."C5", "P2".."P6" of the golden weights, in float64."""
    salt = golden("model")[1]["spec"]["salt"]
    cache = {}

    def features(config: str) -> dict[str, torch.Tensor]:
        if config not in cache:
            backbone = ResNet(50, dcn="v2", deform_groups=int(config[2:])).double()
            neck = FPN(backbone.out_channels).double()
            for prefix, module in (("backbone", backbone), ("neck", neck)):
                filled = {name: fill(f"{prefix}.{name}", v.shape, salt) for name, v in module.state_dict().items()}
                module.load_state_dict({name: torch.from_numpy(value) for name, value in filled.items()})
            with torch.no_grad():
                bottom_up = backbone.train()(golden_images)
                pyramid = neck(bottom_up)
            names = [f"C{level}" for level in range(2, 6)] + [f"P{level}" for level in range(2, 7)]
            cache[config] = dict(zip(names, bottom_up + pyramid, strict=True))
        return cache[config]

    return features

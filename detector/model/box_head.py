"""The box head: pooled features of a region to class logits and a box, one per class or one for all."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from detector.model.initialization import normal_init, xavier_init

POOL_SIZE = 7  # side of the window pooled from the pyramid


class BoxHead(nn.Module):
    """Two shared fully connected layers, then class logits and boxes.

    Args:
        channels: of the pyramid.
        fc_channels: width of the shared layers.
        num_classes: without background, which is the last logit.
        class_agnostic: predict one box for all classes, as in a cascade, and not one for each.

    Source:
        MMDetection's Shared2FCBBoxHead, whose parameter names and initial values it has.
    """

    def __init__(self, channels: int, fc_channels: int, num_classes: int, class_agnostic: bool = False) -> None:
        super().__init__()
        fc1 = nn.Linear(channels * POOL_SIZE * POOL_SIZE, fc_channels)
        fc2 = nn.Linear(fc_channels, fc_channels)
        self.shared_fcs = nn.ModuleList([fc1, fc2])
        self.fc_cls = nn.Linear(fc_channels, num_classes + 1)
        self.num_boxes = 1 if class_agnostic else num_classes
        self.fc_reg = nn.Linear(fc_channels, self.num_boxes * 4)

        xavier_init(fc1)
        xavier_init(fc2)
        normal_init(self.fc_cls, std=0.01)
        normal_init(self.fc_reg, std=0.001)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Classify and refine regions.

        Args:
            pooled: (R, C, 7, 7).

        Returns:
            logits (R, classes + 1) and deltas (R, `num_boxes`, 4).
        """
        hidden = pooled.flatten(1)
        for layer in self.shared_fcs:
            hidden = F.relu(layer(hidden), inplace=True)
        logits = self.fc_cls(hidden)
        deltas = self.fc_reg(hidden)
        return logits, deltas.unflatten(1, (-1, 4))

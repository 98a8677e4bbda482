"""Faster R-CNN with deformable convolutions, numerically MMDetection's."""

from detector.faster_rcnn import FasterRCNN, FasterRCNNConfig
from detector.load import load
from detector.structures import Batch, Detections, Target

__all__ = ["Batch", "Detections", "FasterRCNN", "FasterRCNNConfig", "Target", "load"]

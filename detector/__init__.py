"""Faster R-CNN with deformable convolutions, numerically MMDetection's."""

from detector.model.faster_rcnn import FasterRCNN, FasterRCNNConfig
from detector.model.fuse import fuse_batch_norms
from detector.structures import Batch, Detections, Target
from detector.weights.load import load

__all__ = ["Batch", "Detections", "FasterRCNN", "FasterRCNNConfig", "Target", "fuse_batch_norms", "load"]

"""Faster R-CNN with deformable convolutions, numerically MMDetection's."""

from detector.faster_rcnn import FasterRCNN, FasterRCNNConfig
from detector.fuse import fuse_batch_norms
from detector.load import load
from detector.structures import Batch, Detections, Target

__all__ = ["Batch", "Detections", "FasterRCNN", "FasterRCNNConfig", "Target", "fuse_batch_norms", "load"]

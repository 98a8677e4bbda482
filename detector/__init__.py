"""Faster R-CNN with deformable convolutions, numerically MMDetection's."""

from detector.ctrl_c import quiet_imports

_imports_are_done = quiet_imports()

from triton_dcn.extras import require_extra

require_extra("detector")  # before the imports below stop at the first package that is missing

from detector.model.config import FasterRCNNConfig
from detector.model.faster_rcnn import FasterRCNN
from detector.model.fuse import fuse_batch_norms
from detector.results import ImageDetections
from detector.structures import Batch, Detections, Target
from detector.weights.load_detector import load

_imports_are_done()

__all__ = [
    "Batch",
    "Detections",
    "FasterRCNN",
    "FasterRCNNConfig",
    "ImageDetections",
    "Target",
    "fuse_batch_norms",
    "load",
]

"""A detector that is built and run in milliseconds."""

from detector import FasterRCNNConfig


def small_config(**changes):
    """Return the configuration of a small detector of three classes, with changes."""
    values = {
        "depth": 18,
        "num_classes": 3,
        "norm": "gn",
        "base_channels": 16,
        "fpn_channels": 32,
        "fc_channels": 16,
        "image_scale": (96, 64),
        "rpn_pre_nms_top_n": (50, 50),
        "rpn_post_nms_top_n": 50,
        "max_detections": 10,
    }
    return FasterRCNNConfig(**(values | changes))

"""The checks of the configuration, and the former names of its fields."""

import itertools
import math
import re
from dataclasses import fields

import numpy as np
import pytest

from detector.model.config import RENAMED_FIELDS, FasterRCNNConfig, rename_fields


def test_renamed_fields_lead_to_fields():
    names = {field.name for field in fields(FasterRCNNConfig)}
    assert set(RENAMED_FIELDS.values()) <= names
    assert not set(RENAMED_FIELDS) & names


def test_rename_fields_leaves_other_names():
    stored = {"rpn_candidates": (50, 20), "depth": 18, "color": "red"}
    assert rename_fields(stored) == {"rpn_pre_nms_top_n": (50, 20), "depth": 18, "color": "red"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("nms_iou", math.nan, "expected 0 to 1, got nan"),
        ("score_threshold", math.inf, "expected 0 to 1, got inf"),
        ("rpn_nms_iou", -0.1, "expected 0 to 1, got -0.1"),
        ("nms_iou", 10**400, "expected 0 to 1, got 1000"),
        ("rpn_positive_iou", "0.7", "expected 0 to 1, got '0.7'"),
        ("roi_positive_fraction", True, "expected 0 to 1, got True"),
        ("depth", 34, "expected one of (18, 50, 101), got 34"),
        ("depth", 50.0, "expected one of (18, 50, 101), got 50.0"),
        ("depth", "50", "expected one of (18, 50, 101), got '50'"),
        ("dcn", "v3", "expected one of (None, 'v1', 'v2'), got 'v3'"),
        ("dcn", ["v2"], "expected one of (None, 'v1', 'v2'), got ['v2']"),
        ("norm", None, "expected one of ('bn', 'gn', 'syncbn'), got None"),
        ("sampler", "a\nb", r"expected one of ('random', 'deterministic'), got 'a\nb'"),
        ("frozen_stages", 5, "expected one of (-1, 0, 1, 2, 3, 4), got 5"),
        ("frozen_stages", True, "got True"),
        ("mask", 1, "expected True or False, got 1"),
        ("norm_eval", "no", "expected True or False, got 'no'"),
        ("num_classes", 0, "expected a whole number from 1 to 1000000, got 0"),
        ("num_classes", 10**9, "expected a whole number from 1 to 1000000, got 1000000000"),
        ("num_classes", int("9" * 4000) ** 2, "got a value of type int"),
        ("max_detections", 2.5, "expected a whole number from 1 to 1000000, got 2.5"),
        ("fc_channels", True, "expected a whole number from 1 to 65536, got True"),
        ("fpn_channels", "wide", "expected a whole number from 1 to 65536, got 'wide'"),
        ("roi_sampling_ratio", -1, "expected a whole number from 0 to 64, got -1"),
        ("roi_sampling_ratio", 65, "expected a whole number from 0 to 64, got 65"),
        ("roi_sampling_ratio", False, "got False"),
        ("anchor_scale", 0, "expected 0.0001 to 10000, got 0"),
        ("anchor_ratios", (), "expected at least one number, each 0.0001 to 10000, got ()"),
        ("anchor_ratios", (1.0, math.nan), "got (1.0, nan)"),
        ("anchor_ratios", 1.0, "got 1.0"),
        ("dcn_stages", (True, True), "expected four of True or False, got (True, True)"),
        ("dcn_stages", (1, 1, 1, 1), "expected four of True or False, got (1, 1, 1, 1)"),
        ("rpn_pre_nms_top_n", (0, 10), "expected two whole numbers from 1 to 1000000, got (0, 10)"),
        ("image_scale", (0, 800), "expected two sides of at least 1 with a product up to 67108864, got (0, 800)"),
        ("image_scale", (10**9, 10**9), "got (1000000000, 1000000000)"),
        ("image_scale", (1333, 800, 1), "got (1333, 800, 1)"),
        ("pixel_std", (58.0, 0.0, 57.0), "expected three numbers, each 0.0001 to 10000, got (58.0, 0.0, 57.0)"),
        ("pixel_mean", (1, 2, math.inf), "expected three numbers, each -10000 to 10000, got (1, 2, inf)"),
        ("pixel_mean", "rgb", "got 'rgb'"),
    ],
    ids=itertools.count(),
)
def test_nonsense_is_refused_by_field(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        FasterRCNNConfig(**{field: value})
    assert str(error.value).startswith(f"config field '{field}': expected ")


def test_every_field_is_checked():
    for field in fields(FasterRCNNConfig):
        with pytest.raises(ValueError, match=f"config field '{field.name}'"):
            FasterRCNNConfig(**{field.name: {"not": "a value"}})


def test_numbers_of_numpy_and_whole_thresholds_are_taken():
    config = FasterRCNNConfig(num_classes=np.int64(3), score_threshold=0, nms_iou=np.float32(0.5), image_scale=[96, 64])
    assert (config.num_classes, config.nms_iou) == (3, 0.5)

"""Former names of the configuration's fields."""

from dataclasses import fields

from detector.model.config import RENAMED_FIELDS, FasterRCNNConfig, rename_fields


def test_renamed_fields_lead_to_fields():
    names = {field.name for field in fields(FasterRCNNConfig)}
    assert set(RENAMED_FIELDS.values()) <= names
    assert not set(RENAMED_FIELDS) & names


def test_rename_fields_leaves_other_names():
    stored = {"rpn_candidates": (50, 20), "depth": 18, "color": "red"}
    assert rename_fields(stored) == {"rpn_pre_nms_top_n": (50, 20), "depth": 18, "color": "red"}

"""Opens the data sets of the tests, and damages their annotation files."""

import json

from tests.conftest import GOLDEN
from tests.train.conftest import write_annotations
from train.data.coco_dataset import CocoDetection
from train.data.transforms import Transform

TRANSFORM = Transform((64, 64))


def open_golden(tmp_path, training):
    """Open the golden annotation file, whose images do not exist, with its first 80 categories."""
    content = json.loads((GOLDEN / "dataset_ann.json").read_text())
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    classes = [category["name"] for category in content["categories"]][:80]
    return CocoDetection(path, tmp_path, TRANSFORM, training=training, classes=classes)


def open_coco(root, split="train2017", **options):
    """Open a split of the fixture `coco`; options are those of `CocoDetection`."""
    annotation_file = root / "annotations" / f"instances_{split}.json"
    options.setdefault("training", split == "train2017")
    return CocoDetection(annotation_file, root / split, TRANSFORM, **options)


def edit(root, change, split="train2017"):
    """Let `change` edit the content of the annotation file of a split."""
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    write_annotations(root, split, content)

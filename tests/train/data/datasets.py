"""Opens the data sets of the tests, and damages their annotation files."""

import json

from tests.conftest import GOLDEN
from tests.train.conftest import write_annotations
from train.data.coco_dataset import CocoDetection
from train.data.transforms import Transform

TRANSFORM = Transform((64, 64))


def open_golden(tmp_path, training, group="dataset", **options):
    """Open the golden annotation file of a group, whose images do not exist, with its first 80 categories."""
    content = json.loads((GOLDEN / f"{group}_ann.json").read_text())
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    classes = [category["name"] for category in content["categories"]][:80]
    return CocoDetection(path, tmp_path, TRANSFORM, training=training, classes=classes, **options)


def small_content():
    """Return the content of an annotation file: 3 images, 2 categories, 6 annotations."""
    return {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 128, "height": 96} for n in (4, 5, 6)],
        "annotations": [
            {"id": n, "image_id": 4 + n % 3, "category_id": 7 - n % 2, "bbox": [n, 2 * n, 40 + n, 30], "area": 1200.0}
            for n in range(1, 7)
        ],
        "categories": [{"id": 6, "name": "red"}, {"id": 7, "name": "blue"}],
    }


def open_content(tmp_path, content, **options):
    """Open the content of an annotation file, a dict or the bytes of the file; there are no images."""
    path = tmp_path / "annotations.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    options.setdefault("training", True)
    return CocoDetection(path, tmp_path, TRANSFORM, **options)


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

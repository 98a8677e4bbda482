"""The benchmark of loading: small data sets measure what there is, or say that it is too little."""

import json
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from bench.data import MIN_BATCHES, WARM_UP_BATCHES, main, make_coco, measure_idle_gpu, measure_loader
from bench.providers import load_providers


def test_too_few_images_are_an_error_before_anything_is_made():
    with pytest.raises(SystemExit, match="bench: --images: expected at least 32 images with boxes, got 20"):
        main(["--images", "20"])


def test_a_pass_ends_with_its_epoch():
    loader = DataLoader(range(MIN_BATCHES), batch_size=1)
    cost = measure_loader(loader, seconds=1000)
    assert cost.rate > 0
    assert cost.loading_ms == cost.training_ms
    assert 0 <= measure_idle_gpu(DataLoader(range(WARM_UP_BATCHES + 1), batch_size=1), seconds=1000) <= 1


def test_boxes_lie_in_pictures_of_every_size(tmp_path):
    content = json.loads(make_coco(tmp_path, 40, 200, (48, 64)).read_text())
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert 0 <= x < x + width <= 64
        assert 0 <= y < y + height <= 48


def test_a_missing_torchvision_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)  # cannot be imported
    _, missing = load_providers(["torchvision"], torch.device("cpu"))
    assert "pip install torchvision --index-url https://download.pytorch.org/whl/cpu" in missing["torchvision"]

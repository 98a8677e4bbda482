"""Fine-tuning from a file of MMDetection: the model is that of its config, or the file is refused."""

from dataclasses import replace

import pytest

from tests.detector.weights.mmdet_texts import CAFFE, VERSION_2
from tests.detector.weights.test_mmdet_files import mmdet_file, small, small_model
from train.config import PRESETS
from train.fine_tuning import adapt_to_weights


def adapted(path):
    return adapt_to_weights(replace(PRESETS["coco-1x"], weights=path))[0].model


def test_images_and_thresholds_are_those_of_the_file(tmp_path):
    text = small(VERSION_2).replace("std=[58.395, 57.12, 57.375]", "std=[1.0, 1.0, 1.0]")
    text = text.replace("score_thr=0.05", "score_thr=0.2")
    model = adapted(mmdet_file(tmp_path, small_model(), text, key="config"))
    assert model == small_model(pixel_std=(1.0, 1.0, 1.0), score_threshold=0.2).config


@pytest.mark.parametrize("text", [CAFFE.replace("depth=50", "depth=50, base_channels=16"), "model = 3"])
def test_other_networks_are_refused(tmp_path, text):
    path = mmdet_file(tmp_path, small_model(), text, key="config")
    with pytest.raises(ValueError, match=r"epoch_12\.pth: its MMDetection config is of another model: model"):
        adapted(path)

"""Fine-tuning from a file of MMDetection: the model is that of its config, or the file is refused."""

from dataclasses import replace

import pytest
import torch

from tests.detector.weights.mmdet_texts import CAFFE, VERSION_2
from tests.detector.weights.test_mmdet_files import background_first, mmdet_file, small, small_model, small_text
from train.build import build, load_initial_weights
from train.config import PRESETS
from train.distributed import World
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


def test_converted_files_of_version_1(tmp_path):
    model = small_model(roi_sampling_ratio=2)
    path = mmdet_file(tmp_path, model, small_text(version="1.1"), key="config")
    assert adapted(path) == model.config


def test_other_files_of_version_1_are_refused(tmp_path):
    model = small_model(roi_sampling_ratio=2)
    state = background_first(model, lambda name: name.removeprefix("roi_head."))
    torch.save({"state_dict": state, "meta": {"config": small_text(version="1.1")}}, tmp_path / "old.pth")
    config = replace(PRESETS["coco-1x"], weights=tmp_path / "old.pth", model=model.config)
    config, _ = adapt_to_weights(config)
    state, _ = build(config, World(0, 1, 0, torch.device("cpu")))
    with pytest.raises(
        ValueError, match=r"old\.pth: expected heads of MMDetection 2 or 3, .*upgrade_model_version\.py"
    ):
        load_initial_weights(state, config, ("a", "b", "c"))

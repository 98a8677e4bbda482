"""`detector.load`: the model a file was written from, for the three kinds of file that there are."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file

from detector import FasterRCNN, FasterRCNNConfig, load
from detector.model.config import RENAMED_FIELDS
from detector.weights.checkpoint import save_weights
from detector.weights.load_detector import infer_config

CONFIG = FasterRCNNConfig(
    depth=18, num_classes=3, fpn_channels=32, fc_channels=16, image_scale=(96, 64), score_threshold=0.1
)
CLASSES = ["disc", "ring", "star"]


def same_weights(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("norm", ["bn", "gn", "syncbn"])
def test_checkpoint_of_training(tmp_path, norm):
    config = replace(CONFIG, norm=norm)
    model = FasterRCNN(config).train()
    run = {"epochs": 3, "model": asdict(config), "optim": {"lr": 0.1}}
    torch.save({"model": model.state_dict(), "config": run, "classes": CLASSES}, tmp_path / "last.pt")
    loaded, names = load(tmp_path / "last.pt", "cpu")
    assert loaded.config == config
    assert names == CLASSES
    assert not loaded.training
    assert same_weights(model, loaded)


def test_safetensors(tmp_path):
    model = FasterRCNN(CONFIG)
    save_weights(tmp_path / "shared.safetensors", model, CLASSES)
    loaded, names = load(tmp_path / "shared.safetensors")
    assert loaded.config == CONFIG  # tuples are tuples again
    assert names == CLASSES
    assert same_weights(model, loaded.cpu())


def former_names(config):
    """Return the fields of a configuration as they were stored before some of them were renamed."""
    former = {new: old for old, new in RENAMED_FIELDS.items()}
    return {former.get(name, name): value for name, value in asdict(config).items()}


FORMER_CONFIG = replace(
    CONFIG,
    rpn_batch_size=17,
    rpn_pre_nms_top_n=(70, 60),
    rpn_post_nms_top_n=50,
    roi_positive_iou=0.4,
    roi_batch_size=18,
    roi_positive_fraction=0.3,
    max_detections=19,
)


def test_checkpoint_with_former_field_names(tmp_path):
    model = FasterRCNN(FORMER_CONFIG)
    stored = former_names(FORMER_CONFIG)
    assert {"rpn_candidates", "rpn_proposals", "rpn_samples", "rcnn_samples", "detections"} <= set(stored)
    run = {"epochs": 3, "model": stored}
    torch.save({"model": model.state_dict(), "config": run, "classes": CLASSES}, tmp_path / "last.pt")
    loaded, _ = load(tmp_path / "last.pt", "cpu")
    assert loaded.config == FORMER_CONFIG
    assert same_weights(model, loaded)


def test_safetensors_with_former_field_names(tmp_path):
    model = FasterRCNN(FORMER_CONFIG)
    metadata = {"config": json.dumps(former_names(FORMER_CONFIG)), "classes": json.dumps(CLASSES)}
    save_file(model.state_dict(), tmp_path / "shared.safetensors", metadata)
    loaded, _ = load(tmp_path / "shared.safetensors", "cpu")
    assert loaded.config == FORMER_CONFIG


def test_mmdet_file_tells_its_architecture(tmp_path):
    config = FasterRCNNConfig(depth=18, num_classes=3, dcn="v2", deform_groups=4, fpn_channels=32, fc_channels=16)
    model = FasterRCNN(config)
    torch.save({"state_dict": model.state_dict(), "meta": {"CLASSES": CLASSES}}, tmp_path / "epoch_12.pth")
    loaded, names = load(tmp_path / "epoch_12.pth", "cpu")
    assert (loaded.config, names) == (config, CLASSES)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    assert load(tmp_path / "bare.pth", "cpu")[1] == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize(
    "changes",
    [
        {"dcn": None, "dcn_stages": (False,) * 4},
        {"depth": 18, "dcn": "v1", "dcn_stages": (False, True, False, True), "norm": "gn"},
        {"depth": 50, "dcn": "v2"},
        {"depth": 50, "dcn": "v2", "deform_groups": 4, "dcn_stages": (True,) * 4},
        {"depth": 101, "dcn": "v1"},
        {"depth": 18, "mask": True},
    ],
)
def test_architecture_is_inferred_from_the_weights(changes):
    config = FasterRCNNConfig(num_classes=7, fpn_channels=16, fc_channels=8, **changes)
    with torch.device("meta"):
        state = FasterRCNN(config).state_dict()
    assert infer_config(state) == config


def stored(tmp_path, **changes):
    content = {"model": FasterRCNN(CONFIG).state_dict(), "config": asdict(CONFIG), "classes": CLASSES} | changes
    torch.save(content, tmp_path / "last.pt")
    return tmp_path / "last.pt"


def test_files_that_contradict_themselves_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"last\.pt: expected weights of 4 classes, .* got 3"):
        load(stored(tmp_path, config=asdict(replace(CONFIG, num_classes=4))))
    with pytest.raises(ValueError, match=r"last\.pt: expected 3 class names, .* got 2"):
        load(stored(tmp_path, classes=CLASSES[:2]))
    with pytest.raises(ValueError, match=r"last\.pt: unknown fields in its configuration of the model: color"):
        load(stored(tmp_path, config=asdict(CONFIG) | {"color": "red"}))
    with pytest.raises(ValueError, match=r"last\.pt: expected the weights of a whole detector"):
        load(stored(tmp_path, model=FasterRCNN(CONFIG).backbone.state_dict()))


def test_absent_device_is_named(tmp_path):
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(ValueError, match=f"device: cannot compute on '{device}'"):
            load(tmp_path / "never-opened.pt", device)

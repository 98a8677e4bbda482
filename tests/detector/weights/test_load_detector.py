"""`detector.load`: the model a file was written from, whichever of the three kinds of file it is."""

from dataclasses import asdict, replace

import pytest
import torch

from detector import FasterRCNN, FasterRCNNConfig, load
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
def test_architecture_is_read_off_the_weights(changes):
    config = FasterRCNNConfig(num_classes=7, fpn_channels=16, fc_channels=8, **changes)
    with torch.device("meta"):
        state = FasterRCNN(config).state_dict()
    assert infer_config(state) == config


def stored(tmp_path, **changes):
    content = {"model": FasterRCNN(CONFIG).state_dict(), "config": asdict(CONFIG), "classes": CLASSES} | changes
    torch.save(content, tmp_path / "last.pt")
    return tmp_path / "last.pt"


def test_files_that_contradict_themselves_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"last\.pt: its configuration says 4 classes, its weights have 3"):
        load(stored(tmp_path, config=asdict(replace(CONFIG, num_classes=4))))
    with pytest.raises(ValueError, match=r"last\.pt: 2 class names, but its weights have 3 classes"):
        load(stored(tmp_path, classes=CLASSES[:2]))
    with pytest.raises(ValueError, match=r"last\.pt: unknown fields in its configuration of the model: color"):
        load(stored(tmp_path, config=asdict(CONFIG) | {"color": "red"}))
    with pytest.raises(ValueError, match=r"last\.pt: not the weights of a whole detector"):
        load(stored(tmp_path, model=FasterRCNN(CONFIG).backbone.state_dict()))


def test_absent_device_is_named(tmp_path):
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(ValueError, match=f"device: cannot compute on '{device}'"):
            load(tmp_path / "never-opened.pt", device)

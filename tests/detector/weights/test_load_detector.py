"""`detector.load`: the model a file was written from, for the three kinds of file that there are."""

import itertools
import json
import math
import os
import re
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file

from detector import FasterRCNN, FasterRCNNConfig, load
from detector.model.config import RENAMED_FIELDS
from detector.weights.checkpoint import save_weights
from detector.weights.load_detector import infer_config

CONFIG = FasterRCNNConfig(
    depth=18,
    num_classes=3,
    base_channels=16,
    fpn_channels=32,
    fc_channels=16,
    image_scale=(96, 64),
    score_threshold=0.1,
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


TINY = FasterRCNNConfig(
    depth=18, num_classes=3, dcn=None, norm="gn", base_channels=16, fpn_channels=8, fc_channels=4, image_scale=(96, 64)
)


@pytest.fixture(scope="module")
def tiny():
    """State dict of a small detector."""
    return FasterRCNN(TINY).state_dict()


def tiny_file(folder, state, **changes):
    content = {"model": state, "config": asdict(TINY), "classes": CLASSES} | changes
    torch.save(content, folder / "tiny.pt")
    return folder / "tiny.pt"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("nms_iou", math.nan, "config field 'nms_iou': expected 0 to 1, got nan"),
        ("num_classes", 0, "config field 'num_classes': expected a whole number from 1 to 1000000, got 0"),
        ("num_classes", 10**9, "config field 'num_classes': expected a whole number from 1 to 1000000, got 1000000000"),
        ("depth", "18", "config field 'depth': expected one of (18, 50, 101), got '18'"),
        ("depth", [18], "config field 'depth': expected one of (18, 50, 101), got (18,)"),
        ("image_scale", (10**6, 10**6), "config field 'image_scale': expected two sides"),
        ("base_channels", 17, "base_channels: expected a multiple of 16, got 17"),
        ("deform_groups", 7, "in_channels: expected a multiple of deform_groups = 7, got 32"),
        (
            "fc_channels",
            30_000,
            "does not fit the model: shapes that differ: 6: roi_head.bbox_head.shared_fcs.0.weight",
        ),
        ("fpn_channels", 65_536, "does not fit the model"),
        ("depth", 101, "does not fit the model: "),
        ("mask", True, "does not fit the model: names missing in the file: 12"),
        ("anchor_ratios", (0.5,) * 1000, "does not fit the model: shapes that differ: 4: rpn_head.rpn_cls.weight"),
    ],
    ids=itertools.count(),
)
def test_configurations_are_judged_before_memory_is_taken(tmp_path, tiny, monkeypatch, field, value, message):
    def without_memory(config):
        assert torch.empty(0).is_meta
        return FasterRCNN(config)

    monkeypatch.setattr("detector.weights.load_detector.FasterRCNN", without_memory)
    changes = {"dcn": "v2"} if field == "deform_groups" else {}
    path = tiny_file(tmp_path, tiny, config=asdict(TINY) | changes | {field: value})
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(path, "cpu")
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": 3}, "expected `model` in its configuration to be a dict, got 3"),
        ({3: 4, "a\nb": 5}, r"unknown fields in its configuration of the model: 3, a\nb; a newer version"),
        ([1], "expected `config` to be a dict, got list"),
        (None, "does not fit the model"),
    ],
)
def test_configurations_of_another_form(tmp_path, tiny, config, message):
    # without a configuration the architecture is inferred, and this one has a pyramid that no weights show
    state = tiny if config else {name: value for name, value in tiny.items() if "lateral_convs.0" not in name}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(tiny_file(tmp_path, state, config=config), "cpu")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["roi_head.bbox_head.fc_cls.weight", "backbone.conv1.weight"])
def test_weights_without_dimensions_are_named(tmp_path, tiny, name):
    path = tiny_file(tmp_path, tiny | {name: torch.tensor(1.0)}, config=None)
    with pytest.raises(ValueError, match=rf"tiny\.pt: weights: expected {name} with at least one dimension, got none"):
        load(path, "cpu")


BIAS = "roi_head.bbox_head.fc_cls.bias"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_other_floating_point_weights_are_converted(tmp_path, tiny, dtype):
    model, _ = load(tiny_file(tmp_path, tiny | {BIAS: torch.ones(4, dtype=dtype)}), "cpu")
    assert torch.equal(model.state_dict()[BIAS], torch.ones(4))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(4, dtype=torch.int64), "expected floating-point numbers, got torch.int64"),
        (torch.ones(4, dtype=torch.bool), "expected floating-point numbers, got torch.bool"),
        (torch.ones(4, dtype=torch.complex64), "expected floating-point numbers, got torch.complex64"),
        (torch.tensor([0, 0, math.nan, 0]), "expected finite numbers, got NaN or infinity"),
        (torch.tensor([0, 0, -math.inf, 0]), "expected finite numbers, got NaN or infinity"),
        (torch.full((4,), 1e300, dtype=torch.float64), "expected finite numbers, got NaN or infinity"),
        (torch.ones(1).expand(4, 10**9), "expected (4,), got (4, 1000000000)"),
    ],
    ids=itertools.count(),
)
def test_weights_of_other_kinds_are_named(tmp_path, tiny, value, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(tiny_file(tmp_path, tiny | {BIAS: value}), "cpu")
    assert BIAS in str(error.value)


def test_class_names_may_be_equal_but_not_too_few(tmp_path, tiny):
    assert load(tiny_file(tmp_path, tiny, classes=["cat", "cat", "dog"]), "cpu")[1] == ["cat", "cat", "dog"]
    for classes in ([], ["cat"] * 4):
        with pytest.raises(ValueError, match=rf"expected 3 class names, one per class .*, got {len(classes)}"):
            load(tiny_file(tmp_path, tiny, classes=classes), "cpu")


def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", "/dev/zero"):
        with pytest.raises(OSError, match="expected a regular file, got a pipe or a device"):
            load(path, "cpu")


def test_absent_device_is_named(tmp_path):
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(ValueError, match=f"device: cannot compute on '{device}'"):
            load(tmp_path / "never-opened.pt", device)

"""Weights: files of all kinds load, the summary is right, and a file that does not fit changes nothing."""

import re
import sys
import types
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch

from detector.model.config import FasterRCNNConfig
from detector.model.faster_rcnn import FasterRCNN
from detector.model.resnet import ResNet
from detector.weights.checkpoint import read_checkpoint, save_weights
from detector.weights.load_weights import HEADS, load_weights

CONFIG = FasterRCNNConfig(depth=18, num_classes=3, base_channels=16, fpn_channels=32, fc_channels=16)
CLASSES = ["disc", "ring", "star"]


@pytest.fixture(scope="module")
def source():
    """A model whose weights differ from those of any newly made one."""
    torch.manual_seed(100)
    model = FasterRCNN(CONFIG)
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def meta(classes=CLASSES):
    return {"mmdet_version": "3.3.0", "dataset_meta": {"classes": classes, "palette": None}, "epoch": 12}


def add_prefix(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def bare(state):
    return state


def mmdet(state):
    return {"state_dict": state, "meta": meta(), "optimizer": {"state": {}, "param_groups": []}}


def ours(state):
    return {"model": state, "config": {"depth": 18}, "classes": CLASSES, "epoch": 3}


def data_parallel(state):
    return {"state_dict": add_prefix("module.", state)}


def compiled(state):
    return {"model": add_prefix("module._orig_mod.", state)}


def mmdet2_averaged(state):
    averaged = {"ema_" + name.replace(".", "_"): value * 2 for name, value in state.items()}
    return {"state_dict": OrderedDict(state | averaged), "meta": {"CLASSES": tuple(CLASSES)}}


def mmdet3_averaged(state):
    return {"state_dict": state, "ema_state_dict": add_prefix("module.", state) | {"steps": 5}}


def only_averaged(state):
    return {"ema_state_dict": add_prefix("module.", state) | {"steps": torch.tensor(5)}}


def averaged_names(state):
    return add_prefix("ema_", state)


def averaged_flat_names(state):
    return {"ema_" + name.replace(".", "_"): value for name, value in state.items()}


def old_mmcv(state):
    return {"state_dict": {name.replace("conv2.conv_offset", "conv2_offset"): value for name, value in state.items()}}


def without_counters(state):
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def half(state):
    return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        bare,
        mmdet,
        ours,
        data_parallel,
        compiled,
        mmdet2_averaged,
        mmdet3_averaged,
        only_averaged,
        averaged_names,
        averaged_flat_names,
        old_mmcv,
        without_counters,
        half,
    ],
)
def test_files_of_all_kinds_load_strictly(tmp_path, source, wrap):
    path = tmp_path / "weights.pth"
    torch.save(wrap(source.state_dict()), path)
    model = FasterRCNN(CONFIG)
    summary = load_weights(model, path)
    tolerance = 1e-3 if wrap is half else 0
    for name, value in source.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=tolerance, atol=tolerance)
    assert not summary.unexpected
    assert all(name.endswith("num_batches_tracked") for name in summary.missing)
    assert len(summary.loaded) + len(summary.missing) == len(source.state_dict())
    assert str(summary).startswith(f"{path}: {len(summary.loaded)} tensors loaded")
    assert bool(summary.skipped) == (wrap is mmdet2_averaged)


def test_legacy_file_format(tmp_path, source):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": source.state_dict()}, path, _use_new_zipfile_serialization=False)
    assert not load_weights(FasterRCNN(CONFIG), path).missing


@pytest.mark.parametrize(
    ("content", "classes"),
    [
        ({"meta": meta()}, tuple(CLASSES)),
        ({"meta": {"CLASSES": CLASSES}}, tuple(CLASSES)),
        ({"meta": {"dataset_meta": {"CLASSES": CLASSES}}}, tuple(CLASSES)),
        ({"classes": CLASSES, "config": {"depth": 18}}, tuple(CLASSES)),
        ({}, None),
    ],
)
def test_class_names(tmp_path, content, classes):
    torch.save({"state_dict": {"a": torch.zeros(1)}} | content, tmp_path / "weights.pth")
    checkpoint = read_checkpoint(tmp_path / "weights.pth")
    assert checkpoint.classes == classes
    assert checkpoint.config == content.get("config")


def test_foreign_objects_are_neither_needed_nor_run(tmp_path, source, monkeypatch):
    module = types.ModuleType("trainer.history")

    class HistoryBuffer:
        def __init__(self):
            self.values = np.arange(3.0)

        def __reduce__(self):
            return (HistoryBuffer, (), {"values": self.values})

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    HistoryBuffer.__module__ = "trainer.history"
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer
    monkeypatch.setitem(sys.modules, "trainer", types.ModuleType("trainer"))
    monkeypatch.setitem(sys.modules, "trainer.history", module)
    content = {
        "state_dict": source.state_dict(),
        "message_hub": {"loss": HistoryBuffer(), "x": np.float64(1), "e": Evil()},
    }
    torch.save(content, tmp_path / "weights.pth")
    monkeypatch.delitem(sys.modules, "trainer.history")
    assert not load_weights(FasterRCNN(CONFIG), tmp_path / "weights.pth").missing
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("dcn", [None, "v2"])
@pytest.mark.parametrize("whole", [True, False], ids=["detector", "backbone"])
def test_imagenet_file_goes_into_the_backbone(tmp_path, dcn, whole):
    imagenet = ResNet(18)
    for value in imagenet.state_dict().values():
        value.fill_(3)
    fully_connected = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(imagenet.state_dict() | fully_connected, tmp_path / "resnet18.pth")
    model = FasterRCNN(FasterRCNNConfig(depth=18, num_classes=3, dcn=dcn, fpn_channels=32, fc_channels=16))
    model = model if whole else model.backbone
    before = {name: value.clone() for name, value in model.state_dict().items()}
    summary = load_weights(model, tmp_path / "resnet18.pth")
    prefix = "backbone." if whole else ""
    assert set(summary.loaded) == {prefix + name for name in imagenet.state_dict()}
    assert set(summary.skipped) == set(fully_connected)
    for name, value in model.state_dict().items():
        if name in summary.loaded:
            assert (value == 3).all(), name
        else:
            assert torch.equal(value, before[name]), name
            assert ".conv_offset." in name or not name.startswith("backbone."), name


def test_imagenet_file_of_another_depth_is_an_error(tmp_path):
    torch.save(ResNet(18).state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match=r"resnet18\.pth does not fit the model"):
        load_weights(FasterRCNN(replace(CONFIG, base_channels=64, depth=50)), tmp_path / "resnet18.pth")


def test_class_count_error_and_its_remedy(tmp_path, source):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": source.state_dict()}, path)
    torch.manual_seed(7)
    model = FasterRCNN(replace(CONFIG, num_classes=5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = r"expected 5 classes, as the model has, got 3 \(.*fc_cls.*fc_reg.*skip_heads=True"
    with pytest.raises(ValueError, match=message) as error:
        load_weights(model, path)
    assert str(path) in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    summary = load_weights(model, path, skip_heads=True)
    assert len(summary.skipped) == len(summary.missing) == 4
    assert "4 in the file but not taken, left as they were: roi_head.bbox_head.fc_cls.weight" in str(summary)
    for name, value in model.state_dict().items():
        expected = before[name] if name.startswith(HEADS) else source.state_dict()[name]
        assert torch.equal(value, expected), name


def test_strict_names_what_differs_and_changes_nothing(tmp_path, source):
    state = dict(source.state_dict())
    state["extra.weight"] = state.pop("neck.fpn_convs.0.conv.bias")
    torch.save(state, tmp_path / "weights.pth")
    model = FasterRCNN(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = re.escape(
        "names missing in the file: 1 (neck.fpn_convs.0.conv.bias), unknown to the model: 1 (extra.weight)"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "weights.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    summary = load_weights(model, tmp_path / "weights.pth", strict=False)
    assert summary.missing == ("neck.fpn_convs.0.conv.bias",)
    assert summary.unexpected == ("extra.weight",)
    assert "1 missing in the file, left as they were: neck.fpn_convs.0.conv.bias" in str(summary)


def test_shapes_must_agree_even_if_not_strict(tmp_path, source):
    state = dict(source.state_dict())
    state["neck.fpn_convs.0.conv.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"neck\.fpn_convs\.0\.conv\.bias: expected \(32,\), got \(7,\)"):
        load_weights(FasterRCNN(CONFIG), tmp_path / "weights.pth", strict=False)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 10, 1000, 5000, 0.5, 0.999])
def test_cut_off_file_is_one_clear_error(tmp_path, source, suffix, keep):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": source.state_dict()}, path)
    else:
        save_weights(path, source, CLASSES)
    data = path.read_bytes()
    size = int(keep * len(data)) if isinstance(keep, float) else keep
    path.write_bytes(data[:size])
    with pytest.raises(ValueError, match="not a checkpoint, or cut off") as error:
        load_weights(FasterRCNN(CONFIG), path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a state dict, .*got a list"),
        ({"epoch": 3, "lr": 0.1}, "expected a state dict, .*got the keys epoch, lr"),
        ({}, "expected a state dict"),
        ({"state_dict": {}}, "expected a state dict"),
        ({"model": {"a": torch.zeros(1)}, "classes": 3}, "expected `classes` to be a list of names, got 3"),
        ({"model": {"a": torch.zeros(1)}, "config": 3}, "expected `config` to be a dict, got int"),
    ],
)
def test_file_without_weights_is_one_clear_error(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message) as error:
        load_weights(FasterRCNN(CONFIG), tmp_path / "weights.pth")
    assert str(tmp_path / "weights.pth") in str(error.value)


def test_text_file_and_missing_file_are_named(tmp_path):
    (tmp_path / "weights.pth").write_text("these are not weights\n" * 100)
    with pytest.raises(ValueError, match=r"weights\.pth: not a checkpoint"):
        load_weights(FasterRCNN(CONFIG), tmp_path / "weights.pth")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        load_weights(FasterRCNN(CONFIG), tmp_path / "absent.pth")
    with pytest.raises(OSError, match=re.escape(tmp_path.name)):
        load_weights(FasterRCNN(CONFIG), tmp_path)


def test_safetensors_round_trip(tmp_path, source):
    path = tmp_path / "weights.safetensors"
    source.to(memory_format=torch.channels_last)
    save_weights(path, source, CLASSES)
    assert list(tmp_path.iterdir()) == [path]
    checkpoint = read_checkpoint(path)
    assert checkpoint.classes == tuple(CLASSES)
    assert checkpoint.config["fpn_channels"] == 32
    model = FasterRCNN(CONFIG)
    assert not load_weights(model, path).missing
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="expected 3 names, got 1"):
        save_weights(path, source, ["disc"])
    with pytest.raises(ValueError, match=r"ending in \.safetensors"):
        save_weights(tmp_path / "weights.pth", source, CLASSES)

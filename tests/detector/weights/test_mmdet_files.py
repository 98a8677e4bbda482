"""Files of MMDetection: the model is recognized from names and shapes, and what it computes from the config inside."""

import re
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from detector import FasterRCNN, FasterRCNNConfig, load
from detector.structures import Batch
from detector.weights.checkpoint import read_checkpoint, save_weights
from detector.weights.config_text import read_config_text
from detector.weights.load_detector import infer_config, make_skeleton
from detector.weights.load_weights import HEADS, count_classes, load_weights
from detector.weights.torch_file import read_torch_file
from tests.detector.weights.mmdet_texts import (
    CAFFE,
    CAFFE_IMAGES,
    OLD_FILES,
    OLDER,
    VARIANTS,
    VERSION_2,
    older_text,
    variant_model,
    variant_shapes,
    version_3,
)

MDCONV = "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py"
CASCADE_MASK = "dcn/cascade-mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py"

X101 = {"depth": 101, "groups": 32, "width_per_group": 4}
NO_DCN = {"dcn": None, "dcn_stages": (False,) * 4}
MODELS = {
    "dcn/cascade-mask-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py": {"depth": 101, "dcn": "v1", "cascade": True, "mask": True},
    "dcn/cascade-mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py": {"dcn": "v1", "cascade": True, "mask": True},
    "dcn/cascade-mask-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco.py": X101 | {"dcn": "v1", "cascade": True, "mask": True},
    "dcn/cascade-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py": {"depth": 101, "dcn": "v1", "cascade": True},
    "dcn/cascade-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py": {"dcn": "v1", "cascade": True},
    "dcn/faster-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py": {"depth": 101, "dcn": "v1"},
    "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py": {"dcn": "v1"},
    "dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py": NO_DCN | {"roi_layer": "dpool"},
    "dcn/faster-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco.py": X101 | {"dcn": "v1"},
    "dcn/mask-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py": {"depth": 101, "dcn": "v1", "mask": True},
    "dcn/mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py": {"dcn": "v1", "mask": True},
    "dcn/mask-rcnn_r50-dconv-c3-c5_fpn_amp-1x_coco.py": {"dcn": "v1", "mask": True},
    "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py": {},
    "dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco.py": {"deform_groups": 4},
    "dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco.py": NO_DCN | {"roi_layer": "mdpool"},
    "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py": {"mask": True},
    "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_amp-1x_coco.py": {"mask": True},
}


def test_these_are_all_dcn_configs():
    assert set(MODELS) == set(VARIANTS["variants"])
    assert len({variant["state_dict_sha256"] for variant in VARIANTS["variants"].values()}) == 15


@pytest.mark.parametrize("file", MODELS)
def test_dcn_models_are_recognized_and_have_the_same_names(file):
    shapes = variant_shapes(file)
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    config = infer_config(state)
    assert config == FasterRCNNConfig(**MODELS[file])
    assert count_classes(state) == 80
    model = make_skeleton(config, Path("file.pth")).state_dict()
    assert {name: tuple(value.shape) for name, value in model.items()} == shapes


SMALL = {"depth": 18, "num_classes": 3, "base_channels": 16, "fpn_channels": 32, "fc_channels": 16}


def small_text(file=MDCONV, version=None):
    """Return the config of a model of the same kind with the sizes of `SMALL`, in version 3 or an older one."""
    model = variant_model(file)
    model["backbone"] |= {"depth": 18, "base_channels": 16, "stem_channels": 16}
    model["neck"] |= {"in_channels": [16, 32, 64, 128], "out_channels": 32}
    roi_head = model["roi_head"]
    heads = roi_head["bbox_head"]
    for head in heads if isinstance(heads, list) else [heads]:
        head |= {"num_classes": 3, "fc_out_channels": 16, "in_channels": 32}
    if "mask_head" in roi_head:
        masks = roi_head["mask_head"]
        for head in masks if isinstance(masks, list) else [masks]:
            head |= {"num_classes": 3, "in_channels": 32, "conv_out_channels": 32}
    return older_text(model, version) if version else version_3(model)


def small_model(file=MDCONV, **changes):
    torch.manual_seed(0)
    fields = {name: value for name, value in MODELS[file].items() if name not in X101}
    return FasterRCNN(FasterRCNNConfig(**(fields | SMALL | changes)))


def mmdet_file(folder, model, config, key="cfg", **meta):
    path = folder / "epoch_12.pth"
    torch.save({"state_dict": model.state_dict(), "meta": {key: config, "epoch": 12} | meta}, path)
    return path


def same_weights(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize(
    "file",
    [
        "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
        "dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco.py",
        "dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco.py",
        "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py",
        CASCADE_MASK,
    ],
)
def test_load(tmp_path, file):
    model = small_model(file)
    path = mmdet_file(tmp_path, model, small_text(file), dataset_meta={"classes": ("a", "b", "c"), "palette": None})
    loaded, names = load(path, "cpu")
    assert names == ["a", "b", "c"]
    assert loaded.config == model.config
    assert same_weights(model, loaded)
    assert not load_weights(small_model(file), path).missing


def test_thresholds_classes_and_images_are_those_of_the_config(tmp_path):
    text = small_text().replace("score_thr=0.05", "score_thr=0.25").replace("(1333, 800)", "(640, 640)")
    text = text.replace("mean=[123.675, 116.28, 103.53]", "mean=[100, 110, 120]")
    text += "metainfo = dict(classes=('a', 'b', 'c'))\n"
    loaded, names = load(mmdet_file(tmp_path, small_model(), text), "cpu")
    assert names == ["a", "b", "c"]
    expected = small_model().config
    changes = {"score_threshold": 0.25, "image_scale": (640, 640), "pixel_mean": (100.0, 110.0, 120.0)}
    assert loaded.config == replace(expected, **changes)
    assert loaded.pixel_mean.flatten().tolist() == [100, 110, 120]


def small(text):
    """Return a text of version 2 with the sizes of `SMALL`."""
    sizes = {
        "depth=50": "depth=18, base_channels=16, stem_channels=16",
        "out_channels=256,\n        num_outs": "out_channels=32,\n        num_outs",
        "num_classes=80": "num_classes=3",
        "fc_out_channels=1024": "fc_out_channels=16",
    }
    for old, new in sizes.items():
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("text", [VERSION_2, OLD_FILES], ids=["one text", "all files"])
def test_files_of_version_2(tmp_path, text):
    model = small_model()
    loaded, names = load(mmdet_file(tmp_path, model, small(text), key="config", CLASSES=("a", "b", "c")), "cpu")
    assert (loaded.config, names) == (model.config, ["a", "b", "c"])
    assert same_weights(model, loaded)


@pytest.mark.parametrize("version", OLDER)
@pytest.mark.parametrize(
    "file",
    [
        "dcn/cascade-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
        "dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py",
        "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py",
        "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py",
        CASCADE_MASK,
    ],
)
def test_older_files(tmp_path, file, version):
    """Those of version 1 have been converted: their weights do not count the background, their configs do.

    MMDetection's own files of version 2.0 say that they were made by 1.0rc1, because its number was raised later.
    """
    ratio = 2 if version.startswith("1") and "roi_layer" not in MODELS[file] else 0
    model = small_model(file, roi_sampling_ratio=ratio)
    meta = {"CLASSES": ("a", "b", "c"), "mmdet_version": "1.0rc1+5f9f470"}
    path = mmdet_file(tmp_path, model, small_text(file, version), key="config", **meta)
    loaded, names = load(path, "cpu")
    assert (loaded.config, names) == (model.config, ["a", "b", "c"])
    assert same_weights(model, loaded)
    assert not load_weights(FasterRCNN(model.config), path).missing
    extractors = [loaded.roi_head.bbox_roi_extractor]
    if model.config.mask:
        extractors.append(loaded.roi_head.mask_roi_extractor)
    for extractor in extractors:
        stages = extractor if isinstance(extractor, nn.ModuleList) else [extractor]
        assert {stage.sampling_ratio for stage in stages} == {ratio}


def background_first(model, names=str):
    """Return weights as versions before 2.0 had them: the background is the first class, and has boxes and masks."""
    state = {}
    agnostic = model.config.cascade
    for name, value in model.state_dict().items():
        if "fc_cls" in name:
            value = value.roll(1, 0)
        elif "conv_logits" in name or ("fc_reg" in name and not agnostic):
            rows = 4 if "fc_reg" in name else 1
            value = torch.cat([torch.zeros_like(value[:rows]), value])
        state[names(name)] = value
    return state


CONVERT = "whose first class it is: convert the file with MMDetection's tools/model_converters/upgrade_model_version.py"


@pytest.mark.parametrize("meta", [{"config": True}, {}])
@pytest.mark.parametrize("file", [MDCONV, "dcn/cascade-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py", CASCADE_MASK])
def test_files_of_version_1_have_to_be_converted(tmp_path, file, meta):
    model = small_model(file, roi_sampling_ratio=2)
    state = background_first(model, lambda name: name.removeprefix("roi_head."))
    meta = {key: small_text(file, "1.1") for key in meta}
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "old.pth")
    for read in (load, lambda path: load_weights(model, path), lambda path: load_weights(model, path, skip_heads=True)):
        with pytest.raises(ValueError, match=re.escape(CONVERT)) as error:
            read(tmp_path / "old.pth")
        assert str(error.value).startswith(f"{tmp_path / 'old.pth'}: expected heads of MMDetection 2 or 3, ")
    before = model.roi_head.state_dict()
    summary = load_weights(model, tmp_path / "old.pth", strict=False)
    assert "backbone.conv1.weight" in summary.loaded
    assert not any(name.startswith("roi_head.") for name in summary.loaded)
    assert all(torch.equal(value, before[name]) for name, value in model.roi_head.state_dict().items())


@pytest.mark.parametrize("version", ["2020-01", None])
@pytest.mark.parametrize("file", [MDCONV, "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py", CASCADE_MASK])
def test_background_first_under_present_names(tmp_path, file, version):
    model = small_model(file)
    meta = {}
    if version:
        meta = {"config": small_text(file, version).replace("num_classes=3", "num_classes=4")}
    path = tmp_path / "old.pth"
    torch.save({"state_dict": background_first(model), "meta": meta}, path)
    for strict in (True, False):
        with pytest.raises(ValueError, match=re.escape(CONVERT)):
            load_weights(model, path, strict=strict)
    with pytest.raises(ValueError, match=re.escape(CONVERT)):
        load(path, "cpu")
    assert "roi_head.bbox_head" in str(load_weights(model, path, skip_heads=True).skipped)


def test_cascades_without_masks_hide_the_order_of_their_classes(tmp_path):
    file = "dcn/cascade-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py"
    text = small_text(file, "2020-01").replace("num_classes=3", "num_classes=4")
    path = mmdet_file(tmp_path, small_model(file), text, key="config")
    with pytest.raises(ValueError, match="num_classes: expected weights of 4, as its MMDetection config says, got 3"):
        load(path, "cpu")


def test_files_of_weights_alone_have_the_defaults(tmp_path):
    model = small_model()
    for meta in (
        {},
        {"meta": {}},
        {"meta": {"cfg": None}},
        {"meta": {"cfg": ""}},
        {"meta": "text"},
        {"meta": {"config": {}}},
    ):
        torch.save({"state_dict": model.state_dict()} | meta, tmp_path / "weights.pth")
        assert load(tmp_path / "weights.pth", "cpu")[0].config == model.config


def image_batch():
    torch.manual_seed(1)
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    return Batch(images, torch.tensor([[64, 96]]))


def test_networks_that_take_blue_green_red(tmp_path):
    """The network of the file sees (B, G, R) less (mean of B, ...), this one (R, G, B) less (mean of R, ...)."""
    original = small_model()
    path = mmdet_file(tmp_path, original, small(CAFFE_IMAGES), key="config")
    loaded, _ = load(path, "cpu")
    assert loaded.config.pixel_mean == (123.675, 116.28, 103.53)
    assert loaded.config.pixel_std == (1.0, 1.0, 1.0)

    batch = image_batch()
    mean = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
    expected = original.eval().features(batch.images.flip(1).float() - mean)
    got = loaded.features(loaded.normalize(batch))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    # What is saved from here on says so, and is not turned again.
    save_weights(tmp_path / "ours.safetensors", loaded, ["a", "b", "c"])
    assert same_weights(load(tmp_path / "ours.safetensors", "cpu")[0], loaded)
    first = "backbone.conv1.weight"
    assert torch.equal(loaded.state_dict()[first], original.state_dict()[first].flip(1))
    assert torch.equal(read_checkpoint(path).state[first], original.state_dict()[first].flip(1))


def test_stride_in_the_first_convolution_is_refused(tmp_path):
    model = small_model()
    text = small(CAFFE).replace("depth=18", "depth=50")
    path = mmdet_file(tmp_path, model, text, key="config")
    message = (
        f"{path}: its MMDetection config is of another model: model.backbone.style: expected 'pytorch', got 'caffe'"
    )
    for read in (lambda: load(path, "cpu"), lambda: load_weights(small_model(), path)):
        with pytest.raises(ValueError, match=re.escape(message)):
            read()

    # The way out: the weights alone.
    torch.save(read_torch_file(path)["state_dict"], tmp_path / "weights.pth")
    assert same_weights(load(tmp_path / "weights.pth", "cpu")[0], model)


def test_all_differences_are_in_one_message(tmp_path):
    text = small_text().replace("type='nms'", "type='soft_nms'").replace("num_outs=5", "num_outs=6")
    with pytest.raises(ValueError, match=r"neck\.num_outs: .*test_cfg\.rpn\.nms\.type: .*test_cfg\.rcnn\.nms\.type: "):
        load(mmdet_file(tmp_path, small_model(), text), "cpu")
    path = mmdet_file(tmp_path, small_model(), small_text().replace("type='nms'", "type='soft_nms'"))
    assert not load_weights(small_model(), path).missing  # thresholds are the model's


def test_another_detector_is_named(tmp_path):
    text = small_text().replace("type='FasterRCNN'", "type='RetinaNet'")
    path = mmdet_file(tmp_path, nn.ModuleDict({"bbox_head": nn.Linear(2, 2)}), text)
    for read in (lambda: load(path, "cpu"), lambda: load_weights(small_model(), path)):
        with pytest.raises(ValueError, match=r"epoch_12\.pth: .* model\.type: expected one of .*, got 'RetinaNet'"):
            read()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_classes=3", "num_classes=4", "num_classes: expected weights of 4, as its MMDetection config says, got 3"),
        ("depth=18", "depth=50", "depth: expected weights of 50, as its MMDetection config says, got 18"),
        ("type='DCNv2'", "type='DCN'", "dcn: expected weights of v1, as its MMDetection config says, got v2"),
        (
            "deform_groups=1",
            "deform_groups=4",
            "deform_groups: expected weights of 4, as its MMDetection config says, go",
        ),
        (
            "[False, True, True, True]",
            "[False, False, True, True]",
            "dcn_stages: expected weights of (False, False, True",
        ),
        (
            "out_channels=32",
            "out_channels=64",
            "fpn_channels: expected weights of 64, as its MMDetection config says, go",
        ),
        (
            "fc_out_channels=16",
            "fc_out_channels=8",
            "fc_channels: expected weights of 8, as its MMDetection config says,",
        ),
        (
            "type='RoIAlign'",
            "type='DeformRoIPoolPack'",
            "roi_layer: expected weights of dpool, as its MMDetection config ",
        ),
        ("depth=18", "depth=34", "config field 'depth': expected one of (18, 50, 101), got 34"),
        ("score_thr=0.05", "score_thr=1.5", "config field 'score_threshold': expected 0 to 1, got 1.5"),
        ("max_per_img=100,", "max_per_img=-1,", "config field 'max_detections': expected a whole number from 1 to"),
        (
            "num_classes=3",
            "num_classes=len(names)",
            "config field 'num_classes': expected a whole number from 1 to 100000",
        ),
        (
            "scale=(1333, 800)",
            "scale=(1333, float('inf'))",
            "config field 'image_scale': expected two sides of at least",
        ),
        (
            "mean=[123.675,",
            "mean=[float('nan'),",
            "config field 'pixel_mean': expected three numbers, each -10000 to 10",
        ),
        ("classes=()", "classes=('a', 'b')", "expected 3 class names, one per class of its weights, got 2"),
    ],
)
def test_configs_that_contradict_their_weights_or_themselves(tmp_path, old, new, message):
    text = f"{small_text()}metainfo = dict(classes=())\n"
    assert old in text
    path = mmdet_file(tmp_path, small_model(), text.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(path, "cpu")
    assert str(error.value).startswith(f"{path}: ")


def test_masks_of_which_the_config_knows_nothing(tmp_path):
    path = mmdet_file(tmp_path, small_model(CASCADE_MASK), small_text())
    with pytest.raises(ValueError, match="epoch_12.pth: dcn: expected weights of v2, as its MMDetection config says"):
        load(path, "cpu")
    path = mmdet_file(tmp_path, small_model(mask=True), small_text())
    with pytest.raises(ValueError, match="mask: expected weights of False, as its MMDetection config says, got True"):
        load(path, "cpu")


def test_the_config_tells_versions_apart_where_the_shapes_do_not(tmp_path):
    """54 channels are three groups of offsets, or two of offsets and masks."""
    model = small_model(dcn="v1", deform_groups=3, base_channels=48, dcn_stages=(False, False, False, True))
    text = small_text().replace("base_channels=16", "base_channels=48").replace("type='DCNv2'", "type='DCN'")
    text = text.replace("deform_groups=1", "deform_groups=3").replace("[False, True, True,", "[False, False, False,")
    assert load(mmdet_file(tmp_path, model, text), "cpu")[0].config == model.config
    assert infer_config(model.state_dict()).dcn == "v2"


class Config:
    """As mmengine writes it."""

    def __init__(self, values, text):
        self.values = values
        self.text = text

    def __getstate__(self):
        return self.values, "config.py", self.text, {}


class ConfigDict(dict):
    def __reduce__(self):
        return ConfigDict, (dict(self),)


def as_config_dict(value):
    if isinstance(value, dict):
        return ConfigDict({key: as_config_dict(element) for key, element in value.items()})
    return [as_config_dict(element) for element in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "wrap", [lambda values: values, as_config_dict, lambda values: Config(as_config_dict(values), "")]
)
def test_configs_may_be_objects(tmp_path, monkeypatch, wrap):
    module = types.ModuleType("mmengine_config")
    for kind in (Config, ConfigDict):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = mmdet_file(tmp_path, small_model(), wrap(read_config_text(small_text())))
    monkeypatch.delitem(sys.modules, module.__name__)
    assert load(path, "cpu")[0].config == small_model().config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = dict(", "its MMDetection config cannot be read: line 1: not Python: '(' was never closed"),
        ("if True:\n    model = 3", "its MMDetection config cannot be read: line 1: expected name = value, got a stat"),
        ("a = " + "[" * 50_000, "its MMDetection config cannot be read: line 1: not Python"),
        ("a = -" * 50_000, "its MMDetection config cannot be read: "),
        ("#" * (1 << 21), "its MMDetection config cannot be read: expected at most 1048576 letters, got 2097152"),
        ("__import__('os').mkdir('evil')", "its MMDetection config cannot be read: line 1: expected name = value"),
        (
            "model = __import__('os').mkdir('evil')",
            "its MMDetection config is of another model: model: expected a dict, ",
        ),
        (
            "model = dict(type=open('evil', 'w'))",
            "model.type: expected one of ('FasterRCNN', 'MaskRCNN', 'CascadeRCNN'),",
        ),
        ("model = dict(type='Faster\x1b[2JRCNN')", r"got 'Faster\x1b[2JRCNN'"),
        (3, "meta: cfg: expected the text of a config, got 3"),
        (["a"], "meta: cfg: expected the text of a config, got ['a']"),
    ],
)
def test_texts_that_cannot_be_read_are_named_and_nothing_runs(tmp_path, monkeypatch, text, message):
    path = mmdet_file(tmp_path, small_model(), text)
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(path, "cpu")
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).isprintable()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("mean=[123.675, 116.28, 103.53]", "mean=[0, 0, 0]", "pixel_mean"),
        ("std=[58.395, 57.12, 57.375]", "std=[1, 1, 1]", "pixel_std"),
        ("bgr_to_rgb=True", "bgr_to_rgb=False", "pixel_mean"),
        ("scales=[8]", "scales=[4]", "anchor_scale"),
        ("ratios=[0.5, 1.0, 2.0]", "ratios=[1, 2, 3]", "anchor_ratios"),
        ("sampling_ratio=0", "sampling_ratio=2", "roi_sampling_ratio"),
    ],
)
def test_weights_for_other_images_or_anchors_do_not_fit_a_model(tmp_path, old, new, field):
    assert old in small_text()
    path = mmdet_file(tmp_path, small_model(), small_text().replace(old, new))
    model = small_model()
    for value in model.parameters():
        value.data.zero_()
    with pytest.raises(ValueError, match=rf"epoch_12\.pth: {field}: expected .*, as the model has, got "):
        load_weights(model, path)
    assert all((value == 0).all() for value in model.parameters())
    assert load_weights(model, path, strict=False).loaded
    loaded, _ = load(path, "cpu")
    assert load_weights(FasterRCNN(loaded.config), path).loaded


def test_so_do_weights_of_this_project(tmp_path):
    config = small_model(pixel_mean=(1.0, 2.0, 3.0)).config
    torch.save({"model": small_model().state_dict(), "config": {"model": asdict(config)}}, tmp_path / "last.pt")
    with pytest.raises(
        ValueError, match=r"last\.pt: pixel_mean: expected \(123\.675, .*, as the model has, got \(1\.0"
    ):
        load_weights(small_model(), tmp_path / "last.pt")
    assert not load_weights(FasterRCNN(config), tmp_path / "last.pt").missing


def test_heads_of_a_cascade(tmp_path):
    path = mmdet_file(tmp_path, small_model(CASCADE_MASK), small_text(CASCADE_MASK))
    other = small_model(CASCADE_MASK, num_classes=5)
    message = "expected 5 classes, as the model has, got 3 "
    with pytest.raises(ValueError, match=message) as error:
        load_weights(other, path)
    assert "skip_heads=True" in str(error.value)
    summary = load_weights(other, path, skip_heads=True)
    expected = [f"roi_head.bbox_head.{stage}.fc_cls" for stage in range(3)]
    expected += [f"roi_head.mask_head.{stage}.conv_logits" for stage in range(3)]
    assert set(summary.skipped) == {f"{name}.{kind}" for name in expected for kind in ("weight", "bias")}
    assert all(name.startswith(HEADS) for name in summary.missing)
    for stage in range(3):
        assert f"roi_head.bbox_head.{stage}.fc_reg.weight" in summary.loaded  # one box for all classes


def test_stages_with_other_classes_are_named(tmp_path):
    model = small_model(CASCADE_MASK)
    state = model.state_dict()
    state["roi_head.bbox_head.1.fc_cls.weight"] = torch.zeros(6, 16)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=r"weights\.pth: weights: expected one number of classes in all stages, got \[3, 5"
    ):
        load(tmp_path / "weights.pth", "cpu")


@pytest.mark.parametrize("shape", [(), (16,), (16, 0, 3, 3), (16, 5, 3, 3)])
def test_convolutions_that_are_in_no_groups_are_named(tmp_path, shape):
    state = small_model().state_dict() | {"backbone.layer1.0.conv2.weight": torch.zeros(shape)}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth: weights: expected backbone\.layer1\.0\.conv2\.weight "):
        load(tmp_path / "weights.pth", "cpu")

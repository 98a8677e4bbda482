"""A run that starts from a detector: which model it has, how fast it learns, and what starts anew."""

from dataclasses import asdict, replace

import pytest
import torch

from detector import FasterRCNN
from detector.weights.checkpoint import read_checkpoint, save_weights
from train.build import build, load_initial_weights
from train.command_line import parse
from train.config import PRESETS, Config
from train.distributed import World
from train.fine_tuning import LR_SHARE, adapt_to_weights
from train.going_on import find_given

CPU = World(0, 1, 0, torch.device("cpu"))
CLASSES = ("disc", "ring")
STORED = replace(
    PRESETS["tiny"].model,
    num_classes=len(CLASSES),
    base_channels=16,
    fpn_channels=16,
    fc_channels=24,
    frozen_stages=0,
    anchor_scale=4.0,
    roi_batch_size=32,
    image_scale=(128, 96),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Function: fields of the model in which it differs from `STORED` -> a file with such a detector."""
    folder = tmp_path_factory.mktemp("files")

    def save(**changes):
        path = folder / f"{abs(hash(str(changes)))}.safetensors"
        if not path.exists():
            save_weights(path, FasterRCNN(replace(STORED, **changes)), CLASSES)
        return path

    return save


def adapt(config):
    return adapt_to_weights(replace(config, given=find_given(config)))


def command(*flags):
    return parse(list(map(str, flags)), gpu=False)


@pytest.mark.parametrize("preset", PRESETS)
def test_model_is_the_one_of_the_file_whatever_the_preset(files, tmp_path, preset):
    config, notes = adapt(command("--preset", preset, "--weights", files()))
    assert config.model == STORED
    assert config.data == PRESETS[preset].data
    assert str(files()) in notes[0]


@pytest.mark.parametrize(("preset", "share"), [("coco-1x", LR_SHARE), ("small", LR_SHARE), ("tiny", 1.0)])
def test_learning_rate_is_lower_where_the_width_is_not_the_preset_s(files, preset, share):
    optim = PRESETS[preset].optim
    config, notes = adapt(command("--preset", preset, "--weights", files()))
    assert config.optim == replace(optim, lr=optim.lr * share)
    told = f"0.3 of the preset's {optim.lr:g}, because the network is as wide as 16 base channels"
    assert [told in note for note in notes[1:]] == ([True] if share < 1 else [])


@pytest.mark.parametrize("preset", ["coco-1x", "small"])
def test_model_of_a_file_of_mmdetection_is_inferred(tmp_path, preset):
    model = replace(STORED, norm="bn", dcn="v1")
    torch.save({"state_dict": FasterRCNN(model).state_dict()}, tmp_path / "other.pth")
    config, _ = adapt(command("--preset", preset, "--weights", tmp_path / "other.pth"))
    names = ("depth", "dcn", "dcn_stages", "deform_groups", "mask", "base_channels", "fpn_channels", "fc_channels")
    assert [getattr(config.model, name) for name in names] == [getattr(model, name) for name in names]
    recipe = Config().model  # what weights do not show
    assert (config.model.norm_eval, config.model.image_scale) == (recipe.norm_eval, recipe.image_scale)


@pytest.mark.parametrize(
    ("stored", "flags", "expected"),
    [
        pytest.param({}, "--model.mask", {"mask": True}, id="mask"),
        pytest.param({"mask": True}, "--model.no-mask", {"mask": False}, id="no-mask"),
        pytest.param({}, "--model.cascade", {"cascade": True}, id="cascade"),
        pytest.param({"cascade": True, "mask": True}, "--model.no-cascade", {"cascade": False}, id="no-cascade"),
        pytest.param({}, "--model.roi-layer mdpool", {"roi_layer": "mdpool"}, id="roi-layer"),
        pytest.param({"roi_layer": "mdpool"}, "--model.roi-layer dpool", {"roi_layer": "dpool"}, id="without-masks"),
        pytest.param({}, "--model.dcn None", {"dcn": None}, id="plain"),
        pytest.param({}, "--model.dcn v1", {"dcn": "v1"}, id="v1"),
        pytest.param({"dcn": None}, "--model.dcn v2", {"dcn": "v2"}, id="value-of-the-preset"),
        pytest.param({}, "--model.deform-groups=2", {"deform_groups": 2}, id="groups"),
        pytest.param({}, "--model.dcn-stages F F F T", {"dcn_stages": (False, False, False, True)}, id="stages"),
        pytest.param({}, "--model.image-scale 64 64", {"image_scale": (64, 64)}, id="scale"),
        pytest.param({}, "--model.frozen_stages 2", {"frozen_stages": 2}, id="frozen"),
        pytest.param({"norm": "syncbn"}, "--model.norm bn", {"norm": "bn"}, id="norm"),
    ],
)
def test_flag_of_the_model_overrides_the_file_and_the_rest_is_loaded(files, tmp_path, stored, flags, expected):
    path = files(**stored)
    flags = flags.replace(" F", " False").replace(" T", " True")
    config, notes = adapt(command("--preset", "small", *flags.split(), "--weights", path))
    assert config.model == replace(STORED, **{**stored, **expected})
    flag = flags.split()[0].split("=")[0].replace("no-", "").replace("_", "-")
    assert f"but for {flag} " in notes[0]

    state, _ = build(config, CPU)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    load_initial_weights(state, config, CLASSES)
    from_file = read_checkpoint(path).state
    for name, value in state.model.state_dict().items():
        is_in_file = name in from_file and from_file[name].shape == value.shape
        assert torch.equal(value, from_file[name] if is_in_file else before[name]), name
        assert is_in_file or any(part in name for part in ("conv_offset", "mask_head", "bbox_head", "roi_extractor"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model.depth 50", "--model.depth: expected 18, as in FILE, got 50"),
        ("--model.norm bn", "--model.norm: expected gn, as in FILE, got bn"),
        ("--model.width-per-group 128", "--model.width-per-group: expected 64, as in FILE, got 128"),
    ],
)
def test_flag_that_does_not_fit_the_weights_is_named(files, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message.replace("FILE", str(files()))):
        adapt(command(*flags.split(), "--weights", files()))


@pytest.mark.parametrize("name", ["pixel_mean", "pixel_std"])
def test_images_are_normalized_as_those_of_the_file(files, name):
    model = replace(STORED, pixel_mean=(1.0, 2.0, 3.0), pixel_std=(4.0, 5.0, 6.0))
    path = files(pixel_mean=model.pixel_mean, pixel_std=model.pixel_std)
    assert adapt(command("--preset", "small", "--weights", path))[0].model == model

    asked = replace(PRESETS["small"].model, **{name: (7.0, 8.0, 9.0)})
    with pytest.raises(ValueError, match=rf"^model\.{name}: expected .*, as in .*, got \(7\.0, 8\.0, 9\.0\): the wei"):
        adapt(replace(PRESETS["small"], weights=path, model=asked))


def test_values_that_differ_from_the_preset_were_asked_for_in_python(files, tmp_path):
    small = replace(PRESETS["small"], weights=files())
    asked = replace(
        small, model=replace(small.model, max_detections=7), optim=replace(small.optim, lr=0.5, weight_decay=0.25)
    )
    config, notes = adapt(asked)
    assert config.model == replace(STORED, max_detections=7)
    assert (config.optim.lr, config.optim.weight_decay) == (0.5, 0.25)
    assert "but for model.max_detections 7 (100 in the file)" in notes[0]
    assert len(notes) == 1

    wide = replace(small, model=replace(small.model, fc_channels=48))
    with pytest.raises(ValueError, match=r"^model\.fc_channels: expected 24, as in .*, got 48"):
        adapt(wide)


def test_learning_rate_that_was_asked_for_stays(files, tmp_path):
    lr = PRESETS["small"].optim.lr
    config, notes = adapt(command("--preset", "small", "--optim.lr", lr, "--weights", files()))
    assert config.optim.lr == lr
    assert len(notes) == 1


def test_weights_of_a_backbone_keep_the_model_of_the_preset(files, tmp_path):
    state = {
        name.removeprefix("backbone."): value
        for name, value in read_checkpoint(files()).state.items()
        if name.startswith("backbone.")
    }
    torch.save(state, tmp_path / "backbone.pth")
    config = command("--preset", "coco-1x", "--weights", tmp_path / "backbone.pth")
    assert adapt(config) == (config, [])
    assert adapt(command("--preset", "tiny")) == (command("--preset", "tiny"), [])


def test_file_must_be_whole(files, tmp_path):
    state = dict(read_checkpoint(files()).state)
    del state["rpn_head.rpn_conv.weight"]
    torch.save({"model": state, "config": asdict(STORED)}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="names missing in the file: 1 .rpn_head.rpn_conv.weight"):
        adapt(command("--weights", tmp_path / "part.pt"))

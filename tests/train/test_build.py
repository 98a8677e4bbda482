import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import train.build
import train.pretrained
from detector import Batch, FasterRCNNConfig
from train.build import build, load_initial_weights, prepare_initial_weights, uses_sync_batch_norm
from train.checkpoint import save_checkpoint
from train.config import PRESETS
from train.distributed import SharedError, World
from train.pretrained import FILES, imagenet_file

CPU = World(0, 1, 0, torch.device("cpu"))
CONFIG = PRESETS["tiny"]


def with_norm(norm):
    return replace(CONFIG, model=replace(CONFIG.model, norm=norm), optim=replace(CONFIG.optim, ema=0.9))


@pytest.mark.parametrize(
    ("norm", "size", "device", "expected"),
    [
        ("syncbn", 2, "cuda:1", True),
        ("syncbn", 1, "cuda:0", False),
        ("syncbn", 1, "cpu", False),
        ("bn", 2, "cuda:1", False),
        ("gn", 2, "cuda:1", False),
    ],
)
def test_which_runs_synchronize(norm, size, device, expected):
    assert uses_sync_batch_norm(with_norm(norm), World(0, size, 0, torch.device(device))) == expected


def test_one_process_has_plain_batch_norm():
    kinds = [{type(module) for module in build(with_norm(norm), CPU)[0].model.modules()} for norm in ("syncbn", "bn")]
    assert kinds[0] == kinds[1]
    assert nn.BatchNorm2d in kinds[0]


def test_synchronized_model_has_the_names_and_values_of_bn(monkeypatch):
    plain = build(with_norm("bn"), CPU)[0]
    monkeypatch.setattr(train.build, "uses_sync_batch_norm", lambda config, world: True)
    state, network = build(with_norm("syncbn"), CPU)
    assert network is state.model
    for one, two in ((plain.model, state.model), (plain.average.module, state.average.module)):
        norms = [type(module) for module in one.modules() if isinstance(module, nn.BatchNorm2d)]
        assert [type(module) for module in two.modules()].count(nn.SyncBatchNorm) == len(norms) > 0
        assert not any(isinstance(module, nn.BatchNorm2d) for module in two.modules())
        values = two.state_dict()
        assert list(values) == list(one.state_dict())
        assert all(torch.equal(value, values[name]) for name, value in one.state_dict().items())
    trained = {id(part) for group in state.optimizer.param_groups for part in group["params"]}
    assert all(id(part) in trained for part in state.model.parameters())
    batch = Batch(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]]), None)
    assert len(state.model.eval()(batch)) == 1  # evaluation needs no GPU


IMAGENET = replace(
    PRESETS["coco-1x"],
    model=FasterRCNNConfig(depth=18, num_classes=2, base_channels=16, fpn_channels=16, fc_channels=16),
    optim=replace(CONFIG.optim, ema=0.9),
)


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """The folder of torch.hub's cache; nobody answers where files are fetched."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(train.pretrained, "BASE_URL", "http://127.0.0.1:9")
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_imagenet_weights_of_the_cache_are_loaded(cache, monkeypatch):
    backbone = build(replace(IMAGENET, seed=7), CPU)[0].model.backbone.state_dict()
    file = {name: value for name, value in backbone.items() if ".conv_offset." not in name}
    torch.save({**file, "fc.weight": torch.zeros(1000, 128), "fc.bias": torch.zeros(1000)}, cache / "new.pth")
    digest = hashlib.sha256((cache / "new.pth").read_bytes()).hexdigest()
    monkeypatch.setitem(FILES, 18, f"resnet18-{digest[:8]}.pth")
    (cache / "new.pth").rename(imagenet_file(18))

    prepare_initial_weights(IMAGENET, CPU)
    state, _ = build(IMAGENET, CPU)
    origin, notes = load_initial_weights(state, IMAGENET, ["a", "b"])
    assert origin.startswith(f"ImageNet, {len(file)} tensors loaded into the backbone from torchvision's file")
    assert origin.endswith(f"{imagenet_file(18)}, SHA-256 checked")
    assert notes == []
    for model in (state.model, state.average.module):
        loaded = model.backbone.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in file.items())


def test_only_a_new_run_needs_imagenet_weights(cache, tmp_path):
    with pytest.raises(SharedError, match="cannot fetch"):
        prepare_initial_weights(replace(IMAGENET, out=tmp_path / "new"), CPU)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    save_checkpoint(tmp_path / "run" / "checkpoints", {"step": 4}, keep=1)
    prepare_initial_weights(replace(IMAGENET, out=tmp_path / "run"), CPU)
    prepare_initial_weights(replace(IMAGENET, out=tmp_path / "new", weights="none"), CPU)


def test_file_to_start_from_is_looked_for_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--weights: expected a file, got w\.pt"):
        prepare_initial_weights(replace(CONFIG, weights=Path("w.pt"), out=tmp_path / "new"), CPU)

from dataclasses import replace

import pytest
import torch
from torch import nn

import train.build
from detector import Batch
from train.build import build, uses_sync_batch_norm
from train.config import PRESETS
from train.distributed import World

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
    for one, two in ((plain.model, state.model), (plain.average, state.average)):
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

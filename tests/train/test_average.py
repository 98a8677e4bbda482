"""The average of the weights: the numbers of torch's own, of all parameters at once."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from train.average import WeightAverage


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_average_equals_torchs(dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(2, 2).double()).to(dtype)
    model[2].double()
    model[0].bias.requires_grad_(False)
    average = WeightAverage(model, 0.9)
    expected = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
    for step in range(4):
        with torch.no_grad():
            for value in (*model.parameters(), *model.buffers()):
                value += torch.rand_like(value.double()).to(value.dtype)
        average.take_in(is_first=step == 0)
        expected.update_parameters(model)
    state = average.module.state_dict()
    for name, value in expected.module.state_dict().items():
        assert torch.equal(state[name], value), name


def test_copies_of_model_and_average_belong_together():
    model = nn.Linear(2, 2)
    pair = copy.deepcopy((model, WeightAverage(model, 0.5)))
    with torch.no_grad():
        pair[0].weight.fill_(7)
    pair[1].take_in(is_first=True)
    assert (pair[1].module.weight == 7).all()
    assert not (model.weight == 7).any()

import math
from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from detector import FasterRCNN, FasterRCNNConfig
from train.config import OptimConfig
from train.schedule import Schedule, make_optimizer, set_learning_rate


def test_rates_equal_mmengine(golden):
    expected = golden("train")[0]["lr_table_60_per_epoch"]
    schedule = Schedule(OptimConfig(), 16, 12)
    got = [schedule.learning_rate(step, step / 60) for step in range(720)]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_scales_linearly_with_the_batch():
    assert Schedule(OptimConfig(lr=0.02), 4, 12).peak_lr == pytest.approx(0.005)
    assert Schedule(OptimConfig(lr=0.02), 64, 12).learning_rate(10_000, 0) == pytest.approx(0.08)


def test_first_and_last_step_of_the_warm_up():
    schedule = Schedule(OptimConfig(warmup=500), 16, 12)
    assert schedule.learning_rate(0, 0) == pytest.approx(0.02 * 0.001)
    assert schedule.learning_rate(499, 0) == pytest.approx(0.02)
    assert Schedule(OptimConfig(warmup=0), 16, 12).learning_rate(0, 0) == pytest.approx(0.02)


def test_milestones_fall_at_the_start_of_an_epoch():
    schedule = Schedule(OptimConfig(), 16, 12)
    assert schedule.learning_rate(9999, 8 - 1e-9) == pytest.approx(0.02)
    assert schedule.learning_rate(9999, 8) == pytest.approx(0.002)
    assert schedule.learning_rate(9999, 11.5) == pytest.approx(0.0002)


def test_cosine_ends_at_zero():
    schedule = Schedule(replace(OptimConfig(), schedule="cosine"), 16, 10)
    assert schedule.learning_rate(9999, 5) == pytest.approx(0.01)
    assert schedule.learning_rate(9999, 10) == pytest.approx(0)
    assert schedule.learning_rate(9999, 2.5) == pytest.approx(0.01 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizer_has_what_is_trained(name):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = make_optimizer(model, OptimConfig(name=name, weight_decay=0.1))
    (group,) = optimizer.param_groups
    assert group["params"] == list(model[1].parameters())
    assert group["weight_decay"] == 0.1
    set_learning_rate(optimizer, 0.3)
    assert group["lr"] == 0.3


def test_layers_that_predict_offsets_have_their_share():
    model = FasterRCNN(FasterRCNNConfig(depth=18, base_channels=16, num_classes=2, fpn_channels=16, fc_channels=16))
    optimizer = make_optimizer(model, OptimConfig(offset_lr=0.1))
    set_learning_rate(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(trained)
    for name, parameter in trained.items():
        assert rates[id(parameter)] == pytest.approx(0.05 if "conv_offset" in name else 0.5)

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from detector import Batch, FasterRCNN, FasterRCNNConfig, Target
from train.config import Config, OptimConfig
from train.schedule import Schedule, choose_warmup, make_optimizer, set_learning_rate, start_momentum, unreached_rates


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


@pytest.mark.parametrize(
    ("warmup", "epochs", "steps_per_epoch", "expected"),
    [
        (500, 12, 7330, 500),  # the published recipe
        (500, 12, 417, 500),
        (500, 12, 416, 499),
        (500, 12, 25, 30),
        (50, 6, 291, 50),  # the preset small on the generated set
        (4, 1, 4, 0),
        (0, 1, 1, 0),
    ],
)
def test_warm_up_takes_a_tenth_of_the_run_at_most(warmup, epochs, steps_per_epoch, expected):
    for max_steps in (0, 7):  # which only stop the run
        config = Config(epochs=epochs, max_steps=max_steps, optim=OptimConfig(warmup=warmup))
        got, notes = choose_warmup(config, steps_per_epoch, None)
        assert got == expected
        assert len(notes) == int(expected < warmup)
        assert all(f"shortened from {warmup} to {expected} (steps)" in note for note in notes)


@pytest.mark.parametrize("recorded", [500, 30, 0])
def test_run_that_goes_on_keeps_its_warm_up(recorded):
    assert choose_warmup(Config(epochs=1), 25, recorded) == (recorded, [])


STEPS = OptimConfig()
COSINE = OptimConfig(schedule="cosine")


@pytest.mark.parametrize(
    ("optim", "epochs", "steps_per_epoch", "max_steps", "expected"),
    [
        pytest.param(STEPS, 12, 7330, 0, [], id="recipe"),
        pytest.param(STEPS, 12, 7330, 12 * 7330, [], id="as-many-steps"),
        pytest.param(STEPS, 6, 7330, 0, ["not fall after epoch 8, 11: the run has 6 x 7330 steps"], id="6-epochs"),
        pytest.param(STEPS, 11, 7330, 0, ["does not fall after epoch 11: the run has 11 x 7330"], id="11-epochs"),
        pytest.param(replace(STEPS, milestones=()), 6, 7330, 0, [], id="no-milestones"),
        pytest.param(STEPS, 12, 7330, 9 * 7330, ["epoch 11: --max-steps ends the run after 65970"], id="max-steps"),
        pytest.param(STEPS, 12, 7330, 8 * 7330, ["does not fall after epoch 8, 11: --max"], id="to-the-milestone"),
        pytest.param(
            STEPS,
            12,
            7330,
            100,
            [
                "peak 0.02, 0.003984 at most: the warm-up takes 500 steps, and --max-steps ends",
                "after epoch 8, 11: --max",
            ],
            id="inside-the-warm-up",
        ),
        pytest.param(STEPS, 12, 7330, 499, ["peak 0.02, 0.01996 at most", "8, 11"], id="one-step-too-few"),
        pytest.param(STEPS, 12, 7330, 500, ["8, 11"], id="the-whole-warm-up"),
        pytest.param(
            STEPS,
            12,
            25,
            0,
            ["0.02, 0.007988 at most: the warm-up takes 500 steps, and the run"],
            id="old-run",
        ),
        pytest.param(
            replace(STEPS, milestones=(1, 2)),
            3,
            300,
            0,
            ["peak 0.02, 0.01199 at most: .* its falls begin"],
            id="early-fall",
        ),
        pytest.param(COSINE, 12, 7330, 0, [], id="cosine"),
        pytest.param(replace(COSINE, warmup=0), 1, 1, 0, [], id="cosine-of-one-step"),
        pytest.param(replace(COSINE, warmup=5), 10, 5, 0, [], id="cosine-with-the-longest-warm-up"),
        pytest.param(replace(COSINE, warmup=1), 1, 10, 0, [], id="warm-up-of-one-step"),
        pytest.param(replace(COSINE, warmup=9), 2, 99, 99, ["falls to 0.01016, not to 0: --max"], id="cosine-stopped"),
    ],
)
def test_rates_that_are_never_reached(optim, epochs, steps_per_epoch, max_steps, expected):
    schedule = Schedule(optim, 16, epochs)
    lines = unreached_rates(schedule, steps_per_epoch, max_steps)
    assert len(lines) == len(expected)
    for line, text in zip(lines, expected, strict=True):
        assert re.search(text, line)


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


def test_fused_sgd_after_a_first_step_with_infinite_gradients():
    """PyTorch's own momenta would be what was in memory before."""
    dirty = torch.full((4096,), 7e20)
    del dirty
    weight = torch.nn.Parameter(torch.ones(4096))
    plain_weight = torch.nn.Parameter(torch.ones(4096))
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.01, fused=True)
    start_momentum(sgd)
    plain_sgd = torch.optim.SGD([plain_weight], lr=0.1, momentum=0.9, weight_decay=0.01, fused=False)
    for optimizer, parameter in ((sgd, weight), (plain_sgd, plain_weight)):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor in (float("inf"), 1.0, 2.0):
            optimizer.zero_grad()
            scaler.scale((parameter * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(weight, plain_weight)


def test_fused_adamw_takes_the_steps_of_the_plain_one():
    """PyTorch's fused step on a CPU reads gradients in the order of memory: they must be stored as the weights are."""
    config = FasterRCNNConfig(depth=18, base_channels=16, num_classes=2, fpn_channels=16, fc_channels=16)
    model = FasterRCNN(config).to(memory_format=torch.channels_last)
    target = Target(torch.tensor([[4.0, 4.0, 40.0, 50.0]]), torch.tensor([1]))
    images = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    sum(model(Batch(images, torch.tensor([[64, 64]]), [target])).values()).backward()

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in trained]
    optimizer = make_optimizer(model, OptimConfig(name="adamw", lr=0.01))
    plain = torch.optim.AdamW(copies, 0.01, weight_decay=OptimConfig().weight_decay, fused=False)
    for parameter, copy in zip(trained, copies, strict=True):
        copy.grad = parameter.grad
    for _ in range(2):
        optimizer.step()
        plain.step()
    for parameter, copy in zip(trained, copies, strict=True):
        torch.testing.assert_close(parameter, copy, rtol=1e-5, atol=1e-6)

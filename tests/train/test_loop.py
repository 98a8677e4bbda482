import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from detector import Batch, FasterRCNNConfig, Target
from tests.detector.golden_model import assert_summary, golden_detector, make_batch
from train.average import WeightAverage
from train.checkpoint import TrainState
from train.config import OptimConfig
from train.data.collate import LoadedBatch
from train.distributed import World
from train.log import TrainLog
from train.loop import train_one_epoch
from train.run_folder import RunFolder
from train.schedule import Schedule, make_optimizer

WORLD = World(0, 1, 0, torch.device("cpu"))
LOSSES = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", None, "loss")  # columns of the golden losses


def train_on(model, loaded, tmp_path, optim, batches=None, average=None, **options):
    """Run `train_one_epoch` over a list; return the state and the lines of metrics.jsonl."""
    state = TrainState(model, make_optimizer(model, optim), torch.amp.GradScaler("cpu", enabled=False), average)
    total = batches or len(loaded)
    tmp_path.mkdir(exist_ok=True)
    folder = RunFolder(tmp_path)
    log = TrainLog(folder, WORLD, interval=1, total_steps=total, first_step=0, num_images=10_000)
    schedule = Schedule(optim, 16, 1)
    for _ in train_one_epoch(state, model, loaded, schedule, log, batches_per_epoch=total, **options):
        pass
    log.close()
    return state, [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def golden_model(parameters, variant):
    model = golden_detector(FasterRCNNConfig(sampler="deterministic"), parameters["spec"]["salt"]).double()
    with torch.no_grad():
        for name, value in model.named_parameters():
            for prefix, factor in parameters["scale_after_fill"].items():
                if name.startswith(prefix) and name.endswith("weight"):
                    value *= factor
            if parameters["variants"][variant]["zero_offset"] and "conv_offset" in name:
                value.zero_()
    return model


def golden_batches(arrays, parameters, count):
    batches = []
    for i in range(count):
        numbers = parameters["spec"]["batches"][i % 4]
        valid = [~arrays[f"img{number}.gt_ignore"] for number in numbers]
        boxes = [arrays[f"img{number}.gt_bboxes"][keep] for number, keep in zip(numbers, valid, strict=True)]
        labels = [arrays[f"img{number}.gt_labels"][keep] for number, keep in zip(numbers, valid, strict=True)]
        images = [arrays[f"img{number}.image_bgr"] for number in numbers]
        batches.append(LoadedBatch(make_batch(images, boxes, labels, torch.float64), list(numbers), [], [], {}))
    return batches


def check_golden_training(golden, tmp_path, variant, count):
    arrays, parameters = golden("train")
    spec = parameters["variants"][variant]
    model = golden_model(parameters, variant)
    optim = OptimConfig(lr=spec["lr"], warmup=spec["warmup"], milestones=())
    first = {}

    def keep_first(optimizer, *_):
        if not first:
            first.update((name, value.grad.clone()) for name, value in model.named_parameters() if value.requires_grad)

    hook = register_optimizer_step_pre_hook(keep_first)
    try:
        _, lines = train_on(model, golden_batches(arrays, parameters, count), tmp_path, optim)
    finally:
        hook.remove()
    np.testing.assert_allclose([line["lr"] for line in lines], arrays[f"{variant}.lr"][:count], rtol=1e-12)
    for column, name in enumerate(LOSSES):
        if name:
            got = [line[name] for line in lines]
            expected = arrays[f"{variant}.losses"][:count, column]
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6, err_msg=name)
    prefix = f"{variant}.first_grad."
    suffix = ".stats"
    keys = [key for key in arrays if key.startswith(prefix) and key.endswith(suffix)]
    names = [key.removeprefix(prefix).removesuffix(suffix) for key in keys]
    assert names
    for name in names:
        assert_summary(arrays, f"{variant}.first_grad.{name}", first[name], 128, 1e-8)
        if count == parameters["iters"]:
            assert_summary(arrays, f"{variant}.end.{name}", model.get_parameter(name), 256, 1e-8)


@pytest.mark.parametrize(("variant", "count"), [("short", 8), ("zero_offset", 1)])
def test_training_equals_mmdetection(golden, tmp_path, variant, count):
    check_golden_training(golden, tmp_path, variant, count)


@pytest.mark.parametrize("variant", ["warmup500", "short", "zero_offset"])
def test_rates_equal_mmdetections(golden, variant):
    arrays, parameters = golden("train")
    spec = parameters["variants"][variant]
    schedule = Schedule(OptimConfig(lr=spec["lr"], warmup=spec["warmup"], milestones=()), 16, 1)
    rates = [schedule.learning_rate(step, step / parameters["iters"]) for step in range(parameters["iters"])]
    np.testing.assert_allclose(rates, arrays[f"{variant}.lr"], rtol=1e-12)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", ["warmup500", "short", "zero_offset"])
def test_whole_training_equals_mmdetection(golden, tmp_path, variant):
    check_golden_training(golden, tmp_path, variant, golden("train")[1]["iters"])


class Toy(nn.Module):
    """A stand-in for the detector: two losses of the mean color."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, batch):
        color = batch.images.to(self.layer.weight.dtype).mean((2, 3)) / 255
        out = self.layer(color)
        box_means = torch.stack([target.boxes.mean() for target in batch.targets]).to(out.dtype)
        return {
            "loss_cls": (out[:, 0] - 1).square().mean(),
            "loss_bbox": (out[:, 1] - box_means).square().mean(),
        }


def toy_batches(count, size, first=0):
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (count * size, 3, 32, 32), generator=generator, dtype=torch.uint8)
    loaded = []
    for i in range(0, count * size, size):
        boxes = torch.arange(i, i + size)[:, None, None] / 10 + torch.tensor([-1.0, -1.0, 1.0, 1.0])  # means: j / 10
        targets = [Target(box, torch.tensor([0])) for box in boxes]
        batch = Batch(images[i : i + size], torch.full((size, 2), 32), targets)
        loaded.append(LoadedBatch(batch, list(range(i, i + size)), [(2.0, 2.0)] * size, [(50, 50)] * size, {}))
    return loaded[first:]


def toy(seed=0):
    torch.manual_seed(seed)
    return Toy()


OPTIM = OptimConfig(lr=0.1, warmup=0, milestones=())


def test_accumulated_batches_equal_the_larger_one(tmp_path):
    whole, _ = train_on(toy(), toy_batches(3, 4), tmp_path / "a", OPTIM)
    parts, lines = train_on(toy(), toy_batches(6, 2), tmp_path / "b", OPTIM, accumulate=2)
    assert parts.step == whole.step == 3
    assert len(lines) == 3
    for one, two in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


def test_last_step_of_an_epoch_takes_what_is_left(tmp_path):
    state, lines = train_on(toy(), toy_batches(5, 1), tmp_path, OPTIM, accumulate=3)
    assert (state.step, state.epoch, state.batch) == (2, 1, 0)
    plain = toy()
    (group,) = [torch.stack([sum(plain(loaded.batch).values()) for loaded in toy_batches(5, 1)[:3]])]
    assert lines[0]["loss"] == pytest.approx(group.mean().item(), rel=1e-6)


def test_average_follows_slowly(tmp_path):
    model = toy()
    start = model.layer.weight.detach().clone()
    average = WeightAverage(model, 0.9)
    state, _ = train_on(model, toy_batches(20, 2), tmp_path, OPTIM, average=average)
    moved = (model.layer.weight - start).norm()
    assert state.evaluated_model is average.module
    assert 0 < (average.module.layer.weight - start).norm() < moved


def test_clipping_bounds_the_step(tmp_path):
    model = toy()
    before = torch.cat([value.detach().flatten().clone() for value in model.parameters()])
    optim = OptimConfig(lr=1.0, momentum=0, weight_decay=0, warmup=0, milestones=())
    train_on(model, toy_batches(1, 2), tmp_path, optim, clip_grad=1e-3)
    after = torch.cat([value.detach().flatten() for value in model.parameters()])
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_amp_trains_in_bfloat16(tmp_path):
    _, plain = train_on(toy(), toy_batches(3, 2), tmp_path / "a", OPTIM)
    _, half = train_on(toy(), toy_batches(3, 2), tmp_path / "b", OPTIM, precision="bf16")
    assert half[-1]["loss"] != plain[-1]["loss"]
    assert half[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=0.05)


def test_nan_stops_before_anything_is_saved(tmp_path):
    model = toy()
    with torch.no_grad():
        model.layer.bias[1] = float("nan")
    with pytest.raises(FloatingPointError, match="loss_bbox is nan at step 1 .epoch 1., images 0, 1"):
        train_on(model, toy_batches(2, 2), tmp_path, OPTIM)


def test_each_step_has_its_own_seed(tmp_path):
    drawn = []

    class Random(Toy):
        def forward(self, batch):
            drawn.append(torch.rand(1).item())
            return super().forward(batch)

    train_on(Random(), toy_batches(3, 1), tmp_path / "a", OPTIM, seed=1)
    first = drawn.copy()
    drawn.clear()
    assert len(set(first)) == 3
    train_on(Random(), toy_batches(3, 1), tmp_path / "b", OPTIM, seed=1)
    assert drawn == first


@pytest.mark.parametrize(
    ("batches", "accumulate", "text"), [(3, 1, "3 in epoch 1, got 2"), (5, 2, "5 in epoch 1, got 2")]
)
def test_loader_that_ends_early_is_an_error(tmp_path, batches, accumulate, text):
    """The caller would otherwise ask for the rest of the epoch without end."""
    with pytest.raises(ValueError, match=f"batches: expected {text}"):
        train_on(toy(), toy_batches(2, 2), tmp_path, OPTIM, batches=batches, accumulate=accumulate)


def test_loader_without_batches_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="batches: expected 2 in epoch 1, got 0"):
        train_on(toy(), [], tmp_path, OPTIM, batches=2)

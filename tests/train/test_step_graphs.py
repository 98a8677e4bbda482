"""Steps from graphs beside steps without; `tests/replay.py` stands in for CUDA graphs."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from detector import Batch, FasterRCNN, FasterRCNNConfig, Target
from detector.graph import CudaRecorder
from detector.structures import NO_OBJECT
from tests.replay import OperatorRecorder
from train.average import WeightAverage
from train.checkpoint import TrainState, from_checkpoint, to_checkpoint
from train.config import OptimConfig
from train.data.collate import LoadedBatch
from train.distributed import World
from train.loop import train_one_epoch
from train.schedule import Schedule, make_optimizer, prepare_for_graphs
from train.step_graphs import Grid, StepGraphs, copy_batch

WORLD = World(0, 1, 0, torch.device("cpu"))
MODEL = FasterRCNNConfig(
    depth=18,
    num_classes=3,
    base_channels=16,
    norm="gn",
    norm_eval=False,
    frozen_stages=-1,
    fpn_channels=16,
    fc_channels=16,
    rpn_batch_size=16,
    rpn_pre_nms_top_n=(50, 50),
    rpn_post_nms_top_n=20,
    roi_batch_size=16,
    image_scale=(96, 64),
)
GRID = Grid.from_scale(MODEL.image_scale)
SIZES = [(64, 96), (50, 90), (30, 64), (64, 96), (64, 60), (64, 96), (32, 60), (64, 64)]


class Log:
    """Keeps the losses of every batch and the learning rate of every step."""

    def __init__(self):
        self.losses = []
        self.rates = []

    def start_epoch(self):
        pass

    def watch_loading(self, batches):
        return batches

    def add_batch(self, losses, share, loaded):
        self.losses.append([share, *(loss.clone() for loss in losses.values())])

    def end_step(self, step, epoch, rate):
        self.rates.append(rate)


def make_batch(size, seed, masks=False):
    """Return one image of a size (height, width) and one that is a little smaller, with 1 and 0 to 2 boxes."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    shape = (2, 3, -(-height // 32) * 32, -(-width // 32) * 32)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    targets = []
    for count in (1, seed % 3):
        corners = torch.rand(count, 2, generator=generator) * 20
        boxes = torch.cat([corners, corners + 10 + torch.rand(count, 2, generator=generator) * 20], 1)
        bitmaps = torch.ones(count, height, width, dtype=torch.uint8) if masks else None
        targets.append(Target(boxes, torch.randint(3, (count,), generator=generator), bitmaps))
    seeds = torch.tensor([seed, seed + 1])
    return Batch(images, torch.tensor([size, (height - 5, width - 9)]), targets, seeds)


def padded(batch):
    """Return the batch as the graphs see it, in tensors of its own."""
    into = GRID.shape_of(batch).empty_batch(batch)
    copy_batch(batch, into)
    return into


def loaded(batch):
    return LoadedBatch(batch, [0, 1], [(1.0, 1.0)] * 2, [(64, 96)] * 2, {})


def make_state(make_model=lambda: FasterRCNN(MODEL), optim="sgd", ema=0.0, graph=False, device="cpu"):
    torch.manual_seed(0)
    model = make_model().to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, OptimConfig(name=optim))
    for group in optimizer.param_groups:
        group["fused"] = True  # as on a GPU
    if graph:
        prepare_for_graphs(optimizer)
    average = WeightAverage(model, ema) if ema else None
    return TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), average)


def make_graphs(state, recorder, clip_grad=0.0, world=WORLD, max_graphs=9, told=None):
    tell = (told if told is not None else []).append
    return StepGraphs(
        state, GRID, recorder, world, clip_grad=clip_grad, autocast=nullcontext, tell=tell, max_graphs=max_graphs
    )


def train(state, batches, graphs=None, batches_per_epoch=None, **options):
    """Take the steps of an epoch, or of its rest; return the log."""
    log = Log()
    schedule = Schedule(OptimConfig(lr=0.02, warmup=4, milestones=()), 16, 1)
    total = batches_per_epoch or len(batches)
    for _ in train_one_epoch(
        state, state.model, map(loaded, batches), schedule, log, batches_per_epoch=total, graphs=graphs, **options
    ):
        pass
    return log


def assert_equal(log, expected_log, state, expected_state):
    """Check that two runs are equal, bit for bit."""
    assert log.rates == expected_log.rates
    assert log.losses == expected_log.losses
    for one, other in zip(state.model.parameters(), expected_state.model.parameters(), strict=True):
        assert torch.equal(one, other)
    content = to_checkpoint(state, {})
    expected = to_checkpoint(expected_state, {})
    for name, value in expected["model"].items():
        assert torch.equal(content["model"][name], value), name
    for index, slots in expected["optimizer"]["state"].items():
        for slot, value in slots.items():
            assert torch.equal(content["optimizer"]["state"][index][slot], value), (index, slot)
    for key in ("epoch", "batch", "step", "averaged"):
        assert content.get(key) == expected.get(key)


class Toy(nn.Module):
    """A stand-in for the detector: two losses of color, size and boxes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, batch):
        colors = batch.images.float().mean((2, 3)) / 255
        heights = batch.sizes[:, :1] / 64
        inputs = torch.cat([colors, heights], 1)
        self.mean += inputs.mean(0)
        outputs = self.layer(inputs)
        is_object = torch.stack([target.labels for target in batch.targets]) != NO_OBJECT
        boxes = torch.stack([target.boxes for target in batch.targets]) / 64
        box_means = torch.where(is_object[:, :, None], boxes, 0).sum((1, 2))
        return {
            "loss_cls": (outputs[:, 0] - 1).square().mean(),
            "loss_bbox": (outputs[:, 1] - box_means).abs().mean(),
        }


def compare(state, graph_state, sizes=SIZES, accumulate=1, clip_grad=0.0, masks=False):
    """Train on batches of these sizes without graphs and with them; check that both are equal."""
    batches = [make_batch(size, seed, masks) for seed, size in enumerate(sizes)]
    expected_log = train(state, [padded(batch) for batch in batches], accumulate=accumulate, clip_grad=clip_grad)
    assert torch.isfinite(torch.tensor(expected_log.losses)).all()

    recorder = OperatorRecorder()
    log = train(graph_state, batches, make_graphs(graph_state, recorder, clip_grad), accumulate=accumulate)
    assert_equal(log, expected_log, graph_state, state)
    return recorder


@pytest.mark.parametrize(
    ("optim", "clip_grad", "ema", "accumulate"),
    [
        ("sgd", 0.0, 0.0, 1),
        ("sgd", 0.5, 0.9, 3),
        ("adamw", 0.0, 0.9, 1),
        ("adamw", 0.5, 0.0, 3),
    ],
)
def test_steps_from_graphs_equal_steps_without(optim, clip_grad, ema, accumulate):
    """Shapes change; a learning rate that changes with every step reaches the recorded update."""
    state = make_state(Toy, optim=optim, ema=ema)
    graph_state = make_state(Toy, optim=optim, ema=ema, graph=True)
    recorder = compare(state, graph_state, SIZES * 2, accumulate, clip_grad)
    assert recorder.recordings > 2
    assert recorder.replays > 2


def test_steps_of_the_detector():
    """Losses, gradients, clipping and update, with deformable layers and the random sampler."""
    sizes = [(64, 96), (40, 64), (50, 90), (64, 96), (64, 50)]
    recorder = compare(make_state(), make_state(graph=True), sizes, clip_grad=0.5)
    assert (recorder.runs, recorder.recordings, recorder.replays) == (3, 3, 4)


def test_steps_of_the_detector_with_masks(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # masks take the way of a GPU

    def make_model():
        return FasterRCNN(replace(MODEL, mask=True, dcn=None))

    sizes = [(64, 96), (50, 90), (40, 70)]
    recorder = compare(make_state(make_model), make_state(make_model, graph=True), sizes, masks=True)
    assert (recorder.runs, recorder.recordings, recorder.replays) == (2, 2, 2)


@pytest.mark.gpu
def test_steps_from_cuda_graphs():
    """Atomic sums round differently from call to call, so the numbers are not equal."""
    device = torch.device("cuda")
    batches = [make_batch(size, seed).to(device) for seed, size in enumerate(SIZES)]
    state = make_state(ema=0.9, device=device)
    expected = train(state, [padded(batch) for batch in batches], clip_grad=0.5)
    graph_state = make_state(ema=0.9, device=device, graph=True)
    graphs = make_graphs(graph_state, CudaRecorder(device), clip_grad=0.5)
    log = train(graph_state, batches, graphs)
    torch.testing.assert_close(torch.tensor(log.losses), torch.tensor(expected.losses), rtol=2e-2, atol=2e-2)
    for name, weight in state.average.module.named_parameters():
        torch.testing.assert_close(graph_state.average.module.get_parameter(name), weight, rtol=1e-2, atol=1e-3)


def test_a_resumed_run(tmp_path):
    """A run that stops in the middle, is saved and goes on in a new process equals the whole one."""
    batches = [make_batch(size, seed) for seed, size in enumerate(SIZES)]
    options = {"batches_per_epoch": len(batches), "accumulate": 2}
    whole = make_state(Toy, optim="adamw", ema=0.9, graph=True)
    train(whole, batches, make_graphs(whole, OperatorRecorder()), **options)

    first = make_state(Toy, optim="adamw", ema=0.9, graph=True)
    with pytest.raises(ValueError, match="expected 8 in epoch 1, got 4"):
        train(first, batches[:4], make_graphs(first, OperatorRecorder()), **options)
    torch.save(to_checkpoint(first, {}), tmp_path / "checkpoint.pt")

    for graph in (True, False):
        second = make_state(Toy, optim="adamw", ema=0.9, graph=graph)
        from_checkpoint(second, torch.load(tmp_path / "checkpoint.pt", weights_only=True))
        graphs = make_graphs(second, OperatorRecorder()) if graph else None
        rest = batches[4:] if graph else [padded(batch) for batch in batches[4:]]
        log = train(second, rest, graphs, **options)
        assert_equal(log, log, second, whole)


def test_real_targets_give_the_losses_of_padded_ones():
    state = make_state()
    batch = make_batch((64, 96), 2)
    losses = state.model.train()(batch)
    for name, loss in state.model(padded(batch)).items():
        assert torch.equal(loss, losses[name])


def test_masks_are_copied_and_what_they_leave_free_is_zero():
    into = GRID.shape_of(make_batch((64, 96), 2)).empty_batch(make_batch((64, 96), 2, masks=True))
    copy_batch(make_batch((64, 96), 2, masks=True), into)
    copy_batch(make_batch((40, 60), 1, masks=True), into)
    for target in into.targets:
        count = (target.labels != NO_OBJECT).sum()
        assert count == 1
        assert target.masks[:count].sum() == 40 * 60
        assert target.masks.shape == (16, 64, 96)


def test_too_many_shapes_are_told_once_and_computed_without_graphs():
    state = make_state(Toy, graph=True)
    recorder = OperatorRecorder()
    told = []
    graphs = make_graphs(state, recorder, max_graphs=1, told=told)
    for size in [(64, 96), (64, 96), (40, 60), (40, 60), (40, 60), (64, 96)]:
        graphs.backward(make_batch(size, 1), 1.0)
    assert (recorder.runs, recorder.recordings, recorder.replays) == (4, 1, 1)
    assert len(graphs._batches) == 1, "batches without a graph do not stay in memory"
    assert told == ["--graph: 1 graphs for as many shapes of batches; further shapes are computed without one"]


def test_several_processes_add_their_gradients_outside_of_the_graphs(monkeypatch):
    """A pretended second process has the same gradients, so the mean of both is that of one."""
    calls = []

    def all_reduce(values):
        calls.append(len(values))
        values *= 2

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    batches = [make_batch(size, seed) for seed, size in enumerate(SIZES)]
    alone = make_state(Toy, graph=True)
    log = train(alone, batches, make_graphs(alone, OperatorRecorder()))
    state = make_state(Toy, graph=True)
    recorder = OperatorRecorder()
    world = World(0, 2, 0, torch.device("cpu"))
    log_of_two = train(state, batches, make_graphs(state, recorder, world=world))
    assert_equal(log_of_two, log, state, alone)
    assert len(calls) == len(batches), "one exchange for each step, also for those from graphs"
    assert recorder.replays > 2


def test_gradients_are_laid_out_as_their_weights():
    state = make_state(graph=True)
    graphs = make_graphs(state, OperatorRecorder())
    for parameter in state.model.parameters():
        assert parameter.grad.stride() == parameter.stride()
        assert parameter.grad.data_ptr() % 256 == graphs._gradients.data_ptr() % 256
    graphs.backward(make_batch((64, 96), 1), 1.0)
    assert all(parameter.grad.any() for parameter in state.model.roi_head.bbox_head.parameters())
    graphs.clear()
    assert not any(parameter.grad.any() for parameter in state.model.parameters())


@pytest.mark.parametrize(
    ("side", "padded_side"),
    [(32, 32), (64, 160), (672, 672), (704, 800), (800, 800), (832, 832), (864, 960), (1088, 1088), (1216, 1216)],
)
def test_sides_of_the_grid(side, padded_side):
    grid = Grid.from_scale((1333, 800))
    assert (grid.long_side, grid.short_side, grid.step) == (1344, 800, 128)
    assert grid.pad_side(side) == padded_side


def test_the_grid():
    grid = Grid.from_scale((1333, 640), (640, 800))
    assert grid == Grid.from_scale((800, 1333))
    assert {grid.pad_side(side) for side in range(32, 1345, 32)} == {
        *[32, 160, 288, 416, 544, 672, 800],
        *[832, 960, 1088, 1216, 1344],
    }
    assert grid.pad_side(1400) == 1408  # longer than any image of the run
    assert Grid.from_scale((256, 256)).step == 32
    assert [grid.pad_count(count) for count in (0, 1, 16, 17, 64, 65, 300)] == [16, 16, 16, 64, 64, 256, 1024]

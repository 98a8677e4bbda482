"""`--compile`: few programs for batches of every shape, and padding that changes no loss."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from detector import Batch, Target
from detector.model.matcher import Matcher
from detector.model.padded_targets import pad_masks, pad_targets
from train.compiled import CompiledNetwork, pad_to_equal_counts


def make_batch(counts, size=(64, 96), masks=False):
    height, width = size
    targets = []
    for index, count in enumerate(counts):
        boxes = torch.rand(count, 2).repeat(1, 2) * 30 + torch.tensor([0.0, 0.0, 20.0, 25.0])
        bitmaps = torch.rand(count, height - 8 * index, width) < 0.5 if masks else None
        targets.append(Target(boxes, torch.randint(3, (count,)), bitmaps))
    images = torch.zeros(len(counts), 3, height, width, dtype=torch.uint8)
    return Batch(images, torch.tensor([size] * len(counts)), targets)


class Assigns(nn.Module):
    """What a model does with targets."""

    def __init__(self):
        super().__init__()
        self.matcher = Matcher(0.7, 0.3, 0.3)

    def forward(self, batch):
        targets = pad_targets(batch.targets, torch.float32)
        height, width = batch.images.shape[2:]
        corners = torch.cartesian_prod(torch.arange(height // 8), torch.arange(width // 8)) * 8
        boxes = torch.cat([corners, corners + 25], 1).float().expand(len(batch.images), -1, -1)
        assigned = self.matcher(targets, boxes, torch.ones(boxes.shape[:2], dtype=torch.bool))
        return {"assigned": assigned, "labels": (targets.labels * targets.valid).sum(1)}


def test_three_programs_for_all_batches(monkeypatch):
    """For the first one, for all sizes of images, for all counts of ground truths."""
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        compile_by = torch.compile
        patch.setattr(torch, "compile", lambda model, options: compile_by(model, backend=counter, fullgraph=True))
        network = CompiledNetwork(Assigns())
    for counts, size in [
        ((2, 5), (64, 96)),
        ((0, 1), (96, 64)),
        ((1, 1), (64, 64)),
        ((0, 0), (64, 96)),
        ((7, 1), (96, 96)),
        ((1, 20), (64, 96)),
    ]:
        batch = make_batch(counts, size)
        expected = Assigns()(batch)
        found = network(batch)
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name])
    assert counter.frame_count == 3


@pytest.mark.parametrize(("counts", "padded_count"), [((3, 0), 16), ((17, 1), 64)])
def test_padding(counts, padded_count):
    batch = make_batch(counts, masks=True)
    padded = pad_to_equal_counts(batch)
    assert [len(target.labels) for target in padded.targets] == [padded_count] * 2

    expected = pad_targets(batch.targets, torch.float32)
    found = pad_targets(padded.targets, torch.float32)
    most = expected.labels.shape[1]
    assert found.valid.sum() == sum(counts)
    for name in ("boxes", "labels", "valid"):
        assert torch.equal(getattr(found, name)[:, :most], getattr(expected, name))
    bitmaps = pad_masks(padded.targets, padded_count, (64, 96), torch.float32)
    assert torch.equal(bitmaps[:, :most], pad_masks(batch.targets, most, (64, 96), torch.float32))


def test_a_compiler_that_fails_is_one_line():
    def no_compiler(graph, inputs):
        raise OSError("No working C++ compiler found\nand more")

    network = CompiledNetwork(Assigns())
    network.compiled = torch.compile(Assigns(), backend=no_compiler)
    message = "^--compile: the compiler failed or was stopped: .*No working C.. compiler found$"
    with pytest.raises(ValueError, match=message):
        network(make_batch([1, 2]))


class _Gathering(nn.Module):
    """Values of a map are gathered beside the map itself, and something else has a gradient."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(64))

    def forward(self, batch):
        x = self.conv(batch.images)
        index = torch.arange(20, device=x.device).expand(*x.shape[:2], 20)
        return {
            "map": x,
            "gathered": x.flatten(2).gather(2, index),
            "other": batch.images[:, 0].flatten(1) * self.scale,
        }


def test_gradients_are_whole_sums():
    """PyTorch 2.13 by itself forgets the part of what is gathered."""
    torch._dynamo.reset()
    model = _Gathering().double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    batch = Batch(images, torch.full((2, 2), 8), [Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))] * 2)
    gradients = []
    for network in (model, CompiledNetwork(model)):
        loss = sum(value.square().sum() for value in network(batch).values())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)

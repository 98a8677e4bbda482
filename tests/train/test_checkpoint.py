import os

import pytest
import torch
from torch import nn

from train.average import WeightAverage
from train.checkpoint import (
    TrainState,
    from_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    mark_best,
    newest_checkpoint,
    save_checkpoint,
    to_checkpoint,
)
from train.config import OptimConfig
from train.schedule import make_optimizer
from train.step import count_step


def make_state(seed=0, average=False):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    averaged = WeightAverage(model, 0.9) if average else None
    state = TrainState(
        model, make_optimizer(model, OptimConfig()), torch.amp.GradScaler("cpu", enabled=False), averaged
    )
    return state


def take_step(state):
    state.optimizer.zero_grad()
    state.model(torch.ones(1, 3)).square().sum().backward()
    state.optimizer.step()
    if state.average is not None:
        state.average.take_in(is_first=state.starts_average)
    count_step(state)
    state.batch += 1


@pytest.mark.parametrize("average", [False, True])
def test_restored_state_goes_on_as_the_saved_one(tmp_path, average):
    state = make_state(0, average)
    other = make_state(1, average)
    take_step(state)
    path = save_checkpoint(tmp_path, to_checkpoint(state, {"classes": ["a"]}), keep=2)
    content = load_checkpoint(path)
    from_checkpoint(other, content)
    assert content["classes"] == ["a"]
    assert (other.step, other.batch, other.epoch) == (1, 1, 0)
    for one in (state, other):
        take_step(one)
    for one, two in zip(state.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(state.evaluated_model.parameters(), other.evaluated_model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_restored_optimizer_state_has_the_strides_of_its_parameters():
    """Earlier versions may have stored others, and a fused optimizer takes no notice of strides."""
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        states.append(TrainState(model, make_optimizer(model, OptimConfig()), torch.amp.GradScaler("cpu")))
    one, other = states
    one.model(torch.randn(1, 4, 5, 5)).sum().backward()
    one.optimizer.step()
    content = to_checkpoint(one, {})
    momentum = content["optimizer"]["state"][0]
    momentum["momentum_buffer"] = momentum["momentum_buffer"].contiguous()
    from_checkpoint(other, content)
    restored = other.optimizer.state[other.model.weight]["momentum_buffer"]
    assert restored.stride() == other.model.weight.stride()
    assert torch.equal(restored, one.optimizer.state[one.model.weight]["momentum_buffer"])


def test_model_of_the_file_is_what_is_evaluated(tmp_path):
    state = make_state(0, average=True)
    take_step(state)
    take_step(state)
    content = load_checkpoint(save_checkpoint(tmp_path, to_checkpoint(state, {}), keep=1))
    assert torch.equal(content["model"]["weight"], state.average.module.weight)
    assert torch.equal(content["raw_model"]["weight"], state.model.weight)


def test_keeps_the_newest(tmp_path):
    state = make_state()
    for _ in range(4):
        take_step(state)
        save_checkpoint(tmp_path, to_checkpoint(state, {}), keep=2)
    assert [load_checkpoint(path)["step"] for path in list_checkpoints(tmp_path)] == [4, 3]
    assert len(list(tmp_path.iterdir())) == 2


def damage(path, how):
    if how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "empty":
        os.truncate(path, 0)
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "empty", "bit"])
def test_damaged_newest_falls_back(tmp_path, how):
    state = make_state()
    said = []
    for _ in range(2):
        take_step(state)
        save_checkpoint(tmp_path, to_checkpoint(state, {}), keep=2)
    damage(list_checkpoints(tmp_path)[0], how)
    assert load_checkpoint(newest_checkpoint(tmp_path, said.append))["step"] == 1
    (text,) = said
    assert "step-00000002" in text
    assert "damaged" in text
    damage(list_checkpoints(tmp_path)[1], how)
    with pytest.raises(ValueError, match="expected an undamaged checkpoint, got damaged ones only, 2;"):
        newest_checkpoint(tmp_path, said.append)


def test_damaged_newer_ones_are_set_aside(tmp_path):
    state = make_state()
    for _ in range(3):
        take_step(state)
        save_checkpoint(tmp_path, to_checkpoint(state, {}), keep=3)
    for path in list_checkpoints(tmp_path)[:2]:
        damage(path, "cut")
    assert load_newest_checkpoint(tmp_path, lambda _: None)["step"] == 1
    assert len(list_checkpoints(tmp_path)) == 1
    assert len(list(tmp_path.glob("*.damaged"))) == 2


def test_no_checkpoint_is_none(tmp_path):
    assert newest_checkpoint(tmp_path / "absent", print) is None
    (tmp_path / ".partial-1").write_bytes(b"half")
    (tmp_path / "best.pt").write_bytes(b"other")
    assert newest_checkpoint(tmp_path, print) is None


def test_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    state = make_state()
    take_step(state)
    before = save_checkpoint(tmp_path, to_checkpoint(state, {}), keep=1)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    take_step(state)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_checkpoint(tmp_path, to_checkpoint(state, {}), keep=1)
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == [before]


def test_best_stays_when_its_source_goes(tmp_path):
    state = make_state()
    take_step(state)
    mark_best(save_checkpoint(tmp_path, to_checkpoint(state, {}), keep=1))
    take_step(state)
    save_checkpoint(tmp_path, to_checkpoint(state, {}), keep=1)
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 1
    mark_best(list_checkpoints(tmp_path)[0])
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 2

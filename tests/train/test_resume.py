"""Resuming: the position in the data, checkpoints of something else, and the best AP."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from train.average import WeightAverage
from train.build import resume
from train.checkpoint import TrainState, list_checkpoints, save_checkpoint, to_checkpoint
from train.config import PRESETS, OptimConfig
from train.data.identity import describe_change, identify_images
from train.distributed import World
from train.run_folder import RunFolder
from train.schedule import make_optimizer

WORLD = World(0, 1, 0, torch.device("cpu"))
CONFIG = replace(PRESETS["tiny"], device="cpu", epochs=3)


def make_state():
    """Return the state of a run of a very small model with everything that a state may have."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimConfig(name="adamw"))
    average = WeightAverage(model, 0.9)
    return TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=True), average)


class Images:
    """What resuming asks a data set."""

    classes = ("cat", "dog")

    def __init__(self, ids, names=None, portrait=()):
        self.image_ids = np.array(ids)
        self.file_names = np.array(names or [f"{image_id}.jpg" for image_id in ids], dtype=np.str_)
        self.widths = np.full(len(ids), 20)
        self.heights = np.full(len(ids), 10)
        self.heights[list(portrait)] = 30

    def __len__(self):
        return len(self.image_ids)


TEN = list(range(10))


@pytest.fixture(scope="module")
def fresh():
    """A state after one optimizer step, with which every test starts."""
    state = make_state()
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    state.average.take_in(is_first=True)
    state.average.updates = 1
    return state


def write(folder, state, dataset=None, **changes):
    """Write a checkpoint of `state` in a folder; return its content."""
    content = to_checkpoint(state, {"classes": ["cat", "dog"], "images_per_batch": 2})
    if dataset is not None:
        content["training_set"] = identify_images(dataset)
    content |= changes
    save_checkpoint(folder.checkpoints, content, keep=9)
    return content


@pytest.mark.parametrize(
    ("before", "now", "text"),
    [
        pytest.param(Images(TEN), Images(TEN), "", id="equal"),
        pytest.param(Images(TEN), Images(TEN[:8]), "10 images before, 8 now", id="fewer"),
        pytest.param(Images(TEN), Images([*TEN, 10]), "10 images before, 11 now", id="more"),
        pytest.param(Images(TEN), Images(TEN[::-1]), "the same 10 images in another order", id="order"),
        pytest.param(Images(TEN), Images([*TEN[1:], 10]), "10 images as before, but others", id="other ids"),
        pytest.param(
            Images(TEN), Images(TEN, [f"{i}.png" for i in TEN]), "10 images as before, but others", id="other files"
        ),
        pytest.param(
            Images(TEN), Images(TEN, portrait=[3]), "10 images as before, but others", id="another orientation"
        ),
        pytest.param(
            Images([1, 2], ["a", "b\0c"]), Images([1, 2], ["a\0b", "c"]), "2 images as before, but others", id="names"
        ),
        pytest.param(Images([1], ["\udcff.jpg"]), Images([1], ["\udcff.jpg"]), "", id="surrogates"),
    ],
)
def test_what_changed_in_the_images(before, now, text):
    assert describe_change(identify_images(before), identify_images(now)) == text


@pytest.mark.parametrize("has_digest", [True, False])
@pytest.mark.parametrize(
    ("epoch", "batch", "now", "expected", "note"),
    [
        pytest.param(1, 3, TEN, 3, "going on after step 8, epoch 2, batch 3 of 5", id="equal"),
        pytest.param(1, 3, TEN[:6], 0, "epoch 2 starts again from its beginning", id="batch 3 of 3"),
        pytest.param(1, 4, TEN[:2], 0, "epoch 2 starts again from its beginning", id="batch 4 of 1"),
        pytest.param(2, 0, TEN[:2], 0, "going on after step 8, epoch 2", id="between epochs"),
    ],
)
def test_position_fits_the_data(tmp_path, fresh, has_digest, epoch, batch, now, expected, note):
    run = RunFolder(tmp_path)
    write(run, fresh, Images(TEN) if has_digest else None, epoch=epoch, batch=batch, step=8)
    state = make_state()
    resumption = resume(state, run, CONFIG, WORLD, Images(now), (len(now) + 1) // 2)
    assert (state.epoch, state.batch, state.step) == (epoch, expected, 8)
    assert resumption.is_epoch_repeated == (batch > 0 and now is not TEN)
    assert note in resumption.notes[-1]
    if has_digest and now is not TEN:
        assert any(f"step 8: 10 images before, {len(now)} now" in text for text in resumption.notes)


@pytest.mark.parametrize(
    ("epoch", "batch", "max_steps", "number"),
    [(3, 0, 0, 3), (4, 1, 0, 5), (1, 3, 8, 2), (1, 3, 5, 2)],
    ids=["all epochs", "more epochs", "all steps", "more steps"],
)
@pytest.mark.parametrize("now", [TEN, TEN[:2]], ids=["same images", "other images"])
def test_a_finished_run_does_not_go_on(tmp_path, fresh, epoch, batch, max_steps, number, now):
    run = RunFolder(tmp_path)
    write(run, fresh, Images(TEN), epoch=epoch, batch=batch, step=8)
    state = make_state()
    config = replace(CONFIG, max_steps=max_steps, data=replace(CONFIG.data, batch_size=1))
    resumption = resume(state, run, config, WORLD, Images(now), len(now))
    assert resumption.notes == [f"finished after step 8, epoch {number}: nothing is left to train"]
    assert not resumption.is_epoch_repeated
    assert (state.epoch, state.batch, state.step) == (epoch, batch, 8)


@pytest.mark.parametrize("now", [TEN[::-1], [*TEN[1:], 77], [*TEN, 10]])
def test_an_epoch_that_had_begun_with_other_images_starts_again(tmp_path, fresh, now):
    run = RunFolder(tmp_path)
    write(run, fresh, Images(TEN), epoch=1, batch=2, step=7)
    state = make_state()
    assert resume(state, run, CONFIG, WORLD, Images(now), 6).is_epoch_repeated
    assert (state.epoch, state.batch, state.step) == (1, 0, 7)


@pytest.mark.parametrize(("batch_size", "expected"), [(1, 6), (4, 1), (3, 2), (100, 0)])
def test_another_batch_size_keeps_the_share_of_the_epoch(tmp_path, fresh, batch_size, expected):
    run = RunFolder(tmp_path)
    write(run, fresh, Images(TEN), epoch=1, batch=3, step=8)
    state = make_state()
    config = replace(CONFIG, data=replace(CONFIG.data, batch_size=batch_size))
    resumption = resume(state, run, config, WORLD, Images(TEN), -(-10 // batch_size))
    assert state.batch == expected
    assert not resumption.is_epoch_repeated


def nan_weights(content):
    name = next(iter(content["model"]))
    return content["model"] | {name: torch.full_like(content["model"][name], float("nan"))}


def other_slot(content, **slots):
    return {**content["optimizer"], "state": content["optimizer"]["state"] | {0: slots}}


FOREIGN = {
    "list": (lambda content: [1], "expected a checkpoint of this run, got a list"),
    "tensor": (lambda content: torch.ones(2), "expected a checkpoint of this run, got a Tensor"),
    "empty": (lambda content: {}, "expected a checkpoint of this run, got one without 'model'"),
    "weights alone": (lambda content: content["model"], "got one without 'model'"),
    "no batch": (lambda content: {k: v for k, v in content.items() if k != "batch"}, "got one without 'batch'"),
    "step of text": (lambda content: {"step": "x"}, "'step': expected a whole number from 0, got 'x'"),
    "negative step": (lambda content: {"step": -8}, "'step': expected a whole number from 0, got -8"),
    "step of another name": (lambda content: {"step": 9}, "'step': expected 8, as in its name, got 9"),
    "step of a float": (lambda content: {"step": 8.0}, "'step': expected a whole number"),
    "step of a bool": (lambda content: {"step": True}, "'step': expected a whole number"),
    "epoch": (lambda content: {"epoch": None}, "'epoch': expected a whole number"),
    "huge batch": (lambda content: {"batch": 2**70}, "'batch': expected a whole number"),
    "images_per_batch": (lambda content: {"images_per_batch": 0}, "'images_per_batch': expected a whole number from 1"),
    "classes": (lambda content: {"classes": "catdog"}, "'classes': expected a list of names"),
    "class": (lambda content: {"classes": ["cat", 5]}, "'classes': expected a list of names"),
    "model": (lambda content: {"model": [1]}, "'model': expected weights by name"),
    "another model": (lambda content: {"model": {"fc.weight": torch.ones(2)}}, "'model': weight: expected a tensor"),
    "raw model": (lambda content: {"raw_model": None}, "'raw_model': expected weights by name, got None"),
    "one weight more": (lambda content: {"model": content["model"] | {"x": torch.ones(1)}}, "got 'x' too"),
    "shape": (lambda content: {"model": content["model"] | {"bias": torch.ones(4)}}, "got (4,)"),
    "nan": (lambda content: {"model": nan_weights(content)}, "expected finite numbers"),
    "whole numbers": (lambda content: {"model": content["model"] | {"bias": torch.ones(2).long()}}, "got torch.int64"),
    "complex": (lambda content: {"model": content["model"] | {"bias": torch.ones(2) * 1j}}, "got torch.complex64"),
    "huge epoch": (lambda content: {"epoch": 2**62}, "'epoch': expected at most 8, the number of steps, got 46116"),
    "optimizer": (lambda content: {"optimizer": {}}, "'optimizer': expected the state of an optimizer"),
    "slots": (lambda content: {"optimizer": other_slot(content, momentum_buffer=1)}, "expected exp_avg, exp_avg_sq"),
    "slot": (
        lambda content: {"optimizer": other_slot(content, step=1, exp_avg=2, exp_avg_sq=3)},
        "expected a tensor of shape (), got 1",
    ),
    "parameter": (lambda content: {"optimizer": {"state": {999: {}}}}, "expected the number of one of"),
    "scaler": (lambda content: {"scaler": 5}, "'scaler': expected the state of a loss scaler, got 5"),
    "scale": (lambda content: {"scaler": content["scaler"] | {"scale": "x"}}, "'scaler': expected numbers for"),
    "no scale": (lambda content: {"scaler": {}}, "'scaler': expected numbers for"),
    "best_ap": (lambda content: {"best_ap": float("nan")}, "'best_ap': expected a number or None"),
    "training_set": (lambda content: {"training_set": {"images": "x"}}, "'training_set': expected number and digests"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_whole_file_of_something_else_is_named(tmp_path, fresh, monkeypatch, name):
    run = RunFolder(tmp_path)
    content = write(run, fresh, Images(TEN), epoch=1, batch=3, step=8)
    change, message = FOREIGN[name]
    changed = change(content)
    if isinstance(changed, dict) and name not in ("empty", "weights alone", "no batch"):
        changed = content | changed
    (path,) = list_checkpoints(run.checkpoints)
    path.unlink()
    torch.save(changed, path)
    monkeypatch.setattr("train.checkpoint.file_digest", lambda _: path.stem.split("-")[-1])  # the hash is right
    with pytest.raises(ValueError, match="delete the file to go on from the checkpoint before it") as caught:
        resume(make_state(), run, CONFIG, WORLD, Images(TEN), 5)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "\n" not in text
    assert len(text) < 600


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + b"\0" * 100, b"\x80\x02c__builtin__\neval\n."])
def test_a_file_that_pytorch_cannot_read_is_named(tmp_path, monkeypatch, content):
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()
    path = run.checkpoints / "step-00000008-0123456789abcdef.pt"
    path.write_bytes(content)
    monkeypatch.setattr("train.checkpoint.file_digest", lambda _: "0123456789abcdef")
    with pytest.raises(ValueError, match=f"{path}: expected a checkpoint of this run, got a file that") as caught:
        resume(make_state(), run, CONFIG, WORLD, Images(TEN), 5)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("stored", "lines", "expected"),
    [
        pytest.param(None, [], None, id="none"),
        pytest.param(None, [0.3, 0.5, 0.4], 0.5, id="of an earlier version"),
        pytest.param(0.5, [0.3, 0.4], 0.5, id="its line was lost"),
        pytest.param(0.3, [0.3, 0.6], 0.6, id="evaluated after the checkpoint"),
        pytest.param(-1.0, [-1], -1.0, id="no ground truth"),
    ],
)
def test_best_ap_is_that_of_all_earlier_evaluations(tmp_path, fresh, stored, lines, expected):
    run = RunFolder(tmp_path)
    write(run, fresh, epoch=3, batch=0, step=8, best_ap=stored)
    run.append_metrics(*[{"step": step, "AP": ap} for step, ap in enumerate(lines, 6)], {"step": 9, "AP": 1.0})
    state = make_state()
    resume(state, run, CONFIG, WORLD, Images(TEN), 5)
    assert state.best_ap == expected


def test_metrics_of_a_run_without_checkpoint_start_again(tmp_path):
    run = RunFolder(tmp_path)
    run.append_metrics({"step": 1, "loss": 1.0})
    assert not resume(make_state(), run, CONFIG, WORLD, Images(TEN), 5).is_epoch_repeated
    assert not run.metrics.exists()

import json

import pytest
import torch

from train.data.collate import LoadedBatch
from train.distributed import World
from train.log import TrainLog
from train.run_folder import RunFolder

WORLD = World(0, 1, 0, torch.device("cpu"))


def make_train_log(folder, every, images):
    return TrainLog(RunFolder(folder), WORLD, interval=every, total_steps=10, first_step=0, num_images=images)


@pytest.fixture
def make_log(tmp_path):
    logs = []

    def make(every=1, images=100):
        logs.append(make_train_log(tmp_path, every, images))
        return logs[-1]

    yield make
    for log in logs:
        log.close()


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def take_step(log, step, **losses):
    values = {"loss_cls": 1.0, "loss_bbox": 0.5} | losses
    log.add_batch({name: torch.tensor(value) for name, value in values.items()}, 1.0, [step * 10, step * 10 + 1])
    log.end_step(step, 1, 0.01)


def test_every_step_gets_a_line(make_log, tmp_path):
    log = make_log(every=2)
    take_step(log, 1)
    assert lines(tmp_path) == []
    take_step(log, 2, loss_cls=3.0)
    take_step(log, 3)
    log.flush()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    line = lines(tmp_path)[1]
    assert (line["loss_cls"], line["loss_bbox"], line["loss"]) == (3.0, 0.5, 3.5)
    assert (line["epoch"], line["lr"]) == (1, 0.01)
    assert {"seconds", "images_per_second", "data_wait", "memory_mib"} <= set(line)


def test_batches_of_a_step_are_averaged(make_log, tmp_path):
    log = make_log()
    for value in (1.0, 3.0):
        log.add_batch({"loss_cls": torch.tensor(value)}, 0.5, [1])
    log.end_step(1, 1, 0.1)
    assert lines(tmp_path)[0]["loss"] == 2.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_loss_names_itself_the_step_and_the_images(make_log, tmp_path, value):
    log = make_log(every=3)
    take_step(log, 1)
    take_step(log, 2, loss_bbox=value)
    with pytest.raises(FloatingPointError, match="loss_bbox is (nan|inf) at step 2 .epoch 1., images 20, 21"):
        take_step(log, 3)
    assert lines(tmp_path) == []


def broken(*ids):
    return LoadedBatch(None, [], [], [], {image_id: f"cannot read {image_id}.jpg" for image_id in ids})


def test_broken_images_are_named_once_and_counted(make_log, capsys):
    log = make_log(images=200)
    list(log.watch_loading([broken(5), broken(5, 6)]))
    take_step(log, 1)
    text = capsys.readouterr().err
    assert text.count("cannot read 5.jpg") == 1
    assert text.count("cannot read 6.jpg") == 1
    log.start_epoch()
    list(log.watch_loading([broken(7)]))
    take_step(log, 2)


def test_progress_line_fits_a_terminal(make_log, capsys):
    log = make_log()
    take_step(log, 1, loss_cls=123.4, loss_mask=1e-7)
    log.close()
    last = capsys.readouterr().err.split("\r")[-1].rstrip("\n")
    assert "epoch 1 loss 123.900 lr 0.01" in last
    assert "1/10" in last
    assert len(last) <= 80


def test_more_than_one_percent_broken_stops(make_log):
    log = make_log(images=199)
    list(log.watch_loading([broken(5, 6)]))
    with pytest.raises(ValueError, match="2 of 199 training images could not be read"):
        take_step(log, 1)

import json

import numpy as np
import pytest
import torch

from detector import Batch, Target
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


def loaded(*ids, lost_boxes=None):
    """Return a batch whose images have two boxes each and were enlarged twofold; the last one has no boxes."""
    boxes = torch.tensor([[0.0, 0.0, 40.0, 60.0], [10.0, 10.0, 11.0, 50.0]])
    targets = [Target(boxes, torch.zeros(2, dtype=torch.int64)) for _ in ids]
    targets[-1] = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    batch = Batch(torch.zeros(len(ids), 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]] * len(ids)), targets)
    return LoadedBatch(batch, list(ids), [(2.0, 2.0)] * len(ids), [(32, 32)] * len(ids), {}, lost_boxes or {})


def take_step(log, step, **losses):
    values = {"loss_cls": 1.0, "loss_bbox": 0.5} | losses
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    log.add_batch(tensors, 1.0, loaded(step * 10, step * 10 + 1))
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
        log.add_batch({"loss_cls": torch.tensor(value)}, 0.5, loaded(1))
    log.end_step(1, 1, 0.1)
    assert lines(tmp_path)[0]["loss"] == 2.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_loss_names_itself_the_step_and_the_images(make_log, tmp_path, value):
    log = make_log(every=3)
    take_step(log, 1)
    take_step(log, 2, loss_bbox=value)
    with pytest.raises(FloatingPointError, match="loss_bbox is (nan|inf) at step 2 .epoch 1., images 20, 21;") as error:
        take_step(log, 3)
    assert "Look at their boxes (the thinnest: 0.5 x 20 in image 20), or" in str(error.value)
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


def test_lost_boxes_are_told_once_for_each_image(make_log, capsys):
    log = make_log()
    first = loaded(5, 6, lost_boxes={5: [[160.0, 20.0, 190.0, 60.0]]})
    second = loaded(5, 6, lost_boxes={5: [[160.0, 20.0, 190.0, 60.0]], 6: [[0.0, 0.0, 0.0, 9.0]] * 4})
    for _ in range(2):
        log.start_epoch()
        list(log.watch_loading([first, second]))
    lines = [line for line in capsys.readouterr().err.splitlines() if "nothing of them is left" in line]
    assert len(lines) == 2
    assert lines[0].startswith("image 5: ")
    assert lines[0].endswith(": 1, x1 y1 x2 y2 = [160.0, 20.0, 190.0, 60.0]")
    assert ": 4, x1 y1 x2 y2 = [0.0, 0.0, 0.0, 9.0]" in lines[1]
    assert lines[1].endswith(" ...")


@pytest.mark.parametrize("box", [[float("nan"), 0.0, 4.0, 4.0], [4.0, 4.0, 4.0, 8.0], [4.0, 4.0, 4.0 + 1e-6, 8.0]])
def test_suspicious_box_of_a_bad_loss_is_named(make_log, box):
    batch = loaded(5, 6)
    batch.batch.targets[0].boxes[1] = torch.tensor(box)
    log = make_log()
    log.add_batch({"loss_bbox": torch.tensor(float("nan"))}, 1.0, batch)
    with pytest.raises(FloatingPointError, match=r"thinnest: (nan|0|4.768e-07) x 2 in image 5\)"):
        log.end_step(1, 1, 0.01)


def test_classes_with_ground_truth_are_in_tensorboard(make_log, monkeypatch):
    log = make_log()
    written = {}
    monkeypatch.setattr(log._events, "add_scalar", lambda name, value, step: written.update({name: (value, step)}))
    classes = {"a/b": [0.5, 0.75, 3], "two\nlines": [0.0, 0.0, 1], "absent": [-1.0, -1.0, 0]}
    log.add_evaluation(7, {"step": 7, "AP": 0.25, "classes": classes, "segm_classes": {"a/b": [0.1, 0.2, 3]}})
    assert written == {
        "evaluation/AP": (0.25, 7),
        "AP_of_class/a/b": (0.5, 7),
        "AP50_of_class/a/b": (0.75, 7),
        r"AP_of_class/two\nlines": (0.0, 7),
        r"AP50_of_class/two\nlines": (0.0, 7),
        "segm_AP_of_class/a/b": (0.1, 7),
        "segm_AP50_of_class/a/b": (0.2, 7),
    }


def test_progress_line_fits_a_terminal(make_log, capsys, monkeypatch):
    monkeypatch.setattr("train.progress._is_terminal", lambda: True)
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


@pytest.mark.parametrize("name", ["cam0/0001", "\udcff", "two\nlines\x1b[2J", "猫 \u202e", "$x_", "", "x" * 250])
def test_pictures_of_any_name_are_shown(make_log, name):
    log = make_log()
    log.add_picture(name, np.zeros((4, 4, 3), np.uint8), 1)

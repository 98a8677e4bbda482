"""Tables: what a run is, and what an evaluation says."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from detector.text import plural
from train.config import PRESETS
from train.distributed import World
from train.report import evaluation_tables, graph_notes, run_table
from train.schedule import Schedule

WORLD = World(0, 1, 0, torch.device("cpu"))
SMALL = PRESETS["small"]


class Split(SimpleNamespace):
    """What a table says about a data set of one image with one box."""

    def __len__(self):
        return 1


def table(config):
    split = Split(
        image_counts="",
        counts="",
        boxes=np.zeros((1, 4)),
        labels=np.zeros(1, np.int64),
        classes=("cat",),
        annotations_per_class=np.ones(1, np.int64),
        category_ids=np.ones(1, np.int64),
        boxes_without_area=1,
        mistakes=[],
        has_annotations=True,
        annotation_file="x.json",
    )
    schedule = Schedule(config.optim, 4, config.epochs)
    text = run_table(config, WORLD, nn.Linear(1, 1), "random", split, split, schedule, 1, [])
    assert all(len(line) <= 80 for line in text.splitlines())
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("changes", "device", "processes", "is_named"),
    [
        ({}, "cuda", 8, True),
        ({}, "cpu", 1, False),
        ({"graph": True}, "cuda", 1, False),
        ({"compile": True}, "cuda", 1, False),
        ({"precision": "fp16"}, "cuda", 1, False),
        ({"model": replace(SMALL.model, norm="syncbn")}, "cuda", 1, True),
        ({"model": replace(SMALL.model, norm="syncbn")}, "cuda", 2, False),
    ],
)
def test_graphs_are_named_where_they_are_possible(changes, device, processes, is_named):
    notes = graph_notes(replace(SMALL, **changes), torch.device(device), processes)
    assert any("--graph" in note for note in notes) == is_named


def test_what_is_on_is_in_the_table():
    config = replace(
        SMALL,
        compile=True,
        graph=True,
        deterministic=True,
        data=replace(SMALL.data, short_sides=(64, 96)),
        optim=replace(SMALL.optim, ema=0.999),
    )
    text = table(config)
    for option in (
        "mirrored images (0.5 of them)",
        "multi-scale (short side 64, 96)",
        "images at half the size in epochs 1 to 4",
        "0.1 of the learning rate for offsets",
        "weight decay 0.05",
        "gradients clipped to norm 5",
        "EMA of the weights (decay 0.999), which is evaluated",
        "torch.compile",
        "CUDA graphs",
        "deterministic algorithms",
        "after every 4 epochs and the last",
    ):
        assert option in text


def test_what_is_off_is_not_in_the_table():
    optim = replace(SMALL.optim, offset_lr=1.0, weight_decay=0.0, clip_grad=0.0)
    text = table(replace(SMALL, eval_every=1, data=replace(SMALL.data, flip=0.0, half_size=0.0), optim=optim))
    assert "options" not in text
    assert "after every epoch" in text


def test_one_of_a_kind_is_not_plural():
    optim = replace(SMALL.optim, warmup=1)
    data = replace(SMALL.data, batch_size=1, half_size=1.0)
    text = table(replace(SMALL, epochs=1, max_steps=1, data=data, optim=optim))
    for phrase in (
        "1 image, 1 box, x.json",
        "1 image x 1 process x 1",
        "warm-up 1 step,",
        "1 epoch of 1 step, at most 1 step;",
        "images at half the size in epoch 1,",
        "1 training annotation without area",
    ):
        assert phrase in text


@pytest.mark.parametrize(("count", "text"), [(0, "0 boxes"), (1, "1 box"), (2, "2 boxes")])
def test_plural(count, text):
    assert plural(count, "box", "boxes") == text
    assert plural(count, "image") == f"{count} image{'s' * (count != 1)}"


NUMBERS = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"), 0.5)
CLASSES = {"cat": [0.25, 0.5, 7], "none\x1b": [-1.0, -1.0, 0], "missed": [0.0, 0.0, 2]}
THRESHOLDS = {"cat": [0.75, 0.5, 0.6, 0.579], "none\x1b": [-1.0] * 4, "missed": [0.0, 0.0, 0.0, -1.0]}
LINE = {
    **NUMBERS,
    "classes": CLASSES,
    "classes_F1": THRESHOLDS,
    "precision": 0.7,
    "recall": 0.4,
    "F1": 0.51,
    "score_threshold": 0.6,
}


def test_table_of_classes():
    lines = evaluation_tables(LINE).splitlines()
    assert lines[3:9] == [
        "class            AP    AP50  precision  recall    F1 at score   boxes",
        "cat           0.250   0.500      0.750   0.500  0.600 at 0.57       7",
        r"none\x1b          -       -          -       -              -       0",
        "missed        0.000   0.000      0.000   0.000          0.000       2",
        "all classes   0.500   0.500      0.700   0.400  0.510 at 0.60       9",
        "",
    ]
    assert all(len(line) <= 80 for line in lines)


def test_masks_have_a_table_of_their_own():
    masks = {f"segm_{name}": value for name, value in LINE.items()}
    lines = evaluation_tables({**LINE, **masks}).splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("class")] == ["class, boxes", "class, masks"]
    assert sum(line.startswith("cat ") for line in lines) == 2


def test_lines_of_earlier_versions_have_no_thresholds():
    lines = evaluation_tables({**NUMBERS, "classes": CLASSES}).splitlines()
    assert lines[4] == "cat           0.250   0.500          -       -              -       7"

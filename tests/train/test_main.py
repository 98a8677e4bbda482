"""The training script from start to end, in one process."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import detector
import train.loop
import train.main
import train.pretrained
from tests.train.conftest import lines
from tests.train.data.datasets import edit
from train.checkpoint import list_checkpoints, load_checkpoint
from train.config import PRESETS
from triton_dcn.tf32 import allow_tf32


def weights(out: Path) -> dict:
    return load_checkpoint(list_checkpoints(out / "checkpoints")[0])["model"]


def assert_same_run(one: Path, two: Path) -> None:
    """Compare the losses of every step, the last evaluation and every bit of the weights."""
    keys = ("step", "epoch", "lr", "loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss", "AP")
    rows = {out: [[line.get(key) for key in keys] for line in lines(out) if "loss" in line] for out in (one, two)}
    assert rows[one] == rows[two]
    assert lines(one)[-1]["AP"] == lines(two)[-1]["AP"]
    first = weights(one)
    second = weights(two)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def process_settings():
    """Return settings of PyTorch that a run changes: TF32 in matrix products and in cuDNN, determinism."""
    backends = torch.backends
    return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def settings_of_evaluations(monkeypatch):
    """What `process_settings` is in each evaluation of a run; outside TF32 is allowed."""
    settings = []
    evaluate = train.main.evaluate

    def watched(*arguments, **options):
        settings.append(process_settings())
        return evaluate(*arguments, **options)

    monkeypatch.setattr(train.main, "evaluate", watched)
    with allow_tf32(True):
        yield settings


def test_leaves_what_people_and_programs_need(start, coco, tmp_path, settings_of_evaluations):
    out = tmp_path / "run"
    before = process_settings()
    status, stdout, stderr = start("--data.root", coco, "--out", out, "--deterministic")
    assert status == 0
    assert settings_of_evaluations == [(False, False, True)]
    assert process_settings() == before
    assert "epoch 1: AP" in stderr
    assert all(len(line) <= 80 or str(tmp_path) in line for line in stdout.splitlines())
    printed = stdout
    stdout = " ".join(stdout.split())
    assert "deterministic algorithms" in stdout
    for text in ("DCNv2 in c3, c4, c5", "linear in the batch", "best checkpoint", "AR100", "red", "blue"):
        assert text in stdout
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "detections.json", "pictures"} <= names
    assert any(name.startswith("events.out") for name in names)
    pictures = ["000500.png", "000502.png", "precision-recall.png", "training-images.png"]
    assert sorted(path.name for path in (out / "pictures").iterdir()) == pictures
    assert not any(control in stdout + stderr for control in "\r\x1b\b")
    commands = [line.split() for line in printed.splitlines() if line.startswith(" " * 17) and str(out) in line]
    assert [command[-1] for command in commands] == [str(out)] * 2
    assert all(Path(command[0]).name.startswith("python") for command in commands)
    assert commands[0][1].endswith("train/plot.py")
    assert Path(commands[0][1]).is_file()
    *steps, evaluation = lines(out)
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert {"epoch", "lr", "loss", "seconds", "images_per_second", "loss_rpn_cls", "loss_bbox"} <= set(steps[0])
    assert {"epoch", "AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"} <= set(evaluation)
    for row in json.loads((out / "detections.json").read_text()):
        assert set(row) == {"image_id", "category_id", "bbox", "score"}
        assert row["category_id"] in (3, 7)
    model, classes = detector.load(out / "checkpoints" / "best.pt", "cpu")
    assert classes == ["red", "blue"]
    assert model.config == replace(PRESETS["tiny"].model, num_classes=2)
    record = json.loads((out / "config.json").read_text())
    assert record["model"]["num_classes"] == 2

    (out / "pictures" / "training-images.png").unlink()
    status, stdout, stderr = start("--data.root", coco, "--out", out, "--deterministic")
    assert status == 0
    assert stderr == ""
    assert "finished after step 4, epoch 1: nothing is left to train" in stdout  # only to tell
    assert not (out / "pictures" / "training-images.png").exists()  # of a run that begins
    assert "AR100" in stdout
    assert len(lines(out)) == 5

    status, stdout, _ = start("--data.root", coco, "--out", out, "--eval-only")
    assert status == 0
    assert "1 x cpu, precision float32: no TF32" in stdout
    assert settings_of_evaluations[1:] == [(False, False, False)]
    assert process_settings() == before
    again = lines(out)[-1]
    assert [again[name] for name in ("AP", "AR100")] == [evaluation[name] for name in ("AP", "AR100")]
    assert again["classes_F1"] == evaluation["classes_F1"]

    best = out / "checkpoints" / "best.pt"
    common = ("--data.root", coco, "--pictures", 0, "--eval-only", "--weights", best, "--out", tmp_path / "evaluated")
    status, stdout, _ = start(*common)
    assert status == 0
    assert "detections.json" in stdout
    assert not any(text in stdout for text in ("plot.py", "tensorboard", "pictures/"))  # there is nothing to show

    before = (out / "detections.json").read_bytes()
    weights = tmp_path / "other.pt"
    weights.write_bytes(best.read_bytes())
    status, _, stderr = start("--data.root", coco, "--eval-only", "--weights", weights, "--out", out)
    assert status == 1
    assert f"--out {out}: expected a folder of its own for the results of {weights}, got that of a run" in stderr
    assert (out / "detections.json").read_bytes() == before


def test_interrupted_run_equals_a_whole_one(start, coco, tmp_path):
    common = ("--data.root", coco, "--epochs", 2, "--optim.ema", 0.9, "--data.workers", 1, "--optim.accumulate", 2)
    common += ("--pictures", 0, "--checkpoint.every", 1)
    assert start(*common, "--out", tmp_path / "whole", "--max-steps", 3)[0] == 0
    assert start(*common, "--out", tmp_path / "parts", "--max-steps", 1, "--pictures", 1)[0] == 0
    assert (tmp_path / "parts" / "pictures" / "training-images.png").exists()  # takes no random number
    newest = list_checkpoints(tmp_path / "parts" / "checkpoints")[0]
    status, stdout, _ = start(*common, "--out", tmp_path / "parts", "--max-steps", 3)
    assert status == 0
    assert "going on after step 1, epoch 1, batch 2 of 4" in " ".join(stdout.split())
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert newest.name.startswith("step-00000001")


def test_damaged_checkpoint_falls_back(start, coco, tmp_path):
    common = ("--data.root", coco, "--pictures", 0, "--checkpoint.every", 1, "--eval-every", 9)
    assert start(*common, "--out", tmp_path / "a", "--max-steps", 3)[0] == 0
    assert start(*common, "--out", tmp_path / "b", "--max-steps", 2)[0] == 0
    newest = list_checkpoints(tmp_path / "b" / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    status, stdout, _ = start(*common, "--out", tmp_path / "b", "--max-steps", 3)
    assert status == 0
    assert f"{newest} is damaged" in " ".join(stdout.split())
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_nan_stops_and_spares_the_checkpoint(start, coco, tmp_path):
    common = ("--data.root", coco, "--out", tmp_path / "run", "--checkpoint.every", 1, "--pictures", 0)
    status, _, stderr = start(*common, "--optim.lr", 1e12, "--optim.clip-grad", 0, "--optim.warmup", 0)
    assert status == 1
    message = stderr.splitlines()[-1]
    assert message.startswith("error: loss_")
    assert "images 10" in message
    assert "Traceback" not in stderr
    step = int(message.split("at step ")[1].split()[0])
    assert load_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[0])["step"] == step - 1
    assert "FloatingPointError" in (tmp_path / "run" / "error-rank0.txt").read_text()


def test_empty_validation_split(start, coco, tmp_path):
    edit(coco, lambda content: (content["images"].clear(), content["annotations"].clear()), "val2017")
    status, _, _ = start("--data.root", coco, "--out", tmp_path / "run", "--max-steps", 1)
    assert status == 0
    assert lines(tmp_path / "run")[-1]["AP"] == -1


def test_run_that_cannot_learn_does_not_start(start, coco, tmp_path):
    def divide(content):
        for annotation in content["annotations"]:
            annotation["bbox"] = [side / 1000 for side in annotation["bbox"]]

    edit(coco, divide)
    status, stdout, stderr = start("--data.root", coco, "--out", tmp_path / "run")
    assert status == 1
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    for text in ("instances_train2017.json", "got none", "12 thinner than a pixel", "between 0 and 1", "in pixels"):
        assert text in stderr
    assert not (tmp_path / "run").exists()


def test_table_says_what_is_left_out(start, coco, tmp_path):
    def damage(content):
        content["categories"].insert(0, {"id": 0, "name": "cells\x1b[2J"})
        content["annotations"][0]["bbox"] = [5, 5, 0.5, 20]

    edit(coco, damage)
    edit(coco, damage, "val2017")
    empty = {"id": 1, "file_name": "none.png", "width": 96, "height": 96}
    edit(coco, lambda content: content["images"].append(empty))
    status, stdout, _ = start("--data.root", coco, "--out", tmp_path / "run", "--max-steps", 1)
    assert status == 0
    table = " ".join(stdout.split())
    assert (
        "training 8 images (of 9 in the file: 1 without annotations), 11 boxes (of 12 annotations: 1 thinner" in table
    )
    assert "validation 3 images, 3 boxes (of 4 annotations: 1 thinner than a pixel)" in table
    assert r"note classes without annotations: cells\x1b[2J (1 of 3); the one with the id 0" in table


def test_starts_from_weights_of_another_model_and_other_classes(start, coco, tmp_path):
    common = ("--data.root", coco, "--max-steps", 1, "--pictures", 0)
    assert start(*common, "--out", tmp_path / "a", "--model.dcn", "None", "--model.image-scale", 64, 64)[0] == 0
    best = tmp_path / "a" / "checkpoints" / "best.pt"
    for split in ("train2017", "val2017"):
        edit(coco, lambda content: content["categories"].append({"id": 1, "name": "green"}), split)
    status, stdout, _ = start(*common, "--out", tmp_path / "b", "--weights", best)
    assert status == 0
    assert "4 in the file but not taken" in stdout
    table = " ".join(stdout.split())
    assert "model Faster R-CNN R18-FPN, plain convolutions, norm gn, images within 64 x 64" in table
    assert "note fine-tuning: the model is the one in" in table
    assert "0.0025 = 0.02 x 2 / 16" in table  # the width is the preset's, so the rate is, too
    recorded = json.loads((tmp_path / "b" / "config.json").read_text())
    assert recorded["model"]["num_classes"] == 3
    assert (recorded["model"]["dcn"], recorded["optim"]["lr"]) == (None, 0.02)

    status, _, _ = start(*common, "--out", tmp_path / "c", "--weights", best, "--eval-only")
    assert status == 0  # it looks for the two classes that it knows
    best.rename(best.with_name("moved.pt"))
    status, stdout, stderr = start(*common, "--out", tmp_path / "b", "--weights", best, "--max-steps", 2)
    assert status == 0, stderr  # a run that goes on needs the file no more
    assert "going on after step 1" in stdout


def test_test_set_without_annotations_gives_detections(start, coco, tmp_path):
    common = ("--data.root", coco, "--max-steps", 1, "--pictures", 0)
    edit(coco, lambda content: content.pop("annotations"), "val2017")
    status, _, _ = start(*common, "--out", tmp_path / "a")
    assert status == 0
    assert json.loads((tmp_path / "a" / "detections.json").read_text())
    count = len(lines(tmp_path / "a"))
    status, stdout, _ = start(*common, "--out", tmp_path / "a")
    assert status == 0
    assert "detections only" in stdout
    assert len(lines(tmp_path / "a")) == count  # it is not evaluated again
    status, stdout, _ = start(*common, "--out", tmp_path / "a", "--eval-only")
    assert status == 0
    assert "detections only" in stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--data.root", "/nowhere"], "--data.root: expected a folder, got /nowhere", id="no-data"),
        pytest.param(["--out", "/proc/nowhere"], "cannot write into --out /proc/nowhere", id="read-only"),
        pytest.param(["--weights", "/nowhere.pt"], "--weights: expected a file, got /nowhere.pt", id="no-weights"),
        pytest.param(
            ["--eval-only"], "--eval-only: expected --weights FILE, or a checkpoint in", id="nothing-to-evaluate"
        ),
        pytest.param(["--data.batch-size", "0"], "--data.batch-size: expected at least 1, got 0", id="value"),
        pytest.param(["--model.nms-iou", "0.6"], "train.main.run(replace(config, model=", id="python-only"),
    ],
)
def test_user_errors_are_one_line(start, coco, tmp_path, arguments, message):
    status, _, stderr = start("--data.root", coco, "--out", tmp_path / "run", *arguments)
    assert status == 1
    (line,) = stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("root", ["coco", "nowhere"])
def test_run_without_network_ends_before_anything_else_starts(start, coco, tmp_path, monkeypatch, root):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(train.pretrained, "BASE_URL", "http://127.0.0.1:9/models")
    common = ("--preset", "coco-1x", "--data.root", coco.with_name(root), "--out", tmp_path / "run")
    status, stdout, stderr = start(*common)
    assert (status, stdout) == (1, "")
    (line,) = stderr.strip().splitlines()
    assert line.startswith("error: --weights imagenet: cannot fetch http://127.0.0.1:9/models/resnet50-0676ba61.pth: ")
    assert f"at {tmp_path / 'home'}/hub/checkpoints/resnet50-0676ba61.pth" in line
    assert "--weights FILE" in line
    assert not (tmp_path / "run").exists()


def test_signal_writes_a_checkpoint_first(start, coco, tmp_path, monkeypatch):
    count = train.loop.count_step

    def count_and_signal(state):
        count(state)
        if state.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train.loop, "count_step", count_and_signal)
    common = ("--data.root", coco, "--checkpoint.every", 0, "--pictures", 0)
    status, _, stderr = start(*common, "--out", tmp_path / "run")
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 2" in stderr
    assert load_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[0])["step"] == 2

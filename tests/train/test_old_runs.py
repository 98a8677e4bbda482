"""Folders that earlier versions wrote: their runs go on, with the former names of fields in their files."""

import json
from dataclasses import replace

import pytest
import torch

import detector
from detector.model.config import RENAMED_FIELDS
from tests.train.conftest import lines
from train.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from train.config import PRESETS
from train.main import run
from train.schedule import Schedule

FORMER_MODEL_NAMES = {name: former for former, name in RENAMED_FIELDS.items()}


def with_former_names(config):
    """Return the values of a run as an earlier version wrote them."""
    old = {**config, "weights": None, "eval_overlap": 1000, "evaluator": "pycocotools"}
    old["data"] = {("batch" if name == "batch_size" else name): value for name, value in config["data"].items()}
    old["model"] = former_model(config["model"])
    old["amp"] = {"float32": "none"}.get(old["precision"], old["precision"])
    del old["precision"]
    if "starts" in config:
        old["starts"] = [
            {name: value for name, value in start.items() if name != "warmup"} for start in config["starts"]
        ]
    return old


def former_model(model):
    return {FORMER_MODEL_NAMES.get(name, name): value for name, value in model.items()}


def make_old(out):
    """Turn a folder of a run into what an earlier version would have left."""
    path = out / "config.json"
    path.write_text(json.dumps(with_former_names(json.loads(path.read_text()))))
    assert '"rpn_candidates"' in path.read_text()

    for checkpoint in list_checkpoints(out / "checkpoints"):
        content = load_checkpoint(checkpoint)
        content["config"] = former_model(content["config"])
        content["run"] = with_former_names(content["run"])
        checkpoint.unlink()
        save_checkpoint(out / "checkpoints", content, keep=9)


def losses(out):
    return [line["loss"] for line in lines(out) if "loss" in line]


def weights(out):
    return load_checkpoint(list_checkpoints(out / "checkpoints")[0])["model"]


def assert_same_run(one, two):
    assert losses(one) == losses(two)
    first = weights(one)
    second = weights(two)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


COMMON = ("--pictures", 0, "--epochs", 2, "--checkpoint.every", 1, "--optim.warmup", 0)


def test_old_run_goes_on_with_old_flags(start, coco, tmp_path):
    common = ("--data.root", coco, *COMMON)
    assert start(*common, "--out", tmp_path / "whole", "--max-steps", 6)[0] == 0
    assert start(*common, "--out", tmp_path / "old", "--max-steps", 3)[0] == 0
    make_old(tmp_path / "old")

    old_flags = ("--data.batch", 2, "--eval-overlap", 0, "--evaluator", "faster")
    status, stdout, stderr = start(*common, *old_flags, "--out", tmp_path / "old", "--max-steps", 6)
    assert status == 0, stderr
    assert "going on after step 3" in " ".join(stdout.split())
    assert "--evaluator has no effect any more" in stderr
    assert_same_run(tmp_path / "whole", tmp_path / "old")


def test_old_run_keeps_its_long_warm_up(start, coco, tmp_path):
    out = tmp_path / "run"
    common = ("--data.root", coco, "--pictures", 0, "--eval-every", 9, "--optim.warmup", 6, "--out", out)
    status, stdout, _ = start(*common, "--max-steps", 1, "--amp", "none")
    assert status == 0
    table = " ".join(stdout.split())
    assert "note warm-up shortened from 6 to 0 (steps)" in table
    assert "sgd, warm-up 0 steps" in table
    make_old(out)

    status, stdout, _ = start(*common)
    assert status == 0
    table = " ".join(stdout.split())
    assert "precision float32: " in table
    assert "warm-up 6 steps" in table
    assert "the learning rate never reaches its peak" in table
    rates = [line["lr"] for line in lines(out) if "loss" in line]
    optim = replace(PRESETS["tiny"].optim, warmup=6)
    expected = [Schedule(optim, 2, 1).learning_rate(step, step / 4) for step in range(4)]
    assert rates[1:] == expected[1:]


def test_old_checkpoint_is_evaluated(start, coco, tmp_path):
    common = ("--data.root", coco, *COMMON)
    assert start(*common, "--out", tmp_path / "run", "--max-steps", 1)[0] == 0
    expected = lines(tmp_path / "run")[-1]["AR100"]
    make_old(tmp_path / "run")
    path = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    model, classes = detector.load(path, "cpu")
    assert model.config == replace(PRESETS["tiny"].model, num_classes=2)
    assert classes == ["red", "blue"]
    assert start("--data.root", coco, "--eval-only", "--weights", path, "--out", tmp_path / "eval")[0] == 0
    assert lines(tmp_path / "eval")[-1]["AR100"] == expected


def python_config(coco, out, **changes):
    tiny = PRESETS["tiny"]
    data = replace(tiny.data, root=coco)
    model = replace(tiny.model, rpn_pre_nms_top_n=(400, 200))
    optim = replace(tiny.optim, warmup=0)
    values = {"device": "cpu", "pictures": 0, "epochs": 2, "data": data, "model": model, "optim": optim, "out": out}
    return replace(tiny, **values, **changes)


def test_old_run_with_a_value_that_lost_its_flag_goes_on_from_python(start, coco, tmp_path):
    run(python_config(coco, tmp_path / "whole", max_steps=6))
    run(python_config(coco, tmp_path / "old", max_steps=3))
    make_old(tmp_path / "old")

    status, _, stderr = start("--data.root", coco, *COMMON, "--out", tmp_path / "old")
    assert status == 1
    assert "model.rpn_pre_nms_top_n was [400, 200], is [500, 300]" in stderr
    folder = run(python_config(coco, tmp_path / "old", max_steps=6))
    assert folder.path == tmp_path / "old"
    assert_same_run(tmp_path / "whole", tmp_path / "old")


@pytest.mark.parametrize("steps", [4, 5])
def test_files_of_an_evaluation_that_was_counted_beside_training(start, coco, tmp_path, steps):
    out = tmp_path / "run"
    common = ("--data.root", coco, *COMMON, "--out", out)
    assert start(*common, "--max-steps", steps, "--eval-every", 9)[0] == 0
    (out / "uncounted.json").write_text(json.dumps({"step": 4, "epoch": 1, "seconds": 1.0, "rows": []}))
    candidate = out / "checkpoints" / "candidate.pt"
    candidate.write_bytes(list_checkpoints(out / "checkpoints")[-1].read_bytes())
    kept = [line for line in lines(out) if "loss" in line]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    (out / "checkpoints" / "best.pt").unlink()

    status, stdout, _ = start(*common)
    assert status == 0
    assert f"going on after step {steps}" in " ".join(stdout.split())
    evaluated = [line["step"] for line in lines(out) if "AP" in line]
    assert evaluated == ([4, 8] if steps == 4 else [8])  # made again where the newest checkpoint is that of the step
    assert (out / "checkpoints" / "best.pt").exists()

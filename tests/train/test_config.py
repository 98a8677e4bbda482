import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from detector import FasterRCNNConfig
from train.config import PRESETS, as_dict, parse


def test_default_is_the_recipe_with_a_gpu_and_small_without():
    assert parse([], gpu=True) == replace(PRESETS["coco-1x"], out=Path("runs/coco-1x"))
    assert parse([], gpu=False) == replace(PRESETS["small"], out=Path("runs/small"))
    assert parse(["--data.root", "coco"], gpu=False).preset == "small"


def test_recipe():
    config = parse(["--preset", "coco-1x"], gpu=False)
    assert config.model == FasterRCNNConfig()
    assert (config.epochs, config.data.batch) == (12, 2)
    optim = config.optim
    assert (optim.lr, optim.momentum, optim.weight_decay, optim.warmup) == (0.02, 0.9, 1e-4, 500)
    assert (optim.milestones, optim.gamma, optim.clip_grad) == ((8, 11), 0.1, 0)


def test_flags_override_the_preset():
    flags = "--preset tiny --data.root /d --out o --epochs 3 --seed 5 --weights w.pt --eval-only --max-steps 7"
    more = "--checkpoint.every 9 --checkpoint.keep 2 --data.workers 1 --optim.milestones 1 2 --model.dcn None"
    config = parse(f"{flags} {more}".split(), gpu=False)
    assert config.data.root == Path("/d")
    assert (config.out, config.weights) == (Path("o"), Path("w.pt"))
    assert (config.epochs, config.seed, config.max_steps, config.eval_only) == (3, 5, 7, True)
    assert (config.checkpoint.every, config.checkpoint.keep, config.data.workers) == (9, 2, 1)
    assert config.optim.milestones == (1, 2)
    assert config.model.dcn is None
    assert config.model.depth == PRESETS["tiny"].model.depth


def test_typo_names_the_nearest_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--data.wrokers", "3"], gpu=False)
    assert caught.value.code == 2
    assert "--data.workers" in capsys.readouterr().err


def test_unknown_preset(capsys):
    with pytest.raises(SystemExit):
        parse(["--preset", "huge"], gpu=False)
    assert "coco-1x" in capsys.readouterr().err


def test_quiet_says_nothing(capsys):
    with pytest.raises(SystemExit):
        parse(["--nonsense"], gpu=False, quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("flags", ["--model.dcn none", "--model.depth 34", "--model.norm ln"])
def test_unknown_choice_names_the_flag(flags, capsys):
    with pytest.raises(SystemExit):
        parse(flags.split(), gpu=False)
    assert flags.split()[0] in capsys.readouterr().err


SYNCBN = "--model.norm syncbn --model.no-norm-eval --model.frozen-stages 0"


@pytest.mark.parametrize(
    ("flags", "gpu", "processes", "need"),
    [
        pytest.param("--preset coco-1x --model.norm syncbn", True, 8, "--model.no-norm-eval", id="kept"),
        pytest.param(f"{SYNCBN} --model.frozen-stages 4", True, 8, "--model.frozen-stages below 4", id="frozen"),
        pytest.param(SYNCBN, False, 2, "GPUs for 2 processes", id="no-gpu"),
        pytest.param(f"{SYNCBN} --device cpu", True, 2, "GPUs for 2 processes", id="cpu"),
    ],
)
def test_syncbn_tells_what_it_needs(flags, gpu, processes, need):
    with pytest.raises(ValueError, match=f"--model.norm syncbn needs {need}"):
        parse(flags.split(), gpu=gpu, processes=processes)


@pytest.mark.parametrize(("gpu", "processes"), [(True, 8), (True, 1), (False, 1)])
def test_syncbn_where_it_works(gpu, processes):
    assert parse(SYNCBN.split(), gpu=gpu, processes=processes).model.norm == "syncbn"


def test_plain_batch_norm_that_learns_its_statistics_is_for_one_process():
    flags = ["--model.norm", "bn", "--model.no-norm-eval"]
    assert not parse(flags, gpu=False).model.norm_eval
    with pytest.raises(ValueError, match="each of 2 processes statistics of its own; take --model.norm syncbn"):
        parse(flags, gpu=True, processes=2)


def test_evaluation_does_not_look_at_the_norm():
    assert parse(["--eval-only", "--model.norm", "syncbn"], gpu=False, processes=2).model.norm == "syncbn"


def test_evaluation_of_a_file_does_not_write_into_another_run():
    with pytest.raises(ValueError, match="--eval-only with --weights needs --out"):
        parse(["--eval-only", "--weights", "w.pt"], gpu=False)


def test_every_field_of_the_model_has_help():
    described = re.findall(r"^ {8}(\w+): ", FasterRCNNConfig.__doc__, re.MULTILINE)
    assert described == [field.name for field in fields(FasterRCNNConfig)]


@pytest.mark.parametrize(
    "flags",
    ["--epochs 0", "--data.batch 0", "--optim.lr 0", "--data.flip 2", "--checkpoint.keep 0", "--data.short-sides 8 64"],
)
def test_impossible_values_name_the_flag(flags):
    with pytest.raises(ValueError, match=flags.split()[0]):
        parse(flags.split(), gpu=False)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    stored = as_dict(PRESETS[name])
    assert json.loads(json.dumps(stored)) == stored
    assert PRESETS[name].preset == name

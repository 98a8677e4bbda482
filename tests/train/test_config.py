import inspect
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from detector import FasterRCNNConfig
from train.command_line import parse
from train.config import PRESETS, as_dict, complete


def test_recipe():
    config = parse(["--preset", "coco-1x"], gpu=False)
    assert config.model == FasterRCNNConfig()
    assert (config.epochs, config.data.batch_size) == (12, 2)
    optim = config.optim
    assert (optim.lr, optim.momentum, optim.weight_decay, optim.warmup) == (0.02, 0.9, 1e-4, 500)
    assert (optim.milestones, optim.gamma, optim.clip_grad) == ((8, 11), 0.1, 0)


SYNCBN = "--model.norm syncbn --model.no-norm-eval --model.frozen-stages 0"


@pytest.mark.parametrize(
    ("flags", "gpu", "processes", "expected"),
    [
        pytest.param("--preset coco-1x --model.norm syncbn", True, 8, "--model.no-norm-eval", id="kept"),
        pytest.param(f"{SYNCBN} --model.frozen-stages 4", True, 8, "--model.frozen-stages below 4", id="frozen"),
        pytest.param(SYNCBN, False, 2, "GPUs for 2 processes", id="no-gpu"),
        pytest.param(f"{SYNCBN} --device cpu", True, 2, "GPUs for 2 processes", id="cpu"),
    ],
)
def test_syncbn_tells_what_it_needs(flags, gpu, processes, expected):
    with pytest.raises(ValueError, match=f"--model.norm syncbn: expected {expected}"):
        parse(flags.split(), gpu=gpu, processes=processes)


@pytest.mark.parametrize(("gpu", "processes"), [(True, 8), (True, 1), (False, 1)])
def test_syncbn_where_it_works(gpu, processes):
    assert parse(SYNCBN.split(), gpu=gpu, processes=processes).model.norm == "syncbn"


@pytest.mark.parametrize(
    ("flags", "gpu", "processes", "expected"),
    [
        pytest.param("", False, 1, "a GPU, got a CPU", id="no-gpu"),
        pytest.param("--device cpu", True, 1, "a GPU, got a CPU", id="cpu"),
        pytest.param("--compile", True, 1, "no --compile, got both", id="compile"),
        pytest.param("--precision fp16", True, 1, "--precision float32, tf32 or bf16, got fp16", id="fp16"),
        pytest.param(SYNCBN, True, 2, "--model.norm bn or gn with 2 processes, got syncbn", id="syncbn"),
    ],
)
def test_graph_tells_what_it_needs(flags, gpu, processes, expected):
    with pytest.raises(ValueError, match=f"--graph: expected {expected}"):
        parse(["--graph", *flags.split()], gpu=gpu, processes=processes)


@pytest.mark.parametrize(("flags", "processes"), [("--precision bf16", 8), (SYNCBN, 1), ("--preset small", 2)])
def test_graph_where_it_works(flags, processes):
    assert parse(["--graph", *flags.split()], gpu=True, processes=processes).graph


def test_plain_batch_norm_that_learns_its_statistics_is_for_one_process():
    flags = ["--model.norm", "bn", "--model.no-norm-eval"]
    assert not parse(flags, gpu=False).model.norm_eval
    message = r"--model.no-norm-eval: expected --model.norm syncbn \(on GPUs\) or gn with 2 processes, got bn"
    with pytest.raises(ValueError, match=message):
        parse(flags, gpu=True, processes=2)


def test_evaluation_does_not_look_at_the_norm():
    assert parse(["--eval-only", "--model.norm", "syncbn"], gpu=False, processes=2).model.norm == "syncbn"


def test_evaluation_of_a_file_does_not_write_into_another_run():
    with pytest.raises(ValueError, match="--eval-only with --weights: expected --out"):
        parse(["--eval-only", "--weights", "w.pt"], gpu=False)


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        pytest.param(None, "none", id="of earlier versions"),
        pytest.param("none", "none", id="none"),
        pytest.param("imagenet", "imagenet", id="imagenet"),
        pytest.param("w.pt", Path("w.pt"), id="text"),
        pytest.param(Path("w.pt"), Path("w.pt"), id="path"),
    ],
)
def test_initial_weights_from_python_or_a_file(given, weights):
    """Frozen random layers are refused on the command line only."""
    assert complete(replace(PRESETS["coco-1x"], weights=given), gpu=False).weights == weights


def test_evaluation_of_the_newest_checkpoint_needs_no_file():
    config = parse(["--preset", "coco-1x", "--eval-only"], gpu=False)
    assert (config.weights, config.out) == ("imagenet", Path("runs/coco-1x"))


def test_every_field_of_the_model_has_help():
    docstring = inspect.getdoc(FasterRCNNConfig)  # without the indentation that Python 3.13 removes by itself
    described = re.findall(r"^ {4}(\w+): ", docstring, re.MULTILINE)
    assert described == [field.name for field in fields(FasterRCNNConfig)]


@pytest.mark.parametrize(
    "flags",
    [
        "--epochs 0",
        "--data.batch-size 0",
        "--optim.lr 0",
        "--optim.ema 2",
        "--checkpoint.keep 0",
        "--data.short-sides 8 64",
        "--data.half-size 1.5",
    ],
)
def test_impossible_values_name_the_flag(flags):
    with pytest.raises(ValueError, match=f"{flags.split()[0]}: expected"):
        parse(flags.split(), gpu=False)


def test_impossible_values_for_python_only_name_the_field():
    tiny = PRESETS["tiny"]
    with pytest.raises(ValueError, match=r"^data\.flip: expected 0 to 1, got 2"):
        complete(replace(tiny, data=replace(tiny.data, flip=2)), gpu=False)
    with pytest.raises(ValueError, match=r"^optim\.offset_lr: expected 0 to 1, got -1"):
        complete(replace(tiny, optim=replace(tiny.optim, offset_lr=-1)), gpu=False)


def test_complete_configuration_stays():
    config = complete(PRESETS["tiny"], gpu=False)
    assert config.out is not None
    assert complete(config, gpu=False) == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    stored = as_dict(PRESETS[name])
    assert json.loads(json.dumps(stored)) == stored
    assert PRESETS[name].preset == name


def test_folder_whose_name_is_not_utf_8_is_refused_at_once():
    with pytest.raises(ValueError, match="--out .*: expected a name in UTF-8"):
        parse(["--out", "runs/caf\udce9"], gpu=False)
    assert parse(["--out", "runs/café \u202e\n$"], gpu=False).out.name == "café \u202e\n$"

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from detector import FasterRCNNConfig
from detector.model.config import RENAMED_FIELDS
from train.command_line import PYTHON_ONLY, ModelFlags, parse
from train.config import PRESETS, REMOVED, RENAMED


@pytest.mark.parametrize(
    ("flags", "gpu", "preset", "is_told"),
    [
        ("", True, "small", False),
        ("", False, "small", False),
        ("--data.root coco", True, "coco-1x", False),
        ("--data.root=coco", True, "coco-1x", False),
        ("--data.root coco --device cuda", True, "coco-1x", False),
        ("--data.root coco", False, "small", True),
        ("--data.root coco --device cpu", True, "small", True),
        ("--data.root coco --device=cpu", True, "small", True),
        ("--device cpu", True, "small", False),
        ("--data.root None", True, "small", False),
        ("--data.root coco --eval-only", False, "small", False),  # the model comes from the file
        ("--data.root coco --preset small", False, "small", False),
        ("--data.root coco --preset small", True, "small", False),
        ("--data.root coco --preset coco-1x", False, "coco-1x", False),
        ("--preset coco-1x", True, "coco-1x", False),
        ("--preset tiny --data.root coco", True, "tiny", False),
    ],
)
def test_preset_by_data_and_device(flags, gpu, preset, is_told, capsys):
    config = parse(flags.split(), gpu=gpu)
    assert config.preset == preset
    assert config.out == Path("runs") / preset
    assert (config.epochs, config.optim, config.model) == (
        PRESETS[preset].epochs,
        PRESETS[preset].optim,
        PRESETS[preset].model,
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == int(is_told)
    assert all(line.startswith("preset small: coco-1x") and "wants a GPU" in line for line in lines)


def test_only_one_process_tells_about_the_preset(capsys):
    parse(["--data.root", "coco"], gpu=False, quiet=True)
    assert capsys.readouterr() == ("", "")


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
    assert config.model.fpn_channels == PRESETS["tiny"].model.fpn_channels


FROM_SCRATCH = "--model.norm gn --model.no-norm-eval --model.frozen-stages -1"


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        pytest.param("--preset coco-1x", "imagenet", id="recipe"),
        pytest.param("--preset small", "none", id="small"),
        pytest.param("--preset tiny", "none", id="tiny"),
        pytest.param("--preset coco-1x --weights imagenet", "imagenet", id="named"),
        pytest.param("--preset coco-1x --weights=w.pt", Path("w.pt"), id="file"),
        pytest.param("--preset coco-1x --weights ./none", Path("none"), id="file of that name"),
        pytest.param("--preset coco-1x --weights none --model.frozen-stages -1", "none", id="nothing frozen"),
        pytest.param("--preset coco-1x --weights none --model.frozen-stages 1", "none", id="frozen on demand"),
        pytest.param("--preset coco-1x --weights none --model.frozen_stages=2", "none", id="another spelling"),
        pytest.param("--preset coco-1x --weights None --model.frozen-stages 1", "none", id="of earlier versions"),
        pytest.param(f"--preset coco-1x {FROM_SCRATCH}", "none", id="from scratch"),
        pytest.param(f"{FROM_SCRATCH} --preset coco-1x --weights w.pt", Path("w.pt"), id="group norm of a file"),
        pytest.param("--preset coco-1x --eval-only --weights none", "none", id="evaluation"),
        pytest.param("--preset small --model.frozen-stages 1", "none", id="small, frozen on demand"),
    ],
)
def test_initial_weights(flags, weights):
    config = parse(flags.split(), gpu=False)
    assert config.weights == weights


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(
            "--preset coco-1x --weights none",
            "--weights none: expected --model.frozen-stages too, got none: .* -1 --model.norm gn .*, .* 1 freezes",
            id="frozen",
        ),
        pytest.param(
            "--preset coco-1x --weights none --model.norm gn --model.no-norm-eval",
            "--weights none: expected --model.frozen-stages too",
            id="frozen group norm",
        ),
        pytest.param(
            "--preset coco-1x --weights None", "--weights none: expected --model.frozen", id="former spelling"
        ),
        pytest.param(
            "--preset coco-1x --model.norm gn --model.no-norm-eval",
            "--weights imagenet: expected a model with batch norm and base_channels 64, .* got norm gn and",
            id="group norm",
        ),
        pytest.param(
            f"--preset coco-1x {FROM_SCRATCH} --weights imagenet",
            "--weights imagenet: expected a model with batch norm",
            id="from scratch with weights",
        ),
        pytest.param(
            "--preset small --weights imagenet",
            "--weights imagenet: .* got norm gn and base_channels 32",
            id="narrow model",
        ),
    ],
)
def test_initial_weights_that_do_not_suit_the_layers(flags, message):
    with pytest.raises(ValueError, match=message):
        parse(flags.split(), gpu=False)


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
    parse(["--eval-overlap", "5"], gpu=False, quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("flags", ["--model.dcn none", "--model.depth 34", "--model.norm ln"])
def test_unknown_choice_names_the_flag(flags, capsys):
    with pytest.raises(SystemExit):
        parse(flags.split(), gpu=False)
    assert flags.split()[0] in capsys.readouterr().err


def help_flags(capsys):
    """Return the names of all flags in the help text."""
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], gpu=False)
    assert caught.value.code == 0
    names = re.findall(r"^\W? *--([a-z][\w.-]*)", capsys.readouterr().out, re.MULTILINE)
    return {name.replace("-", "_") for name in names}


def test_every_value_is_a_flag_or_for_python_only(capsys):
    config = PRESETS["tiny"]
    values = {field.name for field in fields(config)} - {"data", "model", "optim", "checkpoint"}
    for section in ("data", "model", "optim", "checkpoint"):
        values |= {f"{section}.{field.name}" for field in fields(getattr(config, section))}
    flags = help_flags(capsys)
    assert flags | PYTHON_ONLY == values
    assert not flags & PYTHON_ONLY
    assert len(flags) < 54


def test_flags_of_the_model_have_the_types_of_its_fields():
    types = {field.name: field.type for field in fields(FasterRCNNConfig)}
    for flag in fields(ModelFlags):
        assert flag.type == types[flag.name]


@pytest.mark.parametrize(
    "flags", ["--model.anchor-scale 4", "--model.anchor-scale=4", "--model.anchor_scale 4", "--optim.offset-lr 1"]
)
def test_value_for_python_only_says_how_to_set_it(flags):
    flag = re.split("[ =]", flags)[0]
    section, field = flag[2:].replace("-", "_").split(".")
    with pytest.raises(ValueError, match=f"{flag}: expected a flag of train/main.py") as caught:
        parse(flags.split(), gpu=False)
    assert f"replace(config, {section}=replace(config.{section}, {field}=...))" in str(caught.value)


@pytest.mark.parametrize("flags", [["--data.batch", "6"], ["--data.batch=6"], ["--data.batch-size", "6"]])
def test_former_name_of_the_batch_size(flags):
    assert parse(flags, gpu=False).data.batch_size == 6


@pytest.mark.parametrize(("former", "name"), RENAMED_FIELDS.items())
def test_former_flag_of_the_model_names_the_present_field(former, name):
    flag = f"--model.{former.replace('_', '-')}"
    with pytest.raises(ValueError, match=rf"{flag}: .*{name}=\.\.\."):
        parse([flag, "3"], gpu=False)


@pytest.mark.parametrize(
    "flags", [["--eval-overlap", "0"], ["--eval-overlap=0"], ["--evaluator", "faster"], ["--evaluator=pycocotools"]]
)
def test_removed_flag_says_that_it_has_no_effect(flags, capsys):
    config = parse([*flags, "--epochs", "3"], gpu=False)
    assert config == replace(PRESETS["small"], epochs=3, out=Path("runs/small"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{flags[0].split('=')[0]} has no effect any more: ")


def test_former_names_are_not_used_again():
    assert not set(RENAMED) & set(RENAMED.values())
    assert not set(REMOVED) & {field.name for field in fields(PRESETS["tiny"])}
    for name in RENAMED.values():
        value = PRESETS["tiny"]
        for part in name.split("."):
            value = getattr(value, part)

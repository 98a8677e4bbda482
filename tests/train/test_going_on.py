"""Which values a run has that goes on: those that it began with, unless others are asked for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from train.command_line import parse
from train.config import PRESETS, as_dict, complete
from train.going_on import find_given, keep_recorded
from train.run_folder import RunFolder

SMALL = PRESETS["small"]


def command(*flags, gpu=False):
    config = parse(list(map(str, flags)), gpu=gpu)
    return replace(config, given=find_given(config))


def as_record(config, **changes):
    """Return what config.json holds of a run."""
    record = json.loads(json.dumps(as_dict(config)))
    return {**record, "starts": [{"world_size": 1}], **changes}


def of_earlier_version(record):
    """Return a record without what earlier versions did not write."""
    record = {name: value for name, value in record.items() if name != "given"}
    record["data"] = {name: value for name, value in record["data"].items() if name != "half_size"}
    return record


def same_values(config, expected):
    """Tell whether two configurations decide the same run."""
    return replace(config, out=expected.out) == expected


# The preset had other values when the run began.
FORMER = replace(
    SMALL,
    epochs=SMALL.epochs + 3,
    data=replace(SMALL.data, half_size=0.0),
    optim=replace(SMALL.optim, lr=0.125, warmup=7, milestones=(3,), schedule="cosine"),
    model=replace(SMALL.model, dcn=None, dcn_stages=(True, False, False, True), anchor_scale=2.0),
)


@pytest.mark.parametrize("change", [lambda record: record, of_earlier_version], ids=["now", "earlier version"])
@pytest.mark.parametrize("flags", [(), ("--preset", "small")])
def test_run_keeps_the_values_of_a_preset_that_has_changed(change, flags):
    config, (note,) = keep_recorded(command(*flags), change(as_record(FORMER)))
    assert same_values(config, FORMER)
    assert note.startswith("the run keeps the values that it began with: ")
    assert f"epochs {FORMER.epochs} instead of {SMALL.epochs}" in note
    assert keep_recorded(command(*flags), as_record(SMALL))[1] == []


def test_run_keeps_its_preset_on_another_machine():
    begun = command("--data.root", "coco", gpu=True)
    assert begun.preset == "coco-1x"
    config, notes = keep_recorded(command("--data.root", "coco"), as_record(begun))
    assert same_values(config, begun)
    assert notes == ["the run keeps the values that it began with: preset coco-1x instead of small"]


@pytest.mark.parametrize(
    ("before", "now", "difference"),
    [
        (["--seed", 1], [], "seed was 1, is 0"),
        ([], ["--seed", 1], "seed was 0, is 1"),
        (["--optim.lr", 1], ["--optim.lr", 2], "optim.lr was 1.0, is 2.0"),
        (["--model.dcn", "None"], [], "model.dcn was None, is v2"),
        (["--preset", "tiny"], ["--preset", "small"], "preset was tiny, is small"),
        (["--weights", "a.pt"], [], "weights was a.pt, is none"),
        (["--data.root", "a"], [], "data.root was a, is None"),
    ],
)
def test_values_that_were_asked_for_make_another_run(tmp_path, before, now, difference):
    record = as_record(command(*before))
    config, _ = keep_recorded(command(*now), record)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-1.pt").touch()
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=difference):
        RunFolder(tmp_path).claim(config, 1)


def test_values_that_may_change_are_those_of_the_last_command():
    record = as_record(command("--max-steps", 2, "--data.batch-size", 3, "--pictures", 1, "--epochs", 9))
    for stored in (record, of_earlier_version(record)):
        config, _ = keep_recorded(command("--log-every", 5), stored)
        assert (config.max_steps, config.pictures, config.log_every) == (0, SMALL.pictures, 5)
        assert config.data.batch_size == SMALL.data.batch_size


def test_values_of_python_that_differ_from_the_preset_are_asked_for():
    config = replace(SMALL, data=replace(SMALL.data, flip=0.25))
    assert find_given(config) == ("data.flip",)
    record = as_record(replace(config, given=find_given(config)))
    assert keep_recorded(SMALL, record)[0].data.flip == SMALL.data.flip  # the folder refuses it


def test_fine_tuning_goes_on_without_its_file():
    flags = ("--preset", "small", "--weights", "gone.pt", "--model.mask")
    started = replace(command(*flags), model=replace(FORMER.model, mask=True), optim=replace(SMALL.optim, lr=3e-4))
    for record in (as_record(started), of_earlier_version(as_record(started))):
        config, notes = keep_recorded(command(*flags), record)
        assert same_values(config, replace(started, data=config.data))
        assert config.weights == Path("gone.pt")
        assert notes == [] or "optim.lr" not in notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model": {"depth": 19}}, "config field 'depth'"), ({"model": {"new": 1}}, "unknown fields")],
)
def test_damaged_model_is_named(changes, message):
    config = command("--preset", "small")
    with pytest.raises(ValueError, match=f"config.json in --out .*{message}"):
        keep_recorded(replace(config, out=Path("runs/x")), as_record(config, **changes))


@pytest.mark.parametrize("section", ["model", "data", "optim", "checkpoint"])
def test_section_of_another_shape_is_left_to_the_folder(section):
    config = command("--preset", "small")
    assert keep_recorded(config, as_record(FORMER, **{section: 3})) == (config, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, "--optim.name: expected one of sgd, adamw, got adam"),
        ({"schedule": "Cosine"}, "--optim.schedule: expected one of steps, cosine, got Cosine"),
    ],
)
def test_damaged_choice_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        complete(replace(SMALL, optim=replace(SMALL.optim, **changes)), gpu=False)

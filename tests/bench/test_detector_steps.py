"""The detector's benchmarks run, and what they write adds up."""

import csv

import pytest
import torch

from bench import inference, train_step
from bench.detector_steps import OPTIONS, command_line, configure, make_batch
from bench.stages import PARTS, Stages
from detector import FasterRCNN

TINY = ["--preset", "tiny", "--size", "96", "90", "--batch", "2", "--seconds", "0", "--no-peer", "--device", "cpu"]
STAGES = {
    "train": {
        "normalise",
        "backbone",
        "fpn",
        "rpn",
        "rpn loss",
        "proposals",
        "roi",
        "roi loss",
        "backward",
        "optimiser",
    },
    "detect": {"normalise", "backbone", "fpn", "rpn", "proposals", "roi", "detections"},
}


@pytest.mark.parametrize(
    ("module", "mode", "option", "dtype"),
    [(train_step, "train", "bf16", "bfloat16"), (inference, "detect", "channels_last", "float32")],
    ids=["train", "detect"],
)
def test_rows(module, mode, option, dtype, tmp_path, capsys):
    module.main([*TINY, "--options", option, "--csv", str(tmp_path / "rows.csv")])
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["provider"] for row in rows} == {"triton_dcn", f"triton_dcn {option}"}
    for row in rows:
        assert (row["case"], row["shape"]) == ("r18 v2", "2x3x96x90")
        assert row["dtype"] == ("float32" if row["provider"] == "triton_dcn" else dtype)
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
    plain = {row["mode"]: row for row in rows if row["provider"] == "triton_dcn"}
    assert set(plain) == {mode} | {f"{mode} {stage}" for stage in STAGES[mode]}
    whole = float(plain[mode]["ms_p50"])
    parts = sum(float(row["ms_p50"]) for name, row in plain.items() if name != mode)
    assert 0.8 * whole < parts <= whole * 1.001
    assert float(plain[mode]["images_per_second"]) == pytest.approx(2000 / whole, rel=0.01)
    assert int(plain[mode]["launches"]) > 100
    assert "operators per step" in capsys.readouterr().out


def test_masks_are_a_stage():
    options = command_line("bench.train_step", "").parse_args([*TINY, "--mask"])
    config = configure(options)
    model = FasterRCNN(config)
    stages = Stages(model, torch.device("cpu"))
    with stages.watching():
        model(make_batch(config, 1, (64, 64)))
        model.eval()(make_batch(config, 1, (64, 64)))
    assert set(stages.milliseconds()) == set(PARTS)
    assert all("forward" not in vars(part) for part in model.modules())  # nothing stays wrapped


def test_configuration():
    parse = command_line("bench.train_step", "").parse_args
    config = configure(parse([]))
    assert (config.depth, config.dcn, config.mask) == (50, "v2", False)
    config = configure(parse(["--depth", "101", "--dcn", "none", "--mask"]))
    assert (config.depth, config.dcn, config.mask) == (101, None, True)
    assert set(parse([]).options) <= set(OPTIONS)


def test_odd_sizes():
    with pytest.raises(SystemExit, match="heights and widths"):
        train_step.main(["--size", "320", "--no-peer"])

"""The detector's benchmarks run, and what they write adds up."""

import csv

import pytest
import torch

from bench import detector_steps, inference, train_step
from bench.detector_models import make_batch
from bench.detector_steps import OPTIONS, command_line, configure_model
from bench.model_parts import MODEL_PARTS, PartTimer
from bench.rows import COLUMNS, read_csv
from detector import FasterRCNN
from triton_dcn.tf32 import allow_tf32

TINY = ["--preset", "tiny", "--size", "96", "90", "--batch-size", "2", "--seconds", "0", "--no-peer", "--device", "cpu"]
PARTS = {
    "train": {
        "normalize",
        "backbone",
        "fpn",
        "rpn",
        "rpn loss",
        "proposals",
        "roi",
        "roi loss",
        "backward",
        "optimizer",
    },
    "detect": {"normalize", "backbone", "fpn", "rpn", "proposals", "roi", "detections"},
}


@pytest.mark.parametrize(
    ("module", "mode", "option", "dtype"),
    [(train_step, "train", "bf16+channels_last", "bfloat16"), (inference, "detect", "channels_last", "float32")],
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
    assert set(plain) == {mode} | {f"{mode} {part}" for part in PARTS[mode]}
    whole = float(plain[mode]["ms_p50"])
    sum_of_parts = sum(float(row["ms_p50"]) for name, row in plain.items() if name != mode)
    assert 0.8 * whole < sum_of_parts <= whole * 1.001
    assert float(plain[mode]["images_per_second"]) == pytest.approx(2000 / whole, rel=0.01)
    assert int(plain[mode]["launches"]) > 100
    assert "operators per step" in capsys.readouterr().out


def test_a_failure_leaves_the_other_options(tmp_path, monkeypatch, capsys):
    made = {}
    make_step = inference.make_step
    count_launches = detector_steps.count_launches

    def make(model, batch, options, device):
        made["+".join(options)] = torch.backends.cudnn.allow_tf32
        if "bf16" in options:
            raise RuntimeError("no capture")
        return make_step(model, batch, options, device)

    def count_or_fail(step, device):
        if len(made) == 3:
            made["counted"] = True
            raise RuntimeError("no profiler")
        return count_launches(step, device)

    monkeypatch.setattr(inference, "make_step", make)
    monkeypatch.setattr(detector_steps, "count_launches", count_or_fail)
    file = tmp_path / "rows.csv"
    arguments = [*TINY, "--size", "64", "64", "--options", "bf16", "channels_last", "--csv", str(file)]
    assert inference.main(arguments) == 1
    rows = {row["provider"]: row for row in read_csv(file) if row["mode"] == "detect"}
    assert set(rows) == {"triton_dcn", "triton_dcn channels_last"}
    assert rows["triton_dcn"]["launches"] == ""
    assert int(rows["triton_dcn channels_last"]["launches"]) > 100
    assert list(rows["triton_dcn"]) == [*COLUMNS, *detector_steps.EXTRA_COLUMNS]
    err = capsys.readouterr().err
    assert "bench: detect 2x3x64x64 triton_dcn bf16 failed: no capture" in err
    assert "bench: detect: triton_dcn: counting failed: no profiler" in err
    assert not any(made[option] for option in ("", "bf16", "channels_last"))  # float32 is not tf32


def test_steps_of_joined_options(monkeypatch):
    monkeypatch.setattr(detector_steps.detector_models, "TorchvisionFasterRCNN", object)
    parse = command_line("bench.train_step", "").parse_args
    options = parse(["--options", "tf32", "fused", "bf16+channels_last", "graph", "bf16+fused+graph"])

    def groups(mode, device):
        return detector_steps._groups_of_steps(options, mode, configure_model(options), torch.device(device))

    ours = ["triton_dcn", "triton_dcn tf32", "triton_dcn fused", "triton_dcn bf16+channels_last"]
    peers = ["torchvision", "torchvision tf32", "torchvision bf16+channels_last"]
    assert groups("detect", "cuda") == [[*ours, *peers], ["triton_dcn graph"], ["triton_dcn bf16+fused+graph"]]
    ours.remove("triton_dcn fused")
    assert groups("train", "cuda") == [[*ours, *peers], ["triton_dcn graph"]]
    ours.remove("triton_dcn tf32")
    peers.remove("torchvision tf32")
    assert groups("train", "cpu") == [[*ours, *peers]]


@pytest.mark.parametrize("module", [train_step, inference], ids=["train", "detect"])
def test_graphs_of_other_arithmetic(module, monkeypatch):
    """What is captured runs under autocast, with its own weights, and with tf32."""
    captured = []

    def capture(step):
        step()
        captured.append(torch.backends.cuda.matmul.allow_tf32)
        return step, 1.0

    monkeypatch.setattr(module, "capture_graph", capture)
    config = configure_model(command_line("bench.train_step", "").parse_args(TINY))
    batch = make_batch(config, 1, (64, 64))
    arguments = (config, batch, (64, 64), torch.device("cpu"))
    with allow_tf32(False):
        half = detector_steps.build_step(module.make_step, "triton_dcn bf16+channels_last+graph", *arguments)
        single = detector_steps.build_step(module.make_step, "triton_dcn tf32+graph", *arguments)
        assert (half.dtype, half.peak_mib, single.dtype) == ("bfloat16", 1.0, "tf32")
        half.run()
        single.run()
    assert captured == [False, True]


def test_unknown_options(capsys):
    with pytest.raises(SystemExit):
        inference.main(["--options", "bf16+fast"])
    assert "argument --options: expected some of channels_last, " in capsys.readouterr().err


def test_tf32_is_of_one_option_alone():
    def flags():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    with allow_tf32(False):
        assert detector_steps.with_tf32(flags)() == (True, True)
        assert flags() == (False, False)


def test_masks_are_a_part():
    options = command_line("bench.train_step", "").parse_args([*TINY, "--mask"])
    config = configure_model(options)
    model = FasterRCNN(config)
    timer = PartTimer(model, torch.device("cpu"))
    with timer.active():
        model(make_batch(config, 1, (64, 64)))
        model.eval()(make_batch(config, 1, (64, 64)))
    assert set(timer.milliseconds()) == set(MODEL_PARTS)
    assert all("forward" not in vars(module) for module in model.modules())  # nothing stays wrapped


def test_configuration():
    parse = command_line("bench.train_step", "").parse_args
    config = configure_model(parse([]))
    assert (config.depth, config.dcn, config.mask) == (50, "v2", False)
    config = configure_model(parse(["--depth", "101", "--dcn", "None", "--mask"]))
    assert (config.depth, config.dcn, config.mask) == (101, None, True)
    config = configure_model(parse(["--groups", "32", "--width-per-group", "4", "--cascade", "--roi-layer", "mdpool"]))
    assert (config.groups, config.width_per_group, config.cascade, config.roi_layer) == (32, 4, True, "mdpool")
    assert set(parse([]).options) <= set(OPTIONS)


def test_odd_sizes():
    with pytest.raises(SystemExit, match="heights and widths"):
        train_step.main(["--size", "320", "--no-peer"])

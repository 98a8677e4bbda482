"""Which arithmetic a run takes, on which device, and PyTorch's settings while it goes on."""

import json
from dataclasses import replace

import pytest
import torch

from detector.precision import autocast, check_precision, product_settings
from train.command_line import parse
from train.config import PRESETS
from train.distributed import World
from train.precision import choose_precision
from train.run_folder import RunFolder

CPU = "cpu"
V100 = (7, 0)
A100 = (8, 0)
H100 = (9, 0)


@pytest.fixture
def world(monkeypatch):
    """Function: "cpu" or a compute capability -> the single process on such a device."""

    def make(kind):
        if kind == CPU:
            return World(0, 1, 0, torch.device("cpu"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: kind)
        return World(0, 1, 0, torch.device("cuda", 0))

    return make


@pytest.mark.parametrize(
    ("preset", "kind", "expected"),
    [
        ("coco-1x", CPU, "float32"),
        ("coco-1x", V100, "float32"),
        ("coco-1x", A100, "tf32"),
        ("coco-1x", (8, 6), "tf32"),
        ("coco-1x", H100, "tf32"),
        ("coco-1x", (10, 0), "tf32"),
        ("small", CPU, "float32"),
        ("small", H100, "float32"),
        ("tiny", H100, "float32"),
    ],
)
def test_default(preset, kind, expected, world):
    assert choose_precision(PRESETS[preset], world(kind), None) == (expected, [])


def test_default_on_a_gpu_of_amd(world, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert choose_precision(PRESETS["coco-1x"], world((9, 4)), None) == ("float32", [])


def test_one_slow_gpu_among_several_decides_for_all(world, monkeypatch):
    ours = world(H100)
    monkeypatch.setattr(World, "sum", lambda self, value: value + 1)  # another process tells that it has none
    assert choose_precision(PRESETS["coco-1x"], ours, None) == ("float32", [])


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", [CPU, V100, A100])
def test_what_is_asked_for_is_taken_or_refused(precision, kind, world):
    machine = world(kind)
    refused = {CPU: {"tf32"}, V100: {"tf32", "bf16"}, A100: set()}[kind]
    if precision not in refused:
        check_precision(precision, machine.device)
        assert choose_precision(replace(PRESETS["coco-1x"], precision=precision), machine, None) == (precision, [])
        return
    got = "got a CPU" if kind == CPU else "got one of 7.0"
    with pytest.raises(ValueError, match=rf"^--precision {precision}: expected a GPU.*{got}"):
        check_precision(precision, machine.device)


def test_bf16_on_a_gpu_of_amd(world, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.3")
    device = world((9, 4)).device
    check_precision("bf16", device)
    with pytest.raises(ValueError, match="--precision tf32: expected a GPU of NVIDIA, got one of AMD"):
        check_precision("tf32", device)


@pytest.mark.parametrize(
    ("recorded", "kind", "expected", "is_told"),
    [
        ("float32", H100, "float32", False),  # a run of an earlier version keeps its arithmetic
        ("tf32", A100, "tf32", False),
        ("tf32", V100, "float32", True),
        ("tf32", CPU, "float32", True),
        ("bf16", CPU, "bf16", False),
        ("bf16", V100, "float32", True),
    ],
)
def test_run_goes_on_as_it_began(recorded, kind, expected, is_told, world):
    precision, notes = choose_precision(PRESETS["coco-1x"], world(kind), recorded)
    assert precision == expected
    assert [note.startswith(f"precision {recorded} before, {expected} now: expected") for note in notes] == (
        [True] if is_told else []
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", None),
        ("--precision float32", "float32"),
        ("--precision=tf32", "tf32"),
        ("--precision bf16", "bf16"),
        ("--precision fp16", "fp16"),
        ("--amp none", "float32"),
        ("--amp=none", "float32"),
        ("--amp bf16", "bf16"),
        ("--amp=fp16", "fp16"),
    ],
)
def test_flags_of_all_versions(flags, expected):
    assert parse([*flags.split(), "--epochs", "3"], gpu=False) == replace(
        parse(["--epochs", "3"], gpu=False), precision=expected
    )


@pytest.mark.parametrize("flags", ["--precision half", "--amp half", "--amp"])
def test_unknown_precision_names_the_flag(flags, capsys):
    with pytest.raises(SystemExit):
        parse(flags.split(), gpu=False)
    assert "--precision" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("former", "expected"),
    [({"amp": "none"}, "float32"), ({"amp": "bf16"}, "bf16"), ({}, "float32"), ({"precision": "tf32"}, "tf32")],
)
def test_folders_of_all_versions(former, expected, tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim(PRESETS["tiny"], 1)
    assert folder.recorded_choices() is None  # no step yet
    folder.append_metrics({"step": 1, "loss": 1.0})
    record = json.loads((tmp_path / "config.json").read_text())
    del record["precision"]
    (tmp_path / "config.json").write_text(json.dumps({**record, **former}))

    assert folder.recorded_choices().precision == expected
    other = "fp16"
    with pytest.raises(ValueError, match=f"precision was {expected}, is {other}"):
        folder.claim(replace(PRESETS["tiny"], precision=other), 1)
    assert folder.claim(replace(PRESETS["tiny"], precision=other), 1, forced=["precision"]) == []
    assert folder.recorded_choices().precision == other


def test_settings_of_products():
    def settings():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = settings()
    for precision, expected in [("float32", (False, False)), ("tf32", (True, True)), ("bf16", before)]:
        with product_settings(precision):
            assert settings() == expected
        assert settings() == before


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("float32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_autocast(precision, expected):
    with autocast(torch.device("cpu"), precision):
        assert torch.nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == expected

"""The command that leaves out what only training needs."""

import pytest
import torch

import detector
from detector.weights.checkpoint import read_checkpoint
from detector.weights.slim import main
from tests.train.conftest import coco, lines, start  # noqa: F401 (fixtures)
from train.checkpoint import load_checkpoint


def test_every_command_takes_the_file(start, coco, tmp_path, capsys):  # noqa: F811
    common = ("--data.root", coco, "--pictures", 0)
    flags = ("--optim.ema", 0.5, "--model.image-scale", 64, 64, "--max-steps", 2)
    assert start(*common, *flags, "--out", tmp_path / "run")[0] == 0
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    slim = tmp_path / "weights.safetensors"
    assert main([str(best), str(slim)]) == 0
    assert capsys.readouterr().out.startswith(f"{slim}: ")
    assert slim.stat().st_size < 0.45 * best.stat().st_size
    assert slim.stat().st_mode == best.stat().st_mode  # not for its owner alone

    content = load_checkpoint(best)
    state = read_checkpoint(slim).state
    assert state.keys() == content["model"].keys()
    assert all(torch.equal(state[name], value) for name, value in content["model"].items())
    assert any(not torch.equal(state[name], value) for name, value in content["raw_model"].items())
    model, names = detector.load(slim, "cpu")
    assert names == ["red", "blue"]
    assert model.config == detector.load(best, "cpu")[0].config

    assert start(*common, "--eval-only", "--weights", slim, "--out", tmp_path / "evaluated")[0] == 0
    keys = ("AP", "AR100", "classes", "classes_F1")
    found = lines(tmp_path / "evaluated")[0]
    expected = lines(tmp_path / "run")[-1]
    assert [found[key] for key in keys] == [expected[key] for key in keys]
    tuning = ("--weights", slim, "--max-steps", 1, "--data.limit", 2, "--out", tmp_path / "tuned")
    status, stdout, _ = start(*common, *tuning)
    assert status == 0
    assert "start from random values" not in stdout
    assert "images within 64 x 64" in " ".join(stdout.split())


@pytest.mark.parametrize(
    ("content", "out", "message"),
    [
        ({}, "weights.pt", "{out}: expected a name ending in .safetensors"),
        ({}, "there.safetensors", "{out}: expected the name of a new file, got one that exists"),
        ({"x": torch.ones(1)}, "new.safetensors", "{path}: expected a file with class names, got one without"),
        ({"model": {"x": torch.ones(1)}, "classes": ["a"]}, "new.safetensors", "{path}: expected the weights of a wh"),
    ],
    ids=["suffix", "exists", "names", "backbone"],
)
def test_errors_name_the_file(tmp_path, capsys, content, out, message):
    path = tmp_path / "x.pt"
    torch.save(content, path)
    (tmp_path / "there.safetensors").write_bytes(b"precious")
    assert main([str(path), str(tmp_path / out)]) == 1
    assert capsys.readouterr().err.startswith("error: " + message.format(path=path, out=tmp_path / out))
    assert (tmp_path / "there.safetensors").read_bytes() == b"precious"
    assert not (tmp_path / "new.safetensors").exists()

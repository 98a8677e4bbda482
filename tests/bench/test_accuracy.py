"""Errors are measured against float64; one that is too large is named, and the command fails."""

import pytest
import torch

from bench import accuracy, providers
from bench.providers import Provider
from bench.rows import read_csv

SMALL = ["--cases", "dry", "--device", "cpu", "--dtypes", "float32", "bfloat16"]


def test_errors_and_table(tmp_path, capsys):
    file = tmp_path / "errors.csv"

    status = accuracy.main([*SMALL, "--providers", "torch", "conv2d", "--csv", str(file)])

    assert status == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "| reference | torch |" in printed
    rows = read_csv(file)
    assert {row["provider"] for row in rows} == {"reference", "torch"}  # conv2d is a limit, not a way to compute it
    assert len(rows) == 2 * 2 * len(accuracy.QUANTITIES)
    for row in rows:
        epsilon = torch.finfo(getattr(torch, row["dtype"])).eps
        assert 0 < float(row["error"]) < epsilon * 4


def test_too_large_an_error_fails(monkeypatch, capsys):
    right = providers.FACTORIES["torch"]().call
    wrong = Provider(lambda inputs: right(inputs) * 1.01)
    monkeypatch.setitem(providers.FACTORIES, "torch", lambda: wrong)

    assert accuracy.main([*SMALL, "--providers", "torch"]) == 1
    assert "dry float32: output of torch has an error of 1.0e-02" in capsys.readouterr().err


def fails(inputs):
    raise RuntimeError("no kernel")


@pytest.mark.parametrize("factory", [lambda: Provider(fails), lambda: fails(None)], ids=["runs", "loads"])
def test_ours_must_not_be_left_out(factory, monkeypatch, capsys):
    monkeypatch.setitem(providers.FACTORIES, "torch", factory)

    assert accuracy.main([*SMALL, "--providers", "torch"]) == 1
    assert "dry float32: torch could not compute it" in capsys.readouterr().err


def test_a_peer_that_cannot_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(providers.FACTORIES, "mmcv", lambda: Provider(fails))

    assert accuracy.main([*SMALL, "--providers", "mmcv"]) == 0
    out, err = capsys.readouterr()
    assert "mmcv cannot: no kernel" in err
    row = next(line for line in out.splitlines() if line.startswith("| dry"))
    assert "-" in row

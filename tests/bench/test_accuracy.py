"""Errors are measured against float64, and one that is too large is told and fails."""

import csv

import pytest
import torch

from bench import accuracy, providers

SMALL = ["--cases", "dry", "--device", "cpu", "--dtypes", "float32", "bfloat16"]


def test_errors_and_table(tmp_path, capsys):
    file = tmp_path / "errors.csv"
    assert accuracy.main([*SMALL, "--providers", "torch", "conv2d", "--csv", str(file)]) == 0
    assert "| reference | torch |" in " ".join(capsys.readouterr().out.split())
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert {row["provider"] for row in rows} == {"reference", "torch"}  # conv2d is a limit, not a way to compute it
    assert len(rows) == 2 * 2 * len(accuracy.QUANTITIES)
    assert all(0 < float(row["error"]) < torch.finfo(getattr(torch, row["dtype"])).eps * 4 for row in rows)


def test_too_large_an_error_fails(monkeypatch, capsys):
    right = providers.FACTORIES["torch"]().call
    monkeypatch.setitem(providers.FACTORIES, "torch", lambda: providers.Provider(lambda t: right(t) * 1.01))
    assert accuracy.main([*SMALL, "--providers", "torch"]) == 1
    assert "dry float32: output of torch has an error of 1.0e-02" in capsys.readouterr().err


def fails(inputs):
    raise RuntimeError("no kernel")


@pytest.mark.parametrize("factory", [lambda: providers.Provider(fails), lambda: fails(None)], ids=["runs", "loads"])
def test_ours_must_not_be_left_out(factory, monkeypatch, capsys):
    monkeypatch.setitem(providers.FACTORIES, "torch", factory)
    assert accuracy.main([*SMALL, "--providers", "torch"]) == 1
    assert "dry float32: torch could not compute it" in capsys.readouterr().err


def test_a_peer_that_cannot_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(providers.FACTORIES, "mmcv", lambda: providers.Provider(fails))
    assert accuracy.main([*SMALL, "--providers", "mmcv"]) == 0
    out, err = capsys.readouterr()
    assert "mmcv cannot: no kernel" in err
    assert "-" in next(line for line in out.splitlines() if line.startswith("| dry"))

"""The kernels of a call: in a dry run PyTorch's operators stand for them."""

import pytest
import torch

from bench import kernel_times
from bench.kernel_times import GRAPH, HOST, TOTAL, KernelTimer
from bench.rows import read_csv

NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")


def test_launches_and_order():
    timer = KernelTimer(torch.device("cpu"))
    a = torch.randn(64, 64)

    def call():
        a.exp()
        for _ in range(3):
            a.sin()

    kernels = timer.kernel_times(call, rounds=4)
    assert [(kernel.name, kernel.launches) for kernel in kernels] == [("aten::exp", 1), ("aten::sin", 3)]
    assert all(kernel.microseconds > 0 and kernel.total > 0 for kernel in kernels)


@NEEDS_NO_GPU
def test_dry_run_writes_every_kernel(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    file = tmp_path / "kernels.csv"

    assert kernel_times.main(["--dry-run", "--csv", str(file)]) == 0

    rows = read_csv(file)
    assert {(row["provider"], row["mode"]) for row in rows} == {
        ("triton", "fwd"),
        ("triton", "bwd"),
        ("conv2d", "fwd"),
        ("conv2d", "bwd"),
    }
    of_ours = {row["kernel"] for row in rows if row["provider"] == "triton"}
    assert {TOTAL, HOST, "triton_dcn::deform_conv2d"} <= of_ours
    assert GRAPH not in of_ours
    assert "== dry" in capsys.readouterr().out


@NEEDS_NO_GPU
def test_no_time_left(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernel_times.main(["--dry-run", "--seconds", "-1"]) == 1
    assert "no time left for dry" in capsys.readouterr().err

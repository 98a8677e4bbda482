"""The search works the first time: its dry run makes every call, and leaves the settings as they were."""

import pytest
import torch

from bench import choices, tune
from bench.cases import CASES, make_inputs
from bench.deform_conv import DTYPES
from bench.measure import Timing
from bench.report import read_csv
from triton_dcn import tile_table


def test_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    before = tile_table.TABLE, tile_table.STRIP_MIN_WIDTH
    assert tune.main(["--dry-run", "--csv", str(tmp_path / "tune.csv")]) == 0
    assert before == (tile_table.TABLE, tile_table.STRIP_MIN_WIDTH)
    assert not torch.are_deterministic_algorithms_enabled()
    printed = capsys.readouterr()
    for stage in tune.NEEDS:
        assert f"\n{stage}, dry" in printed.out
    for way in ("table", "general way", "strips", "rows", "stable sort", "forward_transposed"):
        assert f"ms  {way}" in printed.out
    assert "cannot" not in printed.err
    assert "disagrees" not in printed.err
    assert len((tmp_path / "tune.csv").read_text().splitlines()) > 20


def test_a_wrong_kernel_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(tune, "exact", lambda inputs: [torch.ones(1, dtype=torch.float64)] * 5)
    options = type("Options", (), {"most": 0, "seconds": 0.0})
    failed = []
    assert not tune.tune("columns", CASES["dry"][0], "float32", torch.device("cpu"), options, failed)
    assert failed == ["columns dry float32: table"]
    assert "table disagrees" in capsys.readouterr().err


def test_a_failure_leaves_what_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    found = {choices.Choice("table", ()): Timing(2.0, 1.0, 3.0, None)}

    def tune_or_fail(stage, *others):
        if stage == "columns":
            raise RuntimeError("no kernel")
        return found

    def fails(timed):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(tune, "tune", tune_or_fail)
    monkeypatch.setattr(tune, "new_row", fails)
    stages = ["--stages", "forward", "columns", "g_form"]
    assert tune.main(["--dry-run", *stages, "--csv", str(tmp_path / "tune.csv")]) == 1
    assert [row["mode"] for row in read_csv(tmp_path / "tune.csv")] == ["forward", "g_form"]
    err = capsys.readouterr().err
    assert "bench: columns dry bfloat16 failed: no kernel" in err
    assert "bench: g_form dry bfloat16 failed: no compiler" in err


def test_new_rows_are_rows_of_the_table():
    """A choice is found by the table's own rule, so that what was timed is what the row will do."""
    inputs = make_inputs(CASES["dry"][0], DTYPES["bfloat16"], torch.device("cpu"), 2.0)
    found = [choice for choice in choices.choices("forward", inputs, 4) if choice.row and choice.label != "table"]
    assert found
    for choice in found:
        with choice.in_force():
            assert tile_table.choose("forward", *choice.row.archs, choice.row.arithmetic, 16, 16) is choice.row


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        tune.main([])

"""The search works the first time: its dry run makes every call, and leaves the settings as they were."""

import functools

import pytest
import torch

from bench import tune
from bench.cases import CASES, make_inputs
from bench.device import DTYPES
from bench.measure import Timing, time_interleaved
from bench.rows import read_csv
from bench.tuning_candidates import WAYS, Candidate, candidates
from triton_dcn import tile_table, triton_backend, workspace


def test_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    one_round = functools.partial(time_interleaved, min_rounds=1)  # the times say nothing
    monkeypatch.setattr(tune, "time_interleaved", one_round)
    before = (tile_table.TABLE, tile_table.STRIP_MIN_WIDTH)
    assert tune.main(["--dry-run", "--csv", str(tmp_path / "tune.csv")]) == 0
    assert before == (tile_table.TABLE, tile_table.STRIP_MIN_WIDTH)
    assert not torch.are_deterministic_algorithms_enabled()
    printed = capsys.readouterr()
    for task in tune.GRADIENTS_OF_TASK:
        assert f"\n{task}, dry" in printed.out
    for label in ("table", "general way", "strips", "rows", "stable sort", "forward_prefetch"):
        assert f"ms  {label}" in printed.out
    assert "cannot" not in printed.err
    assert "disagrees" not in printed.err
    assert len((tmp_path / "tune.csv").read_text().splitlines()) > 20


@pytest.mark.parametrize("task", WAYS)
def test_both_ways_to_the_gradient_of_the_input(task):
    """A candidate takes the way of its task, whatever moves less; the other way is a candidate of its own."""
    inputs = make_inputs(CASES["dry"][0], DTYPES["bfloat16"], torch.device("cpu"), 2.0)
    ways = {}
    for candidate in candidates(task, inputs, 2):
        with candidate.applied():
            by_t = triton_backend.prefers_t_columns(inputs.geometry, needs_samples=True)
        ways[candidate.label] = "t_columns" if by_t else "g_form"
    other_way = WAYS[1 - WAYS.index(task)]
    assert len(ways) > 3
    assert {label for label, way in ways.items() if way == other_way} == {other_way}
    assert triton_backend.prefers_t_columns is workspace.prefers_t_columns


def test_a_wrong_kernel_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(tune, "reference_results", lambda inputs: [torch.ones(1, dtype=torch.float64)] * 5)
    options = type("Options", (), {"max_tiles": 0, "seconds": 0.0})
    failed = []
    assert not tune.tune("columns", CASES["dry"][0], "float32", torch.device("cpu"), options, failed)
    assert failed == ["columns dry float32: table"]
    assert "table disagrees" in capsys.readouterr().err


def test_a_failure_leaves_what_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    timings = {Candidate("table", ()): Timing(2.0, 1.0, 3.0, None)}

    def tune_or_fail(task, *others):
        if task == "columns":
            raise RuntimeError("no kernel")
        return timings

    def fails(timings):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(tune, "tune", tune_or_fail)
    monkeypatch.setattr(tune, "new_row", fails)
    tasks = ["--tasks", "forward", "columns", "g_form"]
    assert tune.main(["--dry-run", *tasks, "--csv", str(tmp_path / "tune.csv")]) == 1
    assert [row["mode"] for row in read_csv(tmp_path / "tune.csv")] == ["forward", "g_form"]
    err = capsys.readouterr().err
    assert "bench: columns dry bfloat16 failed: no kernel" in err
    assert "bench: g_form dry bfloat16 failed: no compiler" in err


def test_new_rows_are_rows_of_the_table():
    """The table's own rule finds the row of a candidate, so that what was timed is what the row will do."""
    inputs = make_inputs(CASES["dry"][0], DTYPES["bfloat16"], torch.device("cpu"), 2.0)
    with_new_rows = [
        candidate for candidate in candidates("forward", inputs, 4) if candidate.row and candidate.label != "table"
    ]
    assert with_new_rows
    for candidate in with_new_rows:
        row = candidate.row
        with candidate.applied():
            assert tile_table.match_row("forward", *row.archs, row.arithmetic, 16, 16) is row


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(SystemExit, match="expected a CUDA GPU, got none"):
        tune.main([])

"""The benchmark as a user runs it, on its smallest case: nothing wrong passes for right, and its files can be read."""

import csv
import time

import pytest
import torch

from bench import deform_conv, measure, providers, report
from bench.cases import CASES, make_inputs, select_cases
from bench.providers import Provider
from bench.roofline import Machine
from bench.rows import COLUMNS, ERROR_COLUMN, read_csv

CPU = torch.device("cpu")
SMALLEST = ["--cases", "odd-pointwise", "--seconds", "0", "--device", "cpu", "--threads", "1"]


def test_run_and_reports(tmp_path, capsys):
    file = tmp_path / "run.csv"
    bars = tmp_path / "bars.png"
    roofline = tmp_path / "roofline.png"

    deform_conv.main([*SMALLEST, "--modes", *measure.MODES, "--providers", "torch", "conv2d", "--csv", str(file)])
    assert "odd-pointwise bwd" in capsys.readouterr().out
    with file.open() as lines:
        assert next(csv.reader(lines)) == [*COLUMNS, ERROR_COLUMN]
    rows = read_csv(file)
    assert {row["provider"] for row in rows} == {"torch", "conv2d", "roofline", "machine"}
    assert all(float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"]) for row in rows)

    report.main([str(file), str(file), "--png", str(bars), "--roofline", str(roofline)])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| odd")]
    assert len(table) == 3
    ratios = [cell.strip() for line in table for cell in line.split("|")[4:-1]]
    assert set(ratios) == {"1.00"}
    assert bars.stat().st_size > 1000
    assert roofline.stat().st_size > 1000


def test_a_failure_between_two_rounds_leaves_the_other_rows(capsys):
    calls = {"steady": 0, "failing": 0}

    def call(name):
        calls[name] += 1
        if name == "failing" and calls[name] > 3:
            raise RuntimeError("out of memory")

    failed = []
    functions = {name: lambda name=name: call(name) for name in calls}

    timings = measure.time_interleaved(functions, CPU, 0.0, "case", failed)

    assert list(timings) == ["steady"]
    assert failed == ["case: failing"]
    assert calls["steady"] > calls["failing"]
    assert "case: failing failed: out of memory" in capsys.readouterr().err


def test_a_peer_that_disagrees_is_timed_with_its_error(tmp_path, monkeypatch, capsys):
    right = providers.FACTORIES["torch"]().call

    def fails(inputs):
        raise RuntimeError("no kernel")

    others = {
        "wrong": lambda: Provider(lambda inputs: right(inputs) * 1.01),
        "failing": lambda: Provider(fails),
    }
    monkeypatch.setattr(providers, "FACTORIES", {**providers.FACTORIES, **others})

    file = tmp_path / "run.csv"
    arguments = ["--modes", "fwd", "--providers", "wrong", "failing", "torch", "--csv", str(file)]
    assert deform_conv.main([*SMALLEST, *arguments]) == 0

    out, err = capsys.readouterr()
    assert "wrong disagrees by 1.0e-02" in err
    assert "failing cannot: no kernel" in err
    header, _, line = [line for line in out.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.split("|")[4:-1]] == [
        "triton-dcn, torch backend",
        "least time by roofline",
        "wrong",
    ]
    errors = [cell.partition(" error ")[2].strip() for cell in line.split("|")[4:-1]]
    assert errors == ["", "", "1e-02"]
    report.draw_bars(read_csv(file), tmp_path / "bars.png")


@pytest.fixture
def quick_machine(monkeypatch):
    monkeypatch.setattr(deform_conv, "measure_machine", lambda dtype, device, seconds: Machine(1e6, 1e6, ()))


@pytest.mark.usefixtures("quick_machine")
def test_a_failure_while_timing_leaves_the_rest(tmp_path, monkeypatch, capsys):
    right = providers.FACTORIES["torch"]().call

    def fails_in_large(inputs):
        if inputs.case.batch > 1:  # the check takes one image
            raise RuntimeError("out of memory")
        return right(inputs)

    monkeypatch.setitem(providers.FACTORIES, "mmcv", lambda: Provider(fails_in_large))
    file = tmp_path / "run.csv"
    providers_and_file = ["--providers", "mmcv", "torch", "--csv", str(file)]

    assert deform_conv.main([*SMALLEST, "--modes", "fwd", "bwd", *providers_and_file]) == 1

    assert {(row["provider"], row["mode"]) for row in read_csv(file)} == {
        ("torch", "fwd"),
        ("torch", "bwd"),
        ("roofline", "fwd"),
        ("roofline", "bwd"),
    }
    err = capsys.readouterr().err
    assert "bench: odd-pointwise float32 fwd: mmcv failed: out of memory" in err
    assert "bench: odd-pointwise float32 bwd: mmcv failed: out of memory" in err
    assert "Traceback" in err


@pytest.mark.usefixtures("quick_machine")
def test_a_failed_case_leaves_the_others_and_each_is_written_at_once(tmp_path, monkeypatch, capsys):
    file = tmp_path / "run.csv"
    rows_before_failure = []
    measure_case = deform_conv._measure

    def measure_or_fail(case, *others):
        if case.name == "micro-32":
            rows_before_failure.extend(read_csv(file))
            raise RuntimeError("no kernel")
        return measure_case(case, *others)

    monkeypatch.setattr(deform_conv, "_measure", measure_or_fail)
    cases = ["--cases", "odd-pointwise", "micro-32", "odd-kernel"]

    assert deform_conv.main([*SMALLEST, *cases, "--modes", "fwd", "--providers", "torch", "--csv", str(file)]) == 1

    assert {row["case"] for row in rows_before_failure} == {"odd-pointwise"}
    assert {row["case"] for row in read_csv(file)} == {"odd-pointwise", "odd-kernel"}
    assert "bench: micro-32 float32 failed: no kernel" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_machine")
def test_ours_must_not_be_left_out(monkeypatch, capsys):
    right = providers.FACTORIES["torch"]().call
    wrong = Provider(lambda inputs: right(inputs) * 1.01)
    monkeypatch.setitem(providers.FACTORIES, "torch", lambda: wrong)

    assert deform_conv.main([*SMALLEST, "--modes", "fwd", "--providers", "torch"]) == 1
    assert "torch disagrees" in capsys.readouterr().err


def test_the_case_of_a_row_has_the_sizes_of_its_shape():
    cases = select_cases(["r50", "odd"], batch_size=16) + select_cases(["r50", "odd"], offset_groups=4)
    for case in cases:
        for shape in (case.shape, case.shape + " nhwc off2 smooth"):
            assert report.case_of({"case": case.name, "shape": shape}) == case
    assert report.case_of({"case": "copy", "shape": "67108864 bytes"}) is None


@pytest.mark.usefixtures("quick_machine")
def test_a_nan_among_the_gradients_is_seen(monkeypatch, capsys):
    right = providers.FACTORIES["torch"]().call

    def with_nan_gradient(inputs):
        zero = (inputs.weight - inputs.weight.detach()).sum().sqrt()  # its gradient is not finite
        return right(inputs) + zero

    others = {"lost": lambda: Provider(with_nan_gradient)}
    monkeypatch.setattr(providers, "FACTORIES", {**providers.FACTORIES, **others})

    deform_conv.main([*SMALLEST, "--modes", "fwd", "--providers", "lost"])
    assert "lost disagrees by" in capsys.readouterr().err


def test_largest_error():
    assert str(measure.largest_error([1e-7, float("nan"), 1.0])) == "nan"
    assert measure.largest_error([1e-7, 1.0, 0.5]) == 1.0


@pytest.mark.parametrize("arguments", [["--cases", "nowhere"], ["--providers", "nobody"]], ids=lambda a: a[1])
def test_unknown_names_end_without_a_stack_trace(arguments):
    with pytest.raises(SystemExit, match=f"{arguments[0]}: expected one of .*, got '{arguments[1]}'"):
        deform_conv.main([*SMALLEST, *arguments])


def test_absent_peers_are_named(monkeypatch):
    monkeypatch.setitem(providers.FACTORIES, "tvdcn", lambda: __import__("surely_not_installed"))
    loaded, missing = providers.load_providers(None, CPU)
    assert {"torch", "conv2d"} <= set(loaded)
    assert "surely_not_installed" in missing["tvdcn"]
    assert "GPU" in missing["triton"]


def test_cases_are_valid_and_counted():
    for case in select_cases(["all"]):
        geom = make_inputs(case, torch.float32, torch.device("meta"), 0.0).geometry
        assert (geom.out_height, geom.out_width) == case.out_size
    c3 = CASES["r50"][0]
    assert c3.flops("fwd") == 2 * 2 * 100 * 168 * 9 * 128 * 128
    assert c3.flops("both") == 3 * c3.flops("fwd")
    assert select_cases(["r50-c3"], batch_size=16, offset_groups=4)[0].shape == "16x128x100x168 dg4"


def test_smooth_offsets():
    case = CASES["r50"][0]
    for smooth in (False, True):
        offset = make_inputs(case, torch.float32, CPU, 2.0, smooth=smooth).offset.detach()
        fraction = offset - offset.floor()
        steps = (offset[..., 1:] - offset[..., :-1]).abs()
        assert 1.9 < offset.std() < 2.1
        assert 0.1 - 1e-5 < fraction.min() < fraction.max() < 0.9 + 1e-5
        assert (steps.mean().item() < 0.6) is smooth


def test_peak_memory_sees_what_is_freed_again():
    peak = measure.peak_memory(lambda: torch.ones(16 << 20), CPU)
    assert peak is None or 60 < peak < 80


def test_the_device_sleeps_longer_than_the_host_takes(monkeypatch):
    """Launches that take the host 4 ms: the device sleeps 6 ms before each call, after one that is not timed."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def elapsed_time(self, other):
            return 1.25

    cycles = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", cycles.append, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = []

    def call():
        calls.append(len(cycles))
        time.sleep(0.004)

    clock = measure._cuda_clock(CPU)
    assert [clock(call), clock(call), clock(lambda: None)] == [1.25] * 3
    assert calls == [0, 1, 2]
    least, most = (limit * measure.CYCLES_PER_MS for limit in measure.SLEEP_MS)
    assert 6 * measure.CYCLES_PER_MS <= cycles[0] == cycles[1] <= most
    assert cycles[2] == least

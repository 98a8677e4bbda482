"""The baseline of float atomics computes what the bins do, and the command works the first time: its dry run."""

import functools

import pytest
import torch

from bench import atomics, ceilings
from bench.cases import CASES, Case, make_inputs
from bench.measure import comparison_inputs, reference_results, time_interleaved
from bench.rows import read_csv
from bench.triton_calls import select_gradients

CPU = torch.device("cpu")
DRY = CASES["dry"][0]
ODD = Case("odd", 2, 24, 8, 5, 7, (3, 2), (2, 1), (1, 1), (1, 2), groups=2, offset_groups=4)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("case", [DRY, ODD], ids=lambda case: case.name)
@pytest.mark.parametrize("mode", atomics.GRADIENTS_OF_MODE)
def test_every_method_is_right(case, mode):
    inputs = make_inputs(case, torch.float32, CPU, 2.0)
    expected_grads = select_gradients(reference_results(inputs), atomics.GRADIENTS_OF_MODE[mode])

    for name, call in atomics.scatter_methods(inputs, mode).items():
        for grad, expected in zip(call(), expected_grads, strict=True):
            assert grad.shape == expected.shape, name
            assert (grad.double() - expected).norm() < 2e-6 * expected.norm(), name


def test_wrong_gradients_are_named(monkeypatch, capsys):
    monkeypatch.setattr(atomics, "gradients_by_atomics", lambda inputs, mode: [torch.zeros_like(inputs.input)])
    inputs = comparison_inputs(DRY, torch.float32, CPU, 2.0)
    failed: list[str] = []

    agreeing = atomics._agreeing_methods(inputs, reference_results(inputs), "float32", "grad_input", failed)

    assert agreeing == ["bins", "stable sort"]
    assert failed == ["dry float32 grad_input: atomics"]
    assert "atomics disagrees by 1.0e+00" in capsys.readouterr().err


def test_dry_run(tmp_path, monkeypatch, capsys):
    file = tmp_path / "atomics.csv"
    one_round = functools.partial(time_interleaved, min_rounds=1)  # the times say nothing
    monkeypatch.setattr(atomics, "time_interleaved", one_round)

    assert atomics.main(["--dry-run", "--smooth", "--csv", str(file)]) == 0

    printed = " ".join(capsys.readouterr().out.split())
    assert "| atomics |" in printed
    assert "l2 read: " in printed
    assert len(file.read_text().splitlines()) == 1 + 9 + 2 * 3


def test_a_failure_leaves_the_rest(tmp_path, monkeypatch, capsys):
    file = tmp_path / "atomics.csv"

    def fails():
        raise RuntimeError("no kernel")

    def one_method_fails(inputs, mode):
        return {"bins": lambda: reference_results(inputs)[1:2], "atomics": fails}

    monkeypatch.setattr(ceilings, "read_l2", lambda device, nbytes: (lambda: torch.ones(8).sum(), 32))
    monkeypatch.setattr(ceilings, "add_rows", lambda buffer, width, rows: (fails, 32))
    monkeypatch.setattr(atomics, "scatter_methods", one_method_fails)
    monkeypatch.setattr(atomics, "GRADIENTS_OF_MODE", {"grad_input": atomics.GRADIENTS_OF_MODE["grad_input"]})

    assert atomics.main(["--dry-run", "--csv", str(file)]) == 1

    written = [(row["provider"], row["case"]) for row in read_csv(file)]
    assert written == [("machine", "l2 read"), ("bins", "dry")]
    err = capsys.readouterr().err
    assert "bench: ceilings: atomics in L2, 256 B rows, aligned failed: no kernel" in err
    assert "bench: dry bfloat16 grad_input: atomics failed: no kernel" in err


@pytest.mark.parametrize("first", [0, 1], ids=["aligned", "single"])
def test_atomics_add_what_they_say(first):
    target = torch.zeros(256 * 64 + 1)[first : first + 256 * 64]

    call, moved = ceilings.add_rows(target, 64, 32)
    call()

    assert moved == 32 * 64 * 4
    assert target.sum() == 32 * 64
    touched = target.view(256, 64) != 0
    assert touched.any(1).sum() > 20  # many different rows, and each of them in full
    assert torch.equal(touched.any(1), touched.all(1))

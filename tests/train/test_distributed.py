"""Several processes on this machine: equal to one, and what becomes of them when something breaks."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.conftest import environment, free_port, lines, rank_variables, tiny
from tests.train.processes import ScriptProcess
from train.checkpoint import list_checkpoints, load_checkpoint
from train.distributed import _bind, _connect, join_processes

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
LOSSES = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss")


def wait_for_step(out: Path, step: int, process: ScriptProcess) -> None:
    """Wait until a run has written the losses of a step."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        if (out / "metrics.jsonl").exists() and any(line["step"] >= step for line in lines(out)):
            return
        assert process.is_alive(), process.finish()
        time.sleep(0.1)
    raise AssertionError(f"no step {step}")


def pid_of_rank(rank: int, out: Path) -> int:
    """Return the process id of a rank of the run in `out`."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not folder.name.isdigit() or str(out) not in (folder / "cmdline").read_text().split("\0"):
                continue
            if f"RANK={rank}" in (folder / "environ").read_text().split("\0"):
                return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Return the weights in the newest checkpoint of a run."""
    return load_checkpoint(list_checkpoints(out / "checkpoints")[0])["model"]


def test_two_processes_equal_one_with_the_doubled_batch(coco, tmp_path, launch, start):
    common = ("--data.root", coco, "--epochs", 2, "--checkpoint.every", 0, "--pictures", 0)
    port = free_port()
    two = ("--data.batch-size", 2, "--out", tmp_path / "two")
    ranks = [launch(*common, *two, **rank_variables(port, rank, 2)) for rank in range(2)]
    status, _, stderr = start(*common, "--data.batch-size", 4, "--out", tmp_path / "one")
    assert status == 0, stderr
    ends = [rank.finish() for rank in ranks]
    assert [status for status, _ in ends] == [0, 0], ends
    first = lines(tmp_path / "one")
    second = lines(tmp_path / "two")
    assert len(first) == len(second) == 6
    for line, other in zip(first, second, strict=True):
        assert line["step"] == other["step"]
        if "loss" in line:
            assert line["lr"] == other["lr"]
            # Each process divides by the number of its own regions, as the reference does, and rounding may change
            # which regions there are; before the first update neither can happen.
            tolerance = 1e-5 if line["step"] == 1 else 1e-3
            for name in LOSSES:
                np.testing.assert_allclose(line[name], other[name], rtol=tolerance, err_msg=name)
        else:
            assert line["AP"] == pytest.approx(other["AP"], abs=1e-2)
    first_weights = torch.cat([value.flatten() for value in weights(tmp_path / "one").values()])
    second_weights = torch.cat([value.flatten() for value in weights(tmp_path / "two").values()])
    assert (first_weights - second_weights).norm() <= 1e-4 * first_weights.norm()


def test_killed_rank_is_named_and_the_run_goes_on_elsewhere(coco, tmp_path, launch, start):
    common = ("--data.root", coco, "--pictures", 0, "--checkpoint.every", 2, "--eval-every", 999, "--timeout", 60)
    out = tmp_path / "run"
    process = launch(*common, "--epochs", 500, "--out", out, torchrun=("--nproc_per_node=2", "--standalone"))
    wait_for_step(out, 3, process)
    os.kill(pid_of_rank(1, out), signal.SIGKILL)
    status, text = process.finish()
    assert status != 0
    assert "error: rank 0: lost the connection" in text
    assert "no word from rank 1: killed" in text

    step = load_checkpoint(list_checkpoints(out / "checkpoints")[0])["step"]
    # now with one process, this one
    status, stdout, stderr = start(*common, "--epochs", 500, "--max-steps", step + 1, "--out", out)
    assert status == 0, stderr
    stdout = " ".join(stdout.split())
    assert "number of processes: 2 before, 1 now" in stdout
    assert "4 images per batch before, 2 now" in stdout
    assert [line["step"] for line in lines(out) if "loss" in line] == list(range(1, step + 2))


def test_torchrun_restarts_what_was_killed(coco, tmp_path, launch):
    out = tmp_path / "run"
    common = ("--data.root", coco, "--pictures", 0, "--checkpoint.every", 1, "--eval-every", 999, "--timeout", 60)
    torchrun = ("--nproc_per_node=2", "--standalone", "--max-restarts=3")
    process = launch(*common, "--epochs", 4, "--out", out, torchrun=torchrun)
    wait_for_step(out, 2, process)
    os.kill(pid_of_rank(1, out), signal.SIGKILL)
    status, text = process.finish()
    assert status == 0, text
    assert "going on after step" in text
    assert [line["step"] for line in lines(out) if "loss" in line] == list(range(1, 9))


def test_sigterm_to_torchrun_writes_a_checkpoint(coco, tmp_path, launch):
    out = tmp_path / "run"
    common = ("--data.root", coco, "--pictures", 0, "--checkpoint.every", 0, "--eval-every", 999, "--epochs", 500)
    process = launch(*common, "--out", out, "--data.limit", 4, torchrun=("--nproc_per_node=2", "--standalone"))
    wait_for_step(out, 2, process)
    before = len(list_checkpoints(out / "checkpoints"))
    os.kill(process.pid, signal.SIGTERM)
    _, text = process.finish()
    assert "stopped by SIGTERM after step" in text
    assert load_checkpoint(list_checkpoints(out / "checkpoints")[0])["step"] >= 2
    assert before <= 3


def test_two_machines_meet(coco, tmp_path, launch):
    common = ("--data.root", coco, "--pictures", 0, "--out", tmp_path / "run", "--max-steps", 2)
    endpoint = f"--rdzv-endpoint=localhost:{free_port()}"
    torchrun = ("--nproc_per_node=1", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=test", endpoint)
    agents = [launch(*common, torchrun=torchrun) for _ in range(2)]
    ends = [agent.finish() for agent in agents]
    assert [status for status, _ in ends] == [0, 0], ends
    assert sum("2 x cpu" in text for _, text in ends) == 1
    assert len(lines(tmp_path / "run")) == 3


def test_late_threads_of_the_group_do_not_abort_the_run(coco, tmp_path):
    """In processes of their own from the start, since forked ones end too quickly to meet such a thread."""
    code = """if True:
        import sys, torch, train.main
        def leave_in_haste(world):
            for _ in range(2000):
                torch.distributed.all_reduce(torch.zeros(20000), async_op=True)
        train.main.leave_processes = leave_in_haste
        sys.exit(train.main.main())
    """
    arguments = tiny("--data.root", coco, "--pictures", 0, "--max-steps", 1, "--out", tmp_path / "run")
    command = [sys.executable, "-c", code, *arguments]
    port = free_port()
    ranks = []
    for rank in range(2):
        variables = environment(**rank_variables(port, rank, 2))
        ranks.append(
            subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        texts = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], texts


def test_missing_rank_is_named(coco, tmp_path, launch):
    arguments = ("--data.root", coco, "--out", tmp_path / "run", "--timeout", 5)
    port = free_port()
    ends = [rank.finish() for rank in [launch(*arguments, **rank_variables(port, rank, 3)) for rank in range(2)]]
    assert [status for status, _ in ends] == [1, 1]
    assert "rank 2 did not come within 5 s" in ends[0][1]
    assert not (tmp_path / "run").exists()


def test_taken_port_is_named(coco, tmp_path, start, monkeypatch):
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        for name, value in rank_variables(port, 0, 2).items():
            monkeypatch.setenv(name, value)
        status, _, stderr = start("--data.root", coco, "--out", tmp_path / "run", "--timeout", 5)
    assert status == 1
    assert f"localhost:{port}" in stderr
    assert "address already in use" in stderr


def resolve_to(monkeypatch, *addresses: str) -> None:
    """Let every name stand for these addresses."""

    def resolve(_, port, **__):
        infos = []
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            infos.append((family, socket.SOCK_STREAM, 0, "", (address, port)))
        return infos

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.parametrize(
    ("host", "addresses", "bound"),
    [
        pytest.param("127.0.0.1", ["127.0.0.1"], "127.0.0.1", id="address"),
        pytest.param("127.0.0.2", ["127.0.0.2"], "127.0.0.2", id="other loopback address"),
        pytest.param("0.0.0.0", ["0.0.0.0"], "0.0.0.0", id="every address"),
        pytest.param("::1", ["::1"], "::1", id="version 6"),
        pytest.param("localhost", ["127.0.0.1"], "127.0.0.1", id="localhost"),
        pytest.param("localhost", ["::1", "127.0.0.1"], "::1", id="first of two"),
        pytest.param("node0", ["198.51.100.1", "127.0.0.1", "127.0.0.2"], "127.0.0.1", id="first of this machine"),
        pytest.param("service", ["198.51.100.1"], None, id="in front of this machine"),
        pytest.param("service", ["2001:db8::1", "198.51.100.1"], None, id="in front of this machine, two"),
        pytest.param("node0", ["127.0.1.1"], None, id="name of this machine to itself"),
    ],
)
def test_rank_0_listens_where_master_addr_says(monkeypatch, capsys, host, addresses, bound):
    resolve_to(monkeypatch, *addresses)
    listener = _bind(host, free_port())
    note = f"as MASTER_ADDR {host} stands for {', '.join(addresses)} here\n"
    assert capsys.readouterr().err.endswith(note) == (bound is None)
    if listener is None:
        assert bound is None
    else:
        with socket.socket(fileno=listener) as socket_of_listener:
            assert socket_of_listener.getsockname()[0] == bound


def test_a_port_that_is_taken_at_any_address_of_the_name(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        resolve_to(monkeypatch, "127.0.0.2", "127.0.0.1")
        with pytest.raises(OSError, match=r"^127\.0\.0\.1: address already in use$"):
            _bind("localhost", server.getsockname()[1])


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux")
def test_the_store_listens_nowhere_else():
    port = free_port()
    store = _connect("127.0.0.1", port, is_server=True, timeout=timedelta(seconds=5))
    store.set("key", "value")
    assert store.get("key") == b"value"

    is_listening = "0A"
    addresses = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == is_listening and local.endswith(f":{port:04X}"):
                addresses.append(local.partition(":")[0])
    assert addresses == ["0100007F"]


def test_a_name_that_nobody_knows_is_one_line(monkeypatch):
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "no-such-machine.invalid", "MASTER_PORT": "29500"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConnectionError, match="cannot meet the others at no-such-machine.invalid:29500: .* not known"):
        join_processes("cpu", 5.0)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        pytest.param({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: expected less than WORLD_SIZE = 2, got 2", id="rank"),
        pytest.param({"RANK": "0"}, "RANK, WORLD_SIZE: expected both or neither", id="half"),
        pytest.param(
            {"RANK": "a", "WORLD_SIZE": "2"}, "environment variable RANK: expected a number from 0", id="word"
        ),
        pytest.param({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_PORT: expected a port", id="port"),
    ],
)
def test_wrong_variables(monkeypatch, variables, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        join_processes("cpu", 1.0)


def test_dead_loader_is_one_line(coco, tmp_path, launch):
    out = tmp_path / "run"
    common = ("--data.root", coco, "--pictures", 0, "--eval-every", 999, "--epochs", 500, "--data.workers", 1)
    process = launch(*common, "--out", out)
    wait_for_step(out, 2, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    end = time.monotonic() + 30
    while not (pids := children.read_text().split()) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(int(pids[0]), signal.SIGKILL)
    status, text = process.finish()
    assert status == 1
    assert "error: lost a process that loads images" in text
    assert "Traceback" not in text


def test_kill_in_the_middle_of_an_epoch_changes_nothing(coco, tmp_path, launch, start):
    common = ("--data.root", coco, "--pictures", 0, "--checkpoint.every", 1, "--eval-every", 999, "--epochs", 3)
    process = launch(*common, "--out", tmp_path / "killed")
    wait_for_step(tmp_path / "killed", 6, process)
    process.kill()
    for name in ("killed", "whole"):
        status, _, stderr = start(*common, "--out", tmp_path / name)
        assert status == 0, stderr
    killed_losses = [line["loss"] for line in lines(tmp_path / "killed") if "loss" in line]
    whole_losses = [line["loss"] for line in lines(tmp_path / "whole") if "loss" in line]
    assert len(killed_losses) == 12
    assert killed_losses == whole_losses
    killed_weights = weights(tmp_path / "killed")
    whole_weights = weights(tmp_path / "whole")
    assert all(torch.equal(value, whole_weights[name]) for name, value in killed_weights.items())


def test_full_disk_is_one_line_and_spares_what_is_there(coco, tmp_path, start):
    out = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, limits[1]))  # no file above 4 MB
    try:
        status, _, stderr = start("--data.root", coco, "--pictures", 0, "--checkpoint.every", 1, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    assert f"error: cannot write a checkpoint into {out / 'checkpoints'}: File too large" in stderr
    assert list((out / "checkpoints").iterdir()) == []

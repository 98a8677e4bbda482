import ctypes
import os
import signal
import sys
import threading
import time

import pytest
import torch

from train.distributed import World
from train.signals import STOP_SIGNALS, Interrupted, StopRequest

WORLD = World(0, 1, 0, torch.device("cpu"))


def handlers():
    return [signal.getsignal(number) for number in STOP_SIGNALS]


@pytest.fixture(autouse=True)
def _restore_handlers():
    before = handlers()
    yield
    for number, handler in zip(STOP_SIGNALS, before, strict=True):
        signal.signal(number, handler)


def test_signal_is_noted_and_does_nothing_else():
    with StopRequest(WORLD) as stop:
        assert stop.agreed() == 0
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed() == signal.SIGTERM
        with pytest.raises(Interrupted) as caught:
            stop.check()
    assert caught.value.signal_number == signal.SIGTERM


def test_second_signal_has_its_usual_effect():
    with StopRequest(WORLD):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_come_back():
    before = handlers()
    with StopRequest(WORLD):
        assert handlers() != before
    assert handlers() == before


def stop_in_a_run():
    with StopRequest(WORLD):
        raise Interrupted(signal.SIGTERM, "after step 3")


def test_an_interrupted_run_still_catches_further_signals():
    before = handlers()
    with pytest.raises(Interrupted):
        stop_in_a_run()
    assert handlers() != before
    signal.raise_signal(signal.SIGTERM)  # a launcher's second one, while the last message is printed


def fail_in_a_run(world):
    with StopRequest(world):
        raise ConnectionError("rank 1 is gone")


def test_a_failed_process_of_several_still_catches_the_signal_of_its_launcher():
    """torchrun sends SIGTERM to the others when one process dies; they must live on to say why they end."""
    world = World(0, 2, 0, torch.device("cpu"))
    with pytest.raises(ConnectionError):
        fail_in_a_run(world)
    signal.raise_signal(signal.SIGTERM)


def test_handlers_come_back_after_an_error_of_a_single_process():
    before = handlers()
    with pytest.raises(ConnectionError):
        fail_in_a_run(WORLD)
    assert handlers() == before


def wait_for_a_lock():
    threading.Event().wait()


def wait_for_a_pipe():
    os.read(os.pipe()[0], 1)


def wait_in_compiled_code():
    semaphore = ctypes.create_string_buffer(64)
    while True:  # a signal ends the wait, which begins again
        ctypes.CDLL(None).sem_wait(semaphore)


def loop_without_end():
    while True:
        pass


def end_by_signal(wait, number, size, timeout):
    """Let a forked process receive a signal while it waits; return its exit status and what it prints."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 2)
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        with StopRequest(World(0, size, 0, torch.device("cpu")), timeout):
            wait()
        os._exit(1)
    os.close(writer)
    timer = threading.Timer(20, os.kill, (child, signal.SIGKILL))
    timer.start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    timer.cancel()
    with open(reader) as stderr:
        return status, stderr.read()


@pytest.mark.parametrize(
    ("wait", "number", "size", "timeout"),
    [
        pytest.param(wait_for_a_lock, signal.SIGTERM, 1, 600.0, id="lock"),
        pytest.param(wait_for_a_pipe, signal.SIGUSR1, 2, 600.0, id="pipe of one of two processes"),
        pytest.param(wait_in_compiled_code, signal.SIGINT, 1, 600.0, id="compiled code"),
        pytest.param(loop_without_end, signal.SIGTERM, 1, 0.1, id="loop without end"),
    ],
)
def test_the_first_signal_ends_whatever_does_not_end(monkeypatch, wait, number, size, timeout):
    monkeypatch.setattr("train.signals.STOP_SECONDS", 0.3 if timeout > 1 else 60.0)
    status, stderr = end_by_signal(wait, number, size, timeout)
    assert status == 128 + number
    rank = "rank 0: " if size == 2 else ""
    assert stderr.strip() == (
        f"{rank}stopped by {number.name} without a checkpoint of its own: the step did not end. "
        "The same command goes on from the last checkpoint"
    )


def test_a_block_that_ends_in_time_ends_the_watch(monkeypatch):
    monkeypatch.setattr("train.signals.STOP_SECONDS", 0.05)
    monkeypatch.setattr("os._exit", lambda status: pytest.fail(f"ended with {status}"))
    before = set(threading.enumerate())
    with StopRequest(WORLD) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed() == signal.SIGTERM
    time.sleep(0.1)
    assert set(threading.enumerate()) <= before  # a thread of an earlier test may have ended, too
    assert signal.set_wakeup_fd(-1) == -1


def test_a_long_step_has_more_time(monkeypatch):
    ended = []
    monkeypatch.setattr("train.signals.STOP_SECONDS", 0.05)
    monkeypatch.setattr(StopRequest, "_end_process", lambda stop, number: ended.append(number) or sys.exit())
    with StopRequest(WORLD) as stop:
        stop._step_seconds = 30.0  # the signal comes in a step as long as the one before
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert ended == []


def test_signals_of_a_forked_process_are_its_own():
    with StopRequest(WORLD) as stop:
        child = os.fork()
        if child == 0:
            os._exit(signal.set_wakeup_fd(-1) + 1)  # 0 if no pipe is left
        assert os.waitpid(child, 0)[1] == 0
        assert stop.received == 0

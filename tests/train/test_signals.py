import signal

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

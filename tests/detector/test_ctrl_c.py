"""Ctrl-C: what a command does with it, and that programs which import the package keep theirs."""

import os
import signal
import sys
import threading

import pytest

from detector import ctrl_c
from detector.ctrl_c import CtrlC, quiet_imports


@pytest.fixture(autouse=True)
def pythons_handler():
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def press():
    os.kill(os.getpid(), signal.SIGINT)


def handler():
    return signal.getsignal(signal.SIGINT)


def test_only_the_first_one_counts(monkeypatch):
    at_exit = []
    monkeypatch.setattr(ctrl_c.atexit, "register", lambda *call: at_exit.append(call))
    with CtrlC():
        with pytest.raises(KeyboardInterrupt):
            press()
        press()
    assert handler() is signal.default_int_handler
    assert at_exit == [(signal.signal, signal.SIGINT, signal.SIG_IGN)]


def test_none_counts_from_some_moment_on():
    with CtrlC() as block:
        block.ignore()
        press()
    with pytest.raises(KeyboardInterrupt):
        press()


@pytest.mark.parametrize("other", [signal.SIG_IGN, signal.SIG_DFL, lambda number, frame: None])
def test_handlers_of_others_are_left_alone(monkeypatch, other):
    signal.signal(signal.SIGINT, other)
    monkeypatch.setattr(sys, "argv", ["-m"])
    undo = quiet_imports()
    assert handler() is other
    undo()
    with CtrlC() as block:
        assert handler() is other
        block.ignore()
        assert handler() is other
    assert handler() is other


def test_other_threads_work_without():
    def work():
        with CtrlC() as block:
            block.ignore()
        seen.append(handler())

    seen = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


@pytest.mark.parametrize(
    ("argv", "during"),
    [
        (["-m", "a.jpg"], signal.SIG_DFL),
        (["/usr/bin/dcn-predict", "a.jpg"], signal.SIG_DFL),
        (["program.py", "-m"], None),
        ([], None),
    ],
)
def test_only_commands_are_quiet_while_they_import(monkeypatch, argv, during):
    monkeypatch.setattr(sys, "argv", argv)
    undo = quiet_imports()
    assert handler() is (during if during is not None else signal.default_int_handler)
    undo()
    assert handler() is signal.default_int_handler

import threading

import numpy as np
import pytest

from train.events import Events

PICTURE = np.zeros((4, 5, 3), np.uint8)


def write_everything(folder):
    events = Events(folder, 1)
    for step in range(30):
        events.add_scalar("loss", 1.0, step)
    events.add_image("picture", PICTURE, 1)
    events.close()


def test_events_are_written(tmp_path, capsys):
    write_everything(tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("events.out.tfevents.")
    assert path.stat().st_size > 500
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("place", ["open", "flush", "close"])
def test_a_full_disk_is_told_once_and_stops_nothing(tmp_path, capsys, monkeypatch, place):
    hook = threading.excepthook

    class FullFile:
        def __init__(self, name, mode):
            if place == "open":
                self.write(b"")

        def write(self, content):
            if place != "close":
                raise OSError(28, "No space left on device")

        def flush(self):
            self.write(b"")

        def close(self):
            raise OSError(28, "No space left on device")

    module = "tensorboard.summary.writer.event_file_writer.tf.io.gfile.GFile"
    monkeypatch.setattr(module, FullFile)
    write_everything(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cannot write TensorBoard's events into {tmp_path}: No space left on device; ")
    assert line.endswith(" bytes free; going on without them")
    assert threading.excepthook == hook


def test_a_fault_of_a_thread_still_shows_its_trace(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: seen.append(arguments.exc_type))
    events = Events(tmp_path, 1)
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    events.close()
    assert seen == [ZeroDivisionError]

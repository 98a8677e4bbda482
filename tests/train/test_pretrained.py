"""Torchvision's files are fetched once, whole, by one process; whatever goes wrong is one line with a way out."""

import errno
import hashlib
import http.server
import multiprocessing
import os
import resource
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

import train.pretrained
from detector import FasterRCNNConfig
from train.distributed import SharedError, World
from train.pretrained import (
    FILES,
    RESNEXT,
    ensure_imagenet_file,
    imagenet_file,
    imagenet_network,
    publisher,
)

CONTENT = bytes(range(256)) * 1200  # 300 KB
NAME = f"resnet50-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"
ALONE = World(0, 1, 0, torch.device("cpu"))


class Server(http.server.ThreadingHTTPServer):
    """Answers with `CONTENT`, or as `misbehave` does; counts the requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.paths = []
        self.misbehave = None
        self.is_closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/models"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.paths.append(self.path)
        if self.server.misbehave:
            self.server.misbehave(self)
        else:
            self.send_content(CONTENT)

    def send_content(self, content, size=None):
        self.send_response(200)
        if size != "unknown":
            self.send_header("Content-Length", str(size or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server that has the file, and is where the file is looked for; torch.hub's cache is empty."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(train.pretrained, "BASE_URL", server.url)
    monkeypatch.setitem(FILES, 50, NAME)
    yield server
    server.is_closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """The folder of the file in torch.hub's cache, which does not exist yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home" / "hub" / "checkpoints"


def fetch(timeout: float = 30.0) -> None:
    ensure_imagenet_file(50, ALONE, timeout)


def names(folder: Path) -> list[str]:
    """Return what is in a folder besides the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.is_dir() else []


def test_files_are_those_of_torchvision_and_of_mmdetection():
    assert FILES == {
        18: "resnet18-f37072fd.pth",
        50: "resnet50-0676ba61.pth",
        101: "resnet101-63fe2227.pth",
        RESNEXT: "resnext101_32x4d-a5af3160.pth",
    }
    assert train.pretrained.BASE_URL == "https://download.pytorch.org/models"
    assert train.pretrained.RESNEXT_BASE_URL == "https://download.openmmlab.com/pretrain/third_party"


@pytest.mark.parametrize(
    ("fields", "network", "source"),
    [
        ({"depth": 18}, 18, "torchvision"),
        ({"depth": 50, "cascade": True}, 50, "torchvision"),
        ({"depth": 101, "dcn": "v1"}, 101, "torchvision"),
        ({"depth": 101, "groups": 32, "width_per_group": 4}, RESNEXT, "OpenMMLab"),
    ],
)
def test_network_of_a_model(fields, network, source):
    assert imagenet_network(FasterRCNNConfig(**fields)) == network
    assert publisher(network) == source


@pytest.mark.parametrize(
    "fields",
    [
        {"depth": 101, "groups": 32, "width_per_group": 8},
        {"depth": 50, "groups": 32, "width_per_group": 4},
        {"depth": 50, "groups": 1, "width_per_group": 128},
    ],
)
def test_networks_without_a_file_are_named(fields):
    with pytest.raises(
        ValueError, match=r"--weights imagenet: expected a ResNet, or .* groups of width .*--weights FILE"
    ):
        imagenet_network(FasterRCNNConfig(**fields))


def test_resnext_comes_from_its_own_server(server, cache, monkeypatch):
    monkeypatch.setattr(train.pretrained, "BASE_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(train.pretrained, "RESNEXT_BASE_URL", server.url)
    monkeypatch.setitem(FILES, RESNEXT, NAME)
    ensure_imagenet_file(RESNEXT, ALONE, 30.0)
    assert imagenet_file(RESNEXT).read_bytes() == CONTENT


def test_fetched_once_into_the_cache_of_torch_hub(server, cache, capsys):
    fetch()
    fetch()
    assert imagenet_file(50) == cache / NAME
    assert (cache / NAME).read_bytes() == CONTENT
    assert names(cache) == [NAME]
    assert server.paths == [f"/models/{NAME}"]
    assert capsys.readouterr() == ("", "")


def test_file_that_is_there_needs_no_network_and_no_lock(cache, monkeypatch):
    monkeypatch.setattr(train.pretrained, "BASE_URL", "http://127.0.0.1:9/")
    monkeypatch.setitem(FILES, 50, NAME)
    cache.mkdir(parents=True)
    (cache / NAME).write_bytes(CONTENT)
    fetch()
    assert [path.name for path in cache.iterdir()] == [NAME]


@pytest.mark.parametrize("damaged", [CONTENT[:1000], CONTENT[:-1] + b"x", b""])
def test_damaged_file_of_the_cache_is_fetched_again(server, cache, capsys, damaged):
    cache.mkdir(parents=True)
    (cache / NAME).write_bytes(damaged)
    fetch()
    assert (cache / NAME).read_bytes() == CONTENT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{cache / NAME}: damaged: expected a SHA-256 that begins with ")
    assert line.endswith(f"({len(damaged):,} bytes); it was fetched again")


def test_redirects_are_followed(server, cache):
    def redirect(handler):
        if "mirror" in handler.path:
            handler.send_content(CONTENT)
            return
        handler.send_response(302)
        handler.send_header("Location", f"/mirror/{NAME}")
        handler.end_headers()

    server.misbehave = redirect
    fetch()
    assert (cache / NAME).read_bytes() == CONTENT


def test_size_that_is_not_told(server, cache):
    server.misbehave = lambda handler: handler.send_content(CONTENT, "unknown")
    fetch()
    assert (cache / NAME).read_bytes() == CONTENT


def wait_silently(handler):
    handler.server.is_closing.wait(10)


def stop_in_the_middle(handler):
    handler.send_content(CONTENT[:100_000], len(CONTENT))
    handler.server.is_closing.wait(10)


def drip(handler):
    handler.send_content(CONTENT[:10], len(CONTENT))
    while not handler.server.is_closing.wait(0.02):
        handler.wfile.write(b"x")


def redirect_in_a_circle(handler):
    handler.send_response(302)
    handler.send_header("Location", handler.path)
    handler.end_headers()


def talk_nonsense(handler):
    handler.wfile.write(b"hello\r\n\r\n")


def stop_in_a_chunk(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4B000\r\n" + CONTENT[:100_000])


MISBEHAVIOR = {
    "404": (lambda handler: handler.send_error(404), "the server answered HTTP Error 404: Not Found"),
    "500": (lambda handler: handler.send_error(500), "the server answered HTTP Error 500: Internal Server Error"),
    "circle": (redirect_in_a_circle, "the server answered HTTP Error 302: .* infinite loop"),
    "cut off": (
        lambda handler: handler.send_content(CONTENT[:100_000], len(CONTENT)),
        "the connection ended after 100,000 of 307,200 bytes",
    ),
    "cut off, size unknown": (
        lambda handler: handler.send_content(CONTENT[:100_000], "unknown"),
        "expected a file whose SHA-256 begins with .*, got 100,000 bytes with",
    ),
    "another file": (
        lambda handler: handler.send_content(b"<html>please log in</html>"),
        "expected a file whose SHA-256 begins with .*, got 26 bytes with",
    ),
    "empty": (lambda handler: handler.send_content(b""), "got 0 bytes with"),
    "hang": (wait_silently, "the server was silent for 0.3 s"),
    "hang in the middle": (stop_in_the_middle, "the server was silent for 0.3 s"),
    "drip": (drip, "bytes came before --timeout"),
    "hang up": (lambda handler: handler.connection.shutdown(socket.SHUT_RDWR), "Remote end closed connection"),
    "cut off in a chunk": (stop_in_a_chunk, "the connection ended in the middle"),
    "no HTTP": (talk_nonsense, "expected the answer of a web server, got hello"),
}


@pytest.mark.parametrize("case", MISBEHAVIOR)
def test_server_that_misbehaves(server, cache, capsys, case):
    server.misbehave, reason = MISBEHAVIOR[case]
    start = time.monotonic()
    with pytest.raises(SharedError, match=reason) as caught:
        fetch(timeout=1.5)
    assert time.monotonic() - start < 1.5
    check_message(str(caught.value), server.url, cache)
    assert names(cache) == []
    assert capsys.readouterr() == ("", "")

    server.misbehave = None
    fetch()
    assert (cache / NAME).read_bytes() == CONTENT


def check_message(message, url, cache):
    """Check that a message is one line that says what to do."""
    assert message.startswith("--weights imagenet: ")
    assert "\n" not in message
    for text in (f"Put {url}/{NAME} at {cache / NAME}", "TORCH_HOME", "--weights FILE", "--weights none"):
        assert text in message


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        pytest.param("no-such-machine.invalid", "not known|name resolution|No address", id="name"),
        pytest.param("127.0.0.1:9", "Connection refused", id="refused"),
    ],
)
def test_without_network(monkeypatch, cache, host, reason):
    monkeypatch.setattr(train.pretrained, "BASE_URL", f"http://{host}/models")
    monkeypatch.setitem(FILES, 50, NAME)
    with pytest.raises(SharedError, match=reason) as caught:
        fetch()
    check_message(str(caught.value), f"http://{host}/models", cache)
    assert f"cannot fetch http://{host}/models/{NAME}: " in str(caught.value)


def test_damaged_file_without_network_is_named(monkeypatch, cache):
    monkeypatch.setattr(train.pretrained, "BASE_URL", "http://127.0.0.1:9")
    cache.mkdir(parents=True)
    (cache / FILES[50]).write_bytes(b"cut")
    with pytest.raises(SharedError, match="Connection refused; .*: damaged: expected a SHA-256 that begins with 0676"):
        fetch()
    assert (cache / FILES[50]).read_bytes() == b"cut"


def make_file_of_home(cache):
    cache.parents[1].write_text("")


def make_file_of_folder(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("")


def make_folder_of_file(cache):
    (cache / NAME).mkdir(parents=True)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        pytest.param(make_file_of_home, "cannot write .*: Not a directory", id="no folder"),
        pytest.param(make_file_of_folder, "expected a folder, got something else under its name", id="no folder, last"),
        pytest.param(make_folder_of_file, "Is a directory", id="no file"),
    ],
)
def test_cache_that_cannot_be_written(server, cache, prepare, reason):
    prepare(cache)
    with pytest.raises(SharedError, match=reason) as caught:
        fetch()
    check_message(str(caught.value), server.url, cache)
    assert server.paths == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_read_only_cache(server, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", "/proc/nowhere")
    with pytest.raises(SharedError, match=f"cannot write /proc/nowhere/hub/checkpoints/{NAME}: "):
        fetch()
    assert server.paths == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_lock_that_cannot_be_opened(server, cache, monkeypatch, number):
    """In a cache that users share, the lock may be another user's; a disk that is read-only has no way around."""

    def refuse(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    cache.mkdir(parents=True)
    monkeypatch.setattr(os, "open", refuse)
    if number == errno.EACCES:
        fetch()
        assert (cache / NAME).read_bytes() == CONTENT
    else:
        with pytest.raises(SharedError, match=f"cannot write {cache / NAME}: Read-only file system"):
            fetch()
        assert server.paths == []


def test_full_disk(server, cache):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SharedError, match="File too large; 307,200 bytes needed, .* bytes free") as caught:
            fetch()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_message(str(caught.value), server.url, cache)
    assert names(cache) == []


def test_leftovers_of_a_killed_process_are_removed(server, cache):
    cache.mkdir(parents=True)
    (cache / f".partial-{'0' * 16}.pth").write_bytes(b"half")
    (cache / "resnet18-5c106cde.pth").write_bytes(b"of somebody else")
    fetch()
    assert names(cache) == sorted([NAME, "resnet18-5c106cde.pth"])


def fetch_in_process(url: str, barrier, results) -> None:
    train.pretrained.BASE_URL = url
    FILES[50] = NAME
    barrier.wait(60)
    try:
        fetch()
        results.put(imagenet_file(50).read_bytes() == CONTENT)
    except Exception as error:
        results.put(str(error))


def test_eight_runs_at_once_fetch_one_file(server, cache):
    """They know nothing of each other but the cache."""

    def take_time(handler):
        time.sleep(0.3)
        handler.send_content(CONTENT)

    server.misbehave = take_time
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(8)
    results = context.Queue()
    processes = [context.Process(target=fetch_in_process, args=(server.url, barrier, results)) for _ in range(8)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert outcomes == [True] * 8
    assert server.paths == [f"/models/{NAME}"]
    assert names(cache) == [NAME]


class ThreadWorld(World):
    """A process of a run in a thread; the processes exchange values through a list that they share."""

    def __init__(self, rank, size, local_rank, values, barrier):
        super().__init__(rank, size, local_rank, torch.device("cpu"))
        self.values = values
        self.meeting = barrier

    def exchange(self, value):
        self.values[self.rank] = value
        self.meeting.wait(30)
        values = list(self.values)
        self.meeting.wait(30)
        return values

    def gather(self, value):
        values = self.exchange(value)
        return values if self.is_main else []

    def broadcast(self, value):
        return self.exchange(value)[0]


@pytest.fixture
def start_ranks(monkeypatch, tmp_path):
    """Function: (machine, LOCAL_RANK) of each rank -> what each of them raised, or None."""
    machine_of_thread = threading.local()
    monkeypatch.setattr(train.pretrained, "imagenet_file", lambda _: tmp_path / machine_of_thread.name / NAME)

    def start(places):
        outcomes = [None] * len(places)
        values = [None] * len(places)
        barrier = threading.Barrier(len(places))

        def run(rank):
            machine_of_thread.name, local_rank = places[rank]
            try:
                ensure_imagenet_file(50, ThreadWorld(rank, len(places), local_rank, values, barrier), 5.0)
            except Exception as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(places))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

    return start


ONE_MACHINE = [("one", rank) for rank in range(8)]
TWO_MACHINES = [("one", rank) for rank in range(4)] + [("two", rank) for rank in range(4)]


@pytest.mark.parametrize(
    ("places", "machines"),
    [
        pytest.param(ONE_MACHINE, ["one"], id="one machine"),
        pytest.param(TWO_MACHINES, ["one", "two"], id="two machines"),
        pytest.param([("one", 0), ("one", 0)], ["one"], id="two processes that both have LOCAL_RANK 0"),
        pytest.param([("one", 0), ("two", 1), ("two", 2)], ["one", "two"], id="two machines without LOCAL_RANK"),
    ],
)
def test_each_machine_fetches_for_itself(server, tmp_path, start_ranks, places, machines):
    assert start_ranks(places) == [None] * len(places)
    assert len(server.paths) == len(machines)
    for machine in machines:
        assert (tmp_path / machine / NAME).read_bytes() == CONTENT
    assert start_ranks(places) == [None] * len(places)
    assert len(server.paths) == len(machines)


def test_all_processes_end_with_the_reason_of_the_first(server, start_ranks):
    server.misbehave = lambda handler: handler.send_error(404)
    outcomes = start_ranks(ONE_MACHINE)
    assert all(isinstance(outcome, SharedError) for outcome in outcomes)
    (text,) = {str(outcome) for outcome in outcomes}
    assert text.startswith("rank 0: --weights imagenet: cannot fetch ")
    assert "404" in text
    assert len(server.paths) == 1


def test_machine_that_fails_is_named(server, tmp_path, start_ranks):
    (tmp_path / "two").write_text("not a folder")
    (text,) = {str(outcome) for outcome in start_ranks(TWO_MACHINES)}
    assert text.startswith(f"rank 4: --weights imagenet: {tmp_path / 'two'}: expected a folder")
    assert text.count("--weights imagenet:") == 1

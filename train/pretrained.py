"""ImageNet weights to start from: a published file for the network, fetched once into torch.hub's cache.

ResNets start from torchvision's files. ResNeXt-101 32x4d, which torchvision does not have (its files are 32x8d and
64x4d), starts from the file of MMDetection's configs, `open-mmlab://resnext101_32x4d`. Both have the same names, and
were trained on images of the same mean and deviation.

`torch.hub.download_url_to_file` waits for a silent server without end, has no limit for the whole, takes a connection
that broke for a wrong hash, and names neither URL nor file in its errors; and nothing keeps two processes from fetching
one file at once. So only the cache is torch.hub's here.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import BadStatusLine, HTTPException, IncompleteRead
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch

from detector import FasterRCNNConfig
from detector.files import remove_leftovers, replacing, writing_error
from detector.text import one_line, show_message
from detector.weights.checkpoint_name import file_digest
from train.distributed import World, raise_together
from train.folder_lock import locked
from train.progress import download_progress

BASE_URL = "https://download.pytorch.org/models"

RESNEXT_BASE_URL = "https://download.openmmlab.com/pretrain/third_party"

RESNEXT = "resnext101_32x4d"
Network = int | str
"""Depth of a ResNet, or `RESNEXT`."""

FILES: dict[Network, str] = {
    18: "resnet18-f37072fd.pth",
    50: "resnet50-0676ba61.pth",
    101: "resnet101-63fe2227.pth",
    RESNEXT: "resnext101_32x4d-a5af3160.pth",
}
"""Network -> file. Its name ends in the first digits of its SHA-256."""

SILENCE_SECONDS = 20.0  # a server that sends nothing for so long is given up
NOTICE_SECONDS = 5.0  # after which people are told what the run waits for
_CHUNK = 1 << 16  # bytes that are read at once


@dataclass(frozen=True)
class _Patience:
    """How long a download may take while other processes wait for it.

    Attributes:
        deadline: end of the whole, as `time.monotonic` counts.
        silence: seconds without a byte.
    """

    deadline: float
    silence: float

    @classmethod
    def within(cls, timeout: float) -> _Patience:
        """Divide the time that others wait: the whole has four fifths, and a last silence fits into the rest."""
        return cls(time.monotonic() + 0.8 * timeout, min(SILENCE_SECONDS, 0.2 * timeout))


def imagenet_network(model: FasterRCNNConfig) -> Network:
    """Return whose ImageNet weights a model starts from.

    Raises:
        ValueError: there are none; the message names the flag.
    """
    if model.groups == 1 and model.width_per_group == 64:
        return model.depth
    if (model.depth, model.groups, model.width_per_group) == (101, 32, 4):
        return RESNEXT
    raise ValueError(
        "--weights imagenet: expected a ResNet, or depth 101 with 32 groups of width 4, which have published files, "
        f"got depth {model.depth} with {model.groups} groups of width {model.width_per_group}; "
        "--weights FILE starts from another file, --weights none from random weights"
    )


def publisher(network: Network) -> str:
    """Return who published the weights of a network."""
    return "OpenMMLab" if network == RESNEXT else "torchvision"


def imagenet_file(network: Network) -> Path:
    """Return where the weights of a network are, or will be: in torch.hub's cache, which TORCH_HOME moves."""
    return Path(torch.hub.get_dir()).absolute() / "checkpoints" / FILES[network]


def _hash_of_name(path: Path) -> str:
    """Return the first digits of the SHA-256 that a published file must have: its name ends in them."""
    return path.stem.rpartition("-")[2]


def ensure_imagenet_file(network: Network, world: World, timeout: float) -> None:
    """Make sure that every machine has the whole file of a network; fetch it where it is missing or damaged.

    One process of each machine (LOCAL_RANK 0) does that while the others wait. Then the others look, too: where nothing
    sets LOCAL_RANK, they may be on another machine. A lock keeps processes and runs that share a cache from fetching
    the file twice, and the file appears under its name only when it is complete and its hash is right.

    Args:
        network: see `imagenet_network`.
        world: the processes; all of them call this.
        timeout: seconds that a process waits for the others.

    Raises:
        SharedError: a machine has no whole file; raised by all processes, with the reason and what can be done.
    """
    for local_rank_0 in (True, False):
        problem = ""
        if (world.local_rank == 0) == local_rank_0:
            problem = _ensure_on_this_machine(network, timeout, show_progress=world.is_main)
        raise_together(world, problem)


def _ensure_on_this_machine(network: Network, timeout: float, show_progress: bool) -> str:
    """Make sure that this machine has the whole file; return why it cannot have it and what can be done, or ""."""
    path = imagenet_file(network)
    url = f"{RESNEXT_BASE_URL if network == RESNEXT else BASE_URL}/{path.name}"
    damage = ""
    try:
        if path.exists():
            damage = _find_damage(path)
            if not damage:
                return ""
        _fetch_under_lock(url, path, _Patience.within(timeout), show_progress)
    except (OSError, ValueError) as error:
        reasons = "; ".join(filter(None, [one_line(error), damage]))
        return (
            f"--weights imagenet: {reasons}. Put {url} at {path} (TORCH_HOME names another cache), "
            "or give --weights FILE, or --weights none to start from random ones"
        )
    if damage:
        show_message(f"{damage}; it was fetched again")
    return ""


def _find_damage(path: Path) -> str:
    """Return what is wrong with a file of the cache, or "" if it is whole.

    Raises:
        OSError: it cannot be read, or is a folder, a pipe or a device.
    """
    expected = _hash_of_name(path)
    digest = file_digest(path)
    if digest.startswith(expected):
        return ""
    size = path.stat().st_size
    return f"{path}: damaged: expected a SHA-256 that begins with {expected}, got {digest} ({size:,} bytes)"


def _fetch_under_lock(url: str, path: Path, patience: _Patience, show_progress: bool) -> None:
    """Fetch the file, unless another process has done that while this one waited for the lock of the folder.

    Raises:
        OSError: the file cannot be written.
        ValueError: it cannot be fetched, or the other process is not ready in time.
    """
    folder = path.parent
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, got something else under its name")
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            has_locks = _lock(stack, path, patience, show_progress)
        except OSError as error:
            raise writing_error(error, path) from error
        if path.exists() and not _find_damage(path):
            return
        if has_locks:  # nobody else writes here
            remove_leftovers(folder)
        _fetch(url, path, patience, show_progress)


def _lock(stack: contextlib.ExitStack, path: Path, patience: _Patience, show_progress: bool) -> bool:
    """Wait for the lock of the folder; return whether there is one, without which two processes may fetch at once."""
    notice = time.monotonic() + NOTICE_SECONDS
    while True:
        try:
            return stack.enter_context(locked(path.parent))
        except PermissionError:
            return False  # another user made the lock, in a cache that several share
        except BlockingIOError as holder:
            now = time.monotonic()
            if now > patience.deadline:
                raise ValueError(f"{holder} fetches {path}, and was not ready within --timeout") from holder
            if show_progress and now > notice:
                show_message(f"waiting for {holder}, which fetches {path}")
                notice = patience.deadline
            time.sleep(0.1)


def _fetch(url: str, path: Path, patience: _Patience, show_progress: bool) -> None:
    """Download a file and check its hash.

    Raises:
        OSError: the file cannot be written.
        ValueError: the server cannot be reached, or what came is not the file.
    """
    request = Request(url, headers={"User-Agent": "torch.hub"})  # which the server is known to answer
    with _network_errors(url, patience.silence), _notice(f"fetching {url}", show_progress):
        response = urlopen(request, timeout=patience.silence)

    expected_size = response.headers.get("Content-Length", "")
    size = int(expected_size) if expected_size.isdigit() else None
    sha256 = hashlib.sha256()
    received = 0
    with (
        response,
        replacing(path, size=size) as partial,
        partial.open("wb") as file,
        download_progress(path.name, size, show_progress) as progress,
    ):
        while chunk := _read(response, url, patience.silence):
            file.write(chunk)
            sha256.update(chunk)
            received += len(chunk)
            progress.update(len(chunk))
            if time.monotonic() > patience.deadline:
                raise ValueError(f"cannot fetch {url}: only {_amount(received, size)} came before --timeout")
        if size is not None and received != size:
            raise ValueError(f"cannot fetch {url}: the connection ended after {_amount(received, size)}")
        expected_hash = _hash_of_name(path)
        if not sha256.hexdigest().startswith(expected_hash):
            raise ValueError(
                f"cannot fetch {url}: expected a file whose SHA-256 begins with {expected_hash}, "
                f"got {received:,} bytes with {sha256.hexdigest()[:16]}"
            )


def _read(response: Any, url: str, silence: float) -> bytes:
    """Return what has come of a response, as soon as there is anything; nothing at its end."""
    with _network_errors(url, silence):
        chunk: bytes = response.read1(_CHUNK)
        return chunk


def _amount(received: int, size: int | None) -> str:
    return f"{received:,} bytes" if size is None else f"{received:,} of {size:,} bytes"


@contextlib.contextmanager
def _network_errors(url: str, silence: float) -> Iterator[None]:
    """Turn the many errors of a connection into a ValueError that says in one line what happened."""
    try:
        yield
    except HTTPError as error:
        error.close()
        raise ValueError(f"cannot fetch {url}: the server answered {one_line(error)}") from error
    except (OSError, HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, URLError) else error
        raise ValueError(f"cannot fetch {url}: {_describe(cause, silence)}") from error


def _describe(cause: object, silence: float) -> str:
    """Return in a few words why there is no answer, or no more of it."""
    if isinstance(cause, TimeoutError):
        return f"the server was silent for {silence:g} s"
    if isinstance(cause, IncompleteRead):
        return "the connection ended in the middle"
    if isinstance(cause, BadStatusLine) and not isinstance(cause, OSError):
        return f"expected the answer of a web server, got {cause}"
    return str(getattr(cause, "strerror", None) or cause or type(cause).__name__)


@contextlib.contextmanager
def _notice(text: str, is_shown: bool) -> Iterator[None]:
    """Print a line if the block takes longer than people wait without a word."""
    timer = threading.Timer(NOTICE_SECONDS, show_message, [text])
    timer.daemon = True
    if is_shown:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()

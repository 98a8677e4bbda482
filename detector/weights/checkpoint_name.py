"""The names of a run's checkpoints, which hold a sum of what is inside: `step-00001200-1f3a5c7e90b2d4f6.pt`."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from detector.files import open_regular

_PATTERN = re.compile(r"step-(?P<step>\d{8,})-(?P<digest>[0-9a-f]{16})\.pt")
_CHUNK = 1 << 20  # bytes that are read at once


@dataclass(frozen=True)
class CheckpointName:
    """What the name of a checkpoint says; `str()` is the name.

    Attributes:
        step: finished steps.
        digest: first 16 digits of the SHA-256 of its bytes.
    """

    step: int
    digest: str

    def __str__(self) -> str:
        return f"step-{self.step:08d}-{self.digest}.pt"


def parse_name(path: Path) -> CheckpointName | None:
    """Return what the name of a file says, or None if it is not that of a checkpoint."""
    match = _PATTERN.fullmatch(path.name)
    if match is None:
        return None
    return CheckpointName(int(match["step"]), match["digest"])


def digest(content: bytes | memoryview) -> str:
    """Return the digest of a checkpoint's bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return the digest of a file, which is read piece by piece."""
    sha256 = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(_CHUNK):
            sha256.update(piece)
    return sha256.hexdigest()[:16]

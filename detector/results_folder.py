"""The folder that a prediction writes to: no file is lost there that somebody else wrote, or changed.

A picture is signed: its JPEG comment holds a digest of the path of its image and of its own bytes. So the same command
finds its pictures again, and may replace them. Every other file keeps its name, and the new picture gets another one.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from detector.files import replacing, write_json, writing_error
from detector.image import encode_image
from detector.results import CocoRow

RESULTS_FILE = "detections.json"
COMMENT = b"detector.predict "  # begins the comment of a picture

# How the results of a prediction begin: an empty list, or a row with the names of its file and class.
_TEXT = rb'"(?:[^"\\]|\\.)*"'
_OWN_RESULTS = re.compile(
    rb"\[\]"
    rb'|\[\{"image_id": \d+, "file_name": '
    + _TEXT
    + rb', "category_id": \d+, "category_name": '
    + _TEXT
    + rb', "bbox": .*',
    re.DOTALL,
)
_ENOUGH = 1 << 20  # bytes of the results file that hold its first row


def is_picture(path: Path) -> bool:
    """Tell whether a file is a picture of a prediction, of any image, by its comment alone."""
    try:
        with path.open("rb") as file:
            data = file.read(100)
    except OSError:
        return False
    comment = data[_end_of_first_segment(data) :]
    return comment.startswith(b"\xff\xfe") and comment[4:].startswith(COMMENT)


class ResultsFolder:
    """Writes pictures and results.

    Args:
        path: the folder; made when something is written.
        images: those of the prediction; they are never replaced.
    """

    def __init__(self, path: Path, images: Iterable[Path]) -> None:
        self.path = path
        self.results = path / RESULTS_FILE
        self._images = {_identity(image.stat()) for image in images if image.exists()}
        self._taken: set[str] = set()  # case-folded names, as some file systems do not tell A.jpg from a.jpg
        self._next_number: dict[str, int] = defaultdict(lambda: 1)  # case-folded stem -> number of its next picture

    def check(self) -> None:
        """Raise ValueError if the results would replace a file that no prediction wrote."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out: expected a folder, got the file {self.path}")
        try:
            is_file = stat.S_ISREG(self.results.lstat().st_mode)
        except FileNotFoundError:
            return
        if is_file:
            with self.results.open("rb") as file:
                is_own = _OWN_RESULTS.fullmatch(file.read(_ENOUGH)) is not None
        if not is_file or not is_own:
            raise ValueError(f"--out: {self.results} was not written by a prediction and is kept; take another folder")

    def write_picture(self, image: Path, picture: np.ndarray) -> None:
        """Write the picture of an image under the name of the image, numbered if that is taken.

        Raises:
            OSError: the picture cannot be written; the message names it.
            ValueError: the picture is too large for a JPEG file.
        """
        path = self._path_for(image)
        data = _sign(encode_image(path, picture), image)
        with replacing(path, size=len(data)) as partial:
            partial.write_bytes(data)

    def write_results(self, rows: Sequence[CocoRow]) -> None:
        """Write the rows of all images."""
        write_json(self.results, rows)

    def _path_for(self, image: Path) -> Path:
        stem = image.stem.casefold()
        while True:
            number = self._next_number[stem]
            self._next_number[stem] += 1
            name = f"{image.stem}.jpg" if number == 1 else f"{image.stem}-{number}.jpg"
            path = self.path / name
            if name.casefold() not in self._taken and self._may_write(path, image):
                self._taken.add(name.casefold())
                return path

    def _may_write(self, path: Path, image: Path) -> bool:
        """Tell whether a name is free, or that of the picture of this image from an earlier prediction."""
        try:
            status = path.lstat()
        except FileNotFoundError:
            return True
        except OSError as error:  # the name is too long
            raise writing_error(error, path) from error
        if not stat.S_ISREG(status.st_mode) or _identity(status) in self._images:
            return False
        return is_picture(path) and _is_signed(path.read_bytes(), image)


def _identity(status: os.stat_result) -> tuple[int, int]:
    """Return device and number of a file: equal for two names of one file, on any file system."""
    return status.st_dev, status.st_ino


def _sign(jpeg: bytes, image: Path) -> bytes:
    """Put a comment into the bytes of a JPEG file: a digest of the image's path and of these bytes."""
    digest = hashlib.sha256(os.fsencode(image.resolve()) + b"\0" + jpeg).hexdigest()
    comment = COMMENT + digest.encode()
    segment = b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment
    start = _end_of_first_segment(jpeg)
    return jpeg[:start] + segment + jpeg[start:]


def _is_signed(data: bytes, image: Path) -> bool:
    """Tell whether bytes are those that `_sign` gave for an image, and were not changed since."""
    signed_length = len(_sign(b"", image))
    start = _end_of_first_segment(data)
    jpeg = data[:start] + data[start + signed_length :]
    return data == _sign(jpeg, image)


def _end_of_first_segment(jpeg: bytes) -> int:
    """Return where the header of a JPEG file ends, behind which comments may follow."""
    return 4 + int.from_bytes(jpeg[4:6], "big")

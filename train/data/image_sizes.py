"""Compares the sizes that an annotation file lists with those of the image files, by the headers of some of them.

Boxes are meant as the image is seen, after the rotation in its EXIF data. Programs that write the size with another
library than the one that shows the image list height and width of such an image exchanged; then the size as the image
is seen counts.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from detector.image import read_image_size
from detector.text import plural
from train.data.annotations import AnnotationColumns, ImageColumns, fits_image, is_inside_image
from train.data.samplers import spread_evenly

MAX_SAMPLE = 500  # images whose headers are read; a fixed number, so that every start compares the same ones
MAX_OTHER_SHARE = 0.1  # of the sample; the 1% that may be unreadable exceed it by no chance worth mentioning
THREADS = 8  # a network file system answers many at once


def correct_sizes(
    images: ImageColumns, annotations: AnnotationColumns, indices: np.ndarray, image_folder: Path
) -> tuple[ImageColumns, str, str]:
    """Exchange height and width of the images where the file shows that they are listed the wrong way round.

    Compared are evenly spaced images, and those with boxes that are outside of their image as it is listed, but inside
    if height and width are exchanged. If one of all these is exchanged, all images are compared. Files that are missing
    or damaged are left to the training, which reports them.

    Args:
        images: of the file.
        annotations: of the file.
        indices: (n,) int64, the images that are used.
        image_folder: folder of the files.

    Returns:
        The images; a note about those that were exchanged, empty without any; and what is wrong if more than a tenth of
        the evenly spaced images have another size than their files, empty otherwise.
    """
    sample = indices[spread_evenly(len(indices), MAX_SAMPLE)]
    sizes = np.zeros((len(images.ids), 2), np.int64)  # height and width of the files; 0 where they are not known
    _read_sizes(sizes, images, sample, image_folder)
    other_sizes = _describe_other_sizes(sizes[sample], images, sample, image_folder)

    suspects = np.setdiff1d(_images_with_exchanged_boxes(images, annotations, indices), sample)
    _read_sizes(sizes, images, suspects, image_folder)
    if _is_exchanged(sizes, images).any():
        _read_sizes(sizes, images, np.setdiff1d(indices, np.union1d(sample, suspects)), image_folder)

    is_exchanged = _is_exchanged(sizes, images)
    if not is_exchanged.any():
        return images, "", other_sizes
    corrected = replace(
        images,
        heights=np.where(is_exchanged, images.widths, images.heights),
        widths=np.where(is_exchanged, images.heights, images.widths),
    )
    note = _describe_exchanged(is_exchanged, images, corrected, annotations, len(indices))
    return corrected, note, other_sizes


def _read_sizes(sizes: np.ndarray, images: ImageColumns, indices: np.ndarray, image_folder: Path) -> None:
    """Write height and width of the files of the images with these indices into `sizes` (N, 2)."""
    paths = [image_folder / str(name) for name in images.file_names[indices]]
    with ThreadPoolExecutor(THREADS) as pool:
        for index, size in zip(indices, pool.map(_read_size, paths), strict=True):
            sizes[index] = size


def _read_size(path: Path) -> tuple[int, int]:
    """Return height and width of a file, 0 where they are not known."""
    try:
        return read_image_size(path) or (0, 0)
    except (OSError, ValueError):
        return 0, 0


def _describe_other_sizes(sizes: np.ndarray, images: ImageColumns, sample: np.ndarray, image_folder: Path) -> str:
    """Return which sizes (n, 2) of files are not those that the images with the indices `sample` list, if many."""
    listed = np.stack([images.heights[sample], images.widths[sample]], 1)
    is_known = (sizes > 0).all(1)
    is_other = is_known & (np.sort(sizes, 1) != np.sort(listed, 1)).any(1)
    if is_other.sum() <= MAX_OTHER_SHARE * is_known.sum():
        return ""

    examples = []
    for row in np.flatnonzero(is_other)[:3]:
        path = image_folder / str(images.file_names[sample[row]])
        (height, width), (listed_height, listed_width) = sizes[row], listed[row]
        examples.append(f"{path} has {width} x {height}, listed are {listed_width} x {listed_height}")
    return (
        "images: expected width and height of the files, got others for "
        f"{is_other.sum()} of {is_known.sum()} that were compared: {', '.join(examples)}"
    )


def _is_exchanged(sizes: np.ndarray, images: ImageColumns) -> np.ndarray:
    """Return of which images (N,) bool the listed height and width are those of the file, the wrong way round."""
    is_square = images.heights == images.widths
    is_exchanged: np.ndarray = (sizes[:, 0] == images.widths) & (sizes[:, 1] == images.heights) & ~is_square
    return is_exchanged


def _images_with_exchanged_boxes(
    images: ImageColumns, annotations: AnnotationColumns, indices: np.ndarray
) -> np.ndarray:
    """Return which of the images (n,) int64 have a box inside only if their height and width are exchanged."""
    outside = annotations.take(np.flatnonzero(annotations.image_listed & ~is_inside_image(annotations, images)))
    exchanged = replace(images, heights=images.widths, widths=images.heights)
    suspects = outside.image_indices[is_inside_image(outside, exchanged)]
    return np.intersect1d(suspects, indices)


def _describe_exchanged(
    is_exchanged: np.ndarray,
    images: ImageColumns,
    corrected: ImageColumns,
    annotations: AnnotationColumns,
    count: int,
) -> str:
    """Return a note about the images whose height and width are exchanged, and about boxes that contradict."""
    note = (
        f"width and height of {is_exchanged.sum()} of {plural(count, 'image')} are listed the wrong way round, as if "
        "the rotation in EXIF data were ignored: boxes are taken as the image is seen"
    )
    of_exchanged = annotations.take(np.flatnonzero(annotations.image_listed & is_exchanged[annotations.image_indices]))
    contradicting = int((fits_image(of_exchanged, images) & ~fits_image(of_exchanged, corrected)).sum())
    if contradicting:
        fit = "fits" if contradicting == 1 else "fit"
        note += f"; {contradicting} of their boxes {fit} only the image that is not rotated: look at the pictures"
    return note

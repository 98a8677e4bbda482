"""Images of any kind and number through a detector, a batch at a time: resize, detect, undo the resize."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from detector.image import Image, resize_keep_ratio, stack_images, to_pixels
from detector.results import ImageDetections, undo_resize
from detector.structures import Batch, Detections

DEFAULT_SCORE = 0.3
"""Detections below it are left out where nobody says another score."""

Start = Callable[[Batch], Callable[[], list[Detections]]]
"""Starts to detect in a batch; returns a function that waits for the detections of each image, on the CPU."""


@dataclass(frozen=True)
class ImageDetector:
    """Detects in images as users have them.

    Attributes:
        start: detects in a batch.
        device: of the batch.
        image_scale: see `FasterRCNNConfig`.
        class_names: by label.
    """

    start: Start
    device: torch.device
    image_scale: tuple[int, int]
    class_names: Sequence[str]

    def detect(
        self, named_images: Iterable[tuple[str, Image]], score: float, batch_size: int
    ) -> Iterator[ImageDetections]:
        """Detect in images, a batch at a time; results come in the order of the images.

        Args:
            named_images: images and their names in messages; each is read when its batch begins.
            score: detections below it are left out.
            batch_size: images that go through the model at once.

        Returns:
            An iterator of the detections in each image, in its pixels. It raises the errors of `to_pixels`.

        Raises:
            ValueError: `score` or `batch_size` is out of its range.
        """
        check_score(score)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        return self._detect_batches(iter(named_images), score, batch_size)

    def _detect_batches(
        self, named_images: Iterator[tuple[str, Image]], score: float, batch_size: int
    ) -> Iterator[ImageDetections]:
        while batch := list(islice(named_images, batch_size)):
            yield from self._detect_batch(batch, score)

    def _detect_batch(self, named_images: Sequence[tuple[str, Image]], score: float) -> list[ImageDetections]:
        original_sizes = []
        resized_images = []
        resize_factors = []
        for name, image in named_images:
            pixels = to_pixels(image, name)
            resized, factors = resize_keep_ratio(pixels, self.image_scale)
            height, width = pixels.shape[:2]
            original_sizes.append((height, width))
            resized_images.append(resized)
            resize_factors.append(factors)

        batch = Batch(*stack_images(resized_images)).to(self.device)
        wait = self.start(batch)

        results = []
        images = zip(wait(), named_images, original_sizes, resize_factors, strict=True)
        for resized_detections, (_, image), size, factors in images:
            detections = undo_resize(resized_detections, factors)
            kept = detections[detections.scores >= score]
            results.append(
                ImageDetections(
                    boxes=kept.boxes,
                    scores=kept.scores,
                    labels=kept.labels,
                    masks=kept.masks,
                    image=image,
                    size=size,
                    class_names=self.class_names,
                )
            )
        return results


def name_images(images: Iterable[Image]) -> Iterator[tuple[str, Image]]:
    """Yield images with the names that messages have for them."""
    for index, image in enumerate(images):
        yield f"images[{index}]", image


def check_score(score: float, name: str = "score") -> None:
    """Raise ValueError if a threshold is no probability."""
    if not 0 <= score <= 1:
        raise ValueError(f"{name}: expected 0 to 1, got {score}")


def start_copy(tensors: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Start to copy tensors of one device to the CPU; return a function that waits for all of them together."""
    if tensors[0].device.type != "cuda":
        return lambda: tuple(tensors)

    copies = []
    for tensor in tensors:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copies.append(copy.copy_(tensor, non_blocking=True))
    finished = torch.cuda.Event()
    finished.record()

    def wait() -> tuple[Tensor, ...]:
        finished.synchronize()
        return tuple(copies)

    return wait

"""Export a trained detector to ONNX and run the file in onnxruntime on one photograph.

    pip install -e ".[export]"          # in a checkout of the repository
    python examples/export_and_run_onnx.py runs/default/checkpoints/best.pt photo.jpg --out detector.onnx

`Detector` and `Found` need onnxruntime, numpy and OpenCV alone, so they can be copied into another program.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

import detector
from detector.export import export_onnx


@dataclass(frozen=True)
class Found:
    """An object in a picture.

    Attributes:
        name: of its class.
        score: 0 to 1.
        box: x1, y1, x2, y2 in pixels of the picture.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]


class Detector:
    """Detects with an ONNX file of `detector.export`; the file says in its metadata how it wants its images.

    Args:
        onnx_file: written without a fixed size and number of images.
    """

    def __init__(self, onnx_file: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.class_names: list[str] = json.loads(metadata["classes"])
        self.long_side, self.short_side = json.loads(metadata["image_scale"])
        self.size_divisor: int = json.loads(metadata["size_divisor"])

    def __call__(self, image: np.ndarray, min_score: float) -> list[Found]:
        """Return the objects in an image, highest score first.

        Args:
            image: (H, W, 3) uint8 in OpenCV's order of channels, blue first.
            min_score: objects with a lower score are left out.
        """
        height, width = image.shape[:2]
        resized = self._resize(image)
        new_height, new_width = resized.shape[:2]

        # Batch and channels first, red first, sides padded on the right and bottom. Normalization is inside the file.
        padded_height, padded_width = (-(-side // self.size_divisor) * self.size_divisor for side in resized.shape[:2])
        images = np.zeros((1, 3, padded_height, padded_width), np.uint8)
        images[0, :, :new_height, :new_width] = resized[:, :, ::-1].transpose(2, 0, 1)
        sizes = np.array([[new_height, new_width]], np.int64)
        outputs = self.session.run(None, {"images": images, "sizes": sizes})

        boxes, scores, labels, valid = (output[0] for output in outputs[:4])
        scale = np.array([new_width / width, new_height / height])
        boxes = boxes / np.concatenate([scale, scale])
        found = []
        for box, score, label in zip(boxes[valid], scores[valid], labels[valid], strict=True):
            if score >= min_score:
                found.append(Found(self.class_names[label], float(score), tuple(box.tolist())))
        return found

    def _resize(self, image: np.ndarray) -> np.ndarray:
        """Return the image at the largest size that fits the bounds of both sides and keeps the ratio."""
        height, width = image.shape[:2]
        factor = min(self.long_side / max(height, width), self.short_side / min(height, width))
        new_height = max(int(height * factor + 0.5), 1)
        new_width = max(int(width * factor + 0.5), 1)
        return cv2.resize(image, (new_width, new_height))


def export(weights: Path, onnx_file: Path) -> None:
    """Write the ONNX file of a checkpoint."""
    model, class_names = detector.load(weights, "cpu")
    export_onnx(model, onnx_file, classes=class_names, weights=weights.name)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Export a detector to ONNX and run it in onnxruntime.")
    parser.add_argument("weights", type=Path, help="checkpoint of a training run, or an MMDetection file")
    parser.add_argument("photograph", type=Path, help="image to detect objects in")
    parser.add_argument("--out", type=Path, default=Path("detector.onnx"), help="ONNX file to write")
    parser.add_argument("--min-score", type=float, default=0.3, help="leave out detections below this score")
    options = parser.parse_args()

    image = cv2.imread(str(options.photograph))
    if image is None:
        parser.error(f"photograph: expected an image, got {options.photograph}")
    export(options.weights, options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")

    found = Detector(options.out)(image, options.min_score)
    for one in found:
        x1, y1, x2, y2 = one.box
        print(f"{one.name:12} {one.score:.2f}  x {x1:.0f} to {x2:.0f}, y {y1:.0f} to {y2:.0f}")
    if not found:
        print(f"nothing found with a score of {options.min_score} or more")


if __name__ == "__main__":
    main()

"""Export a trained detector to ONNX and run the file in onnxruntime on one photograph.

pip install "triton-dcn[detector,export]"
python examples/export_and_run_onnx.py runs/default/checkpoints/best.pt photo.jpg --out detector.onnx
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import onnxruntime

import detector
from detector.export import export_onnx
from detector.image import read_image, resize_keep_ratio, stack_images


def export(weights: Path, onnx_file: Path) -> tuple[int, int]:
    """Write the ONNX file of a checkpoint; return the bounds of the long and short side that its images must fit."""
    model, class_names = detector.load(weights, "cpu")
    export_onnx(model, onnx_file, classes=class_names)
    return model.config.image_scale


def detect(onnx_file: Path, photograph: Path, image_scale: tuple[int, int], min_score: float) -> list[str]:
    """Return one line for each object, with its box in pixels of the photograph. This part needs no PyTorch model."""
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    class_names = json.loads(session.get_modelmeta().custom_metadata_map["classes"])

    image, (scale_x, scale_y) = resize_keep_ratio(read_image(photograph), image_scale)
    images, sizes = stack_images([image])
    outputs = session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
    boxes, scores, labels, valid = outputs[:4]

    lines = []
    for box, score, label in zip(boxes[valid], scores[valid], labels[valid], strict=True):
        if score < min_score:
            continue
        x1, y1, x2, y2 = box / [scale_x, scale_y, scale_x, scale_y]
        lines.append(f"{class_names[label]:12} {score:.2f}  x {x1:.0f} to {x2:.0f}, y {y1:.0f} to {y2:.0f}")
    return lines


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Export a detector to ONNX and run it in onnxruntime.")
    parser.add_argument("weights", type=Path, help="checkpoint of a training run, or an MMDetection file")
    parser.add_argument("photograph", type=Path, help="image to detect objects in")
    parser.add_argument("--out", type=Path, default=Path("detector.onnx"), help="ONNX file to write")
    parser.add_argument("--min-score", type=float, default=0.3, help="leave out detections below this score")
    options = parser.parse_args()

    image_scale = export(options.weights, options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")

    lines = detect(options.out, options.photograph, image_scale, options.min_score)
    print("\n".join(lines) or f"nothing found with a score of {options.min_score} or more")


if __name__ == "__main__":
    main()

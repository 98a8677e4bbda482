"""Draw what a run has found in the first validation images beside the truth, one below the other.

    python -m bench.draw_detections runs/default docs/pictures/generated.jpg --score 0.76

It reads `detections.json` of the run and chooses nothing: the images are the first of the annotation file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.arguments import positive, probability
from detector.image import write_image
from detector.picture import pad
from train.build import GENERATED_DATA
from train.data.coco_dataset import CocoDetection
from train.data.transforms import Transform
from train.evaluation.pictures import draw_pictures
from train.run_folder import RunFolder


def draw(run: Path, data: Path, count: int, score: float) -> np.ndarray:
    """Return the first `count` validation images with detections from `score` on, beside the ground truth.

    Args:
        run: folder of a run, evaluated on the validation images of `data`.
        data: folder in COCO 2017 layout.
        count: how many images.
        score: detections below it are left out.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    rows = json.loads(RunFolder(run).detections.read_text())
    annotations = data / "annotations" / "instances_val2017.json"
    dataset = CocoDetection(annotations, data / "val2017", Transform((1333, 800)), training=False, limit=count)
    with tempfile.TemporaryDirectory() as folder:
        pictures = [picture for _, picture in draw_pictures(dataset, rows, Path(folder), count, score)]
    width = max(picture.shape[1] for picture in pictures)
    return np.vstack([pad(picture, len(picture), width) for picture in pictures])


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and write the picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.draw_detections", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("out", type=Path, help="picture to write")
    parser.add_argument("--data", type=Path, default=GENERATED_DATA, help="in COCO layout; default: the generated set")
    parser.add_argument("--count", type=positive, default=1, help="images")
    parser.add_argument("--score", type=probability, default=0.5, help="leave out detections below it")
    options = parser.parse_args(arguments)
    try:
        write_image(options.out, draw(options.run, options.data, options.count, options.score))
    except (OSError, ValueError) as error:
        sys.exit(f"bench: {error}")
    print(options.out)


if __name__ == "__main__":
    main()

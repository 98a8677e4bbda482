"""Train the detector on your own photographs from Python, then detect in one of them.

    pip install -e ".[train]"          # in a checkout of the repository
    python examples/train_on_your_photographs.py /path/to/photographs --out runs/photographs

The folder has COCO's layout; docs/training.md, "Your own data", says which keys of the JSON files are read:

    annotations/instances_train2017.json    train2017/*.jpg
    annotations/instances_val2017.json      val2017/*.jpg

Everything here can be said on the command line of train/main.py as well, but for the fields of `FasterRCNNConfig` that
only Python knows, like the anchors below.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import detector
from train.config import PRESETS, Config
from train.main import run


def make_config(photographs: Path, out: Path, epochs: int) -> Config:
    """Start from the preset for a CPU or a single small GPU, and change what these photographs need."""
    preset = PRESETS["small"]
    model = replace(
        preset.model,
        image_scale=(320, 320),  # larger than the preset's, for small objects
        anchor_ratios=(0.67, 1.0, 1.5),  # height / width: these objects are nearly round
    )
    data = replace(preset.data, root=photographs)
    return replace(preset, out=out, epochs=epochs, data=data, model=model)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the detector on photographs in COCO layout.")
    parser.add_argument("photographs", type=Path, help="folder in COCO 2017 layout")
    parser.add_argument("--out", type=Path, default=Path("runs/photographs"), help="folder of the run")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training images")
    options = parser.parse_args()

    # The same call again resumes a run that was interrupted.
    run_folder = run(make_config(options.photographs, options.out, options.epochs))

    model, _ = detector.load(run_folder.checkpoints / "best.pt")
    photograph = sorted((options.photographs / "val2017").iterdir())[0]
    found = model.predict(photograph)
    print(f"\n{photograph}:")
    for name, score, box in zip(found.names, found.scores.tolist(), found.boxes.tolist(), strict=True):
        corners = ", ".join(f"{corner:.0f}" for corner in box)
        print(f"    {name:12} {score:.2f}  x1 y1 x2 y2 = {corners}")

    picture = run_folder.path / "found.jpg"
    found.save(picture)
    print(f"    with its boxes: {picture}")


if __name__ == "__main__":
    main()

"""Curves of one or several runs in one picture: `python train/plot.py RUN... [--out curves.png]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # find the packages from any folder; this one's files must not pass for top-level modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot

from train.run_folder import RunFolder, read_lines

MOST_POINTS = 300  # of a loss curve: more are averaged


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the runs named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="train/plot.py", description="Draw loss, learning rate and AP of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that --out of training named")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="picture to write")
    arguments = parser.parse_args(argv)
    try:
        draw(arguments.runs, arguments.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(arguments.out)
    return 0


def draw(runs: Sequence[Path], out: Path) -> None:
    """Draw loss, its parts, learning rate, AP, AP50 and the AP of masks of the runs over their steps.

    Args:
        runs: folders with a metrics.jsonl.
        out: picture to write; its suffix tells the format.

    Raises:
        OSError: the picture cannot be written.
        ValueError: a run has no numbers, or the format is unknown.
    """
    histories = {run: read_lines(RunFolder(run).metrics) for run in runs}
    for run, lines in histories.items():
        if not any("loss" in line for line in lines):
            raise ValueError(f"{run} is not the folder of a run: no losses in {RunFolder(run).metrics}")
    parts = list(dict.fromkeys(key for lines in histories.values() for line in lines for key in line if "loss_" in key))
    masks = ["segm_AP"] if any("segm_AP" in line for lines in histories.values() for line in lines) else []
    keys = ["loss", "AP", "AP50", *masks, "lr", *parts]
    mpl.use("Agg")
    figure, panels = pyplot.subplots(2, -(-len(keys) // 2), figsize=(4 * -(-len(keys) // 2), 7), layout="constrained")
    for panel, key in zip(panels.flat, keys, strict=False):
        for run, lines in histories.items():
            chosen = [line for line in lines if key in line and "step" in line]
            steps, values = _thin([line["step"] for line in chosen], [line[key] for line in chosen])
            panel.plot(steps, values, marker="o" if "AP" in key else None, label=str(run))
        panel.set(title=key, xlabel="step")
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(keys) :]:
        panel.set_visible(False)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def _thin(steps: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbors until few enough points are left to see the course."""
    width = -(-len(steps) // MOST_POINTS) or 1
    groups = [slice(start, start + width) for start in range(0, len(steps), width)]
    columns = (np.array([np.mean(column[group]) for group in groups]) for column in (steps, values))
    return tuple(columns)


if __name__ == "__main__":
    sys.exit(main())

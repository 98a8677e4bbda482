"""Curves of one or several runs in one picture: `python train/plot.py RUN... [--out curves.png]`.

Runs that differ in nothing but their seed share a color: thin lines are theirs, the thick one is their mean.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Import the packages from any working folder, and nothing from train/ as a top-level module.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot

from detector.text import lasting_output, printable, show, show_message
from train.evaluation.curve_picture import legend_name
from train.metrics_file import describe_damage, parse_lines
from train.run_folder import RunFolder

MAX_COLUMNS = 5  # of panels: a cascade with masks has 16 curves
MAX_POINTS = 300  # of a curve; neighbors are averaged where there are more
PANEL_SIZE = (4.0, 3.5)  # inches
LABEL_LENGTH = 60  # letters
NOT_COMPARED = {"seed", "out", "given", "starts"}  # in config.json, where each run has its own


@lasting_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Draw the runs named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="train/plot.py", description="Draw loss, learning rate and AP of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders given as --out to the training")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="picture to write")
    arguments = parser.parse_args(argv)
    try:
        draw(arguments.runs, arguments.out)
    except (OSError, ValueError) as error:
        show_message(f"error: {error}")
        return 1
    show(printable(arguments.out))
    return 0


def draw(runs: Sequence[Path], out: Path) -> None:
    """Draw loss, its parts, learning rate, AP, AP50 and the AP of masks of the runs over their steps.

    Runs of one configuration but for the seed have one color, and their mean is drawn over them.

    Args:
        runs: folders with a metrics.jsonl.
        out: picture to write; its suffix tells the format.

    Raises:
        OSError: the picture cannot be written.
        ValueError: a run has no numbers, or the format is unknown.
    """
    lines_of_runs = {}
    for run in runs:
        metrics = RunFolder(run).metrics
        lines, damaged = parse_lines(metrics)
        if damaged:
            show_message(f"note: {describe_damage(metrics, damaged)} not drawn")
        if not any("loss" in line for line in lines):
            raise ValueError(f"{run}: expected the folder of a run, got no losses in {metrics}")
        lines_of_runs[run] = lines

    keys = _curve_keys([line for lines in lines_of_runs.values() for line in lines])
    rows = max(2, math.ceil(len(keys) / MAX_COLUMNS))
    columns = math.ceil(len(keys) / rows)
    width, height = PANEL_SIZE
    mpl.use("Agg")
    figure, panels = pyplot.subplots(rows, columns, figsize=(columns * width, rows * height), layout="constrained")
    groups = _group_by_model(list(lines_of_runs))
    for panel, key in zip(panels.flat, keys, strict=False):
        marker = "o" if "AP" in key else None
        for number, group in enumerate(groups):
            color = f"C{number % 10}"
            curves = [_points(lines_of_runs[run], key) for run in group]
            if len(curves) > 1:
                for curve in curves:
                    panel.plot(*_average_neighbors(curve), color=color, linewidth=0.8, alpha=0.35)
            panel.plot(*_average_neighbors(_mean(curves)), color=color, marker=marker, label=_group_label(group))
        panel.set(title=_label(key), xlabel="step")
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(keys) :]:
        panel.set_visible(False)

    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), columns), frameon=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # letters that the font does not have appear as boxes
        figure.savefig(out, dpi=120)
    pyplot.close(figure)


def _group_by_model(runs: Sequence[Path]) -> list[list[Path]]:
    """Return the runs in groups that differ in nothing but the seed, and in that; the first run comes first."""
    groups: dict[tuple[str, int], list[Path]] = {}
    seen: Counter[tuple[str, Any]] = Counter()
    for run in runs:
        configuration, seed = _configuration(run)
        number = seen[configuration, seed]  # the second run with a seed begins another group
        seen[configuration, seed] += 1
        groups.setdefault((configuration, number), []).append(run)
    return list(groups.values())


def _configuration(run: Path) -> tuple[str, Any]:
    """Return what a run was made from but its seed, commit and number of processes included, and the seed.

    Where config.json says nothing, the folder, which no other run has, stands for it.
    """
    try:
        record = RunFolder(run).recorded()
    except (OSError, ValueError):
        record = None
    if record is None:
        return str(run), None
    compared = {name: value for name, value in record.items() if name not in NOT_COMPARED}
    starts: list[dict[str, Any]] = record.get("starts") or [{}]
    compared["start"] = [starts[0].get("commit"), starts[0].get("world_size")]
    return json.dumps(compared, sort_keys=True), record.get("seed")


def _group_label(group: Sequence[Path]) -> str:
    """Return the name of a run, or what the names of several begin with."""
    if len(group) == 1:
        return _label(group[0])
    same_letters = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*map(str, group), strict=False))
    common = "".join(letters[0] for letters in same_letters).rstrip("-_./ ")
    return _label(f"{common or ', '.join(map(str, group))}, mean of {len(group)} seeds")


def _points(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return the steps and values of one curve of a run."""
    return [(line["step"], line[key]) for line in lines if key in line and "step" in line]


def _mean(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Return the mean of curves at the steps that all of them have."""
    first, *others = [dict(curve) for curve in curves]
    steps = [step for step in first if all(step in curve for curve in others)]
    return [(step, sum(curve[step] for curve in (first, *others)) / len(curves)) for step in steps]


def _label(name: str | Path) -> str:
    return legend_name(name, LABEL_LENGTH)


def _curve_keys(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the curves: losses and masks only where a line has them."""
    all_keys = dict.fromkeys(key for line in lines for key in line)  # in order, each once
    keys = ["loss", "AP", "AP50"]
    if "segm_AP" in all_keys:
        keys.append("segm_AP")
    keys.append("lr")
    keys += [key for key in all_keys if "loss_" in key]
    return keys


def _average_neighbors(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Return steps and values of at most `MAX_POINTS` points: groups of neighbors are averaged."""
    group_size = max(1, math.ceil(len(points) / MAX_POINTS))
    steps = []
    values = []
    for start in range(0, len(points), group_size):
        group = np.array(points[start : start + group_size])
        steps.append(float(group[:, 0].mean()))
        values.append(float(group[:, 1].mean()))
    return steps, values


if __name__ == "__main__":
    sys.exit(main())

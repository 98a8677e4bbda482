"""Draws precision over recall and F1 over the score of a comparison with the ground truth, into one picture."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from detector.draw import class_color
from detector.text import short_name
from train.evaluation.score_curves import ScoreCurve, ScoreCurves, format_best

NAMED_CLASSES = 12  # those with the most boxes; the curves of the others are gray
NAME_LENGTH = 24  # letters of a class in the legend
ROW_SIZE = (1200, 450)  # pixels; a multiple of 50, because older Matplotlibs round inches down
DPI = 100
GRAY = "0.8"
OTHERS = "other classes"


def draw_score_curves(curves: Mapping[str, ScoreCurves]) -> np.ndarray:
    """Draw the curves of each class, and of all together, with a dot where F1 is highest.

    Args:
        curves: what was compared ("boxes", "masks") -> its curves; a row of the picture each.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    from matplotlib.figure import Figure  # slow to import, and a run needs it only here

    width, height = ROW_SIZE
    figure = Figure((width / DPI, len(curves) * height / DPI), dpi=DPI, layout="constrained")
    rows = figure.subplots(len(curves), 2, squeeze=False)
    for (kind, of_kind), (left, right) in zip(curves.items(), rows, strict=True):
        for curve, label, style in _styled(of_kind):
            left.plot(curve.recall, curve.precision, **style)
            right.plot(curve.scores, curve.f1, label=label, **style)
            if label != OTHERS:
                best = curve.best
                left.plot(best.recall, best.precision, "o", color=style["color"], zorder=style["zorder"])
                right.plot(best.score, best.f1, "o", color=style["color"], zorder=style["zorder"])
        left.set(title=f"{kind}: precision and recall at IoU 0.5", xlabel="recall", ylabel="precision")
        right.set(title=f"{kind}: F1 by score threshold; dot: the highest", xlabel="score threshold", ylabel="F1")
        for panel in (left, right):
            panel.set(xlim=(0, 1.01), ylim=(0, 1.01))
            panel.grid(alpha=0.3)
        handles, labels = right.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True))  # the other classes once
        place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
        right.legend(list(entries.values()), list(entries), title="highest F1 at score", frameon=False, **place)

    pixels = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # letters that the font does not have appear as boxes
        figure.savefig(pixels, format="rgba")
    return np.frombuffer(pixels.getvalue(), np.uint8).reshape(-1, width, 4)[..., :3].copy()


def _styled(curves: ScoreCurves) -> list[tuple[ScoreCurve, str, dict[str, Any]]]:
    """Return the curves that have a right detection, with their labels and how they are drawn."""
    drawn = [(label, name) for label, name in enumerate(curves.of_classes) if curves.of_classes[name].f1.any()]
    by_boxes = sorted(drawn, key=lambda item: -curves.of_classes[item[1]].boxes)
    named = sorted(by_boxes[:NAMED_CLASSES])

    styled: list[tuple[ScoreCurve, str, dict[str, Any]]] = []
    for label, name in named:
        curve = curves.of_classes[name]
        color = tuple(value / 255 for value in class_color(label))
        styled.append((curve, _legend_text(name, curve), {"color": color, "linewidth": 1.4, "zorder": 3}))
    for _, name in by_boxes[NAMED_CLASSES:]:
        styled.append((curves.of_classes[name], OTHERS, {"color": GRAY, "linewidth": 0.8, "zorder": 2}))
    if curves.together.f1.any():
        text = _legend_text("all classes", curves.together)
        styled.append((curves.together, text, {"color": "black", "linewidth": 2.4, "zorder": 4}))
    return styled


def _legend_text(name: str, curve: ScoreCurve) -> str:
    return f"{legend_name(name, NAME_LENGTH)}: {format_best(curve.best)}"


def legend_name(name: object, length: int) -> str:
    """Return a short name as Matplotlib takes it: it would read `$x$` as a formula and leave out `_x`."""
    text = short_name(name, length).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text

"""Tables and pictures of measurements: `python -m bench.report RUN.csv [BEFORE.csv] [--png BARS] [--roofline PNG]`.

One CSV gives a markdown table; two give the ratio of each measurement to the same one before. The pictures of the
documentation are drawn from files in bench/results:

    python -m bench.report bench/results/cpu-epyc-2threads.csv --png docs/pictures/cpu-operator.png
    python -m bench.report bench/results/h200-stages-n16.csv --png docs/pictures/h200-operator.png
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from bench.cases import Case, all_cases
from bench.rows import ERROR_COLUMN, ResultRow, read_csv

COLORS = {
    "triton": "#123f6d",
    "torch": "#2f7fc1",
    "reference": "#8fb8d8",
    "torchvision": "#c0504d",
    "mmcv": "#d98880",
    "deformops": "#e0a458",
    "tvdcn": "#b9a44c",
    "conv2d": "#8c8c8c",
    "roofline": "#c9c9c9",
}
"""Color of every provider, in the order of the columns."""
OTHER_COLOR = "#555555"
LABELS = {
    "triton": "triton-dcn, triton backend",
    "torch": "triton-dcn, torch backend",
    "reference": "triton-dcn, reference backend",
    "conv2d": "plain conv2d without offsets",
    "roofline": "least time by roofline",
}
"""What the pictures and tables call the providers whose names do not say what they are."""
MAX_CASES_SIDE_BY_SIDE = 4
"""With more cases a panel is as wide as the picture."""
MARKERS = "osD^"
"""Of the dtypes of a roofline."""
TITLES = {"fwd": "forward", "bwd": "backward", "both": "forward + backward"}

MeasurementKey = tuple[str, str, str, str]
"""Case, shape, dtype and mode."""


def _group_rows(rows: list[ResultRow]) -> dict[MeasurementKey, dict[str, ResultRow]]:
    """Return the rows by what was measured, then by provider; without those about the machine."""
    groups: dict[MeasurementKey, dict[str, ResultRow]] = {}
    for row in rows:
        if row["provider"] != "machine":
            key = (row["case"], row["shape"], row["dtype"], row["mode"])
            groups.setdefault(key, {})[row["provider"]] = row
    return groups


def _provider_names(rows: list[ResultRow]) -> list[str]:
    """Return the providers of the rows: those of `COLORS` in its order, then the others."""
    present = {row["provider"] for row in rows} - {"machine"}
    known = [name for name in COLORS if name in present]
    return known + sorted(present - set(COLORS))


def label(provider: str) -> str:
    """Return what pictures and tables call a provider."""
    return LABELS.get(provider, provider)


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    """Return a markdown table, the first column aligned left, the others right."""
    columns = zip(header, *lines, strict=True)
    widths = [max(len(cell) for cell in column) for column in columns]

    def line(cells: list[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        padded[0] = cells[0].ljust(widths[0])
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (width + 1) + ":" for width in widths]
    rule[0] = "-" * (widths[0] + 2)
    return "\n".join([line(header), "|" + "|".join(rule) + "|", *map(line, lines)])


def markdown(rows: list[ResultRow]) -> str:
    """Return milliseconds (and peak MiB in brackets) of every provider, a line per case, dtype and mode.

    Results that disagree with the reference stand with their relative error.
    """
    if not rows:
        return "nothing was measured"
    names = _provider_names(rows)
    lines = []
    for (case, shape, dtype, mode), by_provider in _group_rows(rows).items():
        cells = [_time_and_memory(by_provider[name]) if name in by_provider else "-" for name in names]
        lines.append([f"{case} {mode}", shape, dtype, *cells])

    first = rows[0]
    title = f"{first['gpu']}, torch {first['torch']}, {first['date']}: ms (peak MiB), median of interleaved rounds"
    return f"{title}\n\n" + markdown_table(["case", "shape", "dtype", *map(label, names)], lines)


def _time_and_memory(row: ResultRow) -> str:
    text = f"{float(row['ms_p50']):.4g}"
    if row["peak_mib"]:
        text += f" ({float(row['peak_mib']):.0f})"
    if row.get(ERROR_COLUMN):
        text += f" error {row[ERROR_COLUMN]}"
    return text


def ratios(rows: list[ResultRow], before: list[ResultRow]) -> str:
    """Return time now over time before, for measurements that both hold; below 1 is faster."""
    names = _provider_names(rows)
    groups_before = _group_rows(before)
    lines = []
    for key, by_provider in _group_rows(rows).items():
        by_provider_before = groups_before.get(key, {})
        common = by_provider.keys() & by_provider_before.keys()
        if not common:
            continue
        cells = []
        for name in names:
            if name in common:
                ratio = float(by_provider[name]["ms_p50"]) / float(by_provider_before[name]["ms_p50"])
                cells.append(f"{ratio:.2f}")
            else:
                cells.append("-")
        case, shape, dtype, mode = key
        lines.append([f"{case} {mode}", shape, dtype, *cells])
    if not lines:
        return "the two files have no measurement in common"
    return "time over the time before\n\n" + markdown_table(["case", "shape", "dtype", *map(label, names)], lines)


def draw_bars(rows: list[ResultRow], path: Path) -> None:
    """Draw a bar per provider and case, a panel per dtype and mode, the modes side by side if the cases are few."""
    panels: dict[tuple[str, str], dict[str, dict[str, ResultRow]]] = {}
    for (case, shape, dtype, mode), by_provider in _group_rows(rows).items():
        panels.setdefault((dtype, mode), {})[f"{case}\n{shape.split()[0]}"] = by_provider
    modes = len({mode for _, mode in panels})
    most_cases = max(len(cases) for cases in panels.values())
    columns = modes if most_cases <= MAX_CASES_SIDE_BY_SIDE else 1
    lines = math.ceil(len(panels) / columns)
    size = (max(6, 1.7 * most_cases) * columns, 3.2 * lines + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    handles: dict[str, BarContainer] = {}
    for axis, ((dtype, mode), cases) in zip(axes, panels.items(), strict=False):
        handles |= _draw_panel(axis, cases)
        axis.set_title(f"{TITLES[mode]}, {dtype}")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    names = [name for name in _provider_names(rows) if name in handles]
    figure.legend(
        [handles[name] for name in names],
        [label(name) for name in names],
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
    )
    title = f"{rows[0]['gpu']}, torch {rows[0]['torch']}: milliseconds, lower is better"
    if any(row.get(ERROR_COLUMN) for row in rows):
        title += "; *: results disagree with the reference"
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def _draw_panel(axis: Axes, cases: dict[str, dict[str, ResultRow]]) -> dict[str, BarContainer]:
    """Draw the bars of one dtype and mode; return those of each provider that was measured.

    Args:
        axis: of the panel.
        cases: the rows by case, then by provider.
    """
    names = _provider_names([row for by_provider in cases.values() for row in by_provider.values()])
    width = 0.8 / len(names)
    handles = {}
    for index, name in enumerate(names):
        shift = (index - (len(names) - 1) / 2) * width
        positions = [x + shift for x in range(len(cases))]
        measured = [by_provider.get(name) for by_provider in cases.values()]
        heights = [float(row["ms_p50"]) if row else 0 for row in measured]
        bars = axis.bar(positions, heights, width, color=COLORS.get(name, OTHER_COLOR))
        axis.bar_label(bars, [_bar_label(row) for row in measured], padding=1, fontsize=8)
        handles[name] = bars
    axis.set_xticks(range(len(cases)), list(cases))
    axis.set_ylabel("ms")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.12)
    return handles


def _bar_label(row: ResultRow | None) -> str:
    if row is None:
        return "-"
    milliseconds = float(row["ms_p50"])
    text = f"{milliseconds:.0f}" if milliseconds >= 10 else f"{milliseconds:#.2g}"
    return f"{text}*" if row.get(ERROR_COLUMN) else text


def draw_roofline(rows: list[ResultRow], path: Path) -> None:
    """Draw the rate of every forward measurement over its intensity, under the roof measured on this machine.

    Raises:
        ValueError: the rows hold no measurement of the machine.
    """
    machine_rows = [row for row in rows if row["provider"] == "machine"]
    if not machine_rows:
        raise ValueError("rows: expected a measurement of the machine, got none")
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    dtypes = dict.fromkeys(row["dtype"] for row in machine_rows)
    for marker, dtype in zip(itertools.cycle(MARKERS), dtypes, strict=False):
        bandwidth, rate = roof([row for row in machine_rows if row["dtype"] == dtype])
        knee = rate / bandwidth
        axis.plot([1, knee, 1e4], [bandwidth / 1e9, rate / 1e9, rate / 1e9], "k-", lw=1)
        text = f"{dtype}: {rate / 1e9:,.0f} GFLOP/s"
        axis.annotate(text, (knee, rate / 1e9), (4, 2), textcoords="offset points", fontsize=8)
        for name, points in _forward_points(rows, dtype).items():
            intensities, rates = zip(*points, strict=True)
            color = COLORS.get(name, OTHER_COLOR)
            axis.plot(intensities, rates, marker, color=color, label=f"{label(name)}, {dtype}")
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte of inputs and output", ylabel="GFLOP/s")
    axis.set_title(f"forward; lines: most that copies and products reach on {rows[0]['gpu']}", fontsize=9)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _forward_points(rows: list[ResultRow], dtype: str) -> dict[str, list[tuple[float, float]]]:
    """Return (FLOP per byte, GFLOP/s) of the forward measurements of a dtype, by provider."""
    itemsize = 2 if dtype in ("float16", "bfloat16") else 4
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        case = case_of(row)
        if case is None or row["dtype"] != dtype or row["mode"] != "fwd" or row["provider"] == "roofline":
            continue
        flops = case.flops("fwd")
        intensity = flops / case.traffic("fwd", itemsize)
        gflops_per_second = flops / float(row["ms_p50"]) / 1e6
        points.setdefault(row["provider"], []).append((intensity, gflops_per_second))
    return points


def case_of(row: ResultRow) -> Case | None:
    """Return the case of a row with the batch and offset groups of its shape; None for one about the machine."""
    known = {case.name: case for case in all_cases()}
    if row["case"] not in known:
        return None
    batch = int(row["shape"].split("x")[0])
    groups = re.search(r" dg(\d+)", row["shape"])
    return replace(known[row["case"]], batch=batch, offset_groups=int(groups[1]) if groups else 1)


def roof(machine_rows: list[ResultRow]) -> tuple[float, float]:
    """Return bytes and floating-point operations per second of the machine, from its rows for one dtype."""
    by_name = {row["case"]: row for row in machine_rows}
    seconds = {name: float(row["ms_p20"]) / 1e3 for name, row in by_name.items()}
    moved = 2 * int(by_name["copy"]["shape"].split()[0])
    size = int(by_name["matmul"]["shape"].split("x")[0])
    _, channels, height, width = map(int, by_name["conv2d"]["shape"].split("x"))

    bandwidth = moved / seconds["copy"]
    matmul_rate = 2 * size**3 / seconds["matmul"]
    conv2d_rate = 18 * channels**2 * height * width / seconds["conv2d"]
    return bandwidth, max(matmul_rate, conv2d_rate)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and print or draw."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("before", type=Path, nargs="?", help="an earlier run to divide by")
    parser.add_argument("--png", type=Path, help="draw bars here")
    parser.add_argument("--roofline", type=Path, help="draw the roofline here")
    options = parser.parse_args(arguments)
    try:
        rows = read_csv(options.csv)
        if options.before:
            print(ratios(rows, read_csv(options.before)))
        else:
            print(markdown(rows))
        if options.png:
            draw_bars(rows, options.png)
        if options.roofline:
            draw_roofline(rows, options.roofline)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"bench: {error}")


if __name__ == "__main__":
    main()

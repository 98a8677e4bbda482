"""Tables and pictures of measurements: `python -m bench.report RUN.csv [BEFORE.csv] [--png BARS] [--roofline PNG]`.

One CSV gives a markdown table; two give the ratio of each measurement to the same one before.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from bench.cases import CASES, Case

KEY = ("case", "shape", "dtype", "mode")
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
"""Of every provider, in the order of the columns."""
TITLES = {"fwd": "forward", "bwd": "backward", "both": "forward + backward"}


def read_csv(path: Path) -> list[dict]:
    """Read the rows of a CSV of `bench.deform_conv`."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path | None, rows: list[dict]) -> None:
    """Write rows, one per measurement, all with the keys of the first. None: nowhere; no rows: what is there stays.

    Called anew after each case, so that a run that is ended early leaves what it measured.
    """
    if path is None or not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)


def _groups(rows: list[dict]) -> dict[tuple[str, ...], dict[str, dict]]:
    """Rows by case, shape, dtype and mode, then by provider; without those about the machine."""
    groups: dict[tuple[str, ...], dict[str, dict]] = {}
    for row in rows:
        if row["provider"] != "machine":
            groups.setdefault(tuple(row[key] for key in KEY), {})[row["provider"]] = row
    return groups


def _columns(rows: list[dict]) -> list[str]:
    present = {row["provider"] for row in rows} - {"machine"}
    return [name for name in COLORS if name in present] + sorted(present - set(COLORS))


def table(header: list[str], lines: list[list[str]]) -> str:
    """Return a markdown table, the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, lines)])


def markdown(rows: list[dict]) -> str:
    """Milliseconds (and peak MiB in brackets) of every provider, a line per case, dtype and mode."""
    if not rows:
        return "nothing was measured"
    names = _columns(rows)
    lines = []
    for (case, shape, dtype, mode), found in _groups(rows).items():
        cells = [f"{float(found[n]['ms_p50']):.4g}" + _mib(found[n]["peak_mib"]) if n in found else "-" for n in names]
        lines.append([f"{case} {mode}", shape, dtype, *cells])
    where = rows[0]
    title = f"{where['gpu']}, torch {where['torch']}, {where['date']}: ms (peak MiB), median of interleaved rounds"
    return f"{title}\n\n" + table(["case", "shape", "dtype", *names], lines)


def _mib(text: str) -> str:
    return f" ({float(text):.0f})" if text else ""


def ratios(rows: list[dict], before: list[dict]) -> str:
    """Time now over time before, for measurements that both hold; below 1 is faster."""
    then, names, lines = _groups(before), _columns(rows), []
    for key, found in _groups(rows).items():
        old = then.get(key, {})
        pairs = {n: float(found[n]["ms_p50"]) / float(old[n]["ms_p50"]) for n in names if n in found and n in old}
        if pairs:
            lines.append([f"{key[0]} {key[3]}", *key[1:3], *(f"{pairs[n]:.2f}" if n in pairs else "-" for n in names)])
    if not lines:
        return "the two files have no measurement in common"
    return "time over the time before\n\n" + table(["case", "shape", "dtype", *names], lines)


def draw_bars(rows: list[dict], path: Path) -> None:
    """Draw a bar per provider and case, a panel per dtype and mode."""
    panels: dict[tuple[str, str], dict[str, dict[str, dict]]] = {}
    for (case, _, dtype, mode), found in _groups(rows).items():
        panels.setdefault((dtype, mode), {})[case] = found
    names = _columns(rows)
    figure = Figure(figsize=(9, 3.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, ((dtype, mode), cases) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(names):
            at = [x + (i - (len(names) - 1) / 2) * 0.8 / len(names) for x in range(len(cases))]
            height = [float(found[name]["ms_p50"]) if name in found else 0 for found in cases.values()]
            bars = axis.bar(at, height, 0.8 / len(names), label=name, color=COLORS.get(name, "#555555"))
            labels = [(f"{h:.0f}" if h >= 100 else f"{h:.3g}") if h else "" for h in height]
            axis.bar_label(bars, labels, fontsize=7, padding=1)
        axis.set_xticks(range(len(cases)), list(cases))
        axis.set_yscale("log")
        axis.set_ylabel("ms")
        axis.set_title(f"{TITLES[mode]}, {dtype}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.12)
    axes[0].legend(ncols=len(names), fontsize=8, frameon=False)
    figure.suptitle(f"{rows[0]['gpu']}, torch {rows[0]['torch']}", fontsize=9)
    figure.savefig(path, dpi=130)


def draw_roofline(rows: list[dict], path: Path) -> None:
    """Draw the rate of every forward measurement over its intensity, under the roof measured on this machine.

    Raises:
        ValueError: the rows hold no measurement of the machine.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    limits = [row for row in rows if row["provider"] == "machine"]
    if not limits:
        raise ValueError("the rows hold no measurement of the machine")
    for dtype in dict.fromkeys(row["dtype"] for row in limits):
        bandwidth, rate = roof([row for row in limits if row["dtype"] == dtype])
        knee = rate / bandwidth
        axis.plot([1, knee, 1e4], [bandwidth / 1e9, rate / 1e9, rate / 1e9], "k-", lw=1)
        axis.annotate(f"{dtype}, {rate / 1e9:.4g} GFLOP/s", (1e4, rate / 1e9), fontsize=8, va="bottom", ha="right")
        itemsize = 2 if dtype in ("float16", "bfloat16") else 4
        points: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            case = case_of(row)
            if case and (row["dtype"], row["mode"]) == (dtype, "fwd") and row["provider"] != "roofline":
                flops = case.flops("fwd")
                point = flops / case.traffic("fwd", itemsize), flops / float(row["ms_p50"]) / 1e6
                points.setdefault(row["provider"], []).append(point)
        for name, places in points.items():
            axis.plot(*zip(*places, strict=True), "o", color=COLORS.get(name), label=f"{name}, {dtype}")
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte of inputs and output", ylabel="GFLOP/s, forward")
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def case_of(row: dict) -> Case | None:
    """Return the case of a row with the batch and offset groups of its shape; None for one about the machine."""
    known = {case.name: case for cases in CASES.values() for case in cases}
    if row["case"] not in known:
        return None
    groups = re.search(r" dg(\d+)", row["shape"])
    batch = int(row["shape"].split("x")[0])
    return replace(known[row["case"]], batch=batch, offset_groups=int(groups[1]) if groups else 1)


def roof(limits: list[dict]) -> tuple[float, float]:
    """Bytes and floating-point operations per second of the machine, from its rows for one dtype."""
    by_name = {row["case"]: row for row in limits}
    seconds = {name: float(row["ms_p20"]) / 1e3 for name, row in by_name.items()}
    moved = 2 * int(by_name["copy"]["shape"].split()[0])
    size = int(by_name["matmul"]["shape"].split("x")[0])
    _, channels, height, width = map(int, by_name["conv2d"]["shape"].split("x"))
    rates = 2 * size**3 / seconds["matmul"], 18 * channels**2 * height * width / seconds["conv2d"]
    return moved / seconds["copy"], max(rates)


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
        print(ratios(rows, read_csv(options.before)) if options.before else markdown(rows))
        if options.png:
            draw_bars(rows, options.png)
        if options.roofline:
            draw_roofline(rows, options.roofline)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"bench: {error}")


if __name__ == "__main__":
    main()

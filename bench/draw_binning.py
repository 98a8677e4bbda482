"""Draw how samples become the bin of a tile, and a bin a matrix; the symbols are those of docs/kernels.md.

python -m bench.draw_binning docs/pictures/binning.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from triton_dcn.tile_table import TILE_H, TILE_W

HEIGHT, WIDTH = 24, 38  # pixels of the input shown
TOP, LEFT = 8, 16  # the tile in it: second row and column of tiles
FAINT, INK, ACCENT, RIM = "#c4cad3", "#1f2937", "#2563eb", "#ea580c"


def smooth_offsets(draw: np.random.Generator) -> np.ndarray:
    """Return offsets (HEIGHT, WIDTH, 2), y and x, of one tap: a smooth field, as trained ones are."""
    coarse = draw.normal(size=(6, 9, 2)) * 1.7
    y, x = np.linspace(0, 4.999, HEIGHT)[:, None], np.linspace(0, 7.999, WIDTH)[None]
    y0, x0 = y.astype(int), x.astype(int)
    ly, lx = (y - y0)[..., None], (x - x0)[..., None]
    top = coarse[y0, x0] * (1 - lx) + coarse[y0, x0 + 1] * lx
    bottom = coarse[y0 + 1, x0] * (1 - lx) + coarse[y0 + 1, x0 + 1] * lx
    return top * (1 - ly) + bottom * ly


def hat_matrix(places: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return hat (TILE_H * TILE_W, n) of the samples at `places` (n, 2), y and x, with masks `scale` (n,)."""
    q = np.stack(np.meshgrid(TOP + np.arange(TILE_H), LEFT + np.arange(TILE_W), indexing="ij"), -1).reshape(-1, 1, 2)
    return scale * np.clip(1 - np.abs(places - q), 0, None).prod(-1)


def draw_grid(axes: plt.Axes, origins: np.ndarray, places: np.ndarray, member: np.ndarray, inner: np.ndarray) -> None:
    """Draw pixels, the tile, and the samples: those outside the bin faint, those of the bin with their cells."""
    for y in range(HEIGHT + 1):
        axes.axhline(y - 0.5, color="#eef1f5", linewidth=0.6, zorder=0)
    for x in range(WIDTH + 1):
        axes.axvline(x - 0.5, color="#eef1f5", linewidth=0.6, zorder=0)
    for y in range(0, HEIGHT + 1, TILE_H):
        axes.axhline(y - 0.5, color="#d5dae2", linewidth=1.2, zorder=1)
    for x in range(0, WIDTH + 1, TILE_W):
        axes.axvline(x - 0.5, color="#d5dae2", linewidth=1.2, zorder=1)
    tile = (LEFT - 0.5, TOP - 0.5)
    axes.add_patch(Rectangle(tile, TILE_W, TILE_H, facecolor=ACCENT, alpha=0.06, zorder=1))
    axes.scatter(*places[~member].T[::-1], s=5, color=FAINT, zorder=2)
    for own, color in ((inner, ACCENT), (member & ~inner, RIM)):
        for origin, place in zip(origins[own], places[own], strict=True):
            corner = np.floor(place)[::-1] - 0.5
            axes.add_patch(Rectangle(corner, 2, 2, facecolor=color, alpha=0.07, linewidth=0, zorder=2))
            axes.plot(*zip(origin[::-1], place[::-1], strict=True), color=color, alpha=0.35, linewidth=0.7, zorder=3)
        axes.scatter(*places[own].T[::-1], s=11, color=color, edgecolor="white", linewidth=0.4, zorder=4)
    axes.add_patch(Rectangle(tile, TILE_W, TILE_H, fill=False, edgecolor=INK, linewidth=2, zorder=5))
    axes.set(xlim=(5.5, WIDTH - 0.5), ylim=(HEIGHT - 3.5, 1.5), aspect="equal", xticks=[], yticks=[])


def main(arguments: list[str] | None = None) -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.draw_binning", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="PNG to write")
    options = parser.parse_args(arguments)
    draw = np.random.default_rng(3)
    origins = np.stack(np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), indexing="ij"), -1)
    places = (origins + smooth_offsets(draw)).reshape(-1, 2)
    origins, scale = origins.reshape(-1, 2), draw.uniform(0.4, 1, len(places))
    low, high = np.array([TOP, LEFT]), np.array([TOP + TILE_H, LEFT + TILE_W])
    cell = np.floor(places)
    member = ((cell + 1 >= low) & (cell < high)).all(1)  # some corner lies in the tile
    inner = ((cell >= low) & (cell + 1 < high)).all(1)  # all four do
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 5.1), width_ratios=(1.75, 1), layout="constrained", dpi=150
    )  # fmt: skip
    draw_grid(left, origins, places, member, inner)
    left.set_title(f"one tap: a tile of {TILE_H} x {TILE_W} input pixels and its bin", fontsize=12, color=INK)
    left.set_xlabel(
        "dot: where an output position samples; line: how far its offset took it; square: the 2 x 2 pixels it blends\n"
        "blue: cell inside the tile      orange: cell on the rim, also in a neighbor's bin      gray: not in this bin",
        fontsize=9.5, color=INK,
    )  # fmt: skip
    hat = hat_matrix(places[member], scale[member])
    for own, colors in ((inner[member], "Blues"), (~inner[member], "Oranges")):
        shown = np.where((hat > 0) & own, hat, np.nan)
        right.imshow(shown, cmap=colors, vmin=-0.35, vmax=1, aspect="auto", interpolation="none")
    for row in range(TILE_W, TILE_H * TILE_W, TILE_W):
        right.axhline(row - 0.5, color="#e3e7ed", linewidth=0.8, zorder=0)
    right.set_yticks(np.arange(TILE_H) * TILE_W + TILE_W / 2 - 0.5, [f"row {y}" for y in range(TILE_H)], fontsize=9)
    right.tick_params(length=0, colors=INK)
    right.set_title("its hat matrix", fontsize=12, color=INK)
    right.set_ylabel(f"{TILE_H * TILE_W} pixels q of the tile", fontsize=9.5, color=INK)
    right.set_xlabel(f"{member.sum()} samples s of the bin: at most four entries a column", fontsize=9.5, color=INK)
    bar = figure.colorbar(right.images[0], ax=right, fraction=0.05, pad=0.02)
    bar.ax.set_ylim(0, 1)
    bar.set_label("hat(q, s)", fontsize=9.5, color=INK)
    bar.outline.set_visible(False)
    for axes in (left, right):
        axes.spines[:].set_color(FAINT)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out)


if __name__ == "__main__":
    main()

"""Draw how samples become the bin of a tile, and a bin becomes a matrix; the symbols are those of docs/kernels.md.

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

from triton_dcn.tile_table import T_TILE_H as TILE_H
from triton_dcn.tile_table import TILE_W

HEIGHT, WIDTH = 24, 38
"""Pixels of the input that is shown."""
TOP, LEFT = 8, 16
"""First pixel of the tile whose bin is shown: third row and second column of tiles."""
GRAY = "#c4cad3"
INK = "#1f2937"
BLUE = "#2563eb"
ORANGE = "#ea580c"
PIXEL_LINE = "#eef1f5"
TILE_LINE = "#d5dae2"


def smooth_offsets(generator: np.random.Generator) -> np.ndarray:
    """Return offsets (HEIGHT, WIDTH, 2), y and x, of one tap: a smooth field, as trained ones are."""
    coarse = generator.normal(size=(6, 9, 2)) * 1.7
    y = np.linspace(0, 4.999, HEIGHT)[:, None]
    x = np.linspace(0, 7.999, WIDTH)[None]
    y0 = y.astype(int)
    x0 = x.astype(int)
    ly = (y - y0)[..., None]
    lx = (x - x0)[..., None]
    top = coarse[y0, x0] * (1 - lx) + coarse[y0, x0 + 1] * lx
    bottom = coarse[y0 + 1, x0] * (1 - lx) + coarse[y0 + 1, x0 + 1] * lx
    return top * (1 - ly) + bottom * ly


def tile_hat_matrix(positions: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return hat (TILE_H * TILE_W, n) of the samples at `positions` (n, 2), y and x, with masks `scale` (n,)."""
    rows = TOP + np.arange(TILE_H)
    columns = LEFT + np.arange(TILE_W)
    pixels = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 1, 2)
    hats = np.clip(1 - np.abs(positions - pixels), 0, None)
    return scale * hats.prod(-1)


def draw_grid(
    axes: plt.Axes, origins: np.ndarray, positions: np.ndarray, in_bin: np.ndarray, inside_tile: np.ndarray
) -> None:
    """Draw pixels, the tile, and the samples.

    Args:
        axes: to draw on.
        origins: (n, 2), y and x, where the samples would be without offsets.
        positions: (n, 2), y and x, where they are.
        in_bin: (n,), the sample's cell has pixels in the tile.
        inside_tile: (n,), the sample's cell lies inside the tile.
    """
    _draw_lines(axes)
    tile = (LEFT - 0.5, TOP - 0.5)
    axes.add_patch(Rectangle(tile, TILE_W, TILE_H, facecolor=BLUE, alpha=0.06, zorder=1))
    axes.scatter(*positions[~in_bin].T[::-1], s=5, color=GRAY, zorder=2)
    for shown, color in ((inside_tile, BLUE), (in_bin & ~inside_tile, ORANGE)):
        for origin, position in zip(origins[shown], positions[shown], strict=True):
            corner = np.floor(position)[::-1] - 0.5
            axes.add_patch(Rectangle(corner, 2, 2, facecolor=color, alpha=0.07, linewidth=0, zorder=2))
            x, y = zip(origin[::-1], position[::-1], strict=True)
            axes.plot(x, y, color=color, alpha=0.35, linewidth=0.7, zorder=3)
        axes.scatter(*positions[shown].T[::-1], s=11, color=color, edgecolor="white", linewidth=0.4, zorder=4)
    axes.add_patch(Rectangle(tile, TILE_W, TILE_H, fill=False, edgecolor=INK, linewidth=2, zorder=5))
    axes.set(xlim=(5.5, WIDTH - 0.5), ylim=(HEIGHT - 3.5, 1.5), aspect="equal", xticks=[], yticks=[])
    axes.set_title(f"one tap: a tile of {TILE_H} x {TILE_W} input pixels and its bin", fontsize=12, color=INK)
    axes.set_xlabel(
        "dot: where an output position samples; line: how far its offset took it; square: the 2 x 2 pixels it blends\n"
        "blue: cell inside the tile      orange: cell on the rim, also in a neighbor's bin      gray: not in this bin",
        fontsize=9.5,
        color=INK,
    )


def _draw_lines(axes: plt.Axes) -> None:
    """Draw the borders of pixels and of tiles."""
    for y in range(HEIGHT + 1):
        axes.axhline(y - 0.5, color=PIXEL_LINE, linewidth=0.6, zorder=0)
    for x in range(WIDTH + 1):
        axes.axvline(x - 0.5, color=PIXEL_LINE, linewidth=0.6, zorder=0)
    for y in range(0, HEIGHT + 1, TILE_H):
        axes.axhline(y - 0.5, color=TILE_LINE, linewidth=1.2, zorder=1)
    for x in range(0, WIDTH + 1, TILE_W):
        axes.axvline(x - 0.5, color=TILE_LINE, linewidth=1.2, zorder=1)


def draw_matrix(axes: plt.Axes, hat: np.ndarray, inside_tile: np.ndarray) -> None:
    """Draw the hat matrix (TILE_H * TILE_W, n) of a bin; `inside_tile` (n,) chooses the colors."""
    for shown, colors in ((inside_tile, "Blues"), (~inside_tile, "Oranges")):
        entries = np.where((hat > 0) & shown, hat, np.nan)
        axes.imshow(entries, cmap=colors, vmin=-0.35, vmax=1, aspect="auto", interpolation="none")
    for row in range(TILE_W, TILE_H * TILE_W, TILE_W):
        axes.axhline(row - 0.5, color="#e3e7ed", linewidth=0.8, zorder=0)
    row_centers = np.arange(TILE_H) * TILE_W + TILE_W / 2 - 0.5
    axes.set_yticks(row_centers, [f"row {y}" for y in range(TILE_H)], fontsize=9)
    axes.tick_params(length=0, colors=INK)
    axes.set_title("its hat matrix", fontsize=12, color=INK)
    axes.set_ylabel(f"{TILE_H * TILE_W} pixels q of the tile", fontsize=9.5, color=INK)
    axes.set_xlabel(f"{hat.shape[1]} samples s of the bin: at most four entries a column", fontsize=9.5, color=INK)

    bar = axes.figure.colorbar(axes.images[0], ax=axes, fraction=0.05, pad=0.02)
    bar.ax.set_ylim(0, 1)
    bar.set_label("hat(q, s)", fontsize=9.5, color=INK)
    bar.outline.set_visible(False)


def main(arguments: list[str] | None = None) -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.draw_binning", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="PNG to write")
    options = parser.parse_args(arguments)

    generator = np.random.default_rng(3)
    grid = np.stack(np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), indexing="ij"), -1)
    positions = (grid + smooth_offsets(generator)).reshape(-1, 2)
    origins = grid.reshape(-1, 2)
    scale = generator.uniform(0.4, 1, len(positions))

    first = np.array([TOP, LEFT])
    end = np.array([TOP + TILE_H, LEFT + TILE_W])
    cell = np.floor(positions)
    in_bin = ((cell + 1 >= first) & (cell < end)).all(1)  # some corner lies in the tile
    inside_tile = ((cell >= first) & (cell + 1 < end)).all(1)  # all four do

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.1), width_ratios=(1.75, 1), layout="constrained", dpi=150)
    draw_grid(left, origins, positions, in_bin, inside_tile)
    draw_matrix(right, tile_hat_matrix(positions[in_bin], scale[in_bin]), inside_tile[in_bin])
    for axes in (left, right):
        axes.spines[:].set_color(GRAY)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out)


if __name__ == "__main__":
    main()

"""What `bench.tune` tries for a task: the table as it is, tiles around its row, other ways to the same result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.utils import deterministic

from bench.cases import Case, Inputs
from triton_dcn import launchers, tile_table, triton_backend, workspace
from triton_dcn.tile_table import Tile, TileRow

FUSED_TASK = {"columns": "forward", "grad_sample": "grad_sample_fused"}
"""Task -> the fused one; it is done only where the table has no row of the fused one."""
WAYS = ("t_columns", "g_form")
"""The two ways to the gradient of the input; for one offset group both can be taken."""
MIN_BLOCK = 16
MAX_BLOCK = 256


@dataclass(frozen=True)
class Candidate:
    """What a task is timed with.

    Attributes:
        label: its name in tables and messages.
        table: in place of `tile_table.TABLE`.
        row: the row that is judged; None where the candidate is not about a row.
        strip_min_width: in place of `tile_table.STRIP_MIN_WIDTH`.
        deterministic: whether the bins come from the stable sort.
        way: of `WAYS`, to the gradient of the input; "" leaves it to `workspace.prefers_t_columns`.
    """

    label: str
    table: tuple[TileRow, ...]
    row: TileRow | None = None
    strip_min_width: int = tile_table.STRIP_MIN_WIDTH
    deterministic: bool = False
    way: str = ""

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the Triton backend use it inside the block."""
        table = tile_table.TABLE
        strip_min_width = tile_table.STRIP_MIN_WIDTH
        fill_memory = deterministic.fill_uninitialized_memory
        was_deterministic = torch.are_deterministic_algorithms_enabled()

        tile_table.TABLE = self.table
        tile_table.STRIP_MIN_WIDTH = self.strip_min_width
        deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(self.deterministic)
        if self.way:
            triton_backend.prefers_t_columns = lambda geom, **_: self.way == "t_columns" and geom.offset_groups == 1
        try:
            yield
        finally:
            tile_table.TABLE = table
            tile_table.STRIP_MIN_WIDTH = strip_min_width
            deterministic.fill_uninitialized_memory = fill_memory
            torch.use_deterministic_algorithms(was_deterministic)
            triton_backend.prefers_t_columns = workspace.prefers_t_columns


def candidates(task: str, inputs: Inputs, max_tiles: int) -> list[Candidate]:
    """Return what to time for a task: the table first, then other ways, then tiles.

    Args:
        task: as in `TileRow`.
        inputs: of the call that is timed.
        max_tiles: of each kernel.
    """
    table = tuple(row for row in tile_table.TABLE if row.task != FUSED_TASK.get(task))
    current = tile_table.find_row(task, inputs.geometry, inputs.input)
    way = task if task in WAYS else ""
    results = [Candidate("table", table, current, way=way)]
    if task in tile_table.EXACT_TASKS:
        without_task = tuple(row for row in table if row.task != task)
        results.append(Candidate("general way", without_task))
        results.append(Candidate("rows", table, strip_min_width=1 << 30))
        results.append(Candidate("strips", table, strip_min_width=1))
    if task in WAYS:
        results.append(Candidate("stable sort", table, deterministic=True, way=way))
        if inputs.case.offset_groups == 1:
            other_way = WAYS[1 - WAYS.index(task)]
            results.append(Candidate(other_way, table, way=other_way))
    return results + _tile_candidates(task, inputs, max_tiles, table, current)


def _tile_candidates(
    task: str, inputs: Inputs, max_tiles: int, table: tuple[TileRow, ...], current: TileRow | None
) -> list[Candidate]:
    """Return tables with a new row in front: at most `max_tiles` tiles of each kernel.

    The kernel's own tiles in the table come first, also those of rows for other sizes; then those around `current`.
    """
    case = inputs.case
    arch = tile_table.architecture(inputs.input.device)
    arithmetic = tile_table.arithmetic(inputs.input)
    if current is None:
        current = TileRow(task, task, (arch,), arithmetic, tile_table.ANY, Tile(64, 64, 32, 4))
    channels = case.out_channels if task == "t_columns" else case.channels // case.offset_groups
    kernels = tuple(launchers.FORWARD_KERNELS) if task == "forward" else (current.kernel,)

    results = []
    for kernel in kernels:
        rows = []
        own_tiles = [row.tile for row in tile_table.TABLE if row.kernel == kernel and arch in row.archs]
        for tile in dict.fromkeys([*own_tiles, *tiles_around(current.tile)]):
            row = _row_for(TileRow(task, kernel, (arch,), arithmetic, channels, tile), case)
            if row is not None and (kernel, tile) != (current.kernel, current.tile):
                rows.append(row)
        for row in rows[:max_tiles]:
            results.append(Candidate(_label(row), (row, *table), row, way=task if task in WAYS else ""))
    return results


def _label(row: TileRow) -> str:
    tile = row.tile
    label = f"{row.kernel} {tile.block_p}x{tile.block_o}x{tile.block_c} {tile.num_warps}w"
    if tile.max_registers:
        label += f" r{tile.max_registers}"
    return label


def tiles_around(tile: Tile) -> Iterator[Tile]:
    """Yield tiles around one: each block halved or doubled, with 4 warps, 8, and 8 of which two blocks fit.

    Where programs have one warp, because their tiles are small, they keep it or get two.
    """
    block_changes: list[dict[str, int]] = [{}]
    for name in ("block_p", "block_o", "block_c"):
        size = getattr(tile, name)
        if size:
            block_changes.append({name: size // 2})
            block_changes.append({name: size * 2})

    warps_and_registers = [(4, 0), (8, 0)]
    if tile.num_warps == 1:
        warps_and_registers = [(1, 0), (2, 0)]
    elif not torch.version.hip:
        warps_and_registers.append((8, 128))

    for num_warps, max_registers in warps_and_registers:
        for change in block_changes:
            yield replace(tile, **change, num_warps=num_warps, max_registers=max_registers)


def _row_for(row: TileRow, case: Case) -> TileRow | None:
    """Return `row`, or the one whose blocks span offset groups, if its kernel can use the tile for a case."""
    tile = row.tile
    if any(not MIN_BLOCK <= block <= MAX_BLOCK for block in (tile.block_p, tile.block_o, tile.block_c) if block):
        return None
    if row.kernel in ("forward_direct", "forward_prefetch", "grad_sample_fused"):
        if tile.block_p % (16 * tile.num_warps):
            return None
        if row.kernel != "forward_prefetch" and case.channels // case.offset_groups % tile.block_c:
            row = replace(row, channels=case.channels, spans_groups=True)
    positions = case.batch * case.out_size[0] * case.out_size[1]
    fits = row.fits(case.channels // case.offset_groups, case.offset_groups, case.out_channels, positions)
    return row if fits else None

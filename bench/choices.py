"""What `bench.tune` tries for a stage: the table as it is, tiles around its row, the other way to the same result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.utils import deterministic

from bench.cases import Case, Inputs
from triton_dcn import launchers, tile_table
from triton_dcn.tile_table import Tile, TileRow

GENERAL_OF = {"columns": "forward", "grad_sample": "grad_sample_fused"}
"""Stage -> the fused one in whose absence it is used."""
FORMS = {"forward": ("forward_prefetch", "forward_transposed")}


@dataclass(frozen=True)
class Choice:
    """What a stage is timed with.

    Attributes:
        label: what it is called where it is printed.
        table: in place of that of `configs`.
        row: the one to judge, None where it is not about a row.
        strip_min: the narrowest map that is numbered in strips.
        deterministic: whether the bins come from the stable sort.
    """

    label: str
    table: tuple[TileRow, ...]
    row: TileRow | None = None
    strip_min: int = tile_table.STRIP_MIN_WIDTH
    deterministic: bool = False

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Let the launcher use it inside the block."""
        before = tile_table.TABLE, tile_table.STRIP_MIN_WIDTH, deterministic.fill_uninitialized_memory
        was_deterministic = torch.are_deterministic_algorithms_enabled()
        tile_table.TABLE, tile_table.STRIP_MIN_WIDTH, deterministic.fill_uninitialized_memory = (
            self.table, self.strip_min, False
        )  # fmt: skip
        torch.use_deterministic_algorithms(self.deterministic)
        try:
            yield
        finally:
            tile_table.TABLE, tile_table.STRIP_MIN_WIDTH, deterministic.fill_uninitialized_memory = before
            torch.use_deterministic_algorithms(was_deterministic)


def choices(stage: str, inputs: Inputs, most: int) -> list[Choice]:
    """Return what to time for a stage: the table first, then other ways, then at most `most` tiles of each form."""
    general = tuple(row for row in tile_table.TABLE if row.stage != GENERAL_OF.get(stage))
    without = tuple(row for row in general if row.stage != stage)
    kind, arch = tile_table.arithmetic(inputs.input), tile_table.architecture(inputs.input.device)
    known = launchers.row_for(stage, inputs.geometry, inputs.input)
    found = [Choice("table", general, known)]
    if stage in tile_table.EXACT_STAGES:
        found += [Choice("general way", without), Choice("rows", general, strip_min=1 << 30)]
        found += [Choice("strips", general, strip_min=1)]
        known = known or TileRow(stage, stage, (arch,), kind, tile_table.ANY, Tile(64, 64, 32, 4))
    if stage in ("t_columns", "g_form"):
        found += [Choice("stable sort", general, deterministic=True)]
    size = inputs.case.out_channels if stage == "t_columns" else inputs.case.channels // inputs.case.offset_groups
    for kernel in FORMS.get(stage, (known.kernel,)):
        for tile in itertools.islice(tiles(known.tile, stage, inputs.case), most):
            row = TileRow(stage, kernel, (arch,), kind, size, tile)
            if (kernel, tile) == (known.kernel, known.tile):
                continue
            label = f"{kernel} {tile.block_p}x{tile.block_o}x{tile.block_c} {tile.num_warps}w"
            label += f" r{tile.max_registers}" if tile.max_registers else ""
            found.append(Choice(label, (row, *general), row))
    return found


def tiles(tile: Tile, stage: str, case: Case) -> Iterator[Tile]:
    """Yield tiles around one: each block halved or doubled, with 4 warps, 8, and 8 of which two blocks fit."""
    names = ("block_p", "block_o", "block_c")
    blocks = [{}, *({name: getattr(tile, name) * by // 2} for name in names if getattr(tile, name) for by in (1, 4))]
    bounds = ((4, 0), (8, 0)) if torch.version.hip else ((4, 0), (8, 0), (8, 128))
    for (warps, registers), change in itertools.product(bounds, blocks):
        new = replace(tile, **change, num_warps=warps, max_registers=registers)
        sizes = (case.channels // case.offset_groups, new.block_c), (case.out_channels, new.block_o)
        divides = stage not in tile_table.EXACT_STAGES or not any(size % block for size, block in sizes)
        if divides and all(16 <= block <= 256 for block in (new.block_p, new.block_o, new.block_c) if block):
            yield new

"""The tile table: which kernel and which block sizes are used for a task on a GPU, and how a row is found.

Receives the geometry and a tensor of a call from `triton_backend` and `launchers`, and returns a row, or its tile.

The first row that fits task, architecture, arithmetic and number of channels is taken. Where no row of "forward" or
"grad_sample_fused" fits, columns and a library product do the work: the other tasks have a row for all sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache

import torch
from torch import Tensor

from triton_dcn.geometry import ConvGeometry
from triton_dcn.tf32 import tf32_is_allowed

TILE_W = 16
T_TILE_H = 4
G_TILE_H = 2
"""Width and height of the tile of input pixels that a bin of samples belongs to, for T-columns and for the G-form.

Of a higher tile fewer samples enter a second bin; a lower one has a hat matrix with fewer zeros. A bin of T holds the
samples of one tap, and for a lower tile more of a block would be empty; the G-form goes through all taps as one bin.
"""
STRIP = 16
"""Columns in a strip of output positions, see `kernels.sampling.swizzle`."""
STRIP_MIN_WIDTH = 64
"""Narrower maps keep row-major order."""


HALF_DTYPES = (torch.float16, torch.bfloat16)
ANY = 1 << 30
"""No bound."""


@dataclass(frozen=True)
class Tile:
    """Block sizes and compiler options of one launch.

    Attributes:
        block_p: output positions; samples of a bin for "t_columns" and "g_form".
        block_o: output channels, 0 where the kernel has no block of them.
        block_c: input channels, 0 where the kernel has no block of them.
        num_warps: per program.
        max_registers: limit for each thread, so that more programs fit a multiprocessor, on NVIDIA; 0 leaves it to
            the compiler.
        lanes: threads that share a gathered row, 4 or 8, see `kernels.register_order`.
    """

    block_p: int
    block_o: int = 0
    block_c: int = 0
    num_warps: int = 4
    max_registers: int = 0
    lanes: int = 4

    @cached_property
    def options(self) -> dict[str, int]:
        """The compiler's options, as keyword arguments of a launch; not to be changed."""
        options = {"num_warps": self.num_warps}
        if self.max_registers:
            options["maxnreg"] = self.max_registers
        return options


@dataclass(frozen=True)
class TileRow:
    """One row of the table.

    Attributes:
        task: what the tile is for.
        kernel: which kernel does it, without "_kernel".
        archs: "sm80", "sm90", "sm100", "gfx942" (by family: 12.x is served as sm80) or "interpreter".
        arithmetic: "half", "tf32", "float32" or "any".
        channels: the largest number that the row fits: input channels for "forward" and where a block spans several
            offset groups, output channels for "t_columns", else input channels of an offset group.
        tile: block sizes.
        programs: the fewest that a launch of "forward" by this row has to have; where positions are few, smaller tiles
            give work to all multiprocessors.
        spans_groups: the row is for offset groups of fewer channels than a block has, which then spans several.
    """

    task: str
    kernel: str
    archs: tuple[str, ...]
    arithmetic: str
    channels: int
    tile: Tile
    programs: int = 1
    spans_groups: bool = False

    def fits(self, channels: int, offset_groups: int, out_channels: int, positions: int) -> bool:
        """Tell whether the row's kernel can do its task for these sizes, and is the one for them.

        Args:
            channels: input channels of one offset group.
            offset_groups: D.
            out_channels: O.
            positions: output positions.
        """
        tile = self.tile
        size = channels
        if self.task == "forward" or self.spans_groups:
            size = channels * offset_groups
        elif self.task == "t_columns":
            size = out_channels
        if size > self.channels:
            return False
        if self.task not in EXACT_TASKS:
            return True
        if self.task == "grad_sample_fused":
            if out_channels > tile.block_o or (self.spans_groups and tile.block_c % channels):
                return False
        elif (
            out_channels % tile.block_o
            or -(-positions // tile.block_p) * (out_channels // tile.block_o) < self.programs
        ):
            return False
        if self.spans_groups:
            # a thread loads a quarter of a block at once, which has to lie in one offset group
            return channels % tile.block_c != 0 and size % tile.block_c == 0 and channels % (tile.block_c // 4) == 0
        return channels % tile.block_c == 0


WORD_KERNELS = ("grad_sample_fused", "grad_sample")
"""Kernels that read pairs of bfloat16 channels as int32, see `kernels.sampling.widen`."""
EXACT_TASKS = ("forward", "grad_sample_fused")
"""Tasks whose kernels need one channel group, and blocks that divide its channels. (The block of output channels of
"grad_sample_fused" has to hold all of them: with more, column gradients in memory take less.)"""
HOST = ("interpreter",)
NVIDIA = ("sm80", "sm90", "sm100")
GPUS = (*NVIDIA, "gfx942")
REGISTER_ORDER = ("sm80", "sm90", *HOST)
"""Where the results of products are in the registers that `kernels.register_order` says."""
TF32 = ("tf32", "tf32_even")
"""Precisions of `kernels.arithmetic.contract` for TF32."""
FULL = 256
"""Programs: about two for each of the 132 multiprocessors of an H100."""
TABLE: tuple[TileRow, ...] = (
    TileRow("sampling", "sampling", GPUS, "any", ANY, Tile(256)),
    TileRow("bins", "bins", NVIDIA, "any", ANY, Tile(128)),  # a sample a thread: with two, each corner has barriers
    TileRow("bins", "bins", ("gfx942",), "any", ANY, Tile(256)),
    TileRow("forward", "forward_direct", ("sm90",), "half", 256, Tile(128, 256, 64, 8, lanes=8), programs=FULL),
    TileRow("forward", "forward_direct", ("sm90",), "half", 256, Tile(128, 256, 32, 8), programs=FULL),
    TileRow("forward", "forward_direct", ("sm90",), "half", 256, Tile(128, 128, 32, 8, 128), programs=FULL),
    TileRow("forward", "forward_direct", ("sm80",), "half", 256, Tile(128, 128, 32, 8), programs=FULL),
    TileRow("forward", "forward_prefetch", ("sm90",), "half", 256, Tile(64, 128, 64, 4, lanes=8), programs=FULL),
    TileRow("forward", "forward_direct", ("sm90",), "half", 256, Tile(64, 128, 32, 4), programs=FULL),
    TileRow("forward", "forward_direct", NVIDIA, "half", 256, Tile(64, 64, 32, 4)),
    TileRow("forward", "forward_direct", ("sm90",), "half", 256, Tile(64, 128, 32, 4, 168), spans_groups=True),
    TileRow("forward", "forward_direct", NVIDIA, "half", 256, Tile(64, 64, 32, 4), spans_groups=True),
    TileRow("forward", "forward_direct", ("sm80", "sm90"), "half", 256, Tile(64, 64, 16, 4), spans_groups=True),
    TileRow("forward", "forward_direct", ("sm90",), "tf32", 256, Tile(128, 256, 32, 8, lanes=8), programs=FULL),
    TileRow("forward", "forward_prefetch", ("sm90",), "tf32", 256, Tile(128, 128, 32, 8, lanes=8), programs=FULL),
    TileRow("forward", "forward_direct", ("sm80", "sm90"), "tf32", 256, Tile(128, 128, 16, 8), programs=FULL),
    TileRow("forward", "forward_direct", ("sm90",), "tf32", 256, Tile(64, 128, 16, 4), programs=FULL),
    TileRow("forward", "forward_direct", ("sm80", "sm90"), "tf32", 256, Tile(64, 64, 16, 4)),
    TileRow("forward", "forward_direct", ("sm80", "sm90"), "tf32", 256, Tile(64, 64, 16, 4), spans_groups=True),
    TileRow("forward", "forward_prefetch", ("gfx942",), "half", 128, Tile(64, 128, 32, 4)),
    TileRow("forward", "forward_prefetch", ("gfx942",), "half", 256, Tile(64, 256, 32, 4)),
    TileRow("forward", "forward_prefetch", ("gfx942",), "half", 256, Tile(64, 64, 32, 4)),
    TileRow("columns", "columns", GPUS, "half", ANY, Tile(64, 0, 64, 8)),
    TileRow("columns", "columns", NVIDIA, "any", ANY, Tile(32, 0, 32, 8)),
    TileRow("columns", "columns", ("gfx942",), "any", ANY, Tile(16, 0, 64, 4)),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm90",), "half", 256, Tile(64, 64, 64, 4, 168, lanes=8)),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm90",), "half", 128, Tile(128, 128, 64, 8, 128)),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm90",), "half", 256, Tile(64, 128, 64, 4, 168, lanes=8)),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm90",), "half", 256, Tile(64, 256, 64, 4, 168, lanes=8)),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm90",), "half", 256, Tile(128, 128, 32, 8, 128)),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm90",), "half", 256, Tile(128, 256, 32, 8, 128)),
    TileRow(
        "grad_sample_fused", "grad_sample_fused", ("sm90",), "half", 256, Tile(128, 64, 32, 8, 80), spans_groups=True
    ),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm90",), "half", 256, Tile(128, 256, 32, 8), spans_groups=True),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm80",), "half", 256, Tile(64, 128, 32, 4)),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm80",), "half", 256, Tile(64, 256, 32, 4)),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm80",), "half", 256, Tile(64, 64, 32, 4), spans_groups=True),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm80",), "half", 256, Tile(64, 256, 32, 4), spans_groups=True),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm100",), "half", 256, Tile(64, 128, 64, 8)),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm100",), "half", 256, Tile(64, 256, 64, 8)),
    TileRow("grad_sample_fused", "grad_sample_fused", ("gfx942",), "half", 256, Tile(64, 128, 32, 4)),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm100", "gfx942"), "half", 256, Tile(64, 256, 32, 4)),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm90",), "tf32", 256, Tile(64, 128, 32, 4, 168, lanes=8)),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm90",), "tf32", 256, Tile(64, 256, 32, 4, lanes=8)),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm80", "sm90"), "tf32", 256, Tile(64, 128, 16, 4)),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm90",), "tf32", 256, Tile(64, 256, 16, 4)),
    TileRow("grad_sample", "grad_sample", NVIDIA, "half", ANY, Tile(16, 0, 64, 4)),
    TileRow("grad_sample", "grad_sample", NVIDIA, "any", ANY, Tile(16, 0, 32, 4)),
    TileRow("grad_sample", "grad_sample", ("gfx942",), "half", ANY, Tile(32, 0, 64, 4)),
    TileRow("grad_sample", "grad_sample", ("gfx942",), "any", ANY, Tile(32, 0, 32, 4)),
    TileRow("t_columns", "t_columns", GPUS, "half", 64, Tile(32, 64, 0, 4)),
    TileRow("t_columns", "t_columns", GPUS, "half", ANY, Tile(32, 128, 0, 4)),
    TileRow("t_columns", "t_columns", ("sm80", "sm90"), "tf32", ANY, Tile(32, 64, 0, 4)),
    TileRow("t_columns", "t_columns", ("sm80", "sm90"), "any", ANY, Tile(32, 64, 0, 4)),
    TileRow("t_columns", "t_columns", ("sm100", "gfx942"), "any", ANY, Tile(32, 64, 0, 8)),
    TileRow("g_form", "g_form", GPUS, "half", ANY, Tile(32, 0, 64, 1)),
    TileRow("g_form", "g_form", ("sm80", "sm90"), "tf32", ANY, Tile(32, 0, 64, 1)),
    TileRow("g_form", "g_form", GPUS, "any", ANY, Tile(32, 0, 32, 1)),
    TileRow("sampling", "sampling", HOST, "any", ANY, Tile(4096)),
    TileRow("bins", "bins", HOST, "any", ANY, Tile(4096)),
    TileRow("forward", "forward_direct", HOST, "half", ANY, Tile(256, 16, 16)),
    TileRow("forward", "forward_direct", HOST, "half", ANY, Tile(256, 16, 16), spans_groups=True),
    TileRow("columns", "columns", HOST, "any", ANY, Tile(256, 0, 64)),
    TileRow("grad_sample_fused", "grad_sample_fused", HOST, "half", ANY, Tile(256, 64, 32)),
    TileRow("grad_sample_fused", "grad_sample_fused", HOST, "half", ANY, Tile(256, 64, 32), spans_groups=True),
    TileRow("grad_sample", "grad_sample", HOST, "any", ANY, Tile(256, 0, 64)),
    TileRow("t_columns", "t_columns", HOST, "any", ANY, Tile(256, 64, 0)),
    TileRow("g_form", "g_form", HOST, "any", ANY, Tile(256, 0, 64)),
)


def find_row(task: str, geom: ConvGeometry, tensor: Tensor) -> TileRow | None:
    """Return the row for a task of a call, or None where no kernel does it for these sizes.

    Args:
        task: as in `TileRow`.
        geom: of the call.
        tensor: one of the call's tensors; only its device and dtype are used.
    """
    global _searched_table
    if _searched_table is not TABLE:  # `bench.tune` and the tests put others in its place
        _searched_table = TABLE
        _search_once.cache_clear()

    if task in EXACT_TASKS and geom.groups > 1:
        return None
    return _search_once(
        task,
        architecture(tensor.device),
        arithmetic(tensor),
        geom.in_channels // geom.offset_groups,
        geom.out_channels,
        offset_groups=geom.offset_groups,
        positions=geom.batch * geom.positions,
    )


def find_tile(task: str, geom: ConvGeometry, tensor: Tensor) -> Tile:
    """Return the tile for a task that has a row for all sizes; arguments as in `find_row`."""
    row = find_row(task, geom, tensor)
    assert row is not None, task
    return row.tile


@cache
def narrowed(tile: Tile, channels: int) -> Tile:
    """Return a tile for offset groups of `channels` channels: no wider than needed, and with more positions.

    A thread keeps its number of elements, but gets at most two positions.
    """
    block_c = min(tile.block_c, 1 << (channels - 1).bit_length())
    most_positions = max(tile.block_p, 64 * tile.num_warps)
    return replace(tile, block_c=block_c, block_p=min(tile.block_p * tile.block_c // block_c, most_positions))


def match_row(
    task: str,
    arch: str,
    arithmetic: str,
    channels: int,
    out_channels: int,
    *,
    offset_groups: int = 1,
    positions: int = ANY,
) -> TileRow | None:
    """Return the first row of the table that fits, or None; arguments as in `TileRow` and `TileRow.fits`."""
    for row in TABLE:
        if row.task != task or arch not in row.archs or row.arithmetic not in (arithmetic, "any"):
            continue
        if row.fits(channels, offset_groups, out_channels, positions):
            return row
    return None


_search_once = lru_cache(maxsize=4096)(match_row)
"""`match_row` with a memory, because every launch of every call asks for a row."""
_searched_table = TABLE
"""The table that the memory belongs to."""


def serves(device: torch.device) -> bool:
    """Tell whether the table has rows for `device`. On older GPUs the tiles exceed registers and shared memory."""
    if device.type != "cuda":
        return False
    # torch.compile does not trace through a memory
    return _serves_gpu(device) if torch.compiler.is_compiling() else _serves_gpu_once(device)


def _serves_gpu(device: torch.device) -> bool:
    if torch.version.hip or not torch.cuda.is_available():  # no GPU here: a fake tensor
        return True
    return bool(torch.cuda.get_device_properties(device).major >= 8)


_serves_gpu_once = cache(_serves_gpu)
"""`_serves_gpu` with a memory, because PyTorch takes longer to tell than a small kernel runs."""


@cache
def architecture(device: torch.device) -> str:
    """Return the table's name for `device`."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm90", 10: "sm100"}.get(major, "sm80")


def arithmetic(tensor: Tensor) -> str:
    """Return how products of `tensor` are computed: "half", "tf32" where the user allows it, or "float32"."""
    if tensor.dtype in HALF_DTYPES:
        return "half"
    if not tensor.is_cuda or torch.version.hip:
        return "float32"
    return "tf32" if tf32_is_allowed() else "float32"


def dot_precision(tensor: Tensor) -> str:
    """Return the precision of `kernels.arithmetic.contract` for products of `tensor`."""
    if tensor.dtype in HALF_DTYPES:
        return "ieee"
    return precision(architecture(tensor.device), arithmetic(tensor))


def precision(arch: str, arithmetic: str) -> str:
    """Return the precision of `contract`; three TF32 products replace one in float32, which tensor cores lack."""
    if arithmetic == "tf32":
        return "tf32" if arch == "sm80" else "tf32_even"
    if arithmetic == "float32" and arch.startswith("sm"):
        return "tf32x3"
    return "ieee"


def strip_width(out_width: int) -> int:
    """Return the constant STRIP of `kernels.sampling.swizzle`: the width of a strip, 0 for row-major order."""
    return STRIP if out_width >= STRIP_MIN_WIDTH else 0

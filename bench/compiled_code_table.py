"""What `bench.compiled_code` found, as lines for a terminal of 80 columns and as the page docs/compiled_code.md."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from triton_dcn import tile_table
from triton_dcn.tile_table import TileRow

NAMES = {
    "sm80": "sm_80 (A100)",
    "sm90": "sm_90 (H100, H200)",
    "sm100": "sm_100 (B200)",
    "gfx942": "gfx942 (MI300)",
}
PARTITIONS = 4  # of a multiprocessor or compute unit, each with registers and places for warps of its own
LANE_REGISTERS = 512  # of a partition, for each lane; given out by eights
PLACES = {"sm80": 16, "sm90": 16, "sm100": 16, "gfx942": 8}  # for warps, in a partition
BLOCKS = 32
SHARED = {"sm80": 164 << 10, "sm90": 228 << 10, "sm100": 228 << 10, "gfx942": 64 << 10}
RESERVED = {"sm80": 1 << 10, "sm90": 1 << 10, "sm100": 1 << 10, "gfx942": 0}  # bytes of shared memory a block
LEGEND = (
    "regs: registers a thread; spl: spills; KiB: shared memory; occ: occupancy at\n"
    "most; wide: loads of 128 bits, of all; mma: matrix instructions; at: atomics"
)
HEADER = f"{'kernel':18} math size {'tile':>10}  w regs spl   KiB  occ    wide  mma  at"
INTRODUCTION = """\
# The kernels' compiled code

Written by `python -m bench.compiled_code --markdown docs/compiled_code.md`, with Triton {version}; no GPU is needed.
What the compiler makes of every row of the tile table (`triton_dcn/tile_table.py`): facts about the code, no measure of
speed. What the kernels compute, and which of this is asserted in CI: [kernels.md](kernels.md).

- size: the largest size class of the row, input channels of an offset group, for t_columns output channels; a row for
  any size is compiled at {largest}. tile: positions or samples x output channels x input channels, where the kernel has
  them. Half is bfloat16; "any" is compiled in float32.
- registers: per thread; on gfx942 vector registers with the accumulation registers.
- occupancy: the most warps that can be resident at once, of those that the device has places for, and what bounds them.
  Warps have 32 threads, on gfx942 64. Devices that are served by another's rows (sm_86, sm_89, sm_120 by sm_80's) have
  fewer places and less shared memory.
- wide loads: 128-bit global loads, of all global loads. Counts are of instructions in the code, not of executions.
- instructions: of the main loop, times the threads, over the elements that one pass gathers (columns, rows of
  grad_output or of column gradients): what an element costs a thread. The loop over output channels inside that of
  grad_sample_fused counts once. Read for sm_80 and sm_90; elsewhere the loop is not one piece of the code.
- atomics: none is on floating-point numbers unless it says so; those on integers count the samples of a bin.
"""


@dataclass(frozen=True)
class Report:
    """What one compiled kernel uses.

    Attributes:
        registers: per thread; for gfx942 vector registers, accumulation registers included.
        spills: local stores and loads in the code, or spilled registers.
        shared: bytes of shared memory per block.
        wide_loads, loads: global loads of 128 bits, and of any width.
        async_copies: copies that bypass the registers.
        tensor_core: matrix instructions.
        float_atomics, integer_atomics: atomics on global memory.
        barriers: block-wide barriers.
        instructions: length of the code.
        loop: of these, inside the longest loop.
    """

    registers: int
    spills: int
    shared: int
    wide_loads: int
    loads: int
    async_copies: int
    tensor_core: int
    float_atomics: int
    integer_atomics: int
    barriers: int
    instructions: int
    loop: int


def occupancy(arch: str, warps: int, registers: int, shared: int) -> tuple[float, str]:
    """Return the bound of resident warps, as a share of the places there are, and what sets it.

    Args:
        arch: of `PLACES`.
        warps: of a block, a multiple of 4.
        registers: per thread.
        shared: bytes per block.

    Source:
        CUDA C++ Programming Guide, technical specifications per compute capability; AMD CDNA 3 instruction set, on
        registers and the local data share.
    """
    assert warps % PARTITIONS == 0, warps
    places = PARTITIONS * PLACES[arch]
    granted = -(-registers // 8) * 8
    used = shared + RESERVED[arch]
    blocks = {
        "": places // warps,
        "registers": PARTITIONS * (LANE_REGISTERS // granted) // warps,
        "shared memory": SHARED[arch] // used if used else BLOCKS,
        "blocks": BLOCKS,
    }
    bound = min(blocks, key=lambda name: blocks[name])  # the first of equals
    return blocks[bound] * warps / places, bound


def tile_name(row: TileRow) -> str:
    """Return the block sizes that the row's kernel has, as in 64x128x32."""
    return "x".join(str(size) for size in (row.tile.block_p, row.tile.block_o, row.tile.block_c) if size)


def size_name(row: TileRow) -> str:
    """Return the size class of a row, "any" without a bound."""
    return str(row.channels) if row.channels < tile_table.ANY else "any"


def per_element(row: TileRow, arch: str, report: Report, largest: int) -> str:
    """Return the instructions of the main loop per thread and gathered element, "-" where they cannot be read."""
    tile = row.tile
    widths = {
        "forward_prefetch": min(row.channels, largest), "forward_transposed": min(row.channels, largest),  # unrolled
        "t_columns": tile.block_o, "columns": tile.block_c, "g_form": tile.block_c, "grad_sample": tile.block_c,
        "grad_sample_fused": tile.block_c,
    }  # fmt: skip
    if row.kernel not in widths or arch not in ("sm80", "sm90"):
        return "-"
    return f"{report.loop * 32 * tile.num_warps / (tile.block_p * widths[row.kernel]):.1f}"


def table_line(row: TileRow, arch: str, report: Report) -> str:
    """Return one line below `HEADER`, 80 columns at most."""
    math = "f32" if row.arithmetic == "float32" else row.arithmetic
    share, _ = occupancy(arch, row.tile.num_warps, report.registers, report.shared)
    wide = f"{report.wide_loads}/{report.loads}"
    return (
        f"{row.kernel:18} {math:4} {size_name(row):>4} {tile_name(row):>10} {row.tile.num_warps:>2} "
        f"{report.registers:>4} {report.spills:>3} {report.shared / 1024:>5.1f} {share:>4.0%} {wide:>7} "
        f"{report.tensor_core:>4} {report.float_atomics + report.integer_atomics:>3}"
    )


def page(entries: Iterable[tuple[TileRow, str, Report]], version: str, largest: int) -> str:
    """Return docs/compiled_code.md: a table per target.

    Args:
        entries: rows with target and report, the targets one after the other.
        version: of Triton.
        largest: size at which a row without a bound was compiled.
    """
    columns = (
        "kernel", "arithmetic", "size", "tile", "warps", "registers", "spills", "shared KiB", "occupancy", "wide loads",
        "matrix instructions", "instructions", "atomics",
    )  # fmt: skip
    text, last = INTRODUCTION.format(version=version, largest=largest), None
    for row, arch, report in entries:
        if arch != last:
            text += f"\n## {NAMES[arch]}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
            last = arch
        share, bound = occupancy(arch, row.tile.num_warps, report.registers, report.shared)
        cells = (
            row.kernel, row.arithmetic, size_name(row), tile_name(row), row.tile.num_warps, report.registers,
            report.spills, f"{report.shared / 1024:.1f}", f"{share:.0%}" + (bound and f", {bound}"),
            f"{report.wide_loads} of {report.loads}", report.tensor_core, per_element(row, arch, report, largest),
            f"{report.float_atomics} on floats" if report.float_atomics else report.integer_atomics,
        )  # fmt: skip
        text += "| " + " | ".join(str(cell) for cell in cells) + " |\n"
    return text

"""What `bench.compiled_code` has read, as lines for a terminal of 80 columns and as the page docs/compiled_code.md."""

from __future__ import annotations

from collections.abc import Iterable

from bench.machine_code import CodeReport
from triton_dcn import tile_table
from triton_dcn.tile_table import TileRow

ARCH_NAMES = {
    "sm80": "sm_80 (A100)",
    "sm90": "sm_90 (H100, H200)",
    "sm100": "sm_100 (B200)",
    "gfx942": "gfx942 (MI300)",
}
PARTITIONS = 4
"""Partitions of a multiprocessor or compute unit; each has registers and places for warps of its own."""
LANE_REGISTERS = 512
"""Registers of a partition for each lane; they are allocated in groups of eight."""
WARPS_PER_PARTITION = {"sm80": 16, "sm90": 16, "sm100": 16, "gfx942": 8}
MAX_BLOCKS = 32
"""The most blocks that a multiprocessor holds."""
SHARED_BYTES = {"sm80": 164 << 10, "sm90": 228 << 10, "sm100": 228 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory of a multiprocessor."""
RESERVED_BYTES = {"sm80": 1 << 10, "sm90": 1 << 10, "sm100": 1 << 10, "gfx942": 0}
"""Bytes of shared memory that the system takes for each block."""
LEGEND = (
    "regs: registers a thread; spl: spills; KiB: shared memory; occ: occupancy at\n"
    "most; wide: loads of 128 bits, of all; mma: matrix instructions; at: atomics"
)
HEADER = f"{'kernel':18} math size {'tile':>10}  w regs spl   KiB  occ    wide  mma  at"
PAGE_COLUMNS = (
    "kernel",
    "arithmetic",
    "size",
    "tile",
    "warps",
    "registers",
    "spills",
    "shared KiB",
    "occupancy",
    "wide loads",
    "matrix instructions",
    "instructions",
    "atomics",
)
INTRODUCTION = """\
# The kernels' compiled code

Written by `python -m bench.compiled_code --markdown docs/compiled_code.md`, with Triton {version}; no GPU is needed.
What the compiler makes of every row of the tile table (`triton_dcn/tile_table.py`): facts about the code, no measure of
speed. What the kernels compute, and which of this is asserted in CI: [kernels.md](kernels.md). The limits that CI
asserts, by Triton version: `bench/compiled_code.csv`.

- size: the most channels that the row serves, input channels of an offset group, for t_columns output channels; a row
  for any size is compiled at {largest}. D: input channels of all offset groups, of which a block spans several. tile:
  positions or samples x output channels x input channels, where the kernel has them. Half is bfloat16; "any" is
  compiled in float32.
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


def occupancy(arch: str, warps: int, registers: int, shared: int) -> tuple[float, str]:
    """Return the most warps that can be resident, as a share of the places there are, and what bounds them.

    Args:
        arch: of `WARPS_PER_PARTITION`.
        warps: of a block, a multiple or a divisor of 4.
        registers: per thread.
        shared: bytes per block.

    Source:
        CUDA C++ Programming Guide, technical specifications per compute capability; AMD CDNA 3 instruction set, on
        registers and the local data share.
    """
    assert warps % PARTITIONS == 0 or PARTITIONS % warps == 0, warps
    places = PARTITIONS * WARPS_PER_PARTITION[arch]
    allocated = -(-registers // 8) * 8
    used = shared + RESERVED_BYTES[arch]
    blocks = {
        "": places // warps,
        "registers": PARTITIONS * (LANE_REGISTERS // allocated) // warps,
        "shared memory": SHARED_BYTES[arch] // used if used else MAX_BLOCKS,
        "blocks": MAX_BLOCKS,
    }
    bound = min(blocks, key=lambda name: blocks[name])  # the first of equals
    return blocks[bound] * warps / places, bound


def tile_name(row: TileRow) -> str:
    """Return the block sizes that the row's kernel has, as in 64x128x32."""
    sizes = (row.tile.block_p, row.tile.block_o, row.tile.block_c)
    return "x".join(str(size) for size in sizes if size)


def size_name(row: TileRow) -> str:
    """Return the most channels that the row serves, "any" without a bound; "D" says those of several offset groups."""
    if row.channels == tile_table.ANY:
        return "any"
    return f"D{row.channels}" if row.spans_groups else str(row.channels)


def instructions_per_element(row: TileRow, arch: str, report: CodeReport, largest: int) -> str:
    """Return the instructions of the main loop per thread and gathered element, "-" where they cannot be read."""
    tile = row.tile
    if arch not in ("sm80", "sm90") or row.kernel in ("sampling", "bins"):
        return "-"
    if row.task == "forward":
        channels = min(row.channels, largest)  # their loop over channels is unrolled
    elif row.kernel == "t_columns":
        channels = tile.block_o
    else:
        channels = tile.block_c
    threads = 32 * tile.num_warps
    elements = tile.block_p * channels
    return f"{report.loop * threads / elements:.1f}"


def table_line(row: TileRow, arch: str, report: CodeReport) -> str:
    """Return one line below `HEADER`, 80 columns at most."""
    arithmetic = "f32" if row.arithmetic == "float32" else row.arithmetic
    share, _ = occupancy(arch, row.tile.num_warps, report.registers, report.shared)
    wide = f"{report.wide_loads}/{report.loads}"
    atomics = report.float_atomics + report.integer_atomics
    return (
        f"{row.kernel:18} {arithmetic:4} {size_name(row):>4} {tile_name(row):>10} {row.tile.num_warps:>2} "
        f"{report.registers:>4} {report.spills:>3} {report.shared / 1024:>5.1f} {share:>4.0%} {wide:>7} "
        f"{report.tensor_core:>4} {atomics:>3}"
    )


def page(entries: Iterable[tuple[TileRow, str, CodeReport]], version: str, largest: int) -> str:
    """Return docs/compiled_code.md: a table per architecture.

    Args:
        entries: rows with architecture and report, one architecture after the other.
        version: of Triton.
        largest: channels at which a row for any size was compiled.
    """
    lines = [INTRODUCTION.format(version=version, largest=largest)]
    last_arch = None
    for row, arch, report in entries:
        if arch != last_arch:
            blank = "" if last_arch is None else "\n"
            lines.append(f"{blank}## {ARCH_NAMES[arch]}\n")
            lines.append(_markdown_row(PAGE_COLUMNS))
            lines.append("|" + "---|" * len(PAGE_COLUMNS))
            last_arch = arch
        lines.append(_markdown_row(_page_cells(row, arch, report, largest)))
    return "\n".join(lines) + "\n"


def _page_cells(row: TileRow, arch: str, report: CodeReport, largest: int) -> tuple[object, ...]:
    """Return the values of `PAGE_COLUMNS`."""
    share, bound = occupancy(arch, row.tile.num_warps, report.registers, report.shared)
    bounded_by = f", {bound}" if bound else ""
    atomics = f"{report.float_atomics} on floats" if report.float_atomics else report.integer_atomics
    return (
        row.kernel,
        row.arithmetic,
        size_name(row),
        tile_name(row),
        row.tile.num_warps,
        report.registers,
        report.spills,
        f"{report.shared / 1024:.1f}",
        f"{share:.0%}{bounded_by}",
        f"{report.wide_loads} of {report.loads}",
        report.tensor_core,
        instructions_per_element(row, arch, report, largest),
        atomics,
    )


def _markdown_row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"

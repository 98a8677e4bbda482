"""What the compiler makes of every kernel and tile of the table, without a GPU.

    python -m bench.compiled_code [--arch sm90 ...] [--task forward ...] [--first] [--json FILE]
    python -m bench.compiled_code [--record] [--markdown docs/compiled_code.md]

Compiles ahead of time and reads the machine code: thread registers, spills, shared memory, width of the loads,
tensor-core instructions, barriers, atomics. These are facts about the code and no measure of speed. The limits are
those of `bench.compiled_code_limits`; --record makes what was read the limits of the installed Triton version. To use
another version than the installed one:

    pip install --no-deps --target .venv/triton-3.6 triton==3.6.0
    PYTHONPATH=.venv/triton-3.6 python -m bench.compiled_code
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.compiled_code_limits import CHECKED_ARCHS, SHARED_LIMITS, known_spills, limits_for, write_numbers
from bench.compiled_code_table import ARCH_NAMES, HEADER, LEGEND, occupancy, page, table_line
from bench.machine_code import CodeReport, read_amdgcn, read_cubin
from triton_dcn import tile_table
from triton_dcn.kernels import binning, columns, forward, grad_input, grad_sample, sampling
from triton_dcn.tile_table import TileRow

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {
    "sampling": sampling.sampling_kernel,
    "bins": binning.bin_kernel,
    "columns": columns.columns_kernel,
    "forward_direct": forward.forward_direct_kernel,
    "forward_prefetch": forward.forward_prefetch_kernel,
    "grad_sample": grad_sample.grad_sample_kernel,
    "grad_sample_fused": grad_sample.grad_sample_fused_kernel,
    "t_columns": grad_input.t_columns_kernel,
    "g_form": grad_input.g_form_kernel,
}
PRODUCT_KERNELS = ("forward_direct", "forward_prefetch", "grad_sample_fused", "t_columns", "g_form")
GATHER_KERNELS = ("columns", "grad_sample", *PRODUCT_KERNELS)
INTEGER_POINTERS = ("cell_ptr", "start_ptr", "entry_ptr", "key_ptr", "count_ptr")
FLOAT_POINTERS = ("ly_ptr", "lx_ptr", "scale_ptr")
LARGEST_CHANNELS = 512
"""Channels at which a row for any size is compiled."""


def constants(row: TileRow, arch: str, offset_groups: int = 1) -> dict[str, int | bool | str]:
    """Return every constexpr that a kernel may ask for, at the largest size the row serves.

    A row whose blocks span offset groups is compiled with as many as there can be: a quarter of a block has one.
    """
    size = min(row.channels, LARGEST_CHANNELS)
    channels = size
    if row.spans_groups:
        channels = row.tile.block_c // 4
        offset_groups = size // channels
    arithmetic = "float32" if row.arithmetic == "any" else row.arithmetic
    tile = row.tile
    return {
        "CHANNELS": channels * offset_groups,
        "OUT_CHANNELS": tile.block_o if row.task == "grad_sample_fused" else size,
        "GROUPS": 1,
        "OFFSET_GROUPS": offset_groups,
        "TAPS": 9,
        "HAS_BIAS": True,
        "RELU": False,
        "HAS_MASK": True,
        "MASK_LOGITS": False,
        "WANT_OFFSET": True,
        "WANT_MASK": True,
        "WRITE_COLUMNS": False,
        "PART": False,
        "ADD": False,
        "STRIP": tile_table.STRIP,
        "TILE_H": tile_table.G_TILE_H if row.task == "g_form" else tile_table.T_TILE_H,
        "TILE_W": tile_table.TILE_W,
        "PASS": "fill",
        "PRECISION": tile_table.precision(arch, arithmetic),
        "BLOCK": tile.block_p,
        "BLOCK_P": tile.block_p,
        "BLOCK_S": tile.block_p,
        "BLOCK_O": tile.block_o,
        "BLOCK_C": tile.block_c,
        "WARPS": tile.num_warps if row.task == "forward" or arch in tile_table.REGISTER_ORDER else 0,
        "BLEND_IN_PAIRS": row.arithmetic == "half" and not arch.startswith("gfx"),
        "LANES": tile.lanes,
    }


def compile_row(
    row: TileRow, arch: str, element: str | None = None, offset_groups: int = 1, **constexprs: int | bool | str
) -> CodeReport:
    """Compile the kernel of `row` for `arch`.

    Args:
        row: of `tile_table.TABLE`, or one to try.
        arch: of `TARGETS`.
        element: "bf16", "fp16" or "fp32"; by default what the row's arithmetic says.
        offset_groups: D.
        constexprs: in place of those of `constants`.
    """
    kernel = KERNELS[row.kernel]
    element = element or ("bf16" if row.arithmetic == "half" else "fp32")
    values = constants(row, arch, offset_groups) | constexprs
    signature: dict[str, str] = {}
    known: dict[str, int | bool | str] = {}
    attributes: dict[tuple[int], list[list[str | int]]] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in values:
            signature[name] = "constexpr"
            known[name] = values[name]
        elif name.endswith("_ptr"):
            signature[name] = "*" + _pointer_element(row, name, element)
            attributes[(index,)] = [["tt.divisibility", 16]]  # torch allocates at multiples of 16 bytes and more
        else:
            signature[name] = "i32"

    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes)
    options = {**row.tile.options, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGETS[arch], options=options)
    if arch.startswith("gfx"):
        return read_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)
    return read_cubin(compiled.asm["cubin"], compiled.metadata.shared)


def _pointer_element(row: TileRow, name: str, element: str) -> str:
    """Return the element type of a pointer argument; `element` is that of the tensors."""
    reads_words = sampling.PAIRS and element == "bf16" and row.kernel in tile_table.WORD_KERNELS
    if name in INTEGER_POINTERS or (name == "input_ptr" and reads_words):
        return "i32"
    return "fp32" if name in FLOAT_POINTERS else element


def check(row: TileRow, arch: str, report: CodeReport) -> list[str]:
    """Return what `report` violates: one line each, empty if all is well.

    No spills but the known ones. At most the recorded registers, shared memory, narrow loads and barriers; an
    additional barrier in a loop is the sign of a tile that changes its layout and comes back. 128-bit loads in every
    gather, none of which bypass the registers; matrix instructions in every product. No float atomics anywhere: this
    makes the results reproducible.
    """
    limits = limits_for(row, arch, triton.__version__)
    shared = min(limits.shared, SHARED_LIMITS[arch])
    spills = known_spills(row, arch, triton.__version__)
    rules = {
        f"{report.spills} spills, expected at most {spills}": report.spills <= spills,
        f"{report.registers} registers, expected at most {limits.registers}": report.registers <= limits.registers,
        f"{report.shared} bytes of shared memory, expected at most {shared}": report.shared <= shared,
        f"{report.narrow_loads} loads below 128 bits, expected at most {limits.narrow_loads}": (
            report.narrow_loads <= limits.narrow_loads
        ),
        "no 128-bit load": row.kernel not in GATHER_KERNELS or report.wide_loads > 0,
        f"{report.async_copies} copies that bypass the registers": report.async_copies == 0,
        "no matrix instruction": row.kernel not in PRODUCT_KERNELS or report.tensor_core > 0,
        f"{report.barriers} barriers, expected at most {limits.barriers}": report.barriers <= limits.barriers,
        f"{report.float_atomics} float atomics": report.float_atomics == 0,
    }
    return [message for message, holds in rules.items() if not holds]


def select_rows(archs: Sequence[str], tasks: Sequence[str], first_only: bool) -> Iterator[tuple[TileRow, str]]:
    """Yield rows of the table with the architecture to compile for, one architecture after the other.

    Args:
        archs: of `TARGETS`; empty for all.
        tasks: of the table; empty for all.
        first_only: one row per task and architecture, that of the fewest channels.
    """
    for arch in archs or TARGETS:
        seen: set[str] = set()
        for row in tile_table.TABLE:
            if arch not in row.archs or (tasks and row.task not in tasks):
                continue
            if first_only and row.task in seen:
                continue
            seen.add(row.task)
            yield row, arch


def main() -> int:
    """Print one line per architecture, kernel and tile; return 1 if a limit does not hold where it is asserted."""
    options = _parse()
    failed = False
    json_lines = []
    entries: list[tuple[TileRow, str, CodeReport]] = []
    print(LEGEND)
    for row, arch in select_rows(options.arch, options.task, options.first):
        if not entries or entries[-1][1] != arch:
            print(f"\n{ARCH_NAMES[arch]}\n{HEADER}")
        report = compile_row(row, arch)
        entries.append((row, arch, report))
        print(table_line(row, arch, report), flush=True)

        violations = [] if options.record else check(row, arch, report)
        asserted = arch in CHECKED_ARCHS
        failed |= asserted and bool(violations)
        for message in violations:
            print(f"    {'FAIL' if asserted else 'note'}: {message}", flush=True)

        share, _ = occupancy(arch, row.tile.num_warps, report.registers, report.shared)
        line = {"row": asdict(row), "arch": arch, "report": asdict(report), "occupancy": share, "wrong": violations}
        json_lines.append(json.dumps(line))

    if options.json:
        options.json.write_text("\n".join(json_lines) + "\n")
    if options.markdown:
        options.markdown.write_text(page(entries, triton.__version__, LARGEST_CHANNELS))
    if options.record:
        write_numbers(entries, triton.__version__)
    return int(failed)


def _parse() -> argparse.Namespace:
    tasks = sorted({row.task for row in tile_table.TABLE})
    parser = argparse.ArgumentParser(prog="python -m bench.compiled_code", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="*", default=[], choices=TARGETS, help="default: all")
    parser.add_argument("--task", nargs="*", default=[], choices=tasks, help="default: all")
    parser.add_argument("--first", action="store_true", help="only the first row of each task and architecture")
    parser.add_argument("--json", type=Path, help="write the reports here, one object per line")
    parser.add_argument("--markdown", type=Path, help="write the whole table here: docs/compiled_code.md")
    parser.add_argument("--record", action="store_true", help="make the numbers the limits of this Triton version")
    options = parser.parse_args()
    if (options.markdown or options.record) and (options.arch or options.task or options.first):
        parser.error("--markdown, --record: expected the whole table, got --arch, --task or --first")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET: expected unset, got 1; the interpreter compiles nothing")
    return options


if __name__ == "__main__":
    sys.exit(main())

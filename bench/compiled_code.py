"""What the compiler makes of every kernel and tile of the table, without a GPU.

    python -m bench.compiled_code [--arch sm90 ...] [--stage forward ...] [--first] [--json FILE] [--markdown FILE]

Compiles ahead of time and reads the machine code: thread registers, spills, shared memory, width of the loads,
tensor-core instructions, atomics. These are facts about the code and no measure of speed. The numbers to hold are in
the tile table. On another Triton than the installed one:

    pip install --no-deps --target .venv/triton-3.6 triton==3.6.0
    PYTHONPATH=.venv/triton-3.6 python -m bench.compiled_code
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.compiled_code_limits import CHECKED_ARCHS, SHARED_LIMIT, limits_for, write_numbers
from bench.compiled_code_table import HEADER, LEGEND, NAMES, Report, occupancy, page, table_line
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
    "forward_prefetch": forward.forward_prefetch_kernel,
    "forward_transposed": forward.forward_transposed_kernel,
    "grad_sample": grad_sample.grad_sample_kernel,
    "grad_sample_fused": grad_sample.grad_sample_fused_kernel,
    "t_columns": grad_input.t_columns_kernel,
    "g_form": grad_input.g_form_kernel,
}
GATHERS = (
    "columns",
    "forward_prefetch",
    "forward_transposed",
    "grad_sample",
    "grad_sample_fused",
    "t_columns",
    "g_form",
)
PRODUCTS = ("forward_prefetch", "forward_transposed", "grad_sample_fused", "t_columns", "g_form")
INTEGER_POINTERS = ("cell_ptr", "start_ptr", "entry_ptr", "key_ptr", "count_ptr")
FLOAT_POINTERS = ("ly_ptr", "lx_ptr", "scale_ptr")
LARGEST_CLASS = 512  # channels at which a row without a bound is compiled


def constants(row: TileRow, arch: str, offset_groups: int = 1) -> dict[str, int | bool | str]:
    """Return every constexpr that a kernel may ask for, at the largest size the row serves."""
    size = min(row.channels, LARGEST_CLASS)
    tile = row.tile
    return {
        "CHANNELS": size * offset_groups, "OUT_CHANNELS": size, "GROUPS": 1, "OFFSET_GROUPS": offset_groups, "TAPS": 9,
        "HAS_BIAS": True, "RELU": False, "HAS_MASK": True, "MASK_LOGITS": False, "WANT_OFFSET": True, "WANT_MASK": True,
        "PART": False, "ADD": False,
        "STRIP": tile_table.STRIP, "TILE_H": tile_table.TILE_H, "TILE_W": tile_table.TILE_W, "PASS": "fill",
        "PRECISION": tile_table.precision(arch, "float32" if row.arithmetic == "any" else row.arithmetic),
        "BLOCK": tile.block_p, "BLOCK_P": tile.block_p, "BLOCK_S": tile.block_p, "BLOCK_O": tile.block_o,
        "BLOCK_C": tile.block_c,
    }  # fmt: skip


def compile_row(row: TileRow, arch: str, element: str | None = None, offset_groups: int = 1, **constexprs) -> Report:
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
    signature, known, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in values:
            signature[name], known[name] = "constexpr", values[name]
        elif name.endswith("_ptr"):
            words = (
                sampling.PAIRS and name == "input_ptr" and element == "bf16" and row.kernel in tile_table.WORD_KERNELS
            )
            kind = "i32" if name in INTEGER_POINTERS or words else "fp32" if name in FLOAT_POINTERS else element
            signature[name] = f"*{kind}"
            attributes[(index,)] = [["tt.divisibility", 16]]  # torch allocates at multiples of 16 bytes and more
        else:
            signature[name] = "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes)
    options = {**row.tile.options, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGETS[arch], options=options)
    if arch.startswith("gfx"):
        return _read_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)
    return _read_cubin(compiled.asm["cubin"], compiled.metadata.shared)


def _read_cubin(cubin: bytes, shared: int) -> Report:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run([tools / tool, option, path], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    atomics = re.findall(r"\b(?:RED|REDG|ATOM|ATOMG)\.[A-Z0-9_.]+", sass)
    floats = sum(bool(re.search(r"\.F(16|32|64)|\.BF16|FTZ", name)) for name in atomics)
    return Report(
        registers=int(re.search(r"REG:(\d+)", usage)[1]), spills=count(r"\bSTL\b|\bLDL\b"), shared=shared,
        wide_loads=count(r"\bLDG\.E\.128"), loads=count(r"\bLDG\b"), async_copies=count(r"\bLDGSTS\b"),
        tensor_core=count(r"\b(?:HGMMA|HMMA|UTCHMMA|UTCQMMA|UTC[A-Z]*MMA)\b"),
        float_atomics=floats, integer_atomics=len(atomics) - floats, barriers=count(r"\bBAR\.SYNC"),
        instructions=count(r"(?m)^\s+/\*[0-9a-f]{4,}\*/"), loop=_longest_loop(sass),
    )  # fmt: skip


def _longest_loop(sass: str) -> int:
    """Return the number of instructions between the most distant backward branch and its label."""
    labels, position, longest = {}, 0, 0
    for line in map(str.strip, sass.splitlines()):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = position
        elif line.startswith("/*"):
            position += 1
            target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)
            if target and target[1] in labels:
                longest = max(longest, position - labels[target[1]])
    return longest


def _read_amdgcn(text: str, shared: int) -> Report:
    def count(pattern: str) -> int:
        return len(re.findall(pattern, text))

    def metadata(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

    atomics = re.findall(r"(?:global|buffer)_atomic_\w+", text)
    floats = sum("f32" in name or "f16" in name for name in atomics)
    return Report(
        registers=metadata("vgpr_count"), spills=metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
        shared=shared, wide_loads=count(r"(?:global|buffer)_load_dwordx4"), loads=count(r"(?:global|buffer)_load_"),
        async_copies=count(r"(?:global|buffer)_load_lds"), tensor_core=count(r"v_mfma"), float_atomics=floats,
        integer_atomics=len(atomics) - floats, barriers=count(r"s_barrier"), instructions=count(r"(?m)^\t[a-z]"),
        loop=0,
    )  # fmt: skip


def check(row: TileRow, arch: str, report: Report) -> list[str]:
    """Return what `report` violates: one line each, empty if all is well.

    No spills; registers and shared memory of the table; 128-bit loads in every gather, none of them past the registers;
    matrix instructions in every product; no tile of corners that goes to the layout of a product and back; no float
    atomics anywhere, which is what makes the results reproducible.
    """
    limits = limits_for(row, arch, triton.__version__)
    registers = limits.registers
    barriers = limits.barriers
    shared = min(limits.shared, SHARED_LIMIT)
    rules = {
        f"{report.spills} spills": report.spills == 0,
        f"{report.registers} registers, expected at most {registers}": report.registers <= registers,
        f"{report.shared} bytes of shared memory, expected at most {shared}": report.shared <= shared,
        "no 128-bit load": row.kernel not in GATHERS or report.wide_loads > 0,
        f"{report.async_copies} copies past the registers": report.async_copies == 0,
        "no matrix instruction": row.kernel not in PRODUCTS or report.tensor_core > 0,
        f"{report.barriers} barriers, expected at most {barriers}": report.barriers <= barriers,
        f"{report.float_atomics} float atomics": report.float_atomics == 0,
    }
    return [message for message, holds in rules.items() if not holds]


def rows(archs: Sequence[str], stages: Sequence[str], first_only: bool) -> Iterator[tuple[TileRow, str]]:
    """Yield the targets that are asked for, each with its rows of the table; nothing asked for is everything.

    Args:
        archs, stages: what to compile.
        first_only: one row per stage and target, that of the smallest size class.
    """
    seen = set()
    for arch in archs or TARGETS:
        for row in tile_table.TABLE:
            wanted = arch in row.archs and row.stage in (stages or [row.stage])
            if wanted and not (first_only and (row.stage, arch) in seen):
                seen.add((row.stage, arch))
                yield row, arch


def main() -> int:
    """Print one line per target, kernel and tile; return 1 if a threshold does not hold where it is asserted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="*", default=[], choices=TARGETS)
    parser.add_argument("--stage", nargs="*", default=[], choices=sorted({row.stage for row in tile_table.TABLE}))
    parser.add_argument("--first", action="store_true", help="only the first row of each stage and target")
    parser.add_argument("--json", type=Path, help="file for the reports, one object per line")
    parser.add_argument("--markdown", type=Path, help="file for the whole table: docs/compiled_code.md")
    parser.add_argument("--record", action="store_true", help="make these numbers the limits for this Triton version")
    options = parser.parse_args()
    if (options.markdown or options.record) and (options.arch or options.stage or options.first):
        parser.error("--markdown and --record are for the whole table: leave out --arch, --stage and --first")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    failed, lines, entries = False, [], []
    print(LEGEND)
    for row, arch in rows(options.arch, options.stage, options.first):
        if not entries or entries[-1][1] != arch:
            print(f"\n{NAMES[arch]}\n{HEADER}")
        report = compile_row(row, arch)
        entries.append((row, arch, report))
        wrong = [] if options.record else check(row, arch, report)
        failed |= bool(wrong) and arch in CHECKED_ARCHS
        print(table_line(row, arch, report), flush=True)
        for message in wrong:
            print(f"    {'FAIL' if arch in CHECKED_ARCHS else 'note'}: {message}", flush=True)
        share, _ = occupancy(arch, row.tile.num_warps, report.registers, report.shared)
        found = {"row": asdict(row), "arch": arch, "report": asdict(report), "occupancy": share, "wrong": wrong}
        lines.append(json.dumps(found))
    if options.json:
        options.json.write_text("\n".join(lines) + "\n")
    if options.markdown:
        options.markdown.write_text(page(entries, triton.__version__, LARGEST_CLASS))
    if options.record:
        write_numbers(entries, triton.__version__)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

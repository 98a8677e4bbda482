"""The compiled code of the kernels for GPUs that are not here: no spills, wide loads, tensor cores, no float atomics.

A reduced set; `python -m bench.compiled_code` compiles the whole table.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compiled_code_limits import CHECKED_ARCHS, SHARED_LIMIT, read_numbers, row_key
from triton_dcn import tile_table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arch", CHECKED_ARCHS)
def test_code_for(arch, tmp_path):
    file = tmp_path / "report.jsonl"
    arguments = ["-m", "bench.compiled_code", "--arch", arch, "--first", "--json", str(file)]

    run = compile_in(*arguments, cache=tmp_path / "cache")

    assert run.returncode == 0, run.stdout + run.stderr
    kernels = {json.loads(line)["row"]["kernel"] for line in file.read_text().splitlines()}
    assert kernels >= {"sampling", "bins", "columns", "grad_sample", "grad_sample_fused", "t_columns", "g_form"}
    assert kernels & {"forward_direct", "forward_prefetch"}


def compile_in(*arguments: str, cache: Path, timeout: float = 280) -> subprocess.CompletedProcess:
    """Run Python in a process of its own: where the interpreter is on, nothing can be compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def test_sample_gradients_take_fewer_output_channels_than_a_block(tmp_path):
    """A block that is not full, and one offset group after another, neither spill nor take more shared memory."""
    code = """if True:
        import triton
        from bench.compiled_code import compile_row
        from bench.compiled_code_limits import CHECKED_ARCHS, limits_for
        from triton_dcn import tile_table
        for row in tile_table.TABLE:
            for arch in CHECKED_ARCHS:
                if row.task == "grad_sample_fused" and arch in row.archs:
                    report = compile_row(row, arch, OUT_CHANNELS=row.tile.block_o - 8, OFFSET_GROUPS=2)
                    limits = limits_for(row, arch, triton.__version__)
                    print(report.spills <= 8, report.shared <= limits.shared)
    """
    run = compile_in("-c", code, cache=tmp_path)
    assert set(run.stdout.splitlines()) == {"True True"}, run.stdout + run.stderr


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_g_form_of_narrow_offset_groups(arch, tmp_path):
    """The launcher makes blocks as narrow as an offset group, and these are products for tensor cores, too."""
    code = f"""if True:
        from bench.compiled_code import compile_row
        from triton_dcn import tile_table
        for arithmetic in ("half", "tf32", "float32"):
            row = tile_table.match_row("g_form", {arch!r}, arithmetic, tile_table.ANY, tile_table.ANY)
            for channels in (4, 8, 15):
                block = max(8, 1 << (channels - 1).bit_length())
                report = compile_row(row, {arch!r}, CHANNELS=4 * channels, OFFSET_GROUPS=4, BLOCK_C=block)
                print(report.spills == 0, report.tensor_core > 0, report.float_atomics == 0)
    """
    run = compile_in("-c", code, cache=tmp_path)
    assert set(run.stdout.splitlines()) == {"True True True"}, run.stdout + run.stderr


def test_no_kernel_is_compiled_anew_for_a_size(tmp_path):
    """Only what is a constant of the kernel, and the alignment of pointers, makes another variant."""
    code = """if True:
        from bench.compiled_code import KERNELS
        for kernel in KERNELS.values():
            for param in kernel.params:
                if not (param.is_constexpr or param.do_not_specialize or param.name.endswith("_ptr")):
                    print(kernel.__name__, param.name)
        print("done")
    """
    run = compile_in("-c", code, cache=tmp_path, timeout=60)
    assert run.stdout == "done\n", run.stdout + run.stderr


def test_every_task_has_a_tile_everywhere():
    """Whatever the sizes, the way by columns exists on every architecture and for every arithmetic."""
    for arch in (*tile_table.GPUS, *tile_table.HOST):
        for arithmetic in ("half", "tf32", "float32"):
            for task in ("sampling", "bins", "columns", "grad_sample", "t_columns", "g_form"):
                assert tile_table.match_row(task, arch, arithmetic, 999, 1001) is not None


@pytest.mark.parametrize("row", tile_table.TABLE, ids=lambda row: f"{row.kernel}-{row.archs[0]}-{row.arithmetic}")
def test_row_is_complete(row):
    """After a change of the table: `python -m bench.compiled_code --record`."""
    assert len(tile_table.TABLE) < 80
    for arch in set(row.archs) - set(tile_table.HOST):
        limits_by_version = read_numbers()[row_key(row, arch)]
        assert all(limits.shared <= SHARED_LIMIT for limits in limits_by_version.values())

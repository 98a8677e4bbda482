"""The compiled code of the kernels for GPUs that are not here: no spills, wide loads, tensor cores, no float atomics.

A reduced set; `python -m bench.compiled_code` compiles the whole table.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compiled_code_limits import CHECKED_ARCHS, SHARED_LIMITS, read_numbers, row_key
from triton_dcn import tile_table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Variables of a process that compiles: where the interpreter is on, nothing can be compiled."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return variables | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}


def test_code_of_the_first_rows(environment, tmp_path):
    file = tmp_path / "report.jsonl"
    command = [sys.executable, "-m", "bench.compiled_code", "--arch", *CHECKED_ARCHS, "--first", "--json", file]

    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)

    assert run.returncode == 0, run.stdout + run.stderr
    kernels = {arch: set() for arch in CHECKED_ARCHS}
    for line in file.read_text().splitlines():
        compiled = json.loads(line)
        kernels[compiled["arch"]].add(compiled["row"]["kernel"])
    for arch, names in kernels.items():
        every_task = {"sampling", "bins", "columns", "grad_sample", "grad_sample_fused", "t_columns", "g_form"}
        assert names >= every_task, arch
        assert names & {"forward_direct", "forward_prefetch"}, arch


VARIANTS = """if True:
    import json
    from dataclasses import asdict

    import triton
    from bench.compiled_code import KERNELS, compile_row
    from bench.compiled_code_limits import CHECKED_ARCHS, limits_for
    from triton_dcn import tile_table

    specialized = [
        (kernel.__name__, param.name)
        for kernel in KERNELS.values()
        for param in kernel.params
        if not (param.is_constexpr or param.do_not_specialize or param.name.endswith("_ptr"))
    ]
    sample_gradients = []
    for row in tile_table.TABLE:
        for arch in CHECKED_ARCHS:
            if row.task == "grad_sample_fused" and arch in row.archs:
                report = compile_row(row, arch, offset_groups=2, OUT_CHANNELS=row.tile.block_o - 8)
                limit = limits_for(row, arch, triton.__version__).shared
                sample_gradients.append((f"{row.tile} {arch}", asdict(report), limit))
    narrow_groups = []
    for arch in ("sm80", "sm90"):
        for arithmetic in ("half", "tf32", "float32"):
            row = tile_table.match_row("g_form", arch, arithmetic, tile_table.ANY, tile_table.ANY)
            for channels in (4, 8, 15):
                block = max(8, 1 << (channels - 1).bit_length())
                report = compile_row(row, arch, CHANNELS=4 * channels, OFFSET_GROUPS=4, BLOCK_C=block)
                narrow_groups.append((f"{arch} {arithmetic} {channels}", asdict(report)))
    channel_groups = []
    for arch in CHECKED_ARCHS:
        for task in ("columns", "grad_sample", "g_form"):
            row = tile_table.match_row(task, arch, "half", 256, 256)
            for channels, groups in ((256, 4), (512, 32)):  # of ResNeXt: joined, and as they are
                report = compile_row(row, arch, CHANNELS=channels, GROUPS=groups, WRITE_COLUMNS=True)
                channel_groups.append((f"{task} {arch} {channels} {groups}", asdict(report)))
    print(json.dumps([specialized, sample_gradients, narrow_groups, channel_groups]))
"""


def test_variants_of_the_rows(environment):
    """All that is compiled beside the table in one process, because its imports take longer than a kernel.

    No kernel is compiled anew for a size: only what is a constant of it, and the alignment of pointers, makes another
    variant. Sample gradients in a block of output channels that is not full, and one offset group after another,
    neither spill nor take more shared memory. For the gradient of the input the launcher makes blocks as narrow as an
    offset group, and these are products for tensor cores, too. Channel groups do not spill.
    """
    command = [sys.executable, "-c", VARIANTS]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr
    specialized, sample_gradients, narrow_groups, channel_groups = json.loads(run.stdout.splitlines()[-1])

    assert specialized == []
    assert sample_gradients
    for name, report, shared in sample_gradients:
        assert report["spills"] <= 8, name
        assert report["shared"] <= shared, name
    assert len(narrow_groups) == 18
    assert len(channel_groups) == 18
    for name, report in channel_groups:
        assert report["spills"] == 0, name
        assert report["wide_loads"] > 0, name
    for name, report in narrow_groups:
        assert report["spills"] == 0, name
        assert report["tensor_core"] > 0, name
        assert report["float_atomics"] == 0, name


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
        assert all(limits.shared <= SHARED_LIMITS[arch] for limits in limits_by_version.values())

"""Time the gradients of input and weight by bins and by float atomics: `python -m bench.atomics --cases r50`.

Every peer scatters with atomics: column gradients from a library product, then four float32 additions per element to a
buffer that is zeroed before and converted to the dtype of the input afterwards. The baseline here is atomics at their
best, with channels innermost and, where the GPU has such an instruction, four floats each. Also prints the speed of the
machine's atomics and of its L2 cache.

`--dry-run` makes the same calls on a CPU, in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.arguments import positive
from bench.cases import Case, Inputs, make_inputs, select_cases
from bench.ceilings import measure_ceilings
from bench.device import DTYPES, gpu_or_dry_run
from bench.measure import (
    TOLERANCE,
    comparison_inputs,
    largest_error,
    record_failure,
    reference_results,
    relative_errors,
    time_interleaved,
)
from bench.report import markdown
from bench.rows import ResultRow, environment_columns, timing_row, write_csv
from bench.triton_calls import run_backward, select_gradients
from bench.tuning_candidates import Candidate
from triton_dcn import launchers, tile_table, triton_backend
from triton_dcn.kernels.jit import kernel
from triton_dcn.kernels.sampling import column_offset, corner_rows, corner_weights
from triton_dcn.matmul import accumulate
from triton_dcn.offset_mask import OffsetMask
from triton_dcn.tf32 import allow_tf32
from triton_dcn.workspace import column_chunks

GRADIENTS_OF_MODE = {
    "grad_input": ("grad_input",),
    "grad_input, grad_weight": ("grad_input", "grad_weight"),
}
"""Mode -> gradients. For that of the weight, T-columns need one more product, and atomics need the columns."""

ScatterCall = Callable[[], list[Tensor]]


@kernel
def scatter_kernel(
    grad_column_ptr,
    cell_ptr,
    ly_ptr,
    lx_ptr,
    scale_ptr,
    grad_input_ptr,
    positions,
    first_position,
    rows,
    width,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    OFFSET_GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add the column gradients of positions [first_position, first_position + rows) to the pixels they come from.

    Grid: (ceil(rows / BLOCK_P) * D*K,); a program owns BLOCK_P positions of one plane (offset group, tap).
    Reads: grad_column (G, rows, K, C/G), the sample arrays of `triton_dcn.kernels.sampling`.
    Writes: grad_input (B, H, W, C), float32, by atomics.
    """
    PER_OFFSET: tl.constexpr = CHANNELS // OFFSET_GROUPS
    plane = tl.program_id(0) % (OFFSET_GROUPS * TAPS)
    row = tl.program_id(0) // (OFFSET_GROUPS * TAPS) * BLOCK_P + tl.arange(0, BLOCK_P)
    live_row = row < rows
    sample = plane * positions + first_position + tl.where(live_row, row, 0)
    cell = tl.load(cell_ptr + sample)
    ly = tl.load(ly_ptr + sample)
    lx = tl.load(lx_ptr + sample)
    scale = tl.load(scale_ptr + sample)
    pixel_offsets = corner_rows(cell, width, CHANNELS)
    weights = corner_weights(cell, ly, lx, scale)
    for start in tl.range(0, PER_OFFSET, BLOCK_C, num_stages=1):
        c_in_group = start + tl.arange(0, BLOCK_C)[None, :]
        c = plane // TAPS * PER_OFFSET + c_in_group
        live = live_row[:, None] & (c_in_group < PER_OFFSET)
        element = column_offset(row[:, None], plane % TAPS, c, rows, CHANNELS, GROUPS, TAPS)
        grad = tl.load(grad_column_ptr + element, mask=live, other=0.0).to(tl.float32)  # (BLOCK_P, BLOCK_C)
        for corner in tl.static_range(4):
            corner_ptr = grad_input_ptr + pixel_offsets[corner][:, None] + c
            weight = weights[corner][:, None]
            tl.atomic_add(corner_ptr, weight * grad, mask=live & (weight != 0), sem="relaxed")


def gradients_by_atomics(inputs: Inputs, mode: str) -> list[Tensor]:
    """Return the gradient of the input (B, C, H, W), stored channels-last, and of the weight if the mode has it."""
    geom = inputs.geometry
    x, offset, mask, weight = (leaf.detach() for leaf in inputs.leaves)
    x_last = x.permute(0, 2, 3, 1).contiguous()
    w = weight.permute(0, 2, 3, 1).contiguous().flatten(1, 2)
    grad_output = inputs.grad_output.permute(0, 2, 3, 1).contiguous().view(-1, geom.out_channels)

    grad_input = torch.zeros(geom.batch, geom.height, geom.width, geom.in_channels, device=x.device)
    grad_weight = None
    if "grad_weight" in GRADIENTS_OF_MODE[mode]:
        out_per_group = geom.out_channels // geom.groups
        grad_weight = torch.zeros(geom.groups, out_per_group, w[0].numel(), device=x.device)

    samples = launchers.sample(geom, OffsetMask(offset, mask))
    tile = tile_table.find_tile("columns", geom, x)
    for chunk in column_chunks(geom, x):
        rows = chunk.stop - chunk.start
        grad_columns = triton_backend.column_gradients(geom, grad_output[chunk], w)
        programs = triton.cdiv(rows, tile.block_p) * geom.offset_groups * geom.taps
        scatter_kernel[(programs,)](
            grad_columns,
            *samples,
            grad_input,
            geom.batch * geom.positions,
            chunk.start,
            rows,
            geom.width,
            CHANNELS=geom.in_channels,
            GROUPS=geom.groups,
            OFFSET_GROUPS=geom.offset_groups,
            TAPS=geom.taps,
            BLOCK_P=tile.block_p,
            BLOCK_C=tile.block_c,
            **tile.options,
        )
        if grad_weight is not None:
            columns = launchers.columns(geom, x_last, samples, chunk)
            grad_of_groups = triton_backend.by_group(geom, grad_output[chunk]).transpose(1, 2)
            grad_weight = accumulate(grad_weight, grad_of_groups, columns)

    results = [grad_input.to(x.dtype).permute(0, 3, 1, 2)]
    if grad_weight is not None:
        results.append(triton_backend.weight_from_columns(geom, grad_weight).to(x.dtype))
    return results


def scatter_methods(inputs: Inputs, mode: str) -> dict[str, ScatterCall]:
    """Return the functions to time, by name; each returns the gradients of the mode."""

    def by_bins(candidate: Candidate) -> ScatterCall:
        def call() -> list[Tensor]:
            with candidate.applied():
                return run_backward(inputs, GRADIENTS_OF_MODE[mode])

        return call

    return {
        "bins": by_bins(Candidate("bins", tile_table.TABLE)),
        "stable sort": by_bins(Candidate("stable sort", tile_table.TABLE, deterministic=True)),
        "atomics": lambda: gradients_by_atomics(inputs, mode),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure the machine, then every case; print the table, write the CSV, return 1 where something is left out."""
    options = parse(arguments)
    device = gpu_or_dry_run(options.dry_run)
    ceiling_sizes: dict[str, int] = {}
    if options.dry_run:
        options.cases = ["dry"]
        options.batch_size = None
        options.seconds = 0.0
        ceiling_sizes = {"nbytes": 1 << 16, "rows": 64}
    try:
        cases = select_cases(options.cases, options.batch_size)
    except ValueError as error:
        sys.exit(f"bench: {error}")

    environment = environment_columns(device)
    rows: list[ResultRow] = []
    failed: list[str] = []
    with record_failure("ceilings", failed):
        ceilings = measure_ceilings(device, failed, 2 * options.seconds, **ceiling_sizes)
        for name, (moved, timing) in ceilings.items():
            print(f"{name}: {moved / timing.p50 / 1e9:.3f} TB/s")
            rows.append(timing_row("machine", name, f"{moved} bytes", "float32", "", timing, environment))
    write_csv(options.csv, rows)
    for case, dtype in itertools.product(cases, options.dtypes):
        with record_failure(f"{case.name} {dtype}", failed):
            rows += _measure(case, dtype, device, options, environment, failed)
        write_csv(options.csv, rows)
    print("\n" + markdown(rows))
    return int(bool(failed))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.atomics", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["r50"], help="sets or names of bench.cases")
    parser.add_argument("--batch-size", "--batch", type=positive, help="instead of each case's own")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=list(DTYPES))
    parser.add_argument("--smooth", action="store_true", help="offsets that change little between neighbors")
    parser.add_argument("--seconds", type=float, default=0.5, help="for the rounds of a case and dtype")
    parser.add_argument("--csv", type=Path, help="write the measurements here")
    parser.add_argument("--dry-run", action="store_true", help="a tiny case on the CPU, kernels interpreted")
    return parser.parse_args(arguments)


def _measure(
    case: Case, dtype: str, device: torch.device, options: argparse.Namespace, environment: ResultRow, failed: list[str]
) -> list[ResultRow]:
    """Return the rows of one case: every method that agrees with the reference, in every mode."""
    one_image = comparison_inputs(case, DTYPES[dtype], device, 2.0)
    inputs = make_inputs(case, DTYPES[dtype], device, 2.0, channels_last=True, smooth=options.smooth)
    expected = reference_results(one_image)
    shape = case.shape
    if options.smooth:
        shape += " smooth"

    rows = []
    for mode in GRADIENTS_OF_MODE:
        with allow_tf32(dtype == "tf32"):
            methods = scatter_methods(inputs, mode)
            agreeing = _agreeing_methods(one_image, expected, dtype, mode, failed)
            functions = {name: methods[name] for name in agreeing}
            what = f"{case.name} {dtype} {mode}"
            timings = time_interleaved(functions, device, options.seconds, what, failed)
        for name, timing in timings.items():
            rows.append(timing_row(name, case.name, shape, dtype, mode, timing, environment))
    return rows


def _agreeing_methods(inputs: Inputs, expected: list[Tensor], dtype: str, mode: str, failed: list[str]) -> list[str]:
    """Return the methods whose gradients agree with the float64 reference; name the others, and add them to `failed`.

    Args:
        inputs: to compare on.
        expected: `reference_results` of these inputs.
        dtype: of `DTYPES`.
        mode: of `GRADIENTS_OF_MODE`.
        failed: receives the methods that are left out.
    """
    expected_grads = select_gradients(expected, GRADIENTS_OF_MODE[mode])
    agreeing = []
    for name, call in scatter_methods(inputs, mode).items():
        what = f"{inputs.case.name} {dtype} {mode}: {name}"
        with record_failure(what, failed):
            error = largest_error(relative_errors(call(), expected_grads))
            if error < TOLERANCE[dtype]:
                agreeing.append(name)
            else:
                print(f"{what} disagrees by {error:.1e} and is not timed", file=sys.stderr)
                failed.append(what)
    return agreeing


if __name__ == "__main__":
    sys.exit(main())

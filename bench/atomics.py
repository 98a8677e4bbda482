"""The gradients of input and weight by bins against the same by float atomics: `python -m bench.atomics --cases r50`.

Atomics are how every peer scatters: column gradients from a library product, then four float32 additions per element to
a buffer that was zeroed before and is cast after. Measured here at its best, with channels innermost and four floats an
instruction where the GPU has one, so that the binning has something to beat. Also prints what the machine's atomics and
its L2 cache can do. `--dry-run` makes the same calls on a CPU, in Triton's interpreter (TRITON_INTERPRET=1).
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

from bench.cases import Case, Inputs, make_inputs, select
from bench.ceilings import measure_ceilings
from bench.choices import Choice
from bench.deform_conv import DTYPES, allow_tf32, environment, gpu_or_dry_run, timing_row
from bench.measure import TOLERANCE, check_inputs, exact, interleave, relative_errors, surviving, worst
from bench.report import markdown, write_csv
from triton_dcn import launchers, tile_table, triton_backend
from triton_dcn.kernels.jit import kernel
from triton_dcn.kernels.sampling import column_offset, corner_rows, corner_weights
from triton_dcn.matmul import accumulate

MODES = {"grad_input": (True, False, False, False), "grad_input, grad_weight": (True, False, False, True)}
"""What is computed: T-columns give the gradient of the weight nearly for free, atomics need columns for it."""


@kernel
def scatter_kernel(
    grad_column_ptr,
    cell_ptr,
    ly_ptr,
    lx_ptr,
    scale_ptr,
    grad_input_ptr,
    positions,
    first,
    rows,
    width,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    OFFSET_GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add the column gradients of positions [first, first + rows) to the pixels that they were read from.

    Grid: (ceil(rows / BLOCK_P) * D*K,); a program owns BLOCK_P positions of one (offset group, tap).
    Reads: grad_column (G, rows, K, C/G), the sample arrays of `triton_dcn.kernels.sampling`.
    Writes: grad_input (B, H, W, C), float32, by atomics.
    """
    PER_OFFSET: tl.constexpr = CHANNELS // OFFSET_GROUPS
    pid_s = tl.program_id(0) % (OFFSET_GROUPS * TAPS)
    row = tl.program_id(0) // (OFFSET_GROUPS * TAPS) * BLOCK_P + tl.arange(0, BLOCK_P)
    live = row < rows
    at = pid_s * positions + first + tl.where(live, row, 0)
    cell = tl.load(cell_ptr + at)
    places = corner_rows(cell, width, CHANNELS)
    weights = corner_weights(cell, tl.load(ly_ptr + at), tl.load(lx_ptr + at), tl.load(scale_ptr + at))
    for start in tl.range(0, PER_OFFSET, BLOCK_C, num_stages=1):
        local = start + tl.arange(0, BLOCK_C)
        c = (pid_s // TAPS * PER_OFFSET + local)[None, :]
        inside = live[:, None] & (local < PER_OFFSET)[None, :]
        from_ptr = grad_column_ptr + column_offset(row[:, None], pid_s % TAPS, c, rows, CHANNELS, GROUPS, TAPS)
        grad = tl.load(from_ptr, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_P, BLOCK_C)
        for corner in tl.static_range(4):
            to = grad_input_ptr + places[corner][:, None] + c
            weight = weights[corner][:, None]
            tl.atomic_add(to, weight * grad, mask=inside & (weight != 0), sem="relaxed")


def by_atomics(inputs: Inputs, mode: str) -> list[Tensor]:
    """Return the gradient of the input (B, C, H, W), stored channels-last, and what else `MODES` asks for."""
    geom = inputs.geometry
    x, offset, mask, weight = (leaf.detach() for leaf in inputs.leaves)
    x_last, w = x.permute(0, 2, 3, 1).contiguous(), weight.permute(0, 2, 3, 1).contiguous().flatten(1, 2)
    grad = inputs.grad.permute(0, 2, 3, 1).contiguous().view(-1, geom.out_channels)
    total = torch.zeros(geom.batch, geom.height, geom.width, geom.in_channels, device=x.device)
    grad_weight = None
    if MODES[mode][3]:
        grad_weight = torch.zeros(geom.groups, geom.out_channels // geom.groups, w[0].numel(), device=x.device)
    samples = launchers.sample(geom, offset, mask, False)
    tile = launchers.tile_for("columns", geom, x)
    for first, rows in triton_backend._chunks(geom, x):
        part = grad[first : first + rows]
        grad_columns = triton_backend._grad_columns(geom, part, w)
        scatter_kernel[(triton.cdiv(rows, tile.block_p) * geom.offset_groups * geom.taps,)](
            grad_columns, *samples, total, geom.batch * geom.positions, first, rows, geom.width,
            CHANNELS=geom.in_channels, GROUPS=geom.groups, OFFSET_GROUPS=geom.offset_groups, TAPS=geom.taps,
            BLOCK_P=tile.block_p, BLOCK_C=tile.block_c, **tile.options,
        )  # fmt: skip
        if grad_weight is not None:
            left = part.view(rows, geom.groups, -1).permute(1, 2, 0)
            accumulate(grad_weight, left, launchers.columns(geom, x_last, samples, first, rows))
    found = [total.to(x.dtype).permute(0, 3, 1, 2)]
    if grad_weight is not None:
        found.append(triton_backend._finish_weight(geom, grad_weight, False).to(x.dtype))
    return found


def ways(inputs: Inputs, mode: str) -> dict[str, Callable[[], list[Tensor]]]:
    """Return what is timed, by name; all give the gradients of `MODES`."""
    tensors = tuple(leaf.detach() for leaf in inputs.leaves)

    def by_bins(choice: Choice) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            with choice.in_force():
                found = triton_backend.backward(inputs.geometry, inputs.grad, *tensors, MODES[mode])
            return [grad for grad in found if grad is not None]

        return call

    return {
        "bins": by_bins(Choice("bins", tile_table.TABLE)),
        "stable sort": by_bins(Choice("stable sort", tile_table.TABLE, deterministic=True)),
        "atomics": lambda: by_atomics(inputs, mode),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure the machine, then every case; print the table, write the CSV, return 1 where a way was left out."""
    parser = argparse.ArgumentParser(prog="python -m bench.atomics", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["r50"], help="sets or names of bench.cases")
    parser.add_argument("--batch", type=int, help="instead of each case's own")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=list(DTYPES))
    parser.add_argument("--smooth", action="store_true", help="offsets that change little from place to place")
    parser.add_argument("--seconds", type=float, default=0.5, help="for the rounds of a case and dtype")
    parser.add_argument("--csv", type=Path, help="write the measurements here")
    parser.add_argument("--dry-run", action="store_true", help="a tiny case on the CPU, kernels interpreted")
    options = parser.parse_args(arguments)
    device = gpu_or_dry_run(options.dry_run)
    if options.dry_run:
        options.cases, options.batch, options.seconds = ["dry"], None, 0.0
    where, sizes = environment(device), {"nbytes": 1 << 16, "rows": 64} if options.dry_run else {}
    try:
        cases = select(options.cases, options.batch)
    except ValueError as error:
        sys.exit(f"bench: {error}")
    rows, failed = [], []
    with surviving("ceilings", failed):
        for name, (moved, timing) in measure_ceilings(device, failed, 2 * options.seconds, **sizes).items():
            print(f"{name}: {moved / timing.p50 / 1e9:.3f} TB/s")
            rows.append(timing_row("machine", name, f"{moved} bytes", "float32", "", timing, where))
    write_csv(options.csv, rows)
    for case, dtype in itertools.product(cases, options.dtypes):
        with surviving(f"{case.name} {dtype}", failed):
            rows += _measure(case, dtype, device, options, where, failed)
        write_csv(options.csv, rows)
    print("\n" + markdown(rows))
    return int(bool(failed))


def _measure(
    case: Case, dtype: str, device: torch.device, options: argparse.Namespace, where: dict[str, str], failed: list[str]
) -> list[dict]:
    """Rows of one case: every way that agrees, in every mode."""
    shape, rows = case.shape + (" smooth" if options.smooth else ""), []
    judged = check_inputs(case, DTYPES[dtype], device, 2.0)
    inputs = make_inputs(case, DTYPES[dtype], device, 2.0, channels_last=True, smooth=options.smooth)
    truth = exact(judged)[1:]
    for mode in MODES:
        with allow_tf32(dtype == "tf32"):
            every, agreeing = ways(inputs, mode), _agreeing(judged, truth, dtype, mode, failed)
            functions, what = {name: every[name] for name in agreeing}, f"{case.name} {dtype} {mode}"
            timings = interleave(functions, device, options.seconds, what, failed)
        rows += [timing_row(name, case.name, shape, dtype, mode, t, where) for name, t in timings.items()]
    return rows


def _agreeing(judged: Inputs, truth: list[Tensor], dtype: str, mode: str, failed: list[str]) -> list[str]:
    """The ways whose gradients agree with those of the float64 reference, `truth`; the others are told, and failed."""
    asked, agreed = list(itertools.compress(truth, MODES[mode])), []
    for name, call in ways(judged, mode).items():
        what = f"{judged.case.name} {dtype} {mode}: {name}"
        with surviving(what, failed):
            error = worst(relative_errors(call(), asked))
            if error < TOLERANCE[dtype]:
                agreed.append(name)
            else:
                print(f"{what} disagrees by {error:.1e} and is not timed", file=sys.stderr)
                failed.append(what)
    return agreed


if __name__ == "__main__":
    sys.exit(main())

"""Limits of the machine beside `bench.roofline`: reads from the L2 cache and float32 atomics.

Both are measured by kernels of a few lines, on any GPU that Triton compiles for. Atomics add rows of 64 and 256
floats at random places of a buffer: one that fits the L2 cache, and one that does not. They add four floats per
instruction where the hardware can. A buffer that does not start at a multiple of 16 bytes forces single floats. The
clock empties the cache before each call, so the first of READS passes, and the first access to a row, go to memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.measure import Timing, time_interleaved

L2_BYTES = 20 << 20
"""Bytes that fit the L2 cache of an A100, H100, H200 or B200."""
READS = 16
"""Reads of the whole buffer in one launch."""
BUFFER_BYTES = 256 << 20
"""Bytes that fit no L2 cache."""
ROWS = 1 << 20
"""Rows of 64 floats that atomics add; of 256 floats, a quarter of that."""


@triton.jit
def read_kernel(source_ptr, sum_ptr, READS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum a buffer of BLOCKS * BLOCK floats READS times, one block in each step.

    Grid: (BLOCKS,); a program starts at its own block, then reads blocks that other programs have read before.
    Reads: source (BLOCKS * BLOCK,), float32.
    Writes: sum (BLOCKS,), float32.
    """
    pid = tl.program_id(0)
    sums = tl.zeros((BLOCK,), tl.float32)
    for step in tl.range(0, READS, num_stages=1):
        block = (pid + step * 977) % BLOCKS  # far from the block before
        sums += tl.load(source_ptr + block * BLOCK + tl.arange(0, BLOCK))
    tl.store(sum_ptr + pid, tl.sum(sums, 0))


@triton.jit
def add_kernel(buffer_ptr, row_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Add 1 to every float of the rows that `row` lists, by float32 atomics.

    Grid: (rows / BLOCK,); a program owns BLOCK entries of the list.
    Reads: row (rows,), int32, in units of WIDTH floats.
    Writes: buffer, by atomics.
    """
    row = tl.load(row_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    float_ptrs = buffer_ptr + row.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.atomic_add(float_ptrs, tl.full((BLOCK, WIDTH), 1.0, tl.float32), sem="relaxed")


def read_l2(device: torch.device, nbytes: int) -> tuple[Callable[[], object], int]:
    """Return a function that reads `nbytes` READS times, and the bytes it reads."""
    block = 1024
    source = torch.randn(nbytes // 4 // block * block, device=device)
    blocks = len(source) // block
    sums = torch.empty(blocks, device=device)

    def call() -> object:
        return read_kernel[(blocks,)](source, sums, READS=READS, BLOCKS=blocks, BLOCK=block)

    return call, READS * source.nbytes


def add_rows(buffer: Tensor, width: int, rows: int) -> tuple[Callable[[], object], int]:
    """Return a function that adds to random rows of `buffer`, and the bytes it adds.

    Args:
        buffer: float32, a multiple of `width` long; the alignment of its start bounds the width of an atomic.
        width: floats of a row.
        rows: how many additions of a whole row, a multiple of 16.
    """
    generator = torch.Generator().manual_seed(0)
    row_numbers = torch.randint(len(buffer) // width, (rows,), dtype=torch.int32, generator=generator)
    row_numbers = row_numbers.to(buffer.device)

    def call() -> object:
        return add_kernel[(rows // 16,)](buffer, row_numbers, WIDTH=width, BLOCK=16)

    return call, rows * width * 4


def ceiling_calls(
    device: torch.device, nbytes: int = BUFFER_BYTES, rows: int = ROWS
) -> dict[str, tuple[Callable[[], object], int]]:
    """Return, by name, what to time and the bytes that it moves.

    Args:
        device: a GPU, or the CPU for a dry run in the interpreter.
        nbytes: of the buffer of the atomics.
        rows: that atomics add.
    """
    cached_bytes = min(L2_BYTES, nbytes)
    work = {"l2 read": read_l2(device, cached_bytes)}
    for location, buffer_bytes in (("L2", cached_bytes), ("memory", nbytes)):
        buffer = torch.zeros(buffer_bytes // 4 + 1, device=device)
        for width in (64, 256):
            prefix = f"atomics in {location}, {width * 4} B rows"
            row_count = rows * 64 // width
            work[f"{prefix}, aligned"] = add_rows(buffer[:-1], width, row_count)
            work[f"{prefix}, single floats"] = add_rows(buffer[1:], width, row_count)
    return work


def measure_ceilings(
    device: torch.device, failed: list[str], seconds: float = 1.0, nbytes: int = BUFFER_BYTES, rows: int = ROWS
) -> dict[str, tuple[int, Timing]]:
    """Return, by name, the bytes that a call moved and its times.

    Args:
        device, nbytes, rows: of `ceiling_calls`.
        failed: receives the names of what cannot be measured.
        seconds: for all rounds together.
    """
    work = ceiling_calls(device, nbytes, rows)
    functions = {name: call for name, (call, _) in work.items()}
    timings = time_interleaved(functions, device, seconds, "ceilings", failed)
    results = {}
    for name, timing in timings.items():
        _, moved = work[name]
        results[name] = (moved, timing)
    return results

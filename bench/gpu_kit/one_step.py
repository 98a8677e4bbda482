"""One forward and backward pass, for the hardware's counters: `python -m bench.gpu_kit.one_step r50-c3`.

It is run by `ncu --profile-from-start off`. The profiler sees the third of three steps at 16 images in bfloat16.
`--dry-run` makes one step in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import sys

import torch

from bench.cases import make_inputs, select_cases
from bench.device import gpu_or_dry_run
from bench.measure import timed_call
from bench.providers import load_providers

WARM_UP_STEPS = 2


def main(arguments: list[str] | None = None) -> int:
    """Run the steps of every case."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_kit.one_step", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", help="sets or names of bench.cases")
    parser.add_argument("--batch-size", "--batch", type=int, default=16, help="instead of each case's own")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, kernels interpreted")
    options = parser.parse_args(arguments)
    device = gpu_or_dry_run(options.dry_run)
    providers, _ = load_providers(["triton"], device)
    for case in select_cases(options.cases, options.batch_size):
        inputs = make_inputs(case, torch.bfloat16, device, 2.0, channels_last=True)
        step = timed_call(providers["triton"], inputs, "both")
        if options.dry_run:
            step()
            continue
        for _ in range(WARM_UP_STEPS):
            step()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

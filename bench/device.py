"""Where and with which arithmetic a benchmark runs: dtypes by name, GPU or dry run."""

from __future__ import annotations

import os
import sys

import torch

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def gpu_or_dry_run(dry_run: bool) -> torch.device:
    """Return the GPU, or the CPU for a dry run in the interpreter; exits with a message where that is not possible.

    Also sets the variable that cuBLAS needs for deterministic results: it is read only once, at the first product.
    """
    if dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("bench: --dry-run: expected TRITON_INTERPRET=1 in the environment")
    if not dry_run and not torch.cuda.is_available():
        sys.exit("bench: expected a CUDA GPU, got none; --dry-run tries the command without one")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device("cpu" if dry_run else "cuda")

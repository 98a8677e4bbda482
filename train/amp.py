"""Mixed precision: what `--amp` means, for training and evaluation."""

from __future__ import annotations

import torch

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Return the autocast of a key of `AMP_DTYPES`; with "none" it does nothing."""
    return torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "none")

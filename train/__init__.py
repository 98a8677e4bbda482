"""Training: data, loop and evaluation. `python train/main.py` runs it from the repository."""

from triton_dcn.extras import require_extra

require_extra("train")

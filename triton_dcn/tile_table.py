"""The tile table: which kernel form and which block sizes run where. Plain data.

Rows are looked up by stage, architecture, arithmetic and number of channels; the first that fits is taken. Where no row
of "forward" or "grad_sample_fused" fits, the general way is taken: columns and a library product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORKSPACE_BYTES = 128 << 20  # bound of one chunk of columns, column gradients or T
MAX_PIXELS = 1 << 27  # of the images in one slice: a pixel index shares 32 bits with four flags
MAX_SAMPLES = 1 << 29  # likewise: there are up to four entries of a sample in the bins
SAMPLE_BYTES = {"arrays": 16, "ranks": 32, "sort": 160}
"""Bytes for each sample: of its arrays alone, with its entries in the bins, and with what the stable sort takes
at its peak, by count: keys and their copy, the order in int64, and the sort's buffers for both."""
TILE_H, TILE_W = 8, 16  # tile of input pixels that owns a bin
STRIP = 16  # columns per strip of output positions
STRIP_MIN_WIDTH = 64  # narrower maps keep row-major order


@dataclass(frozen=True)
class Tile:
    """Block sizes of one launch: positions (samples of a bin), output channels, input channels, warps.

    `max_registers` bounds those of a thread, so that more blocks fit a multiprocessor, on NVIDIA; 0 leaves it to the
    compiler.
    """

    block_p: int
    block_o: int = 0
    block_c: int = 0
    num_warps: int = 4
    max_registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        """The compiler's, as they are given to a launch."""
        return {"num_warps": self.num_warps} | ({"maxnreg": self.max_registers} if self.max_registers else {})


@dataclass(frozen=True)
class TileRow:
    """One row of the table.

    Attributes:
        stage: what the tile is for; `kernel` says by which kernel.
        archs: "sm80", "sm90", "sm100", "gfx942" (by family: 12.x is served as sm80) or "interpreter".
        arithmetic: "half", "tf32", "float32" or "any".
        channels: largest size class: input channels of an offset group; output channels for "t_columns".
    """

    stage: str
    kernel: str
    archs: tuple[str, ...]
    arithmetic: str
    channels: int
    tile: Tile


ANY = 1 << 30
WORD_KERNELS = ("forward_transposed", "columns", "grad_sample_fused", "grad_sample")
"""Kernels that read pairs of bfloat16 channels as int32, see `kernels.sampling.widen`; forward_prefetch gains none."""
EXACT_STAGES = ("forward", "grad_sample_fused")
HOST = ("interpreter",)
GPUS = ("sm80", "sm90", "sm100", "gfx942")
PORTABLE = ("sm80", "gfx942")
TABLE: tuple[TileRow, ...] = (
    TileRow("sampling", "sampling", GPUS, "any", ANY, Tile(256)),
    TileRow("bins", "bins", GPUS, "any", ANY, Tile(256)),
    TileRow("forward", "forward_transposed", ("sm90",), "half", 128, Tile(128, 128, 32, 8, 128)),
    TileRow("forward", "forward_transposed", ("sm100",), "half", 128, Tile(64, 128, 32, 4)),
    TileRow("forward", "forward_transposed", ("sm90",), "half", 256, Tile(64, 256, 32, 8)),
    TileRow("forward", "forward_transposed", ("sm90", "sm100"), "half", 256, Tile(64, 64, 32, 4)),
    TileRow("forward", "forward_transposed", ("sm90",), "tf32", 128, Tile(64, 128, 32, 8)),
    TileRow("forward", "forward_transposed", ("sm90",), "tf32", 256, Tile(64, 256, 16, 8)),
    TileRow("forward", "forward_prefetch", ("sm80",), "half", 128, Tile(64, 128, 32, 8)),
    TileRow("forward", "forward_prefetch", ("gfx942",), "half", 128, Tile(64, 128, 32, 4)),
    TileRow("forward", "forward_prefetch", PORTABLE, "half", 256, Tile(64, 256, 32, 8)),
    TileRow("forward", "forward_prefetch", PORTABLE, "half", 256, Tile(64, 64, 32, 4)),
    TileRow("forward", "forward_prefetch", ("sm80",), "tf32", 128, Tile(64, 128, 16, 8)),
    TileRow("forward", "forward_prefetch", ("sm80",), "tf32", 256, Tile(64, 256, 16, 8)),
    TileRow("columns", "columns", GPUS, "half", ANY, Tile(32, 0, 64, 4)),
    TileRow("columns", "columns", GPUS, "any", ANY, Tile(16, 0, 64, 4)),
    TileRow("grad_sample_fused", "grad_sample_fused", GPUS, "half", 256, Tile(64, 128, 64, 8)),
    TileRow("grad_sample_fused", "grad_sample_fused", GPUS, "half", 256, Tile(64, 128, 32, 4)),
    TileRow("grad_sample_fused", "grad_sample_fused", ("sm80", "sm90"), "tf32", 256, Tile(64, 64, 32, 4)),
    TileRow("grad_sample", "grad_sample", GPUS, "half", ANY, Tile(32, 0, 64, 4)),
    TileRow("grad_sample", "grad_sample", GPUS, "any", ANY, Tile(32, 0, 32, 4)),
    TileRow("t_columns", "t_columns", GPUS, "half", 64, Tile(64, 64, 0, 4)),
    TileRow("t_columns", "t_columns", PORTABLE, "half", 128, Tile(64, 128, 0, 8)),
    TileRow("t_columns", "t_columns", PORTABLE, "half", ANY, Tile(32, 256, 0, 8)),
    TileRow("t_columns", "t_columns", ("sm90", "sm100"), "half", ANY, Tile(64, 128, 0, 8)),
    TileRow("t_columns", "t_columns", ("sm80", "sm90"), "tf32", ANY, Tile(64, 64, 0, 8)),
    TileRow("t_columns", "t_columns", GPUS, "any", ANY, Tile(32, 64, 0, 8)),
    TileRow("g_form", "g_form", GPUS, "half", 64, Tile(64, 0, 64, 4)),
    TileRow("g_form", "g_form", GPUS, "half", ANY, Tile(64, 0, 128, 8)),
    TileRow("g_form", "g_form", ("sm80", "sm90"), "tf32", ANY, Tile(64, 0, 64, 8)),
    TileRow("g_form", "g_form", GPUS, "any", ANY, Tile(32, 0, 64, 8)),
    TileRow("sampling", "sampling", HOST, "any", ANY, Tile(4096)),
    TileRow("bins", "bins", HOST, "any", ANY, Tile(4096)),
    TileRow("forward", "forward_prefetch", HOST, "half", ANY, Tile(256, 16, 16)),
    TileRow("columns", "columns", HOST, "any", ANY, Tile(256, 0, 64)),
    TileRow("grad_sample_fused", "grad_sample_fused", HOST, "half", ANY, Tile(256, 16, 16)),
    TileRow("grad_sample", "grad_sample", HOST, "any", ANY, Tile(256, 0, 64)),
    TileRow("t_columns", "t_columns", HOST, "any", ANY, Tile(256, 64, 0)),
    TileRow("g_form", "g_form", HOST, "any", ANY, Tile(256, 0, 64)),
)


def serves(device: torch.device) -> bool:
    """Tell whether the table is for `device`: on older GPUs its tiles fit neither registers nor shared memory."""
    if device.type != "cuda":
        return False
    if torch.version.hip or not torch.cuda.is_available():  # the latter: a fake tensor
        return True
    return bool(torch.cuda.get_device_properties(device).major >= 8)


def architecture(device: torch.device) -> str:
    """Return the table's name for `device`."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm90", 10: "sm100"}.get(major, "sm80")


def arithmetic(tensor: Tensor) -> str:
    """Return how products of `tensor` are computed: "half", "tf32" where the user allows it, or "float32"."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return "half"
    matmul = torch.backends.cuda.matmul
    # the setting was renamed in torch 2.9, where to read the old name after the new one was set is an error
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tensor.is_cuda and allowed and not torch.version.hip else "float32"


def precision(arch: str, kind: str) -> str:
    """Return `input_precision` of tl.dot; three TF32 products stand in for float32, which has no tensor-core form."""
    if kind == "tf32":
        return "tf32"
    return "tf32x3" if kind == "float32" and arch.startswith("sm") else "ieee"


def choose(stage: str, arch: str, kind: str, channels: int, out_channels: int) -> TileRow | None:
    """Return the first row of `stage` for these sizes, or None.

    Args:
        stage: "forward" and "grad_sample_fused" need blocks that divide the channels, the other stages mask the rest.
        arch, kind: from `architecture` and `arithmetic`.
        channels: input channels of one offset group.
        out_channels: O.
    """
    for row in TABLE:
        if row.stage != stage or arch not in row.archs or row.arithmetic not in (kind, "any"):
            continue
        size = out_channels if stage == "t_columns" else channels
        exact = stage in EXACT_STAGES
        if size <= row.channels and not (exact and (channels % row.tile.block_c or out_channels % row.tile.block_o)):
            return row
    return None


def strip(out_width: int) -> int:
    """Return the width of the strips in which output positions are numbered, 0 for row-major order."""
    return STRIP if out_width >= STRIP_MIN_WIDTH else 0

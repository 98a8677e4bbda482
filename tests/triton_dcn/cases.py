"""Named cases of the operator, generated or golden, and the measure they are compared by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from triton_dcn.geometry import ConvGeometry, conv_output_size

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the Triton kernels run; on a CPU that is in Triton's interpreter, see `tests/conftest.py`."""

# batch, in, out, (H, W), kernel, stride, padding, dilation, groups, offset groups, mask, bias
CASES = {
    "plain": (2, 8, 6, (7, 9), (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, True, True),
    "groups": (2, 8, 6, (6, 5), (3, 3), (1, 1), (1, 1), (1, 1), 2, 4, True, True),
    "v1": (1, 4, 3, (6, 7), (3, 3), (2, 2), (1, 1), (1, 1), 1, 1, False, False),
    "odd": (3, 5, 7, (8, 6), (2, 5), (2, 1), (0, 3), (3, 2), 1, 5, True, False),
    "pointwise": (2, 4, 4, (3, 4), (1, 1), (1, 1), (0, 0), (1, 1), 4, 2, True, True),
    "thin": (2, 4, 2, (1, 9), (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, True, True),
    "seven": (1, 2, 3, (9, 8), (7, 7), (1, 1), (3, 3), (1, 1), 1, 1, True, False),
    "empty": (0, 4, 6, (6, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, True, True),
}


@dataclass
class Case:
    """Inputs of one call, and for golden cases its results.

    Attributes:
        tensors: input, offset, mask, weight.
        grads: of the four tensors, in their order.
    """

    geom: ConvGeometry
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor]
    bias: Tensor | None
    grad_output: Tensor
    output: Tensor | None = None
    grads: tuple[Tensor | None, ...] | None = None
    grad_bias: Tensor | None = None

    @property
    def needs(self) -> tuple[bool, bool, bool, bool]:
        """Every gradient that exists."""
        return tuple(tensor is not None for tensor in self.tensors)

    @property
    def arguments(self) -> dict:
        """Keyword arguments of `deform_conv2d` beside input, offset and weight."""
        geom = self.geom
        return {
            "bias": self.bias, "mask": self.tensors[2],
            "stride": geom.stride, "padding": geom.padding, "dilation": geom.dilation,
        }  # fmt: skip


def device_of(backend: str) -> str:
    """Return where the tests run a backend: the Triton kernels on a GPU if there is one, the others on the CPU."""
    return DEVICE if backend == "triton" else "cpu"


def make_case(spec: tuple, dtype: torch.dtype, device: str = "cpu", seed: int = 0, spread: float = 2.0) -> Case:
    """Draw a case; offsets keep 0.1 from whole pixels, where their gradient jumps."""
    batch, channels, out, size, kernel, stride, padding, dilation, groups, offset_groups, with_mask, with_bias = spec
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    taps = kernel[0] * kernel[1]
    out_size = conv_output_size(size, kernel, stride, padding, dilation)
    x, weight = normal(batch, channels, *size), normal(out, channels // groups, *kernel)
    whole = (normal(batch, 2 * offset_groups * taps, *out_size) * spread).floor()
    offset = whole + 0.1 + 0.8 * torch.rand(whole.shape, generator=draw, dtype=torch.float64)
    mask = (
        torch.rand(batch, offset_groups * taps, *out_size, generator=draw, dtype=torch.float64) if with_mask else None
    )
    bias = normal(out) if with_bias else None
    to = {"device": device, "dtype": dtype}
    x, offset, weight = x.to(**to), offset.to(**to), weight.to(**to)
    mask, bias = None if mask is None else mask.to(**to), None if bias is None else bias.to(**to)
    geom = ConvGeometry.of(x, offset, weight, mask, stride, padding, dilation)
    return Case(geom, (x, offset, mask, weight), bias, normal(*geom.output_shape).to(**to))


def golden_case(golden, name: str, dtype: torch.dtype, device: str = "cpu") -> Case:
    """Return case `name` of the golden group deform_conv; where mmcv's offset gradient differs, it is the target."""
    arrays, params = golden("deform_conv")
    params = params[name]

    def get(key, to=dtype):
        return torch.from_numpy(arrays[f"{name}.{key}"]).to(device, to) if f"{name}.{key}" in arrays else None

    tensors = tuple(get(key) for key in ("input", "offset", "mask", "weight"))
    pairs = [tuple(params[key]) for key in ("stride", "padding", "dilation")]
    x, offset, mask, weight = tensors
    grad_offset = get("grad_offset_mmcv", torch.float64)
    if grad_offset is None:
        grad_offset = get("grad_offset", torch.float64)
    grads = (
        get("grad_input", torch.float64),
        grad_offset,
        get("grad_mask", torch.float64),
        get("grad_weight", torch.float64),
    )
    return Case(
        ConvGeometry.of(x, offset, weight, mask, *pairs), tensors, get("bias"), get("grad_out"),
        get("output", torch.float64), grads, get("grad_bias", torch.float64),
    )  # fmt: skip


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the relative l2 error, in float64; the absolute one where `expected` is zero."""
    expected = expected.double()
    norm = expected.norm().item()
    return (found.double() - expected).norm().item() / (norm or 1.0)


@contextmanager
def deterministic() -> Iterator[None]:
    """Ask for deterministic algorithms; torch then fills fresh memory with NaN and wants a setting of cuBLAS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@contextmanager
def two_threads() -> Iterator[None]:
    """On one thread BLAS contracts the columns of backend "torch", on more oneDNN's convolutions do."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)

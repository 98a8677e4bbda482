"""Named cases of the operator, generated or golden, and the measure they are compared by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from bench.cases import Case
from triton_dcn import deform_conv2d, reference
from triton_dcn.geometry import ConvGeometry
from triton_dcn.offset_mask import OffsetMask, OffsetMaskGrad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the Triton kernels run; on a CPU that is in Triton's interpreter, see `tests/conftest.py`."""

QUANTITIES = ("output", "grad_input", "grad_offset", "grad_mask", "grad_weight")
"""What `run_backend` returns."""

# of torch itself, where forward mode is first used
QUIET = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@dataclass(frozen=True)
class OperatorCase(Case):
    """The sizes of a layer, as in the benchmarks, and what else it has.

    Attributes:
        has_mask: version 2, with a mask.
        has_bias: with a bias.
    """

    has_mask: bool = True
    has_bias: bool = True


CASES = {
    "plain": OperatorCase("plain", 2, 8, 6, 7, 9),
    "groups": OperatorCase("groups", 2, 8, 6, 6, 5, groups=2, offset_groups=4),
    "v1": OperatorCase("v1", 1, 4, 3, 6, 7, stride=(2, 2), has_mask=False, has_bias=False),
    "odd": OperatorCase(
        "odd",
        3,
        5,
        7,
        8,
        6,
        kernel=(2, 5),
        stride=(2, 1),
        padding=(0, 3),
        dilation=(3, 2),
        offset_groups=5,
        has_bias=False,
    ),
    "pointwise": OperatorCase("pointwise", 2, 4, 4, 3, 4, kernel=(1, 1), padding=(0, 0), groups=4, offset_groups=2),
    "thin": OperatorCase("thin", 2, 4, 2, 1, 9),
    "seven": OperatorCase("seven", 1, 2, 3, 9, 8, kernel=(7, 7), padding=(3, 3), has_bias=False),
    "empty": OperatorCase("empty", 0, 4, 6, 6, 5),
}


@dataclass
class OperatorCall:
    """Tensors of one call, and for golden cases its results.

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
    def offset_mask(self) -> OffsetMask:
        """Offset and mask as one."""
        return OffsetMask(self.tensors[1], self.tensors[2])

    def double(self) -> OperatorCall:
        """Return the inputs in float64."""
        tensors = tuple(None if tensor is None else tensor.double() for tensor in self.tensors)
        bias = None if self.bias is None else self.bias.double()
        return OperatorCall(self.geom, tensors, bias, self.grad_output.double())

    @property
    def arguments(self) -> dict:
        """Keyword arguments of `deform_conv2d` beside input, offset and weight."""
        geom = self.geom
        return {
            "bias": self.bias, "mask": self.tensors[2],
            "stride": geom.stride, "padding": geom.padding, "dilation": geom.dilation,
        }  # fmt: skip


def run_backend(
    case: OperatorCall, backend: ModuleType, needs: tuple[bool, ...] | None = None, *, mask_logits: bool = False
) -> dict[str, Tensor | None]:
    """Run forward and backward of a backend without the operator around it.

    Args:
        case: what to compute.
        backend: `triton_backend`, `torch_backend` or `reference`.
        needs: which gradients to compute, of input, offset, mask and weight; None is all that exist.
        mask_logits: the mask is the sigmoid of the case's mask.

    Returns:
        A value for each of `QUANTITIES`, None for the gradients that do not exist or are not needed.
    """
    input, offset, mask, weight = case.tensors
    offset_mask = OffsetMask(offset, mask, mask_logits)
    needs_input, needs_offset, needs_mask, needs_weight = case.needs if needs is None else needs
    needs_mask = needs_mask and mask is not None
    if backend is reference:
        return _run_reference(case, offset_mask, (needs_input, needs_offset, needs_mask, needs_weight))

    output = backend.forward(case.geom, input, offset_mask, weight, case.bias)
    grad_offset_mask = OffsetMaskGrad(
        _to_be_written(offset) if needs_offset else None,
        _to_be_written(mask) if needs_mask else None,
        mask_logits,
    )
    grad_input, grad_weight = backend.backward(
        case.geom,
        case.grad_output,
        input,
        offset_mask,
        weight,
        grad_offset_mask,
        needs_input=needs_input,
        needs_weight=needs_weight,
    )
    grads = (grad_input, grad_offset_mask.offset, grad_offset_mask.mask, grad_weight)
    return dict(zip(QUANTITIES, (output, *grads), strict=True))


def _run_reference(case: OperatorCall, offset_mask: OffsetMask, needs: tuple[bool, ...]) -> dict[str, Tensor | None]:
    """Run the reference on leaves of its own, and autograd."""
    tensors = (case.tensors[0], offset_mask.offset, offset_mask.mask, case.tensors[3])
    input, offset, mask, weight = (
        None if tensor is None else tensor.detach().requires_grad_(need)
        for tensor, need in zip(tensors, needs, strict=True)
    )
    offset_mask = replace(offset_mask, offset=offset, mask=mask)
    output = reference.forward(case.geom, input, offset_mask, weight, case.bias)

    leaves = [leaf for leaf, need in zip((input, offset, mask, weight), needs, strict=True) if need]
    grads = iter(torch.autograd.grad(output, leaves, case.grad_output) if leaves else ())
    results = [output.detach(), *(next(grads) if need else None for need in needs)]
    return dict(zip(QUANTITIES, results, strict=True))


def run_operator(case: OperatorCall, backend: str) -> tuple[Tensor, list[Tensor | None]]:
    """Run `deform_conv2d` and autograd, on the device of the backend.

    Args:
        case: what to compute.
        backend: "triton", "torch" or "reference".

    Returns:
        On the CPU, the output and the gradients of input, offset, mask, weight and bias, None for those without.
    """
    device = device_of(backend)
    leaves = []
    for tensor in (*case.tensors, case.bias):
        leaves.append(None if tensor is None else tensor.to(device, copy=True).requires_grad_())
    x, offset, mask, weight, bias = leaves
    arguments = case.arguments | {"mask": mask, "bias": bias}
    output = deform_conv2d(x, offset, weight, backend=backend, **arguments)
    output.backward(case.grad_output.to(device))
    return output.detach().cpu(), [None if leaf is None else leaf.grad.cpu() for leaf in leaves]


def _to_be_written(tensor: Tensor) -> Tensor:
    """Return memory for a gradient, filled with NaN so that what a backend does not write is seen."""
    return torch.full_like(tensor, torch.nan, memory_format=torch.contiguous_format)


def device_of(backend: str) -> str:
    """Return where the tests run a backend: the Triton kernels on a GPU if there is one, the others on the CPU."""
    return DEVICE if backend == "triton" else "cpu"


def make_case(
    spec: OperatorCase, dtype: torch.dtype, device: str = "cpu", seed: int = 0, spread: float = 2.0
) -> OperatorCall:
    """Draw a case; offsets keep 0.1 from whole pixels, where their gradient jumps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def stored(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device=device, dtype=dtype)

    input = normal(spec.batch, spec.channels, spec.height, spec.width)
    weight = normal(spec.out_channels, spec.channels // spec.groups, *spec.kernel)
    whole = (normal(spec.batch, 2 * spec.offset_groups * spec.taps, *spec.out_size) * spread).floor()
    offset = whole + 0.1 + 0.8 * uniform(*whole.shape)
    mask = uniform(spec.batch, spec.offset_groups * spec.taps, *spec.out_size) if spec.has_mask else None
    bias = normal(spec.out_channels) if spec.has_bias else None

    input, offset, mask, weight = (stored(tensor) for tensor in (input, offset, mask, weight))
    geom = ConvGeometry.of(input, offset, weight, mask, spec.stride, spec.padding, spec.dilation)
    grad_output = stored(normal(*geom.output_shape))
    return OperatorCall(geom, (input, offset, mask, weight), stored(bias), grad_output)


def golden_case(golden, name: str, dtype: torch.dtype, device: str = "cpu") -> OperatorCall:
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
    return OperatorCall(
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

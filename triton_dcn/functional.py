"""`deform_conv2d`: torchvision's signature, argument checks, autocast, choice of the backend.

Receives tensors from users and from the layers of `nn`, as they come. Hands checked tensors in their compute dtype and
integer pairs to `operator`, or, for backend "reference", to `reference` itself.
"""

from __future__ import annotations

import importlib.util
import operator
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from triton_dcn import reference, tile_table
from triton_dcn.forward_mode import refuse_tangents
from triton_dcn.geometry import ConvGeometry
from triton_dcn.offset_mask import OffsetMask
from triton_dcn.operator import forward_op, store_like, without_autocast

HALF_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = (*HALF_DTYPES, torch.float32, torch.float64)
BACKENDS = ("triton", "torch", "reference")
NO_FORWARD_MODE = (
    "deform_conv2d has no forward-mode derivative (jvp, jacfwd): use torch.autograd.grad, or backend='reference'"
)
HAS_TRITON = importlib.util.find_spec("triton") is not None


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Convolve with taps displaced by `offset` and scaled by `mask`.

    Tap (i, j) of the output at (y, x) reads the input, bilinearly, at
    (y * stride_y - padding_y + i * dilation_y + dy, x * stride_x - padding_x + j * dilation_x + dx). A sample at or
    beyond -1, H or W is 0 and passes no gradient to offset and mask; so is a sample whose place is not finite. At whole
    pixels the gradient of the offset is the right-sided one. Under autocast, `input`, `weight` and `bias` are cast to
    the autocast dtype, while `offset` and `mask` stay as they are.

    Args:
        input: (B, C, H, W), float16, bfloat16, float32 or float64; any strides, B may be 0.
        offset: (B, 2*D*K, Ho, Wo), pixels; channel 2*(d*K + k) is dy, and the one after it dx, of tap k (row-major) for
            the input channels [d*C/D, (d+1)*C/D). The dtype of `input`, or float32 beside a half-precision input.
        weight: (O, C/groups, kh, kw), K = kh*kw, the dtype of `input`.
        bias: (O,) or None.
        stride: input pixels from one output position to the next, int or (y, x).
        padding: input pixels that the first output position lies outside the image, int or (y, x).
        dilation: input pixels from one tap to the next, int or (y, x).
        mask: (B, D*K, Ho, Wo), multiplies the samples, or None for version 1; dtype as for `offset`.
        backend: None chooses by device and dtype; "triton"; "torch", fast on a CPU, runs on any device; "reference",
            slow, plain PyTorch, with second derivatives and forward-mode differentiation.

    Returns:
        (B, O, Ho, Wo) in the compute dtype, channels_last if `input` is.

    Raises:
        ValueError: shapes disagree, or the backend cannot run here; the message names the argument and both values.
        TypeError: dtypes, layouts or devices disagree.
        NotImplementedError: second derivatives, or forward-mode differentiation outside of torch.compile, with another
            backend than "reference".

    Source:
        Zhu et al., Deformable ConvNets v2, CVPR 2019, section 3; signature of torchvision.ops.deform_conv2d; gradient
        at the border from mmcv.
    """
    return convolve(input, offset, weight, bias, stride, padding, dilation, mask, backend=backend)


def convolve(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
    mask: Tensor | None,
    *,
    mask_logits: bool = False,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Check the arguments of `deform_conv2d` and run it, with two options that only the layers use.

    Args:
        input, offset, weight, bias, stride, padding, dilation, mask, backend: as in `deform_conv2d`.
        mask_logits: `offset` is (B, 3*D*K, Ho, Wo) and holds in its last third the logits of the mask, whose sigmoid
            multiplies the samples; `mask` is None.
        relu: negative outputs become 0, before they are written.
    """
    _check_tensors(input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    stride = pair("stride", stride)
    padding = pair("padding", padding)
    dilation = pair("dilation", dilation)

    device = input.device.type
    # meta tensors have no autocast; torch.amp.is_autocast_available, which tells so, does not compile in torch 2.11
    if device != "meta" and torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        input = _autocast(input, dtype)
        weight = _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)

    offset_mask = OffsetMask.of(offset, mask, mask_logits)
    _check_dtypes_and_devices(input, offset_mask, weight, bias)
    # errors about shapes are raised here and not inside the operator; torch.compile does not trace through a memory
    derive = ConvGeometry.of if torch.compiler.is_compiling() else ConvGeometry.remembered
    geom = derive(input, offset_mask.offset, weight, offset_mask.mask, stride, padding, dilation)
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")

    backend = choose_backend(backend, input)
    if backend == "reference":
        return _convolve_by_reference(geom, input, offset_mask, weight, bias, relu)
    refuse_tangents(NO_FORWARD_MODE, input, offset, weight, bias, mask)
    output: Tensor = forward_op(
        input, offset, mask, weight, bias, list(stride), list(padding), list(dilation), backend, mask_logits, relu
    )
    return output


def choose_backend(name: str | None, input: Tensor) -> str:
    """Return the backend for `input`: `name` if it can run there, or the fastest one if `name` is None.

    Raises:
        ValueError: unknown name, or a backend that cannot run on this device or dtype.
    """
    device = input.device
    if name is None:
        if not HAS_TRITON or not tile_table.serves(device):
            return "torch"
        return "reference" if input.dtype == torch.float64 else "triton"

    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS} or None, got {name!r}")
    if name != "triton":
        return name

    if not HAS_TRITON:
        raise ValueError("backend='triton': expected the package triton, got none installed")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and not interpreted:
        raise ValueError(
            "backend='triton': expected a GPU or Triton's interpreter, got CPU tensors; set TRITON_INTERPRET=1 before "
            "triton is imported, or use backend=None"
        )
    if device.type not in ("cpu", "meta") and not tile_table.serves(device):
        raise ValueError(
            "backend='triton': expected an AMD GPU or an NVIDIA GPU of compute capability 8.0 or later, got input on "
            f"{device}; use backend=None"
        )
    if input.dtype == torch.float64:
        raise ValueError("backend='triton': expected an input in float32 or half precision, got float64")
    return name


def pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """Return (y, x) of an argument that may be one number for both.

    Raises:
        ValueError: `value` is neither an int nor two ints; names the argument.
    """
    # first the usual cases, at a fraction of the time
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2:
        y, x = value
        if type(y) is int and type(x) is int:
            return y, x

    values = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(values) != 2 or not all(_is_integer(number) for number in values):
        raise ValueError(f"{name}: expected an int or a pair of ints, got {value!r}")
    y, x = values
    return _to_int(y), _to_int(x)


def _is_integer(number: object) -> bool:
    return isinstance(number, (int, torch.SymInt)) or hasattr(number, "__index__")


def _to_int(number: int) -> int:
    """Convert an integer of numpy and the like; a symbolic one of torch.compile stays symbolic."""
    if isinstance(number, (int, torch.SymInt)):
        return number
    return operator.index(number)


def _convolve_by_reference(
    geom: ConvGeometry, input: Tensor, offset_mask: OffsetMask, weight: Tensor, bias: Tensor | None, relu: bool
) -> Tensor:
    """Run plain PyTorch outside the operator, so that autograd, `torch.func` and torch.compile see every step."""
    with without_autocast(input.device.type):
        output = reference.forward(geom, input, offset_mask, weight, bias)
        if relu:
            output = output.relu()
    return store_like(output, input)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast the dtypes that autocast casts; `_check_dtypes_and_devices` refuses the others."""
    return tensor.to(dtype) if tensor.dtype in (*HALF_DTYPES, torch.float32) else tensor


def _check_tensors(**arguments: Tensor | None) -> None:
    """Raise TypeError where an argument is not a tensor, or is a sparse one; bias and mask may be None."""
    for name, tensor in arguments.items():
        if tensor is None and name in ("bias", "mask"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}: expected layout torch.strided, got {tensor.layout}")


def _check_dtypes_and_devices(input: Tensor, offset_mask: OffsetMask, weight: Tensor, bias: Tensor | None) -> None:
    """Raise TypeError where dtypes or devices do not fit `input`."""
    if input.dtype not in DTYPES:
        raise TypeError(f"input: expected one of {DTYPES}, got {input.dtype}")

    coordinate_dtypes = {input.dtype}
    if input.dtype in HALF_DTYPES:
        coordinate_dtypes.add(torch.float32)

    for name, tensor, allowed in (
        ("weight", weight, {input.dtype}),
        ("bias", bias, {input.dtype}),
        ("offset", offset_mask.offset, coordinate_dtypes),
        ("mask", offset_mask.mask, coordinate_dtypes),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in allowed:
            expected = " or ".join(sorted(str(dtype) for dtype in allowed))
            raise TypeError(f"{name}: expected {expected} beside an input of {input.dtype}, got {tensor.dtype}")
        if tensor.device != input.device:
            raise TypeError(f"{name}: expected device {input.device} like input, got {tensor.device}")

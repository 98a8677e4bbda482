"""`deform_conv2d`: torchvision's signature, argument checks, autocast, choice of the backend.

Receives tensors from users and from the layers of `nn`, as they come. Hands checked tensors in their compute dtype and
integer pairs to `operator`, or, for backend "reference", to `reference` itself.
"""

from __future__ import annotations

import importlib.util
import operator
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

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

Result = TypeVar("Result")


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
    in_channels: int | None = None,
    mask_logits: bool = False,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Check the arguments of `deform_conv2d` and run it, with three options that only the layers use.

    Args:
        input, offset, weight, bias, stride, padding, dilation, mask, backend: as in `deform_conv2d`.
        in_channels: channels that `input` has to have; None: those that fit `weight`.
        mask_logits: `offset` is (B, 3*D*K, Ho, Wo) and holds in its last third the logits of the mask, whose sigmoid
            multiplies the samples; `mask` is None.
        relu: negative outputs become 0, before they are written.
    """
    if not are_tensors(("bias", "mask"), input=input, offset=offset, weight=weight, bias=bias, mask=mask):
        tensors = (input, offset, weight, bias, mask)
        arguments = (input, offset, weight, bias, stride, padding, dilation, mask)
        if in_channels is None and not mask_logits and not relu:
            output: Tensor = handle_torch_function(deform_conv2d, tensors, *arguments, backend=backend)
            return output
        output = handle_torch_function(
            convolve,
            tensors,
            *arguments,
            in_channels=in_channels,
            mask_logits=mask_logits,
            relu=relu,
            backend=backend,
        )
        return output

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
    pairs = (stride, padding, dilation)
    geom = untraced(_check_shapes, derive, input, offset_mask, weight, bias, pairs, in_channels)

    backend = choose_backend(backend, input)
    if backend == "reference":
        return _convolve_by_reference(geom, input, offset_mask, weight, bias, relu)
    refuse_tangents(NO_FORWARD_MODE, input, offset, weight, bias, mask)
    output = forward_op(
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
    if type(value) is tuple:
        try:
            y, x = value
        except ValueError:  # not two
            pass
        else:
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


def are_tensors(optional: Collection[str], **arguments: Tensor | None) -> bool:
    """Tell whether all arguments are tensors, so that there is something to compute with.

    Otherwise some of them stand for tensors: they have a `__torch_function__`, which takes the call as it is. This is
    how `torch.fx.symbolic_trace` makes one node of it.

    Args:
        optional: names of those that may be None.
        arguments: by name.

    Raises:
        TypeError: an argument is neither of both, or is a sparse tensor.

    Source:
        "Extending torch with a Tensor-like type" in PyTorch's documentation.
    """
    are_all = True
    for name, tensor in arguments.items():
        if tensor is None and name in optional:
            continue
        if type(tensor) is Tensor or isinstance(tensor, Tensor):  # the usual case takes no call
            if tensor.layout != torch.strided:
                raise TypeError(f"{name}: expected layout torch.strided, got {tensor.layout}")
        else:
            if not hasattr(tensor, "__torch_function__"):
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
            are_all = False
    return are_all


def untraced(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function that `torch.jit.trace` does not see.

    While that traces, sizes of tensors are tensors, and what is decided by them is a warning. Here they are numbers.
    """
    state = torch._C._get_tracing_state()
    if state is None:
        return function(*arguments)
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return function(*arguments)
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def _check_shapes(
    derive: Callable[..., ConvGeometry],
    input: Tensor,
    offset_mask: OffsetMask,
    weight: Tensor,
    bias: Tensor | None,
    pairs: Sequence[tuple[int, int]],
    in_channels: int | None,
) -> ConvGeometry:
    """Return the sizes of a call.

    Args:
        derive: a constructor of `ConvGeometry`.
        input, offset_mask, weight, bias, in_channels: as in `convolve`.
        pairs: stride, padding and dilation, (y, x) each.

    Raises:
        ValueError: they disagree.
    """
    if in_channels is not None and input.dim() == 4 and input.shape[1] != in_channels:
        raise ValueError(f"input: expected {in_channels} channels (in_channels), got {input.shape[1]}")
    geom = derive(input, offset_mask.offset, weight, offset_mask.mask, *pairs)
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    return geom


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

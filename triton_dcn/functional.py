"""`deform_conv2d`: torchvision's signature, argument checks, autocast."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_dcn.geometry import ConvGeometry
from triton_dcn.operator import choose_backend, forward_op, split_map

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """Return (y, x) of an argument that may be one number for both.

    Raises:
        ValueError: `value` is neither an int nor two ints; names the argument.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(values) != 2 or not all(isinstance(v, (int, torch.SymInt)) or hasattr(v, "__index__") for v in values):
        raise ValueError(f"{name} must be an int or a pair of ints, got {value!r}")
    y, x = (v if isinstance(v, (int, torch.SymInt)) else operator.index(v) for v in values)
    return y, x


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
    (y * stride_y - padding_y + i * dilation_y + dy, x * stride_x - padding_x + j * dilation_x + dx). A position at or
    beyond -1, H or W reads 0 and passes no gradient to offset and mask, and so does a position that is not finite;
    at whole pixels the gradient of the offset is the right-sided one. Under autocast, `input`, `weight` and `bias` are
    computed in the autocast dtype while `offset` and `mask` stay as they are.

    Args:
        input: (B, C, H, W), float16, bfloat16, float32 or float64; any strides, B may be 0.
        offset: (B, 2*D*K, Ho, Wo), pixels; channel 2*(d*K + k) is dy and the next dx of tap k (row-major) for the input
            channels [d*C/D, (d+1)*C/D). The dtype of `input`, or float32 beside a half-precision input.
        weight: (O, C/groups, kh, kw), K = kh*kw, the dtype of `input`.
        bias: (O,) or None.
        stride, padding, dilation: int or (y, x), input pixels.
        mask: (B, D*K, Ho, Wo), multiplies the samples, or None for version 1; dtype as for `offset`.
        backend: None chooses by device and dtype; "triton", "torch" (fast on CPU, runs anywhere) or "reference".

    Returns:
        (B, O, Ho, Wo) in the compute dtype, channels_last if `input` is.

    Raises:
        ValueError: shapes disagree, or the backend cannot run here; names the argument, expected and found.
        TypeError: dtypes, layouts or devices disagree.
        NotImplementedError: forward-mode differentiation, outside of torch.compile.

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
    packed: bool = False,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Check the arguments of `deform_conv2d` and run it, with what its layers know beyond it.

    Args:
        packed: `offset` is (B, 3*D*K, Ho, Wo): offsets, then what the sigmoid turns into the mask; `mask` is None. The
            map is read, and its gradient written, by the kernels as it is.
        relu: negative outputs become 0, before they are written.
    """
    for name, tensor in (("input", input), ("offset", offset), ("weight", weight), ("bias", bias), ("mask", mask)):
        if not isinstance(tensor, Tensor) and not (tensor is None and name in ("bias", "mask")):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.layout != torch.strided:
            raise TypeError(f"{name} has layout {tensor.layout}, expected torch.strided")
    _refuse_tangents(input, offset, weight, bias, mask)
    device = input.device.type
    # torch knows no autocast of meta tensors; its function that says so does not compile in torch 2.11
    if device != "meta" and torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        input, weight = _cast(input, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
    moves, scales = split_map(offset) if packed else (offset, mask)
    _check_types(input, moves, weight, bias, scales)
    stride, padding, dilation = pair("stride", stride), pair("padding", padding), pair("dilation", dilation)
    ConvGeometry.of(input, moves, weight, scales, stride, padding, dilation)  # errors surface here, not inside the op
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    output: Tensor = forward_op(
        input, offset, mask, weight, bias, list(stride), list(padding), list(dilation), choose_backend(backend, input),
        packed, relu,
    )  # fmt: skip
    return output


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError in forward mode, where PyTorch would take the derivative of its operators for zero."""
    if forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError("deform_conv2d has no forward-mode derivative (jvp, jacfwd): use torch.autograd.grad")


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast what autocast casts; the rest is left for `_check_types` to refuse."""
    return tensor.to(dtype) if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32) else tensor


def _check_types(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    """Raise TypeError where dtypes or devices do not fit `input`."""
    if input.dtype not in DTYPES:
        raise TypeError(f"input has dtype {input.dtype}, expected one of {DTYPES}")
    coordinates = {input.dtype, torch.float32} if input.dtype.itemsize == 2 else {input.dtype}
    for name, tensor, allowed in (
        ("weight", weight, {input.dtype}),
        ("bias", bias, {input.dtype}),
        ("offset", offset, coordinates),
        ("mask", mask, coordinates),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in allowed:
            expected = " or ".join(sorted(str(dtype) for dtype in allowed))
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected {expected} with input of {input.dtype}")
        if tensor.device != input.device:
            raise TypeError(f"{name} is on {tensor.device}, expected {input.device} like input")

"""The `torch.library` operators: choice of the backend, fake tensors, autograd, vmap.

Two operators, forward and backward, so that torch.compile, export, vmap and opcheck see plain functional operators. The
backward operator returns an empty tensor in the place of a gradient that was not asked for.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from triton_dcn import reference, tile_table, torch_backend
from triton_dcn.geometry import ConvGeometry

PLAIN_BACKENDS = {"torch": torch_backend, "reference": reference}
BACKENDS = ("triton", *PLAIN_BACKENDS)
HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose_backend(name: str | None, input: Tensor) -> str:
    """Return the backend for `input`: `name` if it can run there, or the fastest one if `name` is None.

    Raises:
        ValueError: unknown name, or a backend that cannot run on this device or dtype.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if name is None:
        if not HAS_TRITON or not tile_table.serves(input.device):
            return "torch"
        return "reference" if input.dtype == torch.float64 else "triton"
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS} or None, got {name!r}")
    if name == "triton":
        if not HAS_TRITON:
            raise ValueError("backend='triton' needs the triton package, which is not installed")
        if input.device.type == "cpu" and not interpreted:
            raise ValueError(
                "backend='triton' on CPU tensors runs in Triton's interpreter: set TRITON_INTERPRET=1 before triton is "
                "imported, or use backend=None"
            )
        if input.device.type not in ("cpu", "meta") and not tile_table.serves(input.device):
            raise ValueError(
                "backend='triton' needs an AMD GPU or an NVIDIA GPU of compute capability 8.0 or later, got input on "
                f"{input.device}; use backend=None"
            )
        if input.dtype == torch.float64:
            raise ValueError("backend='triton' computes in float32 or half precision, got float64 input")
    return name


def split_map(predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the views of a packed map (B, 3*D*K, Ho, Wo): offsets (B, 2*D*K, ...) and mask logits (B, D*K, ...)."""
    count = predicted.shape[1] // 3
    return predicted[:, : 2 * count], predicted[:, 2 * count :]


def _launch() -> ModuleType:
    from triton_dcn import triton_backend  # the one late import: the CPU path must run without triton

    return triton_backend


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Return channels_last if `tensor` is stored so and not also contiguous."""
    if tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


@torch.library.custom_op("triton_dcn::deform_conv2d", mutates_args=())
def forward_op(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    backend: str,
    packed: bool = False,
    relu: bool = False,
) -> Tensor:
    """Run the forward pass of `backend`; see `triton_dcn.deform_conv2d`.

    Args:
        packed: `offset` is a map of `split_map`, and `mask` is None.
        relu: negative outputs become 0.
    """
    offset, mask = split_map(offset) if packed else (offset, mask)
    geom = ConvGeometry.of(input, offset, weight, mask, stride, padding, dilation)
    with torch.autocast(input.device.type, enabled=False):  # the caller has chosen the dtypes
        if backend == "triton":
            output: Tensor = _launch().forward(geom, input, offset, mask, weight, bias, mask_logits=packed, relu=relu)
        else:
            mask = mask.sigmoid() if mask is not None and packed else mask
            output = PLAIN_BACKENDS[backend].forward(geom, input, offset, mask, weight, bias)
            output = output.relu_() if relu else output
    return output.contiguous(memory_format=_memory_format(input))


@forward_op.register_fake
def _forward_fake(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    backend: str,
    packed: bool = False,
    relu: bool = False,
) -> Tensor:
    offset, mask = split_map(offset) if packed else (offset, mask)
    geom = ConvGeometry.of(input, offset, weight, mask, stride, padding, dilation)
    return input.new_empty(geom.output_shape).contiguous(memory_format=_memory_format(input))


@torch.library.custom_op("triton_dcn::deform_conv2d_backward", mutates_args=())
def backward_op(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    backend: str,
    needs: list[bool],
    packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of input, offset or packed map, mask and weight; an empty tensor where `needs` is false."""
    moves, grad_map = offset, None
    if packed:
        moves, mask = split_map(offset)
        grad_map = torch.empty_like(offset, memory_format=torch.contiguous_format) if needs[1] else None
        needs = [needs[0], needs[1], needs[1], needs[3]]
    into = None if grad_map is None else split_map(grad_map)
    geom = ConvGeometry.of(input, moves, weight, mask, stride, padding, dilation)
    tensors = grad_output, input, moves, mask, weight
    with torch.autocast(input.device.type, enabled=False):
        if backend == "triton":
            grads = _launch().backward(geom, *tensors, tuple(needs), mask_logits=packed, into=into)
        else:
            value = mask.sigmoid() if mask is not None and packed else mask
            grads = PLAIN_BACKENDS[backend].backward(geom, *tensors[:3], value, weight, tuple(needs))
            if into is not None and value is not None:
                into[0].copy_(grads[1])
                grad_logits = grads[2] * value * (1 - value)
                into[1].copy_(grad_logits.where(grads[2] != 0, 0))  # outside the image the logit may be NaN

    def stored(grad: Tensor | None, like: Tensor | None) -> Tensor:
        if grad is None or like is None:
            return input.new_empty(0)
        return grad.contiguous(memory_format=_memory_format(like))

    grad_input, grad_offset, grad_mask, grad_weight = grads
    if packed:
        grad_offset, grad_mask = grad_map, None
    return stored(grad_input, input), stored(grad_offset, offset), stored(grad_mask, mask), stored(grad_weight, weight)


@backward_op.register_fake
def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    backend: str,
    needs: list[bool],
    packed: bool = False,
) -> tuple[Tensor, ...]:
    return tuple(
        input.new_empty(0) if like is None or not need else torch.empty_like(like, memory_format=_memory_format(like))
        for like, need in zip((input, offset, mask, weight), needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, mask, weight, bias, *ctx.settings, ctx.packed, relu = inputs
    ctx.save_for_backward(input, offset, mask, weight, output if relu else None)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, mask, weight, rectified = ctx.saved_tensors
    if rectified is not None:
        grad_output = torch.where(rectified <= 0, 0, grad_output)  # NaN passes it on, as in torch
    needs = list(ctx.needs_input_grad[:4])
    grads: list[Tensor | None] = [None] * 4
    if any(needs):
        every = backward_op(grad_output, input, offset, mask, weight, *ctx.settings, needs, ctx.packed)
        grads = [grad if need else None for grad, need in zip(every, needs, strict=True)]
    grad_bias = grad_output.sum((0, 2, 3), dtype=ctx.bias_dtype) if ctx.needs_input_grad[4] else None
    return *grads, grad_bias, None, None, None, None, None, None


def _second_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("deform_conv2d has no second derivatives")


forward_op.register_autograd(_backward, setup_context=_setup_context)
backward_op.register_autograd(_second_backward)


def _vmap_forward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Take the images of all elements as one batch where they share weight and bias; else one after the other."""
    tensors, settings, dims = arguments[:5], arguments[5:], in_dims[:5]
    if dims[3] is None and dims[4] is None:
        images = (_fold(tensor, dim, info.batch_size) for tensor, dim in zip(tensors[:3], dims[:3], strict=True))
        output = forward_op(*images, *tensors[3:], *settings)
        return _unfold(output, info.batch_size), 0
    return torch.stack([forward_op(*own, *settings) for own in _elements(tensors, dims, info.batch_size)]), 0


def _vmap_backward(
    info: Any, in_dims: tuple[Any, ...], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """As `_vmap_forward`; every element has a weight gradient of its own, so that one is taken element by element."""
    tensors, settings, dims = arguments[:5], arguments[5:], in_dims[:5]
    needs = settings[4]
    if dims[4] is None and not needs[3]:
        images = (_fold(tensor, dim, info.batch_size) for tensor, dim in zip(tensors[:4], dims[:4], strict=True))
        grads = backward_op(*images, tensors[4], *settings)
        grads = [_unfold(grad, info.batch_size) if need else grad for grad, need in zip(grads, needs, strict=True)]
    else:
        each = [backward_op(*own, *settings) for own in _elements(tensors, dims, info.batch_size)]
        grads = [torch.stack(grad) if need else grad[0] for *grad, need in zip(*each, needs, strict=True)]
    return tuple(grads), tuple(0 if need else None for need in needs)


def _fold(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Move the vmapped dimension into the batch; what is shared by all elements is repeated."""
    if tensor is None:
        return None
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _unfold(tensor: Tensor, size: int) -> Tensor:
    return tensor.reshape(size, tensor.shape[0] // size, *tensor.shape[1:])


def _elements(
    tensors: tuple[Tensor | None, ...], dims: tuple[int | None, ...], size: int
) -> Iterator[list[Tensor | None]]:
    """Yield the arguments of one element after the other."""
    for index in range(size):
        yield [
            tensor if tensor is None or dim is None else tensor.select(dim, index)
            for tensor, dim in zip(tensors, dims, strict=True)
        ]  # fmt: skip


forward_op.register_vmap(_vmap_forward)
backward_op.register_vmap(_vmap_backward)

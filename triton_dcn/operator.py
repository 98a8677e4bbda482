"""The `torch.library` operators that torch.compile, export, autograd and vmap see: one forward, one backward.

Where autograd records a call of the Triton kernels, a second forward operator takes the place of the first. It also
returns the samples that it computed, for the backward operator.

They are defined by `torch.library.Library`, not by its decorator `custom_op`, because their derivatives are registered
as `torch.autograd.Function`s: `register_autograd` takes longer for a call of as many arguments than the kernels take
for a small image.

Receives checked tensors and the name of a backend from `functional`. Hands them on to the backend, `triton_backend` or
`torch_backend`, as a `ConvGeometry` and an `OffsetMask`.

Both are functional: they do not write into their arguments. The backward operator returns an empty tensor for each
gradient that is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from triton_dcn import torch_backend
from triton_dcn.geometry import ConvGeometry
from triton_dcn.offset_mask import OffsetMask, OffsetMaskGrad
from triton_dcn.workspace import keeps_samples, sample_buffer_shape

LIBRARY = torch.library.Library("triton_dcn", "FRAGMENT")
NO_CONTEXT = nullcontext()


def _run_forward(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    backend: str,
    mask_logits: bool = False,
    relu: bool = False,
) -> Tensor:
    """Run the forward pass of a backend; see `triton_dcn.deform_conv2d`.

    Args:
        backend: "triton" or "torch".
        mask_logits: `offset` holds in its last third the logits of the mask; `mask` is None.
        relu: negative outputs become 0.
    """
    offset_mask = OffsetMask.of(offset, mask, mask_logits)
    geom = ConvGeometry.remembered(input, offset_mask.offset, weight, offset_mask.mask, stride, padding, dilation)
    with without_autocast(input.device.type):  # the caller has chosen the dtypes
        output: Tensor = _module_of(backend).forward(geom, input, offset_mask, weight, bias, relu=relu)
    return store_like(output, input)


def _run_forward_with_samples(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    mask_logits: bool = False,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the forward pass of backend "triton"; the arguments are those of `forward_op`.

    Returns:
        The output, and the samples for the backward pass: a buffer for `backward_op`, or an empty tensor where
        `workspace.keeps_samples` says no.
    """
    offset_mask = OffsetMask.of(offset, mask, mask_logits)
    geom = ConvGeometry.remembered(input, offset_mask.offset, weight, offset_mask.mask, stride, padding, dilation)
    with without_autocast(input.device.type):
        output, samples = _module_of("triton").forward_with_samples(geom, input, offset_mask, weight, bias, relu=relu)
    if not keeps_samples(geom):
        samples = input.new_empty(0)
    elif samples is None:  # no images, no slice
        samples = input.new_empty(sample_buffer_shape(geom), dtype=torch.int32)
    return store_like(output, input), samples


def _forward_with_samples_fake(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    mask_logits: bool = False,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    offset_mask = OffsetMask.of(offset, mask, mask_logits)
    geom = ConvGeometry.of(input, offset_mask.offset, weight, offset_mask.mask, stride, padding, dilation)
    output = store_like(input.new_empty(geom.output_shape), input)
    if keeps_samples(geom):
        return output, input.new_empty(sample_buffer_shape(geom), dtype=torch.int32)
    return output, input.new_empty(0)


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
    mask_logits: bool = False,
    relu: bool = False,
) -> Tensor:
    offset_mask = OffsetMask.of(offset, mask, mask_logits)
    geom = ConvGeometry.of(input, offset_mask.offset, weight, offset_mask.mask, stride, padding, dilation)
    return store_like(input.new_empty(geom.output_shape), input)


def _run_backward(
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
    mask_logits: bool = False,
    samples: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of input, offset, mask and weight, each in the shape and dtype of its tensor.

    Where `needs` is false, an empty tensor stands for the gradient.

    Args:
        grad_output: (B, O, Ho, Wo), any strides.
        input, offset, mask, weight, stride, padding, dilation, backend, mask_logits: as given to `forward_op`.
        needs: whether to compute each of the four.
        samples: as returned by `forward_with_samples_op`, or None.
    """
    needs_input, needs_offset, needs_mask, needs_weight = needs
    offset_mask = OffsetMask.of(offset, mask, mask_logits)
    geom = ConvGeometry.remembered(input, offset_mask.offset, weight, offset_mask.mask, stride, padding, dilation)

    grad_offset = _empty_gradient(offset, backend) if needs_offset else None
    grad_mask = _empty_gradient(mask, backend) if needs_mask and mask is not None else None
    grad_offset_mask = OffsetMaskGrad.of(grad_offset, grad_mask, mask_logits)
    with without_autocast(input.device.type):
        kept = {} if samples is None or samples.numel() == 0 else {"kept_samples": samples}
        grad_input, grad_weight = _module_of(backend).backward(
            geom,
            grad_output,
            input,
            offset_mask,
            weight,
            grad_offset_mask,
            needs_input=needs_input,
            needs_weight=needs_weight,
            **kept,
        )

    gradients = (grad_input, grad_offset, grad_mask, grad_weight)
    grad_input, grad_offset, grad_mask, grad_weight = [
        input.new_empty(0) if gradient is None or tensor is None else store_like(gradient, tensor)
        for gradient, tensor in zip(gradients, (input, offset, mask, weight), strict=True)
    ]
    return grad_input, grad_offset, grad_mask, grad_weight


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
    mask_logits: bool = False,
    samples: Tensor | None = None,
) -> tuple[Tensor, ...]:
    grads = []
    for tensor, need in zip((input, offset, mask, weight), needs, strict=True):
        if tensor is None or not need:
            grads.append(input.new_empty(0))
        else:
            grads.append(store_like(tensor.new_empty(tensor.shape), tensor))
    return tuple(grads)


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Switch autocast off where it is on; to do so costs more than to ask. Meta tensors have none."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return NO_CONTEXT


def store_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return `tensor` stored channels-last if `like` is, and not also contiguous; else contiguous.

    Under vmap, `is_contiguous(memory_format=...)` raises an error; a permuted view answers the same question.
    """
    if not like.is_contiguous() and like.permute(0, 2, 3, 1).is_contiguous():
        channels_last = tensor.permute(0, 2, 3, 1)
        if channels_last.is_contiguous():
            return tensor
        return channels_last.contiguous().permute(0, 3, 1, 2)
    return tensor.contiguous()


@cache
def _module_of(backend: str) -> ModuleType:
    """Return the module of a backend. Triton's is imported at its first use: the other runs without triton."""
    if backend == "torch":
        return torch_backend
    if backend == "triton":
        from triton_dcn import triton_backend

        return triton_backend
    raise ValueError(f"backend: expected 'triton' or 'torch', got {backend!r}")


def _empty_gradient(tensor: Tensor, backend: str) -> Tensor:
    """Allocate the gradient of offset or mask, contiguous for the Triton kernels, else stored like `tensor`."""
    gradient = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return gradient if backend == "triton" else store_like(gradient, tensor)


def _define(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Define the operator `triton_dcn::name`, its implementation for all devices and that for fake tensors."""
    LIBRARY.define(name + torch.library.infer_schema(run, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))

    # torch.compile must not look into it; unlike torch.compiler.disable, this does not import the compiler at once
    uncompiled = _disable_dynamo(run)
    LIBRARY.impl(name, uncompiled, "CompositeExplicitAutograd")
    torch.library.register_fake(f"triton_dcn::{name}", fake, lib=LIBRARY)
    operator: torch._ops.OpOverload = getattr(torch.ops.triton_dcn, name).default
    return operator


forward_op = _define("deform_conv2d", _run_forward, _forward_fake)
forward_with_samples_op = _define("deform_conv2d_with_samples", _run_forward_with_samples, _forward_with_samples_fake)
backward_op = _define("deform_conv2d_backward", _run_backward, _backward_fake)


class _Convolution(torch.autograd.Function):
    """`forward_op` and its gradients."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Run the operator, or the one that also returns the samples, which the Triton kernels use once more.

        Args:
            ctx: of autograd.
            arguments: input, offset, mask, weight, bias, and a tuple of the settings that follow them.
        """
        input, offset, mask, weight, bias, settings = arguments
        stride, padding, dilation, backend, mask_logits, relu = settings
        tensors = (input, offset, mask, weight, bias)
        samples = None
        output: Tensor
        with torch._C._AutoDispatchBelowAutograd():
            if backend == "triton" and True in ctx.needs_input_grad[:4]:
                output, samples = forward_with_samples_op(*tensors, stride, padding, dilation, mask_logits, relu)
            else:
                output = forward_op(*tensors, *settings)
        ctx.save_for_backward(input, offset, mask, weight, output if relu else None, samples)
        ctx.settings = (stride, padding, dilation, backend)
        ctx.mask_logits = mask_logits
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the tensors."""
        input, offset, mask, weight, rectified_output, samples = ctx.saved_tensors
        if rectified_output is not None:
            # not "> 0", because NaN passes the gradient on, as in torch
            grad_output = torch.where(rectified_output <= 0, 0, grad_output)

        needs = list(ctx.needs_input_grad[:4])
        grads: list[Tensor | None] = [None] * 4
        if True in needs:
            tensors = (grad_output, input, offset, mask, weight)
            computed = backward_op(*tensors, *ctx.settings, needs, ctx.mask_logits, samples)
            grads = [grad if need else None for grad, need in zip(computed, needs, strict=True)]

        grad_bias = grad_output.sum((0, 2, 3), dtype=ctx.bias_dtype) if ctx.needs_input_grad[4] else None
        return *grads, grad_bias, None  # no gradient of the settings


class _Gradients(torch.autograd.Function):
    """`backward_op`, which has no gradients."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """Run the operator; the arguments are its own."""
        with torch._C._AutoDispatchBelowAutograd():
            grads: tuple[Tensor, ...] = backward_op(*arguments)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Raise an error."""
        raise NotImplementedError("deform_conv2d has no second derivatives: use backend='reference'")


def _autograd_forward(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    backend: str,
    mask_logits: bool = False,
    relu: bool = False,
) -> Tensor:
    """Do what the dispatcher does for `forward_op` where a tensor may need a gradient."""
    settings = (stride, padding, dilation, backend, mask_logits, relu)
    if _records_gradients(input, offset, mask, weight, bias):
        output: Tensor = _Convolution.apply(input, offset, mask, weight, bias, settings)  # type: ignore[no-untyped-call]
        return output
    with torch._C._AutoDispatchBelowAutograd():
        output = forward_op(input, offset, mask, weight, bias, *settings)
    return output


def _autograd_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Do what the dispatcher does for `backward_op`, whose first five arguments are tensors."""
    if _records_gradients(*arguments[:5]):
        grads: tuple[Tensor, ...] = _Gradients.apply(*arguments)  # type: ignore[no-untyped-call]
        return grads
    with torch._C._AutoDispatchBelowAutograd():
        grads = backward_op(*arguments)
    return grads


def _records_gradients(*tensors: Tensor | None) -> bool:
    """Tell whether autograd is on, and one of the tensors takes part."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


LIBRARY.impl("deform_conv2d", _autograd_forward, "Autograd")
LIBRARY.impl("deform_conv2d_backward", _autograd_backward, "Autograd")


def _vmap_forward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Run all elements as one batch where they share weight and bias; else one element after the other.

    Args:
        info: `info.batch_size` is the number of elements.
        in_dims: the mapped dimension of each argument, None where all elements share it.
        arguments: of `forward_op`; the first five are the tensors.

    Returns:
        The outputs, and the dimension along which they are stacked.
    """
    tensors = arguments[:5]
    settings = arguments[5:]
    dims = in_dims[:5]
    weight_dim, bias_dim = dims[3:]

    if weight_dim is None and bias_dim is None:
        weight, bias = tensors[3:]
        folded = [_fold(tensor, dim, info.batch_size) for tensor, dim in zip(tensors[:3], dims[:3], strict=True)]
        output = forward_op(*folded, weight, bias, *settings)
        return _unfold(output, info.batch_size), 0

    outputs = [forward_op(*element, *settings) for element in _elements(tensors, dims, info.batch_size)]
    return torch.stack(outputs), 0


def _vmap_backward(
    info: Any, in_dims: tuple[Any, ...], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Do as `_vmap_forward`; the gradient of the weight needs one call per element, because each has its own."""
    tensors = arguments[:5]
    settings = arguments[5:11]  # without the samples, which are not those of the elements
    needs = settings[4]
    dims = in_dims[:5]
    weight_dim = dims[4]
    needs_weight = needs[3]

    if weight_dim is None and not needs_weight:
        folded = [_fold(tensor, dim, info.batch_size) for tensor, dim in zip(tensors[:4], dims[:4], strict=True)]
        folded_grads = backward_op(*folded, tensors[4], *settings)
        grads = [
            _unfold(grad, info.batch_size) if need else grad for grad, need in zip(folded_grads, needs, strict=True)
        ]
    else:
        grads_of_elements = [backward_op(*element, *settings) for element in _elements(tensors, dims, info.batch_size)]
        grads = [
            torch.stack(grads_of_tensor) if need else grads_of_tensor[0]
            for grads_of_tensor, need in zip(zip(*grads_of_elements, strict=True), needs, strict=True)
        ]
    out_dims = tuple(0 if need else None for need in needs)
    return tuple(grads), out_dims


def _fold(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Move the mapped dimension into the batch; repeat what all elements share."""
    if tensor is None:
        return None
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _unfold(tensor: Tensor, size: int) -> Tensor:
    """Undo `_fold`."""
    return tensor.reshape(size, tensor.shape[0] // size, *tensor.shape[1:])


def _elements(
    tensors: tuple[Tensor | None, ...], dims: tuple[int | None, ...], size: int
) -> Iterator[list[Tensor | None]]:
    """Yield the tensors of one element after the other."""
    for index in range(size):
        element = []
        for tensor, dim in zip(tensors, dims, strict=True):
            if tensor is not None and dim is not None:
                tensor = tensor.select(dim, index)
            element.append(tensor)
        yield element


torch.library.register_vmap("triton_dcn::deform_conv2d", _vmap_forward, lib=LIBRARY)
torch.library.register_vmap("triton_dcn::deform_conv2d_backward", _vmap_backward, lib=LIBRARY)

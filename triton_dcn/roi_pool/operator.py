"""The `torch.library` operators of RoI pooling, with and without an offset: one forward, one backward.

Receive checked tensors and the name of a backend from `roi_pool.functional`, hand them on to the backend as a
`RoIPoolGeometry`. All levels of a pyramid go through one call.

For the gradient of an offset the forward operator also returns the features as the one table that it reads, so that the
backward operator need not copy them again.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from triton_dcn.roi_pool import torch_backend
from triton_dcn.roi_pool.geometry import RoIPoolGeometry
from triton_dcn.vmapping import fold, unfold


@cache
def _module_of(backend: str) -> ModuleType:
    """Return the module of a backend. Triton's is imported at its first use: the other runs without triton."""
    if backend == "torch":
        return torch_backend
    if backend == "triton":
        from triton_dcn.roi_pool.kernels import launchers

        return launchers
    raise ValueError(f"backend: expected 'triton' or 'torch', got {backend!r}")


def needs_gradient(offset: Tensor | None) -> bool:
    """Tell whether autograd is on and the offset takes part: then `forward_op` has to keep the cells."""
    return offset is not None and offset.requires_grad and torch.is_grad_enabled()


@torch.library.custom_op("triton_dcn::roi_pool", mutates_args=())
def forward_op(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None,
    scales: list[float],
    output_size: list[int],
    sampling_ratio: int,
    gamma: float,
    backend: str,
    keep_cells: bool,
) -> tuple[Tensor, Tensor]:
    """Pool; the arguments are those of `roi_pool.functional.roi_pool`, and `keep_cells`.

    Returns:
        The pooled features; and, with `keep_cells`, the table (N, C) of all cells for `backward_op`: level after level,
        each in (B, Hl, Wl) order. An empty tensor takes its place if it is not asked for.
    """
    geometry = RoIPoolGeometry(
        batch=features[0].shape[0],
        heights=tuple([feature.shape[2] for feature in features]),
        widths=tuple([feature.shape[3] for feature in features]),
        scales=tuple(scales),
        bins=(output_size[0], output_size[1]),
        sampling_ratio=sampling_ratio,
        gamma=gamma,
    )
    pooled, cells = _module_of(backend).forward(geometry, features, rois, levels, offset, keep_cells=keep_cells)
    return pooled, features[0].new_empty(0) if cells is None else cells


@forward_op.register_fake
def _forward_fake(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None,
    scales: list[float],
    output_size: list[int],
    sampling_ratio: int,
    gamma: float,
    backend: str,
    keep_cells: bool,
) -> tuple[Tensor, Tensor]:
    first = features[0]
    pooled = first.new_empty(rois.shape[0], *output_size, first.shape[1]).permute(0, 3, 1, 2)
    if not keep_cells:
        return pooled, first.new_empty(0)
    num_cells = sum(first.shape[0] * feature.shape[2] * feature.shape[3] for feature in features)
    return pooled, first.new_empty(num_cells, first.shape[1], dtype=_module_of(backend).table_dtype(first.dtype))


@torch.library.custom_op("triton_dcn::roi_pool_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    cells: Tensor | None,
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None,
    batch: int,
    heights: list[int],
    widths: list[int],
    scales: list[float],
    sampling_ratio: int,
    gamma: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the features and of the offset.

    Args:
        grad: (R, C, Ph, Pw).
        cells: (N, C) of `forward_op`, where the gradient of the offset is needed; else None.
        rois, levels, offset, scales, sampling_ratio, gamma, backend: as in `forward_op`.
        batch, heights, widths: sizes of the features.
        needs: whether the gradient of the features is needed, and that of the offset.

    Returns:
        The gradient of all levels as one (N, C) table: level after level, each in (B, Hl, Wl) order; and that of the
        offset. Empty tensors take the place of what is not needed.
    """
    geometry = RoIPoolGeometry(
        batch=batch,
        heights=tuple(heights),
        widths=tuple(widths),
        scales=tuple(scales),
        bins=(grad.shape[2], grad.shape[3]),
        sampling_ratio=sampling_ratio,
        gamma=gamma,
    )
    needs_features, needs_offset = needs
    table, grad_offset = _module_of(backend).backward(
        geometry, grad, cells, rois, levels, offset, needs_features=needs_features, needs_offset=needs_offset
    )
    return (
        grad.new_empty(0) if table is None else table,
        grad.new_empty(0) if grad_offset is None else grad_offset,
    )


@backward_op.register_fake
def _backward_fake(
    grad: Tensor,
    cells: Tensor | None,
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None,
    batch: int,
    heights: list[int],
    widths: list[int],
    scales: list[float],
    sampling_ratio: int,
    gamma: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    num_cells = sum(batch * height * width for height, width in zip(heights, widths, strict=True))
    needs_features, needs_offset = needs
    table = grad.new_empty(num_cells, grad.shape[1]) if needs_features else grad.new_empty(0)
    if not needs_offset or offset is None:
        return table, grad.new_empty(0)
    return table, offset.new_empty(offset.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, rois, levels, offset, scales, _, sampling_ratio, gamma, backend, keep_cells = inputs
    _, cells = output
    ctx.set_materialize_grads(False)
    ctx.needs = [any(feature.requires_grad for feature in features), keep_cells]
    ctx.save_for_backward(rois, levels, offset, cells if keep_cells else None)
    ctx.batch = features[0].shape[0]
    ctx.heights = [feature.shape[2] for feature in features]
    ctx.widths = [feature.shape[3] for feature in features]
    ctx.settings = (scales, sampling_ratio, gamma, backend)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    grad_features: list[Tensor | None] = [None] * len(ctx.heights)
    if grad is None:
        return grad_features, *[None] * 9
    rois, levels, offset, cells = ctx.saved_tensors
    needs_features, needs_offset = ctx.needs
    if ctx.needs_input_grad[3] and not needs_offset:
        raise RuntimeError("offset: expected one that needs no gradient, as when the graph was made without gradients")
    table, grad_offset = backward_op(
        grad, cells, rois, levels, offset, ctx.batch, ctx.heights, ctx.widths, *ctx.settings, ctx.needs
    )
    if needs_features:
        sizes = list(zip(ctx.heights, ctx.widths, strict=True))
        level_tables = table.split([ctx.batch * height * width for height, width in sizes])
        for level, (height, width) in enumerate(sizes):
            channels_last = level_tables[level].view(ctx.batch, height, width, table.shape[1])
            grad_features[level] = channels_last.permute(0, 3, 1, 2)
    return grad_features, None, None, grad_offset if needs_offset else None, *[None] * 6


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.has_offset = inputs[4] is not None


def _second_backward(ctx: Any, *grads: Tensor) -> None:
    if ctx.has_offset:
        raise NotImplementedError("deform_roi_pool has no second derivatives: use backend='reference'")
    raise NotImplementedError("roi_align has no second derivatives")


forward_op.register_autograd(_backward, setup_context=_setup_context)
backward_op.register_autograd(_second_backward, setup_context=_setup_second)


def _vmap_forward(
    info: Any, in_dims: tuple[Any, ...], *arguments: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
    """Run all elements as one call: their rois one after the other and, where features differ, more images.

    Args:
        info: `info.batch_size` is the number of elements.
        in_dims: the mapped dimension of each argument, None where all elements share it.
        arguments: of `forward_op`.

    Returns:
        The pooled features and the table of all cells, which is that of no element; the dimension along which they are
        stacked.
    """
    features, rois, levels, offset, *settings, _ = arguments
    feature_dims, roi_dim, level_dim, offset_dim = in_dims[:4]
    elements = info.batch_size
    folded_rois = fold(rois, roi_dim, elements)
    if any(dim is not None for dim in feature_dims):
        batch = features[0].shape[0] if feature_dims[0] is None else features[0].movedim(feature_dims[0], 0).shape[1]
        folded_rois = _images_apart(folded_rois, batch, elements)
        features = [fold(feature, dim, elements) for feature, dim in zip(features, feature_dims, strict=True)]
    folded_levels = fold(levels, level_dim, elements)
    folded_offset = None if offset is None else fold(offset, offset_dim, elements)
    keep_cells = needs_gradient(folded_offset)  # not so for `offset`, whose gradient is not known inside of vmap
    pooled, cells = forward_op(features, folded_rois, folded_levels, folded_offset, *settings, keep_cells)
    return (unfold(pooled, elements), cells), (0, None)


def _vmap_backward(
    info: Any, in_dims: tuple[Any, ...], *arguments: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]:
    """Do as `_vmap_forward`: each element has images of its own, because it has a gradient of its own."""
    grad, cells, rois, levels, offset, batch, heights, widths, *settings, needs = arguments
    grad_dim, cells_dim, roi_dim, level_dim, offset_dim = in_dims[:5]
    elements = info.batch_size
    level_cells = [batch * height * width for height, width in zip(heights, widths, strict=True)]
    if cells is not None:
        tables = cells.split(level_cells, 0 if cells_dim != 0 else 1)
        cells = torch.cat([fold(level_table, cells_dim, elements) for level_table in tables])
    table, grad_offset = backward_op(
        fold(grad, grad_dim, elements),
        cells,
        _images_apart(fold(rois, roi_dim, elements), batch, elements),
        fold(levels, level_dim, elements),
        None if offset is None else fold(offset, offset_dim, elements),
        batch * elements,
        heights,
        widths,
        *settings,
        needs,
    )
    needs_features, needs_offset = needs
    if needs_features:
        tables = table.split([elements * count for count in level_cells])
        table = torch.cat([unfold(level_table, elements) for level_table in tables], 1)
    if needs_offset:
        grad_offset = unfold(grad_offset, elements)
    return (table, grad_offset), (0 if needs_features else None, 0 if needs_offset else None)


def _images_apart(rois: Tensor, batch: int, elements: int) -> Tensor:
    """Let the rois of the i-th element refer to the i-th `batch` images; -1 where they referred to none."""
    rois = rois.to(torch.promote_types(rois.dtype, torch.float32))  # in half precision few integers exist
    image = rois[:, 0].view(elements, -1)
    first_image = batch * torch.arange(elements, device=rois.device)[:, None]
    exists = (image >= 0) & (image < batch)  # not so for NaN
    image = torch.where(exists, image + first_image, -1).flatten()
    return torch.cat([image[:, None], rois[:, 1:]], 1)


forward_op.register_vmap(_vmap_forward)
backward_op.register_vmap(_vmap_backward)

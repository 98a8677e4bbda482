"""What mmcv's and torchvision's calls have beside ours: groups as arguments, and maps larger than the output.

Letters: B images, D offset groups, K kernel taps, Ho Wo output.
"""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function

from triton_dcn.functional import are_tensors, untraced
from triton_dcn.geometry import check_minimum, conv_output_size

IntPair = tuple[int, int]


def check_groups(
    input: Tensor, offset: Tensor, weight: Tensor, groups: int, offset_groups: int, name: str = "deform_groups"
) -> None:
    """Check the arguments that say in other libraries what here follows from the shapes.

    Args:
        input, offset, weight: as in `triton_dcn.deform_conv2d`, which refuses other numbers of dimensions.
        groups, offset_groups: G and D as they were given.
        name: what the library calls `offset_groups`.

    Raises:
        ValueError: the shapes say something else.
    """
    if input.dim() != 4 or offset.dim() != 4 or weight.dim() != 4 or 0 in weight.shape:
        return
    _, channels_per_group, kernel_height, kernel_width = weight.shape
    counts = (
        ("groups", groups, input.shape[1] / channels_per_group),
        (name, offset_groups, offset.shape[1] / (2 * kernel_height * kernel_width)),
    )
    for argument, count, count_by_shapes in counts:
        if count != count_by_shapes:
            raise ValueError(f"{argument}: expected {count_by_shapes:g} by the shapes, got {count}")


def read_map(
    name: str,
    values: Tensor,
    channels_per_tap: int,
    deform_groups: int,
    input: Tensor,
    weight: Tensor,
    stride: IntPair,
    padding: IntPair,
    dilation: IntPair,
) -> Tensor:
    """Return offsets or masks as mmcv's operator of version 2 reads them, also from a map larger than the output.

    Its kernel takes the first channels * Ho * Wo numbers of each image for the map, whatever the map's height and width
    are. Published networks were trained with it: DyHead and GLIP give a layer the offsets of a map of twice its size,
    DB gives a layer of stride 2 those of its input.

    Args:
        name: "offset" or "mask", for messages.
        values: (B, channels, h, w) with channels = `channels_per_tap` * D * K and h * w >= Ho * Wo. A view is read in
            the order of its indices, wherever its numbers are in memory.
        channels_per_tap: 2 for offsets, 1 for masks.
        deform_groups: D.
        input, weight, stride, padding, dilation: as in `triton_dcn.deform_conv2d`; the last three as (y, x).

    Returns:
        (B, channels, Ho, Wo); `values` itself where it has this size, or where the operator refuses the call.

    Raises:
        ValueError: `values` has other channels, or too few numbers.

    Source:
        modulated_deform_conv_cuda_kernel.cuh of mmcv.
    """
    if not are_tensors((), input=input, weight=weight, **{name: values}):
        arguments = (name, values, channels_per_tap, deform_groups, input, weight, stride, padding, dilation)
        output: Tensor = handle_torch_function(read_map, (values, input, weight), *arguments)
        return output

    if not untraced(
        _is_larger, name, values, channels_per_tap, deform_groups, input, weight, stride, padding, dilation
    ):
        return values
    # torch.jit.trace sees these sizes, so that what it records takes others
    channels = values.shape[1]
    height, width = conv_output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    first_numbers = values.flatten(1)[:, : channels * height * width]
    return first_numbers.view(-1, channels, height, width)


def _is_larger(
    name: str,
    values: Tensor,
    channels_per_tap: int,
    deform_groups: int,
    input: Tensor,
    weight: Tensor,
    stride: IntPair,
    padding: IntPair,
    dilation: IntPair,
) -> bool:
    """Check the arguments of `read_map`, and tell whether the map is larger than the output."""
    if values.dim() != 4 or input.dim() != 4 or weight.dim() != 4:
        return False
    check_minimum("stride", stride, 1)
    taps = weight.shape[2] * weight.shape[3]
    channels = channels_per_tap * deform_groups * taps
    if values.shape[1] != channels:
        raise ValueError(
            f"{name}: expected {channels} channels for {taps} taps and deform_groups = {deform_groups}, "
            f"got {values.shape[1]} channels"
        )

    height, width = conv_output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    if height < 1 or width < 1 or values.shape[2:] == (height, width):
        return False
    if values.shape[2] * values.shape[3] < height * width:
        raise ValueError(
            f"{name}: expected at least {height * width} numbers for each channel and image, as many as the output of "
            f"{height}x{width} has, got a map of {values.shape[2]}x{values.shape[3]}"
        )
    return True

"""Narrow channel groups joined: the same convolution with fewer groups, whose weight has zeros between those joined.

Both backends do so, each with widths of its own: columns of a few channels are written and multiplied slowly.

Letters: O output and C input channels, G channel groups of which `joined` neighbors become one, kh kw kernel.
"""

from __future__ import annotations

from torch import Tensor


def groups_to_join(groups: int, channels: int, least: int) -> int:
    """Return how many neighboring groups become one, so that it has at least so many channels: a divisor of `groups`.

    Args:
        groups: G.
        channels: input channels of a group.
        least: of a group after the joining; all groups become one if they have fewer.
    """
    divisors = [count for count in range(1, groups + 1) if groups % count == 0]
    return next((count for count in divisors if count * channels >= least), groups)


def join_weight(weight: Tensor, groups: int, joined: int) -> Tensor:
    """Return the weight (O, C/G, kh, kw) for joined groups, (O, joined*C/G, kh, kw), stored channels-last."""
    if joined == 1:
        return weight
    apart = weight.unflatten(0, (groups // joined, joined, -1))
    count, _, out_per_group, per_group, *kernel = apart.shape
    together = weight.new_zeros(count, joined, out_per_group, *kernel, joined, per_group)
    together.diagonal(dim1=1, dim2=5).copy_(apart.permute(0, 2, 4, 5, 3, 1))
    return together.view(weight.shape[0], *kernel, -1).permute(0, 3, 1, 2)


def split_weight(weight: Tensor, groups: int, joined: int) -> Tensor:
    """Undo `join_weight`: return the weight (O, C/G, kh, kw) in that of joined groups; other entries are left out."""
    if joined == 1:
        return weight
    together = weight.unflatten(0, (groups // joined, joined, -1)).unflatten(3, (joined, -1))
    apart: Tensor = together.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 2)
    return apart

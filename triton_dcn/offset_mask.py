"""`OffsetMask`, the offsets and masks of a call as one thing, and `OffsetMaskGrad`, which receives their gradients.

A layer of version 2 predicts both in one map of 3*D*K channels: the first two thirds are the offsets, the last third
holds the logits of the mask. `functional` and the operator pass that map on whole, as `offset` with `mask_logits=True`;
`OffsetMask.of` splits it into views, and the backends see only these.

Letters: B images, D offset groups, K kernel taps, Ho Wo output.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class OffsetMask:
    """Where every tap samples, and how much its sample counts.

    Attributes:
        offset: (B, 2*D*K, Ho, Wo), pixels, (dy, dx) for each tap; the dtype of the input, or float32.
        mask: (B, D*K, Ho, Wo), multiplies the samples; the same dtypes; None in version 1.
        mask_logits: `mask` holds logits, whose sigmoid multiplies the samples.
    """

    offset: Tensor
    mask: Tensor | None
    mask_logits: bool = False

    @staticmethod
    def of(offset: Tensor, mask: Tensor | None, mask_logits: bool) -> OffsetMask:
        """Build it from the arguments of a call, without a copy.

        Args:
            offset: (B, 2*D*K, Ho, Wo); with `mask_logits`, (B, 3*D*K, Ho, Wo), its last third the logits of the mask.
            mask: (B, D*K, Ho, Wo) or None; with `mask_logits`, it is ignored.
            mask_logits: whether `offset` also holds the logits of the mask.
        """
        if mask_logits:
            offset, mask = _split_logits(offset)
        return OffsetMask(offset, mask, mask_logits)

    def images(self, images: slice) -> OffsetMask:
        """Select some images, as views."""
        mask = None if self.mask is None else self.mask[images]
        return OffsetMask(self.offset[images], mask, self.mask_logits)

    def modulation(self) -> Tensor | None:
        """Return what multiplies each sample, (B, D*K, Ho, Wo), or None in version 1."""
        if self.mask is not None and self.mask_logits:
            return self.mask.sigmoid()
        return self.mask


@dataclass(frozen=True)
class OffsetMaskGrad:
    """Tensors that a backward pass fills with the gradients of an `OffsetMask`; None where no gradient is needed.

    Attributes:
        offset: shape and dtype of `OffsetMask.offset`.
        mask: shape and dtype of `OffsetMask.mask`.
        mask_logits: `mask` receives the gradient of the logits.
    """

    offset: Tensor | None
    mask: Tensor | None
    mask_logits: bool = False

    @staticmethod
    def of(offset: Tensor | None, mask: Tensor | None, mask_logits: bool) -> OffsetMaskGrad:
        """Build it from the gradients of a call, which have the layout of the arguments of `OffsetMask.of`."""
        if mask_logits and offset is not None:
            offset, mask = _split_logits(offset)
        return OffsetMaskGrad(offset, mask, mask_logits)

    @property
    def needed(self) -> bool:
        """Whether there is anything to fill."""
        return self.offset is not None or self.mask is not None

    def images(self, images: slice) -> OffsetMaskGrad:
        """Select some images, as views."""
        offset = None if self.offset is None else self.offset[images]
        mask = None if self.mask is None else self.mask[images]
        return OffsetMaskGrad(offset, mask, self.mask_logits)


def _split_logits(offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of (B, 3*D*K, Ho, Wo): the offsets (B, 2*D*K, Ho, Wo) and the mask logits (B, D*K, Ho, Wo)."""
    groups_and_taps = offset.shape[1] // 3
    return offset[:, : 2 * groups_and_taps], offset[:, 2 * groups_and_taps :]

"""What the samples of a call are taken by: offsets and mask as one thing, and the tensors that receive their gradients.

A layer of version 2 predicts both in one map of 3*D*K channels: the first two thirds are the offsets, the last third
holds the logits of the mask. `functional` and the operator pass that map on whole, as `offset` with `mask_logits=True`;
`OffsetMask.of` takes it apart, as views, and the backends see the parts only.

Letters: B images, D offset groups, K kernel taps, Ho Wo output.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class OffsetMask:
    """Where every tap samples, and how much its sample counts.

    Attributes:
        offset: (B, 2*D*K, Ho, Wo), pixels, (dy, dx) for each tap.
        mask: (B, D*K, Ho, Wo), multiplies the samples; None in version 1.
        mask_logits: the samples are multiplied by the sigmoid of `mask`.
    """

    offset: Tensor
    mask: Tensor | None
    mask_logits: bool = False

    @staticmethod
    def of(offset: Tensor, mask: Tensor | None, mask_logits: bool) -> OffsetMask:
        """Return the parts of what a caller passes.

        Args:
            offset: (B, 2*D*K, Ho, Wo); with `mask_logits`, (B, 3*D*K, Ho, Wo), its last third the logits of the mask.
            mask: (B, D*K, Ho, Wo) or None; with `mask_logits`, it is not looked at.
            mask_logits: whether `offset` holds the mask, too.
        """
        if mask_logits:
            offset, mask = _split_logits(offset)
        return OffsetMask(offset, mask, mask_logits)

    def images(self, images: slice) -> OffsetMask:
        """Return the part of some images, as views."""
        mask = None if self.mask is None else self.mask[images]
        return OffsetMask(self.offset[images], mask, self.mask_logits)

    def modulation(self) -> Tensor | None:
        """Return the factor of each sample, (B, D*K, Ho, Wo), or None in version 1."""
        if self.mask is not None and self.mask_logits:
            return self.mask.sigmoid()
        return self.mask


@dataclass(frozen=True)
class OffsetMaskGrad:
    """Tensors that a backward pass fills with the gradients of an `OffsetMask`; None where no gradient is needed.

    Attributes:
        offset: shape of `OffsetMask.offset`.
        mask: shape of `OffsetMask.mask`.
        mask_logits: `mask` receives the gradient of the logits.
    """

    offset: Tensor | None
    mask: Tensor | None
    mask_logits: bool = False

    @staticmethod
    def of(offset: Tensor | None, mask: Tensor | None, mask_logits: bool) -> OffsetMaskGrad:
        """Return the parts of what a caller receives, laid out as the arguments of `OffsetMask.of`."""
        if mask_logits and offset is not None:
            offset, mask = _split_logits(offset)
        return OffsetMaskGrad(offset, mask, mask_logits)

    @property
    def needed(self) -> bool:
        """Whether there is anything to fill."""
        return self.offset is not None or self.mask is not None

    def images(self, images: slice) -> OffsetMaskGrad:
        """Return the part of some images, as views."""
        offset = None if self.offset is None else self.offset[images]
        mask = None if self.mask is None else self.mask[images]
        return OffsetMaskGrad(offset, mask, self.mask_logits)


def _split_logits(offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of (B, 3*D*K, Ho, Wo): the offsets (B, 2*D*K, Ho, Wo) and the mask logits (B, D*K, Ho, Wo)."""
    groups_and_taps = offset.shape[1] // 3
    return offset[:, : 2 * groups_and_taps], offset[:, 2 * groups_and_taps :]

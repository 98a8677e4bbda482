"""Where every tap samples and how much its sample counts: what a layer predicts, or is given, as one thing.

Letters: B images, D offset groups, K kernel taps, Ho Wo output.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class OffsetMask:
    """Offsets and mask of the samples, or, with the same shapes, their gradients.

    Attributes:
        offset: (B, 2*D*K, Ho, Wo), pixels, (dy, dx) for each tap.
        mask: (B, D*K, Ho, Wo), multiplies the samples; None in version 1.
        mask_logits: the mask is the sigmoid of `mask`.
    """

    offset: Tensor
    mask: Tensor | None
    mask_logits: bool = False

    @staticmethod
    def unpack(packed: Tensor) -> OffsetMask:
        """View the map that a layer of version 2 predicts: offsets, then mask logits.

        Args:
            packed: (B, 3*D*K, Ho, Wo).
        """
        groups_and_taps = packed.shape[1] // 3
        return OffsetMask(packed[:, : 2 * groups_and_taps], packed[:, 2 * groups_and_taps :], mask_logits=True)

    def images(self, images: slice) -> OffsetMask:
        """Return the part of some images."""
        mask = None if self.mask is None else self.mask[images]
        return OffsetMask(self.offset[images], mask, self.mask_logits)

    def modulation(self) -> Tensor | None:
        """Return the factor of each sample, (B, D*K, Ho, Wo), or None in version 1."""
        if self.mask is not None and self.mask_logits:
            return self.mask.sigmoid()
        return self.mask

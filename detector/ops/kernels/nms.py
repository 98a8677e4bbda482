"""Non-maximum suppression on a GPU: G groups at once, fixed shapes, nothing read back by the host.

Receives checked tensors from `detector.ops.nms` and returns which boxes are kept.

Letters: G groups, M boxes per group, W = ceil(M / 64) blocks of 64 boxes. First the boxes of each group are sorted by
descending score. One kernel compares all pairs of blocks in parallel and packs the answers into 64-bit words,

    words (G, W, 64 * W) int64    bit j of words[g, b, i]: box i suppresses box 64 * b + j, which comes later

and one program per group then goes through the blocks: the bitwise or over a row of words says what the kept boxes of
earlier blocks suppress, and inside a block the rule is repeated on all 64 boxes until nothing changes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(64)  # boxes per word
WORDS_PER_READ = tl.constexpr(256)  # words that the sweep reads at once


@triton.jit
def bitwise_or(a, b):
    """Return a | b: the function that `tl.reduce` combines words with."""
    return a | b


@triton.jit(do_not_specialize=["size", "blocks"])
def nms_overlap_kernel(words_ptr, boxes_ptr, counts_ptr, size, blocks, THRESHOLD: tl.constexpr):
    """Pack which boxes of one block suppress which of another.

    Grid: (G * W, W); one program owns the pairs (earlier block, later block) of one group.
    Reads: boxes (G, M, 4) float32 or float64, sorted; counts (G,) int32, boxes of the group that matter.
    Writes: words of block pairs below the count where later >= earlier; the sweep reads no others.
    """
    group = (tl.program_id(0) // blocks).to(tl.int64)
    earlier = tl.program_id(0) % blocks * BLOCK
    later = tl.program_id(1) * BLOCK
    count = tl.load(counts_ptr + group)
    if (later >= earlier) & (later < count):
        i = earlier + tl.arange(0, BLOCK)
        j = later + tl.arange(0, BLOCK)
        a_ptr = boxes_ptr + (group * size + i) * 4
        b_ptr = boxes_ptr + (group * size + j) * 4
        ax1 = tl.load(a_ptr, mask=i < count, other=0.0)
        ay1 = tl.load(a_ptr + 1, mask=i < count, other=0.0)
        ax2 = tl.load(a_ptr + 2, mask=i < count, other=0.0)
        ay2 = tl.load(a_ptr + 3, mask=i < count, other=0.0)
        bx1 = tl.load(b_ptr, mask=j < count, other=0.0)
        by1 = tl.load(b_ptr + 1, mask=j < count, other=0.0)
        bx2 = tl.load(b_ptr + 2, mask=j < count, other=0.0)
        by2 = tl.load(b_ptr + 3, mask=j < count, other=0.0)

        width = tl.minimum(ax2[:, None], bx2[None, :]) - tl.maximum(ax1[:, None], bx1[None, :])
        height = tl.minimum(ay2[:, None], by2[None, :]) - tl.maximum(ay1[:, None], by1[None, :])
        inter = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)  # (BLOCK, BLOCK)
        area_a = (ax2 - ax1) * (ay2 - ay1)
        area_b = (bx2 - bx1) * (by2 - by1)
        union = area_a[:, None] + area_b[None, :] - inter
        iou = inter / union if inter.dtype == tl.float64 else tl.div_rn(inter, union)  # rounded as on the CPU

        suppresses = (iou > THRESHOLD) & (i[:, None] < j[None, :])
        bits = suppresses.to(tl.int64) << tl.arange(0, BLOCK)[None, :].to(tl.int64)
        row = group * blocks + tl.program_id(1)
        tl.store(words_ptr + row * (blocks * BLOCK) + i, tl.sum(bits, axis=1), mask=i < count)


@triton.jit(do_not_specialize=["size", "blocks"])
def nms_sweep_kernel(keep_ptr, words_ptr, live_ptr, counts_ptr, size, blocks):
    """Decide block by block which boxes of a group stay.

    Grid: (G,); one program owns a group.
    Reads: words as written by `nms_overlap_kernel`; live (G, M) bool, boxes that take part; counts (G,) int32.
    Writes: keep (G, M) bool, up to the count; it also reads back what it wrote for earlier blocks.
    """
    group = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + group)
    lane = tl.arange(0, BLOCK)
    for block in range(0, tl.cdiv(count, BLOCK)):
        begin = block * BLOCK
        row_ptr = words_ptr + (group * blocks + block) * (blocks * BLOCK)

        # What the kept boxes of earlier blocks suppress in this one.
        kept_words = tl.zeros((WORDS_PER_READ,), tl.int64)
        for first in range(0, begin, WORDS_PER_READ):
            i = first + tl.arange(0, WORDS_PER_READ)
            kept = tl.load(keep_ptr + group * size + i, mask=i < begin, other=0)
            kept_words |= tl.load(row_ptr + i, mask=(i < begin) & (kept != 0), other=0)
        suppressed = (tl.reduce(kept_words, 0, bitwise_or) >> lane.to(tl.int64)) & 1  # (BLOCK,)

        # The rule inside the block.
        inside = begin + lane < count
        live = tl.load(live_ptr + group * size + begin + lane, mask=inside, other=0)
        candidate = tl.where((suppressed == 0) & (live != 0), 1, 0)
        word = tl.load(row_ptr + begin + lane, mask=inside, other=0)
        suppresses = ((word[:, None] >> lane[None, :].to(tl.int64)) & 1).to(tl.int32)  # (BLOCK earlier, BLOCK later)
        keep = candidate
        changes = 1
        while changes > 0:
            new_keep = tl.where(tl.max(suppresses * keep[:, None], axis=0) > 0, 0, candidate)
            changes = tl.sum(tl.where(new_keep != keep, 1, 0))
            keep = new_keep
        tl.store(keep_ptr + group * size + begin + lane, keep.to(tl.int8), mask=inside)
        tl.debug_barrier()


def batched_nms(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    """Suppress inside each group; see `detector.ops.nms.batched_nms`. Returns (G, M) bool."""
    groups, size = scores.shape
    keep = torch.zeros(groups, size, dtype=torch.int8, device=scores.device)  # the sweep writes only up to the count
    if keep.numel() == 0:
        return keep.bool()

    live = valid & ~scores.isnan()
    order = scores.masked_fill(~live, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    live = live.gather(1, order)
    counts = (live * torch.arange(1, size + 1, device=live.device)).amax(1).int()  # up to the last live box
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))

    blocks = triton.cdiv(size, BLOCK.value)
    words = torch.empty(groups, blocks, blocks * BLOCK.value, dtype=torch.int64, device=boxes.device)
    with torch.cuda.device_of(boxes):
        nms_overlap_kernel[(groups * blocks, blocks)](
            words, boxes, counts, size, blocks, THRESHOLD=iou_threshold, num_warps=8, enable_fp_fusion=False
        )
        nms_sweep_kernel[(groups,)](keep, words, live.to(torch.int8), counts, size, blocks, num_warps=4)
    return torch.zeros_like(live).scatter_(1, order, keep.bool())

"""Where each sample lies: the kernel that turns offset and mask into sample arrays, and helpers for all kernels.

Receives offset and mask. Hands the sample arrays on to every other kernel; none of them reads an offset.

Letters: B images, C input channels, O output channels, H W input, K taps, G groups, D offset groups, M output positions
of the images at hand (B * Ho * Wo). PER_OFFSET is C/D, the channels that share an offset, and PER_GROUP is C/G. PACK is
the number of channels in one word of the input: 2 where pairs of bfloat16 channels are read as int32, see `widen`.

A plane is one (offset group, tap) of the D*K, and a sample is one position of a plane: number `plane * M + position` in
the sample arrays, which are (D*K, M):

    cell   int32    pixel << 4 | top << 3 | bottom << 2 | left << 1 | right
    ly, lx float32  y - floor(y) and x - floor(x), where the sample lies inside its cell
    scale  float32  the mask, 1 without one, 0 for a sample outside the image

The cell of a sample is the square of the four pixels around it, its corners. The flags say which of its two rows and
two columns are inside the image; `pixel` = (b * H + y) * W + x is the first corner that is inside. A sample outside the
image has no flags. Where one of the two rows (or columns) is outside, the other is read in its place, with weight zero:
so loads of corners need no mask. An infinite or NaN value of the input, of grad_output or of a mask may also reach
results that should not depend on it, because its product with a weight of zero is NaN.

In names, 00, 01, 10 and 11 are the corners: top left, top right, bottom left, bottom right. `stride_ob` is the stride
of offset along b, `stride_mx` that of mask along x; `stride_y` and `stride_x` are those of the convolution. Names that
begin with `live` tell which elements of a block exist. A row of a column buffer is one position of a chunk, counted
from `first_position`; a row of T is one input pixel.
"""

import triton
import triton.language as tl

from triton_dcn.kernels.jit import kernel

TRITON_VERSION = tuple(int(number) for number in triton.__version__.split(".")[:2])
PAIRS = TRITON_VERSION >= (3, 4)
"""Whether bfloat16 channels are read in pairs, see `widen`; older versions of Triton load such pairs one by one."""
LIMIT = tl.constexpr(1 << 30)
"""Pixels. A sample with a larger offset, or NaN, lies outside; smaller ones can be converted to int32."""


@kernel
def sampling_kernel(
    offset_ptr,
    mask_ptr,
    cell_ptr,
    ly_ptr,
    lx_ptr,
    scale_ptr,
    samples,
    positions,
    out_height,
    out_width,
    height,
    width,
    kernel_width,
    stride_ob,
    stride_oc,
    stride_oy,
    stride_ox,
    stride_mb,
    stride_mc,
    stride_my,
    stride_mx,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    TAPS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_LOGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the sample arrays from offset and mask.

    An offset is split before the place of its tap is added: y = (tap_y + floor(dy)) + (dy - floor(dy)). So the cell is
    exact, and `ly`, `lx` are rounded as the offset alone is, however large the image is.

    Grid: (ceil(D*K*M / BLOCK),); a program owns BLOCK samples.
    Reads: offset (B, 2*D*K, Ho, Wo) and mask (B, D*K, Ho, Wo), any strides. MASK_LOGITS: scale is the sigmoid of mask.
    Writes: cell, ly, lx, scale, each (D*K, M), in full.
    Assumes: B*H*W < 2**27, D*K*M < 2**29.
    """
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = sample < samples
    plane = sample // positions
    position = sample % positions
    out_x = position % out_width
    out_y = position // out_width % out_height
    b = position // (out_width * out_height)

    offset_at = b.to(tl.int64) * stride_ob + out_y.to(tl.int64) * stride_oy + out_x.to(tl.int64) * stride_ox
    channel_at = (2 * plane).to(tl.int64) * stride_oc
    offset_y = tl.load(offset_ptr + offset_at + channel_at, mask=live, other=0.0).to(tl.float32)
    offset_x = tl.load(offset_ptr + offset_at + channel_at + stride_oc, mask=live, other=0.0).to(tl.float32)
    if HAS_MASK:
        mask_at = b.to(tl.int64) * stride_mb + out_y.to(tl.int64) * stride_my + out_x.to(tl.int64) * stride_mx
        scale = tl.load(mask_ptr + mask_at + plane.to(tl.int64) * stride_mc, mask=live, other=0.0).to(tl.float32)
        if MASK_LOGITS:
            scale = tl.sigmoid(scale)
    else:
        scale = tl.full((BLOCK,), 1.0, tl.float32)

    # comparisons with NaN are false: only finite numbers are converted to integers
    finite = (offset_y > -LIMIT) & (offset_y < LIMIT) & (offset_x > -LIMIT) & (offset_x < LIMIT)
    offset_y = tl.where(finite, offset_y, 0.0)
    offset_x = tl.where(finite, offset_x, 0.0)
    ly = offset_y - tl.floor(offset_y)
    lx = offset_x - tl.floor(offset_x)

    tap = plane % TAPS
    y = out_y * stride_y - padding_y + tap // kernel_width * dilation_y + tl.floor(offset_y).to(tl.int32)
    x = out_x * stride_x - padding_x + tap % kernel_width * dilation_x + tl.floor(offset_x).to(tl.int32)
    # inside is the open interval (-1, size): y = -1 with ly = 0 is outside
    inside_y = (y < height) & ((y >= 0) | ((y == -1) & (ly > 0)))
    inside_x = (x < width) & ((x >= 0) | ((x == -1) & (lx > 0)))
    inside = finite & inside_y & inside_x

    top = (inside & (y >= 0)).to(tl.int32)
    bottom = (inside & (y + 1 < height)).to(tl.int32)
    left = (inside & (x >= 0)).to(tl.int32)
    right = (inside & (x + 1 < width)).to(tl.int32)
    pixel = (b * height + tl.where(inside, tl.maximum(y, 0), 0)) * width + tl.where(inside, tl.maximum(x, 0), 0)

    tl.store(cell_ptr + sample, pixel * 16 + top * 8 + bottom * 4 + left * 2 + right, mask=live)
    tl.store(ly_ptr + sample, ly, mask=live)
    tl.store(lx_ptr + sample, lx, mask=live)
    tl.store(scale_ptr + sample, tl.where(inside, scale, 0.0), mask=live)


@triton.jit
def corner_rows(cell, width, CHANNELS: tl.constexpr):
    """Return where the channels of the four corner pixels begin in a channels-last input, in elements, int64.

    CHANNELS is in elements of the input as it is read: C, or C/2 words, see `widen`.
    """
    row = (cell >> 4).to(tl.int64) * CHANNELS
    # one pixel to the right, and one image row down, only where both columns, and both rows, are inside
    right = (cell >> 1 & cell & 1) * CHANNELS
    # a product, not tl.where: Triton 3.8 and 3.9 then see its alignment, and load the lower corners 128 bits at a time
    below = ((cell & 12) == 12).to(tl.int64) * (width.to(tl.int64) * CHANNELS)
    return row, row + right, row + below, row + below + right


@triton.jit
def corner_weights(cell, ly, lx, scale):
    """Return the four bilinear weights times `scale`, zero for corners outside the image."""
    top = tl.where((cell & 8) != 0, 1 - ly, 0.0) * scale
    bottom = tl.where((cell & 4) != 0, ly, 0.0) * scale
    left = tl.where((cell & 2) != 0, 1 - lx, 0.0)
    right = tl.where((cell & 1) != 0, lx, 0.0)
    return top * left, top * right, bottom * left, bottom * right


@triton.jit
def load_corners(input_ptr, row00, row01, row10, row11, c, live_c, MASKED: tl.constexpr):
    """Load channels `c` (1, BLOCK_C) of the corners of BLOCK_P samples: four (BLOCK_P, BLOCK_C).

    Args:
        input_ptr: to the first channel of the offset group.
        row00, row01, row10, row11: of `corner_rows`, (BLOCK_P, 1).
        c: channels within the offset group, or words of two, see `widen`.
        live_c: (1, BLOCK_C), which channels exist; the others are zero. Not used if MASKED is false.
    """
    if MASKED:
        x00 = tl.load(input_ptr + row00 + c, mask=live_c, other=0.0)
        x01 = tl.load(input_ptr + row01 + c, mask=live_c, other=0.0)
        x10 = tl.load(input_ptr + row10 + c, mask=live_c, other=0.0)
        x11 = tl.load(input_ptr + row11 + c, mask=live_c, other=0.0)
    else:
        x00 = tl.load(input_ptr + row00 + c)
        x01 = tl.load(input_ptr + row01 + c)
        x10 = tl.load(input_ptr + row10 + c)
        x11 = tl.load(input_ptr + row11 + c)
    return x00, x01, x10, x11


@triton.jit
def widen(x):
    """Return the channels of a tile (BLOCK_P, BLOCK_C), or (BLOCK_P, QUARTERS, RUN), in float32.

    A tile of int32, half as wide, holds two neighboring bfloat16 channels in each word. The bits of a
    bfloat16 are the higher half of those of a float32: the lower channel is shifted there, and for the higher one the
    lower half is cleared. With a tile of bfloat16, the compiler would first move every higher channel to the lower
    half, which takes one more instruction.
    """
    if x.dtype == tl.int32:
        even = (x << 16).to(tl.float32, bitcast=True)
        odd = (x & -65536).to(tl.float32, bitcast=True)
        if len(x.shape) == 2:
            wide = tl.reshape(tl.join(even, odd), (x.shape[0], 2 * x.shape[1]))
        else:
            wide = tl.reshape(tl.join(even, odd), (x.shape[0], x.shape[1], 2 * x.shape[2]))
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def blend(w00, w01, w10, w11, x00, x01, x10, x11):
    """Return the weighted sum of four corner tiles in float32."""
    return w00 * widen(x00) + w01 * widen(x01) + w10 * widen(x10) + w11 * widen(x11)


@triton.jit
def swizzle(index, out_height, out_width, STRIP: tl.constexpr):
    """Map consecutive numbers to output positions that are neighbors in both directions.

    Positions run row by row inside strips of STRIP columns, strips from left to right, images one after another. Then
    programs of consecutive numbers read overlapping input pixels. STRIP = 0 is row-major order.
    """
    if STRIP == 0:
        return index
    image = index // (out_height * out_width)
    index_in_image = index % (out_height * out_width)
    strip_x = index_in_image // (out_height * STRIP) * STRIP
    strip_width = tl.minimum(out_width - strip_x, STRIP)
    index_in_strip = index_in_image - strip_x * out_height
    return (image * out_height + index_in_strip // strip_width) * out_width + strip_x + index_in_strip % strip_width


@triton.jit
def swizzle_chunk(index, rows, out_width, STRIP: tl.constexpr):
    """Map consecutive numbers to the `rows` rows of a chunk, in strips as `swizzle` does.

    The chunk is read as one image that is `out_width` columns wide, wherever it begins and however many images it
    spans: one below the other are neighbors all the same. What follows its last whole row keeps its order.
    """
    if STRIP == 0:
        return index
    height = tl.maximum(rows // out_width, 1)
    return tl.where(index < rows // out_width * out_width, swizzle(index, height, out_width, STRIP), index)


@triton.jit
def column_offset(row, tap, channel, rows, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, TAPS: tl.constexpr):
    """Return where an element lies in a column buffer (G, rows, K, C/G), int64; `channel` runs over all C."""
    if GROUPS == 1:
        return (row.to(tl.int64) * TAPS + tap) * CHANNELS + channel
    PER_GROUP: tl.constexpr = CHANNELS // GROUPS
    group = (channel // PER_GROUP).to(tl.int64)
    return ((group * rows + row) * TAPS + tap) * PER_GROUP + channel % PER_GROUP

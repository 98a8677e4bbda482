"""Where each sample lies: the metadata kernel, and the helpers by which every other kernel reads it.

Letters: B batch, C input channels, O output channels, H W input, K taps, G groups, D offset groups, M output positions
of the images at hand (B * Ho * Wo). A sample is one (offset group, tap, position); sample arrays are (D*K, M):

    cell   int32    pixel << 4 | top << 3 | bottom << 2 | left << 1 | right
    ly, lx float32  p - floor(p), the place inside the cell
    scale  float32  the mask, 1 without one, 0 for a sample outside the image

The cell of a sample is the square of the four pixels around it. The flags say which of its rows and columns are inside
the image; `pixel` = (b * H + y) * W + x is the first corner that is. A sample outside the image has no flags. Where one
of two rows is missing both are read from the other, the missing one with weight zero: gathers need no mask. An infinite
or NaN pixel of the input may reach samples that do not touch it, as may one of grad_output or a mask.
"""

import triton
import triton.language as tl

from triton_dcn.kernels.jit import kernel

PAIRS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 4)  # before, words are loaded one by one; see `widen`
LIMIT = tl.constexpr(1 << 30)  # offsets beyond it, and NaN, lie outside; float32 -> int32 is safe below


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

    The offset is split before the grid is added, p = (grid + floor(offset)) + (offset - floor(offset)): the cell is
    exact and `ly`, `lx` have the rounding of the offset alone, however large the image.

    Grid: (ceil(D*K*M / BLOCK),); a program owns BLOCK samples.
    Reads: offset (B, 2*D*K, Ho, Wo) and mask (B, D*K, Ho, Wo), any strides. MASK_LOGITS: the sigmoid of mask counts.
    Writes: cell, ly, lx, scale, each (D*K, M), in full.
    Assumes: B*H*W < 2**27, D*K*M < 2**29.
    """
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = sample < samples
    s = sample // positions  # (offset group, tap)
    p = sample % positions
    out_x = p % out_width
    out_y = p // out_width % out_height
    b = p // (out_width * out_height)
    place = b.to(tl.int64) * stride_ob + out_y.to(tl.int64) * stride_oy + out_x.to(tl.int64) * stride_ox
    channel = (2 * s).to(tl.int64) * stride_oc
    offset_y = tl.load(offset_ptr + place + channel, mask=live, other=0.0).to(tl.float32)
    offset_x = tl.load(offset_ptr + place + channel + stride_oc, mask=live, other=0.0).to(tl.float32)
    if HAS_MASK:
        place = b.to(tl.int64) * stride_mb + out_y.to(tl.int64) * stride_my + out_x.to(tl.int64) * stride_mx
        scale = tl.load(mask_ptr + place + s.to(tl.int64) * stride_mc, mask=live, other=0.0).to(tl.float32)
        if MASK_LOGITS:
            scale = tl.sigmoid(scale)
    else:
        scale = tl.full((BLOCK,), 1.0, tl.float32)

    # comparisons with NaN are false, so that nothing undefined reaches the conversion to integers
    finite = (offset_y > -LIMIT) & (offset_y < LIMIT) & (offset_x > -LIMIT) & (offset_x < LIMIT)
    offset_y = tl.where(finite, offset_y, 0.0)
    offset_x = tl.where(finite, offset_x, 0.0)
    ly = offset_y - tl.floor(offset_y)
    lx = offset_x - tl.floor(offset_x)
    tap = s % TAPS
    y = out_y * stride_y - padding_y + tap // kernel_width * dilation_y + tl.floor(offset_y).to(tl.int32)
    x = out_x * stride_x - padding_x + tap % kernel_width * dilation_x + tl.floor(offset_x).to(tl.int32)
    # open interval (-1, size): a position of exactly -1 is outside
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
    """Return the element offsets, int64, of the four corner pixels in a channels-last input, row by row."""
    row = (cell >> 4).to(tl.int64) * CHANNELS
    right = (cell >> 1 & cell & 1) * CHANNELS
    # a product, not a choice: Triton 3.8 and 3.9 then see its alignment, and load the lower corners 128 bits at a time
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
    """Load channels `c` (1, BLOCK_C) of the corner rows (BLOCK_P, 1): four (BLOCK_P, BLOCK_C), zero if not `live_c`."""
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
    """Return the channels of a tile (BLOCK_P, BLOCK_C) in float32.

    A tile of int32, (BLOCK_P, BLOCK_C // 2), holds two neighboring bfloat16 channels in each: a shift brings the lower
    half to where the bits of a float32 are, a mask the higher one. From a tile of bfloat16 the compiler takes two
    instructions for every higher half, as it moves it to the lower one first.
    """
    if x.dtype == tl.int32:
        even = (x << 16).to(tl.float32, bitcast=True)
        odd = (x & -65536).to(tl.float32, bitcast=True)
        wide = tl.reshape(tl.join(even, odd), (x.shape[0], 2 * x.shape[1]))
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def blend(w00, w01, w10, w11, x00, x01, x10, x11):
    """Return the weighted sum of four corner tiles in float32."""
    return w00 * widen(x00) + w01 * widen(x01) + w10 * widen(x10) + w11 * widen(x11)


@triton.jit
def swizzle(index, out_height, out_width, STRIP: tl.constexpr):
    """Map running numbers to output positions so that neighbors in number are neighbors in both directions.

    Positions run row by row inside strips of STRIP columns, strips from left to right, images one after another. Then
    the programs of consecutive numbers read input pixels that overlap. STRIP = 0 is row-major order.
    """
    if STRIP == 0:
        return index
    image = index // (out_height * out_width)
    rest = index % (out_height * out_width)
    first = rest // (out_height * STRIP) * STRIP
    columns = tl.minimum(out_width - first, STRIP)
    rest = rest - first * out_height
    return (image * out_height + rest // columns) * out_width + first + rest % columns


@triton.jit
def column_offset(row, tap, channel, rows, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, TAPS: tl.constexpr):
    """Return element offsets, int64, into a column buffer (G, rows, K, C/G); `channel` runs over all C."""
    if GROUPS == 1:
        return (row.to(tl.int64) * TAPS + tap) * CHANNELS + channel
    PER_GROUP: tl.constexpr = CHANNELS // GROUPS
    group = (channel // PER_GROUP).to(tl.int64)
    return ((group * rows + row) * TAPS + tap) * PER_GROUP + channel % PER_GROUP

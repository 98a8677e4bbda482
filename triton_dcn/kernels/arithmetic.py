"""Products and rounding that give the same results on a GPU and in Triton's interpreter.

The interpreter multiplies bfloat16 tiles wrongly, and truncates where hardware rounds. The code that corrects this is
not in kernels that are compiled for a GPU.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # triton.knobs has it, but only from 3.4 on


@triton.jit
def contract(a, b, acc, PRECISION: tl.constexpr, B_IS_ROUNDED: tl.constexpr = False):
    """Return acc + a @ b, (m, n) + (m, k) @ (k, n), accumulated in float32.

    Args:
        a, b, acc: of the product; a and b have one dtype.
        PRECISION: "ieee"; of float32 products, also "tf32x3", "tf32_even" or, on sm_80, "tf32". Tensor cores cut
            operands off to TF32. With "tf32_even" they are rounded before, which more than halves the error of a
            product and takes an instruction for each. With "tf32" they are not: sm_80 takes two or three, and the
            compiler repeats them in every warp that reads the operand.
        B_IS_ROUNDED: `b` is rounded to TF32 already.
    """
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if PRECISION == "tf32_even":
        a = round_to_tf32(a, PRECISION)
        if not B_IS_ROUNDED:
            b = round_to_tf32(b, PRECISION)
        acc = tl.dot(a, b, acc, input_precision="tf32")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Return float32 `x` in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True).to(tl.int64)
        bits = bits + 0x7FFF + (bits >> 16 & 1)  # the middle of two neighbors goes to the even one
        x = (bits >> 16 << 16).to(tl.int32).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def round_to_tf32(x, PRECISION: tl.constexpr):
    """Return float32 `x` with 10 bits of fraction, rounded to nearest, for a PRECISION of `contract`.

    The middle of two numbers goes to the even one, or away from zero on sm_80, whose instruction for it is that.
    """
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True).to(tl.int64) + 0x1000
        x = tl.where(x == x, (bits >> 13 << 13).to(tl.int32).to(tl.float32, bitcast=True), x)
    elif PRECISION == "tf32_even":
        x = tl.inline_asm_elementwise("cvt.rn.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return x

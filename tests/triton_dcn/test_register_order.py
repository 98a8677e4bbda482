"""The order of gathered channels and of a product's operands and results: inverse to each other, and of no effect."""

import pytest
import torch
import triton
import triton.language as tl

from tests.triton_dcn.cases import DEVICE
from triton_dcn.kernels.arithmetic import contract
from triton_dcn.kernels.register_order import (
    blend_pairs,
    block_channels,
    fma_pairs,
    from_result,
    multiply_pairs,
    operand_weight,
    product_row,
    result_weight,
    round_weight,
    to_operand,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]
WARPS = [4, 8]
LANES = [4, 8]


def channel_order(channels, dtype, side):
    """Return the channels of a permuted weight, by their old numbers."""
    numbers = torch.arange(channels, dtype=dtype).view(1, 1, channels)
    block = block_channels(dtype)
    permuted = operand_weight(numbers, block, 4) if side == "operand" else result_weight(numbers, block)
    return permuted.flatten().long()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["operand", "result"])
def test_weight_is_permuted_inside_blocks(side, dtype):
    block = block_channels(dtype)
    order = channel_order(3 * block, dtype, side)
    for start in range(0, 3 * block, block):
        assert sorted(order[start : start + block].tolist()) == list(range(start, start + block))
    assert torch.equal(order[block : 2 * block] - block, order[:block])


@pytest.mark.parametrize(
    ("dtype", "side", "columns", "next_quarter"),
    [
        (torch.bfloat16, "operand", [0, 1, 8, 9, 16, 17, 24, 25], 2),
        (torch.float32, "operand", [0, 4, 8, 12], 1),
        (torch.bfloat16, "result", [0, 1, 8, 9, 16, 17, 24, 25], 2),
        (torch.float32, "result", [0, 1, 8, 9], 2),
    ],
    ids=["half-operand", "tf32-operand", "half-result", "tf32-result"],
)
def test_threads_hold_what_the_tensor_core_wants(dtype, side, columns, next_quarter):
    """Columns of mma.m16n8k16 and mma.m16n8k8 by quarter, as the PTX manual lists them: those of loaded channels."""
    order = channel_order(block_channels(dtype), dtype, side)
    run = len(columns)
    for quarter in range(4):
        wanted = [column + quarter * next_quarter for column in columns]
        assert order[wanted].tolist() == list(range(quarter * run, (quarter + 1) * run))


@pytest.mark.parametrize("sign", [1, -1])
def test_weight_is_rounded_to_tf32(sign):
    ulp = 2.0**-10
    values = torch.tensor([1 + 0.49 * ulp, 1 + 0.5 * ulp, 1 + 1.49 * ulp, 0.0, torch.inf, torch.nan, 3.4e38])
    rounded = torch.tensor([1, 1 + ulp, 1 + ulp, 0.0, torch.inf, torch.nan, 3.4e38 // 2.0**117 * 2.0**117])
    torch.testing.assert_close(round_weight(sign * values), sign * rounded, atol=0, rtol=0, equal_nan=True)
    loud = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # NaNs that a GPU makes
    assert round_weight(loud).isnan().all()


@triton.jit
def rows_kernel(row_ptr, BLOCK_P: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr):
    row = tl.arange(0, BLOCK_P)
    tl.store(row_ptr + row, product_row(row, WARPS, LANES))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("block_p", [128, 256])
def test_rows_are_permuted(block_p, warps, lanes):
    rows = torch.zeros(block_p, dtype=torch.int32, device=DEVICE)
    rows_kernel[(1,)](rows, BLOCK_P=block_p, WARPS=warps, LANES=lanes)
    assert sorted(rows.tolist()) == list(range(block_p))
    by_register = rows.view(-1, warps, 32 // lanes)
    # eight of the product's rows from one warp, then its rows that are 8 further
    in_eight = lanes // 4
    assert (by_register[in_eight] - by_register[0]).unique().tolist() == [8]
    # threads that exchange blocks have neighboring rows
    assert lanes == 4 or (by_register[1] - by_register[0]).unique().tolist() == [1]


@triton.jit
def product_kernel(
    x_ptr,
    weight_ptr,
    product_ptr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    C: tl.constexpr,
    WARPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Multiply rows of x, gathered in the order of the loads, by a weight (O, C) in the order of the product."""
    row = tl.arange(0, BLOCK_P)
    c = tl.arange(0, C)
    o = tl.arange(0, BLOCK_O)
    x = tl.load(x_ptr + product_row(row, WARPS, LANES)[:, None] * C + c[None, :])
    weight = tl.load(weight_ptr + o[None, :] * C + c[:, None])
    product = contract(to_operand(x, WARPS, LANES), weight, tl.zeros((BLOCK_P, BLOCK_O), tl.float32), "ieee")
    tl.store(product_ptr + row[:, None] * BLOCK_O + o[None, :], product)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("lanes", LANES)
def test_product_of_operand_in_register_order(lanes, warps, dtype):
    channels = lanes // 4 * block_channels(dtype)
    x = torch.randn(256, channels, device=DEVICE).to(dtype)
    weight = torch.randn(16, 1, channels, device=DEVICE).to(dtype)
    product = torch.empty(256, 16, device=DEVICE)
    permuted = operand_weight(weight, channels, lanes)
    product_kernel[(1,)](
        x, permuted, product, BLOCK_P=256, BLOCK_O=16, C=channels, WARPS=warps, LANES=lanes, num_warps=warps
    )
    torch.testing.assert_close(product.double(), x.double() @ weight[:, 0].double().T, atol=1e-5, rtol=1e-5)


@triton.jit
def result_kernel(
    grad_ptr,
    weight_ptr,
    result_ptr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    C: tl.constexpr,
    WARPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Multiply grad (P, O) by a weight (O, C) in the order of the result; store by gathered rows and channels."""
    row = tl.arange(0, BLOCK_P)
    c = tl.arange(0, C)
    o = tl.arange(0, BLOCK_O)
    grad = tl.load(grad_ptr + row[:, None] * BLOCK_O + o[None, :])
    weight = tl.load(weight_ptr + o[:, None] * C + c[None, :])
    result = from_result(contract(grad, weight, tl.zeros((BLOCK_P, C), tl.float32), "ieee"), WARPS, LANES)
    tl.store(result_ptr + product_row(row, WARPS, LANES)[:, None] * C + c[None, :], result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("lanes", LANES)
def test_result_in_the_order_of_gathered_tiles(lanes, warps, dtype):
    channels = lanes // 4 * block_channels(dtype)
    grad = torch.randn(256, 16, device=DEVICE).to(dtype)
    weight = torch.randn(16, 1, channels, device=DEVICE).to(dtype)
    result = torch.empty(256, channels, device=DEVICE)
    permuted = result_weight(weight, block_channels(dtype))
    result_kernel[(1,)](
        grad, permuted, result, BLOCK_P=256, BLOCK_O=16, C=channels, WARPS=warps, LANES=lanes, num_warps=warps
    )
    torch.testing.assert_close(result.double(), grad.double() @ weight[:, 0].double(), atol=1e-5, rtol=1e-5)


@triton.jit
def pairs_kernel(a_ptr, b_ptr, c_ptr, product_ptr, sum_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + at)
    b = tl.load(b_ptr + at)
    tl.store(product_ptr + at, multiply_pairs(a, b))
    tl.store(sum_ptr + at, fma_pairs(a, b, tl.load(c_ptr + at)))


def rounded_once(exact, dtype):
    """Round float64 to a half-precision dtype: the candidate next to it that is nearest, the even one of two."""
    near = exact.float().to(dtype)
    infinity = torch.full_like(near, torch.inf)
    candidates = torch.stack([torch.nextafter(near, -infinity), near, torch.nextafter(near, infinity)])
    distance = (candidates.double() - exact).abs()
    odd = candidates.view(torch.int16) & 1
    best = (distance == distance.min(0).values).long() * 2 - odd
    return candidates.gather(0, best.argmax(0, keepdim=True))[0]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_pairs_round_once(dtype):
    """Also sums just beside the middle of two numbers, which two roundings would move to the even one."""
    a = torch.randn(4096).to(dtype)
    b = torch.randn(4096).to(dtype)
    c = torch.randn(4096).to(dtype)
    c[:1024] *= 2.0**-9
    eps = torch.finfo(dtype).eps
    tiny = 2.0**-24 if dtype == torch.float16 else 2.0**-40
    a[:4] = torch.tensor([1 + eps, 1 + eps, -1 - eps, 1 + 3 * eps]).to(dtype)
    b[:4] = 1.5  # 1.5 + 1.5 eps is such a middle
    c[:4] = torch.tensor([tiny, -tiny, -tiny, tiny]).to(dtype)
    product = torch.empty_like(a, device=DEVICE)
    total = torch.empty_like(a, device=DEVICE)
    pairs_kernel[(1,)](a.to(DEVICE), b.to(DEVICE), c.to(DEVICE), product, total, BLOCK=4096)
    exact_product = a.double() * b.double()
    assert torch.equal(product.cpu(), rounded_once(exact_product, dtype))
    assert torch.equal(total.cpu(), rounded_once(exact_product + c.double(), dtype))


@triton.jit
def blend_kernel(weight_ptr, x_ptr, out_ptr, ROWS: tl.constexpr, C: tl.constexpr):
    row = tl.arange(0, ROWS)
    at = row[:, None] * C + tl.arange(0, C)[None, :]
    blended = blend_pairs(
        tl.load(weight_ptr + row)[:, None],
        tl.load(weight_ptr + ROWS + row)[:, None],
        tl.load(weight_ptr + 2 * ROWS + row)[:, None],
        tl.load(weight_ptr + 3 * ROWS + row)[:, None],
        tl.load(x_ptr + at),
        tl.load(x_ptr + ROWS * C + at),
        tl.load(x_ptr + 2 * ROWS * C + at),
        tl.load(x_ptr + 3 * ROWS * C + at),
    )
    tl.store(out_ptr + at, blended)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_blend_in_pairs(dtype):
    weights = torch.rand(4, 32, device=DEVICE)
    x = torch.randn(4, 32, 64, device=DEVICE).to(dtype)
    blended = torch.empty(32, 64, dtype=dtype, device=DEVICE)
    blend_kernel[(1,)](weights, x, blended, ROWS=32, C=64)
    exact = (weights.double()[:, :, None] * x.double()).sum(0)
    assert (blended.double() - exact).norm() <= 1.2 * torch.finfo(dtype).eps * exact.norm()

"""The Triton kernels against the float64 reference: every form and tile path, addressing, order, determinism.

Runs in Triton's interpreter on a machine without a GPU. Golden cases through the whole operator: `test_operator`.
"""

import itertools
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from tests.triton_dcn.cases import (
    DEVICE,
    QUANTITIES,
    OperatorCase,
    deterministic,
    make_case,
    relative,
    run_backend,
)
from triton_dcn import launchers, reference, tile_table, triton_backend, workspace
from triton_dcn.geometry import ConvGeometry
from triton_dcn.kernels.register_order import block_channels
from triton_dcn.kernels.sampling import column_offset, corner_rows, swizzle, swizzle_chunk
from triton_dcn.kernels.sampling import widen as widen_tile
from triton_dcn.offset_mask import OffsetMask, OffsetMaskGrad
from triton_dcn.tile_table import ANY, Tile, TileRow

ARCH = tile_table.architecture(torch.device(DEVICE))
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # half: machine epsilon
SPECS = {
    "one-block": OperatorCase("one-block", 1, 16, 16, 9, 10, has_bias=False),
    "two-blocks": OperatorCase("two-blocks", 2, 32, 32, 9, 10, stride=(2, 1)),
    "v1": OperatorCase("v1", 1, 16, 16, 9, 10, kernel=(1, 3), padding=(0, 1), has_mask=False, has_bias=False),
    "offset-groups": OperatorCase(
        "offset-groups", 1, 32, 16, 9, 18, padding=(2, 2), dilation=(2, 2), offset_groups=2, has_bias=False
    ),
    "groups": OperatorCase("groups", 1, 8, 6, 9, 10, groups=2),
    "groups-cross": OperatorCase(
        "groups-cross", 1, 12, 6, 6, 5, kernel=(2, 2), groups=2, offset_groups=3, has_bias=False
    ),
    "depthwise": OperatorCase("depthwise", 1, 20, 20, 6, 7, groups=20, offset_groups=2),
    "many-channels": OperatorCase("many-channels", 1, 80, 80, 5, 5, kernel=(1, 2), padding=(0, 1), has_bias=False),
    "one-pixel": OperatorCase("one-pixel", 2, 16, 16, 1, 1),
    "odd-channels": OperatorCase("odd-channels", 1, 9, 6, 6, 5, kernel=(2, 2), offset_groups=3, has_bias=False),
}


def case_of(spec, dtype=torch.float32, **extra):
    return make_case(SPECS[spec], dtype, DEVICE, **extra)


def few_taps(spec):
    """Return a specification with three taps at most, in a row, for tests of what no number of taps changes.

    The interpreter's time grows with the taps; `test_half` has all of them.
    """
    return spec if spec.taps <= 3 else replace(spec, kernel=(1, 3), padding=(0, spec.dilation[1]))


def run(case, needs=None, **options):
    """Return output and gradients of the Triton kernels, by quantity."""
    return run_backend(case, triton_backend, needs, **options)


def exact(case, needs=None):
    """Return the same of the reference in float64."""
    return run_backend(case.double(), reference, needs)


def as_launched(case):
    """Return input, weight and grad_output in the layouts that `launchers` takes."""
    x, _, _, w = case.tensors
    x = x.permute(0, 2, 3, 1).contiguous()
    w = w.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
    return x, w, case.grad_output.permute(0, 2, 3, 1).contiguous().view(-1, case.geom.out_channels)


def assert_agree(results, exact, limit):
    for name, expected in exact.items():
        assert (results[name] is None) == (expected is None), name
        if expected is not None:
            assert results[name].shape == expected.shape
            assert relative(results[name], expected) <= limit, name


def force_way(monkeypatch, way):
    """Let the gradient of the input come from "t_columns" or "g_form", whatever moves less."""
    monkeypatch.setattr(triton_backend, "prefers_t_columns", lambda geom, **needs: way == "t_columns")


def prepend_rows(monkeypatch, *rows):
    """Place `rows` before those of the table."""
    monkeypatch.setattr(tile_table, "TABLE", (*rows, *tile_table.TABLE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_half(spec, dtype):
    case = case_of(spec, dtype)
    results = run(case)
    assert all(value is None or value.dtype == dtype for value in results.values())
    assert_agree(results, exact(case), FLOOR[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", list(launchers.FORWARD_KERNELS))
@pytest.mark.parametrize("spec", ["two-blocks", "offset-groups"])
def test_forward_forms(spec, kernel, dtype, monkeypatch):
    prepend_rows(monkeypatch, TileRow("forward", kernel, (ARCH,), "any", ANY, Tile(64, 16, 16, max_registers=128)))
    case = make_case(few_taps(SPECS[spec]), dtype, DEVICE)
    input, _, _, weight = case.tensors
    output = triton_backend.forward(case.geom, input, case.offset_mask, weight, case.bias)
    assert relative(output, exact(case)["output"]) <= FLOOR[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "offset_groups", "block_c"), [(64, 8, 32), (96, 4, 32), (32, 8, 16), (32, 2, 32)])
def test_blocks_that_span_offset_groups(channels, offset_groups, block_c, dtype, monkeypatch):
    """Each quarter of a block of channels has samples of its own: 8, 24, 4 and 16 channels in an offset group."""
    row = TileRow("forward", "forward_direct", (ARCH,), "any", ANY, Tile(64, 16, block_c), spans_groups=True)
    prepend_rows(monkeypatch, row)
    monkeypatch.setattr(tile_table, "STRIP_MIN_WIDTH", 17)
    spec = few_taps(OperatorCase("", 1, channels, 16, 5, 18, offset_groups=offset_groups))
    case = make_case(spec, dtype, DEVICE, spread=4.0)
    input, _, _, weight = case.tensors
    output = triton_backend.forward(case.geom, input, case.offset_mask, weight, case.bias, relu=True)
    assert tile_table.find_row("forward", case.geom, input) is row
    assert relative(output, exact(case)["output"].relu()) <= FLOOR[dtype]


@pytest.mark.parametrize(
    ("kernel", "arch"), [*itertools.product(launchers.FORWARD_KERNELS, ["sm90"]), ("forward_direct", "sm80")]
)
def test_operands_are_rounded_to_tf32(kernel, arch, monkeypatch):
    """With operands that are cut off, as tensor cores do it, the error would be 7e-4 of the output."""
    prepend_rows(monkeypatch, TileRow("forward", kernel, (ARCH,), "any", ANY, Tile(64, 16, 16)))
    monkeypatch.setattr(launchers, "dot_precision", lambda tensor: tile_table.precision(arch, "tf32"))
    case = case_of("two-blocks")
    input, _, _, weight = case.tensors
    output = triton_backend.forward(case.geom, input, case.offset_mask, weight, case.bias)
    assert 1e-5 < relative(output, exact(case)["output"]) < 3.5e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "spec",
    [
        OperatorCase("", 2, 32, 32, 9, 10),
        OperatorCase("", 1, 128, 48, 7, 9, has_bias=False),
        OperatorCase("", 1, 64, 64, 8, 8, offset_groups=8),
        OperatorCase("", 1, 16, 16, 12, 11, kernel=(5, 5), padding=(2, 2), has_mask=False),
    ],
    ids=["32", "128", "offset-groups", "5x5-v1"],
)
def test_blending_in_pairs_is_exact_enough(spec, dtype):
    """Error to float64 at most twice that of the reference in the same dtype; less where the blending is in float32."""
    case = make_case(spec, dtype, DEVICE)
    assert tile_table.find_row("forward", case.geom, case.tensors[0]).kernel == "forward_direct"
    input, _, _, weight = case.tensors
    target = exact(case)["output"]
    by_reference = relative(reference.forward(case.geom, input, case.offset_mask, weight, case.bias), target)
    in_pairs = relative(triton_backend.forward(case.geom, input, case.offset_mask, weight, case.bias), target)
    with deterministic():
        in_float32 = relative(triton_backend.forward(case.geom, input, case.offset_mask, weight, case.bias), target)
    assert in_float32 < in_pairs <= 2 * by_reference


def test_a_deterministic_call_leaves_the_register_limit_of_later_ones(monkeypatch):
    """Its blending in float32 needs more registers than the table's row allows."""
    row = TileRow("forward", "forward_direct", (ARCH,), "any", ANY, Tile(64, 16, 16, max_registers=128))
    prepend_rows(monkeypatch, row)
    case = case_of("two-blocks", torch.bfloat16)
    input, _, _, weight = case.tensors
    limits = []
    monkeypatch.setattr(
        launchers, "launch", lambda kernel, *arguments, **constants: limits.append(constants.get("maxnreg"))
    )

    def limit_of_forward():
        triton_backend.forward(case.geom, input, case.offset_mask, weight, case.bias)
        return limits[-1]

    assert limit_of_forward() == 128
    with deterministic():
        assert limit_of_forward() is None
    assert limit_of_forward() == 128


def test_the_weight_is_put_in_order_once_for_all_slices(monkeypatch):
    case = make_case(OperatorCase("", 3, 32, 16, 9, 10, has_bias=False), torch.bfloat16, DEVICE)
    input, offset, mask, weight = case.tensors
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 1)  # every image is a slice
    launched, sides = [], []

    def operand_weight(weight, width, lanes):
        sides.append("operand")
        return weight

    def result_weight(weight, block):
        sides.append("result")
        return weight

    monkeypatch.setattr(launchers, "operand_weight", operand_weight)
    monkeypatch.setattr(launchers, "result_weight", result_weight)
    monkeypatch.setattr(launchers, "launch", lambda kernel, *arguments, **constants: launched.append(kernel))
    output = triton_backend.forward(case.geom, input, case.offset_mask, weight, None)
    triton_backend.backward(
        case.geom, output, input, case.offset_mask, weight, OffsetMaskGrad(offset, mask),
        needs_input=False, needs_weight=False,
    )  # fmt: skip
    assert launched.count(launchers.forward_direct_kernel) == 3
    assert launched.count(launchers.grad_sample_fused_kernel) == 3
    assert sides == ["operand", "result"]


FUSED_SPECS = {
    "one-group": OperatorCase("one-group", 1, 64, 48, 5, 18, kernel=(1, 3), padding=(0, 1), has_bias=False),
    "two-groups": OperatorCase("two-groups", 2, 64, 16, 7, 5, stride=(2, 1), offset_groups=2, has_bias=False),
    "quarters": OperatorCase("quarters", 1, 64, 16, 5, 18, kernel=(3, 1), padding=(1, 0), offset_groups=8),
    "halves": OperatorCase("halves", 1, 32, 20, 9, 10, kernel=(2, 2), offset_groups=2, has_bias=False),
    "v1": OperatorCase("v1", 1, 32, 16, 9, 10, kernel=(1, 3), padding=(0, 1), has_mask=False, has_bias=False),
}


@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize(("archs", "full_warps"), [((ARCH,), 1), ((), 1 << 20)], ids=["all-taps", "any-order-one-tap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", FUSED_SPECS)
def test_sample_gradients_in_one_pass(spec, dtype, archs, full_warps, lanes, monkeypatch):
    """One or two gathered blocks a product, several offset groups a block, strips, more output channels than there are.

    Dot products are float32: the error is that of the rounded results.
    """
    case = make_case(FUSED_SPECS[spec], dtype, DEVICE)
    geom = case.geom
    monkeypatch.setattr(launchers, "FULL_WARPS", full_warps)
    monkeypatch.setattr(launchers, "REGISTER_ORDER", archs)
    monkeypatch.setattr(tile_table, "STRIP_MIN_WIDTH", 18)
    block = block_channels(dtype)
    block_c = 2 * block if geom.in_channels // geom.offset_groups % (2 * block) == 0 else block
    row = TileRow("grad_sample_fused", "grad_sample_fused", (ARCH,), "any", ANY, Tile(64, 64, block_c, lanes=lanes))

    _, offset, mask, _ = case.tensors
    x, w, grad = as_launched(case)
    samples = launchers.sample(geom, case.offset_mask)
    found = OffsetMaskGrad(
        torch.full_like(offset, torch.nan), None if mask is None else torch.full_like(mask, torch.nan)
    )
    launchers.grad_sample_fused(geom, row, grad, x, samples, launchers.grad_sample_weight(row, w), found)
    expected = exact(case)
    assert relative(found.offset, expected["grad_offset"]) <= FLOOR[dtype]
    assert mask is None or relative(found.mask, expected["grad_mask"]) <= FLOOR[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", ["two-blocks", "offset-groups", "groups-cross", "odd-channels"])
def test_sample_gradients_leave_columns(spec, dtype, monkeypatch):
    """Columns in place of the column gradients, chunk by chunk, in several channel blocks, and the same gradients."""
    rows = [TileRow(task, task, (ARCH,), "any", ANY, Tile(32, 0, 16)) for task in ("columns", "grad_sample")]
    prepend_rows(monkeypatch, *rows)
    monkeypatch.setattr(tile_table, "STRIP_MIN_WIDTH", 10)
    case = make_case(few_taps(SPECS[spec]), dtype, DEVICE)
    geom = case.geom
    x, w, grad = as_launched(case)
    samples = launchers.sample(geom, case.offset_mask)
    found = OffsetMaskGrad(*(torch.full_like(tensor, torch.nan) for tensor in case.tensors[1:3]))
    positions = geom.batch * geom.positions
    for chunk in (slice(0, positions // 3), slice(positions // 3, positions)):
        buffer = triton_backend.column_gradients(geom, grad[chunk], w)
        launchers.grad_sample(geom, buffer, x, samples, chunk, found, write_columns=True)
        columns = launchers.columns(geom, x, samples, chunk)
        assert relative(buffer, columns.double()) <= FLOOR[dtype]
    expected = exact(case)
    assert relative(found.offset, expected["grad_offset"]) <= FLOOR[dtype]
    assert relative(found.mask, expected["grad_mask"]) <= FLOOR[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", ["groups-cross", "odd-channels"])
def test_columns_blended_in_pairs_are_exact_enough(spec, dtype):
    """Error to float64 at most twice that of the reference in the same dtype; less where the blending is in float32."""
    case = case_of(spec, dtype)
    input, _, _, weight = case.tensors
    assert tile_table.find_row("forward", case.geom, input) is None
    target = exact(case)["output"]
    by_reference = relative(reference.forward(case.geom, input, case.offset_mask, weight, case.bias), target)
    in_pairs = relative(triton_backend.forward(case.geom, input, case.offset_mask, weight, case.bias), target)
    with deterministic():
        in_float32 = relative(triton_backend.forward(case.geom, input, case.offset_mask, weight, case.bias), target)
    assert in_float32 < in_pairs <= 2 * by_reference


def test_offset_groups_that_one_pass_serves():
    """A block of channels holds one, two or four offset groups, or an offset group holds whole blocks."""

    def kernel(channels, offset_groups, out_channels=64):
        row = tile_table.match_row(
            "grad_sample_fused", "sm90", "half", channels, out_channels, offset_groups=offset_groups
        )
        return row and (row.tile.block_c, row.spans_groups)

    assert kernel(128, 1) == kernel(64, 2) == (64, False)
    assert kernel(32, 2) == kernel(96, 1) == (32, False)
    assert kernel(8, 8) == kernel(16, 4) == (32, True)
    assert kernel(24, 4) is kernel(10, 12) is kernel(8, 3) is None
    assert kernel(64, 1, out_channels=27) == (64, False)
    assert kernel(64, 1, out_channels=257) is None


@pytest.mark.parametrize(("channels", "block"), [(1, 1), (3, 4), (8, 8), (15, 16), (64, 64), (100, 64)])
def test_tiles_are_no_wider_than_an_offset_group(channels, block):
    tile = tile_table.narrowed(Tile(32, 0, 64, 4), channels)
    assert tile == Tile(min(2048 // block, 256), 0, block, 4)


@pytest.mark.parametrize("spec", ["one-block", "offset-groups"])
@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone(spec, wanted):
    case = make_case(few_taps(SPECS[spec]), torch.float32, DEVICE)
    needs = tuple(index == wanted for index in range(4))
    assert_agree(run(case, needs), exact(case, needs), FLOOR[torch.float32])


def keep_groups_apart(monkeypatch):
    """Let the kernels see the channel groups of a case, however narrow they are."""
    monkeypatch.setattr(triton_backend, "NARROW_GROUP", 1)


def joined_groups(case):
    """Return the channel groups that are left in the forward and in the backward pass."""
    tasks = ("forward", "grad_sample_fused")
    return [triton_backend.joined_geometry(case.geom, task, case.tensors[0]).groups for task in tasks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", ["groups", "groups-cross", "depthwise"])
def test_groups_apart(spec, dtype, monkeypatch):
    """As in `test_half`, which joins them."""
    keep_groups_apart(monkeypatch)
    case = make_case(few_taps(SPECS[spec]), dtype, DEVICE)
    assert joined_groups(case) == [case.geom.groups] * 2
    assert_agree(run(case), exact(case), FLOOR[dtype])


@pytest.mark.parametrize("needs_samples", [True, False])
def test_several_joined_groups(needs_samples, monkeypatch):
    """Six groups of four channels become two of twelve, four output channels in each; by columns and by T."""
    monkeypatch.setattr(triton_backend, "FUSED_CHANNELS_ELSE", 16)
    monkeypatch.setattr(triton_backend, "JOINED_CHANNELS", dict.fromkeys(triton_backend.JOINED_CHANNELS, 12))
    case = make_case(OperatorCase("", 2, 24, 12, 6, 5, kernel=(2, 2), groups=6), torch.float32, DEVICE)
    assert joined_groups(case) == [2, 2]
    needs = (True, needs_samples, needs_samples, True)
    assert_agree(run(case, needs), exact(case, needs), FLOOR[torch.float32])


@pytest.mark.parametrize(
    ("channels", "groups", "half", "float32"),
    [
        (64, 8, [1, 1], 2),
        (128, 32, [1, 2], 4),
        (256, 32, [1, 4], 8),
        (272, 34, [2, 2], 2),
        (512, 32, [32, 32], 32),
        (1024, 32, [32, 32], 32),
        (768, 768, [12, 12], 24),
        (90, 18, [1, 1], 2),
        (360, 36, [4, 4], 9),
        (64, 4, [4, 4], 4),
        (64, 1, [1, 1], 1),
    ],
)
def test_narrow_groups_are_joined(channels, groups, half, float32):
    """Groups of fewer than 16 channels: all where a fused kernel takes them, else to at least 64 or 32.

    The interpreter has a fused kernel for offsets of at most 64 output channels.
    """
    spec = OperatorCase("", 1, channels, channels, 2, 2, groups=groups)
    assert joined_groups(make_case(spec, torch.bfloat16)) == half
    assert joined_groups(make_case(spec, torch.float32)) == [float32] * 2


@pytest.mark.parametrize(
    ("channels", "offset_groups", "dtype"),
    [
        (256, 1, torch.float32),
        (512, 1, torch.float32),
        (1024, 1, torch.float32),
        (256, 2, torch.float32),
        (256, 4, torch.float32),
        (256, 1, torch.bfloat16),
        (512, 1, torch.bfloat16),
        (1024, 1, torch.bfloat16),
        (256, 4, torch.bfloat16),
    ],
    ids=str,
)
def test_layers_of_resnext(channels, offset_groups, dtype):
    """32 groups of 8, 16 and 32 channels."""
    spec = OperatorCase("", 1, channels, channels, 3, 4, groups=32, offset_groups=offset_groups, has_bias=False)
    case = make_case(replace(spec, kernel=(1, 2), padding=(0, 0)), dtype, DEVICE)
    assert_agree(run(case), exact(case), FLOOR[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs_samples", [True, False])
@pytest.mark.parametrize("way", ["t_columns", "g_form"])
@pytest.mark.parametrize("spec", ["two-blocks", "v1", "groups", "many-channels"])
def test_both_ways_to_the_gradient_of_the_input(spec, way, needs_samples, dtype, monkeypatch):
    force_way(monkeypatch, way)
    keep_groups_apart(monkeypatch)
    case = make_case(few_taps(SPECS[spec]), dtype, DEVICE)
    needs = (True, needs_samples, needs_samples and case.tensors[2] is not None, True)
    assert_agree(run(case, needs), exact(case, needs), FLOOR[dtype])


def test_more_output_channels_take_no_t(monkeypatch):
    """With a stride of 2, or more output than input channels, T would be the largest buffer."""
    monkeypatch.setattr(launchers, "t_columns", None)
    spec = OperatorCase("", 1, 16, 64, 9, 18, has_bias=False)
    for case in (make_case(spec, torch.bfloat16, DEVICE), case_of("two-blocks", torch.bfloat16)):
        assert_agree(run(case), exact(case), FLOOR[torch.bfloat16])


@pytest.mark.parametrize(
    ("spec", "way"),
    [
        ("two-blocks", "t_columns"),
        ("groups", "t_columns"),
        ("two-blocks", "g_form"),
        ("offset-groups", "g_form"),
        ("groups", "g_form"),
    ],
)
def test_chunks_and_slices(spec, way, monkeypatch):
    """A workspace that holds one row of tiles: one image a slice, several chunks of columns and of T."""
    force_way(monkeypatch, way)
    keep_groups_apart(monkeypatch)
    case = case_of(spec)
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 20_000)
    images_per_slice = [part.batch for part, _ in workspace.image_slices(case.geom, "ranks")]
    assert images_per_slice == [1] * case.geom.batch
    assert len(list(workspace.column_chunks(case.geom, case.tensors[0]))) > 1 or spec == "groups"
    assert_agree(run(case), exact(case), FLOOR[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("spec", "workspace_bytes"), [("offset-groups", 70_000), ("groups-cross", 3_000)])
def test_column_gradients_of_an_image_beyond_the_workspace(spec, workspace_bytes, dtype, monkeypatch):
    """Several offset groups: the column gradients come in bounded chunks, too, and each adds to grad_input."""
    keep_groups_apart(monkeypatch)
    case = case_of(spec, dtype)
    sizes = []
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", workspace_bytes)
    g_form = launchers.g_form

    def counted(geom, grad_columns, *rest):
        sizes.append(grad_columns.nbytes)
        g_form(geom, grad_columns, *rest)

    monkeypatch.setattr(launchers, "g_form", counted)
    results = run(case)
    assert len(sizes) > case.geom.batch
    assert max(sizes) <= workspace_bytes
    assert_agree(results, exact(case), FLOOR[dtype])


def test_strips(monkeypatch):
    monkeypatch.setattr(tile_table, "STRIP_MIN_WIDTH", 17)
    prepend_rows(monkeypatch, TileRow("forward", "forward_prefetch", (ARCH,), "any", ANY, Tile(64, 16, 16)))
    prepend_rows(monkeypatch, TileRow("grad_sample_fused", "grad_sample_fused", (ARCH,), "any", ANY, Tile(64, 16, 16)))
    case = case_of("offset-groups")
    assert tile_table.strip_width(case.geom.out_width) == 16
    needs = (False, True, True, False)
    assert_agree(run(case, needs), exact(case, needs), FLOOR[torch.float32])


@pytest.mark.parametrize("spec", ["two-blocks", "offset-groups"])
def test_deterministic_algorithms(spec):
    """Stable bins in place of atomic ranks. Here torch fills fresh memory with NaN: nothing may be left unwritten."""
    case = case_of(spec)
    with deterministic():
        first = run(case)
        second = run(case)
    assert all(torch.equal(first[name], second[name]) for name in QUANTITIES)
    assert_agree(first, exact(case), FLOOR[torch.float32])


@pytest.mark.parametrize("tile_h", [tile_table.T_TILE_H, tile_table.G_TILE_H])
def test_bins_hold_the_samples_of_their_tile(tile_h):
    """Both ways list the same samples, the stable one in their order; every entry touches the tile of its bin."""
    case = case_of("offset-groups")
    geom = case.geom
    samples = launchers.sample(geom, case.offset_mask)
    ranked = launchers.bin_samples(geom, samples, tile_h)
    with deterministic():
        stable = launchers.bin_samples(geom, samples, tile_h)
    assert torch.equal(ranked.start, stable.start)
    tiles_y, tiles_x = workspace.input_tiles(geom, tile_h)
    samples_inside = int((samples.cell & 15).ne(0).sum())
    assert samples_inside <= int(stable.start[-1]) <= 4 * samples_inside

    starts = stable.start.tolist()
    for bin, (start, end) in enumerate(itertools.pairwise(starts)):
        entries = stable.entry[start:end].tolist()
        assert entries == sorted(ranked.entry[start:end].tolist())
        tile, tap = divmod(bin, geom.taps)
        row_of_tiles, tile_x = divmod(tile, tiles_x)
        group, tile_y = divmod(row_of_tiles, tiles_y)
        for entry in entries:
            cell = int(samples.cell.view(geom.offset_groups, -1)[group, entry])
            y, x = divmod(cell >> 4, geom.width)
            has_two_rows = (cell >> 3) & (cell >> 2) & 1
            has_two_columns = (cell >> 1) & cell & 1
            assert tile_y in {y // tile_h, (y + has_two_rows) // tile_h}
            assert tile_x in {x // tile_table.TILE_W, (x + has_two_columns) // tile_table.TILE_W}
            assert entry // geom.positions == tap


def test_offsets_that_are_not_finite_or_huge():
    """Such samples are outside: value zero, gradients zero, the rest untouched."""
    case = case_of("one-block")
    offset = case.tensors[1]
    values = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0**31, -(2.0**30), 3e9]
    offset[0, 4, 0, :8] = torch.tensor(values, device=DEVICE)
    offset[0, 9, 4, :8] = torch.tensor(values, device=DEVICE)
    results = run(case)
    offset[0, 4, 0, :8] = 1e4
    offset[0, 9, 4, :8] = 1e4
    assert_agree(results, exact(case), FLOOR[torch.float32])
    assert not results["grad_offset"][0, 4:6, 0, :8].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("workspace_bytes", [workspace.WORKSPACE_BYTES, 20_000], ids=["whole", "chunks"])
@pytest.mark.parametrize("offset_groups", [1, 2], ids=["t_columns", "g_form"])
def test_infinite_gradients_stay_in_their_tiles(offset_groups, workspace_bytes, monkeypatch):
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", workspace_bytes)
    force_way(monkeypatch, "t_columns" if offset_groups == 1 else "g_form")
    tile_h = tile_table.T_TILE_H if offset_groups == 1 else tile_table.G_TILE_H
    spec = OperatorCase(
        "", 1, 4, 4, 40, 40, kernel=(1, 1), padding=(0, 0), offset_groups=offset_groups, has_mask=False, has_bias=False
    )
    case = make_case(spec, torch.float32, DEVICE)
    case.tensors[1].zero_()
    case.grad_output[0, 0, 0, 0] = torch.inf
    finite = run(case, (True, False, False, False))["grad_input"].isfinite()
    assert not finite[0, :, 0, 0].any()
    finite[0, :, :tile_h, : tile_table.TILE_W] = True
    assert finite.all()


def test_fractions_are_those_of_the_offset():
    """Far from the origin a small offset keeps its cell and fraction: x is never rounded as a whole."""
    geom = ConvGeometry(1, 1, 1, 100_000, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1, 1, 1, 100_000)
    offset = torch.full((1, 2, 1, 100_000), -(2.0**-20), device=DEVICE)
    samples = launchers.sample(geom, OffsetMask(offset, None))
    assert (samples.cell[0, 1:] >> 4).tolist() == list(range(99_999))
    assert bool((samples.lx == 1 - 2.0**-20).all())


def test_any_strides():
    case = case_of("one-block")
    with deterministic():
        plain = run(case)
    x, offset, mask, weight = case.tensors
    case.tensors = (
        x.to(memory_format=torch.channels_last),
        offset.transpose(2, 3).contiguous().transpose(2, 3),
        mask.repeat(2, 1, 1, 1)[::2],
        weight.flip(0).contiguous().flip(0),
    )
    with deterministic():
        strided = run(case)
    assert all(torch.equal(plain[name], strided[name]) for name in QUANTITIES[:2])
    case.grad_output = torch.ones(1, device=DEVICE).expand(case.geom.output_shape)
    assert_agree(run(case), exact(case), FLOOR[torch.float32])


def test_half_input_with_float32_offsets():
    case = case_of("one-block", torch.float16)
    x, _, _, weight = case.tensors
    _, offset, mask, _ = case_of("one-block").tensors
    case.tensors = (x, offset, mask, weight)
    results = run(case)
    for name, value in results.items():
        expected = torch.float32 if name in ("grad_offset", "grad_mask") else torch.float16
        assert value.dtype == expected, name
    assert_agree(results, exact(case), FLOOR[torch.float16])


@pytest.mark.parametrize("spec", ["one-block", "offset-groups"])
def test_empty_batch(spec):
    case = make_case(replace(SPECS[spec], batch=0), torch.float32, DEVICE)
    results = run(case)
    assert results["output"].shape == case.geom.output_shape
    assert not results["grad_weight"].any()


@pytest.mark.parametrize("spec", ["one-block", "offset-groups"])
def test_mask_logits(spec):
    """Offsets and logits as parts of one map: the sigmoid and its gradient happen in the kernels, nothing is copied."""
    case = case_of(spec)
    x, offset, mask, weight = case.tensors
    logits = mask * 6 - 3
    predicted = OffsetMask.of(torch.cat((offset, logits), 1), None, mask_logits=True)
    case.tensors = (x, predicted.offset, predicted.mask, weight)
    results = run(case, mask_logits=True)
    case.tensors = (x, offset, logits.sigmoid(), weight)
    expected = exact(case)
    factor = logits.double().sigmoid()
    expected["grad_mask"] *= factor * (1 - factor)
    assert_agree(results, expected, FLOOR[torch.float32])


@triton.jit
def widen_kernel(word_ptr, wide_ptr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    words = tl.load(word_ptr + row * WORDS + tl.arange(0, WORDS)[None, :])
    tl.store(wide_ptr + row * 2 * WORDS + tl.arange(0, 2 * WORDS)[None, :], widen_tile(words))


def test_words_hold_pairs_of_channels():
    x = torch.randn(8, 32, device=DEVICE).bfloat16()
    x[0, :4] = torch.tensor([float("inf"), float("nan"), -0.0, 1e-40])
    wide = torch.empty(8, 32, device=DEVICE)
    widen_kernel[(1,)](x.view(torch.int32), wide, ROWS=8, WORDS=16)
    assert torch.equal(wide.view(torch.int32), x.float().view(torch.int32))


@pytest.mark.parametrize("spec", ["offset-groups", "many-channels"])
def test_addresses_that_words_do_not_fit(spec):
    """A bfloat16 input that begins two bytes past a word is read channel by channel, to the same results."""
    case = case_of(spec, torch.bfloat16)
    x, *others = case.tensors
    fits = run(case)
    channels_last = x.permute(0, 2, 3, 1)
    storage = x.new_empty(x.numel() + 1)
    unaligned = storage[1:].view(channels_last.shape).copy_(channels_last)
    assert unaligned.data_ptr() % 4 == 2
    assert unaligned.is_contiguous()
    case.tensors = (unaligned.permute(0, 3, 1, 2), *others)
    assert_agree(run(case), {name: value.double() for name, value in fits.items()}, 1e-5)


@triton.jit
def address_kernel(cell_ptr, corner_ptr, column_ptr, row, width, CHANNELS: tl.constexpr, GROUPS: tl.constexpr):
    """Store the offsets that the helpers compute for one cell, and one of the last elements of a column buffer."""
    cell = tl.load(cell_ptr)
    row00, row01, row10, row11 = corner_rows(cell, width, CHANNELS)
    tl.store(corner_ptr, row00)
    tl.store(corner_ptr + 1, row01)
    tl.store(corner_ptr + 2, row10)
    tl.store(corner_ptr + 3, row11)
    last = tl.full((1,), row, tl.int32)
    channel = tl.full((1,), CHANNELS - 1, tl.int32)
    tl.store(column_ptr + tl.arange(0, 1), column_offset(last, 8, channel, row + 1, CHANNELS, GROUPS, 9))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("width", "channels"), [(4000, 512), (1 << 20, 2048)])
def test_addresses_beyond_2_to_the_31(width, channels, groups):
    """Offsets are exact up to the largest slice; the interpreter also checks every int32 sum and product."""
    pixel = workspace.MAX_PIXELS - width - 1000
    row = (1 << 24) - 1
    cell = torch.tensor([pixel * 16 + 15], dtype=torch.int32, device=DEVICE)
    corners = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    column = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    address_kernel[(1,)](cell, corners, column, row, width, CHANNELS=channels, GROUPS=groups)
    expected = [(pixel + step) * channels for step in (0, 1, width, width + 1)]
    assert corners.tolist() == expected
    assert expected[0] > 1 << 31
    assert column.item() == (row + 1) * 9 * channels - 1


@triton.jit
def order_kernel(out_ptr, out_height, out_width, STRIP: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, swizzle(index, out_height, out_width, STRIP))


@pytest.mark.parametrize("size", [(4, 32), (5, 19), (3, 7)], ids=str)
def test_strip_order_is_a_permutation_by_strips(size):
    height, width = size
    out = torch.zeros(256, dtype=torch.int32, device=DEVICE)
    order_kernel[(1,)](out, height, width, STRIP=8, BLOCK=256)
    expected = [
        (b * height + y) * width + x
        for b in range(256 // (height * width))
        for start in range(0, width, 8)
        for y in range(height)
        for x in range(start, min(start + 8, width))
    ]
    assert out[: len(expected)].tolist() == expected


@triton.jit
def chunk_order_kernel(out_ptr, rows, out_width, STRIP: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, swizzle_chunk(index, rows, out_width, STRIP))


@pytest.mark.parametrize("rows", [1, 18, 19, 3 * 19 + 5])
def test_strips_of_a_chunk_reach_every_row_once(rows):
    """Also where the chunk is shorter than a row of the map, or ends inside one."""
    width = 19
    out = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    chunk_order_kernel[(1,)](out, rows, width, STRIP=8, BLOCK=64)
    order = out[:rows].tolist()
    assert sorted(order) == list(range(rows))
    assert rows < 2 * width or order[8] == width  # the strip goes on in the row below

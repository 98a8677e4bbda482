"""Backend "torch": golden cases, random shapes against the reference, borders, chunks, memory and strides."""

import itertools
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.triton_dcn.cases import (
    CASES,
    QUANTITIES,
    OperatorCall,
    OperatorCase,
    golden_case,
    make_case,
    relative,
    run_backend,
    two_threads,
)
from triton_dcn import deform_conv2d, reference, torch_backend, torch_planes, torch_samples
from triton_dcn.geometry import ConvGeometry
from triton_dcn.offset_mask import OffsetMask, OffsetMaskGrad

GOLDEN = [f"c{number:02d}" for number in range(25)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # half: machine epsilon
CASES_WITH_IMAGES = [name for name in CASES if name != "empty"]


@pytest.fixture(params=[0, 1 << 20], ids=["rows", "planes"], autouse=True)
def _form(request, monkeypatch):
    """Every test runs with both forms: samples read rows of channels, or single channels of planes."""
    monkeypatch.setattr(torch_planes, "WIDEST", request.param)


def run(case, needs=None, backend=torch_backend):
    """Output and gradients by name, without those that do not exist."""
    results = run_backend(case, backend, needs)
    return {name: value for name, value in results.items() if value is not None}


def run_in_float64(case):
    """The results of the reference in float64 on the same rounded inputs."""
    return run(case.double(), backend=reference)


@pytest.fixture
def _two_threads():
    with two_threads():
        yield


def check_golden(golden, name, dtype):
    case = golden_case(golden, name, dtype)
    found = run(case)
    expected = dict(zip(QUANTITIES, (case.output, *case.grads), strict=True))
    assert set(found) == {key for key, value in expected.items() if value is not None}

    for key, value in found.items():
        assert value.dtype == dtype
        assert relative(value, expected[key]) < TOLERANCE[dtype], (name, key)
        if dtype == torch.float64:
            assert (value - expected[key]).abs().max() < 1e-12 * max(1, expected[key].abs().max()), (name, key)


@pytest.mark.parametrize("chunk", [None, 20000, 4000], ids=["whole", "chunks", "blocks"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_golden(golden, dtype, chunk, monkeypatch):
    if chunk is not None:
        monkeypatch.setattr(torch_samples, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(torch_planes, "CHUNK_SAMPLES", chunk // 50)
    for name in GOLDEN:
        check_golden(golden, name, dtype)


@pytest.fixture
def _convolutions(monkeypatch):
    """Products of one group are convolutions, as on a processor of AMD's, the small ones, too."""
    monkeypatch.setattr(torch_backend, "_is_amd_processor", lambda: True)
    monkeypatch.setattr(torch_backend, "LARGEST_IMAGE_WITHOUT_ONEDNN", 0)


@pytest.mark.usefixtures("_convolutions")
@pytest.mark.parametrize("name", ["c01", "c02", "c03"])
def test_golden_with_convolutions(golden, name):
    check_golden(golden, name, torch.float32)


def test_onednn_computes_the_products(capfd, monkeypatch):
    """On a processor of AMD's, also with one thread, and without copies of the columns."""
    monkeypatch.setattr(torch_planes, "WIDEST", 0)
    monkeypatch.setattr(torch_backend, "_is_amd_processor", lambda: True)
    case = make_case(OperatorCase("", 1, 64, 48, 24, 24), torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            run(case)
    finally:
        torch.set_num_threads(threads)
    executed = [line.split(",") for line in capfd.readouterr().out.splitlines() if ",exec," in line]
    convolutions = [fields for fields in executed if "convolution" in fields]
    assert len([fields for fields in convolutions if "forward_training" in fields]) == 2
    assert len([fields for fields in convolutions if "backward_weights" in fields]) == 1
    for fields in executed:
        if "reorder" in fields:
            sizes = [int(size) for size in fields[-2].split("x")]
            assert math.prod(sizes) == case.tensors[3].numel(), fields  # the weight and its gradient alone


@pytest.mark.usefixtures("_convolutions")
@pytest.mark.parametrize("size", [(6, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("channels", [1, 4])
def test_one_output_channel_with_convolutions(channels, size):
    """Rows of one channel have the strides of every layout."""
    case = make_case(OperatorCase("", 2, channels, 1, *size), torch.float32)
    target = run_in_float64(case)
    found = run(case)
    assert set(found) == set(target)
    for key, value in found.items():
        assert relative(value, target[key]) < TOLERANCE[torch.float32], key


@pytest.mark.parametrize("name", CASES_WITH_IMAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_the_references(name, dtype):
    case = make_case(CASES[name], dtype)
    target = run_in_float64(case)
    in_same_dtype = run(case, backend=reference)
    for key, value in run(case).items():
        assert value.dtype == dtype
        assert relative(value, target[key]) <= 2 * relative(in_same_dtype[key], target[key]) + FLOOR[dtype], key


def test_half_input_with_float_offsets():
    case = make_case(CASES["groups"], torch.bfloat16)
    x, offset, mask, weight = case.tensors
    case.tensors = (x, offset.float(), mask.float(), weight)
    target = run_in_float64(case)
    found = run(case)

    expected_dtypes = [torch.bfloat16] * 2 + [torch.float32] * 2 + [torch.bfloat16]
    assert [found[key].dtype for key in QUANTITIES] == expected_dtypes
    for key, value in found.items():
        assert relative(value, target[key]) < FLOOR[torch.bfloat16], key


@st.composite
def specs(draw):
    """Arguments of `make_case`; the output is at least 1x1."""
    integers = st.integers
    channels = draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    divisors = [number for number in range(1, channels + 1) if channels % number == 0]
    groups = draw(st.sampled_from(divisors))
    offset_groups = draw(st.sampled_from(divisors))

    kernel = draw(st.tuples(integers(1, 4), integers(1, 4)))
    stride = draw(st.tuples(integers(1, 3), integers(1, 3)))
    padding = draw(st.tuples(integers(0, 3), integers(0, 3)))
    dilation = draw(st.tuples(integers(1, 3), integers(1, 3)))
    size = []
    for axis in (0, 1):
        window = dilation[axis] * (kernel[axis] - 1) + 1
        size.append(draw(integers(max(1, window - 2 * padding[axis]), window + 8)))

    out_channels = groups * draw(integers(1, 3))
    with_mask = draw(st.booleans())
    with_bias = draw(st.booleans())
    batch = draw(integers(1, 3))
    return OperatorCase(
        "",
        batch,
        channels,
        out_channels,
        *size,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_groups=offset_groups,
        has_mask=with_mask,
        has_bias=with_bias,
    )


def stored(tensor, layout):
    """The same values with other strides."""
    if tensor is None or layout == "contiguous":
        return tensor
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)

    batch, channels, height, width = tensor.shape
    transposed_with_gaps = tensor.new_full((batch, channels, width, height + 1), float("nan"))
    return transposed_with_gaps[..., :height].transpose(2, 3).copy_(tensor)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    spec=specs(),
    seed=st.integers(0, 99),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    chunk=st.sampled_from([1, 3000, 1 << 24]),
    joined_channels=st.sampled_from([1, 3, 32]),
)
def test_random_shapes_agree_with_the_reference(spec, seed, layout, chunk, joined_channels):
    case = make_case(spec, torch.float64, seed=seed)
    target = run(case, backend=reference)
    case.tensors = tuple(stored(tensor, layout) for tensor in case.tensors)
    case.grad_output = stored(case.grad_output, layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_samples, "CHUNK_BYTES", chunk)
        patch.setattr(torch_planes, "CHUNK_SAMPLES", chunk)
        patch.setattr(torch_backend, "JOINED_CHANNELS", joined_channels)
        found = run(case)
    assert set(found) == set(target)
    for key, value in found.items():
        assert value.shape == target[key].shape
        assert relative(value, target[key]) < 1e-12, key


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("channels", "offset_groups"), [(256, 1), (512, 1), (1024, 1), (256, 2), (256, 4), (256, 32)])
def test_layers_of_resnext(channels, offset_groups, dtype, threads):
    """32 groups of 8, 16 and 32 channels."""
    spec = OperatorCase("", 2, channels, channels, 5, 6, groups=32, offset_groups=offset_groups, has_bias=False)
    case = make_case(spec, dtype)
    target = run_in_float64(case)
    with two_threads() if threads == 2 else nullcontext():
        found = run(case)
    for key, value in found.items():
        assert relative(value, target[key]) < TOLERANCE[dtype], key


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("name", ["groups", "v1"])
def test_only_what_is_needed_and_the_same(name, needs):
    case = make_case(CASES[name], torch.float32)
    all_results = run(case)
    found = run(case, needs)
    expected = {key for key, need in zip(QUANTITIES[1:], needs, strict=True) if need and key in all_results}
    assert set(found) - {"output"} == expected
    for key in expected:
        assert torch.equal(found[key], all_results[key])


@pytest.mark.parametrize("axis", [0, 1], ids=["y", "x"])
def test_border_rule(axis):
    """Samples at or beyond -1, H or W read 0 and have no gradients; just inside they do."""
    height, width = 4, 5
    size = (height, width)[axis]
    outside = (-2, -1, size, size + 0.5)
    inside = (-0.999, size - 1, size - 0.001)
    x = torch.randn(1, 3, height, width).double()
    weight = torch.randn(2, 3, 1, 1).double()
    output_positions = torch.arange(size).view((-1, 1) if axis == 0 else (1, -1))

    for position in (*outside, *inside):
        live = position in inside
        offset = torch.zeros(1, 2, height, width).double()
        offset[0, axis] = position - output_positions
        geom = ConvGeometry.of(x, offset, weight, None, (1, 1), (0, 0), (1, 1))
        found = run(OperatorCall(geom, (x, offset, None, weight), None, torch.ones(geom.output_shape).double()))

        has_gradient = found["grad_offset"][0, axis] != 0
        assert bool(has_gradient.all()) is bool(has_gradient.any()) is live
        assert bool(found["grad_offset"].any()) is live
        assert bool(found["output"].any()) is bool(found["grad_input"].any()) is live


def test_far_from_the_origin_fractions_are_as_precise():
    """Two thousand pixels to the right, where float32 positions have steps of 1/8192 pixel, errors are of 1e-7."""
    case = make_case(OperatorCase("", 1, 8, 8, 3, 2048), torch.float32)
    target = run_in_float64(case)
    for key, value in run(case).items():
        assert relative(value, target[key]) < 1e-6, key
    adds_grid_to_offset = run(case, backend=reference)
    assert relative(adds_grid_to_offset["output"], target["output"]) > 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30], ids=str)
@pytest.mark.parametrize("axis", [0, 1], ids=["y", "x"])
def test_offsets_that_are_not_finite_or_far(value, axis):
    """Such samples count as outside, and the others as if nothing had happened."""
    case = make_case(CASES["plain"], torch.float32)
    x, offset, mask, weight = case.tensors
    replaced = torch.rand(2, 9, 7, 9) < 0.3
    far_offset = offset.clone()
    offset.view(2, 9, 2, 7, 9)[:, :, axis][replaced] = value
    far_offset.view(2, 9, 2, 7, 9)[:, :, axis][replaced] = 1000.0

    found = run(case)
    case.tensors = (x, far_offset, torch.where(replaced, 0, mask), weight)
    for key, expected in run(case).items():
        assert found[key].isfinite().all()
        assert relative(found[key], expected) < 1e-6, key

    assert not found["grad_mask"][replaced].any()
    grad_y, grad_x = found["grad_offset"].view(2, 9, 2, 7, 9).unbind(2)
    assert not grad_y[replaced].any()
    assert not grad_x[replaced].any()


def test_expanded_tensors():
    case = make_case(CASES["plain"], torch.float64)
    x, offset, mask, weight = case.tensors
    case.tensors = (x[:1].expand_as(x), offset[..., :1].expand_as(offset), mask[:1, :1].expand_as(mask), weight)
    case.grad_output = torch.ones((), dtype=torch.float64).expand_as(case.grad_output)
    target = run(case, backend=reference)
    for key, value in run(case).items():
        assert relative(value, target[key]) < 1e-12, key


def test_empty_batch():
    case = make_case(CASES["empty"], torch.float32)
    found = run(case)
    for key, like in zip(QUANTITIES, (case.grad_output, *case.tensors), strict=True):
        assert found[key].shape == like.shape
        assert not found[key].any()


def test_layout_follows_the_input():
    """Through the operator, which allocates the gradients of offset and mask."""
    case = make_case(CASES["plain"], torch.float32)

    def run_operator(memory_format):
        leaves = [t.clone(memory_format=memory_format).requires_grad_() for t in case.tensors]
        x, offset, mask, weight = leaves
        output = deform_conv2d(x, offset, weight, backend="torch", **(case.arguments | {"mask": mask}))
        grads = torch.autograd.grad(output, leaves, case.grad_output)
        return dict(zip(QUANTITIES, (output, *grads), strict=True))

    plain = run_operator(torch.contiguous_format)
    found = run_operator(torch.channels_last)
    for key in QUANTITIES:
        assert plain[key].is_contiguous()
        assert relative(found[key], plain[key]) < 1e-6
        assert key == "grad_weight" or found[key].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_mask_logits(memory_format):
    """Offsets and logits as views of one map, and their gradients written into views of another."""
    case = make_case(CASES["groups"], torch.float64)
    x, offset, mask, weight = case.tensors
    expected = run_backend(case, reference, mask_logits=True)
    packed = torch.cat([offset, mask], 1).contiguous(memory_format=memory_format)
    offset_mask = OffsetMask.of(packed, None, True)
    grad_packed = torch.full_like(packed, torch.nan)
    grad_offset_mask = OffsetMaskGrad.of(grad_packed, None, True)

    output = torch_backend.forward(case.geom, x, offset_mask, weight, case.bias)
    grads = torch_backend.backward(
        case.geom, case.grad_output, x, offset_mask, weight, grad_offset_mask, needs_input=False, needs_weight=False
    )
    assert grads == (None, None)
    assert relative(output, expected["output"]) < 1e-12
    assert relative(grad_packed, torch.cat([expected["grad_offset"], expected["grad_mask"]], 1)) < 1e-12


def test_chunks_cover_everything_once(monkeypatch):
    geom = make_case(CASES["odd"], torch.float32).geom
    for chunk_bytes in (1, 1000, 5000, 20000, 1 << 24):
        monkeypatch.setattr(torch_samples, "CHUNK_BYTES", chunk_bytes)
        visits = torch.zeros(geom.batch, geom.positions)
        for images, blocks in torch_samples.divide_work(geom, 4):
            for block in blocks:
                for chunk in block.chunks:
                    visits[images, block.positions][chunk.images, chunk.positions] += 1
        assert (visits == 1).all()


class Largest(TorchDispatchMode):
    """Records the size in bytes of the largest tensor made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.layout == torch.strided:
                self.size = max(self.size, value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("spec", [
    OperatorCase("", 4, 32, 8, 40, 40),
    OperatorCase("", 4, 32, 32, 40, 40, groups=8, offset_groups=4),
    OperatorCase("", 1, 2, 2, 120, 120, kernel=(5, 5), padding=(2, 2)),
], ids=["columns", "groups", "indices"])  # fmt: skip
def test_memory_is_bounded(spec, monkeypatch):
    """No tensor is larger than the arguments and results, or than a chunk, which here is larger than three weights."""
    case = make_case(spec, torch.float32)
    monkeypatch.setattr(torch_samples, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(torch_planes, "CHUNK_SAMPLES", 1 << 13)
    with Largest() as largest:
        run(case)
    largest_argument = max(tensor.nbytes for tensor in (*case.tensors, case.grad_output))
    assert largest.size <= max(largest_argument, 1 << 20)

    geom = case.geom
    bytes_per_tap = 4 * geom.in_channels + 64 * geom.offset_groups
    assert 3 * largest.size < geom.batch * geom.positions * geom.taps * bytes_per_tap


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time(dtype, monkeypatch):
    monkeypatch.setattr(torch_samples, "CHUNK_BYTES", 1 << 18)
    case = make_case(OperatorCase("", 2, 16, 8, 24, 25), dtype)
    first = run(case)
    for _ in range(3):
        assert all(torch.equal(value, first[key]) for key, value in run(case).items())


def test_deterministic_algorithms_are_allowed():
    case = make_case(CASES["groups"], torch.float32)
    expected = run(case)
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(value, expected[key]) for key, value in run(case).items())
    finally:
        torch.use_deterministic_algorithms(False)


def test_long_keys():
    """More rows than a 16-bit key can name."""
    case = make_case(
        OperatorCase("", 1, 2, 2, 300, 260, kernel=(1, 1), padding=(0, 0), has_bias=False), torch.float64, spread=90
    )
    target = run(case, backend=reference)
    for key, value in run(case).items():
        assert relative(value, target[key]) < 1e-12, key


def test_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(make_case(CASES["plain"], torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES_WITH_IMAGES)
def test_cuda(name):
    for dtype in (torch.float64, torch.float32):
        case = make_case(CASES[name], dtype, "cuda")
        target = run_in_float64(case)
        for key, value in run(case).items():
            assert relative(value, target[key]) < TOLERANCE[dtype], key

"""The `embedding_bag` path: golden cases, the reference on drawn shapes, borders, pieces, memory and strides."""

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.triton_dcn.cases import CASES, golden_case, make_case, relative, two_threads
from triton_dcn import reference, torch_backend, torch_samples
from triton_dcn.geometry import ConvGeometry

GOLDEN = [f"c{number:02d}" for number in range(25)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # half: machine epsilon
NAMES = ("output", "grad_input", "grad_offset", "grad_mask", "grad_weight")
ALL = (True, True, True, True)
FILLED = [name for name in CASES if name != "empty"]


def run(case, needs=ALL, backend=torch_backend):
    """Output and gradients by name, without those that do not exist."""
    needs = tuple(need and tensor is not None for need, tensor in zip(needs, case.tensors, strict=True))
    x, offset, mask, weight = case.tensors
    output = backend.forward(case.geom, x, offset, mask, weight, case.bias)
    grads = backend.backward(case.geom, case.grad_output, *case.tensors, needs)
    return {name: value for name, value in zip(NAMES, (output, *grads), strict=True) if value is not None}


def exact(case):
    """The results of the reference in float64 on the same rounded inputs."""
    double = [None if tensor is None else tensor.double() for tensor in (*case.tensors, case.bias, case.grad_output)]
    return run(type(case)(case.geom, tuple(double[:4]), double[4], double[5]), backend=reference)


@pytest.fixture
def _two_threads():
    with two_threads():
        yield


def check_golden(golden, name, dtype):
    case = golden_case(golden, name, dtype)
    found = run(case)
    expected = dict(zip(NAMES, (case.output, *case.grads), strict=True))
    assert set(found) == {key for key, value in expected.items() if value is not None}
    for key, value in found.items():
        assert value.dtype == dtype
        assert relative(value, expected[key]) < TOLERANCE[dtype], (name, key)
        if dtype == torch.float64:
            assert (value - expected[key]).abs().max() < 1e-12 * max(1, expected[key].abs().max()), (name, key)


@pytest.mark.parametrize("chunk", [None, 20000, 4000], ids=["whole", "pieces", "blocks"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_golden(golden, dtype, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(torch_samples, "CHUNK_BYTES", chunk)
    for name in GOLDEN:
        check_golden(golden, name, dtype)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("name", ["c01", "c02", "c03"])
def test_golden_with_convolutions(golden, name):
    check_golden(golden, name, torch.float32)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("size", [(6, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("channels", [1, 4])
def test_one_output_channel_with_convolutions(channels, size):
    """Rows of one channel have the strides of every layout."""
    case = make_case((2, channels, 1, size, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, True, True), torch.float32)
    target, found = exact(case), run(case)
    assert set(found) == set(target)
    for key, value in found.items():
        assert relative(value, target[key]) < TOLERANCE[torch.float32], key


@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_the_references(name, dtype):
    case = make_case(CASES[name], dtype)
    target, found, plain = exact(case), run(case), run(case, backend=reference)
    for key, value in found.items():
        assert value.dtype == dtype
        assert relative(value, target[key]) <= 2 * relative(plain[key], target[key]) + FLOOR[dtype], key


def test_half_input_with_float_offsets():
    case = make_case(CASES["groups"], torch.bfloat16)
    x, offset, mask, weight = case.tensors
    case.tensors = x, offset.float(), mask.float(), weight
    target, found = exact(case), run(case)
    assert [found[key].dtype for key in NAMES] == [torch.bfloat16] * 2 + [torch.float32] * 2 + [torch.bfloat16]
    for key, value in found.items():
        assert relative(value, target[key]) < FLOOR[torch.bfloat16], key


@st.composite
def specs(draw):
    """Arguments of `make_case`."""
    number = st.integers
    channels = draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    groups, offset_groups = draw(st.sampled_from(divisors)), draw(st.sampled_from(divisors))
    kernel = draw(st.tuples(number(1, 4), number(1, 4)))
    stride, padding, dilation = (draw(st.tuples(number(low, 3), number(low, 3))) for low in (1, 0, 1))
    size = [
        draw(number(max(1, d * (k - 1) + 1 - 2 * p), d * (k - 1) + 9))
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    out = groups * draw(number(1, 3))
    flags = draw(st.tuples(st.booleans(), st.booleans()))
    return (draw(number(1, 3)), channels, out, size, kernel, stride, padding, dilation, groups, offset_groups, *flags)


def stored(tensor, layout):
    """The same values with other strides."""
    if tensor is None or layout == "contiguous":
        return tensor
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = tensor.shape
    holder = tensor.new_full((batch, channels, width, height + 1), float("nan"))  # transposed, with holes
    return holder[..., :height].transpose(2, 3).copy_(tensor)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    spec=specs(),
    seed=st.integers(0, 99),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    chunk=st.sampled_from([1, 3000, 1 << 24]),
)
def test_drawn_shapes_agree_with_the_reference(spec, seed, layout, chunk):
    case = make_case(spec, torch.float64, seed=seed)
    target = run(case, backend=reference)
    case.tensors = tuple(stored(tensor, layout) for tensor in case.tensors)
    case.grad_output = stored(case.grad_output, layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_samples, "CHUNK_BYTES", chunk)
        found = run(case)
    assert set(found) == set(target)
    for key, value in found.items():
        assert value.shape == target[key].shape
        assert relative(value, target[key]) < 1e-12, key


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("name", ["groups", "v1"])
def test_only_what_is_needed_and_the_same(name, needs):
    case = make_case(CASES[name], torch.float32)
    everything, found = run(case), run(case, needs)
    expected = {key for key, need in zip(NAMES[1:], needs, strict=True) if need and key in everything}
    assert set(found) - {"output"} == expected
    for key in expected:
        assert torch.equal(found[key], everything[key])


def test_border_rule():
    """Samples at or beyond -1, H or W read 0 and move nothing; just inside they do."""
    height, width = 4, 5
    x, weight = torch.randn(1, 3, height, width).double(), torch.randn(2, 3, 1, 1).double()
    for axis, size in enumerate((height, width)):
        for position, live in ((-2, False), (-1, False), (-0.999, True), (size - 1, True), (size - 0.001, True),
                               (size, False), (size + 0.5, False)):  # fmt: skip
            offset = torch.full((1, 2, height, width), 0.25).double()
            offset[0, axis] = position - torch.arange(size).view((-1, 1) if axis == 0 else (1, -1))
            offset[0, 1 - axis] -= 0.25
            geom = ConvGeometry.of(x, offset, weight, None, (1, 1), (0, 0), (1, 1))
            output = torch_backend.forward(geom, x, offset, None, weight, None)
            grad_input, grad_offset, *_ = torch_backend.backward(
                geom, torch.ones_like(output), x, offset, None, weight, ALL
            )
            moved = grad_offset[0, axis].abs() > 0
            assert bool(moved.all()) is bool(moved.any()) is live
            assert bool(output.any()) is bool(grad_input.any()) is live
            assert bool(grad_offset.any()) is live


def test_far_from_the_origin_fractions_are_as_precise():
    """Two thousand pixels to the right, where float32 positions have steps of 1/8192 pixel, errors are of 1e-7."""
    case = make_case((1, 8, 8, (3, 2048), (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, True, True), torch.float32)
    target, found, plain = exact(case), run(case), run(case, backend=reference)
    for key, value in found.items():
        assert relative(value, target[key]) < 1e-6, key
    assert relative(plain["output"], target["output"]) > 1e-5  # what adding the grid to the offset costs


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30], ids=str)
@pytest.mark.parametrize("axis", [0, 1], ids=["y", "x"])
def test_offsets_to_nowhere(value, axis):
    """Such samples count as outside and the others as if nothing had happened."""
    case = make_case(CASES["plain"], torch.float32)
    lost = torch.rand(2, 9, 7, 9) < 0.3
    offset, mask = case.tensors[1], case.tensors[2]
    mask_without, far = torch.where(lost, 0, mask), offset.clone()
    offset.view(2, 9, 2, 7, 9)[:, :, axis][lost] = value
    far.view(2, 9, 2, 7, 9)[:, :, axis][lost] = 1000.0
    found = run(case)
    case.tensors = case.tensors[0], far, mask_without, case.tensors[3]
    for key, expected in run(case).items():
        assert found[key].isfinite().all()
        assert relative(found[key], expected) < 1e-6, key
    assert not found["grad_mask"][lost].any()
    assert not found["grad_offset"].view(2, 9, 2, 7, 9).transpose(1, 2)[lost[:, None].expand(-1, 2, -1, -1, -1)].any()


def test_expanded_tensors():
    case = make_case(CASES["plain"], torch.float64)
    x, offset, mask, weight = case.tensors
    case.tensors = x[:1].expand_as(x), offset[..., :1].expand_as(offset), mask[:1, :1].expand_as(mask), weight
    case.grad_output = torch.ones((), dtype=torch.float64).expand_as(case.grad_output)
    target = run(case, backend=reference)
    for key, value in run(case).items():
        assert relative(value, target[key]) < 1e-12, key


def test_empty_batch():
    case = make_case(CASES["empty"], torch.float32)
    found = run(case)
    for key, like in zip(NAMES, (case.grad_output, *case.tensors), strict=True):
        assert found[key].shape == like.shape
        assert not found[key].any()


def test_layout_follows_the_input():
    case = make_case(CASES["plain"], torch.float32)
    plain = run(case)
    case.tensors = tuple(tensor.contiguous(memory_format=torch.channels_last) for tensor in case.tensors)
    found = run(case)
    for key in NAMES:
        assert plain[key].is_contiguous()
        assert relative(found[key], plain[key]) < 1e-6
        assert key == "grad_weight" or found[key].is_contiguous(memory_format=torch.channels_last)


def test_pieces_cover_everything_once(monkeypatch):
    geom = make_case(CASES["odd"], torch.float32).geom
    for chunk in (1, 1000, 5000, 20000, 1 << 24):
        monkeypatch.setattr(torch_samples, "CHUNK_BYTES", chunk)
        seen = torch.zeros(geom.batch, geom.positions)
        for images, blocks in torch_samples.cut(geom, 4):
            for block, pieces in blocks:
                for piece in pieces:
                    seen[images, block][:, piece] += 1
        assert (seen == 1).all()


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
    (4, 32, 8, (40, 40), (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, True, True),
    (4, 32, 32, (40, 40), (3, 3), (1, 1), (1, 1), (1, 1), 8, 4, True, True),
    (1, 2, 2, (120, 120), (5, 5), (1, 1), (2, 2), (1, 1), 1, 1, True, True),
], ids=["columns", "groups", "indices"])  # fmt: skip
def test_memory_is_bounded(spec, monkeypatch):
    """No tensor is larger than what is given and returned or than a piece, here larger than three weights."""
    case = make_case(spec, torch.float32)
    monkeypatch.setattr(torch_samples, "CHUNK_BYTES", 1 << 20)
    with Largest() as largest:
        run(case)
    given_tensors = max(tensor.nbytes for tensor in (*case.tensors, case.grad_output))
    assert largest.size <= max(given_tensors, 1 << 20)
    geom = case.geom
    whole = geom.batch * geom.positions * geom.taps * (4 * geom.in_channels + 64 * torch_samples.slice_count(geom))
    assert 3 * largest.size < whole


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time(dtype, monkeypatch):
    monkeypatch.setattr(torch_samples, "CHUNK_BYTES", 1 << 18)
    case = make_case((2, 16, 8, (24, 25), (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, True, True), dtype)
    first = run(case)
    for _ in range(3):
        assert all(torch.equal(value, first[key]) for key, value in run(case).items())


def test_deterministic_algorithms_are_allowed():
    case = make_case(CASES["groups"], torch.float32)
    free = run(case)
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(value, free[key]) for key, value in run(case).items())
    finally:
        torch.use_deterministic_algorithms(False)


def test_long_keys():
    """More rows than a 16-bit key can name."""
    case = make_case((1, 2, 2, (300, 260), (1, 1), (1, 1), (0, 0), (1, 1), 1, 1, True, False), torch.float64, spread=90)
    target = run(case, backend=reference)
    for key, value in run(case).items():
        assert relative(value, target[key]) < 1e-12, key


def test_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(make_case(CASES["plain"], torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FILLED)
def test_cuda(name):
    for dtype in (torch.float64, torch.float32):
        case = make_case(CASES[name], dtype, "cuda")
        target = exact(case)
        for key, value in run(case).items():
            assert relative(value, target[key]) < TOLERANCE[dtype], key

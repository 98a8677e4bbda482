"""Deformable RoI pooling: golden numbers, the backends against the reference, borders, transforms and errors.

The kernels run in Triton's interpreter on a machine without a GPU; roi counts are small there because it is slow.
"""

import importlib.util
import math

import pytest
import torch
from torch.func import jvp, vmap

from detector.ops.roi_align import roi_align
from tests.triton_dcn.cases import QUIET
from triton_dcn import deform_roi_pool
from triton_dcn.roi_pool import operator, torch_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
TRITON = pytest.param("triton", marks=[NEEDS_TRITON, pytest.mark.filterwarnings("ignore::RuntimeWarning")])
PLAIN_BACKENDS = ("reference", "torch")
BACKENDS = (*PLAIN_BACKENDS, TRITON)
GOLDEN = [f"d{index:02}" for index in range(14)]
HUGE = 3e38
NAN = math.nan
INF = math.inf


def problem(count=6, channels=3, size=(9, 12), bins=(2, 3), dtype=torch.float64):
    """Return features of two images, rois that lie partly outside of them, and an offset."""
    features = torch.randn(2, channels, *size, dtype=dtype)
    center = torch.rand(count, 2) * torch.tensor([size[1], size[0]]) * 4
    half = torch.rand(count, 2) * 16 + 3
    rois = torch.cat([torch.randint(2, (count, 1)), center - half, center + half], 1).to(dtype)
    offset = torch.randn(count, 2, *bins, dtype=dtype)
    return features, rois, offset


def both_ways(features, rois, offset, grad=None, **options):
    """Return the output and the gradients of the features and of the offset, on the CPU."""
    options = {"output_size": (2, 3), "spatial_scale": 0.25} | options
    features = features.detach().to(DEVICE).requires_grad_()
    offset = None if offset is None else offset.detach().to(DEVICE).requires_grad_()
    output = deform_roi_pool(features, rois.to(DEVICE), offset, **options)
    if grad is None:
        grad = torch.arange(output.numel(), dtype=torch.float64).cos().view(output.shape)
    inputs = [features] if offset is None else [features, offset]
    grads = torch.autograd.grad(output, inputs, grad.to(output))
    return [tensor.detach().cpu() for tensor in (output, *grads)]


def relative_error(actual, expected, floor=1e-300):
    actual = torch.as_tensor(actual).double()
    expected = torch.as_tensor(expected).double()
    return float((actual - expected).norm() / expected.norm().clamp(min=floor))


class TestGolden:
    def results(self, golden, case, dtype, backend):
        """Return what is computed and what mmcv computed."""
        arrays, parameters = golden("deform_roi_pool")
        names = ("feat", "rois", "offset", "grad_out")
        tensors = [
            torch.from_numpy(arrays[f"{case}.{name}"]).to(dtype) if f"{case}.{name}" in arrays else None
            for name in names
        ]
        settings = {key: parameters[case][key] for key in ("spatial_scale", "sampling_ratio", "gamma")}
        settings["output_size"] = tuple(parameters[case]["output_size"])
        results = both_ways(*tensors, backend=backend, **settings)
        expected = [arrays[f"{case}.{name}"] for name in ("output", "grad_feat", "grad_offset")[: len(results)]]
        return zip(results, expected, strict=True)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
    @pytest.mark.parametrize("backend", PLAIN_BACKENDS)
    @pytest.mark.parametrize("case", GOLDEN)
    def test_plain(self, golden, case, backend, dtype, tolerance):
        for result, expected in self.results(golden, case, dtype, backend):
            # a map of one line has offset gradients of 0, up to rounding
            assert relative_error(result, expected, floor=1) < tolerance

    @pytest.mark.parametrize("backend", [TRITON])
    @pytest.mark.parametrize("case", ["d05", "d10", "d12"])
    def test_kernels(self, golden, case, backend):
        for result, expected in self.results(golden, case, torch.float32, backend):
            assert relative_error(result, expected, floor=1) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_common_offset_moves_the_roi(backend):
    features, rois, _ = problem(4, dtype=torch.float32)
    sides = rois[:, 3:] - rois[:, 1:3]
    shift = torch.tensor([2.0, -3.0])
    offset = shift[:, None, None].expand(4, 2, 2, 3)
    moved = rois.clone()
    moved[:, 1:] += (0.1 * shift * sides).repeat(1, 2)
    settings = {"output_size": (2, 3), "spatial_scale": 0.25, "sampling_ratio": 2, "backend": backend}
    features, rois, moved, offset = (tensor.to(DEVICE) for tensor in (features, rois, moved, offset))
    found = deform_roi_pool(features, rois, offset, **settings)
    torch.testing.assert_close(found, deform_roi_pool(features, moved, None, **settings), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_backends_agree_at_and_beyond_the_border(backend, sampling_ratio):
    """Far offsets, inverted and empty rois, rois of no image."""
    features, rois, offset = problem(7, dtype=torch.float32)
    offset *= 8
    rois[4, 3:] = rois[4, 1:3] - 5
    rois[5, 3:] = rois[5, 1:3]
    rois[6, 0] = -1
    results = both_ways(features, rois, offset, backend=backend, sampling_ratio=sampling_ratio)
    exact = [tensor.double() for tensor in (features, rois, offset)]
    expected = both_ways(*exact, backend="reference", sampling_ratio=sampling_ratio)
    for result, reference in zip(results, expected, strict=True):
        assert relative_error(result, reference) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_counts_nothing(backend):
    features, rois, offset = problem(7, dtype=torch.float32)
    rois[0, 2] = NAN
    rois[1, 3] = INF
    rois[2, 0] = NAN
    rois[3, 1:] = torch.tensor([-HUGE, 0, HUGE, 9])
    offset[4, 0, 0, 0] = NAN
    offset[4, 1, 1, 2] = -INF
    offset[5, 1, 0, 1] = HUGE
    dead_bins = torch.zeros(7, 2, 3, dtype=torch.bool)
    dead_bins[:4] = True
    dead_bins[4, 0, 0] = dead_bins[4, 1, 2] = dead_bins[5, 0, 1] = True

    output, grad_features, grad_offset = both_ways(features, rois, offset, backend=backend)
    assert not output.movedim(1, -1)[dead_bins].any()
    assert not grad_offset.movedim(1, -1)[dead_bins].any()
    assert output.movedim(1, -1)[~dead_bins].all()
    assert grad_features.isfinite().all()

    offset[4:6] = offset[4:6].nan_to_num(0, 0, 0).where(offset[4:6].abs() < 99, 0)
    grad = torch.arange(output.numel()).cos().view(output.shape) * ~dead_bins[:, None]
    expected = both_ways(features, rois[4:], offset[4:], grad[4:], backend=backend)[1]
    torch.testing.assert_close(grad_features, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_rois_take_neither_time_nor_memory(backend):
    """The samples of a roi of 1e9 pixels are not all on the map."""
    features, _, _ = problem(dtype=torch.float32)
    rois = torch.tensor([[0, -1e9, -1e9, 1e9, 1e9], [1, -1e30, 0, 1e30, 9], [0, 0, -1e6, 1e-3, 1e6]])
    offset = torch.zeros(3, 2, 2, 3)
    offset[1] = torch.randn(2, 2, 3) * 1e-6
    for result in both_ways(features, rois, offset, backend=backend):
        assert result.isfinite().all()


@pytest.mark.parametrize("backend", PLAIN_BACKENDS)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_gradcheck_away_from_the_border(backend, sampling_ratio):
    features, _, offset = problem(3, channels=2)
    rois = torch.tensor([[0, 13.1, 11.3, 30.7, 22.9], [1, 10.3, 9.1, 33.3, 25.7], [-1, 9, 9, 20, 20]]).double()
    offset = (offset * 0.2).requires_grad_()
    features.requires_grad_()

    def pool(features, offset):
        return deform_roi_pool(
            features,
            rois,
            offset,
            output_size=(2, 3),
            spatial_scale=0.25,
            sampling_ratio=sampling_ratio,
            backend=backend,
        )

    assert torch.autograd.gradcheck(pool, (features, offset))
    if backend == "reference":
        assert torch.autograd.gradgradcheck(pool, (features, offset))


def test_only_the_gradients_that_are_needed():
    features, rois, offset = problem()
    settings = {"output_size": (2, 3), "spatial_scale": 0.25}
    both = both_ways(features, rois, offset)
    output = deform_roi_pool(features.requires_grad_(), rois, offset, **settings)
    grad = torch.arange(output.numel()).double().cos().view(output.shape)
    (grad_features,) = torch.autograd.grad(output, features, grad)
    assert torch.equal(grad_features, both[1])
    output = deform_roi_pool(features.detach(), rois, offset.requires_grad_(), **settings)
    (grad_offset,) = torch.autograd.grad(output, offset, grad)
    assert torch.equal(grad_offset, both[2])


def test_chunks_change_nothing(monkeypatch):
    features, rois, offset = problem(20)
    whole = both_ways(features, rois, offset)
    monkeypatch.setattr(torch_backend, "CHUNK_ENTRIES", 100)
    for result, expected in zip(both_ways(features, rois, offset), whole, strict=True):
        assert relative_error(result, expected) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "offset_dtype", "floor"),
    [
        (torch.bfloat16, torch.float32, 4e-3),
        (torch.bfloat16, torch.bfloat16, 4e-3),
        (torch.float16, torch.float16, 5e-4),
    ],
)
def test_half_precision(backend, dtype, offset_dtype, floor):
    """Sums are in float32, rounded once."""
    features, rois, offset = problem(3, channels=4, dtype=torch.float32)
    features = features.to(dtype)
    offset = offset.to(offset_dtype)
    results = both_ways(features, rois, offset, backend=backend)
    assert [result.dtype for result in results] == [dtype, dtype, offset_dtype]
    exact = [tensor.double() for tensor in (features, rois, offset)]
    grad = torch.arange(results[0].numel(), dtype=torch.float64).cos().view(results[0].shape).to(dtype)
    for result, expected in zip(results, both_ways(*exact, grad, backend="reference"), strict=True):
        assert relative_error(result, expected) < floor


def test_layouts():
    features, rois, offset = problem(dtype=torch.float32)
    settings = {"output_size": (2, 3), "spatial_scale": 0.25}
    expected = deform_roi_pool(features, rois, offset, **settings)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    channels_last = features.to(memory_format=torch.channels_last)
    strided = torch.cat([offset, offset], 3)[..., :3]
    assert torch.equal(deform_roi_pool(channels_last, rois, strided, **settings), expected)


def test_without_rois_or_images():
    features, rois, offset = problem(dtype=torch.float32)
    for backend in PLAIN_BACKENDS:
        results = both_ways(features, rois[:0], offset[:0], backend=backend)
        assert [tuple(result.shape) for result in results] == [(0, 3, 2, 3), (2, 3, 9, 12), (0, 2, 2, 3)]
        assert not results[1].any()
        results = both_ways(features[:0], rois, offset, backend=backend)
        assert not any(result.any() for result in results)


def test_autocast_casts_the_features_alone():
    features, rois, offset = problem(dtype=torch.float32)
    settings = {"output_size": (2, 3), "spatial_scale": 0.25}
    for backend in PLAIN_BACKENDS:
        with torch.autocast("cpu", torch.bfloat16):
            found = deform_roi_pool(features, rois, offset, backend=backend, **settings)
        assert found.dtype == torch.bfloat16
        expected = deform_roi_pool(features.bfloat16(), rois, offset, backend=backend, **settings)
        assert torch.equal(found, expected)


def test_all_levels_in_one_call():
    fine, rois, offset = problem(8)
    coarse = torch.randn(2, 3, 5, 6).double()
    levels = torch.tensor([0, 1, 1, 0, 1, 0, -1, 2])
    found = roi_align([fine, coarse], rois, levels, strides=(4, 8), output_size=(2, 3), offset=offset)
    for level, (features, scale) in enumerate(((fine, 1 / 4), (coarse, 1 / 8))):
        of_level = levels == level
        expected = deform_roi_pool(features, rois[of_level], offset[of_level], output_size=(2, 3), spatial_scale=scale)
        torch.testing.assert_close(found[of_level], expected)
    assert not found[6:].any()


def pool(features, rois, offset):
    return deform_roi_pool(features, rois, offset, output_size=(2, 3), spatial_scale=0.25)


@pytest.mark.parametrize("shared", [(), (0,), (1,), (2,), (0, 1)], ids=str)
def test_vmap(shared):
    """As a loop would, whatever is shared, and autograd through it."""
    elements = [problem(5) for _ in range(3)]
    stacked = [torch.stack(tensors) for tensors in zip(*elements, strict=True)]
    arguments = [stacked[index][0] if index in shared else stacked[index] for index in range(3)]
    features, rois, offset = arguments
    rois[..., 0, 0] = -1
    features.requires_grad_()
    offset.requires_grad_()
    found = vmap(pool, tuple(None if index in shared else 0 for index in range(3)))(features, rois, offset)

    one_by_one = []
    for element in range(3):
        one_by_one.append(
            pool(*(arguments[index] if index in shared else arguments[index][element] for index in range(3)))
        )
    expected = torch.stack(one_by_one)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    grads = torch.autograd.grad(found, (features, offset), grad)
    for gradient, loop in zip(grads, torch.autograd.grad(expected, (features, offset), grad), strict=True):
        torch.testing.assert_close(gradient, loop)


def test_several_gradients_at_once():
    features, rois, offset = problem()
    inputs = (features.requires_grad_(), offset.requires_grad_())
    pooled = pool(features, rois, offset)
    grads = torch.randn(3, *pooled.shape, dtype=pooled.dtype)
    found = torch.autograd.grad(pooled, inputs, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(pooled, inputs, grad, retain_graph=True) for grad in grads]
    for several, expected in zip(found, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(several, torch.stack(expected))


def test_opcheck():
    features, rois, offset = problem(3)
    levels = torch.zeros(3, dtype=torch.int64)
    maps = [features.requires_grad_()]
    settings = ([0.25], [2, 3], 0, 0.1, "torch")
    offset.requires_grad_()
    torch.library.opcheck(operator.forward_op, (maps, rois, levels, offset, *settings, True))

    with torch.no_grad():
        pooled, cells = operator.forward_op(maps, rois, levels, offset, *settings, True)
    tensors = (torch.randn_like(pooled), cells, rois, levels, offset.detach())
    torch.library.opcheck(operator.backward_op, (*tensors, 2, [9], [12], [0.25], 0, 0.1, "torch", [True, True]))


def test_compiles_as_one_graph():
    def loss(features, rois, offset):
        return pool(features.sin(), rois, offset.tanh()).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for count in (5, 9):
        features, rois, offset = problem(count)
        inputs = (features.requires_grad_(), offset.requires_grad_())
        grads = torch.autograd.grad(compiled(features, rois, offset), inputs)
        expected = torch.autograd.grad(loss(features, rois, offset), inputs)
        for grad, eager in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, eager, rtol=1e-12, atol=1e-12)


@QUIET
def test_forward_mode():
    """PyTorch would return a derivative of 0 for the operator; the reference has one."""
    features, rois, offset = problem()
    tangents = (torch.randn_like(features), torch.randn_like(offset))

    def run(backend):
        def function(features, offset):
            return deform_roi_pool(features, rois, offset, output_size=(2, 3), spatial_scale=0.25, backend=backend)

        return jvp(function, (features, offset), tangents)

    with pytest.raises(NotImplementedError, match="deform_roi_pool has no forward-mode derivative"):
        run("torch")
    output, tangent = run("reference")
    grad = torch.randn_like(output)
    _, *grads = both_ways(features, rois, offset, grad)
    expected = sum((one * other).sum() for one, other in zip(grads, tangents, strict=True))
    torch.testing.assert_close((tangent * grad).sum(), expected)


def test_second_derivatives_are_a_clear_error():
    features, rois, offset = problem()
    loss = pool(features, rois, offset.requires_grad_()).square().sum()
    (first,) = torch.autograd.grad(loss, offset, create_graph=True)
    with pytest.raises(NotImplementedError, match="deform_roi_pool has no second derivatives: use backend='reference'"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.zeros(3, 9, 12)}, ValueError, r"features: expected \(B, C, H, W\)"),
        ({"features": torch.zeros(2, 3, 0, 12)}, ValueError, r"features: expected \(B, C, H, W\) with C, H, W > 0"),
        ({"features": torch.zeros(2, 3, 9, 12).int()}, TypeError, r"features\[0\]: expected one floating dtype"),
        ({"features": None}, TypeError, "features: expected a tensor, got NoneType"),
        ({"rois": torch.zeros(6, 4)}, ValueError, r"rois: expected \(R, 5\), got \(6, 4\)"),
        ({"rois": torch.zeros(6, 5).long()}, TypeError, "rois: expected a floating dtype, got torch.int64"),
        ({"rois": torch.zeros(6, 5, device="meta")}, TypeError, "expected one device"),
        ({"offset": torch.zeros(6, 2, 3, 2)}, ValueError, r"offset: expected \(6, 2, 2, 3\), got \(6, 2, 3, 2\)"),
        ({"offset": torch.zeros(6, 2, 2, 3).double()}, TypeError, "offset: expected torch.float32 beside features of"),
        ({"offset": torch.zeros(6, 2, 2, 3, device="meta")}, TypeError, "offset: expected device cpu like features"),
        ({"offset": torch.zeros(6, 2, 2, 3).to_sparse()}, TypeError, "offset: expected layout torch.strided"),
        ({"output_size": (2, 0)}, ValueError, r"output_size: expected at least 1, got \(2, 0\)"),
        ({"output_size": 2.5}, ValueError, "output_size: expected an int or a pair of ints, got 2.5"),
        ({"spatial_scale": 0}, ValueError, "spatial_scale: expected a positive number, got 0"),
        ({"spatial_scale": 1e39}, ValueError, r"spatial_scale: expected a positive number, got 1e\+39"),
        ({"spatial_scale": None}, ValueError, "spatial_scale: expected a positive number, got None"),
        ({"sampling_ratio": -1}, ValueError, r"sampling_ratio: expected 0 \(adaptive\) or more, up to 1024, got -1"),
        ({"sampling_ratio": 1.5}, ValueError, r"sampling_ratio: expected 0 .* got 1\.5"),
        ({"sampling_ratio": 1 << 40}, ValueError, "sampling_ratio: expected 0 .* got 1099511627776"),
        ({"gamma": float("nan")}, ValueError, "gamma: expected a finite number, got nan"),
        ({"gamma": "1"}, ValueError, "gamma: expected a finite number, got '1'"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
    ],
)
def test_errors(change, error, message):
    features, rois, offset = problem(dtype=torch.float32)
    arguments = {"features": features, "rois": rois, "offset": offset, "output_size": (2, 3), "spatial_scale": 0.25}
    with pytest.raises(error, match=message):
        deform_roi_pool(**(arguments | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_size_on_a_gpu_without_waiting_for_the_host(dtype):
    features = torch.randn(2, 256, 200, 336, dtype=dtype).cuda().requires_grad_()
    _, rois, offset = problem(1000, size=(200, 336), bins=(7, 7), dtype=torch.float32)
    rois = rois.cuda()
    offset = offset.to(dtype).cuda().requires_grad_()
    grad = torch.randn(1000, 256, 7, 7, device="cuda", dtype=dtype)

    def run():
        output = deform_roi_pool(features, rois, offset, output_size=7, spatial_scale=0.25)
        return [output.detach(), *torch.autograd.grad(output, (features, offset), grad)]

    first = run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = [tensor.detach().cpu().float() for tensor in (features, rois, offset, grad)]
    leaves = (on_cpu[0].requires_grad_(), on_cpu[2].requires_grad_())
    output = deform_roi_pool(*on_cpu[:3], output_size=7, spatial_scale=0.25)
    expected = [output.detach(), *torch.autograd.grad(output, leaves, on_cpu[3])]
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    for result, repeated, cpu_result in zip(first, second, expected, strict=True):
        assert torch.equal(result, repeated)  # deterministic
        assert relative_error(result.cpu(), cpu_result) < tolerance

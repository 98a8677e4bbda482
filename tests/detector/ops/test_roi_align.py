"""RoIAlign: golden numbers, exact cases, the fast path and the Triton kernels against the dense reference.

The kernels run in Triton's interpreter on a machine without a GPU; roi counts are small there because it is slow.
"""

import math

import pytest
import torch

from detector.ops.roi_align import roi_align, roi_levels
from tests.detector.ops.roi_align_reference import roi_align_reference
from triton_dcn.roi_pool import operator, torch_backend
from triton_dcn.roi_pool.geometry import RoIPoolGeometry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STRIDES = (4, 8, 16, 32)
SIZES = ((24, 31), (12, 16), (6, 8), (3, 4))
SPECIAL = torch.tensor(
    [
        [0, 0.0, 0.0, 124.0, 96.0],  # the whole image
        [1, -60.0, -40.0, 30.0, 20.0],  # partly outside
        [1, 500.0, 500.0, 600.0, 650.0],  # outside
        [0, -400.0, 20.0, -300.0, 60.0],
        [0, 20.0, 20.0, 20.0, 20.0],  # empty
        [1, 50.0, 10.0, 50.0, 90.0],
        [1, 60.0, 50.0, 40.0, 20.0],  # negative
        [0, 60.0, 10.0, 40.0, 80.0],
        [0, 7.3, 9.1, 7.4, 9.15],  # tiny
        [1, -900.0, -700.0, 1000.0, 800.0],  # huge
        [0, -1e6, -1e6, 1e6, 1e6],
        [1, -1e30, -1e30, 1e30, 1e30],
        [0, -3e38, 0.0, 3e38, 50.0],
        [0, math.nan, 0.0, 50.0, 50.0],  # ignored, as those below
        [0, 0.0, 0.0, math.inf, 50.0],
        [-1, 0.0, 0.0, 50.0, 50.0],
        [2, 0.0, 0.0, 50.0, 50.0],
        [math.nan, 0.0, 0.0, 50.0, 50.0],
    ]
)
NUM_IGNORED = 6  # the last rows of SPECIAL, whose output must be 0


def pyramid(channels=3, batch=2, dtype=torch.float64, sizes=SIZES):
    return [torch.randn(batch, channels, *size, dtype=dtype) for size in sizes]


def random_rois(count, batch=2, extent=(124.0, 96.0), dtype=torch.float64):
    center = torch.rand(count, 2, dtype=dtype) * torch.tensor(extent, dtype=dtype)
    half = torch.exp(torch.randn(count, 2, dtype=dtype) * 0.8 + 2.5)
    image = torch.randint(batch, (count, 1)).to(dtype)
    return torch.cat([image, center - half, center + half], 1)


def problem(count=20, dtype=torch.float64):
    """Return features, random and special rois, and their levels."""
    rois = torch.cat([random_rois(count), SPECIAL.double()]).to(dtype)
    levels = torch.randint(len(STRIDES), (len(rois),))
    levels[:count] = roi_levels(rois[:count, 1:])
    return pyramid(dtype=dtype), rois, levels


def both_ways(function, features, rois, levels, grad, strides=STRIDES, **options):
    """Return the output and the gradients of the features of one of the two functions."""
    features = [feature.detach().requires_grad_() for feature in features]
    output = function(features, rois, levels, strides=strides, output_size=grad.shape[2], **options)
    grads = torch.autograd.grad(output, features, grad.to(output.dtype), allow_unused=True, materialize_grads=True)
    return [output.detach(), *grads]


def relative_error(actual, expected):
    actual = torch.as_tensor(actual).double()
    expected = torch.as_tensor(expected).double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("function", [roi_align, roi_align_reference])
class TestGolden:
    @pytest.mark.parametrize("case", [f"r{i:02}" for i in range(6)])
    def test_one_level(self, golden, function, case, dtype, tolerance):
        arrays, parameters = golden("roi_align")
        parameters = parameters[case]
        names = ("feat", "rois", "grad_out")
        feature, rois, grad = (torch.from_numpy(arrays[f"{case}.{name}"]).to(dtype) for name in names)
        levels = torch.zeros(len(rois), dtype=torch.int64)
        strides = [1 / parameters["spatial_scale"]]
        ratio = parameters["sampling_ratio"]
        output, grad_feature = both_ways(function, [feature], rois, levels, grad, strides=strides, sampling_ratio=ratio)
        assert relative_error(output, arrays[f"{case}.output"]) < tolerance
        assert relative_error(grad_feature, arrays[f"{case}.grad_feat"]) < tolerance

    def test_four_levels(self, golden, function, dtype, tolerance):
        arrays, _ = golden("roi_align")
        features = [torch.from_numpy(arrays[f"extract.feat{i}"]).to(dtype) for i in range(4)]
        rois = torch.from_numpy(arrays["extract.rois"]).to(dtype)
        grad = torch.from_numpy(arrays["extract.grad_out"]).to(dtype)
        output, *grads = both_ways(function, features, rois, roi_levels(rois[:, 1:]), grad)
        assert relative_error(output, arrays["extract.output"]) < tolerance
        for level, grad_feature in enumerate(grads):
            flat = grad_feature.flatten()
            step = max(1, len(flat) // 1024) | 1
            assert relative_error(flat[::step][:1024], arrays[f"extract.grad_feat{level}.samples"]) < tolerance
            assert relative_error(flat.norm(), arrays[f"extract.grad_feat{level}.stats"][2]) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_are_golden(golden, dtype):
    arrays, _ = golden("roi_align")
    rois = torch.from_numpy(arrays["levels.rois"]).to(dtype)
    expected = arrays["levels.level_f32" if dtype == torch.float32 else "levels.level_f64"]
    assert roi_levels(rois[:, 1:]).tolist() == expected.tolist()


def test_levels_of_strange_boxes():
    boxes = torch.tensor(
        [
            [0, 0, 0, 0],
            [0, 0, math.inf, math.inf],
            [0, 0, math.nan, 1],
            [9, 0, 0, 9],
            [0, 0, 1e30, 1e30],
        ]
    )
    assert roi_levels(boxes).tolist() == [0, 3, 0, 0, 3]
    assert roi_levels(boxes.view(5, 1, 4), num_levels=2).tolist() == [[0], [1], [0], [0], [1]]


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("function", [roi_align, roi_align_reference])
def test_a_linear_feature_is_read_exactly(function, sampling_ratio):
    """Bilinear samples of a plane, placed symmetrically in a bin, average to the plane at the bin's center."""
    y, x = torch.meshgrid(torch.arange(20.0).double(), torch.arange(30.0).double(), indexing="ij")
    feature = (2 * y - 3 * x + 5).expand(2, 1, -1, -1)
    rois = torch.tensor([[1, 8.0, 6.0, 41.0, 33.5]]).double()
    output = function([feature], rois, torch.zeros(1).long(), strides=[2], output_size=5, sampling_ratio=sampling_ratio)
    center = (torch.arange(5).double() + 0.5) / 5
    expected = 2 * (3 - 0.5 + center * 13.75)[:, None] - 3 * (4 - 0.5 + center * 16.5) + 5
    torch.testing.assert_close(output[0, 0], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("output_size", [1, 7])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_equals_reference(sampling_ratio, output_size):
    features, rois, levels = problem()
    levels[:2] = torch.tensor([-1, 4])  # do not exist
    grad = torch.randn(len(rois), 3, output_size, output_size, dtype=torch.float64)
    results = both_ways(roi_align, features, rois, levels, grad, sampling_ratio=sampling_ratio)
    expected = both_ways(roi_align_reference, features, rois, levels, grad, sampling_ratio=sampling_ratio)
    for result, reference in zip(results, expected, strict=True):
        assert relative_error(result, reference) < 1e-12
    assert not results[0][-NUM_IGNORED:].any()
    assert not results[0][:2].any()


def test_chunks_change_nothing(monkeypatch):
    features, rois, levels = problem()
    grad = torch.randn(len(rois), 3, 7, 7, dtype=torch.float64)
    whole = both_ways(roi_align, features, rois, levels, grad)
    monkeypatch.setattr(torch_backend, "CHUNK_ENTRIES", 1000)
    monkeypatch.setattr(torch_backend, "COPY_CELLS", 10)
    in_chunks = both_ways(roi_align, features, rois, levels, grad)
    for result, expected in zip(in_chunks, whole, strict=True):
        assert relative_error(result, expected) < 1e-14


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("function", [roi_align, roi_align_reference])
def test_gradcheck(function, sampling_ratio):
    features = [feature.requires_grad_() for feature in pyramid(1, 2, sizes=((6, 8), (3, 4)))]
    rois = torch.cat([random_rois(4, extent=(32.0, 24.0)), torch.tensor([[-1, 0, 0, 9, 9.0]]).double()])
    options = {"strides": (4, 8), "output_size": 2, "sampling_ratio": sampling_ratio}
    levels = torch.tensor([0, 1, 0, 1, 0])
    assert torch.autograd.gradcheck(lambda *f: function(f, rois, levels, **options), features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_float32_rounded_once(dtype):
    features, rois, levels = problem(dtype=torch.float32)
    features = [feature.to(dtype) for feature in features]
    grad = torch.randn(len(rois), 3, 7, 7).to(dtype)
    in_half = both_ways(roi_align, features, rois, levels, grad)
    in_float32 = both_ways(roi_align, [feature.float() for feature in features], rois, levels, grad.float())
    for half, exact in zip(in_half, in_float32, strict=True):
        assert half.dtype == dtype
        assert torch.equal(half, exact.to(dtype))


def test_strides_of_the_tensors():
    features, rois, levels = problem()
    output = roi_align(features, rois, levels, strides=STRIDES)
    assert output.is_contiguous(memory_format=torch.channels_last)

    channels_last = [feature.contiguous(memory_format=torch.channels_last) for feature in features]
    assert torch.equal(roi_align(channels_last, rois, levels, strides=STRIDES), output)

    feature_views = [torch.cat([feature, feature], 3)[..., : feature.shape[3]] for feature in features]
    roi_view = torch.cat([rois, rois], 1)[:, :5]
    level_view = torch.stack([levels, levels], 1)[:, 0]
    assert torch.equal(roi_align(feature_views, roi_view, level_view, strides=STRIDES), output)

    expanded_grad = torch.ones(1, dtype=torch.float64).expand(len(rois), 3, 7, 7)
    results = both_ways(roi_align, features, rois, levels, expanded_grad)
    expected = both_ways(roi_align, features, rois, levels, expanded_grad.contiguous())
    for result, contiguous in zip(results, expected, strict=True):
        assert torch.equal(result, contiguous)


@pytest.mark.parametrize(("batch", "count"), [(2, 0), (0, 0), (0, 3)])
def test_nothing_to_pool(batch, count):
    features = [feature.requires_grad_() for feature in pyramid(batch=batch, dtype=torch.float32)]
    rois = torch.cat([torch.full((count, 1), -1.0), torch.rand(count, 4)], 1)
    levels = torch.zeros(count).long()
    for function in (roi_align, roi_align_reference):
        output = function(features, rois, levels, strides=STRIDES)
        assert output.shape == (count, 3, 7, 7)
        assert not output.any()
    output = roi_align(features, rois, levels, strides=STRIDES)
    grads = torch.autograd.grad(output.sum(), features)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"strides": (4, 8)}, ValueError, r"strides: expected one per feature level \(4, at least 1\), got 2"),
        ({"rois": torch.zeros(5, 4)}, ValueError, r"rois: expected \(R, 5\), got \(5, 4\)"),
        ({"rois": torch.zeros(5, 5).int()}, TypeError, "rois: expected a floating dtype, got torch.int32"),
        ({"levels": torch.zeros(4).long()}, ValueError, r"levels: expected \(5,\), got \(4,\)"),
        ({"levels": torch.zeros(5)}, TypeError, "levels: expected torch.int64, got torch.float32"),
        ({"output_size": 0}, ValueError, "output_size: expected at least 1, got 0"),
        ({"sampling_ratio": -1}, ValueError, r"sampling_ratio: expected 0 \(adaptive\) or more, got -1"),
        ({"features": [torch.zeros(3, 8, 8)] * 4}, ValueError, r"features\[0\]: expected \(B, C, H, W\)"),
        ({"features": [*pyramid()[:3], torch.zeros(2, 4, 3, 4)]}, ValueError, r"features\[3\]: expected"),
        ({"features": [*pyramid()[:3], torch.zeros(2, 3, 3, 4)]}, TypeError, r"features\[3\]: expected one floating"),
    ],
)
@pytest.mark.parametrize("function", [roi_align, roi_align_reference])
def test_errors(function, change, error, message):
    arguments = {"rois": torch.zeros(5, 5), "levels": torch.zeros(5).long(), "strides": STRIDES, "features": pyramid()}
    with pytest.raises(error, match=message):
        function(**(arguments | change))


def test_opcheck():
    features = [feature.requires_grad_() for feature in pyramid(2, 1)]
    rois = random_rois(4, batch=1)
    levels = torch.tensor([0, 1, 2, 3])
    scales = [1 / stride for stride in STRIDES]
    torch.library.opcheck(operator.forward_op, (features, rois, levels, None, scales, [2, 2], 0, 0.1, "torch", False))

    grad = torch.randn(4, 2, 2, 2).double()
    heights = [height for height, _ in SIZES]
    widths = [width for _, width in SIZES]
    sizes = (1, heights, widths, scales)
    settings = (0, 0.1, "torch", [True, False])
    torch.library.opcheck(operator.backward_op, (grad, None, rois, levels, None, *sizes, *settings))


def test_compiles_as_one_graph():
    def loss(features, rois, levels):
        return roi_align([feature.sin() for feature in features], rois, levels, strides=STRIDES, output_size=3).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for count in (5, 9):
        features, rois, levels = problem(count)
        features = [feature.requires_grad_() for feature in features]
        grads = torch.autograd.grad(compiled(features, rois, levels), features)
        expected = torch.autograd.grad(loss(features, rois, levels), features)
        for grad, eager in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
class TestKernels:
    """The CUDA path, called directly."""

    @pytest.fixture(scope="class")
    @staticmethod
    def kernels():
        return pytest.importorskip("triton_dcn.roi_pool.kernels.launchers")

    def both_ways(self, kernels, geometry, features, rois, levels, grad):
        """Return the output and the gradients of the features, on the CPU."""
        features = [feature.to(DEVICE) for feature in features]
        rois, levels, grad = (tensor.to(DEVICE) for tensor in (rois, levels, grad))
        output, _ = kernels.forward(geometry, features, rois, levels, None)
        assert output.is_contiguous(memory_format=torch.channels_last)

        table, _ = kernels.backward(geometry, grad, None, rois, levels, None, needs_features=True, needs_offset=False)
        level_tables = table.split([feature[:, 0].numel() for feature in features])
        grads = []
        for level_table, feature in zip(level_tables, features, strict=True):
            batch, channels, height, width = feature.shape
            grads.append(level_table.view(batch, height, width, channels).permute(0, 3, 1, 2).cpu())
        return [output.cpu(), *grads]

    @pytest.mark.parametrize(
        ("dtype", "floor", "sampling_ratio", "bins", "channels"),
        [
            pytest.param(torch.float32, 1e-6, 0, 3, 5, id="float32"),
            pytest.param(torch.bfloat16, 1e-3, 0, 2, 8, id="bfloat16"),
            pytest.param(torch.float16, 1e-4, 2, 2, 8, id="float16 fixed ratio"),
            pytest.param(torch.float32, 1e-6, 2, 1, 3, id="float32 fixed ratio"),
        ],
    )
    def test_equals_reference(self, kernels, dtype, floor, sampling_ratio, bins, channels):
        """Error against float64 at most twice that of the CPU path in the same dtype, plus a floor."""
        sizes = SIZES[1:3]
        features = [feature.to(dtype) for feature in pyramid(channels, sizes=sizes)]
        rois = torch.cat([random_rois(6), SPECIAL.double()]).float()
        levels = torch.arange(len(rois)) % 2
        levels[:2] = torch.tensor([-1, 2])
        grad = torch.randn(len(rois), channels, bins, bins).to(dtype)
        options = {"strides": STRIDES[1:3], "sampling_ratio": sampling_ratio}
        geometry = RoIPoolGeometry(2, (12, 6), (16, 8), (1 / 8, 1 / 16), (bins, bins), sampling_ratio)
        results = self.both_ways(kernels, geometry, features, rois, levels, grad)
        on_cpu = both_ways(roi_align, features, rois, levels, grad, **options)

        double_features = [feature.double() for feature in features]
        exact = both_ways(roi_align_reference, double_features, rois.double(), levels, grad.double(), **options)
        for result, cpu_result, expected in zip(results, on_cpu, exact, strict=True):
            assert result.dtype == dtype
            assert relative_error(result, expected) <= 2 * relative_error(cpu_result, expected) + floor
        assert not results[0][-NUM_IGNORED:].any()
        assert not results[0][:2].any()

    @pytest.mark.parametrize(("case", "count"), [("r03", 6), ("r05", None)])
    def test_golden(self, kernels, golden, case, count):
        """A few rois of 7 x 7 bins forward; all rois of 3 x 3 bins both ways."""
        arrays, parameters = golden("roi_align")
        parameters = parameters[case]
        names = ("feat", "rois", "grad_out")
        feature, rois, grad = (torch.from_numpy(arrays[f"{case}.{name}"]) for name in names)
        batch, _, height, width = feature.shape
        geometry = RoIPoolGeometry(
            batch=batch,
            heights=(height,),
            widths=(width,),
            scales=(parameters["spatial_scale"],),
            bins=(parameters["output_size"], parameters["output_size"]),
            sampling_ratio=parameters["sampling_ratio"],
        )
        levels = torch.zeros(len(rois[:count]), dtype=torch.int64)
        output, grad_feature = self.both_ways(kernels, geometry, [feature], rois[:count], levels, grad[:count])
        assert relative_error(output, arrays[f"{case}.output"][:count]) < 1e-5
        if count is None:
            assert relative_error(grad_feature, arrays[f"{case}.grad_feat"]) < 1e-5

    def test_nothing_to_pool(self, kernels):
        geometry = RoIPoolGeometry(1, (3,), (4,), (1 / 4,), (7, 7), 0)
        features = [torch.ones(1, 2, 3, 4)]
        rois = torch.zeros(0, 5)
        levels = torch.zeros(0).long()
        output, grad_feature = self.both_ways(kernels, geometry, features, rois, levels, torch.ones(0, 2, 7, 7))
        assert output.shape == (0, 2, 7, 7)
        assert torch.equal(grad_feature, torch.zeros(1, 2, 3, 4))

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_full_size_without_waiting_for_the_host(self, dtype):
        sizes = ((200, 336), (100, 168), (50, 84), (25, 42))
        features = [feature.cuda().requires_grad_() for feature in pyramid(256, dtype=dtype, sizes=sizes)]
        rois = random_rois(1024, extent=(1344.0, 800.0), dtype=torch.float32).cuda()
        levels = roi_levels(rois[:, 1:])
        grad = torch.randn(1024, 256, 7, 7, device="cuda", dtype=dtype)

        def run():
            output = roi_align(features, rois, levels, strides=STRIDES)
            return [output.detach(), *torch.autograd.grad(output, features, grad)]

        first = run()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")

        cpu_features = [feature.detach().cpu().float() for feature in features]
        expected = both_ways(roi_align, cpu_features, rois.cpu(), levels.cpu(), grad.cpu())
        tolerance = 1e-5 if dtype == torch.float32 else 4e-3
        for result, repeated, cpu_result in zip(first, second, expected, strict=True):
            assert torch.equal(result, repeated)  # deterministic
            assert relative_error(result.cpu(), cpu_result) < tolerance

"""RoIAlign: golden numbers, exact cases, the fast path and the Triton kernels against the dense reference.

The kernels run in Triton's interpreter on a machine without a GPU; roi counts are small there because it is slow.
"""

import math

import pytest
import torch

from detector.ops import roi_align as module
from detector.ops import roi_align_cpu
from detector.ops.roi_align import roi_align, roi_levels
from detector.ops.roi_align_geometry import RoIAlignGeometry
from tests.detector.ops.roi_align_reference import roi_align_reference

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
        [0, math.nan, 0.0, 50.0, 50.0],  # does not count
        [0, 0.0, 0.0, math.inf, 50.0],
        [-1, 0.0, 0.0, 50.0, 50.0],
        [2, 0.0, 0.0, 50.0, 50.0],
        [math.nan, 0.0, 0.0, 50.0, 50.0],
    ]
)
DEAD = 6  # the last rows of SPECIAL, whose output must be 0


def pyramid(channels=3, batch=2, dtype=torch.float64, sizes=SIZES):
    return [torch.randn(batch, channels, *size, dtype=dtype) for size in sizes]


def random_rois(count, batch=2, extent=(124.0, 96.0), dtype=torch.float64):
    center = torch.rand(count, 2, dtype=dtype) * torch.tensor(extent, dtype=dtype)
    half = torch.exp(torch.randn(count, 2, dtype=dtype) * 0.8 + 2.5)
    image = torch.randint(batch, (count, 1)).to(dtype)
    return torch.cat([image, center - half, center + half], 1)


def problem(count=20, dtype=torch.float64):
    """Special and random rois: (features, rois, levels)."""
    rois = torch.cat([random_rois(count), SPECIAL.double()]).to(dtype)
    levels = torch.randint(len(STRIDES), (len(rois),))
    levels[:count] = roi_levels(rois[:count, 1:])
    return pyramid(dtype=dtype), rois, levels


def both_ways(function, features, rois, levels, grad, strides=STRIDES, **options):
    """Output and feature gradients of one of the two functions."""
    features = [feature.detach().requires_grad_() for feature in features]
    output = function(features, rois, levels, strides=strides, output_size=grad.shape[2], **options)
    grads = torch.autograd.grad(output, features, grad.to(output.dtype), allow_unused=True, materialize_grads=True)
    return [output.detach(), *grads]


def relative(found, target):
    found, target = torch.as_tensor(found).double(), torch.as_tensor(target).double()
    return float((found - target).norm() / target.norm().clamp(min=1e-300))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("function", [roi_align, roi_align_reference])
class TestGolden:
    @pytest.mark.parametrize("case", [f"r{i:02}" for i in range(6)])
    def test_one_level(self, golden, function, case, dtype, tolerance):
        arrays, parameters = golden("roi_align")
        feature, rois, grad = (
            torch.from_numpy(arrays[f"{case}.{name}"]).to(dtype) for name in ("feat", "rois", "grad_out")
        )
        levels = torch.zeros(len(rois), dtype=torch.int64)
        options = {
            "strides": [1 / parameters[case]["spatial_scale"]],
            "sampling_ratio": parameters[case]["sampling_ratio"],
        }
        output, grad_feature = both_ways(function, [feature], rois, levels, grad, **options)
        assert relative(output, arrays[f"{case}.output"]) < tolerance
        assert relative(grad_feature, arrays[f"{case}.grad_feat"]) < tolerance

    def test_four_levels(self, golden, function, dtype, tolerance):
        arrays, _ = golden("roi_align")
        features = [torch.from_numpy(arrays[f"extract.feat{i}"]).to(dtype) for i in range(4)]
        rois, grad = (torch.from_numpy(arrays[f"extract.{name}"]).to(dtype) for name in ("rois", "grad_out"))
        output, *grads = both_ways(function, features, rois, roi_levels(rois[:, 1:]), grad)
        assert relative(output, arrays["extract.output"]) < tolerance
        for level, grad_feature in enumerate(grads):
            flat = grad_feature.flatten()
            step = max(1, len(flat) // 1024) | 1
            assert relative(flat[::step][:1024], arrays[f"extract.grad_feat{level}.samples"]) < tolerance
            assert relative(flat.norm(), arrays[f"extract.grad_feat{level}.stats"][2]) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_are_golden(golden, dtype):
    arrays, _ = golden("roi_align")
    rois = torch.from_numpy(arrays["levels.rois"]).to(dtype)
    target = arrays["levels.level_f32" if dtype == torch.float32 else "levels.level_f64"]
    assert roi_levels(rois[:, 1:]).tolist() == target.tolist()


def test_levels_of_strange_boxes():
    inf, nan = math.inf, math.nan
    boxes = torch.tensor([[0, 0, 0, 0], [0, 0, inf, inf], [0, 0, nan, 1], [9, 0, 0, 9], [0, 0, 1e30, 1e30]])
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
    levels[0], levels[1] = -1, 4
    grad = torch.randn(len(rois), 3, output_size, output_size, dtype=torch.float64)
    found = both_ways(roi_align, features, rois, levels, grad, sampling_ratio=sampling_ratio)
    target = both_ways(roi_align_reference, features, rois, levels, grad, sampling_ratio=sampling_ratio)
    for one, other in zip(found, target, strict=True):
        assert relative(one, other) < 1e-12
    assert not found[0][-DEAD:].any()
    assert not found[0][:2].any()


def test_chunks_change_nothing(monkeypatch):
    features, rois, levels = problem()
    grad = torch.randn(len(rois), 3, 7, 7, dtype=torch.float64)
    whole = both_ways(roi_align, features, rois, levels, grad)
    monkeypatch.setattr(roi_align_cpu, "CHUNK_ENTRIES", 1000)
    monkeypatch.setattr(roi_align_cpu, "COPY_CELLS", 10)
    for one, other in zip(both_ways(roi_align, features, rois, levels, grad), whole, strict=True):
        assert relative(one, other) < 1e-14


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
    found = both_ways(roi_align, features, rois, levels, grad)
    exact = both_ways(roi_align, [feature.float() for feature in features], rois, levels, grad.float())
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other.to(dtype))


def test_strides_of_the_tensors():
    features, rois, levels = problem()
    output = roi_align(features, rois, levels, strides=STRIDES)
    assert output.is_contiguous(memory_format=torch.channels_last)
    last = [feature.contiguous(memory_format=torch.channels_last) for feature in features]
    wide = [torch.cat([f, f], 3)[..., : f.shape[3]] for f in features]
    doubled = torch.cat([rois, rois], 1)[:, :5], torch.stack([levels, levels], 1)[:, 0]
    for views in ((last, rois, levels), (wide, *doubled)):
        assert torch.equal(roi_align(*views, strides=STRIDES), output)
    expanded = torch.ones(1, dtype=torch.float64).expand(len(rois), 3, 7, 7)
    for one, other in zip(
        both_ways(roi_align, features, rois, levels, expanded),
        both_ways(roi_align, features, rois, levels, expanded.contiguous()),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("batch", "count"), [(2, 0), (0, 0), (0, 3)])
def test_nothing_to_pool(batch, count):
    features = [feature.requires_grad_() for feature in pyramid(batch=batch, dtype=torch.float32)]
    rois = torch.cat([torch.full((count, 1), -1.0), torch.rand(count, 4)], 1)
    for function in (roi_align, roi_align_reference):
        output = function(features, rois, torch.zeros(count).long(), strides=STRIDES)
        assert output.shape == (count, 3, 7, 7)
        assert not output.any()
    grads = torch.autograd.grad(roi_align(features, rois, torch.zeros(count).long(), strides=STRIDES).sum(), features)
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
    arguments = (features, rois, torch.tensor([0, 1, 2, 3]), [float(s) for s in STRIDES], 2, 0)
    torch.library.opcheck(module.forward_op, arguments)
    heights, widths = (list(side) for side in zip(*SIZES, strict=True))
    arguments = (torch.randn(4, 2, 2, 2).double(), *arguments[1:3], 1, heights, widths, arguments[3], 0)
    torch.library.opcheck(module.backward_op, arguments)


def test_compiles_as_one_graph():
    def loss(features, rois, levels):
        return roi_align([feature.sin() for feature in features], rois, levels, strides=STRIDES, output_size=3).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for count in (5, 9):
        features, rois, levels = problem(count)
        features = [feature.requires_grad_() for feature in features]
        found, target = (
            torch.autograd.grad(function(features, rois, levels), features) for function in (compiled, loss)
        )
        for one, other in zip(found, target, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
class TestKernels:
    """The CUDA path, called directly."""

    @pytest.fixture(scope="class")
    @staticmethod
    def kernels():
        return pytest.importorskip("detector.ops.kernels.roi_align")

    def both_ways(self, kernels, geometry, features, rois, levels, grad):
        features, (rois, levels, grad) = (
            [tensor.to(DEVICE) for tensor in tensors] for tensors in (features, (rois, levels, grad))
        )
        output = kernels.forward(geometry, features, rois, levels)
        table = kernels.backward(geometry, grad, rois, levels)
        assert output.is_contiguous(memory_format=torch.channels_last)
        sizes = [(geometry.batch, *size) for size in zip(geometry.heights, geometry.widths, strict=True)]
        parts = zip(table.split([math.prod(size) for size in sizes]), sizes, strict=True)
        return [output.cpu(), *(part.view(*size, -1).permute(0, 3, 1, 2).cpu() for part, size in parts)]

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
        geometry = RoIAlignGeometry(2, (12, 6), (16, 8), (8.0, 16.0), bins, sampling_ratio)
        found = self.both_ways(kernels, geometry, features, rois, levels, grad)
        same = both_ways(roi_align, features, rois, levels, grad, **options)
        exact = both_ways(
            roi_align_reference, [f.double() for f in features], rois.double(), levels, grad.double(), **options
        )
        for one, other, target in zip(found, same, exact, strict=True):
            assert one.dtype == dtype
            assert relative(one, target) <= 2 * relative(other, target) + floor
        assert not found[0][-DEAD:].any()
        assert not found[0][:2].any()

    @pytest.mark.parametrize(("case", "count"), [("r03", 6), ("r05", None)])
    def test_golden(self, kernels, golden, case, count):
        """A few rois of 7 x 7 bins forward; all rois of 3 x 3 bins both ways."""
        arrays, parameters = golden("roi_align")
        parameters = parameters[case]
        feature, rois, grad = (torch.from_numpy(arrays[f"{case}.{name}"]) for name in ("feat", "rois", "grad_out"))
        batch, _, height, width = feature.shape
        scale, ratio = parameters["spatial_scale"], parameters["sampling_ratio"]
        geometry = RoIAlignGeometry(batch, (height,), (width,), (1 / scale,), parameters["output_size"], ratio)
        levels = torch.zeros(len(rois[:count]), dtype=torch.int64)
        output, grad_feature = self.both_ways(kernels, geometry, [feature], rois[:count], levels, grad[:count])
        assert relative(output, arrays[f"{case}.output"][:count]) < 1e-5
        if count is None:
            assert relative(grad_feature, arrays[f"{case}.grad_feat"]) < 1e-5

    def test_nothing_to_pool(self, kernels):
        geometry = RoIAlignGeometry(1, (3,), (4,), (4.0,), 7, 0)
        rois, levels = torch.zeros(0, 5), torch.zeros(0).long()
        output, grad = self.both_ways(kernels, geometry, [torch.ones(1, 2, 3, 4)], rois, levels, torch.ones(0, 2, 7, 7))
        assert output.shape == (0, 2, 7, 7)
        assert torch.equal(grad, torch.zeros(1, 2, 3, 4))

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_full_size_without_waiting_for_the_host(self, dtype):
        sizes = ((200, 336), (100, 168), (50, 84), (25, 42))
        features = [f.cuda().requires_grad_() for f in pyramid(256, dtype=dtype, sizes=sizes)]
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
        target = both_ways(
            roi_align, [f.detach().cpu().float() for f in features], rois.cpu(), levels.cpu(), grad.cpu()
        )
        for one, other, exact in zip(first, second, target, strict=True):
            assert torch.equal(one, other)  # deterministic
            assert relative(one.cpu(), exact) < (1e-5 if dtype == torch.float32 else 4e-3)

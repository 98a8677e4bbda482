"""RoIAlign, which is RoI pooling without an offset: published results, and what it must equal.

Sources, beside those named below: Detectron2's tests/layers/test_roi_align.py.
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from triton_dcn import deform_roi_pool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("triton", marks=NEEDS_TRITON)])


def pool(features, boxes, backend, output_size, **settings):
    """Pool boxes (R, 4) of the first image from a map with one cell for each pixel; return the output on the CPU."""
    rois = torch.cat([torch.zeros(len(boxes), 1), boxes], 1)
    settings = {"output_size": output_size, "spatial_scale": 1.0, "backend": backend} | settings
    return deform_roi_pool(features.to(DEVICE), rois.to(DEVICE), **settings).cpu()


@BACKENDS
@pytest.mark.parametrize(("shift", "first"), [(0.0, 4.5), (0.5, 7.5)], ids=["aligned", "not aligned"])
def test_a_ramp_is_resized(shift, first, backend):
    """A box of 2 x 2 cells becomes 4 x 4 bins. Without alignment, boxes mean what those half a pixel further do."""
    features = torch.arange(25.0).view(1, 1, 5, 5)
    output = pool(features, torch.tensor([[1.0, 1, 3, 3]]) + shift, backend, 4)
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    torch.testing.assert_close(output[0, 0], first + 2.5 * y + 0.5 * x)


@BACKENDS
def test_half_of_an_image_and_of_its_boxes(backend):
    features = 100 * torch.rand(1, 2, 30, 30)
    boxes = torch.tensor([[10.0, 10, 20, 20], [0, 4, 20, 14]])
    whole = pool(features, boxes, backend, 5)
    half = pool(F.interpolate(features, scale_factor=0.5, mode="bilinear"), boxes / 2, backend, 5)
    torch.testing.assert_close(half, whole)


@BACKENDS
@pytest.mark.parametrize("ratio", [1, 3])
def test_equals_grid_sample(ratio, backend):
    """Samples on a regular grid, averaged in every bin; and the gradient of the features."""
    features = torch.rand(1, 2, 12, 15, requires_grad=True)
    boxes = torch.tensor([[3.0, 2, 11, 9], [0.7, 0.6, 14.2, 11.3]])
    rows, columns = 3, 2
    output = pool(features, boxes, backend, (rows, columns), sampling_ratio=ratio)

    share_y = (torch.arange(rows * ratio) + 0.5) / (rows * ratio)
    share_x = (torch.arange(columns * ratio) + 0.5) / (columns * ratio)
    grids = []
    for x1, y1, x2, y2 in boxes.tolist():
        y = 2 * (y1 + share_y * (y2 - y1)) / 12 - 1
        x = 2 * (x1 + share_x * (x2 - x1)) / 15 - 1
        grids.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), 2))
    samples = F.grid_sample(features.expand(2, -1, -1, -1), torch.stack(grids), align_corners=False)
    expected = F.avg_pool2d(samples, ratio)
    torch.testing.assert_close(output, expected)

    grad_output = torch.randn_like(expected)
    (grad,) = torch.autograd.grad(output, features, grad_output)
    (expected_grad,) = torch.autograd.grad(expected, features, grad_output)
    torch.testing.assert_close(grad, expected_grad)


@BACKENDS
def test_numbers_of_mmcv(backend):
    """With the gradients of the features. Source: mmcv's tests/test_ops/test_roi_align.py."""
    features = torch.tensor([[[[1.0, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]]], requires_grad=True)
    output = pool(features, torch.tensor([[0.0, 0, 3, 3]]), backend, 2, sampling_ratio=2)
    torch.testing.assert_close(output, torch.tensor([[[[1.9375, 4.75], [7.5625, 10.375]]]]))
    output.sum().backward()
    along_an_axis = torch.tensor([0.6875, 0.625, 0.625, 0.0625])
    torch.testing.assert_close(features.grad[0, 0], torch.outer(along_an_axis, along_an_axis))


ONNX_FEATURES = [
    [0.2764, 0.7150, 0.1958, 0.3416, 0.4638, 0.0259, 0.2963, 0.6518, 0.4856, 0.7250],
    [0.9637, 0.0895, 0.2919, 0.6753, 0.0234, 0.6132, 0.8085, 0.5324, 0.8992, 0.4467],
    [0.3265, 0.8479, 0.9698, 0.2471, 0.9336, 0.1878, 0.4766, 0.4308, 0.3400, 0.2162],
    [0.0206, 0.1720, 0.2155, 0.4394, 0.0653, 0.3406, 0.7724, 0.3921, 0.2541, 0.5799],
    [0.4062, 0.2194, 0.4473, 0.4687, 0.7109, 0.9327, 0.9815, 0.6320, 0.1728, 0.6119],
    [0.3097, 0.1283, 0.4984, 0.5068, 0.4279, 0.0173, 0.4388, 0.0430, 0.4671, 0.7119],
    [0.1011, 0.8477, 0.4726, 0.1777, 0.9923, 0.4042, 0.1869, 0.7795, 0.9946, 0.9689],
    [0.1366, 0.3671, 0.7011, 0.6234, 0.9867, 0.5585, 0.6985, 0.5609, 0.8788, 0.9928],
    [0.5697, 0.8511, 0.6711, 0.9406, 0.8751, 0.7496, 0.1650, 0.1049, 0.1559, 0.2514],
    [0.7012, 0.4056, 0.7879, 0.3461, 0.0415, 0.2998, 0.5094, 0.3727, 0.5482, 0.0502],
]
ONNX_HALF_PIXEL = [
    [0.5178, 0.3434, 0.3229, 0.4474, 0.6344],
    [0.4031, 0.5366, 0.4428, 0.4861, 0.4023],
    [0.2512, 0.4002, 0.5155, 0.6954, 0.3465],
    [0.3350, 0.4601, 0.5881, 0.3439, 0.6849],
    [0.4932, 0.7141, 0.8217, 0.4719, 0.4039],
    [0.3070, 0.2187, 0.3337, 0.4880, 0.4870],
    [0.1871, 0.4914, 0.5561, 0.4192, 0.3686],
    [0.1433, 0.4608, 0.5971, 0.5310, 0.4982],
    [0.2788, 0.4386, 0.6022, 0.7000, 0.7524],
    [0.5774, 0.7024, 0.7251, 0.7338, 0.8163],
    [0.2393, 0.4075, 0.3379, 0.2525, 0.4743],
    [0.3671, 0.2702, 0.4105, 0.6419, 0.8308],
    [0.5556, 0.4543, 0.5564, 0.7502, 0.9300],
    [0.6626, 0.5617, 0.4813, 0.4954, 0.6663],
    [0.6636, 0.3721, 0.2056, 0.1928, 0.2478],
]
ONNX_OUTPUT_HALF_PIXEL = [
    [0.4664, 0.4466, 0.3405, 0.5688, 0.6068],
    [0.3714, 0.4296, 0.3835, 0.5562, 0.3510],
    [0.2768, 0.4883, 0.5222, 0.5528, 0.4171],
    [0.4713, 0.4844, 0.6904, 0.4920, 0.8774],
    [0.6239, 0.7125, 0.6289, 0.3355, 0.3495],
    [0.3022, 0.4305, 0.4696, 0.3978, 0.5423],
    [0.3656, 0.7050, 0.5165, 0.3172, 0.7015],
    [0.2912, 0.5059, 0.6476, 0.6235, 0.8299],
    [0.5916, 0.7389, 0.7048, 0.8372, 0.8893],
    [0.6227, 0.6153, 0.7097, 0.6154, 0.4585],
    [0.2384, 0.3379, 0.3717, 0.6100, 0.7601],
    [0.3767, 0.3785, 0.7147, 0.9243, 0.9727],
    [0.5749, 0.5826, 0.5709, 0.7619, 0.8770],
    [0.5355, 0.2566, 0.2141, 0.2796, 0.3600],
    [0.4365, 0.3504, 0.2887, 0.3661, 0.2349],
]


@BACKENDS
@pytest.mark.parametrize(
    ("shift", "expected"), [(0.0, ONNX_HALF_PIXEL), (0.5, ONNX_OUTPUT_HALF_PIXEL)], ids=["aligned", "not aligned"]
)
def test_onnx_nodes(shift, expected, backend):
    """Numbers of four digits. Source: onnx/backend/test/case/node/roialign.py."""
    features = torch.tensor([[ONNX_FEATURES]])
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 5, 4, 9], [5, 5, 9, 9]]) + shift
    output = pool(features, boxes, backend, 5, sampling_ratio=2)
    torch.testing.assert_close(output, torch.tensor(expected).view(3, 1, 5, 5), rtol=0, atol=1e-4)

"""What only a GPU can show: graph capture, repeatability of compiled code, real tensors of more than 2^31 elements."""

import pytest
import torch

from tests.triton_dcn.cases import OperatorCase, deterministic, make_case, relative
from triton_dcn import deform_conv2d
from triton_dcn.geometry import conv_output_size

pytestmark = pytest.mark.gpu
FLOOR = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
SPECS = {
    "fused": OperatorCase("fused", 2, 64, 128, 40, 72),
    "offset-groups": OperatorCase("offset-groups", 2, 64, 64, 24, 40, offset_groups=4),
    "any-channels": OperatorCase("any-channels", 2, 20, 36, 24, 40, stride=(2, 1), groups=2),
}


def forward_and_backward(case, leaves):
    """Return the output and the gradients of input, offset, mask and weight."""
    input, offset, mask, weight = leaves
    output = deform_conv2d(input, offset, weight, backend="triton", **(case.arguments | {"mask": mask}))
    return output, *torch.autograd.grad(output, leaves, case.grad_output)


@DTYPES
@pytest.mark.parametrize("spec", SPECS)
def test_graph_of_forward_and_backward(spec, dtype):
    """Captured once, replayed on other numbers: nothing waits for the device, nothing depends on the data."""
    case = make_case(SPECS[spec], dtype, "cuda", seed=0)
    other_case = make_case(SPECS[spec], dtype, "cuda", seed=1)
    leaves = [tensor.clone().requires_grad_() for tensor in case.tensors]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            forward_and_backward(case, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(case, leaves)

    for replayed_case in (other_case, case):
        with torch.no_grad():
            for leaf, value in zip(leaves, replayed_case.tensors, strict=True):
                leaf.copy_(value)
        graph.replay()
        own_leaves = [tensor.clone().requires_grad_() for tensor in replayed_case.tensors]
        expected = forward_and_backward(case, own_leaves)
        for result, value in zip(captured, expected, strict=True):
            assert relative(result, value) <= FLOOR[dtype]


@DTYPES
@pytest.mark.parametrize("spec", SPECS)
def test_repeats_bit_by_bit(spec, dtype):
    case = make_case(SPECS[spec], dtype, "cuda")
    leaves = [tensor.requires_grad_() for tensor in case.tensors]
    with deterministic():
        first = forward_and_backward(case, leaves)
        for _ in range(10):
            again = forward_and_backward(case, leaves)
            for value, repeated in zip(first, again, strict=True):
                assert torch.equal(value, repeated)


def test_more_than_2_to_the_31_elements():
    """One image; its last rows against the reference on a crop of them."""
    side = 2900  # pixels
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free memory")
    x = torch.randn(1, side, side, 256, dtype=torch.float16, device="cuda").permute(0, 3, 1, 2)
    assert x.numel() > 1 << 31
    check_last_rows(x, stride=2, rows=20)


def check_last_rows(x, stride, rows):
    """Compare the last `rows` output rows with the reference on a crop of `x`.

    Offsets reach less than two pixels, so that all but the first output row of the crop read inside the crop.
    """
    options = {"dtype": x.dtype, "device": x.device}
    channels = x.shape[1]
    height, width = conv_output_size(x.shape[2:], (1, 1), (stride, stride), (0, 0), (1, 1))
    offset = torch.rand(1, 2, height, width, **options) * 3 - 1.5
    weight = torch.randn(16, channels, 1, 1, **options) / channels**0.5
    grad_output = torch.zeros(1, 16, height, width, **options)
    grad_output[:, :, 1 - rows :].normal_()
    leaves = [tensor.requires_grad_() for tensor in (x, offset, weight)]
    output = deform_conv2d(*leaves, stride=stride, backend="triton")
    grad_x, grad_offset, grad_weight = torch.autograd.grad(output, leaves, grad_output)

    crop_start = (height - rows) * stride
    crop = (x[:, :, crop_start:], offset[:, :, -rows:], weight)
    crop_leaves = [tensor.detach().double().requires_grad_() for tensor in crop]
    exact = deform_conv2d(*crop_leaves, stride=stride, backend="reference")
    exact_grads = torch.autograd.grad(exact, crop_leaves, grad_output[:, :, -rows:].double())

    limit = FLOOR[x.dtype]
    assert relative(output.detach()[:, :, 1 - rows :], exact.detach()[:, :, 1:]) <= limit
    assert relative(grad_x[:, :, crop_start:], exact_grads[0]) <= limit
    assert relative(grad_offset[:, :, -rows:], exact_grads[1]) <= limit
    assert relative(grad_weight, exact_grads[2]) <= limit
    assert all(not part.any() for part in grad_x[:, :, :crop_start].split(256, 2))

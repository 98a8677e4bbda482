"""`torch.func` over the detector's operators: vmap gives what a loop gives, and what has no derivative says so."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from detector.ops.nms import batched_nms
from detector.ops.roi_align import roi_align
from tests.triton_dcn.cases import QUIET

ELEMENTS = 3
STRIDES = (4, 8)
SIZES = ((9, 12), (5, 6))
NAMES = ("fine", "coarse", "rois", "levels")


def pool(fine, coarse, rois, levels):
    return roi_align([fine, coarse], rois, levels, strides=STRIDES, output_size=3)


def stacked_tensors():
    """Features, rois and levels of all elements; some rois belong to no image, of this element or at all."""
    features = [torch.randn(ELEMENTS, 2, 4, *size, dtype=torch.float64) for size in SIZES]
    corner = torch.rand(ELEMENTS, 7, 2, dtype=torch.float64) * 30
    boxes = torch.cat([corner, corner + 4 + torch.rand(ELEMENTS, 7, 2, dtype=torch.float64) * 20], -1)
    image = torch.tensor([0.0, 1.0, 1.0, -1.0, 2.0, torch.nan, 0.0], dtype=torch.float64).expand(ELEMENTS, 7)
    rois = torch.cat([image[..., None], boxes], -1)
    levels = torch.randint(2, (ELEMENTS, 7))
    levels[:, 6] = -1
    return dict(zip(NAMES, (*features, rois, levels), strict=True))


@pytest.mark.parametrize(
    "shared",
    [(), ("rois", "levels"), ("fine", "coarse"), ("fine", "levels"), ("coarse", "rois")],
    ids=str,
)
def test_vmap_of_roi_align(shared):
    """As a loop would, whatever is shared, and autograd through it."""
    stacked = {name: tensor[0] if name in shared else tensor for name, tensor in stacked_tensors().items()}
    features = [stacked[name].requires_grad_() for name in NAMES[:2]]
    in_dims = tuple(None if name in shared else 0 for name in NAMES)

    pooled = vmap(pool, in_dims)(*stacked.values())
    one_by_one = []
    for index in range(ELEMENTS):
        arguments = [tensor if name in shared else tensor[index] for name, tensor in stacked.items()]
        one_by_one.append(pool(*arguments))
    expected = torch.stack(one_by_one)
    torch.testing.assert_close(pooled, expected)
    assert not pooled[:, 3:].any(), "padding, other images and levels that do not exist"

    grad_pooled = torch.randn_like(pooled)
    found = torch.autograd.grad(pooled, features, grad_pooled)
    for gradient, expected_gradient in zip(found, torch.autograd.grad(expected, features, grad_pooled), strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_vmap_of_roi_align_over_another_dimension():
    tensors = stacked_tensors()
    found = vmap(pool, (1, 2, 2, 1), out_dims=2)(
        tensors["fine"].movedim(0, 1),
        tensors["coarse"].movedim(0, 2),
        tensors["rois"].movedim(0, 2),
        tensors["levels"].T,
    )
    expected = [pool(*(tensor[index] for tensor in tensors.values())) for index in range(ELEMENTS)]
    torch.testing.assert_close(found, torch.stack(expected, 2))


def test_vmap_with_rois_in_half_precision():
    """The numbers of the images of all elements are beyond what the dtype counts."""
    elements = 300
    features = torch.randn(elements, 2, 1, 4, 4)
    rois = torch.tensor([[1, 0, 0, 8, 8]], dtype=torch.bfloat16)
    levels = torch.zeros(1, dtype=torch.int64)

    def pool_one(feature):
        return roi_align([feature], rois, levels, strides=(4,), output_size=1)

    expected = torch.stack([pool_one(feature) for feature in features])
    torch.testing.assert_close(vmap(pool_one)(features), expected)


def test_several_gradients_at_once():
    """`is_grads_batched` runs the backward operator under vmap."""
    tensors = {name: tensor[0] for name, tensor in stacked_tensors().items()}
    features = [tensors[name].requires_grad_() for name in NAMES[:2]]
    pooled = pool(*tensors.values())
    grads = torch.randn(ELEMENTS, *pooled.shape, dtype=pooled.dtype)

    found = torch.autograd.grad(pooled, features, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(pooled, features, one, retain_graph=True) for one in grads]
    for several, expected in zip(found, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(several, torch.stack(expected))


@QUIET
@pytest.mark.parametrize("name", NAMES[:3])
def test_forward_mode_of_roi_align_is_a_clear_error(name):
    """PyTorch would return a derivative of 0."""
    tensors = {key: tensor[0] for key, tensor in stacked_tensors().items()}

    def function(tensor):
        return pool(*(tensors | {name: tensor}).values())

    with pytest.raises(NotImplementedError, match="roi_align has no forward-mode derivative"):
        jvp(function, (tensors[name],), (torch.ones_like(tensors[name]),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
        with pytest.raises(NotImplementedError, match="roi_align has no forward-mode derivative"):
            function(dual)
        assert function(tensors[name]).isfinite().all(), "without a tangent it works there, too"


def test_second_derivatives_and_torch_func_grad_are_clear_errors():
    tensors = {name: tensor[0] for name, tensor in stacked_tensors().items()}
    fine = tensors.pop("fine").requires_grad_()
    loss = pool(fine, *tensors.values()).square().sum()
    (first,) = torch.autograd.grad(loss, fine, create_graph=True)
    with pytest.raises(NotImplementedError, match="roi_align has no second derivatives"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        grad(lambda x: pool(x, *tensors.values()).sum())(fine.detach())


@pytest.mark.parametrize("shared", [(), ("scores",), ("boxes", "valid")], ids=str)
def test_vmap_of_nms(shared):
    """One call for all elements."""
    corner = torch.rand(ELEMENTS, 2, 30, 2) * 50
    tensors = {
        "boxes": torch.cat([corner, corner + 20], -1),
        "scores": torch.rand(ELEMENTS, 2, 30),
        "valid": torch.rand(ELEMENTS, 2, 30) > 0.2,
    }
    tensors = {name: tensor[0] if name in shared else tensor for name, tensor in tensors.items()}

    def suppress(boxes, scores, valid):
        return batched_nms(boxes, scores, valid, 0.3)

    expected = []
    for index in range(ELEMENTS):
        expected.append(suppress(*(tensor if name in shared else tensor[index] for name, tensor in tensors.items())))
    in_dims = tuple(None if name in shared else 0 for name in tensors)
    kept = vmap(suppress, in_dims)(*tensors.values())
    assert torch.equal(kept, torch.stack(expected))
    assert 0 < kept.sum() < kept.numel()


@QUIET
def test_nms_has_no_derivative_to_lose():
    """Its results are booleans: no tangent is dropped."""
    boxes = torch.rand(1, 6, 4)
    boxes[..., 2:] += boxes[..., :2]
    scores = torch.rand(1, 6)
    valid = torch.ones(1, 6, dtype=torch.bool)
    with forward_ad.dual_level():
        kept = batched_nms(boxes, forward_ad.make_dual(scores, torch.ones_like(scores)), valid, 0.5)
        assert kept.dtype == torch.bool
        assert torch.equal(kept, batched_nms(boxes, scores, valid, 0.5))

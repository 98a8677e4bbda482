"""Box arithmetic against MMDetection's numbers."""

import pytest
import torch

from detector.ops.boxes import area, clip, decode, encode, iou

STDS = {"coder0": (1.0, 1.0, 1.0, 1.0), "coder1": (0.1, 0.1, 0.2, 0.2)}


@pytest.mark.parametrize("coder", ["coder0", "coder1"])
@pytest.mark.parametrize(("dtype", "suffix", "atol"), [(torch.float64, "f64", 1e-12), (torch.float32, "f32", 5e-5)])
def test_codec_golden(golden, coder, dtype, suffix, atol):
    arrays, params = golden("heads")
    rois, gts, deltas = (torch.from_numpy(arrays[f"{coder}.{name}"]).to(dtype) for name in ("rois", "gts", "deltas"))
    sizes = torch.tensor([params[coder]["max_shape"]])
    rtol = 1e-6 if atol > 1e-6 else 1e-12

    def check(actual, name):
        expected = torch.from_numpy(arrays[f"{coder}.{name}_{suffix}"])
        torch.testing.assert_close(actual.reshape(expected.shape), expected, rtol=rtol, atol=atol)

    check(encode(rois, gts, STDS[coder]), "encode")
    boxes = decode(rois[:, None], deltas.view(-1, 3, 4), STDS[coder])
    check(boxes, "decode_noclip")
    check(clip(boxes[None], sizes), "decode")
    first_class = decode(rois, deltas[:, :4], STDS[coder])
    check(clip(first_class[None], sizes), "decode_one")


def test_decode_inverts_encode():
    corner = torch.rand(50, 2, dtype=torch.float64) * 100
    boxes = torch.cat([corner, corner + 5 + torch.rand(50, 2) * 40], 1)
    targets = boxes.flip(0)
    deltas = encode(boxes, targets, STDS["coder1"])
    torch.testing.assert_close(decode(boxes, deltas, STDS["coder1"]), targets)


def test_iou_by_hand():
    a = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    b = torch.tensor([[2.0, 2.0, 6.0, 6.0], [4.0, 0.0, 8.0, 4.0], [0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    assert area(a).tolist() == [16.0, 0.0]
    torch.testing.assert_close(iou(a, b), torch.tensor([[4 / 28, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))


def test_clip_uses_each_images_size():
    boxes = torch.tensor([[[-5.0, -5.0, 50.0, 50.0]]]).expand(2, 3, 4)
    clipped = clip(boxes, torch.tensor([[20, 30], [60, 10]]))
    assert clipped[0, 0].tolist() == [0, 0, 30, 20]
    assert clipped[1, 2].tolist() == [0, 0, 10, 50]

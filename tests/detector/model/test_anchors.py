"""Anchors and their valid flags against MMDetection's."""

import torch

from detector.model.anchors import AnchorGenerator


def test_golden(golden):
    arrays, params = golden("heads")
    params = params["anchors"]
    strides = params["strides"] if len(params["strides"]) == 5 else (4, 8, 16, 32, 64)
    generator = AnchorGenerator(strides, 8.0, (0.5, 1.0, 2.0))
    base_anchors = torch.from_numpy(arrays["anchors.base"])
    torch.testing.assert_close(generator.base_anchors, base_anchors, rtol=0, atol=1e-5)

    shapes = [tuple(shape) for shape in params["feature_sizes"]]
    for level, anchors in enumerate(generator(shapes)):
        expected = torch.from_numpy(arrays[f"anchors.grid{level}"])
        torch.testing.assert_close(anchors, expected, rtol=0, atol=1e-5)

    valid = generator.valid_flags(shapes, torch.tensor(params["pad_shapes"]))
    for image in range(len(params["pad_shapes"])):
        expected = [torch.from_numpy(arrays[f"anchors.valid_pad{image}_level{level}"]) for level in range(5)]
        assert torch.equal(valid[image], torch.cat(expected))


def test_order_is_y_x_anchor():
    generator = AnchorGenerator((4,), 1.0, (1.0, 4.0))
    (anchors,) = generator([(2, 3)])
    anchors = anchors.view(2, 3, 2, 4)
    assert anchors[1, 2, 0].tolist() == [6.0, 2.0, 10.0, 6.0]
    assert anchors[1, 2, 1].tolist() == [7.0, 0.0, 9.0, 8.0]

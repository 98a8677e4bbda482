"""Deformable RoI pooling as an ONNX graph: every bin is a region of one bin."""

import pytest
import torch
from torch import nn

from detector.ops.roi_align import roi_align
from tests.detector.test_export import run_graph


class Pool(nn.Module):
    def forward(self, fine, coarse, rois, levels, offset):
        return roi_align([fine, coarse], rois, levels, strides=[4, 8], output_size=(2, 3), offset=offset, gamma=0.2)


def inputs(count):
    """Return two levels of two images, and rois of which the last three are ignored."""
    fine = torch.randn(2, 5, 12, 16)
    coarse = torch.randn(2, 5, 6, 8)
    corner = torch.rand(count, 2) * 40
    boxes = torch.cat([corner, corner + 3 + torch.rand(count, 2) * 40], 1)
    rois = torch.cat([torch.randint(2, (count, 1)), boxes], 1)
    rois[-3, 0] = -1
    rois[-2, 1] = torch.nan
    levels = torch.randint(2, (count,))
    levels[-1] = 2
    return fine, coarse, rois, levels, torch.randn(count, 2, 2, 3)


@pytest.mark.filterwarnings("ignore")
def test_deformable_roi_pooling_graph():
    pytest.importorskip("onnxscript")
    problems = [inputs(30), inputs(30)]
    for outputs, problem in zip(run_graph(Pool(), *problems), problems, strict=True):
        expected = Pool()(*problem)
        pooled = torch.as_tensor(outputs[0])
        torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)
        assert pooled[:-3].any()
        assert not pooled[-3:].any()

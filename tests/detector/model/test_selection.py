"""Boxes by index and by score."""

import torch

from detector.model.selection import gather_boxes, top_scores


def test_gather_boxes():
    boxes = torch.arange(24.0).view(2, 3, 4)
    index = torch.tensor([[2, 0], [1, 1]])
    expected = torch.stack([boxes[0, [2, 0]], boxes[1, [1, 1]]])
    assert torch.equal(gather_boxes(boxes, index), expected)


def test_top_scores_fall_and_equals_keep_their_order():
    scores = torch.tensor([[[0.5, 0.9], [0.5, 0.7]]])
    keep = torch.tensor([[[True, False], [True, True]]])
    best, index = top_scores(scores, keep, 3)
    assert best.tolist() == [[scores[0, 1, 1].item(), 0.5, 0.5]]
    assert index.tolist() == [[3, 0, 2]]


def test_top_scores_with_fewer_than_asked_for():
    best, _ = top_scores(torch.tensor([[0.5, 0.9]]), torch.tensor([[False, True]]), 5)
    assert best.shape == (1, 2)
    assert best[0, 1] == -1

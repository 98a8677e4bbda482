"""Boxes by index and by score."""

import pytest
import torch

from detector.model.selection import gather_boxes, top_k, top_k_op, top_scores


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("total", "count"), [(1, 1), (7, 7), (7, 0), (7, 1), (100, 99), (5000, 300)])
@pytest.mark.parametrize("levels", [1, 3, 1000], ids=lambda levels: f"{levels}-scores")
def test_top_k_is_the_beginning_of_a_stable_sort(dtype, total, count, levels):
    generator = torch.Generator().manual_seed(total + count)
    scores = torch.randint(levels, (3, total), generator=generator).to(dtype) - 1
    expected = scores.sort(dim=1, descending=True, stable=True)

    values, index = top_k(scores, count)
    assert torch.equal(values, expected.values[:, :count])
    assert torch.equal(index, expected.indices[:, :count])


@pytest.mark.parametrize("nans", [1, 4, 20])
def test_top_k_of_nan_returns_indices(nans):
    scores = torch.arange(20.0).repeat(2, 1)
    scores[:, :nans] = torch.nan
    _, index = top_k(scores, 4)
    for row in index.tolist():
        assert len(set(row)) == 4
        assert set(row) <= set(range(20))


def test_top_k_operator():
    torch.library.opcheck(top_k_op, (torch.rand(2, 30), 7))
    scores = torch.rand(4, 2, 30)
    values, index = torch.func.vmap(lambda rows: top_k(rows, 7))(scores)
    expected_values, expected_index = top_k(scores.flatten(0, 1), 7)
    assert torch.equal(values, expected_values.view(4, 2, 7))
    assert torch.equal(index, expected_index.view(4, 2, 7))

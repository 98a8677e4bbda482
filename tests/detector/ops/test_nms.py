"""Non-maximum suppression: golden numbers, a brute-force oracle, and the Triton kernels against the same oracle.

The kernels run in Triton's interpreter on a machine without a GPU.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.ops import nms as module
from detector.ops.nms import batched_nms, nms, nms_by_id

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def oracle(boxes: np.ndarray, scores: np.ndarray, valid: np.ndarray, threshold: float) -> np.ndarray:
    """Greedy suppression of one group as its definition reads; boxes (M, 4) -> keep (M,)."""
    keep = np.zeros(len(boxes), bool)
    live = [i for i in range(len(boxes)) if valid[i] and not math.isnan(scores[i])]
    live.sort(key=lambda i: -scores[i])  # a stable sort
    rest = np.array(live, int)
    threshold = boxes.dtype.type(threshold)
    with np.errstate(all="ignore"):
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        while len(rest):
            best = rest[0]
            rest = rest[1:]
            keep[best] = True
            low = np.maximum(boxes[best, :2], boxes[rest, :2])
            high = np.minimum(boxes[best, 2:], boxes[rest, 2:])
            sides = np.maximum(high - low, 0)
            inter = sides[:, 0] * sides[:, 1]
            iou = inter / (area[best] + area[rest] - inter)
            rest = rest[~(iou > threshold)]
    return keep


def expected(boxes, scores, valid, threshold):
    """Return what the oracle keeps of every group of tensors."""
    groups = zip(boxes.numpy(), scores.double().numpy(), valid.numpy(), strict=True)
    keep = [oracle(*group, threshold) for group in groups]
    return torch.from_numpy(np.stack(keep)) if keep else torch.zeros_like(valid)


def random_groups(groups, size, *, spread=100.0, side=20.0, dtype=torch.float32):
    """Boxes on a grid of 1/4, so that ties and equal boxes occur; scores with ties, NaN and -inf; some padding."""
    low = torch.rand(groups, size, 2, dtype=dtype) * spread
    sides = (torch.rand(groups, size, 2, dtype=dtype) * 1.05 - 0.05) * side  # a few are negative
    boxes = torch.cat([low, low + sides], 2)
    boxes = (boxes * 4).round() / 4
    scores = (torch.rand(groups, size, dtype=dtype) * 50).round() / 50
    scores[torch.rand(groups, size) < 0.03] = math.nan
    scores[torch.rand(groups, size) < 0.03] = -math.inf
    valid = torch.rand(groups, size) < 0.9
    return boxes, scores, valid


@st.composite
def problems(draw, largest=40):
    """Draw the arguments of `batched_nms`: few different numbers, so that equal boxes and scores are common."""
    groups = draw(st.integers(0, 3))
    size = draw(st.integers(0, largest))
    count = groups * size
    coordinate = st.integers(-4, 12).map(lambda n: n / 2) | st.sampled_from([math.nan, math.inf, 1e30])
    corner = st.tuples(coordinate, coordinate)
    box = st.one_of(
        st.tuples(corner, corner).map(lambda pair: pair[0] + pair[1]),
        st.sampled_from([(0.0, 0.0, 2.0, 2.0), (0.0, 0.0, 2.0, 4.0), (1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 6.0, 6.0)]),
    )
    score = st.sampled_from([0.0, 0.25, 0.5, 0.5, 0.75, 1.0, -1.0, math.nan, math.inf, -math.inf])
    is_valid = st.booleans() | st.just(True)

    def draw_tensor(element, dtype, *shape):
        values = draw(st.lists(element, min_size=count, max_size=count))
        return torch.tensor(values, dtype=dtype).reshape(groups, size, *shape)

    boxes = draw_tensor(box, torch.float32, 4)
    scores = draw_tensor(score, torch.float32)
    valid = draw_tensor(is_valid, torch.bool)
    threshold = draw(st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0]))
    return boxes, scores, valid, threshold


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems())
def test_matches_brute_force(problem):
    assert torch.equal(batched_nms(*problem), expected(*problem))


@pytest.mark.parametrize(
    ("groups", "size", "spread", "threshold"),
    [
        pytest.param(1, 1, 10.0, 0.5, id="one box"),
        pytest.param(40, 30, 60.0, 0.5, id="classes"),
        pytest.param(3, 256, 60.0, 0.7, id="one block"),
        pytest.param(2, 257, 60.0, 0.7, id="one block and one box"),
        pytest.param(2, 1500, 150.0, 0.7, id="levels"),
        pytest.param(1, 10_000, 400.0, 0.5, id="10 000 boxes"),
        pytest.param(1, 2000, 8.0, 0.3, id="crowded"),
    ],
)
def test_sizes(groups, size, spread, threshold):
    problem = (*random_groups(groups, size, spread=spread), threshold)
    assert torch.equal(batched_nms(*problem), expected(*problem))


def test_identical_boxes_keep_the_first():
    boxes = torch.tensor([1.0, 2.0, 5.0, 7.0]).expand(2, 600, 4)
    keep = batched_nms(boxes, torch.ones(2, 600), torch.ones(2, 600, dtype=torch.bool), 0.5)
    assert keep.nonzero().tolist() == [[0, 0], [1, 0]]


def test_long_chain_of_suppressions():
    """Each box overlaps only the next: every second one stays, decided one after the other."""
    x = torch.arange(700, dtype=torch.float32)
    boxes = torch.stack([x, torch.zeros(700), x + 1.5, torch.ones(700)], 1)[None]
    scores = torch.linspace(1, 0, 700)[None]
    keep = batched_nms(boxes, scores, torch.ones(1, 700, dtype=torch.bool), 0.15)
    assert keep[0].nonzero()[:, 0].tolist() == list(range(0, 700, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    boxes, scores, valid = random_groups(3, 50, spread=15.0, side=8.0)
    boxes = boxes.to(dtype)
    scores = scores.to(dtype)
    computed = boxes if dtype == torch.float64 else boxes.float()
    assert torch.equal(batched_nms(boxes, scores, valid, 0.4), expected(computed, scores, valid, 0.4))


def test_any_strides():
    boxes, scores, valid = random_groups(4, 30, spread=30.0)
    keep = batched_nms(boxes, scores, valid, 0.5)
    views = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (boxes, scores, valid)]
    assert torch.equal(batched_nms(*views, 0.5), keep)
    expanded = (boxes[:1].expand(4, -1, -1), scores[:1].expand(4, -1), valid[:1].expand(4, -1))
    assert torch.equal(batched_nms(*expanded, 0.5), keep[:1].expand(4, -1))


@pytest.mark.parametrize("case", [f"s{i:02}" for i in range(9)])
def test_golden_one_class(golden, case):
    arrays, parameters = golden("nms")
    boxes, scores, keep = (torch.from_numpy(arrays[f"{case}.{name}"]) for name in ("boxes", "scores", "keep"))
    assert nms(boxes, scores, parameters[case]["iou_threshold"]).tolist() == keep.tolist()


@pytest.mark.parametrize("case", [f"b{i:02}" for i in range(6)])
def test_golden_by_id(golden, case):
    arrays, parameters = golden("nms")
    names = ("boxes", "scores", "ids", "keep")
    boxes, scores, ids, keep = (torch.from_numpy(arrays[f"{case}.{name}"]) for name in names)
    assert nms_by_id(boxes, scores, ids, parameters[case]["iou_threshold"]).tolist() == keep.tolist()


@pytest.mark.parametrize("case", [f"m{i:02}" for i in range(6)])
def test_golden_multiclass(golden, case):
    """One group per class; the best `max_num` of all classes, as indices roi * classes + class."""
    arrays, parameters = golden("nms")
    parameters = parameters[case]
    scores = torch.from_numpy(arrays[f"{case}.scores"])[:, :-1]
    classes = scores.shape[1]
    boxes = torch.from_numpy(arrays[f"{case}.boxes"]).view(len(scores), -1, 4).expand(-1, classes, 4)
    valid = scores > parameters["score_thr"]
    keep = batched_nms(boxes.transpose(0, 1), scores.t(), valid.t(), parameters["iou_threshold"])
    kept = keep.t().flatten().nonzero()[:, 0]
    kept = kept[scores.flatten()[kept].sort(descending=True, stable=True).indices]
    limit = parameters["max_num"] if parameters["max_num"] > 0 else len(kept)
    assert kept[:limit].tolist() == arrays[f"{case}.inds"].tolist()


def test_nms_and_nms_by_id_sort_by_score():
    boxes = torch.tensor([[0.0, 0, 1, 1], [5, 5, 6, 6], [0, 0, 1, 1], [5, 5, 6, 6]])
    scores = torch.tensor([0.5, 0.9, 0.7, 0.9])
    assert nms(boxes, scores, 0.5).tolist() == [1, 2]
    assert nms_by_id(boxes, scores, torch.tensor([7, -1, 3, 3]), 0.5).tolist() == [1, 3, 2, 0]
    assert nms_by_id(boxes[:0], scores[:0], torch.zeros(0, dtype=torch.int64), 0.5).tolist() == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": torch.zeros(2, 3, 5)}, ValueError, r"boxes: expected \(G, M, 4\), got \(2, 3, 5\)"),
        ({"scores": torch.zeros(2, 4)}, ValueError, r"scores: expected \(2, 3\), got \(2, 4\)"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, ValueError, r"valid: expected \(2, 3\), got \(3,\)"),
        ({"valid": torch.ones(2, 3)}, TypeError, "valid: expected torch.bool, got torch.float32"),
        ({"boxes": torch.zeros(2, 3, 4).int()}, TypeError, "boxes: expected a floating dtype, got torch.int32"),
    ],
)
def test_errors(change, error, message):
    arguments = {"boxes": torch.zeros(2, 3, 4), "scores": torch.zeros(2, 3), "valid": torch.ones(2, 3).bool()}
    arguments |= change
    with pytest.raises(error, match=message):
        batched_nms(**arguments, iou_threshold=0.5)


def test_opcheck():
    torch.library.opcheck(module.batched_nms_op, (*random_groups(2, 12), 0.5))


def test_compiles_as_one_graph():
    def count_kept(boxes, scores, valid):
        return batched_nms(boxes * 2, scores, valid, 0.5).sum(1)

    compiled = torch.compile(count_kept, fullgraph=True, backend="aot_eager")
    for size in (12, 20):
        groups = random_groups(2, size, spread=20.0)
        assert torch.equal(compiled(*groups), count_kept(*groups))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
class TestKernels:
    """The CUDA path, called directly."""

    @pytest.fixture(scope="class")
    @staticmethod
    def run():
        """Function: a problem on the CPU -> what the kernels keep."""
        kernels = pytest.importorskip("detector.ops.kernels.nms")

        def run(boxes, scores, valid, threshold):
            moved = (tensor.to(DEVICE) for tensor in (boxes, scores, valid))
            return kernels.batched_nms(*moved, threshold).cpu()

        return run

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(problem=problems(largest=10))
    def test_matches_brute_force(self, run, problem):
        assert torch.equal(run(*problem), expected(*problem))

    @pytest.mark.parametrize(
        ("groups", "size", "dtype"),
        [(2, 64, torch.float32), (2, 65, torch.float64), (1, 330, torch.float32), (2, 20, torch.float16)],
    )
    def test_sizes(self, run, groups, size, dtype):
        boxes, scores, valid = random_groups(groups, size, spread=30.0)
        boxes = boxes.to(dtype)
        scores = scores.to(dtype)
        computed = boxes if dtype == torch.float64 else boxes.float()
        assert torch.equal(run(boxes, scores, valid, 0.3), expected(computed, scores, valid, 0.3))

    @pytest.mark.gpu
    @pytest.mark.parametrize(("groups", "size", "threshold"), [(10, 2000, 0.7), (160, 1000, 0.5), (1, 10_000, 0.5)])
    def test_full_size_without_waiting_for_the_host(self, groups, size, threshold):
        problem = random_groups(groups, size, spread=300.0)
        moved = [tensor.cuda() for tensor in problem]
        batched_nms(*moved, threshold)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            keep = batched_nms(*moved, threshold)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(keep.cpu(), batched_nms(*problem, threshold))

"""What is kept between calls belongs to its key, device and dtype, and is bounded."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from detector.model.anchors import AnchorGenerator
from detector.ops.tensor_memory import TensorMemory


def ones(memory, key, dtype=torch.float32):
    like = torch.empty(0, dtype=dtype)
    return memory.get(like, key, lambda: torch.ones(2, dtype=dtype))


def test_one_tensor_for_each_key_dtype_and_mode():
    memory = TensorMemory(9)
    first = ones(memory, "a")
    assert ones(memory, "a") is first
    assert ones(memory, "b") is not first
    assert ones(memory, "a", torch.float64).dtype == torch.float64
    with torch.inference_mode():
        assert ones(memory, "a").is_inference()
    assert not ones(memory, "a").is_inference()
    assert len(memory) == 4


def test_the_key_that_was_not_used_for_longest_is_forgotten():
    memory = TensorMemory(2)
    first = ones(memory, "a")
    second = ones(memory, "b")
    ones(memory, "a")
    ones(memory, "c")
    assert ones(memory, "a") is first
    assert ones(memory, "b") is not second
    assert len(memory) == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_are_empty(duplicate):
    generator = AnchorGenerator((4, 8), 8.0, (0.5, 1.0))
    anchors = generator([(2, 3), (1, 2)])
    other = duplicate(generator)
    assert len(generator._memory) == 1
    assert len(other._memory) == 0
    for one, two in zip(anchors, other([(2, 3), (1, 2)]), strict=True):
        assert torch.equal(one, two)
    assert list(generator.state_dict()) == []


def test_nothing_is_kept_of_tensors_without_values():
    memory = TensorMemory(9)
    with FakeTensorMode():
        ones(memory, "fake")
    torch.func.grad(lambda x: (x * ones(memory, "functorch")).sum())(torch.ones(2))
    torch.compile(lambda x: x * ones(memory, "compiled"), backend="eager")(torch.ones(2))
    assert len(memory) == 0


def test_each_stream_of_a_gpu_has_its_own_and_a_graph_none(monkeypatch):
    like = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.float32)
    memory = TensorMemory(9)
    for stream, is_capturing in [(1, False), (2, False), (1, False), (3, True)]:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda value=is_capturing: value)
        made = memory.get(like, "a", lambda stream=stream: torch.full((2,), float(stream)))
        assert made.tolist() == [stream, stream]
    assert len(memory) == 2


def test_anchors_follow_the_dtype_of_the_model():
    generator = AnchorGenerator((4,), 8.0, (0.5,))
    single = generator([(2, 2)])
    assert generator.double()([(2, 2)])[0].dtype == torch.float64
    assert generator.float()([(2, 2)])[0] is single[0]

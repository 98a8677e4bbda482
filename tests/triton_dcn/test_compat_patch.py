"""What `patch` reaches, how it says so, and that it is undone in any order."""

import importlib.util
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import triton_dcn
from tests.triton_dcn.compat_stubs import make_modules
from triton_dcn.compat import mmcv as compat_mmcv
from triton_dcn.compat import swap
from triton_dcn.compat import torchvision as compat_torchvision

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None


def make_model_module(monkeypatch, source, name="models.deform"):
    """A module of a user, loaded before the patch."""
    return make_modules(monkeypatch, source, name)


def test_names_imported_before_are_replaced_and_restored(torchvision_stub, monkeypatch):
    source = "from torchvision.ops import deform_conv2d\nimport torchvision.ops as ops\nthe_same = deform_conv2d"
    user = make_model_module(monkeypatch, source)
    original = torchvision_stub.deform_conv2d
    names = [
        "torchvision.deform_conv2d",
        "torchvision.ops.deform_conv2d",
        "torchvision.ops.deform_conv.deform_conv2d",
        "models.deform.deform_conv2d",
        "models.deform.the_same",
    ]

    handle = compat_torchvision.patch()
    assert user.deform_conv2d is user.the_same is user.ops.deform_conv2d is triton_dcn.deform_conv2d
    operator = ["torch.ops.torchvision.deform_conv2d"] if hasattr(torch.ops.torchvision, "deform_conv2d") else []
    assert len(handle) == len(names + operator)
    start, places = repr(handle).split(": ")
    assert start == f"<Patch of {len(handle)} places"
    assert sorted(places.rstrip(">").split(", ")) == sorted(names + operator)

    handle.undo()
    assert user.deform_conv2d is user.the_same is user.ops.deform_conv2d is original
    assert len(handle) == 0
    assert repr(handle) == "<Patch of 0 places>"


def test_modules_do_not_notice_the_search(torchvision_stub, monkeypatch):
    """Some modules load what they promise as soon as an attribute is asked for, and some entries are no modules."""
    spec = importlib.util.find_spec("this")  # prints poetry when it is loaded
    spec.loader = importlib.util.LazyLoader(spec.loader)
    lazy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lazy)

    class Touchy(ModuleType):
        def __getattribute__(self, name):
            raise AssertionError(f"asked for {name}")

        @property
        def __dict__(self):  # as in modules of the package py
            raise AssertionError("asked for __dict__")

    touchy = Touchy("touchy")
    vars(ModuleType)["__dict__"].__get__(touchy)["deform_conv2d"] = torchvision_stub.deform_conv2d
    monkeypatch.setitem(sys.modules, "lazy_module", lazy)
    monkeypatch.setitem(sys.modules, "touchy", touchy)
    monkeypatch.setitem(sys.modules, "no_module", None)
    monkeypatch.setitem(sys.modules, "stands_for_a_module", SimpleNamespace(f=torchvision_stub.deform_conv2d))

    with compat_torchvision.patch() as handle:
        assert "touchy.deform_conv2d" in repr(handle)
        assert "stands_for_a_module" not in repr(handle)
        assert type(lazy) is not ModuleType, "the search loaded a lazy module"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_second_patch_changes_nothing(torchvision_stub, order):
    original = torchvision_stub.deform_conv2d
    handles = [compat_torchvision.patch(), compat_torchvision.patch()]
    assert len(handles[0]) > 0
    assert len(handles[1]) == 0
    handles[order[0]].undo()
    handles[order[1]].undo()
    assert torchvision_stub.deform_conv2d is original

    with compat_torchvision.patch():
        with compat_torchvision.patch():
            pass
        assert torchvision_stub.deform_conv2d is triton_dcn.deform_conv2d, "the inner patch undid the outer one"
    assert torchvision_stub.deform_conv2d is original


def original():
    """A function of a library."""


def ours():
    """What a patch puts in its place."""


def another():
    """What another patch puts there."""


@pytest.fixture
def library():
    module = ModuleType("library")
    module.call = module.other = original
    return module


def test_undoing_leaves_what_was_changed_since(library):
    """No order of undoing puts back a function that another patch has replaced since."""
    first = swap.Patch([(library, "call", ours)])
    second = swap.Patch([(library, "call", another)])
    assert len(first) == len(second) == 2

    first.undo()
    assert library.call is library.other is another
    assert len(first) == 2
    second.undo()
    assert library.call is library.other is ours
    first.undo()
    assert library.call is library.other is original
    assert len(first) == len(second) == 0


def test_what_a_new_function_calls_is_not_replaced(torchvision_stub, monkeypatch):
    """Neither this package's function after a patch of ours, nor the original in the module of a wrapper."""
    wrapper = make_model_module(
        monkeypatch,
        "from torchvision.ops import deform_conv2d as original\n"
        "def deform_conv2d(*arguments):\n"
        "    return original(*arguments)\n",
        "wrapper",
    )
    original = torchvision_stub.deform_conv2d
    with swap.Patch([(torchvision_stub, "deform_conv2d", wrapper.deform_conv2d)]):
        assert torchvision_stub.deform_conv2d is wrapper.deform_conv2d
        assert wrapper.original is original
    ours = triton_dcn.deform_conv2d
    with compat_torchvision.patch(), swap.Patch([(torchvision_stub, "deform_conv2d", another)]):
        assert torchvision_stub.deform_conv2d is another
        assert triton_dcn.deform_conv2d is triton_dcn.functional.deform_conv2d is ours
    assert torchvision_stub.deform_conv2d is original


def test_an_unknown_name_leaves_everything_as_it_is(library):
    with pytest.raises(AttributeError):
        swap.Patch([(library, "call", ours), (library, "absent", ours)])
    assert library.call is original


SACONV = """
from mmcv.ops.deform_conv import deform_conv2d

def forward(x, offset, weight):
    return deform_conv2d(x, offset, weight, (1, 1), (3, 3), (3, 3), 1, 1)
"""

TOOD = """
from mmcv.ops import deform_conv2d

def deform_sampling(feat, offset):
    channels = feat.shape[1]
    weight = feat.new_ones(channels, 1, 1, 1)
    return deform_conv2d(feat, offset, weight, 1, 0, 1, channels, channels)
"""

BASICVSR = """
import torch
from mmcv.ops import ModulatedDeformConv2d, modulated_deform_conv2d

class SecondOrderDeformableAlignment(ModulatedDeformConv2d):
    def forward(self, x, offset, mask):
        return modulated_deform_conv2d(x, offset, mask.sigmoid(), self.weight, self.bias, self.stride, self.padding,
                                       self.dilation, self.groups, self.deform_groups)
"""


def test_patch_reaches_what_builds_on_mmcv(mmcv_stub, monkeypatch):
    """DetectoRS, TOOD and BasicVSR++ import the functions by name; the last one has a class of its own."""
    saconv = make_model_module(monkeypatch, SACONV, "mmcv.ops.saconv")
    tood = make_model_module(monkeypatch, TOOD, "mmdet.models.dense_heads.tood_head")
    basicvsr = make_model_module(monkeypatch, BASICVSR, "mmedit.basicvsr_pp")
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    layer = basicvsr.SecondOrderDeformableAlignment(4, 4, 3, padding=1, deform_groups=2).double()
    offset, mask = torch.randn(2, 36, 6, 7, dtype=torch.float64), torch.randn(2, 18, 6, 7, dtype=torch.float64)

    def outputs():
        return [
            saconv.forward(x, offset[:, :18], layer.weight),
            tood.deform_sampling(x, offset[:, :8]),
            layer(x, offset, mask),
        ]

    expected = outputs()
    assert mmcv_stub.calls == ["v1", "v1", "v2"]
    with compat_mmcv.patch() as handle:
        for name in ("mmcv.ops.saconv", "mmdet.models.dense_heads.tood_head", "mmedit.basicvsr_pp"):
            assert name in repr(handle)
        torch.testing.assert_close(outputs(), expected)
    assert mmcv_stub.calls == ["v1", "v1", "v2"], "the library's own function ran"
    outputs()
    assert mmcv_stub.calls == ["v1", "v1", "v2"] * 2


SCHEMA = (
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, int stride_h, int stride_w, "
    "int pad_h, int pad_w, int dilation_h, int dilation_w, int groups, int offset_groups, bool use_mask) -> Tensor"
)

YOLO = """
import torch

operator = torch.ops.torchvision.deform_conv2d

def by_operator(*arguments):
    return torch.ops.torchvision.deform_conv2d(*arguments)

def by_overload(*arguments):
    return torch.ops.torchvision.deform_conv2d.default(*arguments)

def by_name(*arguments):
    return operator(*arguments)
"""


@pytest.fixture
def operator_calls(torchvision_stub):
    """The operator of a stand-in for torchvision's compiled part; a list of its calls."""
    if HAS_TORCHVISION:
        pytest.skip("torchvision has the operator itself")
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define(SCHEMA)
    calls = []

    def compute(input, weight, offset, mask, bias, sh, sw, ph, pw, dh, dw, groups, offset_groups, use_mask):
        calls.append(use_mask)
        given = mask if use_mask else None
        return triton_dcn.deform_conv2d(
            input, offset, weight, bias, (sh, sw), (ph, pw), (dh, dw), given, backend="reference"
        )

    library.impl("deform_conv2d", compute, "CPU")
    yield calls
    library._destroy()
    vars(torch.ops.torchvision).pop("deform_conv2d", None)


def operator_arguments(use_mask=True, offset_groups=2):
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 4, 7, 9), (6, 2, 3, 3), (2, 36, 5, 4), (2, 18, 5, 4), (6,)]
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    return *tensors, 1, 2, 0, 1, 1, 2, 2, offset_groups, use_mask


@pytest.mark.parametrize("use_mask", [True, False])
def test_the_operator_called_directly(operator_calls, monkeypatch, use_mask):
    """YOLO forks call it without torchvision's function."""
    yolo = make_model_module(monkeypatch, YOLO, "ultralytics.deform")
    functions = [yolo.by_operator, yolo.by_overload, yolo.by_name]
    arguments = operator_arguments(use_mask)
    packet = torch.ops.torchvision.deform_conv2d
    expected = [function(*arguments) for function in functions]
    assert operator_calls == [use_mask] * 3

    handle = compat_torchvision.patch()
    assert "torch.ops.torchvision.deform_conv2d" in repr(handle)
    assert "ultralytics.deform.operator" in repr(handle)
    torch.testing.assert_close([function(*arguments) for function in functions], expected)
    assert operator_calls == [use_mask] * 3, "the library's own operator ran"
    handle.undo()
    assert torch.ops.torchvision.deform_conv2d is yolo.operator is packet


def test_pytorch_takes_the_operator_for_one(operator_calls):
    """It is replaced by an operator, not by a function, since PyTorch goes through the operators that it knows."""

    class Layer(nn.Module):
        def forward(self, x):
            return torch.ops.torchvision.deform_conv2d(x, *arguments[1:])

    input, *_ = arguments = operator_arguments()
    expected = Layer()(input)
    with compat_torchvision.patch():
        compiled = torch.compile(Layer(), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(input), expected)
        traced = torch.fx.symbolic_trace(Layer())
        torch.testing.assert_close(traced(input), expected)
        exported = torch.export.export(Layer(), (input,), strict=False).run_decompositions()  # goes through operators
        assert "triton_dcn.deform_conv2d.default" in str(exported.graph)
        torch.testing.assert_close(exported.module()(input), expected)
    assert len(operator_calls) == 1


def test_the_operator_checks_its_groups(operator_calls):
    with compat_torchvision.patch():
        with pytest.raises(ValueError, match="offset_groups: expected 2 by the shapes, got 1"):
            torch.ops.torchvision.deform_conv2d(*operator_arguments(offset_groups=1))
        input, weight, offset, mask, bias, *numbers = operator_arguments()
        numbers[6] = 1
        with pytest.raises(ValueError, match="groups: expected 2 by the shapes, got 1"):
            torch.ops.torchvision.deform_conv2d(input, weight, offset, mask, bias, *numbers)


def test_the_operator_of_the_real_torchvision():
    module = pytest.importorskip("torchvision.ops.deform_conv")
    held = {"function": module.deform_conv2d}  # not in a module
    packet = torch.ops.torchvision.deform_conv2d
    input, weight, offset, mask, bias, *_ = arguments = operator_arguments()
    expected = packet(*arguments)
    with compat_torchvision.patch() as handle:
        assert "torch.ops.torchvision.deform_conv2d" in repr(handle)
        assert torch.ops.torchvision.deform_conv2d is torch.ops.triton_dcn.torchvision_deform_conv2d
        torch.testing.assert_close(torch.ops.torchvision.deform_conv2d(*arguments), expected)
        torch.testing.assert_close(torch.ops.torchvision.deform_conv2d.default(*arguments), expected)
        with torch.profiler.profile() as profile:
            found = held["function"](input, offset, weight, bias, (1, 2), (0, 1), (1, 2), mask=mask)
        torch.testing.assert_close(found, expected)
        names = {event.name for event in profile.events()}
        assert "triton_dcn::deform_conv2d" in names
        assert "torchvision::deform_conv2d" not in names
    assert torch.ops.torchvision.deform_conv2d is packet


class Holder(nn.Module):
    """Keeps the operator where no patch reaches it."""

    def __init__(self, operator):
        super().__init__()
        self.held = [operator]

    def forward(self, *arguments):
        return self.held[0](*arguments)


HELD_OPERATOR = """
import torch
from torchvision.ops import deform_conv  # loads the operator
from tests.triton_dcn.test_compat_patch import Holder, operator_arguments
from triton_dcn.compat import torchvision as compat

model = Holder(torch.ops.torchvision.deform_conv2d)
expected = model(*operator_arguments())
with compat.patch():
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(*operator_arguments()), expected)
torch.testing.assert_close(torch.compile(model, backend="aot_eager")(*operator_arguments()), expected)
"""


def test_an_operator_out_of_reach_still_compiles():
    """In a process of its own, where nothing has called the operator before the patch."""
    pytest.importorskip("torchvision.ops.deform_conv")
    subprocess.run([sys.executable, "-c", HELD_OPERATOR], check=True)


def test_a_module_that_makes_its_names_when_asked(library):
    vars(library).clear()
    vars(library).update(__name__="library", __getattr__=lambda name: original)
    handle = swap.Patch([(library, "call", ours)])
    assert library.call is ours
    handle.undo()
    assert library.call is original

"""What torch wraps around the operator: `torch.func`, export, graphs and traces, gradients averaged over processes."""

import copy
import io
import os
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.parallel import DistributedDataParallel

from tests.triton_dcn.cases import CASES, QUIET, OperatorCase, make_case
from triton_dcn import (
    DeformConv2d,
    DeformConv2dPack,
    DeformRoIPool,
    DeformRoIPoolPack,
    ModulatedDeformConv2dPack,
    ModulatedDeformRoIPoolPack,
    deform_conv2d,
    deform_roi_pool,
)
from triton_dcn.functional import convolve

NAMES = ("x", "offset", "mask", "weight", "bias")
BACKENDS = ("torch", "reference")


def convolution(backend=None):
    """A function of the tensors `NAMES`."""

    def function(x, offset, mask, weight, bias):
        return deform_conv2d(x, offset, weight, bias, mask=mask, stride=1, padding=1, backend=backend)

    return function


def stack_cases(count=3):
    """Cases that differ in their numbers only: their tensors by name, stacked."""
    cases = [make_case(CASES["groups"], torch.float64, seed=seed) for seed in range(count)]
    tensors = zip(*((*case.tensors, case.bias) for case in cases), strict=True)
    return dict(zip(NAMES, map(torch.stack, tensors), strict=True))


def small_tensors():
    """The tensors of one small case, in the order of `NAMES`."""
    case = make_case(OperatorCase("", 1, 4, 2, 3, 4, groups=2, offset_groups=2), torch.float64)
    return (*case.tensors, case.bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shared",
    [(), ("weight", "bias"), ("x", "weight", "bias"), ("offset", "mask", "weight", "bias"), NAMES[:4]],
    ids=str,
)
def test_vmap(shared, backend):
    """As a loop would, whatever is shared, and autograd through it."""
    function = convolution(backend)
    leaves = {}
    for name, stacked in stack_cases().items():
        leaf = stacked[0] if name in shared else stacked
        leaves[name] = leaf.clone().requires_grad_()

    in_dims = tuple(None if name in shared else 0 for name in NAMES)
    output = vmap(function, in_dims)(*leaves.values())
    elements = []
    for index in range(3):
        arguments = [leaf if name in shared else leaf[index] for name, leaf in leaves.items()]
        elements.append(function(*arguments))
    torch.testing.assert_close(output, torch.stack(elements))

    grad_output = torch.randn_like(output)
    grads = torch.autograd.grad(output, leaves.values(), grad_output)
    expected_grads = torch.autograd.grad(torch.stack(elements), leaves.values(), grad_output)
    for found, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_another_dimension_and_without_a_mask(backend):
    tensors = stack_cases()
    weight = tensors["weight"][0]

    def function(x, offset):
        return deform_conv2d(x, offset, weight, padding=1, backend=backend)

    x = tensors["x"].movedim(0, 2)
    offset = tensors["offset"].movedim(0, -1)
    found = vmap(function, (2, -1), out_dims=1)(x, offset)
    expected = [function(tensors["x"][index], tensors["offset"][index]) for index in range(3)]
    torch.testing.assert_close(found, torch.stack(expected, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [NAMES[:3], NAMES[:4], ("weight",)], ids=str)
def test_several_gradients_at_once(wanted, backend):
    """`is_grads_batched` runs the backward operator under vmap."""
    tensors = {name: stacked[0].requires_grad_(name in wanted) for name, stacked in stack_cases(1).items()}
    output = convolution(backend)(*tensors.values())
    leaves = [tensors[name] for name in wanted]
    grad_outputs = torch.randn(3, *output.shape, dtype=output.dtype)

    found = torch.autograd.grad(output, leaves, grad_outputs, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(output, leaves, one, retain_graph=True) for one in grad_outputs]
    for several, expected in zip(found, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(several, torch.stack(expected))


def test_torch_func_grad_is_a_clear_error():
    """PyTorch has no `torch.func` differentiation for operators of torch.library, and says so."""
    function = convolution("torch")
    with pytest.raises(RuntimeError, match="functorch transforms"):
        grad(lambda *tensors: function(*tensors).sum())(*small_tensors())


@QUIET
@pytest.mark.parametrize("name", NAMES)
def test_jacobians_of_the_reference(name):
    """In forward and in reverse mode, of each tensor."""
    argument = NAMES.index(name)
    function = convolution("reference")
    forward = jacfwd(function, argument)(*small_tensors())
    reverse = jacrev(function, argument)(*small_tensors())
    assert forward.any()
    torch.testing.assert_close(forward, reverse)


@QUIET
def test_directional_derivative_of_the_reference():
    """Of all tensors at once, against finite differences."""
    function = convolution("reference")
    tensors = small_tensors()
    directions = tuple(torch.randn_like(tensor) for tensor in tensors)
    _, tangent = jvp(function, tensors, directions)

    step = 1e-6
    ahead = [tensor + step * direction for tensor, direction in zip(tensors, directions, strict=True)]
    behind = [tensor - step * direction for tensor, direction in zip(tensors, directions, strict=True)]
    difference = (function(*ahead) - function(*behind)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-6)


@QUIET
def test_hessian_of_the_reference():
    """Forward over reverse equals reverse over reverse; no NaN from an offset that is one."""
    x, offset, mask, weight, bias = small_tensors()
    offset[:, :, 1, 2] = torch.nan

    def energy(offset, mask):
        return convolution("reference")(x, offset, mask, weight, bias).square().sum()

    forward_over_reverse = hessian(energy, (0, 1))(offset, mask)
    reverse_over_reverse = jacrev(jacrev(energy, (0, 1)), (0, 1))(offset, mask)
    for found_row, expected_row in zip(forward_over_reverse, reverse_over_reverse, strict=True):
        for found, expected in zip(found_row, expected_row, strict=True):
            assert found.isfinite().all()
            torch.testing.assert_close(found, expected)


def test_gradients_of_each_sample_by_the_reference():
    """`vmap` of `grad`, as in differentially private training."""
    tensors = stack_cases()
    x = tensors["x"]
    offset, mask, weight, bias = (tensors[name][0] for name in NAMES[1:])

    def loss(weight, x):
        return convolution("reference")(x, offset, mask, weight, bias).square().sum()

    found = vmap(grad(loss), (None, 0))(weight, x)
    expected = torch.stack([grad(loss)(weight, element) for element in x])
    torch.testing.assert_close(found, expected)


def test_export():
    """With an open batch; `test_functional` exports the reference."""

    class Convolution(torch.nn.Module):
        def forward(self, *tensors):
            return convolution("torch")(*tensors)

    case = make_case(CASES["groups"], torch.float32)
    more = make_case(replace(CASES["groups"], batch=5), torch.float32)
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        Convolution(), (*case.tensors, case.bias), dynamic_shapes=((batch, batch, batch, None, None),)
    )
    for each in (case, more):
        tensors = (*each.tensors, each.bias)
        torch.testing.assert_close(program.module()(*tensors), convolution("torch")(*tensors))


class Around(nn.Module):
    """A network with a layer that is given its offsets, or with the function in its place."""

    def __init__(self, layer):
        super().__init__()
        self.predict = nn.Conv2d(4, 27, 3, padding=1)
        self.layer = layer
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))

    def forward(self, x):
        predicted = self.predict(x)
        offset = predicted[:, :18]
        mask = predicted[:, 18:].sigmoid()
        if self.layer is None:
            return deform_conv2d(x, offset, self.weight, padding=1, mask=mask).relu()
        return self.layer(x, offset, mask).relu() + self.weight.sum()


class Pooled(nn.Module):
    """A network that pools from what a pack computes; with an offset of the same for all rois, where it is given."""

    def __init__(self, layer, given=False):
        super().__init__()
        self.conv = ModulatedDeformConv2dPack(4, 4, 3, padding=1)
        self.layer = layer
        self.offset = nn.Parameter(torch.randn(2, 3, 3)) if given else None

    def forward(self, x, rois):
        if self.offset is None:
            return self.layer(self.conv(x), rois)
        return self.layer(self.conv(x), rois, self.offset.expand(rois.shape[0], 2, 3, 3))


def fused_pack():
    pack = nn.Sequential(ModulatedDeformConv2dPack(4, 6, 3, padding=1))
    pack[0].relu = True
    return pack


NETWORKS = {
    "function": (lambda: Around(None), [deform_conv2d]),
    "given": (lambda: Around(DeformConv2d(4, 6, 3, padding=1)), [convolve]),
    "v1": (lambda: nn.Sequential(DeformConv2dPack(4, 6, 3, padding=1), nn.ReLU()), [deform_conv2d]),
    "v2": (fused_pack, [convolve]),
    "roi": (lambda: Pooled(DeformRoIPool(3, 0.5)), [convolve, deform_roi_pool]),
    "roi-given": (lambda: Pooled(DeformRoIPool(3, 0.5), given=True), [convolve, deform_roi_pool]),
    "roi-pack": (lambda: Pooled(DeformRoIPoolPack(3, 4, 8, 0.5)), [convolve, deform_roi_pool, deform_roi_pool]),
    "roi-v2": (lambda: Pooled(ModulatedDeformRoIPoolPack(3, 4, 8, 0.5)), [convolve, deform_roi_pool, deform_roi_pool]),
}
"""By name: what makes the network, and our functions that its graph calls, in their order."""


def make_network(name):
    make, _ = NETWORKS[name]
    network = make().double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def network_inputs(name, batch=2, size=(7, 9)):
    x = torch.randn(batch, 4, *size, dtype=torch.float64)
    if not name.startswith("roi"):
        return (x,)
    corner = torch.rand(batch, 2, dtype=torch.float64) * 4
    return x, torch.cat([torch.arange(batch)[:, None], corner, corner + 4 + torch.rand(batch, 2) * 5], 1)


def check_equal(found, expected, inputs):
    """Compare outputs and the gradients of all parameters of two networks."""
    output, expected_output = found(*inputs), expected(*inputs)
    assert torch.equal(output, expected_output)
    grads = torch.autograd.grad(output.square().sum(), list(found.parameters()))
    expected_grads = torch.autograd.grad(expected_output.square().sum(), list(expected.parameters()))
    for grad_found, grad_expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad_found, grad_expected)  # a graph may add them up in another order


def calls_of_ours(graph):
    ours = (deform_conv2d, convolve, deform_roi_pool)
    return [node.target for node in graph.nodes if node.op == "call_function" and node.target in ours]


@pytest.mark.parametrize("name", NETWORKS)
def test_symbolic_trace(name):
    """Each call of a layer or function is one node; the graph can be copied, pickled, transformed and traced again."""
    network = make_network(name)
    _, functions = NETWORKS[name]
    traced = torch.fx.symbolic_trace(network)
    assert calls_of_ours(traced.graph) == functions
    check_equal(traced, network, network_inputs(name))

    transformed = torch.fx.Transformer(traced).transform()
    again = torch.fx.symbolic_trace(copy.deepcopy(traced))
    loaded = pickle.loads(pickle.dumps(transformed))
    for other in (transformed, again, loaded):
        assert calls_of_ours(other.graph) == functions
    for other in (again, loaded):
        check_equal(other, network, network_inputs(name, batch=3, size=(8, 6)))


def test_symbolic_trace_of_a_layer_alone_keeps_its_checks():
    layer = DeformConv2d(4, 6, 3)
    traced = torch.fx.symbolic_trace(layer)
    assert calls_of_ours(traced.graph) == [convolve]
    inputs = torch.randn(1, 4, 5, 5), torch.randn(1, 18, 3, 3)
    assert torch.equal(traced(*inputs), layer(*inputs))
    with pytest.raises(ValueError, match=r"input: expected 4 channels \(in_channels\), got 2"):
        traced(torch.zeros(1, 2, 5, 5), inputs[1])


def test_layers_as_leaves_of_a_tracer():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, DeformConv2d) or super().is_leaf_module(module, name)

    network = make_network("given")
    graph = Tracer().trace(network)
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["predict", "layer"]
    check_equal(torch.fx.GraphModule(network, graph), network, network_inputs("given"))


def test_compiled_graph_of_symbolic_trace():
    network = make_network("v2")
    compiled = torch.compile(torch.fx.symbolic_trace(network), backend="eager", fullgraph=True)
    (x,) = network_inputs("v2")
    torch.testing.assert_close(compiled(x), network(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.(save|load)` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_jit_trace(name):
    """Without a warning of the tracer; what it records takes other sizes, has gradients, and can be saved."""
    network = make_network(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(network, network_inputs(name))
    messages = [str(one.message) for one in caught if not issubclass(one.category, DeprecationWarning)]
    assert messages == []

    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for batch, size in ((2, (7, 9)), (3, (8, 6))):
        check_equal(loaded, network, network_inputs(name, batch, size))


@QUIET
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_wrong_shapes_are_errors_while_jit_traces():
    wrong = torch.zeros(1, 18, 3, 3), torch.zeros(6, 4, 3, 3)
    with pytest.raises(ValueError, match=r"offset: expected shape \(1, 18, 5, 5\), got \(1, 18, 3, 3\)"):
        torch.jit.trace(lambda x: deform_conv2d(x, *wrong, padding=1), torch.zeros(1, 4, 5, 5))
    with pytest.raises(ValueError, match="input: expected 4 channels"):
        torch.jit.trace(DeformRoIPoolPack(3, 4, 8), (torch.zeros(1, 2, 5, 5), torch.zeros(1, 5)))
    assert not torch.jit.is_tracing()


def make_pack():
    torch.manual_seed(0)
    pack = ModulatedDeformConv2dPack(4, 6, 3, padding=1)
    torch.nn.init.normal_(pack.conv_offset.weight, std=0.3)
    return pack


def images(rank):
    return torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(rank))


def run_process(rank, folder):
    """One process: a step under DistributedDataParallel, its gradients saved."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = DistributedDataParallel(make_pack())
    model(images(rank)).square().sum().backward()
    torch.save({name: value.grad for name, value in model.module.named_parameters()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # at a normal exit, a thread of gloo that still holds a tensor can abort the process


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_two_processes_average_their_gradients(tmp_path):
    # forked, there is nothing left to import, but PyTorch on a GPU does not allow that
    start_method = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(run_process, (str(tmp_path),), nprocs=2, start_method=start_method)
    grads_alone = []
    for rank in range(2):
        pack = make_pack()
        pack(images(rank)).square().sum().backward()
        grads_alone.append({name: parameter.grad for name, parameter in pack.named_parameters()})

    for rank in range(2):
        grads = torch.load(tmp_path / f"{rank}.pt")
        assert set(grads) == {"weight", "bias", "conv_offset.weight", "conv_offset.bias"}
        for name, value in grads.items():
            torch.testing.assert_close(value, (grads_alone[0][name] + grads_alone[1][name]) / 2)

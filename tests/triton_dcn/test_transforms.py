"""What torch wraps around the operator: `torch.func`, export, and gradients averaged over processes."""

import os
from dataclasses import replace

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.parallel import DistributedDataParallel

from tests.triton_dcn.cases import CASES, QUIET, OperatorCase, make_case
from triton_dcn import ModulatedDeformConv2dPack, deform_conv2d

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

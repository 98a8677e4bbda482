"""What torch wraps around the operator: `torch.func` transforms, and gradients averaged over processes."""

import os

import pytest
import torch
from torch.func import grad, vmap
from torch.nn.parallel import DistributedDataParallel

from tests.triton_dcn.cases import CASES, make_case
from triton_dcn import ModulatedDeformConv2dPack, deform_conv2d

NAMES = ("x", "offset", "mask", "weight", "bias")


def stacked(count=3):
    """Some cases, alike but for their numbers: tensors by name, stacked, and the function of one of them."""
    cases = [make_case(CASES["groups"], torch.float64, seed=seed) for seed in range(count)]
    tensors = zip(*((*case.tensors, case.bias) for case in cases), strict=True)

    def function(x, offset, mask, weight, bias):
        return deform_conv2d(x, offset, weight, bias, mask=mask, stride=1, padding=1)

    return dict(zip(NAMES, map(torch.stack, tensors), strict=True)), function


@pytest.mark.parametrize(
    "shared",
    [(), ("weight", "bias"), ("x", "weight", "bias"), ("offset", "mask", "weight", "bias"), NAMES[:4]],
    ids=str,
)
def test_vmap(shared):
    """As a loop would, whatever is shared, and autograd through it."""
    batch, function = stacked()
    leaves = {name: (value[0] if name in shared else value).clone().requires_grad_() for name, value in batch.items()}
    output = vmap(function, tuple(None if name in shared else 0 for name in NAMES))(*leaves.values())
    each = [
        function(*(leaf if name in shared else leaf[index] for name, leaf in leaves.items())) for index in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(output, torch.stack(each))
    weights = torch.randn_like(output)
    found = torch.autograd.grad(output, leaves.values(), weights)
    expected = torch.autograd.grad(torch.stack(each), leaves.values(), weights)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_vmap_over_another_dimension_and_without_a_mask():
    batch, _ = stacked()
    x, offset, weight = batch["x"].movedim(0, 2), batch["offset"].movedim(0, -1), batch["weight"][0]
    found = vmap(lambda x, offset: deform_conv2d(x, offset, weight, padding=1), (2, -1), out_dims=1)(x, offset)
    expected = [deform_conv2d(batch["x"][i], batch["offset"][i], weight, padding=1) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(expected, 1))


@pytest.mark.parametrize("wanted", [NAMES[:3], NAMES[:4], ("weight",)], ids=str)
def test_several_gradients_at_once(wanted):
    """`is_grads_batched` runs the backward operator under vmap."""
    batch, function = stacked(1)
    tensors = {name: value[0].requires_grad_(name in wanted) for name, value in batch.items()}
    output = function(*tensors.values())
    leaves = [tensors[name] for name in wanted]
    several = torch.randn(3, *output.shape, dtype=output.dtype)
    found = torch.autograd.grad(output, leaves, several, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(output, leaves, one, retain_graph=True) for one in several]
    for one, values in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(values))


def test_torch_func_grad_is_a_clear_error():
    """PyTorch has no `torch.func` differentiation for operators of torch.library, and says so."""
    batch, function = stacked(1)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        grad(lambda *tensors: function(*tensors).sum())(*(value[0] for value in batch.values()))


def small_pack():
    torch.manual_seed(0)
    pack = ModulatedDeformConv2dPack(4, 6, 3, padding=1)
    torch.nn.init.normal_(pack.conv_offset.weight, std=0.3)
    return pack


def images(rank):
    return torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(rank))


def step(rank, folder):
    """One process: a step under DistributedDataParallel, its gradients saved."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    model = DistributedDataParallel(small_pack())
    model(images(rank)).square().sum().backward()
    torch.save({name: value.grad for name, value in model.module.named_parameters()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # as a thread of gloo that still has to let go of a tensor aborts at the end of the interpreter


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_two_processes_average_their_gradients(tmp_path):
    torch.multiprocessing.spawn(step, (str(tmp_path),), nprocs=2)
    alone = []
    for rank in range(2):
        pack = small_pack()
        pack(images(rank)).square().sum().backward()
        alone.append({name: value.grad for name, value in pack.named_parameters()})
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert set(found) == {"weight", "bias", "conv_offset.weight", "conv_offset.bias"}
        for name, value in found.items():
            torch.testing.assert_close(value, (alone[0][name] + alone[1][name]) / 2)

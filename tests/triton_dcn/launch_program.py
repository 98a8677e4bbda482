"""Run by test_launch in a process of its own, without the interpreter: launches that end in a driver of no GPU.

Prints one line for each launch that reached the driver: kernel, programs, stream, and the arguments.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from triton_dcn import launchers, tile_table
from triton_dcn.geometry import ConvGeometry
from triton_dcn.kernels import launch
from triton_dcn.offset_mask import OffsetMask


class Launcher:
    """What Triton calls for a launch, in place of a function that it compiles from C."""

    def __init__(self, source, metadata):
        self.name = metadata.name

    def __call__(self, x, y, z, stream, function, packed_metadata, metadata, enter_hook, exit_hook, *arguments):
        shown = [argument.dtype if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        if enter_hook is not None:
            enter_hook(metadata)
        print(self.name, (x, y, z), stream, *shown, sep=" | ")


class Utils:
    """What Triton asks about the GPU and its modules."""

    def load_binary(self, *arguments):
        return 1, 1, 128, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class Driver:
    """A driver of an sm_90 GPU that is not there."""

    utils = Utils()
    launcher_cls = Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


driver.set_active(Driver())
tile_table.architecture = lambda device: "sm90"
geom = ConvGeometry.of(
    torch.empty(1, 8, 9, 9), torch.empty(1, 18, 9, 9), torch.empty(8, 8, 3, 3), None, (1, 1), (1, 1), (1, 1)
)
offset = torch.empty(1, 18, 9, 9)
unaligned = torch.empty(offset.numel() + 1)[1:].view(offset.shape)
far_apart = offset.as_strided(offset.shape, (1 << 31, 81, 9, 1))
for tensor in (offset, offset, unaligned, unaligned, offset.half(), far_apart, far_apart):
    launchers.sample(geom, OffsetMask(tensor, None))
print("variants", len(launch._variants))
if launch.HookChain is not None:
    launch.knobs.runtime.launch_enter_hook.add(lambda metadata: print("enters", metadata.get()["name"]))
    launchers.sample(geom, OffsetMask(offset, None))

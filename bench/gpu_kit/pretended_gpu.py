"""A GPU of compute capability 9.0 on a machine that has none: everything of a launch happens, but the launch.

Tensors are PyTorch's fake tensors on "cuda": they have shapes, dtypes and devices, and no memory, so that a call of any
size takes milliseconds. Kernels take Triton's whole path: arguments are bound, kernels and their launchers compiled and
put into the cache at TRITON_CACHE_DIR, where a machine with such a GPU and the same Triton finds them.

Compiling needs the driver of Triton 3.6 and a build of PyTorch for CUDA. Kernels can be recorded with any version, and
without such a build, too: tensors are then on "cpu", and the tile table is told that this is the GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import FileCacheManager, get_cache_manager

from triton_dcn import tile_table
from triton_dcn.tf32 import tf32_is_allowed

COMPILING_TRITON = "3.6."
"""The version whose launch path is known here: that of torch 2.11."""
CAPABILITY = (9, 0)
ARCHITECTURE = "sm90"
"""The tile table's name for it."""
MAX_GRID = (2**31 - 1, 65535, 65535)
"""Programs along each axis that the hardware takes."""
PROPERTIES = SimpleNamespace(
    name="pretended H100",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
)
DRIVER_PROPERTIES = {
    "max_shared_mem": 232448,
    "max_num_regs": 65536,
    "multiprocessor_count": 132,
    "warpSize": 32,
    "sm_clock_rate": 1980000,
    "mem_clock_rate": 2619000,
    "mem_bus_width": 5120,
}
STUB_SOURCE = Path(__file__).parent / "libcuda_stub.c"
BASE_ADDRESS = 1 << 30
"""Where every storage starts: aligned, as allocations of a GPU are."""


@dataclass(frozen=True)
class Compilation:
    """A variant of a kernel that was asked for the first time.

    Attributes:
        kernel: its name.
        cached: whether it was in the cache.
        seconds: of the compiler.
    """

    kernel: str
    cached: bool
    seconds: float


@dataclass
class Record:
    """What happened on the pretended GPU.

    Attributes:
        device: of the tensors to make.
        launches: names of the kernels, in order.
        compilations: in order.
        cache_keys: the folders of the cache that were read or written.
    """

    device: torch.device
    launches: list[str] = field(default_factory=list)
    compilations: list[Compilation] = field(default_factory=list)
    cache_keys: set[str] = field(default_factory=set)


@contextmanager
def pretended_gpu(*, compiling: bool) -> Iterator[Record]:
    """Let fake tensors be made and kernels be launched on them; yield the device, and the record of what is done.

    Args:
        compiling: whether to compile the kernels, or only to record their names.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("pretended GPU: TRITON_INTERPRET: expected unset, got 1; the interpreter compiles nothing")
    if compiling and not (triton.__version__.startswith(COMPILING_TRITON) and torch.version.cuda):
        versions = f"Triton {triton.__version__} and torch {torch.__version__}"
        sys.exit(f"pretended GPU: expected Triton {COMPILING_TRITON}x and a torch for CUDA, got {versions}")

    record = Record(torch.device("cuda" if torch.version.cuda else "cpu"))
    with ExitStack() as stack:
        for module, name, value in (
            (torch.cuda, "_exchange_device", lambda index: 0),
            (torch.cuda, "_maybe_exchange_device", lambda index: 0),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
            (torch.cuda, "get_device_name", lambda device=None: PROPERTIES.name),
            (torch.cuda, "get_device_properties", lambda device=None: PROPERTIES),
            (FakeTensor, "data_ptr", _address),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        if compiling:
            stack.enter_context(_compiling_driver(record))
        else:
            stack.enter_context(_recording_launches(record))
        if record.device.type == "cpu":
            stack.enter_context(mock.patch.object(tile_table, "architecture", return_value=ARCHITECTURE))
            stack.enter_context(mock.patch.object(tile_table, "arithmetic", _arithmetic))
        stack.enter_context(FakeTensorMode())
        yield record


def _arithmetic(tensor: torch.Tensor) -> str:
    """Return what the tile table says of a tensor on a GPU."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return "half"
    return "tf32" if tf32_is_allowed() else "float32"


def _address(tensor: FakeTensor) -> int:
    """Return an address whose alignment is that of the tensor on a GPU."""
    return BASE_ADDRESS + int(tensor.storage_offset()) * tensor.element_size()


@contextmanager
def _recording_launches(record: Record) -> Iterator[None]:
    """Replace the launch of a kernel by a note of its name."""

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> _RecordedKernel:
        compiled = _RecordedKernel(kernel.fn.__name__, record)
        compiled[grid](*arguments)
        return compiled

    driver.set_active(_Driver(record, None))
    with mock.patch.object(triton.JITFunction, "run", run):
        yield


@dataclass(frozen=True)
class _RecordedKernel:
    """Stands for a compiled kernel, which may be launched again."""

    name: str
    record: Record
    function: int = 0
    packed_metadata: tuple[Any, ...] = ()

    def run(self, *arguments: Any, **options: Any) -> None:
        """Note a launch."""
        self.record.launches.append(self.name)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.run


@contextmanager
def _compiling_driver(record: Record) -> Iterator[None]:
    """Make the pretended GPU Triton's active one."""
    from triton import knobs
    from triton.backends.nvidia import driver as nvidia

    def compiled(src: Any, metadata: dict[str, Any], metadata_group: Any, times: Any, cache_hit: bool) -> None:
        microseconds = times.ir_initialization + times.total_lowering + times.store_results
        record.compilations.append(Compilation(metadata["name"], cache_hit, 0.0 if cache_hit else microseconds / 1e6))

    class NotingCache(FileCacheManager):
        def __init__(self, key: str, **options: bool) -> None:
            super().__init__(key, **options)
            record.cache_keys.add(key)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(knobs.cache, "manager_class", NotingCache))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        library = folder / "libcuda.so.1"
        subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, STUB_SOURCE], check=True)
        ctypes.CDLL(str(library))  # what links to libcuda.so.1 finds the one that is loaded
        stack.enter_context(mock.patch.object(knobs.nvidia, "libcuda_path", str(folder)))
        nvidia.libcuda_dirs.cache_clear()
        nvidia.library_dirs.cache_clear()

        stack.enter_context(mock.patch.object(knobs.compilation, "listener", compiled))
        compile_module = partial(_compile_module_for_all, nvidia.compile_module_from_src)
        stack.enter_context(mock.patch.object(nvidia, "compile_module_from_src", compile_module))
        _compile_driver_module(nvidia)
        driver.set_active(_Driver(record, nvidia.CudaLauncher))
        yield


def _compile_module_for_all(compile_module: Callable[..., Any], src: str, name: str, **others: Any) -> Any:
    """Compile a launcher, and put it into the cache also under the key that a machine without `file` asks for.

    The key holds what Python says of its platform, for which it asks that command.
    """
    module = compile_module(src=src, name=name, **others)
    library = Path(module.__file__)
    platform_without_file = ",".join([platform.machine(), platform.system(), "64bit", ""])
    key = hashlib.sha256((src + platform_without_file).encode()).hexdigest()
    get_cache_manager(key).put(library.read_bytes(), library.name, binary=True)
    return module


def _compile_driver_module(nvidia: Any) -> None:
    """Put Triton's own module for the driver into the cache; it is the first thing that a GPU machine looks for."""
    module = nvidia.compile_module_from_src(
        src=(Path(nvidia.dirname) / "driver.c").read_text(),
        name="cuda_utils",
        library_dirs=nvidia.library_dirs(),
        include_dirs=nvidia.include_dirs,
        libraries=nvidia.libraries,
    )
    nvidia.PyCUtensorMap = module.PyCUtensorMap


class _Utils:
    """What Triton asks the driver's module."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Return module, function, registers, spills and threads: of none of them anything is used here."""
        return 1, 1, 128, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return DRIVER_PROPERTIES


class _Driver:
    """What Triton asks its active driver."""

    def __init__(self, record: Record, real_launcher: Any) -> None:
        self.utils = _Utils()
        self._record = record
        self._real_launcher = real_launcher

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Compile the launcher of a kernel, for the cache, and return one that only checks and notes the launch."""
        self._real_launcher(source, metadata)

        def launch(x: int, y: int, z: int, *others: Any) -> None:
            grid = (x, y, z)
            allowed = all(0 < programs <= limit for programs, limit in zip(grid, MAX_GRID, strict=True))
            assert allowed, f"{metadata.name}: expected a grid within {MAX_GRID}, got {grid}"
            self._record.launches.append(metadata.name)

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

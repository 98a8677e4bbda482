"""Reads the machine code of one compiled kernel, of NVIDIA or AMD, and counts what matters in it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

INSTRUCTION = r"(?m)^\s+/\*[0-9a-f]{4,}\*/"
TENSOR_CORE = r"\b(?:HGMMA|HMMA|UTCHMMA|UTCQMMA|UTC[A-Z]*MMA)\b"
NVIDIA_ATOMIC = r"\b(?:RED|REDG|ATOM|ATOMG)\.[A-Z0-9_.]+"
NVIDIA_FLOAT = r"\.F(16|32|64)|\.BF16|FTZ"
AMD_LOAD = r"(?:global|buffer)_load_"
AMD_ATOMIC = r"(?:global|buffer)_atomic_\w+"


@dataclass(frozen=True)
class CodeReport:
    """What one compiled kernel uses.

    Attributes:
        registers: per thread; for gfx942 vector registers, accumulation registers included.
        spills: local stores and loads in the code, or spilled registers.
        shared: bytes of shared memory per block.
        wide_loads: global loads of 128 bits.
        loads: global loads of any width.
        async_copies: copies that bypass the registers.
        tensor_core: matrix instructions.
        float_atomics: atomics on floating-point numbers in global memory.
        integer_atomics: atomics on integers in global memory.
        barriers: block-wide barriers.
        instructions: length of the code.
        loop: instructions inside the longest loop.
    """

    registers: int
    spills: int
    shared: int
    wide_loads: int
    loads: int
    async_copies: int
    tensor_core: int
    float_atomics: int
    integer_atomics: int
    barriers: int
    instructions: int
    loop: int

    @property
    def narrow_loads(self) -> int:
        """Global loads of less than 128 bits."""
        return self.loads - self.wide_loads


def read_cubin(cubin: bytes, shared: int) -> CodeReport:
    """Read NVIDIA's binary with the tools that Triton brings; `shared` is its bytes of shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run_tool("cuobjdump", path, "--dump-resource-usage")
        sass = _run_tool("nvdisasm", path, "--print-code", "--no-dataflow")

    atomics = re.findall(NVIDIA_ATOMIC, sass)
    float_atomics = [name for name in atomics if re.search(NVIDIA_FLOAT, name)]
    return CodeReport(
        registers=_number_after("REG:", usage),
        spills=_count(r"\bSTL\b|\bLDL\b", sass),
        shared=shared,
        wide_loads=_count(r"\bLDG\.E\.128", sass),
        loads=_count(r"\bLDG\b", sass),
        async_copies=_count(r"\bLDGSTS\b", sass),
        tensor_core=_count(TENSOR_CORE, sass),
        float_atomics=len(float_atomics),
        integer_atomics=len(atomics) - len(float_atomics),
        barriers=_count(r"\bBAR\.SYNC", sass),
        instructions=_count(INSTRUCTION, sass),
        loop=_longest_loop(sass),
    )


def read_amdgcn(text: str, shared: int) -> CodeReport:
    """Read AMD's assembly; `shared` is its bytes of shared memory. The loops are not read."""
    spilled_vectors = _number_after(r"\.vgpr_spill_count:\s+", text)
    spilled_scalars = _number_after(r"\.sgpr_spill_count:\s+", text)
    atomics = re.findall(AMD_ATOMIC, text)
    float_atomics = [name for name in atomics if "f32" in name or "f16" in name]
    return CodeReport(
        registers=_number_after(r"\.vgpr_count:\s+", text),
        spills=spilled_vectors + spilled_scalars,
        shared=shared,
        wide_loads=_count(AMD_LOAD + "dwordx4", text),
        loads=_count(AMD_LOAD, text),
        async_copies=_count(AMD_LOAD + "lds", text),
        tensor_core=_count("v_mfma", text),
        float_atomics=len(float_atomics),
        integer_atomics=len(atomics) - len(float_atomics),
        barriers=_count("s_barrier", text),
        instructions=_count(r"(?m)^\t[a-z]", text),
        loop=0,
    )


def _run_tool(name: str, path: Path, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *options, path], capture_output=True, text=True, check=True).stdout


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _number_after(pattern: str, text: str) -> int:
    match = re.search(pattern + r"(\d+)", text)
    assert match, pattern
    return int(match[1])


def _longest_loop(sass: str) -> int:
    """Return the number of instructions between the most distant backward branch and its label."""
    label_positions: dict[str, int] = {}
    position = 0
    longest = 0
    for line in map(str.strip, sass.splitlines()):
        label = re.match(r"(\.L_x_\d+):", line)
        if label:
            label_positions[label[1]] = position
        elif line.startswith("/*"):
            position += 1
            branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)
            if branch and branch[1] in label_positions:
                longest = max(longest, position - label_positions[branch[1]])
    return longest

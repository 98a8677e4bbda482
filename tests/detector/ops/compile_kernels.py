"""Compile the kernels of NMS and RoI pooling for GPUs that are not here, and print what the code uses as JSON.

    python -m tests.detector.ops.compile_kernels

Runs as a process of its own, because Triton's interpreter, once chosen, replaces the compiler.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from detector.ops.kernels import nms
from triton_dcn.roi_pool.kernels import axis_weights, deformed, launchers, pool, sampling

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Types of the arguments that several kernels share.
LEVELS = {"heights": ("fp32",) * 4, "widths": ("fp32",) * 4, "scales": ("fp32",) * 4}
WEIGHTS = {"weights_ptr": "*fp32", "bounds_ptr": "*i32", "hulls_ptr": "*i32"}
PLACES = {"starts_ptr": "*fp32", "sizes_ptr": "*fp32", "bounds_ptr": "*i32", "hulls_ptr": "*i32", "gamma": "fp32"}
ROIS = {"rois_ptr": "*fp32", "levels_ptr": "*i64", "order_ptr": "*i64", "begins_ptr": "*i64"}
NMS = {"words_ptr": "*i64", "counts_ptr": "*i32", "keep_ptr": "*i8", "live_ptr": "*i8"}


def kernels():
    """Yield (name, kernel, argument types, constexprs, number of warps, fusion of products and sums)."""
    for kind in ("fp32", "fp64"):
        types = NMS | {"boxes_ptr": f"*{kind}"}
        yield f"overlap {kind}", nms.nms_overlap_kernel, types, {"THRESHOLD": 0.7}, 8, False
    yield "sweep", nms.nms_sweep_kernel, NMS, {}, 4, True

    tile = {"TILE_H": launchers.TILE[0], "TILE_W": launchers.TILE[1]}
    bins = {"LEVELS": 4, "BINS_Y": 7, "BINS_X": 7}
    for ratio, candidates in ((0, sampling.ADAPTIVE_CANDIDATES), (2, 2)):
        types = LEVELS | WEIGHTS | ROIS
        samples = {"SAMPLING_RATIO": ratio, "CANDIDATES": candidates, "MAX_SAMPLES": 1 << 20}
        constexprs = bins | samples | {"BINS": 7, "BLOCK_L": launchers.BLOCK_L, "BLOCK_S": 8}
        yield f"weights {ratio}", axis_weights.roi_weights_kernel, types, constexprs, 1, False

    for kind in ("bf16", "fp32"):
        data = {"out_ptr": f"*{kind}", "grad_ptr": f"*{kind}", "feature_ptrs": (f"*{kind}",) * 4}
        types = LEVELS | WEIGHTS | ROIS | data
        constexprs = bins | tile | {"BINS": 7, "BLOCK_C": 256, "BLOCK_S": 8}
        yield f"forward {kind}", pool.roi_pool_kernel, types, constexprs, 1, True
        yield f"backward {kind}", pool.roi_pool_grad_kernel, types, constexprs, 1, True

        types = LEVELS | PLACES | ROIS | data | {"offset_ptr": f"*{kind}"}
        constexprs = bins | tile | {"BLOCK_C": 256, "BLOCK_P": 64, "MAX_SAMPLES": 1 << 20, "SAMPLING_RATIO": 0}
        yield f"bins {kind}", deformed.deformed_bins_kernel, types, constexprs, 1, False
        constexprs |= {"BINS": 49, "CANDIDATES": sampling.ADAPTIVE_CANDIDATES}
        yield f"forward deformed {kind}", deformed.deformed_pool_kernel, types, constexprs, 1, True
        yield f"backward deformed {kind}", deformed.deformed_pool_grad_kernel, types, constexprs, 1, True
        constexprs |= {"CANDIDATES": sampling.ADAPTIVE_SLOPE_CANDIDATES}
        kernel = deformed.deformed_pool_grad_offset_kernel
        yield f"backward offset {kind}", kernel, types, constexprs, 1, True


def compiled(kernel, types, constexprs, warps, fusion, target):
    """Compile with pointers and channel counts that are multiples of 16, as in the networks of this project."""
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constexprs else types.get(name, "i32") for name in kernel.arg_names}
    attributes = {}
    for index, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, tuple):
            aligned = [(index, i) for i, part in enumerate(kind) if part.startswith("*")]
        else:
            aligned = [(index,)] if kind.startswith("*") or name == "channels" else []
        attributes |= {path: [["tt.divisibility", 16]] for path in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": fusion})


def facts(code, target_name: str) -> dict[str, int]:
    """Return bytes of stack (or spilled registers), shared memory, 128-bit global loads and atomics."""
    if target_name.startswith("gfx"):
        text = code.asm["amdgcn"]
        spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
        wide_load = r"(?:global|buffer)_load_dwordx4"
        atomic = r"(?:global|buffer)_atomic_"
    else:
        text = code.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            command = [tool, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        spills = int(re.search(r"STACK:(\d+)", usage)[1])
        wide_load = r"ld\.global\.v4\.b32"
        atomic = r"\b(?:atom|red)\.global"
    return {
        "spills": spills,
        "shared": code.metadata.shared,
        "wide_loads": len(re.findall(wide_load, text)),
        "atomics": len(re.findall(atomic, text)),
    }


if __name__ == "__main__":
    facts_by_kernel = {}
    for name, *specification in kernels():
        for target_name, target in TARGETS.items():
            code = compiled(*specification, target)
            facts_by_kernel[f"{name} {target_name}"] = facts(code, target_name)
    print(json.dumps(facts_by_kernel))

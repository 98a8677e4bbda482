"""Fill a folder with what a bare GPU machine without network needs to test and time this checkout: `make gpu-kit`.

The folder receives wheels, the kernels compiled for sm_90, and the scripts. They are for Python 3.12 with torch 2.11
and triton 3.6, which the machine is expected to have, with torchvision, pytest and the like. Kernels are compiled in an
environment of these versions: the one that GPU_KIT_ENVIRONMENT names, by default in the user's cache. It is made at the
first use, which downloads some gigabytes, and keeps what was compiled: the first use takes a quarter of an hour, later
ones compile only what has changed.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent
CHECKOUT = FOLDER.parents[1]
PYTHON = "python3.12"
DEFAULT_ENVIRONMENT = Path("~/.cache/triton-dcn/gpu-kit").expanduser()
PACKAGES = (
    "torch==2.11.0",
    "triton==3.6.0",
    "numpy<2.4",  # the interpreter of triton 3.6 does in loops what numpy 2.4 refuses
    "faster-coco-eval",
    "hypothesis",
    "matplotlib",
    "opencv-python-headless",
    "pycocotools",
    "pytest",
    "pytest-timeout",
    "safetensors",
    "setuptools",  # Triton compiles launchers with it
    "tensorboard",
    "tqdm",
    "tyro",
)
"""Of the environment that compiles."""
WHEELS = (
    "docstring_parser==0.18.0",
    "faster-coco-eval==1.8.0",
    "pycocotools==2.0.11",
    "typeguard==4.6.0",
    "tyro==1.0.17",
)
"""What the tests and benchmarks import and the machine lacks."""
PEER_WHEELS = ("deformops==3.0.1",)
"""Other libraries, to compare with."""
CACHE_THERE = Path("/tmp/gpu-kit/triton")
"""Where the scripts unpack the compiled kernels."""
SCRIPTS = ("unpack.sh", "run1.sh", "run2.sh")
CACHE_FILES = (".cubin", ".json", ".so")
"""Of Triton's cache, what a launch reads; the text of the steps between is left out."""
MAX_BYTES = 8 << 20


def make_environment(environment: Path) -> Path:
    """Make the environment that compiles, unless it is there with all packages; return its Python."""
    python = environment / "bin" / "python"
    installed = environment / "installed.txt"  # written last: an installation may have been interrupted
    packages = "\n".join(PACKAGES)
    if installed.exists() and installed.read_text() == packages:
        return python
    interpreter = shutil.which(PYTHON)
    if interpreter is None:
        sys.exit(f"gpu kit: expected {PYTHON}, got none on the PATH")
    print(f"installing {', '.join(PACKAGES[:2])} and others in {environment}")
    subprocess.run([interpreter, "-m", "venv", str(environment)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    installed.write_text(packages)
    return python


def compile_kernels(python: Path, cache: Path, processes: int) -> tuple[bool, set[str]]:
    """Fill the cache by some processes side by side; return whether all went well, and the folders that were used."""
    variables = {**os.environ, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    variables.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for index in range(processes):
            share = ("--share", str(index), str(processes), "--used", str(Path(folder) / str(index)))
            command = [str(python), "-m", "bench.gpu_kit.inventory", *share]
            running.append(subprocess.Popen(command, cwd=CHECKOUT, env=variables))
        statuses = [process.wait() for process in running]
        keys = {key for file in Path(folder).iterdir() for key in file.read_text().split()}
    return not any(statuses), keys


def pack_cache(cache: Path, keys: set[str], archive: Path, there: Path = CACHE_THERE) -> None:
    """Pack what a launch reads of Triton's cache.

    Args:
        cache: the folder.
        keys: the folders in it to pack.
        archive: to write.
        there: where it will be unpacked, because the lists of the files of a kernel have whole paths.
    """
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted(path for key in keys for path in (cache / key).iterdir()):
            if path.suffix not in CACHE_FILES:
                continue
            content = path.read_bytes()
            if path.name.startswith("__grp__"):
                content = content.replace(str(cache).encode(), str(there).encode())
            entry = tarfile.TarInfo(str(path.relative_to(cache)))
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def download_wheels(python: Path, folder: Path) -> None:
    """Download the wheels for the environment's Python, in place of those of an earlier time."""
    command = [str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    with tempfile.TemporaryDirectory() as downloaded:  # without network, the folder keeps what it has
        subprocess.run([*command, "--dest", downloaded, *WHEELS, *PEER_WHEELS], check=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(downloaded, folder)


def size_of(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(arguments: list[str] | None = None) -> int:
    """Fill the folder; return 1 where a kernel failed or the folder is too large."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_kit.build", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=CHECKOUT / ".gpu", help="the folder to fill")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile side by side")
    options = parser.parse_args(arguments)
    environment = Path(os.environ.get("GPU_KIT_ENVIRONMENT", DEFAULT_ENVIRONMENT)).expanduser().resolve()
    start = time.monotonic()

    python = make_environment(environment)
    options.out.mkdir(parents=True, exist_ok=True)
    download_wheels(python, options.out / "wheels")
    cache = environment / "triton-cache"
    complete, keys = compile_kernels(python, cache, options.processes)
    pack_cache(cache, keys, options.out / "triton.tar.xz")
    for name in SCRIPTS:
        shutil.copy(FOLDER / name, options.out / name)

    size = size_of(options.out)
    seconds = time.monotonic() - start
    print(f"{options.out}: {size / 2**20:.1f} MiB, {seconds:.0f} s")
    if size > MAX_BYTES:
        print(f"gpu kit: expected at most {MAX_BYTES >> 20} MiB, got {size / 2**20:.1f}", file=sys.stderr)
    return int(not complete or size > MAX_BYTES)


if __name__ == "__main__":
    sys.exit(main())

# Sourced by run1.sh and run2.sh: installs the wheels beside the machine's own packages, unpacks the compiled kernels.
export PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
export TRITON_CACHE_DIR=/tmp/gpu-kit/triton PYTHONPATH=/tmp/gpu-kit/site
if [ ! -d "$PYTHONPATH" ]; then
  mkdir -p "$TRITON_CACHE_DIR"
  tar -xJf .gpu/triton.tar.xz -C "$TRITON_CACHE_DIR"
  python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$PYTHONPATH" .gpu/wheels/*.whl
fi
nvidia-smi

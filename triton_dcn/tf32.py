"""PyTorch's settings for TF32: whether float32 products may use it, and a block in which all do or none does.

TF32 is float32 with a mantissa of 10 bits instead of 23, the format in which tensor cores multiply float32 operands.
Torch 2.9 gave each kind of product a setting of its own, `fp32_precision`, beside the former `allow_tf32`. Reading a
former setting raises an error where the two disagree, so both are written here, and the new ones are read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

HAS_FP32_PRECISION = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch 2.9


def tf32_is_allowed() -> bool:
    """Tell whether the user allows TF32 in float32 matrix products on a GPU; PyTorch's default is no."""
    matmul: Any = torch.backends.cuda.matmul
    if HAS_FP32_PRECISION:
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


@contextmanager
def allow_tf32(allowed: bool) -> Iterator[None]:
    """Let all float32 products on a GPU use TF32, or none: matrix products, and cuDNN's convolutions.

    The settings are those of the process. After the block they are what they were before. On a CPU float32 stays
    float32 in the block.
    """
    matmul_precision, cudnn_allowed = _former_settings()
    backends: Any = torch.backends
    gpu_products = []
    cpu_products = []
    if HAS_FP32_PRECISION:
        gpu_products = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        cpu_products = [backends.mkldnn.matmul]
    precisions = [(products, products.fp32_precision) for products in gpu_products + cpu_products]

    backends.cuda.matmul.allow_tf32 = allowed
    backends.cudnn.allow_tf32 = allowed
    for products in gpu_products:
        products.fp32_precision = "tf32" if allowed else "ieee"
    for products in cpu_products:
        products.fp32_precision = "ieee"
    try:
        yield
    finally:
        if matmul_precision is not None:
            torch.set_float32_matmul_precision(matmul_precision)
        if cudnn_allowed is not None:
            backends.cudnn.allow_tf32 = cudnn_allowed
        for products, precision in precisions:
            products.fp32_precision = precision


def _former_settings() -> tuple[str | None, bool | None]:
    """Return the former settings of matrix products and of cuDNN; None where the new ones disagree with them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 says once that the former names are deprecated
        try:
            matmul_precision = torch.get_float32_matmul_precision()
        except RuntimeError:
            matmul_precision = None
        try:
            cudnn_allowed = torch.backends.cudnn.allow_tf32
        except RuntimeError:
            cudnn_allowed = None
    return matmul_precision, cudnn_allowed

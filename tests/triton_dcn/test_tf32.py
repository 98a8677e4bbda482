"""PyTorch's settings for TF32, former and present: both are set together, and are put back."""

import warnings

import pytest
import torch

from triton_dcn.tf32 import HAS_FP32_PRECISION, allow_tf32, tf32_is_allowed

backends = torch.backends


def former():
    return torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32


def present():
    if not HAS_FP32_PRECISION:
        return []
    owners = (backends, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
    return [owner.fp32_precision for owner in owners]


def set_present(owner, precision):
    if not HAS_FP32_PRECISION:
        pytest.skip("torch 2.9 or newer")
    owner().fp32_precision = precision


BEFORE = {
    "default": lambda: None,
    "allow": lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "no-cudnn": lambda: setattr(backends.cudnn, "allow_tf32", False),
    "matmul": lambda: set_present(lambda: backends.cuda.matmul, "tf32"),
    "conv": lambda: set_present(lambda: backends.cudnn.conv, "ieee"),
    "all": lambda: set_present(lambda: backends, "tf32"),
}
UNREADABLE = {"matmul", "conv", "all"}
"""After these PyTorch raises an error where a former setting is read."""


@pytest.fixture(params=BEFORE)
def before(request):
    """Name of what the user has set before."""
    defaults = present()
    try:
        BEFORE[request.param]()
        yield request.param
    finally:
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = True
        owners = [backends, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul]
        for owner, precision in zip(owners, defaults, strict=False):
            owner.fp32_precision = precision


@pytest.mark.parametrize("allowed", [False, True])
def test_all_products_follow_and_the_settings_are_put_back(before, allowed):
    is_readable = before not in UNREADABLE
    former_before = former() if is_readable else None
    present_before = present()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with allow_tf32(allowed):
            assert tf32_is_allowed() == allowed
            assert former() == ("high" if allowed else "highest", allowed, allowed)
            precision = "tf32" if allowed else "ieee"
            assert present()[1:] == [precision, precision, precision, "ieee"][: len(present()[1:])]
    assert present() == present_before
    if is_readable:
        assert former() == former_before


def test_settings_are_put_back_after_an_error():
    before = former(), present()
    with pytest.raises(KeyError), allow_tf32(True):
        raise KeyError
    assert (former(), present()) == before


class OldMatmul:
    """`torch.backends.cuda.matmul` before torch 2.9."""

    allow_tf32 = False


@pytest.mark.parametrize("allowed", [False, True])
def test_versions_without_the_present_settings(allowed, monkeypatch):
    monkeypatch.setattr("triton_dcn.tf32.HAS_FP32_PRECISION", False)
    monkeypatch.setattr(backends.cuda, "matmul", OldMatmul())
    with allow_tf32(allowed):
        assert tf32_is_allowed() == allowed
        assert backends.cudnn.allow_tf32 == allowed
    assert backends.cudnn.allow_tf32

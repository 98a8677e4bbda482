"""Fixtures of several tests of the operator."""

import pytest

from tests.triton_dcn.compat_stubs import make_mmcv, make_torchvision


@pytest.fixture
def torchvision_stub(monkeypatch):
    return make_torchvision(monkeypatch)


@pytest.fixture
def mmcv_stub(monkeypatch):
    return make_mmcv(monkeypatch)

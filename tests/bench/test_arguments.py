import argparse

import pytest
import torch

from bench.arguments import not_negative, positive, usable_device


@pytest.mark.parametrize(
    ("kind", "least", "text"),
    [(positive, 1, "0"), (positive, 1, "-3"), (positive, 1, "2.5"), (not_negative, 0, "-1"), (not_negative, 0, "many")],
)
def test_numbers_out_of_range_are_refused(kind, least, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"expected a whole number from {least} on, got '{text}'"):
        kind(text)


def test_what_is_in_range():
    assert (positive("1"), not_negative("0"), usable_device("cpu")) == (1, 0, torch.device("cpu"))


@pytest.mark.parametrize("name", ["cuda:99", "toaster"])
def test_devices_that_are_not_there(name):
    with pytest.raises(argparse.ArgumentTypeError, match=f"cannot compute on '{name}': "):
        usable_device(name)

"""Values on the command lines of the benchmarks: types for argparse, which names the flag in its error."""

from __future__ import annotations

import argparse

import torch


def positive(text: str) -> int:
    """Return a whole number from 1 on."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """Return a whole number from 0 on."""
    return _at_least(0, text)


def probability(text: str) -> float:
    """Return a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, got {text!r}")
    return number


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
    return number


def usable_device(text: str) -> torch.device:
    """Return a device that PyTorch can compute on here."""
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a PyTorch without CUDA raises the latter
        raise argparse.ArgumentTypeError(f"cannot compute on {text!r}: {str(error).splitlines()[0]}") from error
    return device

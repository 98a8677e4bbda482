"""Damage is seen: a file with one wrong bit either says so in one line, or loads what was saved."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from detector import FasterRCNNConfig
from detector.weights.checkpoint import read_checkpoint, save_weights
from detector.weights.checkpoint_name import CheckpointName, digest, parse_name

CONFIG = FasterRCNNConfig(depth=18, num_classes=2, dcn=None, norm="gn", base_channels=16, fpn_channels=8, fc_channels=4)
STATE = {"weight": torch.arange(40.0), "bfloat": torch.ones(3, dtype=torch.bfloat16), "count": torch.tensor(7)}
CONTENT = {"model": STATE, "config": {"depth": 18}, "classes": ["cat", "dog"], "epoch": 3}


def saved(content=CONTENT):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def zip_file(folder):
    path = folder / "best.pt"
    path.write_bytes(saved())
    return path


def step_file(folder):
    path = folder / str(CheckpointName(120, digest(saved())))
    path.write_bytes(saved())
    return path


def padded_zip_file(folder):
    """A file of any `zipfile` writer, members in another order, without alignment, with bytes before and after it."""
    path = folder / "weights.pth"
    with zipfile.ZipFile(io.BytesIO(saved())) as source, zipfile.ZipFile(path, "w") as target:
        for name in reversed(source.namelist()):
            target.writestr(name, source.read(name))
        target.comment = b"a comment"
    return path


def safetensors_file(folder):
    path = folder / "weights.safetensors"
    model = torch.nn.Module()
    model.config = FasterRCNNConfig(num_classes=2)
    for name, value in STATE.items():
        model.register_buffer(name, value)
    save_weights(path, model, ["cat", "dog"])
    return path


def same_content(checkpoint, original):
    same_values = all(torch.equal(value, original.state[name]) for name, value in checkpoint.state.items())
    same_types = all(value.dtype == original.state[name].dtype for name, value in checkpoint.state.items())
    same_names = set(checkpoint.state) == set(original.state)
    return same_names and same_values and same_types and checkpoint.config == original.config


@pytest.mark.parametrize("write", [zip_file, step_file, padded_zip_file, safetensors_file])
def test_a_flipped_bit_is_seen_or_changes_nothing(tmp_path, write):
    path = write(tmp_path)
    data = path.read_bytes()
    original = read_checkpoint(path)
    random = np.random.default_rng(0)
    offsets = {*range(30), *range(len(data) - 60, len(data)), *random.integers(0, len(data), 80).tolist()}
    seen = 0
    for offset in sorted(offsets):
        flipped = bytearray(data)
        flipped[offset] ^= 1 << random.integers(8)
        path.write_bytes(flipped)
        try:
            checkpoint = read_checkpoint(path)
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"{path}: damaged: "), offset
            assert "\n" not in message
            seen += 1
        else:
            assert same_content(checkpoint, original), offset
            assert checkpoint.classes == original.classes, offset
    assert seen > len(offsets) / 8
    if write is step_file:
        assert seen == len(offsets)


@pytest.mark.parametrize("write", [zip_file, padded_zip_file, safetensors_file])
def test_every_byte_of_the_weights_counts(tmp_path, write):
    path = write(tmp_path)
    data = path.read_bytes()
    weights = STATE["weight"].numpy().tobytes()
    start = data.index(weights)
    for offset in range(start, start + len(weights), 7):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        with pytest.raises(ValueError, match="damaged: (Bad CRC-32 for file|its content does not have the SHA-256)"):
            read_checkpoint(path)


def test_the_hash_in_the_name_is_checked_first(tmp_path):
    path = tmp_path / "step-00000120-0123456789abcdef.pt"
    path.write_bytes(saved())
    with pytest.raises(ValueError, match=r"\.pt: damaged: expected the SHA-256 in its name, 0123456789abcdef, got "):
        read_checkpoint(path)
    assert parse_name(path) == CheckpointName(120, "0123456789abcdef")
    for name in ("best.pt", "step-120-0123456789abcdef.pt", "step-00000120-0123456789abcdef.pt.damaged"):
        assert parse_name(Path(name)) is None


def test_safetensors_without_a_sum_load(tmp_path):
    metadata = {"config": json.dumps({"depth": 18}), "classes": json.dumps(["cat"])}
    save_file(STATE, tmp_path / "a.safetensors", metadata)
    checkpoint = read_checkpoint(tmp_path / "a.safetensors")
    assert (checkpoint.config, checkpoint.classes) == ({"depth": 18}, ("cat",))
    save_file(STATE, tmp_path / "b.safetensors")
    assert read_checkpoint(tmp_path / "b.safetensors").config is None

"""Files: the old content or the whole new one, and nothing temporary left behind."""

import json
import os

import pytest

from detector.files import replacing, write_json


@pytest.fixture(params=[False, True], ids=["", "durable"])
def durable(request):
    return request.param


def test_the_name_appears_when_the_block_ends(tmp_path, durable):
    path = tmp_path / "weights.onnx"
    with replacing(path, durable=durable) as partial:
        assert partial.parent == tmp_path
        assert partial.suffix == ".onnx"  # writers choose their format by it
        partial.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["weights.onnx"]


def test_an_error_leaves_the_old_file(tmp_path, durable):
    path = tmp_path / "results.json"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path, durable=durable) as partial:
            partial.write_text("ne")
            raise RuntimeError("half written")

    with pytest.raises(RuntimeError, match="half"):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"


def test_json(tmp_path, durable):
    content = {"AP": 0.5, "classes": ["leaf", "fish"]}
    write_json(tmp_path / "compact.json", content, durable=durable)
    assert (tmp_path / "compact.json").read_text() == json.dumps(content)
    write_json(str(tmp_path / "indented.json"), content, indent=2, durable=durable)
    assert (tmp_path / "indented.json").read_text() == json.dumps(content, indent=2) + "\n"


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_json(path, {"set": {1}})
    assert path.read_text() == "old"

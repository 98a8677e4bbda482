"""Files of `torch.save`: containers of all kinds are read as what they hold, and no file gets what it claims."""

import collections
import datetime
import enum
import io
import pathlib
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest
import torch

from detector.weights.checkpoint import read_checkpoint
from detector.weights.torch_file import read_torch_file


class AddictDict(dict):
    """As the package `addict`, which hands itself over as its state."""

    def __getstate__(self):
        return self

    def __setstate__(self, state):
        self.update(state)


class ConfigDict(dict):
    """As mmengine's."""

    def __reduce_ex__(self, protocol):
        return (self.__class__, (dict(self),), None, None, None)


class Config:
    """As mmengine's."""

    def __init__(self, content):
        self.content = content

    def __getstate__(self):
        return (self.content, "config.py", "model = ...", set())

    def __setstate__(self, state):
        raise AssertionError("nothing in a file is run")


class WithAttributes(dict):
    pass


class ListSubclass(list):
    pass


class Text(str):
    pass


class Kind(enum.Enum):
    BOX = "box"


Pair = collections.namedtuple("Pair", ["left", "right"])


def with_attributes():
    value = WithAttributes(a=1)
    value.origin = "elsewhere"
    return value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.OrderedDict(), {}),
        (collections.defaultdict(list, a=[1]), {"a": [1]}),
        (collections.defaultdict(list), {}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.UserDict({"a": 1}), {"a": 1}),
        (collections.deque([1, 2], maxlen=3), [1, 2]),
        (AddictDict(a=AddictDict(b=1)), {"a": {"b": 1}}),
        (ConfigDict(a=ConfigDict(b=(1, 2))), {"a": {"b": (1, 2)}}),
        (ConfigDict(), {}),
        (Config(ConfigDict(a=1)), {"a": 1}),
        (with_attributes(), {"a": 1}),
        (ListSubclass([1, [2]]), [1, [2]]),
        (Pair("cat", "dog"), ("cat", "dog")),
        (torch.Size([2, 3]), (2, 3)),
        (Text("cat"), "cat"),
        (Kind.BOX, "box"),
        ({"cat"}, {"cat"}),
        (frozenset(["cat"]), {"cat"}),
        (b"\x00\xff", b"\x00\xff"),
        (np.float64(0.5), 0.5),
        (np.int64(-3), -3),
        (np.bool_(True), True),
        (np.str_("cat"), "cat"),
        (None, None),
        (2**70, 2**70),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_containers_hold_what_they_held(tmp_path, value, expected, protocol):
    torch.save({"value": value, "again": value}, tmp_path / "a.pt", pickle_protocol=protocol)
    content = read_torch_file(tmp_path / "a.pt")
    assert content == {"value": expected, "again": expected}
    assert type(content["value"]) is type(expected)


@pytest.mark.parametrize("dtype", ["float32", ">f8", "int64", "uint8", "bool", "<U5"])
def test_numpy_arrays(tmp_path, dtype):
    array = np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)
    torch.save({"c": array, "f": np.asfortranarray(array), "empty": array[:0]}, tmp_path / "a.pt")
    content = read_torch_file(tmp_path / "a.pt")
    for name, expected in {"c": array, "f": array, "empty": array[:0]}.items():
        np.testing.assert_array_equal(content[name], expected)


def test_objects_that_mean_nothing_here_do_not_stop_the_rest(tmp_path):
    parts = {"path": pathlib.PurePosixPath("a/b"), "day": datetime.date(2024, 1, 1), "objects": np.array([1, None])}
    torch.save({"state_dict": {"a": torch.ones(2)}, "meta": parts}, tmp_path / "a.pt")
    assert torch.equal(read_checkpoint(tmp_path / "a.pt").state["a"], torch.ones(2))


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_are_those_of_torch_load(tmp_path, legacy):
    base = torch.arange(24.0)
    tensors = {
        "view": base[4:].view(4, 5).t(),
        "same": base[:6],
        "expanded": base[:1].expand(3, 4),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "channels_last": torch.rand(1, 3, 4, 4).to(memory_format=torch.channels_last),
        "tagged": torch.ones(3),
    }
    tensors["tagged"].tag = "an attribute"
    for dtype in ("float64", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "bool", "complex64"):
        tensors[dtype] = torch.tensor([0, 1, 1]).to(getattr(torch, dtype))
    if not legacy:
        tensors["float8"] = torch.ones(3).to(torch.float8_e4m3fn)
    path = tmp_path / "a.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    content = read_torch_file(path)
    expected = torch.load(path, weights_only=True)
    assert list(content) == list(expected)
    for name, value in content.items():
        assert (value.dtype, value.stride()) == (expected[name].dtype, expected[name].stride()), name
        if name == "float8":  # which cannot be compared
            value = value.float()
            expected[name] = expected[name].float()
        assert torch.equal(value, expected[name]), name
    content["same"][5] = 100
    assert content["view"][0, 0] == 4
    assert content["view"][1, 0] == 100, "tensors share their memory"


def in_zip(data, **members):
    """Return a zip file with a pickle as torch.save writes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in members.items():
            archive.writestr(f"archive/data/{name}", content)
    return file.getvalue()


def tensor_pickle(size, stride, offset=0, count=4):
    """Return a pickle of {"a": tensor} over storage "0" of `count` floats."""

    class Storage:
        pass

    class Rebuild:
        def __reduce__(self):
            return (
                torch._utils._rebuild_tensor_v2,
                (Storage(), offset, size, stride, False, collections.OrderedDict()),
            )

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(value, Storage) else None

    file = io.BytesIO()
    Pickler(file, 2).dump({"model": {"a": Rebuild()}})
    return file.getvalue()


FLOATS = struct.pack("<4f", 1, 2, 3, 4)
NESTED = 100_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (in_zip(tensor_pickle((10**6, 10**6), (10**6, 1)), **{"0": FLOATS}), "does not fit into its 4 numbers"),
        (in_zip(tensor_pickle((2,), (10**18,)), **{"0": FLOATS}), "does not fit into its 4 numbers"),
        (in_zip(tensor_pickle((2**40, 2**40), (0, 0)), **{"0": FLOATS}), "does not fit into its 4 numbers"),
        (in_zip(tensor_pickle((2,), (1,), offset=3), **{"0": FLOATS}), "does not fit into its 4 numbers"),
        (in_zip(tensor_pickle((2,), (1,), offset=-1), **{"0": FLOATS}), "does not fit into its 4 numbers"),
        (in_zip(tensor_pickle((-2,), (1,)), **{"0": FLOATS}), "expected sizes and strides from 0 on"),
        (in_zip(tensor_pickle(("a",), (1,)), **{"0": FLOATS}), "expected sizes and strides from 0 on"),
        (in_zip(tensor_pickle((2,), (1,), count=10**12), **{"0": FLOATS}), "expected 1000000000000 numbers"),
        (in_zip(tensor_pickle((2,), (1,), count="many"), **{"0": FLOATS}), "expected a storage"),
        (in_zip(tensor_pickle((2,), (1,))), "damaged: no member data/'0'"),
        (in_zip(b"]" * NESTED + b"a" * (NESTED - 1) + b"."), "containers in more than 100 others"),
        (in_zip(b")" + b"\x85" * NESTED + b"."), "containers in more than 100 others"),
        (in_zip(b"}(" + b")" + b"\x85" * NESTED + b"Nu."), "containers in more than 100 others"),
        (in_zip(b"Nr\xff\xff\xff\xff."), "keeps value 4294967295 after 1 operations"),
        (in_zip(b"Nr\xff\xff\xff\x7f."), "keeps value 2147483647 after 1 operations"),
        (in_zip(b"X\xff\xff\xff\xffabc."), "expected 4294967295 bytes"),
        (in_zip(b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc."), "9223372036854775807 bytes"),
        (in_zip(b"I" + b"9" * 5000 + b"\n."), "not a checkpoint, or cut off"),
        (in_zip(b""), "pickle exhausted before seeing STOP"),
        (in_zip(b"a."), "lacks operands of APPEND"),
        (in_zip(b"cos\nsystem\nX\x04\x00\x00\x00true\x85R."), "expected a state dict, .* got a str"),
        (
            in_zip(b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R."),
            "expected a state dict, .* got a int",
        ),
        (in_zip(pickle.dumps({"a": object}, 4)), "expected a state dict"),
        (b"PK\x03\x04" + b"\x00" * 100, "damaged: not a checkpoint, or cut off"),
        (b"", "not a checkpoint, or cut off"),
        (pickle.dumps([1, 2], 2), "it does not begin as torch.save does"),
        (b"\x80\x02]" + b"]" * NESTED, "not a checkpoint, or cut off"),
    ],
    ids=range(27),
)
def test_hostile_files_are_one_line_and_take_nothing(tmp_path, data, message):
    path = tmp_path / "hostile.pt"
    path.write_bytes(data)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        read_checkpoint(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert len(text.splitlines()) == 1
    assert len(text) < 600 + len(str(path))
    assert "weights_only" not in text
    assert time.monotonic() - start < 20


def test_pickles_of_too_many_operations(tmp_path, monkeypatch):
    monkeypatch.setattr("detector.weights.torch_file.MAX_OPERATIONS", 1000)
    (tmp_path / "a.pt").write_bytes(in_zip(b"N0" * 600 + b"N."))
    with pytest.raises(ValueError, match="its pickle has more than 1000 operations"):
        read_checkpoint(tmp_path / "a.pt")


def test_compressed_members_and_members_over_each_other_are_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": "b" * 10**7}, 2))
    with pytest.raises(ValueError, match=r"damaged: expected members without compression, got 'archive/data\.pkl'"):
        read_checkpoint(path)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": "b" * 10**4}, 2))
        (member,) = archive.filelist
        archive.filelist += [member] * 50
    with pytest.raises(ValueError, match="damaged: (its members are larger than the file|Overlapped entries)"):
        read_checkpoint(path)


def test_torchscript_and_other_byte_orders_are_named(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({}, 2))
        archive.writestr("model/constants.pkl", pickle.dumps((), 2))
    with pytest.raises(ValueError, match="expected a file of torch.save, got a TorchScript archive"):
        read_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({}, 2))
        archive.writestr("model/byteorder", "big")
    with pytest.raises(ValueError, match="expected little-endian numbers, got b'big'"):
        read_checkpoint(path)


def quantized():
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": torch.ones(2).to_sparse()}, "a: expected a dense tensor, got a sparse tensor"),
        ({"a": quantized()}, "a: expected a dense tensor, got a qtensor"),
        ({"a": torch.empty(10**6, 10**6, device="meta")}, "a: expected a dense tensor, got a meta tensor no storage"),
        ({"a": torch.tensor([1 + 2j]).conj()}, "a: expected a dense tensor, got a lazily conjugated or negated"),
        ({"a": torch.tensor([1 + 2j]).conj().imag}, "a: expected a dense tensor, got a lazily conjugated or negated"),
        ({"a": torch.ones(2), "b": "text"}, "b: expected a tensor, got 'text'"),
        ({"a": torch.ones(2), "b": None}, "b: expected a tensor, got None"),
        ({"a": torch.ones(2), "b\n": np.ones(2)}, r"b\\n: expected a tensor, got array"),
        ({"a": torch.ones(2), 3: torch.ones(2)}, "expected names of weights, got 3"),
        ({"a": torch.ones(2), ("b",): torch.ones(2)}, r"expected names of weights, got \('b',\)"),
        ({}, "expected a state dict, bare or under one of"),
    ],
    ids=range(11),
)
def test_state_dicts_of_other_values_are_named(tmp_path, state, message):
    torch.save({"model": state}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt: {message}"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("classes", [np.array(["cat", "dog"]), ListSubclass(["cat", "dog"]), Pair("cat", "dog")])
def test_class_names_of_any_sequence(tmp_path, classes):
    meta = AddictDict(dataset_meta=collections.defaultdict(list, classes=classes))
    torch.save({"state_dict": {"a": torch.ones(1)}, "meta": meta}, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt").classes == ("cat", "dog")


@pytest.mark.parametrize("classes", ["cat", ["cat", 3], ["cat", ""], {"cat": 0}, 7, [["cat"]], np.array([1, 2])])
def test_class_names_of_another_form_are_refused(tmp_path, classes):
    torch.save({"model": {"a": torch.ones(1)}, "classes": classes}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: expected `classes` to be a list of names, got "):
        read_checkpoint(tmp_path / "a.pt")

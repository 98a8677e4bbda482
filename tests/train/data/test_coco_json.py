"""Malformed annotation files: one line names the file, the entry, the field and the value."""

import json
import os

import pytest

from tests.train.data.datasets import open_coco, open_content, small_content
from train.data.coco_json import read_column, whole_numbers

NAN = float("nan")
INFINITY = float("inf")
NO_NUMBERS = [None, True, "5", "", [1], {}, NAN, INFINITY, 2**70, 10**400]

# list, field, what is expected, values that are refused, values that are read
FIELDS = [
    (
        *("annotations", "bbox", "4 finite numbers"),
        [None, "1 2 3 4", [], [1, 2, 3], [1, 2, 3, 4, 5], {"x": 1}, *([1, 2, value, 4] for value in NO_NUMBERS)],
        [[1, 2.5, 30, 40], [-5, 0, 1e3, 1e3], [0, 0, -2, 5]],
    ),
    (
        *("annotations", "area", "a finite number"),
        [value for value in NO_NUMBERS if value != 2**70],
        [0, -3, 0.5, 2**70],
    ),
    ("annotations", "image_id", "a whole number of 64 bits", [*NO_NUMBERS, 1.5], [5, 5.0, -1]),
    ("annotations", "category_id", "a whole number of 64 bits", [*NO_NUMBERS, -0.5], [7, 6.0, 99]),
    (
        *("annotations", "iscrowd", "0, 1, true or false"),
        [None, "0", "", 2, -1, 0.5, [], {}, NAN, 10**400],
        [0, 1, True, False, 1.0],
    ),
    (
        *("annotations", "ignore", "0, 1, true or false"),
        [None, "0", "false", 2, -1, 0.5, [], {}, NAN, 10**400],
        [0, 1, True, False, 0.0],
    ),
    ("images", "id", "a whole number of 64 bits", [*NO_NUMBERS, 1.5], [8, 5.0, -(2**63)]),
    ("images", "width", "a whole number from 1 to", [*NO_NUMBERS, -1, 0, 1.5, "640", 2**21], [1, 640.0]),
    ("images", "height", "a whole number from 1 to", [*NO_NUMBERS, -1, 0, 1.5, "640", 2**21], [1, 2**20]),
    (
        *("images", "file_name", "the name of a file"),
        [None, 5, "", [], ["a.png"], "a\0.png", "\ud800.png", "x" * 20_000],
        ["a b.png", "ü/猫.png", "\udce9.png"],  # the last one stands for bytes that are not UTF-8
    ),
    ("categories", "id", "a whole number of 64 bits", [*NO_NUMBERS, 1.5], [0, 5.0, -1]),
    (
        *("categories", "name", "a name"),
        [None, True, 1.5, "", "  ", [], {}, "a\0", "\udce9", 10**400, "x" * 20_000],
        [5, "猫", " cat", "a\n"],
    ),
]


@pytest.mark.parametrize(("list_name", "field", "expected", "refused", "accepted"), FIELDS)
def test_every_field_is_checked(tmp_path, list_name, field, expected, refused, accepted):
    for value in refused:
        content = small_content()
        entry = content[list_name][1]
        entry[field] = value
        with pytest.raises(ValueError, match=rf"annotations.json: {list_name}\[1\] ") as caught:
            open_content(tmp_path, content)
        assert f": '{field}': expected {expected}" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400 + len(str(tmp_path))

    for value in accepted:
        content = small_content()
        content[list_name][1][field] = value
        open_content(tmp_path, content)


@pytest.mark.parametrize(
    ("list_name", "fields"),
    [
        ("images", ("id", "file_name", "width", "height")),
        ("annotations", ("image_id", "category_id", "bbox")),
        ("categories", ("id", "name")),
    ],
)
def test_missing_fields_are_named(tmp_path, list_name, fields):
    for field in fields:
        content = small_content()
        del content[list_name][0][field]
        with pytest.raises(ValueError, match=rf"{list_name}\[0\].*: '{field}': expected .*, got no such field"):
            open_content(tmp_path, content)


def test_optional_fields_may_be_missing(tmp_path):
    content = small_content()
    whole = open_content(tmp_path, content)
    for field in ("id", "area"):
        for annotation in content["annotations"]:
            del annotation[field]
    dataset = open_content(tmp_path, content)
    assert dataset.boxes.tolist() == whole.boxes.tolist()
    assert dataset.boxes_without_area == 6
    assert whole.boxes_without_area == 0
    areas = open_content(tmp_path, content, training=False).all_annotations.areas
    assert areas.tolist() == [41 * 30, 42 * 30, 43 * 30, 44 * 30, 45 * 30, 46 * 30]


def test_offenders_are_counted_and_the_first_ones_named(tmp_path):
    content = small_content()
    for index in (1, 2, 4, 5):
        content["annotations"][index]["iscrowd"] = index + 10
    with pytest.raises(
        ValueError, match=r"annotations\[1\] \(id 2\): 'iscrowd'.*got 11; .*\[2\] \(id 3\): got 12"
    ) as caught:
        open_content(tmp_path, content)
    assert str(caught.value).endswith("annotations[4] (id 5): got 14; 4 in all")


def test_whole_columns_and_single_values_are_judged_alike():
    small = whole_numbers(1, 9, "a digit")
    entries = [{"x": value} for value in (1, 9, 3.0)]
    column = read_column(entries, "digits", "x", small)
    assert column.dtype == "int64"
    assert column.tolist() == [1, 9, 3]
    assert read_column([], "digits", "x", small).tolist() == []
    assert read_column([{}, {"x": 2}], "digits", "x", small, default=7).tolist() == [7, 2]


@pytest.mark.parametrize("list_name", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [None, {}, "x", 5, True])
def test_lists_that_are_none_are_named(tmp_path, list_name, value):
    with pytest.raises(ValueError, match=f"annotations.json: expected a COCO file with a list '{list_name}', got"):
        open_content(tmp_path, small_content() | {list_name: value})


@pytest.mark.parametrize("list_name", ["images", "annotations", "categories"])
@pytest.mark.parametrize("entry", [None, [], "x", 5])
def test_entries_that_are_no_objects_are_named(tmp_path, list_name, entry):
    content = small_content()
    content[list_name].append(entry)
    with pytest.raises(
        ValueError, match=rf"{list_name}\[\d\]: expected an object with fields, got {entry!r}".replace("[]", r"\[\]")
    ):
        open_content(tmp_path, content)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([(1, "cat"), (2, "dog"), (3, "cat")], r"'name': .* got 'cat' at categories\[0\] \(id 1\) and categories\[2\]"),
        ([(1, 1), (2, "1")], r"'name': expected every value once, got '1' at categories\[0\]"),
        ([(1, "a"), (2, "b"), (2, "c")], r"'id': .* got 2 at categories\[1\] \(id 2\) and categories\[2\]"),
        ([(1, "a"), (1.0, "b")], r"'id': .* got 1 at"),
        ([(n, f"{n % 5}") for n in range(20)], r"'name': .* got '0' at .*, '1' at .*, '2' at .*; 5 in all"),
    ],
)
def test_categories_that_appear_twice_are_named(tmp_path, categories, message):
    entries = [{"id": category_id, "name": name} for category_id, name in categories]
    with pytest.raises(ValueError, match=f"categories: {message}"):
        open_content(tmp_path, small_content() | {"categories": entries})


def test_images_that_appear_twice_are_named(tmp_path):
    content = small_content()
    content["images"].append({**content["images"][0], "id": 4.0})
    with pytest.raises(
        ValueError, match=r"images: 'id': expected every value once, got 4 at images\[0\] .* images\[3\]"
    ):
        open_content(tmp_path, content)


def test_ids_of_annotations_do_not_matter(tmp_path):
    content = small_content()
    for annotation, value in zip(content["annotations"], (1, 1, None, "a", 2**70, NAN), strict=True):
        annotation["id"] = value
    assert len(open_content(tmp_path, content).boxes) == 6


@pytest.mark.parametrize("key", ["info", "licenses", "videos"])
@pytest.mark.parametrize("value", [None, 5, "x", [NAN], {"a": {}}])
def test_other_keys_do_not_matter(tmp_path, key, value):
    assert len(open_content(tmp_path, small_content() | {key: value}).boxes) == 6


TEXT = json.dumps(small_content())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected valid JSON, got an empty file"),
        (" \n", "expected valid JSON, got a file that cannot be parsed"),
        (TEXT[:300], "expected valid JSON, got a file that cannot be parsed"),
        (TEXT + "}", "expected valid JSON, got a file that cannot be parsed: Extra data"),
        (TEXT.replace("red", "r\xe4d").encode("latin-1"), "got a file that is not in UTF-8: .* can't decode byte 0xe4"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF" * 20, "annotations.json: expected"),
        (b"\0" * 1000, "which begins with '{', got one that begins with"),
        ("[" + TEXT + "]", r"expected a COCO file with a list 'images', which begins with '{', got .* '\[\{\"images"),
        ("null", "got one that begins with 'null'"),
        ("{}", "expected a COCO file with a list 'images', got none"),
        (TEXT[:-1] + ', "images": []}', "expected every key of an object once, got 'images' 2 times"),
        (TEXT[:-1] + ', "categories": null}', "got 'categories' 2 times"),
        (TEXT.replace('"id": 3,', '"id": 3, "bbox": [],'), "'bbox' 2 times in the object with the id 3"),
        (TEXT.replace("1200.0", "NaN", 1), r"annotations\[0\] \(id 1\): 'area': expected a finite number, got nan"),
        (TEXT.replace("1200.0", "-Infinity", 1), r"'area': expected a finite number, got -inf"),
        (TEXT.replace("1200.0", "1e400", 1), r"'area': expected a finite number, got inf"),
        (TEXT.replace("1200.0", "1" + "0" * 10_000, 1), r"'area': expected a finite number, got inf"),
        (TEXT.replace('"image_id": 5', '"image_id": ' + "5" * 10_000), r"annotations\[0\] .*'image_id': .* got inf"),
        (TEXT[:-1] + ', "x": ' + "[" * 10_000 + "]" * 10_000 + "}", "lists or objects that are nested too deep"),
        (TEXT[:-1] + ', "x": ' + '{"a":' * 10_000 + "1" + "}" * 10_000 + "}", "nested too deep"),
        (TEXT.replace("1200.0", "[" * 500 + "]" * 500, 1), r"'area': expected a finite number, got \[\[\[.*\.\.\."),
    ],
)  # fmt: skip
def test_files_that_are_no_coco_files_are_named(tmp_path, text, message):
    content = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(ValueError, match=message) as caught:
        open_content(tmp_path, content)
    assert "annotations.json: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_that_json_allows(tmp_path, encoding):
    assert open_content(tmp_path, TEXT.replace("red", "rød").encode(encoding)).classes == ("rød", "blue")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("member", ["[]", "{}", "[[]]", '{"":0}', "[0]"])
def test_brackets_alone_take_no_memory(tmp_path, member, encoding):
    content = '{"images": [' + f"{member}," * 500_000 + "{}]}"
    with pytest.raises(ValueError, match="expected images and annotations, got little else than brackets"):
        open_content(tmp_path, content.encode(encoding))


def test_polygons_of_short_points_are_no_bomb(tmp_path):
    content = small_content()
    content["annotations"][0]["segmentation"] = [[[1, 2]] * 600_000]
    text = json.dumps(content, separators=(",", ":"))
    assert len(open_content(tmp_path, text.encode()).boxes) == 6


def test_special_files_are_refused_at_once(tmp_path):
    path = tmp_path / "annotations" / "instances_train2017.json"
    (tmp_path / "train2017").mkdir()
    path.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="annotations: expected a file, got .*instances_train2017.json"):
        open_coco(tmp_path)

    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(FileNotFoundError, match="annotations: expected a file, got .*instances_train2017.json"):
        open_coco(tmp_path)

"""The detector through `torch.export` and ONNX: equal detections for any batch and size."""

import ast
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import triton_dcn
from detector import Batch, Detections, FasterRCNN, FasterRCNNConfig, export
from detector.image import read_image, write_image
from detector.onnx import runtime
from detector.ops.nms import batched_nms
from detector.ops.paste_masks import paste_masks
from detector.ops.roi_align import roi_align
from detector.predict import predict_images
from detector.weights.checkpoint import save_weights
from tests.doc_blocks import blocks

CLASSES = ["red", "green", "blue"]
PAGE = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.fixture(scope="module")
def model():
    """A small detector whose detections do not depend on the last bit."""
    torch.manual_seed(0)
    config = FasterRCNNConfig(
        depth=18,
        num_classes=3,
        dcn_stages=(False, False, False, True),
        fpn_channels=32,
        fc_channels=32,
        rpn_pre_nms_top_n=(100, 50),
        rpn_post_nms_top_n=50,
        max_detections=20,
        image_scale=(160, 128),
    )
    model = FasterRCNN(config).eval()
    for name, parameter in model.named_parameters():
        if "conv_offset" in name:
            nn.init.normal_(parameter, std=0.01)
        elif "fc_cls" in name or "rpn_cls" in name or "reg" in name:
            nn.init.normal_(parameter, std=0.1)
        elif "bn2.weight" in name:
            nn.init.constant_(parameter, 0.5)
    return model


@pytest.fixture(scope="module")
def program(model):
    return export.export_program(model)


@pytest.fixture(scope="module")
def onnx_file(model, program, tmp_path_factory):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime", minversion="1.31", reason="older ones have no DeformConv")
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "export_program", lambda *_, **__: program)
        export.export_onnx(model, path, classes=CLASSES, weights="model.pt")
    return path


@pytest.fixture
def photograph(tmp_path):
    """A picture that is neither of the size nor of the ratio that the model takes."""
    path = tmp_path / "photo.png"
    write_image(path, np.random.default_rng(0).integers(0, 256, (90, 117, 3), np.uint8))
    return path


def make_images(batch, height, width):
    images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
    sizes = torch.tensor([[height - 7 * image, width - 11 * image] for image in range(batch)])
    return Batch(images, sizes)


SIZES = pytest.mark.parametrize(
    "size",
    [
        (2, 128, 160),
        (1, 192, 96),
        (3, 96, 256),
        (2, 320, 448),  # levels with more candidates than in the example that the program was traced with
        (1, 96, 96),  # with fewer
    ],
    ids=str,
)


@SIZES
def test_program_detects_the_same(model, program, size):
    batch = make_images(*size)
    outputs = program.module()(batch.images, batch.sizes)
    for output, expected in zip(outputs, model.detect(batch), strict=True):
        torch.testing.assert_close(output, expected, rtol=0, atol=0)


@SIZES
def test_onnx_detects_the_same(model, onnx_file, size):
    batch = make_images(*size)
    expected = model(batch)
    assert all(len(image.boxes) for image in expected)
    pixels, score = runtime.largest_difference(expected, runtime.run_onnx(onnx_file, batch))
    assert pixels < 2e-3
    assert score < 2e-5


def test_onnx_file_describes_itself(onnx_file):
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(onnx_file)
    onnx.checker.check_model(graph)
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert metadata == {
        "classes": '["red", "green", "blue"]',
        "image_scale": "[160, 128]",
        "size": "null",
        "batch": "null",
        "size_divisor": "32",
        "channel_order": "RGB",
        "layout": "NCHW",
        "dtype": "uint8",
        "normalization": "inside the model",
        "pixel_mean": "[123.675, 116.28, 103.53]",
        "pixel_std": "[58.395, 57.12, 57.375]",
        "boxes": "x1 y1 x2 y2 in pixels of the resized image",
        "masks": "none",
        "score_threshold": "0.05",
        "nms_iou": "0.5",
        "max_detections": "20",
        "triton_dcn": triton_dcn.__version__,
        "weights": "model.pt",
    }
    assert [value.name for value in graph.graph.input] == list(export.INPUTS)
    assert [value.name for value in graph.graph.output] == list(export.OUTPUTS[:4])
    assert {opset.domain for opset in graph.opset_import} <= {""}
    assert not list(onnx_file.parent.glob(".*"))


def test_the_description_is_that_of_the_export(model):
    described = export.describe(model, size=(128, 160), batch=1, weights="a\udcff\n.pt")
    assert json.loads(described["size"]) == [128, 160]
    assert json.loads(described["batch"]) == 1
    assert json.loads(described["classes"]) == ["class 0", "class 1", "class 2"]
    assert described["weights"] == r"a\udcff\n.pt"
    with pytest.raises(ValueError, match="classes: expected 3 names, one per class, got 2"):
        export.describe(model, CLASSES[:2])

    with torch.device("meta"):
        masks = FasterRCNN(replace(model.config, mask=True, image_scale=(128, 160)))
    described = export.describe(masks, CLASSES)
    assert described["masks"].startswith("28 x 28 probabilities")
    assert json.loads(described["image_scale"]) == [160, 128]


def test_the_description_goes_into_a_file_of_torch_export(model, tmp_path):
    described = export.describe(model, CLASSES, weights="model.pt")
    program = torch.export.export(nn.Identity(), (torch.zeros(1),))
    torch.export.save(program, tmp_path / "model.pt2", extra_files=described)
    read = dict.fromkeys(described, "")
    torch.export.load(tmp_path / "model.pt2", extra_files=read)
    assert read == described


def documented_programs():
    """Return the Python programs of docs/export.md."""
    return [block.text for block in blocks(PAGE) if block.language == "python"]


def test_every_key_is_documented(model):
    table = PAGE.read_text().split("| key |")[1].split("\n\n")[0]
    keys = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines()[2:]))
    assert sorted(keys) == sorted(export.describe(model, weights="model.pt"))


def found_objects(printed):
    """Return the objects that `usage` has printed: name, score, box."""
    objects = []
    for line in printed.splitlines():
        name, score, box = line.split(maxsplit=2)
        objects.append((name, float(score), ast.literal_eval(box)))
    return objects


def assert_found(printed, detections, factors=(1, 1)):
    """Check that the objects in a print are the detections with a score from 0.3 on, not near to it."""
    assert not ((detections.scores - export.DEFAULT_SCORE).abs() < 1e-4).any()
    keep = detections.scores >= export.DEFAULT_SCORE
    boxes = detections.boxes[keep] / torch.tensor(factors * 2)
    objects = found_objects(printed)
    assert [name for name, _, _ in objects] == [CLASSES[label] for label in detections.labels[keep]]
    assert len(objects) > 3
    torch.testing.assert_close(torch.tensor([box for *_, box in objects]), boxes, rtol=0, atol=0.06)


def test_the_printed_program_finds_what_python_finds(model, onnx_file, photograph, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "export_onnx", lambda model, path, **_: shutil.copy(onnx_file, path))
    save_weights(tmp_path / "model.safetensors", model, CLASSES)
    out = tmp_path / 'Größe "\\".onnx'
    arguments = ["--weights", tmp_path / "model.safetensors", "--out", out, "--image", photograph]
    assert export.main(list(map(str, arguments))) == 0
    printed = capsys.readouterr().out
    program = printed[printed.index("import json") :]

    check = "import sys\nassert not {'torch', 'detector', 'triton_dcn', 'onnx'} & set(sys.modules)\n"
    command = [sys.executable, "-I", "-c", program + check]
    finished = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert finished.returncode == 0, finished.stderr
    (detections,) = predict_images(model, [photograph], score=0.0)
    assert_found(finished.stdout, detections)

    command = [sys.executable, "-I", "-i"]  # as it is pasted into the prompt
    pasted = subprocess.run(command, input=program, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert pasted.stdout == finished.stdout


@pytest.mark.parametrize("turned", [False, True])
def test_the_printed_program_with_a_fixed_size(model, onnx_file, photograph, tmp_path, capsys, turned):
    """A file with a fixed size takes pictures that are resized to fit into it, and as many as its batch."""
    onnx = pytest.importorskip("onnx")
    size = (96, 128)
    graph = onnx.load(onnx_file)
    for value, shape in zip(graph.graph.input, [(2, 3, *size), (2, 2)], strict=True):
        for dimension, length in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            dimension.dim_value = length
    onnx.helper.set_model_props(graph, export.describe(model, CLASSES, size=size, batch=2))
    onnx.save(graph, tmp_path / "fixed.onnx")
    if turned:
        write_image(photograph, read_image(photograph).transpose(1, 0, 2))

    exec(export.usage(tmp_path / "fixed.onnx", photograph), {})
    picture = read_image(photograph)
    batch = export._comparison_batch(picture, model.config.image_scale, size, 2)
    height, width = picture.shape[:2]
    new_height, new_width = batch.sizes[0].tolist()
    assert new_height == 96
    assert batch.images.shape == (2, 3, *size)
    assert_found(capsys.readouterr().out, model(batch)[0], (new_width / width, new_height / height))


def test_the_documented_program_is_the_printed_one():
    assert documented_programs()[0] + "\n" == export.usage(Path("best.onnx"))


def test_masks_are_drawn_as_documented():
    cv2 = pytest.importorskip("cv2")
    height, width = 60, 70
    mask = nn.functional.interpolate(torch.randn(1, 1, 5, 5), size=(28, 28), mode="bicubic")[0].sigmoid()
    box = torch.tensor([[-3.2, 10.6, 48.9, 55.1]])
    names = {"np": np, "cv2": cv2, "height": height, "width": width}
    names |= {"boxes": box.numpy(), "outputs": [None] * 4 + [mask[None].numpy()]}
    exec(documented_programs()[1], names)
    expected = paste_masks(mask, box, height, width)[0].numpy()
    different = (names["drawn"] != expected).sum()  # OpenCV 4 rounds positions to a 32nd of a pixel
    assert different <= 0.01 * expected.sum()
    assert expected.sum() > 300


@pytest.mark.filterwarnings("ignore")
def test_documented_programs(model, program, tmp_path, monkeypatch):
    """The programs of the page about a layer of one's own, and about saving with torch.export."""
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    _, _, layer, save, _, _ = documented_programs()
    exec(layer, {})
    assert Path("layer.onnx").stat().st_size > 1000

    torch.save({"model": model.state_dict(), "config": asdict(model.config), "classes": CLASSES}, "best.pt")
    monkeypatch.setattr(export, "export_program", lambda *_, **__: program)
    exec(save, {})
    assert Path("best.pt2").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_documented_programs_that_take_long(model, program, photograph, tmp_path, monkeypatch, capsys):
    """The program that loads what torch.export has saved, and the one that compiles a layer."""
    monkeypatch.chdir(tmp_path)
    *_, load, compile_layer = documented_programs()
    shutil.copy(photograph, "photo.jpg")  # OpenCV looks at the content
    torch.export.save(program, "best.pt2", extra_files=export.describe(model, CLASSES))
    exec(load, {})
    (detections,) = predict_images(model, [photograph], score=0.0)
    assert len(capsys.readouterr().out.splitlines()) == len(detections.boxes) > 0

    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    names = {}
    exec(compile_layer, names)
    expected = names["layer"](names["images"])
    torch.testing.assert_close(names["outputs"], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("roi_layer", ["align", "mdpool"])
def test_cascade_with_masks(model, roi_layer, tmp_path, monkeypatch):
    """Program and ONNX file of a cascade, whose heads run one after the other, and of deformable RoI pooling."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime", minversion="1.31", reason="older ones have no DeformConv")
    torch.manual_seed(0)
    config = replace(model.config, dcn=None, base_channels=16, cascade=True, mask=True, roi_layer=roi_layer)
    cascade = FasterRCNN(config).eval()
    for name, parameter in cascade.named_parameters():
        if "bn2.weight" in name:
            nn.init.constant_(parameter, 0.5)
        elif any(part in name for part in ("fc_cls", "fc_reg", "rpn_cls", "rpn_reg", "offset_fc.4", "mask_fc.2")):
            nn.init.normal_(parameter, std=0.1)

    batch = make_images(2, 192, 96)
    expected = cascade.detect(batch)
    assert expected[3].any()
    program = export.export_program(cascade)
    for output, tensor in zip(program.module()(batch.images, batch.sizes), expected, strict=True):
        torch.testing.assert_close(output, tensor, rtol=1e-4, atol=1e-4)

    monkeypatch.setattr(export, "export_program", lambda *_, **__: program)
    path = tmp_path / "cascade.onnx"
    export.export_onnx(cascade, path, classes=CLASSES)
    pixels, score = runtime.largest_difference(cascade(batch), runtime.run_onnx(path, batch))
    assert pixels < 2e-3
    assert score < 2e-5


class Pool(nn.Module):
    def forward(self, fine, coarse, rois, levels):
        return roi_align([fine, coarse], rois, levels, strides=[4, 8], output_size=3)


class Suppress(nn.Module):
    def forward(self, boxes, scores, valid):
        return batched_nms(boxes, scores, valid, 0.5)


def run_graph(module, *inputs):
    """Export a module for the first of `inputs` and return the outputs of the graph for each of them."""
    onnxruntime = pytest.importorskip("onnxruntime", minversion="1.31", reason="older ones have no DeformConv")
    translations = pytest.importorskip("detector.onnx.translations").TRANSLATIONS
    program = torch.onnx.export(
        module.eval(),
        inputs[0],
        dynamo=True,
        opset_version=export.OPSET,
        custom_translation_table=translations,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [value.name for value in session.get_inputs()]
    results = []
    for tensors in inputs:
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        outputs = session.run(None, feed)
        results.append([torch.from_numpy(output) for output in outputs])
    return results


@pytest.mark.filterwarnings("ignore")
def test_backbone_graph():
    pytest.importorskip("onnxscript")
    config = FasterRCNNConfig(depth=18, dcn_stages=(False, False, True, True), base_channels=16, fc_channels=16)
    backbone = FasterRCNN(config).backbone.eval()
    for name, parameter in backbone.named_parameters():
        if "conv_offset" in name:
            nn.init.normal_(parameter, std=0.01)
    images = torch.randn(1, 3, 64, 96)
    outputs = run_graph(backbone, (images,))[0]
    for output, expected in zip(outputs, backbone(images), strict=True):
        torch.testing.assert_close(output, expected.detach(), rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore")
def test_roi_align_graph():
    pytest.importorskip("onnxscript")
    special = torch.tensor(
        [
            [0, 0, 0, 64, 48],
            [1, -40, -30, 20, 10],
            [0, 100, 100, 120, 110],
            [0, 5, 5, 5, 5],
            [1, 30, 20, 10, 5],
            [-1, 3, 3, 30, 30],
            [2, 3, 3, 30, 30],
            [0, float("nan"), 0, 9, 9],
            [0, 0, 0, float("inf"), 9],
            [1, 0, 0, 1e3, 1e3],
        ]
    )
    image = torch.randint(0, 2, (30, 1))
    corner = torch.rand(30, 2) * 50
    random = torch.cat([image, corner, corner + torch.rand(30, 2) * 40], 1)
    rois = torch.cat([special, random])
    levels = torch.randint(0, 2, (len(rois),))
    features = (torch.randn(2, 5, 12, 16), torch.randn(2, 5, 6, 8))
    one_level = torch.zeros_like(levels)  # the other level has no roi
    inputs = [(*features, rois, levels), (*features, rois, one_level)]
    for (output,), tensors in zip(run_graph(Pool(), *inputs), inputs, strict=True):
        torch.testing.assert_close(output, Pool()(*tensors), rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore")
def test_nms_graph():
    pytest.importorskip("onnxscript")
    corner = (torch.rand(3, 80, 2) * 8).round() * 4
    boxes = torch.cat([corner, corner + 16], 2)
    scores = (torch.rand(3, 80) * 10).round() / 10 - 0.5  # many are equal, some negative
    scores[0, 3] = float("nan")
    valid = torch.rand(3, 80) > 0.2
    valid[2] = False
    keep = run_graph(Suppress(), (boxes, scores, valid))[0][0]
    assert torch.equal(keep, batched_nms(boxes, scores, valid, 0.5))
    assert keep.any()


def test_largest_difference_pairs_detections_in_any_order():
    two = Detections(torch.tensor([[0.0, 0, 9, 9], [5, 5, 9, 9]]), torch.tensor([0.5, 0.5]), torch.tensor([0, 1]))
    swapped = Detections(two.boxes.flip(0) + 0.25, two.scores.flip(0) - 0.125, two.labels.flip(0))
    none = Detections(two.boxes[:0], two.scores[:0], two.labels[:0])
    assert runtime.largest_difference([two], [swapped]) == (0.25, 0.125)
    assert runtime.largest_difference([none], [none]) == (0, 0)
    assert runtime.largest_difference([none], [two]) == (float("inf"), float("inf"))
    assert runtime.largest_difference([two], [none])[0] == float("inf")


def test_arguments(model):
    with pytest.raises(ValueError, match="multiples of 32, got"):
        export.export_program(model, size=(100, 128))
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        export.export_program(model, batch=0)
    model.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        export.export_program(model)
    model.eval()
    with torch.device("meta"):
        double = FasterRCNN(FasterRCNNConfig(depth=18)).double().eval()
    with pytest.raises(ValueError, match=r"expected float32, got torch\.float64"):
        export.export_onnx(double, "never.onnx")


def test_command_line(model, onnx_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "export_onnx", lambda model, path, **_: shutil.copy(onnx_file, path))
    save_weights(tmp_path / "model.safetensors", model, CLASSES)
    write_image(tmp_path / "picture.png", np.random.randint(0, 256, (90, 120, 3), np.uint8))
    arguments = ["--weights", str(tmp_path / "model.safetensors"), "--out", str(tmp_path / "out.onnx")]
    picture = ["--image", str(tmp_path / "picture.png"), "--size", "128", "160"]
    for options in ([], [*picture, "--batch-size", "2"], [*picture, "--batch", "2"]):  # two spellings of one flag
        assert export.main(arguments + options) == 0
        printed = capsys.readouterr().out
        difference = re.search(r"of (\d+) detections .*: (\S+) pixels, (\S+) of the score", printed)
        assert difference, printed
        assert int(difference[1]) > 0
        assert float(difference[2]) < 2e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "none.pth", "--out", "out.onnx"], "none.pth"),
        (["--weights", "none.pth", "--out", "nowhere/out.onnx"], "no folder nowhere"),
        (["--weights", "none.pth", "--out", "photo.jpg"], "--out: expected a name ending in .onnx, got photo.jpg"),
        (["--weights", "none.pth", "--image", "a.pth", "--out", "out.onnx"], "cannot read image a.pth"),
        (["--weights", "a.pth", "--out", "./a.pth"], "--out: expected another file than --weights, got a.pth"),
        (
            ["--weights", "none.pth", "--image", "a.pth", "--out", "a.pth"],
            "expected another file than --image, got a.pth",
        ),
    ],
)
def test_command_line_errors(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pth").touch()
    assert export.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "export_file", interrupted)
    assert export.main(["--weights", "none.pth", "--out", "out.onnx"]) == 130
    assert capsys.readouterr().err == "error: stopped by Ctrl-C\n"


def test_missing_packages_are_named(model, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="no package onnx and no onnxscript; pip install"):
        export.export_onnx(model, "never.onnx")
    monkeypatch.setattr(runtime, "HAS_ONNXRUNTIME", False)
    with pytest.raises(ValueError, match="no package onnxruntime"):
        runtime.run_onnx("never.onnx", make_images(1, 32, 32))

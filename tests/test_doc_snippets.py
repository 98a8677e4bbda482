"""Every block of code in the documentation runs, or carries a mark that says why not (tests/doc_blocks.py).

Python runs in this process, in a folder with stand-ins for the files that the pages speak of; the blocks of a page
follow each other, as a reader would paste them. Commands are given to the real command lines: the quick ones run, of
the others the flags and their values are read and no more. Commands inside the text, and in the first lines of modules
that are commands, are read, too.
"""

import argparse
import ast
import contextlib
import glob
import importlib.util
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from torch.distributed.run import get_args_parser

import detector
from detector import FasterRCNN, FasterRCNNConfig
from detector.image import write_image
from tests.detector.small_config import small_config
from tests.doc_blocks import PAGES, ROOT, Block, blocks
from tests.train.conftest import make_split
from train import command_line
from train.config import PRESETS
from train.run_folder import RunFolder

PROGRAMS = ("python", "torchrun", "make", "pip", "bash", "dcn-predict", "dcn-export")
RUN = (  # the commands that are quick
    "detector.predict",
    "detector.visualize_offsets",
    "train.plot",
    "examples.deformable_resnet_block",
)

# What stands in the pages for the reader's own, and what it is here.
PLACEHOLDERS = {
    "IMAGE": "a.jpg",
    "IMAGES...": "photographs/",
    "FILE": "best.pt",
    "FILE.onnx": "file.onnx",
    "PNG": "picture.png",
    "DIR": "folder",
    "RUN...": "dcn-0",
    "X": "20",
    "Y": "10",
    "...": "",
}

SMALL = small_config()
SMALL_FIELDS = ("depth", "norm", "base_channels", "fpn_channels", "fc_channels")

PARSE_ARGS = argparse.ArgumentParser.parse_args
TYRO_CLI = tyro.cli


class Parsed(Exception):
    """A command line was read without an error; the program does not go on."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with what the pages speak of: small checkpoints, images, a data set and runs."""
    folder = tmp_path_factory.mktemp("reader")
    torch.manual_seed(3)
    model = FasterRCNN(SMALL).eval()
    checkpoint = folder / "best.pt"
    torch.save(
        {"model": model.state_dict(), "config": {"model": vars(SMALL)}, "classes": ["disc", "ring", "star"]}, checkpoint
    )
    (folder / "runs/default/checkpoints").mkdir(parents=True)
    shutil.copy(checkpoint, folder / "runs/default/checkpoints/best.pt")
    for name in ("mmdet.pth", "odd.pth"):
        torch.save({"state_dict": model.state_dict()}, folder / name)
    backbone = {name: value for name, value in model.backbone.state_dict().items() if "conv_offset" not in name}
    torch.save(backbone | {"fc.weight": torch.zeros(1, 1)}, folder / "resnet50-0676ba61.pth")

    random = np.random.default_rng(0)
    (folder / "photographs").mkdir()
    for name in ("a.jpg", "b.jpg", "photo.jpg", "photographs/a.jpg"):
        write_image(folder / name, random.integers(0, 256, (48, 64, 3), np.uint8))
    for seed in range(3):
        for name in ("dcn", "plain"):
            run = RunFolder(folder / f"{name}-{seed}")
            run.path.mkdir()
            run.append_metrics({"step": 1, "loss": 1.0, "lr": 0.1}, {"step": 1, "AP": 0.3, "AP50": 0.5})
    (folder / "data/generated/val2017").mkdir(parents=True)
    shutil.copy(folder / "a.jpg", folder / "data/generated/val2017/000000500001.jpg")
    make_split(folder / "birds", "train2017", 2, first_id=1)
    make_split(folder / "birds", "val2017", 1, first_id=9)
    return folder


def logical_lines(text: str) -> Iterator[str]:
    """Yield the commands of a block, those of a loop once.

    Lines that end in a backslash or go on indented are one; comments are left out.
    """
    once = re.sub(r"^for .*; do\n((?:  .*\n)+)done$", lambda loop: textwrap.dedent(loop[1]), text, flags=re.MULTILINE)
    for line in re.sub(r"\\\n\s*|\n +", " ", once).splitlines():
        if line.strip() and not line.startswith("#"):
            yield re.sub(r"\$\w+", "0", line)


def split_command(line: str) -> list[str]:
    """Return the words of a command without variables before it, with stand-ins for what the reader fills in."""
    words = []
    for word in shlex.split(line, comments=True):
        if "|" in word:
            word = word.split("|")[0]  # one|of|several
        word = PLACEHOLDERS.get(word, word)
        if word and (words or not re.fullmatch(r"[A-Z_]+=\S*", word)):
            words.append(word)
    return words


def is_command(line: str) -> bool:
    """Tell whether a line calls a program, or holds flags of train/main.py."""
    return bool(re.match(rf"--\w|(?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)})\b(?![=(.:]| [=(])", line.strip()))


def project() -> dict:
    """Return the table of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def check_make(words: list[str]) -> None:
    """Raise ValueError for a target that the Makefile does not have, or a variable that it does not read."""
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} \?=" if is_variable else rf"^{name}:"
        if not re.search(pattern, makefile, flags=re.MULTILINE):
            raise ValueError(f"make: no {word}")


def check_pip(words: list[str]) -> None:
    """Raise ValueError for an extra that pyproject.toml does not have, or a package that nothing here needs."""
    extras = project()["optional-dependencies"]
    known = {re.match(r"[\w-]+", needed)[0] for extra in extras.values() for needed in extra}
    without_values = re.sub(r"--(?:index-url|target) \S+", "", " ".join(words)).split()
    subcommand, *requirements = [word for word in without_values if not word.startswith("-")]
    if subcommand != "install":
        raise ValueError(f"pip: expected install, got {subcommand}")
    for requirement in requirements:
        name, _, wanted = requirement.partition("==")[0].rstrip("]").partition("[")
        if name not in known | {".", "triton-dcn", "torchvision"}:
            raise ValueError(f"pip: nothing here needs {name}")
        missing = [extra for extra in wanted.split(",") if extra and extra not in extras]
        if missing:
            raise ValueError(f"pip: no extra {missing}")


class Commands:
    """Gives commands to the programs that they call, which raise an error if they refuse them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def give(self, line: str, read_only: bool = False) -> None:
        """Give a command to its program, with and without what stands in brackets.

        Args:
            line: of a shell.
            read_only: let no program do more than read its arguments.
        """
        optional = r" \[([^\]]*)\]"
        if re.search(optional, line):
            self.give(re.sub(optional, r" \1", line), read_only=True)
            line = re.sub(optional, "", line)

        program, *words = split_command(line)
        if program == "make":
            check_make(words)
        elif program == "pip":
            check_pip(words)
        elif program == "bash":  # what `make gpu-kit` has filled
            assert (ROOT / words[0].replace(".gpu", "bench/gpu_kit")).is_file()
        elif program == "torchrun":
            if not any(word.endswith(".py") for word in words):
                words.append("train/main.py")  # the text speaks of an option
            options = get_args_parser().parse_args(words)
            self._give_script(options.training_script, options.training_script_args, read_only)
        elif program == "python" and words[0] == "-c":
            exec(words[1], {})
        elif program == "python" and words[0] == "-m":
            self._give_module(words[1], words[2:], read_only)
        elif program == "python":
            self._give_script(words[0], words[1:], read_only)
        elif program.startswith("--"):
            self._give_script("train/main.py", [program, *words], read_only)
        else:
            module, _, _ = project()["scripts"][program].partition(":")
            self._give_module(module, words, read_only)

    def _give_script(self, script: str, arguments: list[str], read_only: bool) -> None:
        """Give arguments to a script of the repository."""
        assert (ROOT / script).is_file()
        if script != "train/main.py":
            self._give_module(script.removesuffix(".py").replace("/", "."), arguments, read_only)
            return
        has_help = "--help" in arguments
        with pytest.raises(SystemExit, match="0") if has_help else contextlib.nullcontext():
            command_line.parse(arguments, gpu=True, quiet=True)

    def _give_module(self, name: str, arguments: list[str], read_only: bool) -> None:
        """Run a module with `main`: to its end if it is in `RUN`, else until its arguments are read."""
        assert importlib.util.find_spec(name)
        is_ours = name.startswith(("detector.", "train.", "bench.", "examples."))
        if not is_ours or not (arguments or name.startswith("examples.")):
            return  # another program, or the text speaks of a command
        words = [word for pattern in arguments for word in sorted(glob.glob(pattern)) or [pattern]]
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [name, *words])
            main = importlib.import_module(name).main
            if name in RUN and not read_only:
                assert main() in (0, None)
                return
            patch.setattr(argparse.ArgumentParser, "parse_args", stop_after(PARSE_ARGS))
            patch.setattr(tyro, "cli", stop_after(TYRO_CLI))
            with pytest.raises((Parsed, SystemExit)) as end:
                main()
            assert end.type is Parsed or end.value.code == 0  # --help


def stop_after(parse):
    """Return a function that reads a command line and then stops the program."""

    def read(*arguments, **options):
        parse(*arguments, **options)
        raise Parsed

    return read


def python_names(page: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Return what a page's code may use without having made it, and put small models into the place of large ones."""
    small = {name: getattr(SMALL, name) for name in SMALL_FIELDS}
    monkeypatch.setattr(detector, "FasterRCNNConfig", partial(FasterRCNNConfig, **small))
    tiny = PRESETS["tiny"]
    monkeypatch.setitem(PRESETS, "small", replace(tiny, data=replace(tiny.data, workers=0, limit=2), pictures=0))
    return {"frames": ["a.jpg", "b.jpg"]} if page.name == "detector.md" else {}


def kind_of(block: Block) -> str:
    """Return "python", "commands" or "neither"."""
    if block.language != "python" and all(map(is_command, logical_lines(block.text))):
        return "commands"
    try:
        tree = ast.parse(block.text)
    except SyntaxError:
        return "neither"
    return "python" if tree.body else "neither"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run_or_say_why_not(page, files, tmp_path, monkeypatch, capsys):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names = python_names(page, monkeypatch)
    commands = Commands(monkeypatch)
    failed = []
    for block in blocks(page):
        if block.mark == "run by":
            if page.name not in (ROOT / block.reason).read_text():
                failed.append(f"{block.place}: {block.reason} does not speak of {page.name}")
            continue
        if block.mark:
            continue
        try:
            if kind_of(block) == "commands":
                for line in logical_lines(block.text):
                    commands.give(line)
            elif kind_of(block) == "neither":
                failed.append(f"{block.place}: neither Python nor commands, and no mark '<!-- not run: REASON -->'")
            else:
                exec(compile(block.text, str(page), "exec"), names)
        except (Exception, SystemExit) as error:
            message = capsys.readouterr().err.strip()[-300:]
            failed.append(f"{block.place}: {type(error).__name__}: {error} {message}")
    assert not failed, "\n".join(failed)


def text_commands(text: str) -> list[str]:
    """Return the commands between backquotes in a text, joined where the text breaks them."""
    spans = re.findall(r"`([^`]+)`", text)
    commands = [" ".join(span.split()) for span in spans if is_command(span) and not span.startswith("--")]
    return [command for command in commands if len(command.split()) > 1]


def docstring_commands() -> list[tuple[str, str]]:
    """Return places and commands of the first lines of modules that are commands."""
    found = []
    for package in ("detector", "train", "bench", "examples"):
        for path in sorted({*(ROOT / package).rglob("*.py")} - {*(ROOT / "bench" / "gpu_kit").glob("*.py")}):
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            indented = [line.strip() for line in docstring.splitlines() if is_command(line)]
            found += [(path.name, command) for command in [*text_commands(docstring), *indented]]
    return found


def test_commands_inside_the_text(files, tmp_path, monkeypatch, capsys):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    programs = Commands(monkeypatch)
    commands = docstring_commands()
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        commands += [(page.name, command) for command in text_commands(prose)]
    assert len(commands) > 30
    failed = []
    for place, command in dict.fromkeys(commands):
        try:
            programs.give(command)
        except (Exception, SystemExit) as error:
            message = capsys.readouterr().err.strip()[-300:]
            failed.append(f"{place}: {command}: {type(error).__name__}: {error} {message}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("make nothing", "make: no nothing"),
        ("make test NOTHING=1", "make: no NOTHING=1"),
        ('pip install ".[nothing]"', "pip: no extra"),
        ("pip install nothing", "pip: nothing here needs nothing"),
        ("python train/main.py --model.nothing 1", "2"),
        ("python train/main.py --epochs many", "2"),
        ("torchrun --nproc_per_node=8 train/main.py --preset nothing", "2"),
        ("python -m detector.predict IMAGES... --weights FILE", "2"),
        ("python -m bench.data --images many", "2"),
    ],
)
def test_commands_that_are_wrong_are_noticed(command, error, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, AssertionError, SystemExit), match=error):
        Commands(monkeypatch).give(command, read_only=True)


def test_blocks_and_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "## One\n\n    make test\n    make lint\n\n<!-- not run: formula -->\n    a = b + (c\n\ntext\n\n## Two\n\n"
        "<!-- run by: tests/test_docs.py -->\n```python\nimport os\n```\n\n- a list\n    of lines\n\n    a = b + (c\n"
    )
    make, formula, python, unmarked = blocks(page)
    assert (make.heading, make.text, make.line, make.mark) == ("One", "make test\nmake lint", 3, None)
    assert (formula.mark, formula.reason, formula.line) == ("not run", "formula", 7)
    assert (python.heading, python.mark, python.reason) == ("Two", "run by", "tests/test_docs.py")
    assert [kind_of(block) for block in (make, python, unmarked)] == ["commands", "python", "neither"]

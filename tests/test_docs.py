"""The documentation says what the code says: error messages, files and links."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "bench").glob("*.md")])
GAP = "\0"
"""Stands for a value in an f-string of the sources."""

# What other programs say: tyro, the operating system, PyTorch, numpy, OpenCV.
FOREIGN = (
    "Unrecognized options",
    "Perhaps you meant",
    "Invalid choice",
    "Missing from",
    "[Errno 2] No such file or directory",
    "No space left on device",
    "CUDA out of memory",
    "address already in use",
    "The client socket has timed out",
    "this is a fault of the program",
)


@functools.cache
def source_strings() -> list[str]:
    """Return every string of the packages, with `GAP` in the place of formatted values."""
    strings = []
    for package in ("triton_dcn", "detector", "train"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
                    strings.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    strings.append(node.value)
    return strings


def documented_messages() -> list[str]:
    """Return the messages that troubleshooting.md lists, without what its questions quote."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text().split("## Questions")[0]
    messages = []
    for bullet in re.findall(r"^- (`.*?`[^\n]*(?:\n(?!  )[^\n]*)*?):$", text, flags=re.MULTILINE):
        messages += re.findall(r"`([^`]+)`", bullet)
    return messages


def fixed_parts(message: str) -> list[str]:
    """Split a documented message at what varies: words in capitals, numbers, dots, quoted examples and brackets."""
    parts = re.split(r"\b[A-Z]+\b(?!-)|\.\.\.|'[^']*'|\d+|\([^)]*\)|\[[^\]]*\]", message)
    stripped = [part.strip(" ,.:;<>=`") for part in parts]
    return [part for part in stripped if len(part) > 3]


@pytest.mark.parametrize("message", documented_messages())
def test_documented_message_is_in_the_code(message):
    if any(foreign in message for foreign in FOREIGN):
        return
    parts = fixed_parts(message)
    strings = source_strings()
    missing = [part for part in parts if not any(part in string for string in strings)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_and_modules_exist(page):
    text = page.read_text()
    for name in re.findall(r"\b(?:triton_dcn|detector|train|bench|tests|examples)/[\w/]+\.py\b", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"python -m ((?:bench|detector|tests)\.[\w.]+)", text):
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name

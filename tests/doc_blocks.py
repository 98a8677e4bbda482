"""The blocks of code in the documentation, fenced or indented, and the marks that say why one is not run.

A mark is a comment in the line before the block, which no reader sees: `<!-- not run: formula -->`, or
`<!-- run by: tests/detector/test_export.py -->` where another test takes the code from the page.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"<!-- (not run|run by): (\S.*?) -->")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: file that it is in.
        line: number of its first line.
        heading: the last one of the second level before it.
        language: behind the fence; "" if there is none.
        text: without fence and indentation.
        mark: "not run" or "run by", or None.
        reason: why it is not run, or the test that runs it.
    """

    page: Path
    line: int
    heading: str
    language: str
    text: str
    mark: str | None
    reason: str

    @property
    def place(self) -> str:
        """Page and line."""
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page in their order."""
    lines = page.read_text().splitlines()
    heading = ""
    index = 0
    while index < len(lines):
        line = lines[index]
        before = lines[index - 1] if index else ""
        mark = MARK.fullmatch(before)
        kind, reason = mark.groups() if mark else (None, "")
        if line.startswith("```"):
            end = lines.index("```", index + 1)
            text = "\n".join(lines[index + 1 : end])
            yield Block(page, index + 2, heading, line.removeprefix("```"), text, kind, reason)
            index = end
        elif line.startswith("    ") and (not before or mark):
            end = index
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end]):
                end += 1
            text = "\n".join(code.removeprefix("    ") for code in lines[index:end]).rstrip()
            yield Block(page, index + 1, heading, "", text, kind, reason)
            index = end - 1
        elif line.startswith("## "):
            heading = line.removeprefix("## ")
        index += 1

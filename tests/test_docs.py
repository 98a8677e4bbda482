"""The documentation says what the code says: error messages, names, flags, files and links."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("triton_dcn", "detector", "train")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "bench").glob("*.md")])
CURRENT_PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which also speaks of former names
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"

# Messages of other programs: tyro, Python, PyTorch, the operating system.
FOREIGN = (
    "Unrecognized options",
    "Perhaps you meant",
    "invalid choice",
    "Missing value for argument",
    "[Errno 2] No such file or directory",
    "CUDA out of memory",
    "address already in use",
    "The client socket has timed out",
    "Guard failed",
)

VALUE = "\0"  # stands for a formatted value in the text of an f-string

# What varies in a documented message. All but the dots are an example of a value, or stand for themselves.
VARIABLE = re.compile(
    r"""
      \.\.\.                                                            # anything
    | (?P<word>\w*) (?P<open>[(\[]) (?P<inside>[^()\[\]]*) (?P<close>[)\]]) # (N, 4), [18, 50], annotations[3]
    | (?<!\w)'(?P<quoted>[^']*)'                                        # 'cuda:1'
    | \b[A-Z]x[A-Z]\b                                                   # HxW
    | -{0,2}\b[A-Z][A-Z_]*\b                                            # NAME, --FLAG
    | \d+(?:\.\d+)?%?                                                   # 17
    """,
    re.VERBOSE,
)


class MessageCollector(ast.NodeVisitor):
    """Collects the strings of a source file, but for its docstrings, with `VALUE` in the place of formatted values."""

    def __init__(self) -> None:
        self.strings: list[str] = []

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        text = ""
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                text += VALUE
                self.visit(part.value)
            else:
                text += part.value
        self.strings.append(text)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.strings.append(node.value)


@functools.cache
def source_text() -> str:
    """Return the strings of the packages, one a line."""
    collector = MessageCollector()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            collector.visit(ast.parse(path.read_text()))
    return "\n".join(string.replace("\n", " ") for string in collector.strings)


def documented_messages() -> list[str]:
    """Return the messages of troubleshooting.md: code in a bullet, up to a colon at the end of a line."""
    text = TROUBLESHOOTING.read_text().split("## Questions")[0]
    heads = re.findall(r"^- (`.*?):$", text, flags=re.MULTILINE | re.DOTALL)
    spans = [span for head in heads for span in re.findall(r"`([^`]+)`", head)]
    return [" ".join(span.split()) for span in spans if " " in span]


def message_pattern(message: str) -> str:
    """Return a regular expression for the strings of the sources that a documented message can come from."""
    pattern = ""
    end = 0
    for match in VARIABLE.finditer(message):
        pattern += re.escape(message[end : match.start()]) + variable_pattern(match)
        end = match.end()
    return pattern + re.escape(message[end:])


def variable_pattern(match: re.Match[str]) -> str:
    """Return a regular expression for a formatted value, or for the same text with values inside."""
    text = match.group()
    if text == "...":
        return ".*"
    if match["open"]:
        itself = rf"(?:{VALUE}|{match['word']})\{match['open']}{message_pattern(match['inside'])}\{match['close']}"
    elif match["quoted"]:
        itself = f"'{message_pattern(match['quoted'])}'"
    elif re.fullmatch("[A-Z]x[A-Z]", text):
        itself = f"{VALUE}x{VALUE}"
    else:
        itself = re.escape(text)
    return f"(?:{VALUE}|{itself})"


def without_location(message: str) -> Iterator[str]:
    """Yield a message, then the message without what a caller puts before it, like a file's name and a colon."""
    yield message
    parts = message.split(": ")
    for index in range(1, len(parts)):
        location = ": ".join(parts[:index])
        if re.search(r"\w", re.sub(r"(?<=\0)\.\w+", "", VARIABLE.sub(VALUE, location))):
            return
        yield ": ".join(parts[index:])


def is_raised(message: str) -> bool:
    """Tell whether the code has a string that starts like this message, with all of its fixed words in their order."""
    for candidate in without_location(message):
        pattern = rf"^(?:.*{VALUE}[:;.] )?{message_pattern(candidate)}(?!\w)"
        if re.search(pattern, source_text(), flags=re.MULTILINE):
            return True
    return False


def test_documented_messages_are_those_of_the_code():
    messages = [message for message in documented_messages() if not any(foreign in message for foreign in FOREIGN)]
    assert len(messages) > 80
    assert [message for message in messages if not is_raised(message)] == []


def test_a_message_that_no_code_raises_is_noticed():
    assert is_raised("FILE: annotations[3] (id 7): 'bbox': expected TYPE, got X")
    assert not is_raised("a bbox does not hold 4 numbers")
    assert not is_raised("rois: expected (R, 5), found (3, 4)")
    assert not is_raised("offset: expected 4 dimensions, got shape S")  # the code formats the name


def prose_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the numbers and lines of a page outside of code and tables."""
    is_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            is_code = not is_code
        elif not is_code and not line.startswith(("    ", "|", "![")):
            yield number, line


def test_lines_are_at_most_120_characters():
    long_lines = []
    for page in PAGES:
        if page.name in ("compiled_code.md", "NOTES.md"):
            continue  # a program wrote one, the other is no guide
        for number, line in prose_lines(page.read_text()):
            if len(line) > 120:
                long_lines.append(f"{page.name}:{number}")
    assert long_lines == []


@functools.cache
def anchors(page: Path) -> set[str]:
    """Return the anchors that a forge gives the headings of a page."""
    headings = [line.lstrip("#") for _, line in prose_lines(page.read_text()) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if target.startswith("http"):
                continue
            file_name, _, anchor = target.partition("#")
            file = page.parent / file_name if file_name else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page.name}: {target}")
    assert broken == []


@functools.cache
def names_in(module: Path) -> set[str]:
    """Return what a source file defines or imports at its top level."""
    names = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def exists(dotted: str) -> bool:
    """Tell whether a dotted name is a package, a module, or a name that a module has; what follows is not looked at."""
    *_, last = parts = dotted.split(".")
    path = ROOT
    for index, part in enumerate(parts):
        if (path / part).is_dir():
            path /= part
            continue
        file = path / f"{part}.py"
        if file.is_file():
            return index == len(parts) - 1 or parts[index + 1] in names_in(file)
        return part in names_in(path / "__init__.py")
    return path.is_dir() or last in names_in(path / "__init__.py")


def test_files_and_names_exist():
    missing = []
    for page in CURRENT_PAGES:
        text = page.read_text()
        files = re.findall(
            r"\b(?:triton_dcn|detector|train|bench|tests|examples|docs)/[\w/.-]*\w\.(?:py|md|csv)\b", text
        )
        missing += [f"{page.name}: {file}" for file in files if not (ROOT / file).exists()]

        dotted_names = re.findall(
            r"(?<![\w./:])(?:triton_dcn|detector|train|bench)(?:\.(?!md\b)[A-Za-z_]\w*)+(?![\w/]|\.\w)", text
        )
        for module, names in re.findall(r"from ((?:triton_dcn|detector|train|bench)[\w.]*) import ([\w, ]+)", text):
            dotted_names += [f"{module}.{name.split(' as ')[0].strip()}" for name in names.split(",")]
        missing += [f"{page.name}: {name}" for name in dotted_names if not exists(name)]
    assert missing == []


def test_the_list_of_files_is_that_of_the_repository():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = [line for line in re.findall(r"(?m)^    (?:  )?[a-z_]+(?:/|\.py).*", text) if "->" not in line]
    assert len(listed) > 40
    folder = ROOT
    missing = []
    for line in listed:
        names = line[:24] if line.count(".py") < 2 else line  # a short line names several files
        paths = re.findall(r"[a-z_]+(?:/|\.py)", names)
        if not line.startswith("      "):
            folder = ROOT / paths[0]
            paths = [""]
        missing += [f"{folder.name}/{path}" for path in paths if not (folder / path).exists()]
    assert missing == []


def fields_of(file: str, class_name: str) -> set[str]:
    """Return the fields of a dataclass."""
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}
    raise AssertionError(f"{file}: no class {class_name}")


def test_flags_of_sections_exist():
    fields = {
        "data": fields_of("train/config.py", "DataConfig"),
        "optim": fields_of("train/config.py", "OptimConfig"),
        "checkpoint": fields_of("train/config.py", "CheckpointConfig"),
        "model": fields_of("train/command_line.py", "ModelFlags"),
    }
    missing = []
    for page in CURRENT_PAGES:
        for section, flag in re.findall(r"--(data|optim|checkpoint|model)\.([a-z][a-z-]*)", page.read_text()):
            if flag.removeprefix("no-").replace("-", "_") not in fields[section]:
                missing.append(f"{page.name}: --{section}.{flag}")
    assert missing == []

"""The README and the pages of docs/, taken apart: blocks of code, and code in the running text."""

import importlib
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import caa_lens

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = {"python", "bash"}
SHOWN = {"text", "bibtex", "json"}  # what is no code of ours

_FENCE = re.compile(
    r"(?:<!-- (?P<how>not run|run by `make interop`): (?P<reason>[^\n]+?) -->\n)?"
    r"^(?P<indent> *)(?P<fence>```+|~~~+)(?P<info>[^\n]*)\n(?P<body>.*?)^(?P=indent)(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block.

    Attributes:
        line: of the page, counted from 1, where its code begins.
        reason: why it is not run: `<!-- not run: REASON -->` stands on the line above it. Else None.
        interop: `<!-- run by `make interop`: REASON -->` stands there: run in that environment only.
        follows: whether nothing stands between it and the block before it, as between code and its output.
    """

    line: int
    language: str
    code: str
    reason: str | None
    interop: bool
    follows: bool


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    read, end = [], 0
    for found in _FENCE.finditer(text):
        block = Block(
            line=text.count("\n", 0, found.start("body")) + 1,
            language=found["info"].strip(),
            code=textwrap.dedent(found["body"]),
            reason=found["reason"],
            interop=(found["how"] or "").startswith("run by"),
            follows=bool(read) and not text[end : found.start()].strip(),
        )
        read.append(block)
        end = found.end()
    return read


def commands(block: Block) -> list[str]:
    """The lines of a shell block: continued ones joined, comments and prompts taken off."""
    joined = block.code.replace("\\\n", " ").splitlines()
    lines = [re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ") for line in joined]
    return [line for line in lines if line]


def without_blocks(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def code_in_text(page: Path) -> list[str]:
    """What stands between backticks outside the blocks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", without_blocks(page))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def find(path: str) -> object:
    """The object at a dotted path; modules are imported on the way."""
    found: object = caa_lens
    for depth, name in enumerate(path.split(".")[1:], start=2):
        if not hasattr(found, name):
            importlib.import_module(".".join(path.split(".")[:depth]))
        found = getattr(found, name)
    return found

"""The fenced blocks of a page, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"(?:^<!-- not run: ([^\n]+) -->\n)?^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(distilbert-fast [^`]+)`")


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        line: of its fence in the page.
        kind: what stands after the fence: "python", "bash", …
        not_run: why it is not run; empty for one that is.
    """

    page: Path
    line: int
    kind: str
    text: str
    not_run: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, found.start(2)) + 1, found[2], found[3], found[1] or "")
        for found in _FENCE.finditer(text)
    ]


def commands(text: str) -> list[str]:
    """The commands of a bash block, one for each line that goes on, without comments."""
    whole = text.replace("\\\n", " ")
    return [line for line in (re.sub(r"(^| +)#.*$", "", line) for line in whole.splitlines()) if line]


def ours(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Every command of ours that a page names, in blocks and in the text: its place and its arguments."""
    for block in blocks(page):
        for command in commands(block.text) if block.kind == "bash" else ():
            if (at := re.search(r"distilbert[-_]fast (.*)", command)) is not None:
                yield block.place, shlex.split(at[1])
    text = _FENCE.sub("", page.read_text())
    for found in _INLINE.finditer(text):
        yield f"{page.name}: {found[1]}", shlex.split(found[1].split(maxsplit=1)[1])

"""The layout of the repository is the one that docs/design.md draws; modules stay short; links in the pages resolve."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from distilbert_fast import backends

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 450  # lines of a module
COLUMN = 28  # where the drawing's text begins
MODULE = re.compile(r"[\w<>*]+\.py\b")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
GENERATED = {"distilbert_fast/_build_info.py"}


def modules() -> set[str]:
    """Every module of the package and of kernels/, relative to ROOT. An __init__.py in a room stands for the room."""
    package = ROOT / "distilbert_fast"
    paths = [path for path in package.rglob("*.py") if not path.is_relative_to(package / "kernels")]
    names = {path.relative_to(ROOT).as_posix() for path in [*paths, *(ROOT / "kernels").glob("*.py")]}
    return {name for name in names - GENERATED if name.count("/") == 1 or not name.endswith("/__init__.py")}


def drawn(page: str) -> set[str]:
    """Every module, or pattern of modules, that the drawing below "The house" names, relative to ROOT.

    What stands left, up to column 28, is a folder or a module, and its indentation says inside which folder. The text
    right of it names modules of that folder.
    """
    drawing = re.search(r"^## The house\n+```(?:text)?\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
    found: set[str] = set()
    folders: list[str] = []
    for line in drawing.splitlines():
        left, text = line[:COLUMN], line[COLUMN:]
        if name := left.strip():
            depth = (len(left) - len(left.lstrip())) // 2
            folders = [*folders[:depth], name if name.endswith("/") else ""]
        names = MODULE.findall(text) if folders[-1] else [name]
        found |= {"".join(folders) + each for each in names if each.endswith(".py")}
    return {name for name in found if name.startswith(("distilbert_fast/", "kernels/"))}


def is_named(module: str, names: set[str]) -> bool:
    """Whether the drawing names a module, by itself or as <op>.py or _*.py of its folder."""
    folder, _, stem = module.removesuffix(".py").rpartition("/")
    is_op = stem in backends.KERNELS and f"{folder}/<op>.py" in names
    return module in names or is_op or (stem.startswith("_") and f"{folder}/_*.py" in names)


def test_every_module_is_in_the_design():
    names = drawn((ROOT / "docs/design.md").read_text())
    assert not [module for module in sorted(modules()) if not is_named(module, names)]


def test_every_module_of_the_design_exists():
    names = drawn((ROOT / "docs/design.md").read_text())
    assert {name for name in names if "<" not in name and "*" not in name} <= modules()
    assert len(names) > 50  # the drawing was read


def test_the_reader_of_the_drawing():
    page = """# Design

## The house

```
distilbert_fast/            what users import: not_here/x is no module
  __init__.py               names
  ops/                      <op>.py: an op; _*.py: what they
                            share. extra.py
  rooms/                    one.py + two.py (words, three.py)
    inner/                  four.py
  last.py                   a module, which mentions other.py
kernels/                    <op>.py
csrc/cpu/                   not_a_module.py
```
"""
    package = {"__init__.py", "ops/<op>.py", "ops/_*.py", "ops/extra.py", "last.py"}
    package |= {"rooms/one.py", "rooms/two.py", "rooms/three.py", "rooms/inner/four.py"}
    assert drawn(page) == {f"distilbert_fast/{name}" for name in package} | {"kernels/<op>.py"}
    assert is_named("kernels/kl_div.py", {"kernels/<op>.py"}) and is_named("a/_b.py", {"a/_*.py"})
    assert not is_named("kernels/surprise.py", {"kernels/<op>.py"}) and not is_named("a/b.py", {"a/_*.py"})


def test_no_module_is_too_long():
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in modules() | {"setup.py"}}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_no_class_shares_its_name_with_another():
    """But for the records of a call and of its backward, which every op has."""
    places: dict[str, list[str]] = {}
    for module in sorted(modules()):
        for node in ast.walk(ast.parse((ROOT / module).read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
    assert {name: of for name, of in places.items() if len(of) > 1 and name not in ("Call", "Gradient")} == {}


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the titles of a page."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> Iterator[str]:
    """Links of a page to files and titles of this repository that do not exist."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^()\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.is_relative_to(ROOT) or not file.exists():
            yield f"{page.name}: {target}"
        elif anchor and anchor not in anchors(file.read_text()):
            yield f"{page.name}: {target}: no such title"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_resolve(page):
    assert list(broken_links(page)) == []


def test_broken_links_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# A `title`, of two\n\n```\n# no title\n```\n")
    (tmp_path / "page.md").write_text(
        "[a](other.md) [b](other.md#a-title-of-two) [c](https://example.org/x) [d](other.md#no-title) [e](../page.md)\n"
        "[f](gone.md)\n\n```\n[g](code.md)\n```\n\n[h](#nothing)\n"
    )
    found = list(broken_links(tmp_path / "page.md"))
    targets = ["other.md#no-title: no such title", "../page.md", "gone.md", "#nothing: no such title"]
    assert found == [f"page.md: {target}" for target in targets]


def test_every_page_is_reached_from_the_index():
    index = (ROOT / "docs/index.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= set(re.findall(r"\]\(([\w-]+\.md)\)", index))


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120

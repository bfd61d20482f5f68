"""What the pages say of tests, of figures and of the first five minutes is so."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from pages.fences import ROOT, blocks, commands

from distilbert_fast import _HOME


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings")
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/quickstart/index.html").is_file()


def functions(path):
    """The tests of a module."""
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_each_guarantee_has_its_tests():
    rows = re.findall(r"^\| (.+) \| (`tests/.+`) \|$", (ROOT / "docs/guarantees.md").read_text(), re.MULTILINE)
    assert len(rows) > 15
    for promise, named in rows:
        for node in re.findall(r"`([^`]+)`", named):
            path, _, function = node.partition("::")
            assert (ROOT / path).is_file(), f"{promise}: {node}"
            assert not function or function in functions(ROOT / path), f"{promise}: {node}"


def test_from_a_csv_to_a_classifier_in_five_commands():
    first, *others = (
        [line for block in blocks(ROOT / page) if block.kind == "bash" for line in commands(block.text)]
        for page in ("docs/quickstart.md", "README.md")
    )
    assert first[0] == "pip install ." and len(first) <= 5
    assert [line.split()[1] for line in first[1:]] == ["compress", "evaluate", "predict"]
    assert [line for line in others[0] if line in first] == first  # README has the same


def test_the_reference_has_every_public_name():
    listed = re.findall(r"^::: distilbert_fast\.(.+)\.(\w+)$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE)
    assert {name: module for module, name in listed} == _HOME


def test_adding_an_op_names_every_file_that_one_needs():
    rows = re.findall(r"^\| (\d+) \| `([^`]+)` \|", (ROOT / "docs/adding-an-op.md").read_text(), re.MULTILINE)
    named = [path for _, path in rows]
    assert [int(number) for number, _ in rows] == [*range(1, len(named) + 1)] and len(named) <= 9
    sources = [path for room in ("csrc", "distilbert_fast", "kernels") for path in (ROOT / room).rglob("*.*")]
    sources += (ROOT / "tests/ops").glob("*.py")
    read = {path: path.read_text() for path in sources if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}}
    found = {path.relative_to(ROOT).as_posix() for path, text in read.items() if "codebook_linear" in text}
    assert found == {*named, "distilbert_fast/layers.py"}  # which calls it


def test_ops_are_listed_with_their_maths():
    text = (ROOT / "docs/ops.md").read_text()
    for module in {module for module in _HOME.values() if module.startswith("ops.")}:
        name = module.removeprefix("ops.")
        assert f"\n## {name}\n" in text
        maths = ast.get_docstring(ast.parse((ROOT / f"distilbert_fast/ops/{name}.py").read_text()))
        formula = re.search(r"\n\n((?:    .*\n|\n)+)", maths + "\n")[1].strip("\n")
        formula = "\n".join(line[4:] for line in formula.splitlines())
        assert formula.rstrip() in text, f"{name}: its formula is not that of its docstring"

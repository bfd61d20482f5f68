"""Every block of README.md and docs/ runs, page by page in the order of the page, on small models and data; what is
marked as not run is counted, and each command that a page names has the options that it is given."""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import typer
from pages import given
from pages.fences import PAGES, ROOT, blocks, commands, ours
from still_clocks import machine
from typer.testing import CliRunner

from distilbert_fast.cli import app

KINDS = {"python", "bash", "text", "json", "cpp"}
NOT_RUN = {
    ("README.md", "installs the package"): 1,
    ("README.md", "runs the test suite"): 1,
    ("docs/adding-an-op.md", "a part of an op"): 1,
    ("docs/benchmarks.md", "takes hours"): 1,
    ("docs/benchmarks.md", "needs a GPU"): 1,
    ("docs/benchmarks.md", "takes minutes"): 2,
    ("docs/serve.md", "a server that stays"): 1,
    ("docs/serve.md", "needs the server"): 1,
    ("docs/compare.md", "takes a quarter of an hour"): 1,
    ("docs/compress.md", "needs AG News and minutes"): 1,
    ("docs/compress.md", "needs SST-2 and a quarter of an hour"): 1,
    ("docs/distillation.md", "needs several processes"): 1,
    ("docs/distillation.md", "needs the hub"): 1,
    ("docs/distillation.md", "needs the data sets and minutes"): 4,
    ("docs/index.md", "installs the package"): 1,
    ("docs/install.md", "installs the package"): 1,
    ("docs/install.md", "builds a wheel"): 1,
    ("docs/install.md", "needs a wheel"): 1,
    ("docs/quickstart.md", "installs the package"): 1,
}
REJECTED = 3  # compress: a model that lost too much


def name(page):
    return page.relative_to(ROOT).as_posix()


RUN = [page for page in PAGES if any(one.kind in ("python", "bash") and not one.not_run for one in blocks(page))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return given.make(tmp_path_factory.mktemp("given"))


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of what pages name, as the working directory."""
    for path in made.iterdir():
        if path.name != "runs":  # which finetune writes into
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(made / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(command, place):
    """One line of a bash block: ours in this process, others by bash."""
    if command.startswith("distilbert-fast "):
        arguments = shlex.split(command)[1:]
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        fine = (0, REJECTED) if arguments[0] == "compress" else (0,)
        assert done.exit_code in fine, f"{place}: {command}: {done.output[-3000:]}"
        return
    call = f'distilbert-fast() {{ "{sys.executable}" -m distilbert_fast "$@"; }}; set -eo pipefail; {command}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", call], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{place}: {command}: {done.stderr[-3000:]}"


@pytest.mark.parametrize("page", RUN, ids=name)
def test_every_block_runs(page, folder, monkeypatch):
    machine(monkeypatch)
    known = {}
    for block in blocks(page):
        if block.not_run:
            continue
        if block.kind == "python":
            names = {**known, **given.namespace(folder)}
            exec(compile(block.text, block.place, "exec"), names)
            known = {key: value for key, value in names.items() if key != "__builtins__"}
        for command in commands(block.text) if block.kind == "bash" else ():
            run_command(command, block.place)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_say_what_they_hold(page):
    assert page.read_text().count("\n```") == 2 * len(blocks(page))
    for block in blocks(page):
        assert block.kind in KINDS, f"{block.place}: a block is one of {', '.join(sorted(KINDS))}, got {block.kind!r}"
        if block.kind == "python":
            ast.parse(block.text, block.place)


def test_what_is_not_run_is_counted():
    found = Counter((name(page), one.not_run) for page in PAGES for one in blocks(page) if one.not_run)
    assert found == NOT_RUN
    assert sum(page.read_text().count("<!-- not run:") for page in PAGES) == found.total()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_option_exists(page):
    for place, arguments in ours(page):
        command, rest = typer.main.get_command(app), [*arguments]
        while rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]
        several = getattr(command, "commands", {}) if command.name != "evaluate" else {}
        if several and rest:  # `distill … --qat int8` means some of them, `distill mlm|task` these
            assert rest[0] == "…" or set(rest[0].split("|")) <= set(several), f"{place}: no such command"
        if command.context_settings.get("ignore_unknown_options"):
            continue  # they are pytest's
        parameters = [one for each in (command, *several.values()) for one in each.params]
        known = {option for one in parameters for option in (*one.opts, *one.secondary_opts)}
        unknown = [part for part in rest if part.startswith("-") and part != "-" and part not in {*known, "--help"}]
        assert not unknown, f"{place}: {unknown}"


def test_the_reader_of_pages(tmp_path, monkeypatch):
    monkeypatch.setattr("pages.fences.ROOT", tmp_path)
    page = tmp_path / "a.md"
    page.write_text("x\n\n<!-- not run: why -->\n```bash\na \\\n  b  # c\n# d\n```\n\n```python\ne = 1\n```\n")
    first, second = blocks(page)
    assert (first.line, first.kind, first.not_run, commands(first.text)) == (4, "bash", "why", ["a    b"])
    assert (second.line, second.kind, second.text, second.not_run) == (10, "python", "e = 1\n", "")

"""What `make test` leaves to `make test-all`, and when .ci/run chooses the latter."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("sizes", [(1,), (7, 2), (12, 2, 3), (5, 5, 5, 2)], ids=str)
def test_covering_has_every_value_of_every_parameter(sizes):
    every = [dict(zip("abcd", values, strict=False)) for values in itertools.product(*map(range, sizes))]
    chosen = cases.covering(every)
    assert chosen == sorted(set(chosen)) == cases.covering(every)
    assert {pair for i in chosen for pair in every[i].items()} == {pair for case in every for pair in case.items()}
    assert max(sizes) <= len(chosen) <= max(sizes) + len(sizes)


def test_covering_has_every_pair_of_values():
    every = [dict(zip("abc", values, strict=True)) for values in itertools.product(range(7), range(5), range(3))]
    chosen = cases.covering(every, together=2)
    assert chosen == cases.covering(every, together=2) and 35 <= len(chosen) < 45
    pairs = [{*itertools.combinations(case.items(), 2)} for case in every]
    assert set().union(*(pairs[i] for i in chosen)) == set().union(*pairs)
    assert cases.covering([{"a": 1}, {"a": 2}], together=2) == [0, 1]


def test_covering_keeps_pairs_that_stand_alone():
    """Parameters that are given together, and a test without any."""
    assert cases.covering([{"heads": i, "mask": i, "size": j} for i in range(3) for j in range(1)]) == [0, 1, 2]
    assert cases.covering([]) == []


class Item:
    """What of pytest's items is looked at."""

    def __init__(self, nodeid: str, marker: Any, **params: int) -> None:
        self.nodeid, self.get_closest_marker = nodeid, lambda name: marker
        if params:
            self.callspec = SimpleNamespace(params=params)


@pytest.mark.parametrize(("marker", "left"), [(pytest.mark.covering, 4), (pytest.mark.covering(together=2), 16)])
def test_a_marked_test_runs_with_every_value_or_pair(marker, left):
    marked = [Item(f"a.py::test[{i}-{j}]", marker, i=i, j=j) for i in range(4) for j in range(4)]
    others = [Item("a.py::other", marker), Item("a.py::other[1]", None, i=1), Item("a.py::one[1]", marker, i=1)]
    assert len({*marked} - cases.left_out([*others, *marked])) == left
    assert not {*others} & cases.left_out([*others, *marked])


@pytest.fixture
def checkout(tmp_path):
    """.ci/run in a repository of two commits, and a make that only says what it is asked for."""
    if not shutil.which("git"):
        pytest.skip("no git")
    place = tmp_path / "checkout"
    (place / ".ci").mkdir(parents=True)
    if not (ROOT / ".ci/run").exists():
        pytest.skip("not a checkout")
    shutil.copy(ROOT / ".ci/run", place / ".ci/run")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/make").write_text('#!/bin/sh\necho make "$@"\n')
    (tmp_path / "bin/make").chmod(0o755)
    return place


def asked(checkout: Path, changes: list[str], *clone: str) -> list[str]:
    """What .ci/run makes after one commit for each of the changed files."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    path = f"{checkout.parent}/bin:{os.environ['PATH']}"
    environment |= {"PATH": path, "GIT_CEILING_DIRECTORIES": str(checkout.parent), "HOME": str(checkout.parent)}

    def run(*command: str, cwd: Path = checkout) -> str:
        return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, check=True).stdout

    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for name in changes:
        run("git", "init", "-q")
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(name)
        run("git", "add", "-A")
        run("git", *who, "commit", "-qm", name)
    if clone:
        run("git", "clone", "-q", *clone, checkout.as_uri(), "cloned", cwd=checkout.parent)
    said = run("bash", str((checkout.parent / "cloned" if clone else checkout) / ".ci/run"))
    return [line for line in said.splitlines() if line.startswith("make")]


SOME, ALL = "make test ARGS=--durations=25", "make test-all ARGS=--durations=25"


@pytest.mark.parametrize(
    ("changes", "suite"),
    [
        ([], SOME),  # no repository
        (["csrc/cuda/kl_div.cu"], SOME),  # the only commit
        (["a", "csrc/cuda/kl_div.cu"], ALL),
        (["a", "csrc/bindings_cuda.cpp"], ALL),
        (["a", "csrc/cpu/gemm/gemm.h"], ALL),
        (["a", "kernels/kl_div.py"], ALL),
        (["a", "distilbert_fast/runs/manifest.py"], ALL),
        (["a", "distilbert_fast/ops/kl_div.py"], ALL),
        (["csrc/cuda/kl_div.cu", "distilbert_fast/layers.py"], SOME),
    ],
    ids=str,
)
def test_ci_tries_all_where_it_matters(checkout, changes, suite):
    assert asked(checkout, changes) == [suite, "make check"]


def test_ci_in_a_shallow_clone(checkout):
    assert asked(checkout, ["a", "csrc/cuda/kl_div.cu"], "--depth", "1") == [SOME, "make check"]

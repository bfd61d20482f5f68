"""`distilbert-fast bench`: who is refused, what a record says, and when two revisions differ beyond noise."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from distilbert_fast.cli import app
from distilbert_fast.cli import bench as command

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench is importable from the checkout only

pytest.importorskip("pytest_benchmark")

from bench import revisions, suites  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.harness.contest import OURS, TRIAD  # noqa: E402

CASE = "test_quantize.py::test_rows[fp32]"


def bench(*arguments: str, **how) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, **how
    )


# The command ----------------------------------------------------------------------------------------------------------


def test_an_install_without_bench_says_so(monkeypatch, tmp_path):
    package = tmp_path / "distilbert_fast/__init__.py"
    package.parent.mkdir()
    package.touch()
    monkeypatch.setattr(command.distilbert_fast, "__file__", str(package))
    made = CliRunner().invoke(app, ["bench", "op"])
    assert made.exit_code == 2
    assert made.stderr == (
        f"error: bench: expected a checkout of the repository, got an install without bench/: {tmp_path}\n"
    )


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(command, "_NEEDED", ("json", "no_such_module"))
    made = CliRunner().invoke(app, ["bench"])
    assert made.exit_code == 2
    assert made.stderr == (f"error: bench: no_such_module is not installed: pip install -e '.[bench]' in {ROOT}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops"], "bench: expected op, model, step, all, got 'ops'"),
        (["--base", "no-such-rev"], f"--base: expected a revision of {ROOT}, got 'no-such-rev'"),
    ],
)
def test_bad_input(arguments, message):
    if "--base" in arguments and not (ROOT / ".git").exists():
        pytest.skip("not in a repository")
    bench_app = typer.Typer()
    bench_app.command()(main)
    made = CliRunner().invoke(bench_app, [*arguments, "--threads", "1"])
    assert made.exit_code == 2 and made.stderr.splitlines()[-1] == f"error: {message}"


def test_a_selection_of_nothing():
    made = bench("-k", "no_such_case", "--threads", "1")
    assert made.returncode == 2
    assert made.stderr.splitlines()[-1] == "error: -k: no contest of op is selected by 'no_such_case'"


def test_every_op_has_a_suite():
    from distilbert_fast import backends

    # padded_attention is attention; fit_scale runs once, when a model is quantized
    ops = {op.removesuffix("_backward") for op in backends.KERNELS} - {
        "padded_attention",
        "fit_scale",
    }
    covered = "".join((ROOT / "bench" / name).read_text() for name in suites.SUITES["op"])
    assert [op for op in sorted(ops) if f"distilbert_fast.{op}" not in covered] == []


def test_a_run_writes_its_record(tmp_path):
    out = tmp_path / "b.json"
    made = bench("op", "-k", "int8_linear and 16", "--rounds", "2", "--threads", "1", "--out", str(out))
    assert made.returncode == 0, made.stderr
    record = json.loads(out.read_text())
    (row,) = record["rows"]
    assert (row["suite"], row["case"]) == ("int8_linear", "gelu[16]")
    assert set(row["contenders"]) == {OURS, "torch._int_mm", "torch, bf16", TRIAD}
    assert all(len(one["seconds"]) == 2 for one in row["contenders"].values())
    assert "gelu[16]" in made.stdout and "of the limit" in made.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b-latency.png", "b-roofline.png", "b.json"]


def test_the_limit_is_the_longer_of_bytes_and_operations():
    triad = {"moved_bytes": 100, "seconds": [1.0, 2.0, 1.0]}  # 100 bytes a second
    work = {"moved_bytes": 50, "operations": 30, "unit": "int8", "seconds": [4.0]}
    assert suites.share_of_limit(work, triad, {"int8": 10.0}) == 3 / 4
    assert suites.share_of_limit(work | {"operations": 0}, triad, {"int8": 10.0}) == 0.5 / 4


# Two revisions --------------------------------------------------------------------------------------------------------


def noisy(change: float, seed: int, processes: int = 16, rounds: int = 9) -> list[dict[str, list[float]]]:
    """Seconds of two revisions: 1 % of a process's own, 5 % a turn, 5 % by who began, now and then twice as long."""
    draw = random.Random(seed)

    def side(factor):
        own = factor * draw.lognormvariate(0, 0.01)
        return [own * draw.lognormvariate(0, 0.05) * (2 if draw.random() < 0.1 else 1) for _ in range(rounds)]

    ordered = [1.05, 1 / 1.05]
    return [{"base": side(ordered[i % 2]), "this": side(1 + change)} for i in range(processes)]


def test_ten_percent_is_found_and_nothing_is_not():
    """Of 200 runs each, at the confidence that is promised: 99 %, all cases together."""

    def told(change, cases):
        return [revisions.verdict(noisy(change, seed), cases)["verdict"] for seed in range(200)]

    slower, same = told(0.1, 1), told(0.0, 1)
    assert slower.count("slower") >= 185 and "faster" not in slower
    assert same.count("same") >= 198
    assert told(-0.2, 1).count("faster") >= 190
    assert told(0.0, 10).count("same") == 200


def test_an_effect_below_the_floor_is_not_told():
    pairs = [{"base": [1.0, 1.0], "this": [1.02 + i / 1e4] * 2} for i in range(6)]
    found = revisions.verdict(pairs)
    assert found["low"] > 0 and found["verdict"] == "same"
    with pytest.raises(ValueError, match="verdict: expected 4 or more pairs of processes, got 1"):
        revisions.verdict(pairs[:1])


def test_both_sides_run_their_own_package(tmp_path):
    """A copy of the package takes the place of another revision's; the side that is made slower is."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "distilbert_fast").symlink_to(ROOT / "distilbert_fast")
    core = min(os.sched_getaffinity(0))
    given = {"files": ["test_quantize.py"], "select": "rows and fp32", "threads": 1, "cores": [core]}
    with pytest.raises(Exception, match="expected the package of"):
        revisions.measure({"base": tree, "this": ROOT}, given, 1, 1, lambda line: None)
    slow = {"this": {CASE: 3.0}}
    found, left_out = revisions.measure({"base": ROOT, "this": ROOT}, given, 1, 2, lambda line: None, slow)
    assert list(found) == [CASE] and left_out == {}
    (timed,) = found[CASE]
    assert [len(timed[side]) for side in ("base", "this")] == [2, 2]

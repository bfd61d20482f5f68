"""bench.gpu without a GPU: parts that fail, crash or hang, what a record says, tables of configurations, and a real run
of some parts on tiny tensors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu.small import SMALL, ops, quantized, results

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench is importable from the checkout only

pytest.importorskip("triton")

from bench.gpu import measure, report, runner  # noqa: E402
from bench.gpu.measure import Case, Work  # noqa: E402
from bench.gpu.plan import BUDGET, PARTS, Part  # noqa: E402
from bench.gpu.records import Records, Where  # noqa: E402
from bench.gpu.runner import Outcome  # noqa: E402
from distilbert_fast.kernels import tuning  # noqa: E402
from distilbert_fast.testing import assert_twice_rule  # noqa: E402

CPU = Where(torch.device("cpu"))


def test_the_plan_fits_the_budget_and_names_what_exists():
    assert sum(part.seconds for part in PARTS.values()) == BUDGET == 9 * 60
    assert all(callable(part.function()) for part in PARTS.values())


# Parts that do not end well -----------------------------------------------------------------------------------

BODIES = {
    "good": "records.add('note', text='found')",
    "raises": "records.add('note', text='before')\n    raise ValueError('it is broken')",
    "crashes": "records.add('note', text='before')\n    import os, signal\n    os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": "records.add('note', text='before')\n    import subprocess\n    subprocess.run(['sleep', '60'])",
    "stumbles": "for i in (1, 0):\n        with records.attempt(f'case {i}'):\n            records.note(str(1 // i))",
}


@pytest.fixture
def part(tmp_path, monkeypatch):
    source = "".join(f"def {name}(where, records):\n    {body}\n\n\n" for name, body in BODIES.items())
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "bodies.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda name, seconds=60: Part(name, seconds, f"parts.bodies:{name}", "")


@pytest.mark.slow
def test_a_part_that_fails_is_reported_and_the_rest_goes_on(part, tmp_path):
    parts = [part("raises"), part("crashes"), part("stumbles"), part("good")]
    outcomes = {outcome.name: outcome for outcome in runner.run(parts, 200, tmp_path / "logs")}
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "raises": "failed",
        "crashes": "failed",
        "stumbles": "done",
        "good": "done",
    }
    assert outcomes["raises"].reason == "its process ended with status 1: ValueError: it is broken"
    assert outcomes["crashes"].reason.startswith("its process ended by signal 11")
    for name in ("raises", "crashes"):
        assert outcomes[name].records == [{"kind": "note", "text": "before"}]
    failure = {"kind": "failure", "what": "case 0", "reason": "ZeroDivisionError: integer division or modulo by zero"}
    assert outcomes["stumbles"].records == [{"kind": "note", "text": "1"}, failure]


@pytest.mark.slow
def test_a_part_that_hangs_is_ended_with_what_it_started(part, tmp_path, monkeypatch):
    """It writes before it hangs; the limit is long enough for that and shorter than what it waits for."""
    limits = []
    parts = [part("good", 60), part("hangs", 8), part("good", 60)]
    outcomes = list(
        runner.run(parts[1:], 400, tmp_path / "logs", lambda part, limit: limits.append((part.name, limit)))
    )
    hung, after = outcomes
    assert (hung.status, after.status) == ("timed out", "done")
    assert 8 <= hung.seconds < 30 and hung.records == [{"kind": "note", "text": "before"}]
    assert limits[0] == ("hangs", 8) and limits[1][1] == 60


def test_time_left_over_goes_to_the_next_and_none_left_is_said(monkeypatch, tmp_path):
    clock, limits = [0.0], []
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])

    def run_part(part, limit, folder):
        limits.append(limit)
        seconds = 4.0 if part.name == "quick" else limit
        clock[0] += seconds
        return Outcome(part.name, "done", "", seconds, [])

    monkeypatch.setattr(runner, "run_part", run_part)
    parts = [Part("quick", 10, "", ""), Part("long", 10, "", ""), Part("last", 10, "", ""), Part("late", 10, "", "")]
    outcomes = list(runner.run(parts, 25, tmp_path))
    assert limits == [10, 16, 5]
    assert outcomes[-1].status == "no time left" and outcomes[-1].reason == "the budget of 25 s is spent"


# Cases --------------------------------------------------------------------------------------------------------


def test_contenders_are_compared_and_missing_ones_named(tmp_path, monkeypatch):
    x = torch.arange(12.0).view(3, 4)
    case = Case("quantize", "tiny", Work(moved_bytes=1), "right", 0.01)
    case.ours(CPU, (torch.float32,), lambda: lambda: x * 1.001)
    case.calls["right"] = lambda: x
    case.calls["wrong"] = lambda: x + 1
    case.calls["breaks"] = lambda: 1 / 0
    case.rival(CPU, "absent", lambda: None, "no_such_package")
    case.rival(CPU, "needs one", lambda: None)
    case.rival(CPU, "cannot be made", lambda: 1 / 0, gpu=False)
    measure.run(case, CPU, Records(tmp_path / "records"))
    (record,) = Records(tmp_path / "records").read()
    agrees = {name: contender["agrees"] for name, contender in record["contenders"].items()}
    assert agrees == {"ours, cpu": True, "right": True, "wrong": False}
    assert record["contenders"]["ours, cpu"]["error"] == pytest.approx(0.001, rel=1e-3)
    assert record["missing"] == {
        "absent": "no_such_package is not installed",
        "needs one": "needs a CUDA device",
        "cannot be made": "ZeroDivisionError: division by zero",
        "breaks": "ZeroDivisionError: division by zero",
    }


class Timed(Where):
    """A CPU that is timed as if it were a GPU."""

    gpu = True


def test_what_is_timed_is_recorded_with_its_spread(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.harness.contest.FLUSH_BYTES", 1 << 16)
    x = torch.ones(64, 64)
    resets = []
    case = Case("quantize", "tiny", Work(moved_bytes=x.nbytes), "other", 0.01, lambda: resets.append(1))
    case.ours(CPU, (torch.float32,), lambda: lambda: x * 2)
    case.calls["other"] = lambda: x + x
    measure.run(case, Timed(torch.device("cpu")), Records(tmp_path / "records"), rounds=3)
    (record,) = Records(tmp_path / "records").read()
    for contender in record["contenders"].values():
        assert 0 < contender["low"] <= contender["median"] <= contender["high"] and contender["agrees"]
        assert contender["peak_bytes"] >= 0
    assert len(resets) > 2 * 3 and record["missing"] == {}


def test_torn_lines_of_a_killed_part_are_left_out(tmp_path):
    records = Records(tmp_path / "records")
    assert records.read() == []
    records.note("whole")
    with records.path.open("a") as file:
        file.write('{"kind": "no')
    assert records.read() == [{"kind": "note", "text": "whole"}]


# The report ---------------------------------------------------------------------------------------------------


def timed(milliseconds, **more):
    seconds = milliseconds / 1000
    return {"error": 0.0, "agrees": True, "median": seconds, "low": seconds / 2, "high": 2 * seconds} | more


@pytest.fixture
def made():
    made = report.Report({"gpu": "NVIDIA H200", "date": "2026-11-23T00:00:00", "versions": {"torch": "2.11"}})
    kl_div = {
        "op": "kl_div",
        "case": "N",
        "work": Work(moved_bytes=2e9)._asdict(),
        "contenders": {
            "ours, triton": timed(1.0, peak_bytes=1 << 20),
            "torch": timed(4.0),
            "bad": timed(2.0) | {"agrees": False, "error": 0.5},
        },
        "missing": {"Liger": "liger_kernel is not installed"},
    }
    model = {
        "op": "DistilBERT-base",
        "case": "256 x 128",
        "work": Work(1e12)._asdict(),
        "rows": 256,
        "contenders": {"ours, int8": timed(1.0, unit="int8"), "sdpa": timed(2.0, unit="bf16")},
        "missing": {},
    }
    made.add(Outcome("peaks", "done", "", 1.0, [{"kind": "peaks", "bytes": 4e12, "bf16": 8e14, "int8": 2e15}]))
    made.add(Outcome("kl_div", "done", "", 2.0, [{"kind": "case", **kl_div}, {"kind": "case", **model}]))
    tests = {"kind": "tests", "verdicts": {"PASSED": 3, "FAILED": 1}, "failed": ["tests/gpu/x.py::y"], "complete": True}
    made.add(Outcome("tests", "timed out", "after 9 s; last words", 9.0, [tests, {"kind": "note", "text": "noted"}]))
    made.add(Outcome("tune", "done", "", 1.0, [{"kind": "failure", "what": "attention", "reason": "because"}]))
    return made


def test_shares_of_the_limit(made):
    kl_div, model = report.with_shares(made)["cases"]
    ours = kl_div["contenders"]["ours, triton"]
    assert ours["limit"] == pytest.approx(0.0005) and ours["share_of_limit"] == pytest.approx(0.5)
    shares = {name: contender["share_of_limit"] for name, contender in model["contenders"].items()}
    assert shares == {"ours, int8": pytest.approx(0.5), "sdpa": pytest.approx(0.625)}  # each by its own peak
    assert report.limit_seconds(Work(1e12, "int8", 8e9)._asdict(), None, made.peaks) == pytest.approx(0.002)
    assert report.limit_seconds(Work(1e12)._asdict(), None, {}) is None


def test_tables_and_json(made, tmp_path):
    from rich.console import Console

    console = Console(width=180, record=True, file=(tmp_path / "out").open("w"))
    for table in report.tables(made):
        console.print(table)
    text = console.export_text()
    for expected in (
        "4.00x as fast",
        "50%",
        "DISAGREES, error 0.5",
        "256,000 sequences/s",
        "4.00 TB/s copied, 800.00 TFLOP/s bf16, 2000.00 TOPS int8",
        "tests: 3 passed, 1 failed",
        "failed: tests/gpu/x.py::y",
        "tests: noted",
        "not available: Liger: liger_kernel is not installed",
        "FAILED: tests: timed out: after 9 s; last words",
        "FAILED: tune: attention: because",
    ):
        assert expected in text, expected
    report.write_json(made, tmp_path / "new" / "h200.json")
    assert json.loads((tmp_path / "new" / "h200.json").read_text()) == report.with_shares(made)
    assert report.file_stem("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"


# Tables of configurations -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tuned")
    monkeypatch.setattr(tuning, "_searched", {})
    tuning.table.cache_clear()
    yield tmp_path / "tuned"
    tuning.table.cache_clear()


SMALL_TILE, LARGE_TILE = {"BLOCK_M": 64}, {"BLOCK_M": 128}


def test_a_table_is_written_kept_and_read(folder, monkeypatch):
    first = tuning.write_table(90, {"attention_fwd": {"bf16": LARGE_TILE}, "other": {"a": SMALL_TILE}})
    tuning.write_table(90, {"attention_fwd": {"fp16": SMALL_TILE}, "other": {"a": LARGE_TILE}})
    assert first == folder / "sm_90.json" and [path.name for path in folder.iterdir()] == ["sm_90.json"]
    assert tuning.table(90) == {
        "attention_fwd": {"bf16": LARGE_TILE, "fp16": SMALL_TILE},
        "other": {"a": LARGE_TILE},
    }
    assert tuning.table(80) == {}

    monkeypatch.setattr(tuning, "architecture", lambda device: 90)
    monkeypatch.delenv("DISTILBERT_FAST_AUTOTUNE", raising=False)
    candidates = [SMALL_TILE, LARGE_TILE]
    pick = lambda kernel, key: tuning.pick(kernel, key, candidates, torch.device("cuda", 0), lambda config: None)  # noqa: E731
    assert pick("attention_fwd", "bf16") == LARGE_TILE
    assert pick("attention_fwd", "fp32") == SMALL_TILE, "the default, where the table knows nothing"
    assert tuning.searched(90) == {}


def test_a_search_fills_what_is_written(folder, monkeypatch):
    tuning.write_table(90, {"attention_fwd": {"bf16": SMALL_TILE}})
    monkeypatch.setattr(tuning, "architecture", lambda device: 90)
    monkeypatch.setattr(tuning, "_capturing", lambda: False)
    monkeypatch.setattr(tuning, "fastest", lambda candidates, run: candidates[-1])
    pick = lambda: tuning.pick(  # noqa: E731
        "attention_fwd", "bf16", [SMALL_TILE, LARGE_TILE], torch.device("cuda", 0), lambda config: None
    )
    monkeypatch.setenv("DISTILBERT_FAST_AUTOTUNE", "1")
    assert pick() == SMALL_TILE, "known, so not searched"
    monkeypatch.setenv("DISTILBERT_FAST_AUTOTUNE", "all")
    assert pick() == LARGE_TILE and tuning.searched(90) == {"attention_fwd": {"bf16": LARGE_TILE}}
    assert tuning.searched(80) == {}


# A real run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [part.name for part in PARTS.values() if part.name not in ("build", "tests")])
def test_everything_but_launching(name, tmp_path):
    """Every contender that a CPU can run agrees with the oracle, on tiny tensors."""
    records = Records(tmp_path / "records")
    PARTS[name].function()(CPU, records)
    found = records.read()
    assert [record for record in found if record["kind"] == "failure"] == []
    for case in (record for record in found if record["kind"] == "case"):
        assert any(name.startswith("ours") for name in case["contenders"]), case["case"]
        for contender, result in case["contenders"].items():
            assert result["agrees"] and "median" not in result, (case["case"], contender)
    if name in ("kl_div", "linear_kl_div", "attention", "int8_linear", "rows", "models", "step"):
        assert any(record["kind"] == "case" for record in found)


@pytest.mark.slow
def test_the_command(tmp_path):
    """Two parts as a user runs them, CUDA hidden."""
    out = tmp_path / "record.json"
    command = [sys.executable, "-m", "bench.gpu", "--only", "kl_div,sanitizer", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=_hidden())
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert record["machine"]["gpu"] == "not measured: no CUDA device"
    assert [(part["name"], part["status"]) for part in record["parts"]] == [("kl_div", "done"), ("sanitizer", "done")]
    assert [case["measured"] for case in record["cases"]] == ["not measured: no CUDA device"]
    assert "not available: Liger" in done.stdout

    wrong = subprocess.run([*command[:3], "--only", "nothing"], cwd=ROOT, text=True, capture_output=True, env=_hidden())
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: --only: expected some of build, peaks")


def _hidden():
    return os.environ | {"CUDA_VISIBLE_DEVICES": ""}


# What the tests on a GPU run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ops(SMALL))
def test_inputs_of_the_gpu_tests_are_fit_for_their_ops(name):
    op = ops(SMALL)[name]
    inputs = [x.float() for x in op.inputs(SMALL)]
    exact = results(op, op.reference, [x.double() for x in inputs])
    for ours, torchs, want in zip(results(op, op.ours, inputs), results(op, op.reference, inputs), exact, strict=True):
        assert_twice_rule(ours, torchs, want, name)


def test_codes_of_the_gpu_tests():
    found = quantized(SMALL, torch.float32, torch.device("cpu"))
    assert len(found) == 10 and all(x.numel() > 0 for x in found)

"""bench.gpu without a GPU: parts that fail, crash or hang, what a record says, tables of configurations, and a real run
of some parts on tiny tensors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
import typer
from gpu.small import SMALL, ops, quantized, results

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench is importable from the checkout only

pytest.importorskip("triton")

from bench.gpu import __main__ as bench_gpu  # noqa: E402
from bench.gpu import measure, one, precompile, profile, report, runner  # noqa: E402
from bench.gpu.keep import Keeper  # noqa: E402
from bench.gpu.measure import Case, Work  # noqa: E402
from bench.gpu.plan import PARTS, PLANS, START, Part  # noqa: E402
from bench.gpu.records import Records, Where  # noqa: E402
from bench.gpu.runner import Outcome  # noqa: E402
from bench.harness.clock import LONGEST, SHORTEST, CudaClock  # noqa: E402
from distilbert_fast.kernels import tuning  # noqa: E402
from distilbert_fast.testing import assert_twice_rule  # noqa: E402

CPU = Where(torch.device("cpu"))


def test_the_plans_fit_their_budgets_and_name_what_exists():
    budgets = {name: plan.seconds for name, plan in PLANS.items()}
    assert budgets == {"all": 570, "first": 270, "second": 330}
    for plan in PLANS.values():
        assert sum(part.seconds for part in plan.parts) + START == plan.seconds
    assert all(callable(part.function()) for part in PARTS.values())
    assert set(precompile.MEASURING) < set(PARTS)


# Times of a GPU -----------------------------------------------------------------------------------------------


class Stream:
    """What stands for torch.cuda: one stream, whose work and whose host have clocks of their own. 2 GHz."""

    def __init__(self):
        self.host = self.device = 0.0

    def launch(self, host, device):
        """A launch that takes the host so many seconds, and the device so many once it can begin."""
        self.host += host
        self.device = max(self.device, self.host) + device

    def _sleep(self, cycles):
        self.launch(0.0, cycles / 2e9)

    def Event(self, enable_timing):
        stream = self

        class Event:
            def record(self):
                self.at = max(stream.host, stream.device)

            def query(self):
                return stream.host >= self.at

            def synchronize(self):
                stream.host = max(stream.host, self.at)

            def elapsed_time(self, end):
                return 1000 * (end.at - self.at)

        return Event()


def test_launches_are_not_timed_as_kernels():
    """Three kernels of 10 µs whose launches take 100 µs each: the device is kept busy until they are queued."""
    stream = Stream()
    clock = CudaClock(stream)
    seconds, host_bound = clock.time(lambda: [stream.launch(100e-6, 10e-6) for _ in range(3)])
    assert seconds == pytest.approx(30e-6) and not host_bound and clock.cycles == SHORTEST


def test_the_device_is_kept_busy_for_longer_where_the_host_is_slow():
    stream = Stream()
    clock = CudaClock(stream)
    call = lambda: [stream.launch(100e-6, 10e-6) for _ in range(50)]  # noqa: E731
    found = [clock.time(call) for _ in range(4)]
    assert [one.host_bound for one in found] == [True, True, False, False]
    assert found[0].seconds > 3e-3 and found[-1].seconds == pytest.approx(500e-6)


def test_a_call_that_waits_for_the_device_is_said_to_be_bound_by_the_host():
    stream = Stream()
    clock = CudaClock(stream)

    def call():
        stream.launch(0, 10e-6)
        stream.host = stream.device
        stream.launch(100e-6, 10e-6)

    found = [clock.time(call) for _ in range(10)]
    assert all(one.host_bound for one in found) and clock.cycles == LONGEST
    assert found[-1].seconds == pytest.approx(120e-6)


# Parts that do not end well -----------------------------------------------------------------------------------

# A device that sleeps stands for the GPU. Each case has us, an oracle, a rival that is well, and one that is not.
BODIES = """
import os, signal, time
import torch
from bench.gpu.measure import Case, Work, run
from bench.gpu.records import Where
from bench.harness import contest

class Timed(Where):
    gpu = True

def case(records, bad):
    contest.FLUSH_BYTES = 1 << 12
    where, x = Timed(torch.device("cpu")), torch.ones(8, 8)
    def sleeping(seconds):
        def call():
            time.sleep(seconds)
            return x
        return call
    made = Case("quantize", bad.__name__, Work(moved_bytes=1), "oracle", 0.01)
    made.ours(Where(where.device), (torch.float32,), lambda: sleeping(0.001))
    made.calls["oracle"] = sleeping(0.004)
    made.rival(where, "well", lambda: sleeping(0.002))
    made.rival(where, "bad", lambda: bad)
    records.note(str(os.getpid()))
    run(made, where, records, rounds=3)

def crashes(where, records):
    def crash(): os.kill(os.getpid(), signal.SIGSEGV)
    case(records, crash)

def is_killed(where, records):
    def kill(): os.kill(os.getpid(), signal.SIGKILL)
    case(records, kill)

def hangs(where, records):
    def hang(): __import__("subprocess").run(["sleep", "60"])
    case(records, hang)

def raises(where, records):
    records.note("before")
    raise ValueError("it is broken")

def stumbles(where, records):
    for i in (1, 0):
        with records.attempt(f"case {i}"):
            records.note(str(1 // i))
"""


@pytest.fixture
def part(tmp_path, monkeypatch):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "bodies.py").write_text(BODIES)
    monkeypatch.syspath_prepend(tmp_path)
    runner.SERVER.set_forkserver_preload(["bench.gpu.measure"])
    return lambda name, seconds=60: Part(name, seconds, f"parts.bodies:{name}", "")


def new_report():
    return report.Report({"gpu": "none", "date": "", "versions": {}})


@pytest.mark.slow
def test_a_part_that_ends_badly_loses_nothing_and_the_rest_goes_on(part, tmp_path):
    """One that hangs is ended with what it started; its limit is long enough to come so far."""
    parts = [part("crashes"), part("is_killed"), part("raises"), part("stumbles")]
    keeper = Keeper(tmp_path / "out", new_report(), tmp_path / "logs", tmp_path / "tables")
    for outcome in runner.run(parts, 300, tmp_path / "logs", watching=keeper.watch):
        keeper.add(outcome)
    keeper.add(runner.run_part(part("hangs"), 6, tmp_path / "logs", keeper.watch))
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    said = {one["name"]: (one["status"], one["reason"]) for one in record["parts"]}
    assert said["crashes"][0] == "failed" and said["crashes"][1].startswith("its process ended by signal 11")
    assert said["is_killed"][0] == "failed" and said["is_killed"][1].startswith("its process ended by signal 9")
    assert said["raises"] == ("failed", "its process ended with status 1: ValueError: it is broken")
    assert said["stumbles"] == ("done", "")
    assert said["hangs"][0] == "timed out" and 6 <= record["parts"][-1]["seconds"] < 30
    assert [case["case"] for case in record["cases"]] == ["crash", "kill", "hang"]
    for case in record["cases"]:
        for name in ("ours, cpu", "oracle", "well"):
            contender = case["contenders"][name]
            assert contender["median"] >= 0.001 and contender["agrees"], (case["case"], name)
        assert case["contenders"]["well"]["beside"] >= 0.001 and "bad" not in case["contenders"]
    failures = [(one["part"], one["what"], one["reason"]) for one in record["failures"]]
    assert ("stumbles", "case 0", "ZeroDivisionError: integer division or modulo by zero") in failures
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as archive:
        assert {f"{name}.log" for name in said} <= set(archive.getnames())


WHOLE_RUN = """
import sys
from pathlib import Path
from bench.gpu import report, runner
from bench.gpu.keep import Keeper
from bench.gpu.plan import Part

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    runner.SERVER.set_forkserver_preload(["bench.gpu.measure"])
    keeper = Keeper(folder, report.Report({"gpu": "none", "date": "", "versions": {}}), folder / "logs", folder)
    parts = [Part("hangs", 600, "parts.bodies:hangs", "")]
    for outcome in runner.run(parts, 600, folder / "logs", watching=keeper.watch):
        keeper.add(outcome)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_what_it_found_and_no_process(part, tmp_path):
    """SIGKILL of the whole run while a rival hangs, after everybody before it was timed."""
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    (tmp_path / "whole_run.py").write_text(WHOLE_RUN)
    out = tmp_path / "out"
    running = subprocess.Popen(
        [sys.executable, str(tmp_path / "whole_run.py"), str(out)], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}
    )

    def found():
        record = json.loads((out / "record.json").read_text()) if (out / "record.json").exists() else {}
        return record if any("well" in case["contenders"] for case in record.get("cases", [])) else None

    try:
        assert waited_for(found, 120), "nothing was written while the part ran"
    finally:
        running.kill()
        running.wait()
    record = found()
    assert record["parts"][0]["status"] == "running" and record["failures"] == []
    assert {"ours, cpu", "oracle", "well"} == set(record["cases"][0]["contenders"])
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert archive.getnames() == ["hangs.jsonl", "hangs.log"]
    child = int(record["notes"][0].removeprefix("hangs: "))
    assert waited_for(lambda: not Path(f"/proc/{child}").exists(), 20), "the part outlives the run"


def waited_for(condition, seconds):
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return met


def test_wheels_are_used_without_being_installed(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    with pytest.raises(ValueError, match=r"--wheels: expected a directory with \.whl files, got "):
        bench_gpu.unpack(tmp_path / "wheels")
    with zipfile.ZipFile(tmp_path / "wheels" / "a_rival-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_rival/__init__.py", "name = 'rival'")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "before")
    bench_gpu.unpack(tmp_path / "wheels")
    assert __import__("a_rival").name == "rival" and os.environ["PYTHONPATH"] == f"before{os.pathsep}{sys.path[-1]}"


def test_time_left_over_goes_to_the_next_and_none_left_is_said(monkeypatch, tmp_path):
    clock, limits = [0.0], []
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])

    def run_part(part, limit, folder, watching):
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
    case.rival(CPU, "wrong", lambda: lambda: x + 1, gpu=False)
    case.rival(CPU, "breaks", lambda: lambda: 1 / 0, gpu=False)
    case.rival(CPU, "absent", lambda: None, "no_such_package")
    case.rival(CPU, "needs one", lambda: None)
    case.rival(CPU, "cannot be made", lambda: 1 / 0, gpu=False)
    measure.run(case, CPU, Records(tmp_path / "records"))
    *_, record = Records(tmp_path / "records").read()
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
    first, *_, record = Records(tmp_path / "records").read()
    assert set(first["contenders"]) == {"ours, cpu"} and first["contenders"]["ours, cpu"]["median"] > 0
    for contender in record["contenders"].values():
        assert 0 < contender["low"] <= contender["median"] <= contender["high"] and contender["agrees"]
        assert contender["peak_bytes"] >= 0
    assert len(resets) > 2 * 3 and record["missing"] == {}


def test_rivals_can_be_left_out_and_ours_be_compiled_alone(tmp_path):
    calls = []

    def names(**options):
        calls.clear()
        where = CPU._replace(**options)
        case = Case("quantize", "tiny", Work(moved_bytes=1), "oracle", 0.01)
        case.ours(where, (torch.float32,), lambda: lambda: calls.append("ours"))
        case.calls["ours, forced"] = lambda: calls.append("forced") or torch.ones(1)
        case.calls["oracle"] = lambda: calls.append("oracle") or torch.ones(1)
        case.rival(where, "ready", lambda: lambda: calls.append("ready") or torch.ones(1), gpu=False)
        case.rival(where, "made", lambda: lambda: calls.append("made") or torch.ones(1), gpu=False, compiled=True)
        case.calls.pop("ours, cpu", None)
        measure.run(case, where, Records(tmp_path / f"{len(list(tmp_path.iterdir()))}"))
        return list(calls)

    assert names() == ["forced", "oracle", "ready", "made"]
    assert names(rivals="ready") == ["forced", "oracle", "ready"]
    assert names(rivals="none") == ["forced", "oracle"]
    assert names(compiling=True) == ["forced"]


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
    last = {(record["op"], record["case"]): record for record in found if record["kind"] == "case"}
    for case in last.values():
        assert any(name.startswith("ours") for name in case["contenders"]), case["case"]
        for contender, result in case["contenders"].items():
            assert result["agrees"] and "median" not in result, (case["case"], contender)
    if name in ("kl_div", "linear_kl_div", "attention", "int8_linear", "rows", "models", "step"):
        assert any(record["kind"] == "case" for record in found)


@pytest.mark.parametrize("name", precompile.MEASURING)
def test_compiling_ahead_measures_nothing(name, tmp_path):
    records = Records(tmp_path / "records")
    PARTS[name].function()(CPU._replace(compiling=True), records)
    assert records.read() == []


def test_one_op_for_a_profiler(capsys):
    one.main(["kl_div"])
    with pytest.raises(SystemExit, match=r"usage: python -m bench\.gpu\.one NAME, one of: attention, 2 x 5; int8"):
        one.main(["nothing"])
    assert set(profile.KERNELS.values()) <= set(one.named(Timed(torch.device("cpu"))))


@pytest.mark.skipif(torch.cuda.is_available(), reason="its processes would find the GPU")
def test_the_command(part, tmp_path, capsys):
    """Two parts as a user runs them."""
    out = tmp_path / "out"
    with pytest.raises(typer.Exit) as ended:
        bench_gpu.main("all", "kl_div,sanitizer", out=out)
    assert ended.value.exit_code == 0
    record = json.loads((out / "record.json").read_text())
    assert record["machine"]["gpu"] == "not measured: no CUDA device"
    assert [(part["name"], part["status"]) for part in record["parts"]] == [("kl_div", "done"), ("sanitizer", "done")]
    assert [case["measured"] for case in record["cases"]] == ["not measured: no CUDA device"]
    assert "not available: Liger" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"plan": "third"}, "error: --plan: expected one of all, first, second, got 'third'\n"),
        ({"only": "nothing"}, "error: --only: expected some of build, peaks"),
        ({"plan": "first", "only": "tune"}, "error: --only: expected some of build, small, peaks"),
    ],
)
def test_a_wrong_command_line(given, said, capsys):
    with pytest.raises(typer.Exit) as ended:
        bench_gpu.main(**{"plan": "all", "only": "*", **given})
    assert ended.value.exit_code == 2 and capsys.readouterr().err.startswith(said)


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

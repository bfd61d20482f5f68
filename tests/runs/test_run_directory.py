"""A job's directory: a stage is whole or not there, and nothing that the job did not make is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import assert_refused_or_same, cut, edited, flipped

from distilbert_fast.files.durable import FileError
from distilbert_fast.files.schema import integer, record, text
from distilbert_fast.jobs import stage_results
from distilbert_fast.runs.run_directory import RunDirectory, StageError, write_file, write_json

NAMES = ("model", "report.md")


def run(path: Path, overwrite: bool = False, **settings: object) -> RunDirectory:
    return RunDirectory(path, "job", settings or {"epochs": 1}, NAMES, overwrite)


def fill(text: str, calls: list[str] | None = None):
    def build(path: Path) -> dict[str, object]:
        if calls is not None:
            calls.append(text)
        (path / "sub").mkdir()
        (path / "sub" / "weights").write_text(text)
        return {"said": text}

    return build


def tree(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_complete_stage_is_not_made_again(tmp_path):
    calls: list[str] = []
    for _ in range(2):
        with run(tmp_path / "new" / "out") as job:
            assert job.is_complete("model") == bool(calls)
            assert job.directory("model", fill("one", calls)) == {"said": "one"}
            assert job.result("numbers.json", lambda: calls.append("numbers") or {"n": 1}) == {"n": 1}
    assert calls == ["one", "numbers"]


def test_a_stage_that_fails_leaves_nothing_and_can_be_made_again(tmp_path):
    def fail(path: Path) -> dict[str, object]:
        (path / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), run(tmp_path) as job:
        job.directory("model", fail)
    assert not list(tmp_path.iterdir())
    with run(tmp_path, epochs=2) as job:  # nothing was made with the first settings
        job.directory("model", fill("whole"))
    assert set(tree(tmp_path / "model")) == {"stage.json", "sub/weights"}


@pytest.mark.parametrize("place", ["while it is filled", "before the rename"])
def test_killed_while_a_stage_is_made(tmp_path, place):
    """SIGKILL, which runs no handler; then the same job again."""
    script = f"""
import os, signal
from pathlib import Path
from distilbert_fast.runs import run_directory as stages

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def build(path):
    (path / "half").write_text("x")
    if {place!r} == "while it is filled":
        die()
    return {{}}

if {place!r} == "before the rename":
    Path.rename = die
with stages.RunDirectory({str(tmp_path)!r}, "job", {{"epochs": 1}}, {NAMES!r}) as job:
    job.directory("model", build)
"""
    root = str(Path(__file__).parents[2])
    killed = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": root}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    with run(tmp_path) as job:
        job.directory("model", fill("whole"))
    assert tree(tmp_path / "model")["sub/weights"] == "whole"


def test_a_job_that_comes_to_nothing_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), run(tmp_path / "out"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_what_serves_any_settings_is_in_nobodys_way(tmp_path):
    def cached(**settings: object) -> RunDirectory:
        return RunDirectory(tmp_path, "job", settings, NAMES, overwrite=settings == {"epochs": 3}, shared=["cache"])

    with pytest.raises(KeyboardInterrupt), cached(epochs=1):
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "rows").write_text("rows")
        raise KeyboardInterrupt  # before anything else was made
    with cached(epochs=2) as job:
        job.directory("model", fill("two"))
    with cached(epochs=3) as job:
        job.directory("model", fill("three"))
    assert (tmp_path / "cache" / "rows").read_text() == "rows"
    assert tree(tmp_path / "previous-1" / "model")["sub/weights"] == "two"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_while_the_directory_is_claimed(tmp_path, call):
    script = f"""
import os, signal
from distilbert_fast.runs import run_directory as stages

setattr(os, {call!r}, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
with stages.RunDirectory({str(tmp_path)!r}, "job", {{"epochs": 1}}, ("model",)):
    pass
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name]
    with run(tmp_path) as job:
        job.directory("model", fill("whole"))
    assert not [path.name for path in tmp_path.iterdir() if "partial" in path.name]


def refused(path: Path, message: str, **arguments: object) -> None:
    place = path if path.is_dir() else path.parent
    before = tree(place)
    with pytest.raises(StageError, match=f"^{re.escape(message)}$"), run(path, **arguments):
        pass
    assert tree(place) == before


def test_something_else_in_the_directory_is_refused(tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).write_text(name)
    refused(
        tmp_path,
        f"job: output: {str(tmp_path)!r} already holds 'a', 'b', 'c' and 1 more, which no job made; choose another "
        "directory, or give --overwrite to move what is in the way to previous-<n>/ in it",
    )


def test_other_settings_are_refused_and_named(tmp_path):
    with run(tmp_path, epochs=1, seed=0) as job:
        job.directory("model", fill("one"))
    before = tree(tmp_path)
    with pytest.raises(StageError) as error, run(tmp_path, epochs=2, seed=0):
        pass
    assert str(error.value) == (
        f"job: output: {str(tmp_path)!r} holds a job with other settings (epochs: 1 there, 2 given); choose another "
        "directory, or give --overwrite to move what is in the way to previous-<n>/ in it"
    )
    assert tree(tmp_path) == before


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "out").write_text("x")
    refused(tmp_path / "out", f"job: output: {str(tmp_path / 'out')!r} is a file, expected a directory")


def test_overwrite_moves_what_is_in_the_way_and_touches_nothing_else(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("precious")
    (tmp_path / "notes").write_text("mine too")
    for epochs in (1, 2):
        for _ in range(2):  # the second time it is the same job, which goes on
            with run(tmp_path, overwrite=True, epochs=epochs) as job:
                job.directory("model", fill(f"epochs {epochs}"))
    found = tree(tmp_path)
    assert found["previous-1/model/mine"] == "precious"
    assert found["previous-2/model/sub/weights"] == "epochs 1"
    assert found["model/sub/weights"] == "epochs 2"
    assert found["notes"] == "mine too"
    assert not (tmp_path / "previous-3").exists()


def test_a_second_run_at_the_same_time_is_refused(tmp_path):
    with run(tmp_path):
        refused(tmp_path, f"job: output: {str(tmp_path)!r} is in use by another run")
    with run(tmp_path):
        pass


def test_a_stage_that_was_tampered_with_is_refused(tmp_path):
    with run(tmp_path) as job:
        job.directory("model", fill("twelve bytes"))
    weights = tmp_path / "model" / "sub" / "weights"
    weights.write_text("short")
    with run(tmp_path) as job, pytest.raises(StageError) as error:
        job.directory("model", fill("x"))
    assert str(error.value) == (
        f"job: {str(weights)!r}: expected the 12 bytes that this job wrote, got 5; move {str(tmp_path / 'model')!r} "
        "away to have it made again"
    )
    weights.unlink()
    with run(tmp_path) as job, pytest.raises(StageError, match="that this job wrote, got no file; move "):
        job.directory("model", fill("x"))


def test_a_directory_of_the_users_in_the_place_of_a_stage_is_refused(tmp_path):
    with run(tmp_path) as job:
        (tmp_path / "model").mkdir()
        with pytest.raises(StageError) as error:
            job.directory("model", fill("x"))
    assert str(error.value) == (
        f"job: {str(tmp_path / 'model')!r} is in the way: this job did not make it; move it away"
    )


def test_full_disk_keeps_the_old_file(tmp_path):
    """A real write error: the process may write no file beyond 4096 bytes."""
    file = tmp_path / "report.json"
    write_json(file, {"old": True})
    script = f"""
import resource, signal
from pathlib import Path
from distilbert_fast.runs.run_directory import write_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_file(Path({str(file)!r}), b"x" * 100_000)
except OSError as error:
    print(error.strerror)
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "File too large\n"
    assert json.loads(file.read_text()) == {"old": True}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_write_file_replaces(tmp_path):
    file = tmp_path / "x"
    write_file(file, b"one")
    write_file(file, b"two")
    assert file.read_bytes() == b"two"


# Damage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model/sub/weights", "model/stage.json", "numbers.json", ".job.json"])
def test_bits_ends_and_edits(tmp_path, name):
    def load() -> tuple[object, object]:
        with run(tmp_path) as job:
            made = job.directory("model", fill("some weights")), job.result("numbers.json", lambda: {"n": 1.5})
            return made, (tmp_path / "model" / "sub" / "weights").read_text()

    want, file = load(), tmp_path / name
    content = file.read_bytes()
    edits = edited(json.loads(content), 2, 60) if name.endswith("json") else ()
    damages = [*flipped(content, 0, 60), *cut(content, 1, 5), *edits]

    def named() -> object:
        try:
            return load()
        except StageError as error:  # of other settings it names the directory
            raise (FileError(f"{file}: {error}") if "other settings" in str(error) else error) from None

    assert assert_refused_or_same(file, iter(damages), named, lambda found: found == want) > 0.8 * len(damages)


def test_a_flipped_bit_in_a_finished_stage(tmp_path):
    with run(tmp_path) as job:
        job.directory("model", fill("twelve bytes"))
    weights = tmp_path / "model" / "sub" / "weights"
    weights.write_text("twelve bytet")
    with run(tmp_path) as job, pytest.raises(StageError) as error:
        job.directory("model", fill("x"))
    assert str(error.value) == (
        f"job: {str(weights)!r}: its contents are not what this job wrote: they do not fit their checksum; move "
        f"{str(tmp_path / 'model')!r} away to have it made again"
    )


@pytest.mark.parametrize("how", ["two stages swapped", "of another run"])
def test_a_stage_in_the_place_of_another(tmp_path, how):
    def made(path: Path, **settings: object) -> object:
        with run(path, **settings) as job:
            stages = [job.directory(name, fill(name)) for name in ("model", "student")]
            return stages, [job.result(name, lambda n=name: {"n": n}) for name in ("a.json", "b.json")]

    here, there = tmp_path / "here", tmp_path / ("here" if "swapped" in how else "there")
    made(here)
    made(there, **({} if here == there else {"epochs": 2}))
    for one, other in (("model", "student"), ("a.json", "b.json")):
        other = other if here == there else one
        pairs = ((here / one, tmp_path / "kept"), (there / other, here / one), (tmp_path / "kept", there / other))
        for source, target in pairs:
            source.rename(target)
        file = here / one / "stage.json" if one == "model" else here / one
        what = f"that of {other!r}" if here == there else "that of another run"
        with pytest.raises(StageError) as error:
            made(here)
        assert str(error.value) == (
            f"job: {str(file)!r}: expected the stage {one!r} of this run, got {what}; "
            "move it away to have it made again"
        )
        for source, target in [(target, source) for source, target in reversed(pairs)]:
            source.rename(target)
        made(here)


def test_settings_that_are_equal_are_the_same_run(tmp_path):
    with run(tmp_path, epochs=1) as job:
        job.directory("model", fill("one"))
    with run(tmp_path, epochs=1.0) as job:
        assert job.directory("model", fill("x")) == {"said": "one"}


def test_results_are_checked_when_they_are_read(tmp_path):
    said, number = record({"said": text()}), record({"n": integer()})
    with run(tmp_path) as job:
        job.directory("model", fill("one"), said)
        job.result("n.json", lambda: {"n": 1}, number)
        write_json(tmp_path / "n.json", {})
        with pytest.raises(StageError) as error:
            job.result("n.json", dict, number)
        assert str(error.value) == (
            f"job: {str(tmp_path / 'n.json')!r}: n must be given, got nothing; move it away to have it made again"
        )
        file = tmp_path / "model" / "stage.json"
        write_json(file, {"files": {"sub/weights": 3}, "result": {}})
        with pytest.raises(StageError) as error:
            job.directory("model", fill("x"), said)
        assert str(error.value) == (
            f"job: {str(file)!r}: result: said must be given, got nothing; move it away to have it made again"
        )


TIMED = {"median": 1.0, "low": 1.0, "high": 2.0}
SPEED = {
    **{"date": "2026", "machine": {"cpu": "x", "cores": 2, "system": "y"}},
    "environment": {"python": "3", "versions": {"torch": "2", "triton": None}, "cpu": {"tier": "avx2"}},
    "inputs": {"latency_rows": 1, "throughput_rows": 2, "mean_tokens": 3.5, "threads": 1, "device": "cpu"},
    "speed": {"latency_ms": {"teacher": TIMED}, "throughput": {"teacher": TIMED}},
}
MODEL = {
    **{"title": "teacher", "seconds": 0.0, "losses": [], "architecture": "BERT", "layers": 2, "parameters": 9},
    **{"file_bytes": 36, "quality": {"accuracy": 0.5}, "int8": {"accuracy": 0.5}},
}


@pytest.mark.parametrize("value, check", [(SPEED, stage_results.speed), (MODEL, stage_results.distilled)])
def test_results_that_a_report_cannot_use(value, check, tmp_path):
    """As an earlier version left them, without a checksum."""
    with run(tmp_path) as job:
        write_json(tmp_path / "x.json", value)
        assert job.result("x.json", dict, check) == value
        wrongs = [{}, *({k: v for k, v in value.items() if k != lost} for lost in value)]
        wrongs += [{**value, name: [0]} for name in value]
        for wrong in wrongs:
            write_json(tmp_path / "x.json", wrong)
            with pytest.raises(StageError, match=re.escape(repr(str(tmp_path / "x.json")))):
                job.result("x.json", dict, check)


def test_stages_of_an_earlier_version_are_read(tmp_path):
    with run(tmp_path) as job:
        job.directory("model", fill("one"))
    record = tmp_path / "model" / "stage.json"
    write_json(record, {"files": {"sub/weights": 3}, "result": {"said": "one"}})
    with run(tmp_path) as job:
        assert job.directory("model", fill("x")) == {"said": "one"}
        for wrong in ({"files": {}}, {"files": {"a": -1}, "result": {}}, {"files": None, "result": {}}, []):
            write_json(record, wrong)
            with pytest.raises(StageError, match=f"^job: {re.escape(repr(str(record)))}: "):
                job.directory("model", fill("x"))

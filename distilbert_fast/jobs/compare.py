"""The models of DistilBERT's tables side by side on this machine: the command `compare`.

Each contender is a process of its own, which takes turns with one of BERT-base under transformers, so that a slow spell
of the machine falls on both; ratios are taken inside a turn. A row is measured once: the same command continues.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from distilbert_fast import backends
from distilbert_fast.data.stsb_lengths import PairLengths, spread_over, stsb_pairs, words
from distilbert_fast.data.tasks import read_split
from distilbert_fast.evaluation import comparison_report
from distilbert_fast.files.durable import write_file
from distilbert_fast.files.schema import anything, integer, mapping, record
from distilbert_fast.jobs.contenders import CONTENDERS, OURS, REFERENCE, Contender, Made, make
from distilbert_fast.jobs.evaluate import AUTO, TRANSFORMERS, Settings, evaluate
from distilbert_fast.jobs.flow import console, find_teacher, machine
from distilbert_fast.jobs.settings import RecipeError, class_names, refused, require
from distilbert_fast.modeling.loading import checkpoint_digest, load_tokenizer, locate, without_bars
from distilbert_fast.runs.run_directory import RunDirectory

JOB = "compare"
BATCH = 32
_HEAD = "SequenceClassification"
_ROW = record(
    {
        **dict.fromkeys(("parameters", "with_head", "file_bytes", "flops", "peak_bytes"), integer(0)),
        **dict.fromkeys(("latency_ms", "throughput", "cold_start_s", "times_reference"), mapping(anything)),
    },
    others=True,
)


@dataclasses.dataclass(frozen=True)
class Workload:
    """How much is measured.

    Attributes:
        pairs: of a turn at batch 1.
        batches: of 32 pairs, of a turn at batch 32.
        turns: of each contender beside BERT-base.
        starts: processes whose start is timed.
        threads: of each process.
        size: "base", or "tiny" for a trial.
    """

    pairs: int = 40
    batches: int = 1
    turns: int = 5
    starts: int = 2
    threads: int = dataclasses.field(default_factory=lambda: len(os.sched_getaffinity(0)))
    size: str = "base"

    def check(self) -> None:
        """Raise RecipeError for a number out of range."""
        for name in ("pairs", "batches", "turns", "starts", "threads"):
            require(getattr(self, name) >= 1, f"{JOB}: {name}", "1 or more", getattr(self, name))


QUICK = Workload(pairs=10, batches=1, turns=2, starts=1)


def compare(
    output: Path,
    only: Sequence[str] = (),
    models: Sequence[str] = (),
    task: str | None = None,
    data: Path | None = None,
    plan: Workload | None = None,
    overwrite: bool = False,
    command: str = "",
    say: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Measure the contenders, write compare.json, .png and .html into ``output``, and return what the JSON says.

    Args:
        only: names of contenders, or shell patterns; all if there are none.
        models: NAME=PATH, checkpoints that stand in for random weights.
        task, data: labelled rows: their lengths count instead of those of STS-B, and checkpoints are scored on them.
        overwrite: move what is in the way in ``output`` to previous-1/.

    Raises:
        RecipeError: a name, a path or a file that cannot be used, by name.
        StageError: an output that holds something else.
    """
    plan, say = plan or Workload(), say or console()
    plan.check()
    names = chosen(only)
    checkpoints = _checkpoints(models)
    pairs = stsb_pairs() if data is None else _pairs(task, data, checkpoints)
    settings = {
        **dataclasses.asdict(plan),
        "models": {name: f"{path} ({checkpoint_digest(path)[:12]})" for name, path in checkpoints.items()},
        "data": None if data is None else data.name,
        "lengths": [sum(pair.tokens for pair in pairs), len(pairs)],
        "cpu": machine()["cpu"],
    }
    files = {name: f"row-{name.replace(':', '-')}.json" for name in CONTENDERS}
    entries = [*files.values(), *comparison_report.FILES]
    rows: dict[str, Any] = {}
    with RunDirectory(output, JOB, settings, entries, overwrite) as run, _Field(plan, checkpoints, pairs) as field:
        for number, name in enumerate(names, start=1):
            title = f"[{number}/{len(names)}] {CONTENDERS[name].title}"
            if run.is_complete(files[name]):
                say(f"{title}: done before")
            else:
                say(title)

            def measure(name: str = name) -> dict[str, Any]:
                row = field.measure(CONTENDERS[name])
                scored = _scores(field, CONTENDERS[name], task, data)
                field.discard(CONTENDERS[name])
                return row | ({"scores": scored} if scored else {})

            run.result(files[name], measure, _ROW)
        for name, file in files.items():  # those of earlier runs, too
            if run.is_complete(file):
                rows[name] = run.result(file, dict, _ROW)
        content = {
            "command": command,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "environment": backends.report(),
            "settings": run.settings,
            "inputs": {
                "threads": plan.threads,
                "device": "cpu",
                "pairs": len(pairs),
                "mean_tokens": statistics.mean(pair.tokens for pair in pairs),
                "flops_tokens": field.typical.tokens,
                "of": "STS-B's development set" if data is None else data.name,
            },
            "rows": rows,
        }
        for file, made in comparison_report.files(content).items():
            write_file(run.path / file, made)
    say(comparison_report.table(content), *comparison_report.notes(content))
    say(f"written to {output}: {', '.join(comparison_report.FILES)}")
    return content


def chosen(only: Sequence[str]) -> list[str]:
    """The contenders that patterns name, in their own order. Raises RecipeError for one that names none."""
    for pattern in only:
        if not fnmatch.filter(CONTENDERS, pattern):
            raise RecipeError(f"{JOB}: only: expected some of {', '.join(CONTENDERS)}, got {pattern!r}")
    return [name for name in CONTENDERS if not only or any(fnmatch.fnmatchcase(name, p) for p in only)]


def _checkpoints(models: Sequence[str]) -> dict[str, Path]:
    known = list(dict.fromkeys(name for one in CONTENDERS.values() for name in one.takes))
    found = {}
    for given in models:
        name, sign, path = given.partition("=")
        if not (sign and path and name in known):
            raise RecipeError(f"{JOB}: model: expected NAME=PATH, NAME being {', '.join(known)}, got {given!r}")
        with refused(f"{JOB}: model"):
            found[name] = locate(path)
    return found


def _pairs(task: str | None, data: Path, checkpoints: Mapping[str, Path]) -> list[PairLengths]:
    """The sizes of a file's rows, as the tokenizer of the first checkpoint counts them, or that of the extra 'demo'."""
    with refused():
        split = read_split(JOB, "data", data, task)
    source = next(iter(checkpoints.values()), None) or find_teacher(job=JOB, option="model NAME=PATH")
    tokenizer: Any = load_tokenizer(source, _HEAD)
    texts = [texts for texts, _ in split.rows]
    ids = tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, max_length=512)["input_ids"]
    return [
        PairLengths(len(of), words(row[0]), words(row[1]) if len(row) > 1 else 1)
        for of, row in zip(ids, texts, strict=True)
    ]


def _scores(field: _Field, one: Contender, task: str | None, data: Path | None) -> dict[str, float]:
    """How good the model is that was measured, where it came from a checkpoint and there is data."""
    if data is None or field.checkpoint(one) is None:
        return {}
    way = AUTO if one.runs_on == OURS else TRANSFORMERS
    directory = field.directory(one)
    is_number = task is None and len(class_names(directory)) == 1
    found = evaluate(task, data, [str(directory)], Settings((way,), batch_size=BATCH), is_number)
    return found[0].scored.metrics


class _Process:
    """A contender's process, and what it answers."""

    def __init__(self, one: Contender, directory: Path, threads: int, first: PairLengths) -> None:
        given = {"name": one.name, "directory": str(directory), "threads": threads, "first": first}
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # close() does
        self.one = one
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distilbert_fast.jobs.compare_worker", json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment | {"HF_HUB_OFFLINE": "1"},
            text=True,
        )
        try:
            self._read()
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - start

    def ask(self, **what: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "its process ended"}
        if "error" in answer:
            self.process.wait()
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or [""])[-1]
            raise RecipeError(f"{JOB}: {self.one.name}: {answer['error']}" + ("" if line else f": {last}"))
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            stream.close()


class _Field:
    """Where models lie while they are measured, and the process of BERT-base, which stays.

    A second process of BERT-base is measured beside the first: how far their ratio is from 1 says how noisy a run was.
    """

    def __init__(self, plan: Workload, checkpoints: Mapping[str, Path], pairs: Sequence[PairLengths]) -> None:
        self.plan, self.checkpoints = plan, checkpoints
        self.single = spread_over(pairs, plan.pairs)
        self.batched = spread_over(pairs, plan.batches * BATCH)
        for sample in (self.single, self.batched):
            random.Random(0).shuffle(sample)
        self.typical = spread_over(pairs, 1)[0]  # of median length
        self.made: dict[str, Made] = {}
        self.reference: _Process | None = None

    def __enter__(self) -> _Field:
        self.place = tempfile.TemporaryDirectory(prefix="compare-")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.reference is not None:
            self.reference.close()
        self.place.cleanup()

    def directory(self, one: Contender) -> Path:
        return Path(self.place.name) / one.name.replace(":", "-")

    def discard(self, one: Contender) -> None:
        """Remove a model's files, but for those of BERT-base."""
        if one.name != REFERENCE:
            shutil.rmtree(self.directory(one))

    def checkpoint(self, one: Contender) -> Path | None:
        return next((self.checkpoints[name] for name in one.takes if name in self.checkpoints), None)

    def measure(self, one: Contender) -> dict[str, Any]:
        """All that a row holds."""
        plan, reference = self.plan, CONTENDERS[REFERENCE]
        if self.reference is None:
            self._make(reference)
            self.reference = self._start(reference)
        made = self._make(one)
        starts = []
        for _ in range(plan.starts - 1):
            process = self._start(one)
            starts.append(process.start_seconds)
            process.close()
        with closing(self._start(one)) as process:
            starts.append(process.start_seconds)
            clocks = {"latency": (self.single, 1), "throughput": (self.batched, BATCH)}
            turns: dict[str, list[tuple[float, float]]] = {name: [] for name in clocks}
            for _ in range(plan.turns):
                for name, (pairs, size) in clocks.items():
                    asked = {"pairs": pairs, "batch": size}
                    turns[name].append((self.reference.ask(**asked)["seconds"], process.ask(**asked)["seconds"]))
            peak = process.ask(peak=True)["peak_bytes"]
        given = self.checkpoint(one)
        return {
            "title": one.title,
            "weights": "random" if given is None else str(given),
            **dataclasses.asdict(made),
            "latency_ms": _over_turns(1e3 * own / plan.pairs for _, own in turns["latency"]),
            "throughput": _over_turns(len(self.batched) / own for _, own in turns["throughput"]),
            "times_reference": {name: _over_turns(other / own for other, own in of) for name, of in turns.items()},
            "peak_bytes": peak,
            "cold_start_s": _over_turns(starts),
        }

    def _make(self, one: Contender) -> Made:
        if one.name not in self.made:
            with refused(f"{JOB}: {one.name}"), without_bars():
                self.made[one.name] = make(one, self.directory(one), self.plan.size, self.checkpoint(one), self.typical)
        return self.made[one.name]

    def _start(self, one: Contender) -> _Process:
        return _Process(one, self.directory(one), self.plan.threads, self.typical)


def _over_turns(values: Iterable[float]) -> dict[str, float]:
    found = list(values)
    return {"median": statistics.median(found), "low": min(found), "high": max(found)}

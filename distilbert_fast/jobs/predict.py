"""What `distilbert-fast predict` runs: the answers of a model to the rows of a file, in shards that a killed run keeps.

    rows → tokens → answers → shards → the output

Reading and tokenizing, computing, and writing each have a thread. Rows are taken in windows, of which each is sorted by
length; some windows make a shard, which is complete or not there. A later run of the same settings reads the rows of
complete shards, compares their digest, and goes on after them, so that its output is byte for byte that of a run that
nobody stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distilbert_fast.data.rows import STANDARD_INPUT, Rows
from distilbert_fast.files import schema
from distilbert_fast.files.durable import hidden, raise_disk_error, replacing
from distilbert_fast.jobs.predict_engines import AnswerEngine, Here, OnRay, Window
from distilbert_fast.jobs.predict_input import JOB, TaskTexts, raw
from distilbert_fast.jobs.predict_output import (
    REJECTED,
    WRITERS,
    Answered,
    Parquet,
    Writer,
    join_lines,
    write_refused,
)
from distilbert_fast.jobs.settings import RecipeError, refused, require
from distilbert_fast.modeling.accelerator import explain
from distilbert_fast.modeling.loading import checkpoint_digest, locate
from distilbert_fast.runs.run_directory import RunDirectory
from distilbert_fast.serving.ahead import ahead
from distilbert_fast.serving.predictor import BATCH_TOKENS, Predictor
from distilbert_fast.serving.tasks import name_of

ENGINES = ("here", "ray")
_MARKER = f".{JOB}.json"  # of RunDirectory
SHARD_ROWS, SHARD_BYTES = 16384, 2**28
_RESULT = schema.record(
    {
        **dict.fromkeys(("rows", "written", "rejected", "truncated", "tokens", "bytes"), schema.integer(0)),
        "digest": schema.text("[0-9a-f]{32}"),
    }
)


def predict(
    model: str | Path,
    input: str | Path,
    output: str | Path,
    task: str | None = None,
    *,
    columns: Sequence[str] = (),
    keep: Sequence[str] | None = None,
    form: str | None = None,
    precision: str | None = None,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    shard_rows: int = SHARD_ROWS,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    packed: Path | None = None,
    engine: str = "here",
    workers: int | None = None,
    threads: int = 1,
    each_shard: Callable[[Mapping[str, Any]], None] = lambda totals: None,
) -> dict[str, Any]:
    """Write the answers of a model to the rows of a file, in their order, with the other columns.

    Args:
        model: directory or hub id.
        input: .jsonl, .csv, .tsv, .txt or .parquet; "-": standard input.
        output: .jsonl or .parquet.
        task, precision, max_length, batch_tokens, options: see ``Predictor``.
        columns: of the text, or of the two texts; by default those that are named as usual.
        keep: columns that are written beside the answer; None: all.
        form: of standard input: "jsonl", "csv", "tsv" or "txt".
        shard_rows: rows after which what is done is kept; rounded up to whole windows, and fewer where rows are large.
        overwrite: replace the output, and start again where another run's shards are there.
        packed: a file for packed weights, which processes then share, see ``Predictor.load``.
        engine: "here": this process computes; "ray": workers of a Ray cluster do, with the same answers.
        workers, threads: of Ray: how many workers, by default as many as the cluster has cores for, and the threads of
            each.
        each_shard: called with the totals so far after each shard.

    Returns:
        "rows" read, "written", "rejected", "truncated", "resumed_rows", "tokens"; "seconds" and "rows_per_second" of
        this run; "engine", "served" and "fallbacks", see ``explain``; "output" and "rejected_file", None if there is
        none.

    Raises:
        RecipeError: what a user can mend, by name.
        CheckpointError, StageError, OSError: a model or a directory that cannot be used; the disk is full. Complete
            shards stay.
    """
    output = Path(output)
    _check_output(input, output, overwrite)
    require(shard_rows >= 1, f"{JOB}: shard_rows", "1 or more", shard_rows)
    with refused():
        rows = Rows(JOB, input, form)
    require(engine in ENGINES, f"{JOB}: engine", " or ".join(ENGINES), repr(engine))
    directory = locate(model)
    with refused(JOB):
        sizes = {"max_length": max_length, "batch_tokens": batch_tokens, **(options or {})}
        given = {"source": directory, "task": task, "precision": precision, "packed": packed, **sizes}
        predictor = Predictor.load(**given)
    require(threads >= 1, f"{JOB}: threads", "1 or more", threads)
    made = Here(predictor) if engine == "here" else OnRay(given, workers, threads)
    run = _Run(predictor, rows, output, columns, keep, shard_rows, overwrite, made)
    settings = run.settings(checkpoint_digest(directory), precision)
    try:
        return run.run(settings, each_shard)
    finally:
        rows.close()


def _check_output(input: str | Path, output: Path, overwrite: bool) -> None:
    suffix = output.suffix.lower()
    require(suffix in WRITERS, f"{JOB}: output", f"a name that ends with {' or '.join(WRITERS)}", repr(str(output)))
    begun = (_parts(output) / _MARKER).is_file()  # a run that was killed at its end may have written the rejected rows
    for path in (output, _rejected(output)):
        if path.is_dir() or (path.exists() and not (overwrite or (begun and path != output))):
            raise RecipeError(f"{JOB}: output: {str(path)!r} is there already; give --overwrite or another file")
    if str(input) != STANDARD_INPUT and output.exists() and output.samefile(input):
        raise RecipeError(f"{JOB}: output: {str(output)!r} is the input; choose another file")


def _parts(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")


def _remove(parts: Path) -> None:
    """Remove a directory at once, or not at all."""
    gone = hidden(parts, "removed")
    shutil.rmtree(gone, ignore_errors=True)  # of a run that was killed here
    if parts.exists():
        parts.rename(gone)
        shutil.rmtree(gone)


def _rejected(output: Path) -> Path:
    return output.with_name(f"{output.name}.{REJECTED}")


class _Run:
    """One run: where rows come from, what is done with them, where answers go."""

    def __init__(
        self,
        predictor: Predictor,
        rows: Rows,
        output: Path,
        columns: Sequence[str],
        keep: Sequence[str] | None,
        shard_rows: int,
        overwrite: bool,
        engine: AnswerEngine,
    ) -> None:
        self.engine = engine
        self.predictor, self.output, self.rows, self.keep = predictor, output, rows, keep
        self.shard_rows, self.overwrite = shard_rows, overwrite
        self.parts = _parts(output)
        self.texts = TaskTexts(rows, predictor.task, columns, keep)
        self.writer: Writer = WRITERS[output.suffix.lower()](rows, predictor.task.columns(), keep)

    def _windows(self) -> Iterator[Window]:
        for rows in self.texts.windows():
            faults = [self.texts.fault(row) for row in rows]
            texts: list[Any] = [None if why else self.texts.of(row) for row, why in zip(rows, faults, strict=True)]
            yield Window(rows, texts, faults, raw(rows))

    # What is written ----------------------------------------------------------------------------------------------

    def settings(self, model: str, precision: str | None) -> dict[str, Any]:
        """What the output depends on, besides the rows."""
        task = self.predictor.task
        return {
            "model": model,
            "task": name_of(task),
            **{name: value for name, value in dataclasses.asdict(task).items()},
            "precision": precision,
            "max_length": self.predictor.max_length,
            "batch_tokens": self.predictor.batch_tokens,
            "columns": list(self.texts.columns),
            "keep": None if self.keep is None else list(self.keep),
            "format": self.rows.form,
            "output": self.output.suffix.lower(),
            "shard_rows": self.shard_rows,
            "input": self.rows.identity,
        }

    def run(self, settings: dict[str, Any], each_shard: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
        self._claim(settings)
        start = time.perf_counter()
        totals = dict.fromkeys(("rows", "written", "rejected", "truncated", "tokens", "bytes"), 0)
        with RunDirectory(self.parts, JOB, json.loads(json.dumps(settings)), [_name(0)]) as directory, _bar() as bar:
            of = self.rows.size
            shown = bar.add_task(JOB, total=of, rows=0, rate="")

            def add(result: Mapping[str, Any]) -> None:
                for name in totals:
                    totals[name] += result[name]
                each_shard(totals)

            number = self._finished(directory, add)
            resumed = totals["rows"]
            done = 0

            def show(window: Window) -> None:
                nonlocal done
                done += len(window.rows)
                rate = done / max(time.perf_counter() - start, 1e-9)
                step = len(window.rows) if self.rows.form == "parquet" else len(window.text)
                bar.update(shown, advance=step, rows=resumed + done, rate=f"{rate:,.0f} rows/s")

            bar.update(shown, completed=resumed if self.rows.form == "parquet" else totals["bytes"], rows=resumed)
            answered = ahead(self.engine.answered(self._windows()))
            try:
                for first in answered:
                    windows = itertools.chain([first], answered)
                    add(directory.directory(_name(number), partial(self._shard, windows, show), _RESULT))
                    number += 1
            except OSError as error:
                kept = f"the {number} finished shards are kept in {str(self.parts)!r}: the same command continues"
                raise_disk_error(error, f"{JOB}: could not write {str(self.output)!r}", kept)
                raise
            finally:
                answered.close()
            self._join(number, totals["rejected"])
        _remove(self.parts)
        return self._summary(totals, resumed, time.perf_counter() - start)

    def _claim(self, settings: dict[str, Any]) -> None:
        """Refuse shards of a run with other settings, or remove them where that was asked for."""
        marker = self.parts / _MARKER
        if not marker.is_file():
            return
        there = schema.read_json(marker, schema.mapping(schema.anything))
        asked = json.loads(json.dumps(settings))
        if there == asked:
            return
        if self.overwrite:
            _remove(self.parts)
            return
        keys = [key for key in {**there, **asked} if there.get(key) != asked.get(key)]
        changes = ", ".join(f"{key}: {there.get(key)} there, {asked.get(key)} given" for key in keys)
        raise RecipeError(
            f"{JOB}: output: {str(self.parts)!r} holds the shards of a run with other settings ({changes}); give "
            "--overwrite to start again, or another file"
        )

    def _finished(self, directory: RunDirectory, add: Callable[[Mapping[str, Any]], None]) -> int:
        """Pass over the rows of the shards that are complete; return how many there are."""
        number = 0
        while directory.is_complete(name := _name(number)):
            result = directory.directory(name, _unreachable, _RESULT)
            count, digest = 0, xxhash.xxh3_128()
            for row in itertools.islice(self.texts.given, result["rows"]):
                count += 1
                digest.update(raw([row]))
            if count != result["rows"] or digest.hexdigest() != result["digest"]:
                raise RecipeError(
                    f"{self.rows.source}: has changed since {str(self.parts / name)!r} was made of its rows; give "
                    "--overwrite to start again"
                )
            if number == 0 and isinstance(self.writer, Parquet):
                self.writer.resume(self.parts / name / f"rows{self.writer.suffix}")
            add(result)
            number += 1
        return number

    def _shard(
        self, windows: Iterator[tuple[Window, list[Answered]]], show: Callable[[Window], None], path: Path
    ) -> dict[str, Any]:
        """Write windows until they hold the rows of a shard; return its counts."""
        counts = dict.fromkeys(("rows", "truncated", "tokens", "bytes"), 0)
        digest = xxhash.xxh3_128()

        def taken() -> Iterator[list[Answered]]:
            for window, answered in windows:
                yield answered
                counts["rows"] += len(answered)
                counts["truncated"] += sum(one.truncated for one in answered)
                counts["tokens"] += sum(one.tokens for one in answered)
                counts["bytes"] += len(window.text)
                digest.update(window.text)
                show(window)
                if counts["rows"] >= self.shard_rows or counts["bytes"] >= SHARD_BYTES:
                    return

        turned_away = self.writer.write(taken(), path / f"rows{self.writer.suffix}")
        write_refused(turned_away, self.rows.by, path / REJECTED)
        rejected = len(turned_away)
        found = {"written": counts["rows"] - rejected, "rejected": rejected, "digest": digest.hexdigest()}
        return counts | found

    def _join(self, shards: int, rejected: int) -> None:
        paths = [self.parts / _name(number) for number in range(shards)]
        try:
            if rejected:
                with replacing(_rejected(self.output)) as partial:
                    join_lines([path / REJECTED for path in paths], partial)
            else:
                _rejected(self.output).unlink(missing_ok=True)
            with replacing(self.output) as partial:
                self.writer.join([path / f"rows{self.writer.suffix}" for path in paths], partial)
        except OSError as error:
            kept = f"all {shards} shards are kept in {str(self.parts)!r}: the same command joins them"
            raise_disk_error(error, f"{JOB}: could not write {str(self.output)!r}", kept)
            raise

    def _summary(self, totals: Mapping[str, int], resumed: int, seconds: float) -> dict[str, Any]:
        found = explain(self.predictor.model)
        rejected = _rejected(self.output)
        return {
            **{name: count for name, count in totals.items() if name != "bytes"},
            "resumed_rows": resumed,
            "seconds": round(seconds, 3),
            "rows_per_second": round((totals["rows"] - resumed) / seconds, 1),
            "engine": found.engine,
            "served": found.served,
            "fallbacks": found.fallbacks,
            "output": str(self.output),
            "rejected_file": str(rejected) if totals["rejected"] else None,
        }


def _name(number: int) -> str:
    return f"shard-{number:06}"


def _unreachable(path: Path) -> Mapping[str, Any]:
    raise AssertionError(f"{path}: complete, and yet to be made")


def _bar() -> Progress:
    """Rows, rate and time left, where somebody looks."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )

"""What `distilbert-fast evaluate --model` runs: models judged on a task, in any precision, side by side."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilbert_fast.engine.engine import PRECISIONS
from distilbert_fast.evaluation.label_scores import Scores
from distilbert_fast.evaluation.report import as_json
from distilbert_fast.files.durable import write_file
from distilbert_fast.jobs.judges import Judge, judge_of
from distilbert_fast.jobs.score import JOB, Scored
from distilbert_fast.jobs.settings import RecipeError, refused
from distilbert_fast.modeling.accelerator import explain
from distilbert_fast.modeling.architectures import longest_sequence
from distilbert_fast.modeling.loading import load_with_head
from distilbert_fast.modeling.optimize import optimize

TRANSFORMERS, AUTO = "transformers", "auto"
WAYS = (TRANSFORMERS, AUTO, *PRECISIONS)
REPORT = "evaluation.json"


@dataclass(frozen=True)
class Settings:
    """How models are judged.

    Attributes:
        precisions: of `WAYS`: "transformers" is the model's own forward; "auto" is `optimize(model)`, others
            `optimize(model, precision)`.
        batch_size: rows a call.
        max_length: tokens a row; None: as many as the model reads.
        stride: tokens by which windows of a long context overlap; None: 128, or a third of a window.
        output: a directory for the predictions and evaluation.json.
    """

    precisions: Sequence[str] = (TRANSFORMERS,)
    batch_size: int = 32
    max_length: int | None = None
    stride: int | None = None
    output: Path | None = None

    def check(self) -> None:
        """Raise RecipeError for a setting that cannot be."""
        if not self.precisions:
            raise RecipeError(f"{JOB}: precision: expected one or more of {', '.join(WAYS)}, got none")
        for precision in self.precisions:
            if precision not in WAYS:
                raise RecipeError(f"{JOB}: precision: expected of {', '.join(WAYS)}, got {precision!r}")
        for name, given, least in (("batch_size", self.batch_size, 1), ("stride", self.stride, 0)):
            if given is not None and given < least:
                raise RecipeError(f"{JOB}: {name}: expected {least} or more, got {given}")


@dataclass(frozen=True)
class Evaluated:
    """A model in one precision: what its predictions are worth, and how long they took."""

    model: str
    precision: str
    scored: Scored
    seconds: float
    rows: int

    def as_json(self) -> dict[str, Any]:
        scored = self.scored
        return {
            "model": self.model,
            "precision": self.precision,
            "n": scored.count,
            "metrics": scored.metrics,
            "standard_errors": scored.errors,
            **({"types": scored.kinds} if scored.kinds else {}),
            "seconds": self.seconds,
            "rows_per_second": self.rows / self.seconds,
        }


def evaluate(
    task: str | None,
    data: Path | None,
    models: Sequence[str],
    settings: Settings | None = None,
    regression: bool = False,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> list[Evaluated]:
    """Judge each model in each precision.

    Args:
        task, data, regression: as for `score`; without ``data`` the task's data set of the hub.
        models: directories or hub ids.
        say: gets a line for each model, before it runs.

    Raises:
        RecipeError: data or a setting that cannot be used, or a model that does not fit the data.
        CheckpointError: a checkpoint that cannot be read.
    """
    settings = settings or Settings()
    settings.check()
    with refused():
        judge = judge_of(task, data, regression, settings.stride)
    if settings.output is not None:
        settings.output.mkdir(parents=True, exist_ok=True)
    results, names = [], file_names(models)
    for model in models:
        for precision in settings.precisions:
            say(f"{model}, {precision}: {judge.size} {judge.unit}")
            results.append(_evaluated(judge, model, precision, settings, f"{names[model]}-{precision}"))
    if settings.output is not None:
        write_file(settings.output / REPORT, as_json(content(task, data, results)))
    return results


def file_names(models: Sequence[str]) -> dict[str, str]:
    """What each model is called in names of files: the end of its path, of as many parts as tell all models apart."""
    parts = {model: Path(os.path.abspath(model)).parts[1:] for model in models}
    names: dict[str, str] = {}
    for count in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {model: "-".join(of[-count:]) or "model" for model, of in parts.items()}
        if len(set(names.values())) == len(set(parts.values())):
            break
    return names


def content(task: str | None, data: Path | None, results: Sequence[Evaluated]) -> dict[str, Any]:
    """All results as JSON has them; with several models also their median and range in each precision."""
    found = {"task": task, "data": None if data is None else str(data), "results": [one.as_json() for one in results]}
    return found | ({"summary": spread(results)} if len({one.model for one in results}) > 1 else {})


def spread(results: Sequence[Evaluated]) -> dict[str, dict[str, Scores]]:
    """The median, lowest and highest value of each metric over models, such as those of several seeds, by precision."""
    found: dict[str, dict[str, Scores]] = {}
    for precision in dict.fromkeys(one.precision for one in results):
        rows = [one.scored.metrics for one in results if one.precision == precision]
        found[precision] = {
            name: _spread([row[name] for row in rows]) for name in rows[0] if all(name in row for row in rows)
        }
    return found


def _spread(values: Sequence[float]) -> Scores:
    """Median, lowest and highest; undefined (NaN) where one value is."""
    of: dict[str, Callable[[Sequence[float]], float]] = {"median": statistics.median, "low": min, "high": max}
    return {name: math.nan if any(map(math.isnan, values)) else find(values) for name, find in of.items()}


def _evaluated(judge: Judge, source: str, precision: str, settings: Settings, name: str) -> Evaluated:
    model, tokenizer, _ = load_with_head(source, judge.head)
    longest = longest_sequence(model.config)
    length = min(judge.max_length, longest) if settings.max_length is None else settings.max_length
    if not 4 <= length <= longest:
        raise RecipeError(f"{JOB}: max_length: expected 4 to {longest}, the positions of {source!r}, got {length}")
    with refused():
        judge.prepare(model, tokenizer, length)
    if precision != TRANSFORMERS:
        with refused(JOB):
            optimize(model, None if precision == AUTO else precision)
    start = time.perf_counter()
    predicted = judge.predict(model, settings.batch_size, precision == TRANSFORMERS, _bar)
    seconds = time.perf_counter() - start
    if precision != TRANSFORMERS and (fallbacks := explain(model).fallbacks):
        reasons = "; ".join(f"{count} calls: {reason}" for reason, count in fallbacks.items())
        judge.warn(f"{source}, {precision}: transformers' own forward served {reasons}")
    if settings.output is not None:
        for suffix, text in judge.files(predicted).items():
            write_file(settings.output / f"{name}{suffix}", text.encode())
    return Evaluated(source, precision, judge.score(predicted), seconds, judge.size)


def _bar(batches: Sequence[Any]) -> Iterable[Any]:
    """A progress bar on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(batches, "evaluating", console=console, transient=True, disable=not console.is_terminal)

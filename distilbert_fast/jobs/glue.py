"""What `distilbert-fast evaluate glue` runs: a model for each task of GLUE, and their mean.

Wang et al.: GLUE, arXiv:1804.07461.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distilbert_fast.data.published import GLUE, PUBLISHED_TASKS
from distilbert_fast.evaluation.report import as_json
from distilbert_fast.files.durable import write_file
from distilbert_fast.jobs.evaluate import REPORT, Evaluated, Settings, content, evaluate, spread
from distilbert_fast.jobs.score import JOB
from distilbert_fast.jobs.settings import RecipeError

_MODEL_OF = {"mnli_mismatched": "mnli", "ax": "mnli"}  # tasks that the model of another one answers
_APART = ("ax",)  # diagnostics, not part of GLUE's mean


def evaluate_glue(
    models: Sequence[str], data: Path | None, settings: Settings, tasks: Sequence[str] = ()
) -> tuple[dict[str, list[Evaluated]], dict[str, str]]:
    """Judge a model on each task of GLUE, or several.

    Args:
        models: directories or hub ids in which "{task}" stands for the task's name: several for several seeds.
        data: a directory of GLUE's files, "CoLA/dev.tsv" or "cola/dev.tsv" and so on; None: the hub.
        settings: for all.
        tasks: names; () takes those of which there are models and data.

    Returns:
        Results by task, and why other tasks were left out.

    Raises:
        RecipeError: no task is left; or a task that was asked for has no model or no data.
    """
    settings.check()
    for pattern in models:
        if "{task}" not in pattern:
            raise RecipeError(f"{JOB}: model_dir: expected {{task}} where the task's name stands, got {pattern!r}")
    for name in tasks:
        if name not in GLUE:
            raise RecipeError(f"{JOB}: tasks: expected of {', '.join(GLUE)}, got {name!r}")
    runs: dict[str, tuple[Path | None, list[str]]] = {}
    left_out: dict[str, str] = {}
    for name in tasks or GLUE:
        found = [pattern.replace("{task}", _MODEL_OF.get(name, name)) for pattern in models]
        absent = next((one for one in found if _is_local(one) and not Path(one).is_dir()), None)
        file = None if data is None else _file(data, name)
        if absent is not None:
            left_out[name] = f"no model {absent}"
        elif data is not None and file is None:
            left_out[name] = f"no file {data / PUBLISHED_TASKS[name].dev}"
        elif data is None and not PUBLISHED_TASKS[name].hub:
            left_out[name] = "the hub has no labels; give its file in --data-dir"
        else:
            runs[name] = file, found
    if tasks and left_out:
        raise RecipeError(f"{JOB}: glue: " + "; ".join(f"{name}: {why}" for name, why in left_out.items()))
    if not runs:
        raise RecipeError(f"{JOB}: glue: expected a model and a file for at least one task, got none: no {models[0]}")
    results = {}
    for name, (file, found) in runs.items():
        own = settings if settings.output is None else replace(settings, output=settings.output / name)
        results[name] = evaluate(name, file, found, own)
    if settings.output is not None:
        write_file(settings.output / REPORT, as_json(glue_content(results, left_out)))
    return results, left_out


def glue_content(results: dict[str, list[Evaluated]], left_out: dict[str, str]) -> dict[str, Any]:
    """All of it as JSON has it."""
    return {
        "tasks": {name: content(name, None, found) for name, found in results.items()},
        "mean": means(results),
        "left_out": left_out,
    }


def means(results: dict[str, list[Evaluated]]) -> dict[str, float]:
    """GLUE's mean over tasks in each precision: of each the mean of its metrics, of several models the median.

    Both sets of MNLI count as one task, and the diagnostics as none.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for name, rows in results.items():
        if name not in _APART:
            for precision, metrics in spread(rows).items():
                value = statistics.mean(one["median"] for one in metrics.values())
                found.setdefault(precision, {}).setdefault(_MODEL_OF.get(name, name), []).append(value)
    return {precision: statistics.mean(map(statistics.mean, by.values())) for precision, by in found.items()}


def _file(directory: Path, name: str) -> Path | None:
    known = PUBLISHED_TASKS[name].dev
    places = (known, f"{name}/{Path(known).name}", f"{_MODEL_OF.get(name, name)}/{Path(known).name}")
    return next((directory / place for place in places if (directory / place).is_file()), None)


def _is_local(pattern: str) -> bool:
    """Whether a model is a directory, and not an id of the hub, "owner/name"."""
    return pattern.startswith((".", "/", "~")) or pattern.count("/") != 1 or Path(pattern).parent.is_dir()

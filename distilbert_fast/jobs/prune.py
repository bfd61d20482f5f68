"""Prune a sequence classifier on the sentences of its task, and measure what that cost: the command `prune`."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

from distilbert_fast.compression.structure import PruningConfig, PruningReport, prune_model
from distilbert_fast.files.durable import write_file
from distilbert_fast.jobs.flow import console, machine, save
from distilbert_fast.jobs.settings import RecipeError, class_names, config_of, refused, require
from distilbert_fast.jobs.task import TaskJob
from distilbert_fast.modeling.compression_config import METHOD, CompressionConfig
from distilbert_fast.modeling.loading import load_with_head, locate

JOB = "prune"
REPORT = "report.json"


def prune(
    job: TaskJob, model: str | Path, output: Path, config: PruningConfig, sentences: int = 2048, overwrite: bool = False
) -> dict[str, Any]:
    """Prune a model, write it to ``output`` with its tokenizer and ``report.json``, and return what that says.

    Args:
        job: the task: its training rows calibrate, its evaluation rows are measured.
        model: directory or hub id of a classifier with float weights that knows the task's classes.
        sentences: how many of the training rows are used, evenly spread.
        overwrite: replace what is in ``output``.

    Raises:
        RecipeError: a model, a task or an output that cannot be used, by name.
    """
    say = console()
    require(sentences >= 1, f"{JOB}: sentences", "1 or more", sentences)
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not overwrite:
        raise RecipeError(f"{JOB}: output: {str(output)!r} is there already; give --overwrite or another directory")
    directory = _find(model)
    with refused(f"{JOB}: model"):
        whole, tokenizer, _ = load_with_head(directory, job.head)
        if not job.regression:
            job.match_classes(class_names(directory), True)
    job.prepare(tokenizer, directory)
    pruned = copy.deepcopy(whole)
    with refused(JOB):
        _, report = prune_model(pruned, job.calibration(sentences), config)
    say(str(report))
    rows = {"whole": job.evaluate(whole, None), "pruned": job.evaluate(pruned, whole)}
    for name, row in rows.items():
        say(f"{name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in row.items()))
    save(JOB, output, pruned, tokenizer)
    found = {"task": job.describe(), "settings": vars(config), "pruning": as_json(report), "results": rows}
    found |= {"parameters": {"whole": _count(whole), "pruned": _count(pruned)}, "machine": machine()}
    write_file(output / REPORT, json.dumps(found, indent=2).encode())
    say(f"written to {output}")
    return found


def share(amount: float | None, measure: str | None, speedup: float | None) -> tuple[float, str]:
    """The amount and the measure of a `PruningConfig`, where a user gave some of these. Raises RecipeError."""
    if speedup is None:
        return 0.5 if amount is None else amount, measure or "parameters"
    require(amount is None, f"{JOB}: --speedup", "without --amount", "both")
    require(measure in (None, "time"), f"{JOB}: --speedup", "--measure time", measure)
    require(1 < speedup < math.inf, f"{JOB}: speedup", "above 1", f"{speedup:g}")
    return 1 - 1 / speedup, "time"


def _find(model: str | Path) -> Path:
    """The directory of a checkpoint with float weights. Raises RecipeError."""
    with refused(f"{JOB}: model"):
        directory = locate(model)
    settings = config_of(directory).get("quantization_config")
    ours = settings is not None and settings.get("quant_method") == METHOD
    is_float = settings is None or (ours and CompressionConfig.from_dict(settings).is_float)
    require(is_float, f"{JOB}: model: {str(model)!r}", "a model with float weights", "a quantized one")
    return directory


def as_json(report: PruningReport) -> dict[str, Any]:
    """A report as reports of jobs hold it."""
    layers = {
        name: [{"heads": list(layer.heads), "ffn": layer.ffn} for layer in getattr(report, name)]
        for name in ("before", "after")
    }
    return {**layers, **{name: getattr(report, name) for name in ("measure", "cost_before", "cost_after", "errors")}}


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

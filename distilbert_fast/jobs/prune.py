"""Prune a sequence classifier on the sentences of its task, and measure what that cost: the command `prune`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from distilbert_fast.compression.structure import PruningConfig, PruningReport, prune_model
from distilbert_fast.data.sentences import by_length, tokenized
from distilbert_fast.files.durable import write_file
from distilbert_fast.jobs.flow import console, machine, save
from distilbert_fast.jobs.settings import RecipeError, class_names, config_of, refused, require
from distilbert_fast.jobs.task import TaskJob
from distilbert_fast.modeling.compression_config import METHOD, CompressionConfig
from distilbert_fast.modeling.loading import load_with_head, locate

JOB = "prune"
_BATCH = 32
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
        _, report = prune_model(pruned, _calibration(job, tokenizer, sentences), config)
    say(str(report))
    rows = {"whole": job.evaluate(whole, None), "pruned": job.evaluate(pruned, whole)}
    for name, row in rows.items():
        say(f"{name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in row.items()))
    save(JOB, output, pruned, tokenizer)
    found = {"task": job.describe(), "settings": vars(config), "pruning": _as_json(report), "results": rows}
    found |= {"parameters": {"whole": _count(whole), "pruned": _count(pruned)}, "machine": machine()}
    write_file(output / REPORT, json.dumps(found, indent=2).encode())
    say(f"written to {output}")
    return found


def _find(model: str | Path) -> Path:
    """The directory of a checkpoint with float weights. Raises RecipeError."""
    with refused(f"{JOB}: model"):
        directory = locate(model)
    settings = config_of(directory).get("quantization_config")
    ours = settings is not None and settings.get("quant_method") == METHOD
    is_float = settings is None or (ours and CompressionConfig.from_dict(settings).is_float)
    require(is_float, f"{JOB}: model: {str(model)!r}", "a model with float weights", "a quantized one")
    return directory


def _calibration(job: TaskJob, tokenizer: Any, sentences: int) -> list[Any]:
    """Batches of so many training rows of similar length, with labels."""
    texts, labels = job.task.texts(job.task.train), list(job.task.train["label"])
    step = max(len(texts) // sentences, 1)
    chosen = range(0, len(texts), step)[:sentences]
    lengths = [len(ids) for ids in tokenized(tokenizer, [texts[i] for i in chosen], job.max_length)["input_ids"]]
    made = []
    for rows in by_length(lengths, _BATCH):
        own = [chosen[row] for row in rows]
        how: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        batch = tokenized(tokenizer, [texts[i] for i in own], job.max_length, **how)
        made.append({**batch, "labels": batch["input_ids"].new_tensor([labels[i] for i in own])})
    return made


def _as_json(report: PruningReport) -> dict[str, Any]:
    layers = {
        name: [{"heads": list(layer.heads), "ffn": layer.ffn} for layer in getattr(report, name)]
        for name in ("before", "after")
    }
    return {**layers, **{name: getattr(report, name) for name in ("measure", "cost_before", "cost_after", "errors")}}


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

"""Prune a sequence classifier on the sentences of its task, and measure what that cost: the command `prune`.

Heads and neurons, or single weights (connections).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distilbert_fast.compression.connections import SparsityConfig, prune_connections
from distilbert_fast.compression.structure import PruningConfig, PruningReport, prune_model
from distilbert_fast.files.durable import write_file
from distilbert_fast.jobs.cards import card, size_point
from distilbert_fast.jobs.flow import console, machine, save
from distilbert_fast.jobs.settings import RecipeError, class_names, config_of, refused, require
from distilbert_fast.jobs.task import TaskJob
from distilbert_fast.modeling.compression_config import METHOD, CompressionConfig
from distilbert_fast.modeling.loading import load_with_head, locate, without_bars
from distilbert_fast.sparse import SparseLinear

JOB = "prune"
REPORT = "report.json"


def prune(
    job: TaskJob,
    model: str | Path,
    output: Path,
    config: PruningConfig | SparsityConfig,
    sentences: int = 2048,
    overwrite: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Prune a model, write it to ``output`` with its tokenizer, a model card and ``report.json``, and return what that
    says.

    Args:
        job: the task: its training rows calibrate, its evaluation rows are measured.
        model: directory or hub id of a classifier with float weights that knows the task's classes.
        config: of heads and neurons, or of single weights.
        sentences: how many of the training rows heads and neurons are chosen on, evenly spread.
        overwrite: replace what is in ``output``.
        command: what was called, for the model card.

    Raises:
        RecipeError: a model, a task or an output that cannot be used, by name; a result that is not smaller.
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
        if isinstance(config, SparsityConfig):
            made = _as_connections(prune_connections(pruned, config), config)
        else:
            _, report = prune_model(pruned, job.calibration(sentences), config)
            made = as_json(report)
    say(f"left: {_left(made)}" if isinstance(config, SparsityConfig) else str(report))
    before, after = _bytes(whole), _bytes(pruned)
    require(after < before, f"{JOB}: result", f"less than the {before} bytes of weights that there were", after)
    rows = {"whole": job.evaluate(whole, None), "pruned": job.evaluate(pruned, whole)}
    for name, row in rows.items():
        say(f"{name}: {_row(row)}")
    with without_bars():
        save(JOB, output, pruned, tokenizer)
    found = {"task": job.describe(), "settings": vars(config), "pruning": made, "results": rows}
    found |= {"parameters": {"whole": _count(whole), "pruned": _count(pruned)}, "machine": machine()}
    found |= {"bytes": {"whole": before, "pruned": after}}
    write_file(output / REPORT, json.dumps(found, indent=2).encode())
    points = [size_point(after, before), *(f"**{name}:** {_row(row)}" for name, row in rows.items())]
    points += ["**Rows judged:** " + str(len(job.task.eval)), f"**What is left:** {_left(made)}"]
    sparse = isinstance(config, SparsityConfig)
    form, tag = ("with fewer weights", "sparse") if sparse else ("with fewer heads and neurons", "pruned")
    text = card(str(model), pruned, form, "Pruned", tag, points, command)
    write_file(output / "README.md", text.encode())
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


def _as_connections(model: Any, config: SparsityConfig) -> dict[str, Any]:
    """What pruning single weights left, as reports hold it."""
    layers = {name: module.mask for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    left = {name: int(mask.sum()) for name, mask in layers.items()}
    weights = sum(mask.numel() for mask in layers.values())
    return {"method": config.method, "weights": weights, "left": sum(left.values()), "layers": left}


def _left(made: Mapping[str, Any]) -> str:
    """What a report says is left, in words."""
    if "layers" in made:
        share = made["left"] / made["weights"]
        return f"{made['left']} of {made['weights']} weights of {len(made['layers'])} linear layers ({share:.1%})"
    heads, neurons = (
        [sum(count(layer) for layer in made[name]) for name in ("after", "before")]
        for count in (lambda layer: len(layer["heads"]), lambda layer: layer["ffn"])
    )
    return f"{heads[0]} of {heads[1]} heads, {neurons[0]} of {neurons[1]} neurons"


def _row(row: Mapping[str, float]) -> str:
    return ", ".join(f"{metric} {value:.4f}" for metric, value in row.items())


def _count(model: Any) -> int:
    """Of what is left; weights that a mask leaves out are gone."""
    gone = sum(int((~module.mask).sum()) for module in model.modules() if isinstance(module, SparseLinear))
    return sum(parameter.numel() for parameter in model.parameters()) - gone


def _bytes(model: Any) -> int:
    """Of the tensors that ``save_pretrained`` writes."""
    return sum(x.numel() * x.element_size() for x in model.state_dict().values())

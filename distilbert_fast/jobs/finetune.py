"""What `distilbert-fast finetune` runs: an encoder trained on a task's labels, judged, and saved with its card.

    model → speed → report

The stages and the checkpoints are those of `distill`: a command that was killed goes on from where it was.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import set_seed

from distilbert_fast.evaluation import distillation_report as report
from distilbert_fast.files.durable import write_file
from distilbert_fast.files.schema import anything, record
from distilbert_fast.jobs import stage_results
from distilbert_fast.jobs.flow import CHECKPOINTS, console, find_teacher
from distilbert_fast.jobs.job import Job
from distilbert_fast.jobs.settings import RecipeError, Training, check_devices, class_names, refused, require
from distilbert_fast.jobs.trained_flow import TrainedFlow
from distilbert_fast.modeling.architectures import longest_sequence
from distilbert_fast.modeling.loading import checkpoint_digest, load_with_head, without_bars
from distilbert_fast.modeling.optimize import optimize
from distilbert_fast.modeling.training import for_training
from distilbert_fast.runs.processes import Processes, SharedRun, processes
from distilbert_fast.runs.run_directory import RunDirectory

JOB = "finetune"
MODEL, DATA, SPEED = "model", "data.json", "speed.json"
REPORT = ("report.md", "report.json", report.PLOT)


def finetune(
    job: Job,
    output: str | Path,
    model: str | Path | None = None,
    training: Training | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Train a model on the labels of a job, and report what came of it.

    Args:
        job: data and metrics, such as those of task.py, tokens.py and qa.py.
        output: directory for `model/` (with tokenizer and model card), report.md, report.json, losses.png. Killed at
            any moment, the same call continues. Of several processes, all have to see it.
        model: directory or hub id of an encoder, with or without a head; by default that of the extra `demo`.
        training: epochs, batches, learning rate, seed.
        overwrite: see `RunDirectory`.
        command: what the report names as the command that made it.

    Returns:
        The content of report.json.

    Raises:
        RecipeError: data, model or a setting that cannot be used.
        StageError: an output directory that holds something else.
    """
    training, together = training or Training(batch_size=32, learning_rate=5e-5), processes()
    check_devices(together.count, JOB)
    training.check("training", together.count, JOB)
    enough = training.epochs is not None and training.epochs + training.max_steps > 0
    require(enough, f"{JOB}: epochs", "above 0", training.epochs)
    source = find_teacher(model, JOB, "model")
    say = console() if together.is_first else lambda *lines: None
    with without_bars(), together.joined():
        with refused(JOB):
            job.match_classes(class_names(source), kept=False)
            network, _, _ = load_with_head(source, job.head, True, **job.config)
        positions = longest_sequence(network.config)
        require(4 <= job.max_length <= positions, f"{JOB}: max_length", f"4 to {positions}", job.max_length)
        settings = {
            "model": f"{model or source.name} ({checkpoint_digest(source)[:12]})",
            "data": job.describe(),
            "training": dataclasses.asdict(training),
        }
        names = (MODEL, DATA, CHECKPOINTS, SPEED, *REPORT)
        directory = RunDirectory(output, f"{JOB}-{job.name}", settings, names, overwrite)
        with SharedRun(directory, together) as run:
            flow = _Finetuning(training, together, run, source, job, say)
            say(f"{JOB} on {job.describe()['name']}; output: {run.path}")
            with refused(JOB):
                together.in_turn(lambda: job.prepare(flow.tokenizer(), run.path))
            data = record(dict.fromkeys(job.describe(), anything))
            if run.result(DATA, job.describe, data) != job.describe():
                raise RecipeError(
                    f"{JOB}: data: {str(run.path)!r} was made from other data of that name; choose another directory"
                )
            results = flow.build({MODEL: ("the model", flow.train_model)}, stage_results.distilled, 2)
            say("[2/2] speed, report and model card")
            measured = run.result(SPEED, flow.measure, stage_results.speed)
            content = {
                "command": command or "distilbert_fast.jobs.finetune.finetune(...)",
                "kind": job.name,
                "head": job.head,
                "settings": settings,
                "data": job.describe(),
                "metrics": [list(metric) for metric in job.metrics if metric.name in results[MODEL]["quality"]],
                "legend": job.legend,
                "models": results,
                **measured,
            }
            return together.first(lambda: flow.write_report(content))


class _Finetuning(TrainedFlow):
    """The stages of `finetune`."""

    def __init__(self, training: Training, together: Processes, *of_any: Any) -> None:
        super().__init__(JOB, together, training, True, *of_any)

    def train_model(self, path: Path) -> dict[str, Any]:
        set_seed(self.teaching.seed)
        model, tokenizer, random = self.load(self.source, new_head=True, **self.job.config)
        if random:
            self.say(f"      {len(random)} tensors of the head start at random")
        made = self.fit(MODEL, for_training(model), None, self.teaching, self.job.untaught)
        return made | {"title": "fine-tuned"} | self.keep(path, model, tokenizer, None)

    def measure(self) -> dict[str, Any]:
        """Speed by transformers and on the engine, in turns."""
        model, optimized = (self.job.timed(self.load(self.run.path / MODEL)[0]) for _ in range(2))
        place, measured = self.clocks({"transformers": model, "optimize()": optimize(optimized)}, "rows")
        return place | {"speed": measured}

    def write_report(self, content: dict[str, Any]) -> dict[str, Any]:
        for name, written in report.files(content, MODEL, made="fine-tuned").items():
            write_file(self.run.path / name, written)
        files = f"report: {self.run.path / REPORT[0]}; model card: {self.run.path / MODEL / 'README.md'}"
        self.say(report.table(content), *report.busy_lines(content), files)
        return content

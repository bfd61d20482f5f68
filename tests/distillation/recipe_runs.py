"""Distillations by masked language modelling and on a task that die again and again, each time in a new process.

    PYTHONPATH=.:tests python -m distillation.recipe_runs DIR

runs each kind to its end in DIR/KIND/whole, and in DIR/KIND/killed-0, -1, … under SIGKILL at 20 moments: by turns at a
random step of writing and after a random time. A run that comes to its end before it is to die is followed by another.
It prints, for each kind, what the runs were at when they died.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

import datasets
import torch
import transformers
from demo_input import bert, sentences, tsv
from distillation.runs import child, die_at_call, wait

from distilbert_fast.compression import quantize  # noqa: F401  imported before the forks: each would take seconds
from distilbert_fast.distill_jobs import MlmJob, TaskJob
from distilbert_fast.distill_recipes import Recipe, Training, distill
from distilbert_fast.distillation import data, masking, student, trainer  # noqa: F401
from distilbert_fast.evaluation import distillation_report, speed  # noqa: F401
from distilbert_fast.evaluation.tasks import load_task

MOMENTS = 20
COMPARED = {"mlm": "random-init", "task": "without-teacher"}


def run(kind: str, inputs: Path, output: Path, dying: int = 0) -> None:
    if dying:
        die_at_call(dying)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.disable(logging.CRITICAL)
    teaching = Training(epochs=None, batch_size=32, micro_batch=32, learning_rate=1e-2)
    training = Training(epochs=3, batch_size=32, micro_batch=16, learning_rate=5e-3)
    job = {
        "mlm": lambda: MlmJob([str(inputs / "text.txt")], max_length=16, min_length=4, holdout=0.1),
        "task": lambda: TaskJob(load_task(data=inputs / "train.tsv"), max_length=16),
    }[kind]()
    distill(job, output, inputs / "bert", Recipe(training, teaching, kind == "task", compare=[COMPARED[kind]]))


def die(kind: str, inputs: Path, chance: random.Random) -> list[str]:
    """Kill runs until they died often enough, and let the last one end; what each was at."""
    start = time.perf_counter()
    assert wait(child(lambda: run(kind, inputs, inputs / kind / "whole")))
    whole = time.perf_counter() - start
    at: list[str] = []
    number = 0
    while len(at) < MOMENTS:
        output = inputs / kind / f"killed-{number}"
        by_writing = len(at) % 2 == 0
        dying = chance.randint(1, 80) if by_writing else 0
        process = child(lambda output=output, dying=dying: run(kind, inputs, output, dying))
        if not by_writing:
            time.sleep(chance.uniform(0, 0.6 * whole))
            os.kill(process, signal.SIGKILL)
        if wait(process):
            number += 1
        else:
            at.append(stage(kind, output))
    assert wait(child(lambda: run(kind, inputs, output)))
    return at


def stage(kind: str, output: Path) -> str:
    """What a run is at that left this; a part of it that is not there yet, or nothing after the last."""
    if not (output / "data.json").exists():
        return "data"
    return next((name for name in ("teacher", "student", COMPARED[kind]) if not (output / name).exists()), "report")


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    assert wait(child(lambda: bert(directory / "bert", hidden_dropout_prob=0.1)))
    (directory / "text.txt").write_text("\n".join(sentence for sentence, _ in sentences(300, seed=3)))
    tsv(directory / "train.tsv", 160, seed=1)
    chance = random.Random(0)
    print(json.dumps({kind: die(kind, directory, chance) for kind in COMPARED}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

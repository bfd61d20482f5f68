"""Distillations by masked language modelling and on a task that die again and again, each time in a new process.

    PYTHONPATH=.:tests python -m distillation.recipe_runs DIR

runs each kind to its end in DIR/KIND/whole, and in DIR/KIND/killed-0, … under SIGKILL at random moments: by turns
before one of its steps of writing and after some time, at the latest where a stage ends, so that it dies in every one.
It prints in which.
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
from typing import Any

import datasets
import torch
import transformers
from cases import many
from demo_input import bert, sentences, tsv
from distillation.runs import child, die_at_call, wait
from hurried import before_forks

from distilbert_fast.data.tasks import load_task
from distilbert_fast.jobs.distill import Recipe, Training, distill
from distilbert_fast.jobs.mlm import MlmJob
from distilbert_fast.jobs.task import TaskJob

COMPARED = {"mlm": "random-init", "task": "without-teacher"}
MOMENTS = many(4, 20)
STAGES = {"data", "teacher", "student"}  # in which each job dies


def run(kind: str, inputs: Path, output: Path) -> None:
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
    """Kill a run in each of its stages, and let it end; where it was when it died."""
    start = time.monotonic()
    assert wait(child(lambda: run(kind, inputs, inputs / kind / "whole")))
    longest = time.monotonic() - start
    at: list[str] = []
    runs = 0
    while len(at) < MOMENTS or STAGES - set(at):
        output = inputs / kind / f"killed-{runs}"
        target = stage(kind, output)
        by_writing, number, seconds = len(at) % 2 == 0, chance.randint(1, 12), chance.uniform(0, longest)

        def inside(output: Path = output, target: str = target) -> bool:
            return stage(kind, output) == target

        def work(output: Path = output, inside: Any = inside, number: int = number if by_writing else 0) -> None:
            if number:
                die_at_call(number, inside)
            run(kind, inputs, output)

        process = child(work)
        if not by_writing:
            end = time.monotonic() + seconds
            while inside() and time.monotonic() < end:
                time.sleep(0.001)
            os.kill(process, signal.SIGKILL)
        if wait(process):
            runs += 1  # it was quicker: another one
        else:
            at.append(target)
    assert wait(child(lambda: run(kind, inputs, output)))
    return at


def stage(kind: str, output: Path) -> str:
    """What a run is at that left this: the first of its parts that is not there."""
    if not (output / "data.json").exists():
        return "data"
    parts = {"teacher": "teacher", "student": "student", "compared": COMPARED[kind]}
    return next((name for name, part in parts.items() if not (output / part).exists()), "report")


def main(directory: Path) -> None:
    before_forks()
    torch.set_num_threads(1)
    assert wait(child(lambda: bert(directory / "bert", hidden_dropout_prob=0.1)))
    (directory / "text.txt").write_text("\n".join(sentence for sentence, _ in sentences(300, seed=3)))
    tsv(directory / "train.tsv", 160, seed=1)
    chance = random.Random(0)
    print(json.dumps({kind: die(kind, directory, chance) for kind in COMPARED}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

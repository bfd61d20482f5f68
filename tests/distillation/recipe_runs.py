"""A distillation by masked language modelling that dies again and again, each time in a process of its own.

    PYTHONPATH=.:tests python -m distillation.recipe_runs DIR

runs the recipe to its end in DIR/whole, and in DIR/killed under SIGKILL: at random steps of writing, then at random
moments after some steps of training. It prints how often it died.
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
from demo_input import bert, sentences
from distillation.runs import child, die_at_call, wait

from distilbert_fast.compression import quantize  # noqa: F401  imported before the forks: each would take seconds
from distilbert_fast.distill_jobs import MlmJob
from distilbert_fast.distill_recipes import Recipe, Training, distill
from distilbert_fast.distillation import data, masking, student, trainer  # noqa: F401
from distilbert_fast.evaluation import distillation_report, speed  # noqa: F401

WRITES = 4
MOMENTS = (("student", 6), ("student", 15), ("random-init", 3), ("random-init", 12))  # stage and step


def run(inputs: Path, output: Path, dying: int = 0) -> None:
    if dying:
        die_at_call(dying)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.disable(logging.CRITICAL)
    job = MlmJob([str(inputs / "text.txt")], max_length=16, min_length=4, holdout=0.1)
    teaching = Training(epochs=None, batch_size=32, micro_batch=32, learning_rate=1e-2)
    training = Training(epochs=3, batch_size=32, micro_batch=16, learning_rate=5e-3)
    distill(job, output, inputs / "bert", Recipe(training, teaching, train_body=False, compare=["random-init"]))


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    process = child(lambda: bert(directory / "bert", hidden_dropout_prob=0.1))
    assert wait(process)
    text = "\n".join(sentence for sentence, _ in sentences(300, seed=3))
    (directory / "text.txt").write_text(text)
    assert wait(child(lambda: run(directory, directory / "whole")))
    chance, killed = random.Random(0), {"writes": 0, "moments": 0}
    for _ in range(WRITES):
        dying = chance.randint(5, 60)
        killed["writes"] += not wait(child(lambda dying=dying: run(directory, directory / "killed", dying)))
    for stage, step in MOMENTS:
        process = child(lambda: run(directory, directory / "killed"))
        while not reached(directory / "killed", stage, step):
            assert os.waitpid(process, os.WNOHANG) == (0, 0), "the run failed"
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(process, signal.SIGKILL)
        killed["moments"] += not wait(process)
    assert wait(child(lambda: run(directory, directory / "killed")))
    print(json.dumps(killed))


def reached(output: Path, stage: str, step: int) -> bool:
    saved = [int(path.name.split("-")[1]) for path in (output / "checkpoints" / stage).glob("checkpoint-*")]
    return max(saved, default=0) >= step or (output / stage).exists()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Distillations of seconds, and how their students are compared."""

from __future__ import annotations

from pathlib import Path

from distilbert_fast.data.tasks import load_task
from distilbert_fast.jobs.distill import Training
from distilbert_fast.jobs.task import TaskJob

FAST = Training(epochs=1, batch_size=32, micro_batch=16, learning_rate=5e-3)
TEACHING = Training(epochs=None, batch_size=16, micro_batch=16, learning_rate=1e-2)


def task_job(inputs: Path) -> TaskJob:
    return TaskJob(load_task(data=inputs / "train.tsv", eval_data=inputs / "dev.tsv"), max_length=16)


def same(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()

"""`distill` in two processes, by torchrun's own agent, and the same in one; killed, and failing in one of the two.

    PYTHONPATH=.:tests python -m distillation.launch_runs DIR

leaves the outputs in directories under DIR, and prints a JSON object: what was there at each kill, and what each
process of a job said that failed in the first.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from demo_input import bert, sentences, tsv
from distillation.runs import child, together, wait
from hurried import before_forks
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distilbert_fast.data.tasks import load_task
from distilbert_fast.jobs import trained_flow
from distilbert_fast.jobs.distill import Recipe, Training, distill
from distilbert_fast.jobs.mlm import MlmJob
from distilbert_fast.jobs.task import TaskJob
from distilbert_fast.runs import manifest
from distilbert_fast.runs.resumable_trainer import ResumeError

KINDS = ("mlm", "task", "stream")


def run(kind: str, inputs: Path, output: Path, model: str = "bert") -> None:
    """A teacher that lacks its head, and a student; their last batches are short, and shared unevenly."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.disable(logging.CRITICAL)
    teaching = Training(epochs=2, batch_size=32, micro_batch=16, learning_rate=1e-2)
    training = Training(epochs=2, batch_size=32, micro_batch=8, learning_rate=5e-3)
    if kind == "stream":  # more steps than its rows make once
        teaching, training = replace(teaching, max_steps=4), replace(training, max_steps=24)
    reading = {"max_length": 16, "min_length": 4, "holdout": 0.1, "streaming": kind == "stream"}
    job = {
        "mlm": lambda: MlmJob([str(inputs / "text.txt")], **reading),
        "stream": lambda: MlmJob([str(inputs / "text.txt")], **reading),
        "task": lambda: TaskJob(load_task(None, inputs / "train.tsv", inputs / "dev.tsv"), max_length=16),
    }[kind]()
    distill(job, output, inputs / model, Recipe(training, teaching, kind == "task"))


def member(pids: Path, work: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    (pids / os.environ["RANK"]).write_text(str(os.getpid()))
    work()


def launch(pids: Path, work: Callable[[], None], restarts: int = 0) -> int:
    """A process that does as torchrun --nproc-per-node 2 does, in a group of its own with the two; its id."""

    def agent() -> None:
        os.setpgid(0, 0)
        endpoint = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "local_addr": "127.0.0.1"}
        config = LaunchConfig(1, 1, 2, start_method="fork", max_restarts=restarts, **endpoint)
        elastic_launch(config, member)(pids, work)

    pids.mkdir(exist_ok=True)
    return child(agent)


def kill(directory: Path) -> list[str]:
    """Kill a job in its student's training: both processes and their launcher; the second process alone, whose launcher
    ends the first; the same where it may start both again.
    """
    output, pids = directory / "killed", directory / "pids"
    place, there = output / "checkpoints" / "student", []
    for number in range(3):
        process = launch(pids, lambda: run("mlm", directory, output, "dropping"), restarts=number == 2)
        seen = manifest.newest_complete_checkpoint(place)
        while (now := manifest.newest_complete_checkpoint(place)) in (seen, None):
            time.sleep(0.001)
        there.append(Path(now).name)
        if number == 0:
            os.killpg(process, signal.SIGKILL)
            assert not wait(process)
            assert wait(child(lambda: alone(directory, output)))
            continue
        first = (pids / "0").read_text()
        os.kill(int((pids / "1").read_text()), signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert (status == 0) == (number == 2)
        assert not Path(f"/proc/{first}").exists()  # it was ended too
    return there


def kill_in_a_stream(directory: Path) -> str:
    """Kill one process when it reads a stream for the second time, and let it end."""
    output = directory / "killed-stream"
    process = child(lambda: run("stream", directory, output, "dropping"))
    begun = output / "checkpoints" / "student" / "checkpoint-15"
    while not begun.exists():
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    assert not wait(process)
    newest = manifest.newest_complete_checkpoint(begun.parent)
    assert wait(child(lambda: run("stream", directory, output, "dropping")))
    return Path(newest).name


def alone(directory: Path, output: Path) -> None:
    """One process cannot go on with what two have begun."""
    try:
        run("mlm", directory, output, "dropping")
    except ResumeError as error:
        (directory / "refused").write_text(str(error))


def fail(directory: Path, name: str, broken: Callable[[], None]) -> list[str]:
    """What the two processes of a job say of which the first ``broken`` something; no launcher ends the second."""

    def work() -> None:
        if os.environ["RANK"] == "0":
            broken()
        try:
            run("task", directory, directory / name)
        except Exception as error:
            (directory / f"{name}-{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")

    together(work)
    return [(directory / f"{name}-{rank}").read_text() for rank in range(2)]


def full(*arguments: Any) -> None:
    raise OSError(28, "No space left on device")


def main(directory: Path) -> dict[str, Any]:
    logging.getLogger("distilbert_fast").setLevel(logging.ERROR)
    before_forks()
    torch.set_num_threads(1)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    assert wait(child(lambda: [bert(directory / "bert", **still), bert(directory / "dropping")]))
    (directory / "text.txt").write_text("\n".join(sentence for sentence, _ in sentences(300, seed=3)))
    tsv(directory / "train.tsv", 161, seed=1)
    tsv(directory / "dev.tsv", 40, seed=2)
    for kind in KINDS:
        assert wait(child(lambda kind=kind: run(kind, directory, directory / kind / "one")))
        assert wait(launch(directory / "pids", lambda kind=kind: run(kind, directory, directory / kind / "two")))
    assert wait(launch(directory / "pids", lambda: run("mlm", directory, directory / "whole", "dropping")))
    assert wait(child(lambda: run("stream", directory, directory / "whole-stream", "dropping")))
    (directory / "held").mkdir()
    (directory / "held" / "something").touch()
    return {
        "killed": kill(directory),
        "killed in a stream": kill_in_a_stream(directory),
        "failed": {
            "held": fail(directory, "held", lambda: None),
            "full": fail(directory, "full", lambda: setattr(trained_flow, "save", full)),
        },
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))

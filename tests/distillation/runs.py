"""Training runs that die: each in a process of its own, forked from one that has imported everything but run nothing.

    PYTHONPATH=.:tests python -m distillation.runs DIR

trains in directories under DIR: once to the end, killed and resumed, stopped by a full disk. It prints a JSON object.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from cases import many
from distillation import tiny

from distilbert_fast.distillation.trainer import DistillationTrainer

STEPS = 12


def length_grouped() -> dict[str, Any]:
    """Batches of like length, under the name that this transformers 5 has for it."""
    if hasattr(tiny.DistillationArguments, "train_sampling_strategy"):
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}


def build(output_dir: Path, *callbacks: transformers.TrainerCallback) -> DistillationTrainer:
    """12 steps of distillation with dropout, accumulation, evaluation and rotation."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    teacher = tiny.teacher()
    args = tiny.arguments(
        output_dir,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        eval_strategy="epoch",
        num_train_epochs=3,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        warmup_steps=3,
        **length_grouped(),
    )
    rows = tiny.rows(24)
    return DistillationTrainer(
        tiny.student(teacher), teacher, args, rows, eval_dataset=rows[:5], callbacks=list(callbacks)
    )


def train(output_dir: Path, *callbacks: transformers.TrainerCallback) -> None:
    trainer = build(output_dir, *callbacks)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == STEPS


def child(work: Callable[[], Any]) -> int:
    """Fork a process that does ``work``; its id."""
    gc.freeze()  # else its garbage collector copies every page of this process
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        torch.set_num_threads(1)
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
        signal.alarm(900)  # a run that hangs is one that failed
        _kept = work()  # torch may hang when it takes down what tied processes together
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(process: int) -> bool:
    """True when it came to its end, False when it was killed."""
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    assert status == 0, f"the run failed: {status}"
    return True


def die_at_call(number: int, inside: Callable[[], bool] = lambda: True) -> None:
    """SIGKILL just before the number-th call that makes, moves, syncs or removes something on the disk.

    ``inside``: calls count while it is true; when it no longer is, the next one is the last.
    """
    left, begun = number, False

    def counted(call: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            nonlocal left, begun
            now = inside()
            left, begun = left - now, begun or now
            if left == 0 or (begun and not now):
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


def kill(directory: Path, seed: int = 0) -> dict[str, int]:
    """SIGKILL soon after a checkpoint was begun, then at random steps of saving; resume until the end is reached."""
    chance = random.Random(seed)
    killed = {"time": 0, "saving": 0}
    for begun in many((2, 6), (2, 4, 6, 8)):
        process = child(lambda: train(directory / "time"))
        while not (directory / "time" / f"checkpoint-{begun}").exists():
            assert os.waitpid(process, os.WNOHANG) == (0, 0), "the run failed"
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(process, signal.SIGKILL)
        killed["time"] += not wait(process)
    assert wait(child(lambda: train(directory / "time")))

    def dying(number: int) -> None:
        die_at_call(number)
        train(directory / "saving")

    ended = False
    while not ended:
        number = chance.randint(3, 40) if killed["saving"] < many(3, 6) else 10**9
        process = child(lambda number=number: dying(number))
        ended = wait(process)
        killed["saving"] += not ended
    return killed


class FullDisk(transformers.TrainerCallback):
    """From a given step on, no file may grow beyond ``size`` bytes; the system refuses, as a full disk would."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            limit_files(self.size)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def fill(directory: Path) -> dict[str, Any]:
    """Fill the disk while step 6 is saved (at its weights, its optimizer, its manifest), then empty it and go on.

    Last, fill it while a finished model is saved over an older one.
    """

    def checkpoint(name: str, size: int) -> None:
        place = directory / name
        try:
            train(place, FullDisk(6, size))
        except OSError as error:
            limit_files(resource.RLIM_INFINITY)
            left = sorted(path.name for path in place.iterdir())
            (directory / f"{name}.json").write_text(json.dumps([error.errno, str(error), left]))
            train(place)

    def model() -> None:
        trainer = build(directory / "unused")
        trainer.save_model(str(directory / "model"))
        with torch.no_grad():
            trainer.model.classifier.bias.add_(1)
        limit_files(20_000)
        try:
            trainer.save_model(str(directory / "model"))
        except OSError as error:
            limit_files(resource.RLIM_INFINITY)
            left = sorted(path.name for path in (directory / "model").iterdir())
            (directory / "model.json").write_text(json.dumps([error.errno, str(error), left]))

    for name, size in (("weights", 20_000), ("optimizer", 60_000), ("manifest", 0)):
        assert wait(child(lambda name=name, size=size: checkpoint(name, size)))
    assert wait(child(model))
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}


def steps(output_dir: Path, size: int, accumulation: int) -> DistillationTrainer:
    """Five steps, three an epoch, of gradient descent on sentences whose tokens have labels here and there."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    teacher = tiny.teacher("TokenClassification")
    args = tiny.arguments(
        output_dir,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=5,
        logging_steps=1,
        save_strategy="steps",
        save_steps=1,
        ddp_backend="gloo" if "RANK" in os.environ else None,
    )
    rows = tiny.rows(24, "TokenClassification", seed=5)
    trainer = DistillationTrainer(tiny.student(teacher, dropout=0.0), teacher, args, rows, eval_dataset=rows[:16])
    trainer.train(resume_from_checkpoint="auto")
    logs = [{name: entry.get(name) for name in ("loss", "kl", "ce")} for entry in trainer.state.log_history[:5]]
    logs.append(trainer.evaluate())
    if args.process_index == 0:
        (output_dir / "logs.json").write_text(json.dumps(logs))
    trainer.accelerator.wait_for_everyone()
    return trainer


def together(member: Callable[[], Any]) -> None:
    """Two processes at the same work, which find each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def join(rank: int) -> Any:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return member()

    members = [child(lambda rank=rank: join(rank)) for rank in range(2)]
    assert all([wait(process) for process in members])


def processes(directory: Path) -> dict[str, Any]:
    """The same steps in one process; in two, which exchange gradients through gloo; in two, resumed at the fifth."""
    assert wait(child(lambda: steps(directory / "one", 8, 1)))
    together(lambda: steps(directory / "two", 2, 2))
    shutil.copytree(directory / "two", directory / "resumed")
    shutil.rmtree(directory / "resumed" / "checkpoint-5")
    together(lambda: steps(directory / "resumed", 2, 2))
    return {name: json.loads((directory / name / "logs.json").read_text()) for name in ("one", "two", "resumed")}


def main(directory: Path) -> dict[str, Any]:
    assert wait(child(lambda: train(directory / "whole")))
    return {"killed": kill(directory), "full": fill(directory), "logs": processes(directory)}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))

"""The same three steps of masked-LM distillation, with every loss, cut in different ways.

    PYTHONPATH=.:tests python -m distillation.ddp_runs DIR

leaves the student's weights and the logs of each way in a directory under DIR.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import transformers
from distillation import tiny
from distillation.runs import child, together, wait
from safetensors.torch import save_file

from distilbert_fast.distillation.trainer import DistillationTrainer

# name: processes, batch, accumulated batches, gradient checkpointing
WAYS = {
    "whole": (1, 8, 1, False),
    "accumulated": (1, 2, 4, False),
    "checkpointed": (1, 8, 1, True),
    "two": (2, 2, 2, False),
    "two, checkpointed": (2, 4, 1, True),
}


def steps(output_dir: Path, processes: int, size: int, accumulation: int, checkpointing: bool) -> Any:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    teacher = tiny.teacher("MaskedLM")
    args = tiny.arguments(
        output_dir,
        objective="mlm",
        temperature="linear:4:1",
        alpha_mse=0.01,
        alpha_hidden="cosine:1:0.5",
        alpha_relation=1.0,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=3,
        logging_steps=1,
        ddp_backend="gloo" if processes > 1 else None,
    )
    rows = tiny.masked_rows(24)
    student = tiny.drop_in(tiny.student(teacher, dropout=0.0))
    trainer = DistillationTrainer(student, teacher, args, rows, eval_dataset=rows[:8])
    trainer.train()
    logs = [*trainer.state.log_history[:3], trainer.evaluate()]
    if args.process_index == 0:
        (output_dir / "logs.json").write_text(json.dumps(logs))
        save_file(dict(student.named_parameters()), output_dir / "weights.safetensors")
    trainer.accelerator.wait_for_everyone()
    return trainer


def main(directory: Path) -> None:
    for name, way in WAYS.items():
        (directory / name).mkdir()

        def work(name: str = name, way: tuple = way) -> Any:
            return steps(directory / name, *way)

        if way[0] == 1:
            assert wait(child(work)), name
        else:
            together(work)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

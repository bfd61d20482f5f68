"""Compress a classifier to a speed on this machine, or as far as its accuracy allows: the command `compress`.

    teacher → plan: how fast it is here, and what heads, neurons and layers cost
            → for each speed-up: a student of fewer layers → heads and neurons away → recovery → int8
            → gate → report

Each model is a stage of a `RunDirectory`, and so is each timing: a command that was killed goes on where it was, and
one with other goals takes what is there. Speed-ups are over the teacher under transformers (sdpa, float32), in turns
with it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from distilbert_fast.compression.quantize import quantize_model
from distilbert_fast.compression.structure import PruningConfig, prune_model
from distilbert_fast.distillation.student import student_from_teacher
from distilbert_fast.evaluation import compression_report as report
from distilbert_fast.evaluation.report import SPREAD
from distilbert_fast.files.durable import write_file
from distilbert_fast.jobs import gate, planning, stage_results
from distilbert_fast.jobs.flow import CHECKPOINTS, TEACHER, console, find_teacher
from distilbert_fast.jobs.planning import MeasuredTeacher, measured_costs
from distilbert_fast.jobs.prune import as_json
from distilbert_fast.jobs.settings import (
    Compression,
    Goals,
    Recipe,
    Shape,
    check_devices,
    check_models,
    refused,
    require,
)
from distilbert_fast.jobs.task import TaskJob
from distilbert_fast.jobs.trained_flow import TrainedFlow
from distilbert_fast.modeling.compression_config import CodebookConfig, Int8Config
from distilbert_fast.modeling.loading import checkpoint_digest, without_bars
from distilbert_fast.modeling.optimize import optimize
from distilbert_fast.modeling.training import for_training
from distilbert_fast.runs.processes import processes
from distilbert_fast.runs.run_directory import RunDirectory

JOB = "compress"
MODELS, SPEED, PLAN, COMPRESSED, REJECTED = "models", "speed", "plan.json", "compressed", "rejected"
ENGINE = "teacher on the engine"  # the row of a model that needs no directory of its own
STEP = 1.5  # from one speed-up to the next, where the accuracy alone is given
_ATTEMPTS = 4  # at a speed-up by pruning, each by what was measured of the one before
_DRIFT = 1.25  # of the time that the teacher takes, from one timing to the next, on a quiet machine
_GROUP = 16  # rows of weights that share the values of a codebook


def compress(
    job: TaskJob,
    output: str | Path,
    teacher: str | Path | None = None,
    recipe: Compression | None = None,
    goals: Goals | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Compress a teacher on a job, measure all that came of it, and keep the best if it is worth it.

    Args:
        job: data and metrics.
        output: directory for `teacher/`, `models/` (all that were made), report.md, report.json, curve.png and
            `compressed/`, the model that reached its goals, with a model card; `rejected/` instead where none did.
            Killed at any moment, the same call continues. Other goals go on from what is there.
        teacher: directory or hub id of an encoder that `optimize` takes; by default the one in the extra `demo`.
        recipe: training and what counts as speed.
        goals: by default to lose at most one point.
        overwrite: see `RunDirectory`.
        command: what the report names as the command that made it.

    Returns:
        The content of report.json. Its "gate" says whether the goals were reached, and why not.

    Raises:
        RecipeError: data, teacher or a setting that cannot be used; a speed-up that this machine does not allow.
        StageError: an output directory that holds something else.
    """
    recipe, goals = recipe or Compression(), goals or Goals(accuracy_drop=1.0)
    recipe.check()
    goals.check()
    together = processes()
    check_devices(together.count)
    require(together.count == 1, f"{JOB}: processes", "1", together.count)
    source = find_teacher(teacher, JOB)
    made = Recipe(recipe.student, recipe.teacher, shape=Shape(recipe.layers), objective=recipe.objective)
    names = (TEACHER, PLAN, MODELS, SPEED, CHECKPOINTS, COMPRESSED, REJECTED, *report.FILES)
    with without_bars():
        check_models(job, source, made, JOB)
        training = ("teacher", "student", "recovery")
        settings = {
            "teacher": f"{teacher or source.name} ({checkpoint_digest(source)[:12]})",
            "data": job.describe(),
            **{f"{name}_training": dataclasses.asdict(getattr(recipe, name)) for name in training},
            **{name: value for name, value in dataclasses.asdict(recipe).items() if name not in training},
            "threads": recipe.threads or torch.get_num_threads(),
        }
        with RunDirectory(output, JOB, settings, names, overwrite) as run:
            flow = _Compression(recipe, goals, JOB, together, recipe.teacher, True, run, source, job, console())
            flow.say(f"{JOB} on {job.describe()['name']}; output: {run.path}")
            with refused(JOB):
                job.prepare(flow.tokenizer(), run.path)
            return flow.run_all(
                {"command": command or "distilbert_fast.jobs.compress.compress(...)"}
                | {
                    "head": job.head,
                    "settings": settings,
                    "data": job.describe(),
                    "metrics": [list(metric) for metric in job.metrics],
                    "legend": job.legend,
                }
            )


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch, and with it the engine, use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Compression(TrainedFlow):
    """The stages of `compress`."""

    job: TaskJob

    def __init__(self, recipe: Compression, goals: Goals, *of_any: Any) -> None:
        super().__init__(*of_any)
        self.recipe, self.goals = recipe, goals
        self.metric = self.job.metrics[0].name
        self.rows: dict[str, dict[str, Any]] = {}  # of the report, by the directory of each model

    # The run ----------------------------------------------------------------------------------------------------------

    def run_all(self, content: dict[str, Any]) -> dict[str, Any]:
        for name in (MODELS, SPEED):
            (self.run.path / name).mkdir(exist_ok=True)
        taught = self.stage(TEACHER, "the teacher", self.teach, stage_results.distilled)
        self.say("how fast it is here, and what its layers cost")
        measured = self.run.result(PLAN, self.measure, stage_results.plan)
        self.plan = MeasuredTeacher.of(measured, self.recipe)
        self.rows[TEACHER] = self._row(taught, measured["speed"], "transformers", title="teacher, by transformers")
        self.rows[ENGINE] = self._row(taught, measured["speed"], "engine", title="teacher, on the engine")
        made = self._by_speedup() if self.goals.speedups else self._by_accuracy()
        self.run.discard(CHECKPOINTS)
        place = {key: measured[key] for key in ("date", "machine", "environment", "inputs")}
        verdict = self._judged(made)
        goals = {**dataclasses.asdict(self.goals), "clock": self.recipe.clock}
        pareto = {clock: gate.pareto(self.rows, self.metric, clock) for clock in ("latency", "throughput")}
        content |= {**place, "goals": goals, "models": self.rows, "pareto": pareto, "gate": verdict}
        kept = self._keep(content)
        for name, written in report.files(content).items():
            write_file(self.run.path / name, written)
        self.say(report.table(content), *report.busy_lines(content), *report.verdict(content))
        self.say(f"{kept}; report: {self.run.path / report.FILES[0]}")
        return content

    def _by_speedup(self) -> dict[str, float | None]:
        """Make a model for each speed-up that is asked for; return these by name."""
        for target in self.goals.speedups:
            self.plan.check(target)
        return {self.make(target): target for target in self.goals.speedups}

    def _by_accuracy(self) -> dict[str, float | None]:
        """Make faster and faster models until one loses too much."""
        made: dict[str, float | None] = {}
        target = self.plan.speedup_of_int8
        while True:
            name = self.make(target)
            made[name] = None
            target *= STEP
            lost = gate.faults(self.rows[name], self.rows[TEACHER], self.metric, self.recipe.clock, self.goals, None)
            if lost or not self.plan.allows(target):
                return made

    def _judged(self, made: Mapping[str, float | None]) -> dict[str, Any]:
        """What the gate says of each model that was made, and of the one that is kept."""
        rows, clock = self.rows, self.recipe.clock
        faults = {
            name: gate.faults(rows[name], rows[TEACHER], self.metric, clock, self.goals, target)
            for name, target in made.items()
        }
        passed = [name for name, found in faults.items() if not found]
        asked = list(made) if self.goals.speedups else passed
        chosen = gate.fastest(passed or list(made), rows, clock)
        models = {name: {"speedup": target, "faults": faults[name]} for name, target in made.items()}
        return {"passed": bool(passed) and set(asked) == set(passed), "chosen": chosen, "models": models}

    def _keep(self, content: Mapping[str, Any]) -> str:
        """Copy the model that was chosen to where its name says what it is worth; say where."""
        found = content["gate"]
        worthy = not found["models"][found["chosen"]]["faults"] or self.goals.accept
        name, other = (COMPRESSED, REJECTED) if worthy else (REJECTED, COMPRESSED)
        self.run.discard(other)
        self.run.discard(name)  # a copy, and of the goals of another call perhaps

        def build(path: Path) -> dict[str, Any]:
            shutil.copytree(self.run.path / found["chosen"], path, dirs_exist_ok=True)
            (path / "stage.json").unlink()
            (path / "README.md").write_text(report.card(content, found["chosen"]), encoding="utf-8")
            return {"of": found["chosen"]}

        self.run.directory(name, build, stage_results.copied)
        return f"{found['chosen']} is {'kept' if worthy else 'kept aside'} in {self.run.path / name}"

    def clocks(self, *models: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        with _threads(self.recipe.threads):
            return super().clocks(*models)

    # The stages -------------------------------------------------------------------------------------------------------

    def measure(self) -> dict[str, Any]:
        """The teacher's speed by transformers and on the engine, and what heads, neurons and layers cost there.

        Some students are timed too, as they are before they are trained: their head costs something else.
        """
        source = self.run.path / TEACHER
        models = {"transformers": self.load(source)[0]}
        models |= {"engine": optimize(self.load(source)[0]), "int8": optimize(self.load(source)[0], "int8")}
        teacher = self.load(source)[0]
        for layers in planning.depths(teacher.config.num_hidden_layers, self.recipe.layers):
            student, _ = student_from_teacher(teacher, num_layers=layers)
            models[planning.student(layers)] = optimize(student, "int8")
        place, speed = self.clocks(models, "rows")
        with _threads(self.recipe.threads):
            costs = measured_costs(self.load(source)[0], self.job.batches(32, 512), self.recipe.clock)
        return place | {"speed": speed, "costs": costs}

    def make(self, target: float) -> str:
        """Make a model that is so many times as fast as the teacher; return its name."""
        route = self.plan.route(target)
        name = TEACHER
        if route.layers < self.plan.layers:
            name = f"{MODELS}/{route.layers}-layers"
            self._stage(name, f"a student of {route.layers} layers", functools.partial(self.distil, route.layers))
        if route.seconds is not None:
            whole, name = name, f"{MODELS}/{target:.4g}x-pruned"
            self._stage(name, f"{target:.4g}×: heads and neurons away", functools.partial(self.prune, whole, target))
            cut, name = name, f"{MODELS}/{target:.4g}x-recovered"
            self._stage(name, f"{target:.4g}×: recovery", functools.partial(self.recover, cut, name))
        kind = "int8" if self.recipe.codebook is None else f"codebook-{self.recipe.codebook}"
        float_, name = name, f"{name if name != TEACHER else f'{MODELS}/teacher'}-{kind}"
        self._stage(name, f"{float_.removeprefix(f'{MODELS}/')} in {kind}", functools.partial(self.quantize, float_))
        return name

    def distil(self, layers: int, path: Path) -> dict[str, Any]:
        set_seed(self.recipe.student.seed)
        teacher, tokenizer, _ = self.load(self.run.path / TEACHER)
        student, _ = student_from_teacher(teacher, num_layers=layers)
        name = f"{MODELS}/{layers}-layers"
        made = self.fit(name, student, teacher, self.recipe.student, self.recipe.objective)
        return made | self._save(path, TEACHER, student, tokenizer, teacher)

    def prune(self, source: str, target: float, path: Path) -> dict[str, Any]:
        """Prune until a call on the engine, in int8, takes the time that is asked for."""
        reference = self.load(self.run.path / TEACHER)[0]
        given, wanted = self.job.calibration(self.recipe.sentences), self.plan.reference / target
        route = self.plan.route(target)
        costs, seconds, attempts = self.plan.costs_of(route.layers), route.seconds or 0.0, []
        for _ in range(_ATTEMPTS):
            model, tokenizer, _ = self.load(self.run.path / source)
            whole = self.plan.whole(route.layers)
            amount = min(1 - seconds / whole, 1 - costs.base / whole - 1e-6)
            config = PruningConfig(amount=amount, measure="time", precision="int8", batch_size=self.plan.batch_size)
            with refused(JOB):
                _, found = prune_model(model, given, config, costs=costs)
            fast = optimize(copy.deepcopy(model), "int8")
            _, measured = self.clocks({"transformers": reference, "int8": fast}, "rows")
            taken, by_transformers = (self.plan.seconds(measured, name) for name in ("int8", "transformers"))
            disturbed = self._disturbed(measured)
            attempts.append({"amount": amount, "speedup": by_transformers / taken, "disturbed": disturbed})
            busy = "; the machine is busy, so the table alone counts" if disturbed else ""
            self.say(f"      {100 * amount:.0f}% of the time of its layers away: {by_transformers / taken:.2f}×{busy}")
            if disturbed or by_transformers / taken >= target * (1 - gate.TOLERANCE / 2) or seconds <= costs.base:
                break
            seconds -= 1.1 * (taken * self.plan.reference / by_transformers - wanted)
        kept = self._save(path, source, model, tokenizer, self.load(self.run.path / TEACHER)[0])
        return {"pruning": as_json(found), "attempts": attempts} | kept

    def recover(self, source: str, name: str, path: Path) -> dict[str, Any]:
        set_seed(self.recipe.recovery.seed)
        teacher, tokenizer, _ = self.load(self.run.path / TEACHER)
        model = for_training(self.load(self.run.path / source)[0])
        made = self.fit(name, model, teacher, self.recipe.recovery, self.recipe.objective)
        return made | self._save(path, source, model, tokenizer, teacher)

    def quantize(self, source: str, path: Path) -> dict[str, Any]:
        model, tokenizer, _ = self.load(self.run.path / source)
        config: Any = Int8Config(embeddings=True)
        if self.recipe.codebook is not None:
            config = CodebookConfig(self.recipe.codebook, "group", _GROUP)
        given = self.job.calibration(min(self.recipe.sentences, 256))
        quantize_model(model, config, given, tokenizer)
        return self._save(path, source, model, tokenizer, self.load(self.run.path / TEACHER)[0])

    def _save(self, path: Path, source: str, model: Any, tokenizer: Any, teacher: Any) -> dict[str, Any]:
        """Save and read back; judge what was read on the engine."""
        model = self.read_back(path, model, tokenizer)
        row = self.size(model, path)
        return row | {"source": source, "quality": self.job.evaluate(optimize(model), teacher)}

    def _stage(self, name: str, title: str, build: Any) -> None:
        made = self.stage(name, title, build, stage_results.compressed)
        measured = self.run.result(f"{SPEED}/{Path(name).name}.json", lambda: self.time(name), stage_results.speed)
        if self._disturbed(measured["speed"]):
            again = self.run.path / SPEED / f"{Path(name).name}.json"
            self.say(f"      timed while the machine was busy: remove {again} to have it timed again")
        self.rows[name] = self._row(made, measured["speed"], "engine", title=name.removeprefix(f"{MODELS}/"))

    def _disturbed(self, speed: Mapping[str, Any]) -> bool:
        """Whether other work was on the machine: turns differ much, or the teacher was not as fast as at first."""
        spread = any(row["high"] > SPREAD * row["low"] for by_name in speed.values() for row in by_name.values())
        return spread or not 1 / _DRIFT < self.plan.seconds(speed, "transformers") / self.plan.reference < _DRIFT

    def time(self, name: str) -> dict[str, Any]:
        """A model on the engine, in turns with the teacher by transformers."""
        models = {"transformers": self.load(self.run.path / TEACHER)[0]}
        models |= {"engine": optimize(self.load(self.run.path / name)[0])}
        place, speed = self.clocks(models, "rows")
        return place | {"speed": speed}

    def _row(self, made: Mapping[str, Any], speed: Mapping[str, Any], timed: str, title: str) -> dict[str, Any]:
        """What the report says of a model."""
        kept = ("architecture", "layers", "parameters", "file_bytes", "quality", "source", "seconds", "pruning")
        clocks = {"latency": (speed["latency_ms"], -1), "throughput": (speed["throughput"], 1)}
        speedup = {
            clock: (measured[timed]["median"] / measured["transformers"]["median"]) ** sign
            for clock, (measured, sign) in clocks.items()
        }
        timings = {key: measured[timed] for key, measured in speed.items()}
        return {"title": title, **{key: made[key] for key in kept if key in made}, "speedup": speedup, **timings}

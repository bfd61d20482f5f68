"""The contests: for each model, class of precision and workload, the engines of that class take turns."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import isa, turns
from bench.harness.errors import NotAvailableError
from bench.harness.machine import cpu_name, now
from bench.harness.processes import Worker, end_all
from bench.peers.engines import ENGINES, PRECISIONS, REFERENCE, Spec, environment, tcmalloc
from bench.peers.models import MODELS, MissingModelError
from bench.peers.workloads import SEED, WORKLOADS, Workload
from distilbert_fast.modeling.loading import checkpoint_digest

PEAKS = Spec("machine-peaks", "", "")  # a worker that measures the machine


@dataclass(frozen=True)
class Settings:
    engines: Sequence[str]
    workloads: Sequence[str]
    models: Sequence[str]  # names of MODELS or directories
    rounds: int
    threads: int
    isa: str | None
    cache: Path


@dataclass
class Report:
    """What the JSON holds. Times are in seconds, rates a second."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    workloads: dict[str, list[int]]  # lengths
    peaks: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)  # one an engine, model and workload
    verdicts: list[dict[str, Any]] = field(default_factory=list)  # each of ours against the fastest rival of its class
    unavailable: list[dict[str, Any]] = field(default_factory=list)


def run(
    settings: Settings, progress: Callable[[str], None] = print, save: Callable[[Report], None] = lambda report: None
) -> Report:
    """Hold every contest; `save` gets the report after each. `progress` is told what is going on."""
    cores = turns.pick_cores(settings.threads)
    os.sched_setaffinity(0, cores)
    import torch

    torch.set_num_threads(settings.threads)
    settings.cache.mkdir(parents=True, exist_ok=True)
    report = Report(
        machine=machine(cores, settings),
        settings={"rounds": settings.rounds, "threads": settings.threads, "isa": settings.isa},
        workloads={name: list(WORKLOADS[name].lengths) for name in settings.workloads},
    )
    work = Work(settings, cores, report, progress, save)
    progress("peaks of the machine")
    report.peaks = work.peaks()
    work.watch = turns.Machine(cores, settings.threads)
    for name in settings.models:
        work.model(name)
    return report


@dataclass
class Work:
    settings: Settings
    cores: Sequence[int]
    report: Report
    progress: Callable[[str], None]
    save: Callable[[Report], None]
    watch: turns.Watch | None = None
    fingerprints: dict[Path, str] = field(default_factory=dict)

    def worker(self, spec: Spec, name: str, model: Path) -> Worker:
        """A worker with the engine built; NotAvailableError, with the reason, where it cannot be."""
        reason = spec.missing()
        if reason:
            raise NotAvailableError(reason)
        cache = self.kept(name, model) / spec.name.partition("-")[0]
        return self.start(spec, f"{name}-{spec.name}", {"model": str(model), "cache": str(cache)})

    def start(self, spec: Spec, log: str, given: Mapping[str, Any], module: str = "bench.peers.worker") -> Worker:
        given = {"engine": spec.name, "threads": self.settings.threads, "cores": list(self.cores), **given}
        variables = environment(spec, self.settings.threads, self.settings.cache, self.settings.isa)
        return Worker(given, variables, self.settings.cache / "logs" / f"{log}.log", module)

    def peaks(self) -> dict[str, Any]:
        worker = self.start(PEAKS, PEAKS.name, {}, "bench.harness.peaks")
        worker.end()
        return {key: value for key, value in worker.ready.items() if key != "ready"}

    def model(self, given: str) -> None:
        name = Path(given).name
        try:
            directory = MODELS[given](self.settings.cache) if given in MODELS else Path(given).resolve()
        except MissingModelError as error:
            self.unavailable(None, name, None, str(error))
            return
        self.report.models[name] = sizes(json.loads((directory / "config.json").read_text()))
        workloads = [WORKLOADS[workload] for workload in self.settings.workloads]
        self.references(name, directory, workloads)
        for precision in PRECISIONS:
            specs = [ENGINES[engine] for engine in self.settings.engines if ENGINES[engine].precision == precision]
            workers: dict[str, Worker] = {}
            try:
                for spec in specs:
                    self.progress(f"{name}, {precision}: build {spec.name}")
                    with self.naming(spec.name, name, None):
                        workers[spec.name] = self.worker(spec, name, directory)
                        self.report.versions |= workers[spec.name].ready["versions"]
                for workload in workloads:
                    self.contest(name, directory, precision, workload, workers)
                    self.save(self.report)
            finally:
                end_all(list(workers.values()))

    def references(self, name: str, directory: Path, workloads: Iterable[Workload]) -> None:
        missing = [workload for workload in workloads if not self.reference(name, directory, workload).exists()]
        if not missing:
            return
        worker = self.worker(ENGINES[REFERENCE], name, directory)
        try:
            for workload in missing:
                self.progress(f"{name}: reference output of {workload.name}")
                file = self.reference(name, directory, workload)
                file.parent.mkdir(parents=True, exist_ok=True)
                worker.load(workload=workload.name, reference=str(file))
        finally:
            worker.end()

    def reference(self, name: str, directory: Path, workload: Workload) -> Path:
        return self.kept(name, directory) / "references" / f"{workload.name}-{SEED}.npy"

    def kept(self, name: str, directory: Path) -> Path:
        """Where what is made of a checkpoint of this content lies."""
        if directory not in self.fingerprints:
            self.fingerprints[directory] = checkpoint_digest(directory)[:12]
        return self.settings.cache / f"{name}-{self.fingerprints[directory]}"

    def contest(
        self, model: str, directory: Path, precision: str, workload: Workload, workers: Mapping[str, Worker]
    ) -> None:
        """One workload: load everywhere, then the turns."""
        loaded: dict[str, dict[str, Any]] = {}
        for engine, worker in workers.items():
            self.progress(f"{model}, {precision}, {workload.name}: load {engine}")
            with self.naming(engine, model, workload.name):
                reference = self.reference(model, directory, workload)
                loaded[engine] = worker.load(workload=workload.name, reference=str(reference))
                if not np.isfinite(loaded[engine]["max_abs"]):
                    del loaded[engine]
                    raise NotAvailableError("its output is not finite")
        if not loaded:
            return
        held = turns.hold(
            {engine: workers[engine] for engine in loaded},
            self.settings.rounds,
            self.watch,
            lambda engine, error: self.unavailable(engine, model, workload.name, str(error)),
            lambda engine: self.progress(f"{model}, {precision}, {workload.name}: turn of {engine}"),
        )
        if not held[0]:
            return
        peak = self.report.peaks["operations_per_second"][precision]
        operations = workload.operations(**self.report.models[model])
        place = {"model": model, "workload": workload.name, "precision": precision}
        results, verdicts = judge(held, operations, peak)
        for result in results:
            result |= place | {key: value for key, value in loaded[result["engine"]].items() if key != "seconds"}
        self.report.results += results
        self.report.verdicts += [place | verdict for verdict in verdicts]

    @contextlib.contextmanager
    def naming(self, engine: str, model: str, workload: str | None) -> Iterator[None]:
        """An engine that cannot run is named with its reason, and the others go on."""
        try:
            yield
        except NotAvailableError as error:
            self.unavailable(engine, model, workload, str(error))

    def unavailable(self, engine: str | None, model: str, workload: str | None, reason: str) -> None:
        entry = {"engine": engine, "model": model, "workload": workload, "reason": reason}
        self.report.unavailable.append(entry)


def judge(
    held: Sequence[turns.Round], operations: int, peak: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A result for every engine, fastest first, and for each of ours the verdict against the fastest rival."""
    spreads = {engine: turns.seconds(held, engine) for engine in held[0]}
    fastest_first = sorted(spreads, key=lambda engine: spreads[engine].median)
    ours = [engine for engine in fastest_first if ENGINES[engine].ours]
    rivals = [engine for engine in fastest_first if not ENGINES[engine].ours]
    results = []
    for engine in fastest_first:
        mine = [turns_[engine] for turns_ in held]
        results.append(
            {
                "engine": engine,
                "ours": engine in ours,
                "seconds": asdict(spreads[engine]),
                "rounds": [turn.seconds for turn in mine],
                "disturbed_turns": sum(turn.disturbed is not None for turn in mine),
                "dropped_turns": sum(turn.dropped for turn in mine),
                "share_of_peak": operations / spreads[engine].median / peak,
                "ours_is_faster": asdict(turns.ratio(held, engine, ours[0])) if ours and engine in rivals else None,
            }
        )
    verdicts = [
        {
            "ours": engine,
            "seconds": asdict(spreads[engine]),
            "rival": rivals[0],
            "rival_seconds": asdict(spreads[rivals[0]]),
            "ratio": asdict(turns.ratio(held, rivals[0], engine)),
            "share_of_peak": operations / spreads[engine].median / peak,
        }
        for engine in (ours if rivals else [])
    ]
    return results, verdicts


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Of a DistilBERT's config or a BERT's."""
    if "dim" in config:
        return {"layers": config["n_layers"], "hidden": config["dim"], "intermediate": config["hidden_dim"]}
    return {
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
    }


def machine(cores: Sequence[int], settings: Settings) -> dict[str, Any]:
    notes = [
        f"tcmalloc preloaded for torch and CTranslate2: {tcmalloc() or 'no, not found (Debian: libtcmalloc-minimal4)'}"
    ]
    if settings.isa:
        notes.append(isa.said(settings.isa))
    return {
        "cpu": cpu_name(),
        "cores": list(cores),
        "threads": settings.threads,
        "python": platform.python_version(),
        "date": now(),
        "notes": notes,
    }

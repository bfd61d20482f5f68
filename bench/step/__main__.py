"""``python -m bench.step``: how long a distillation step takes, part by part, beside the original distiller's form."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from bench.harness import report
from bench.harness.choose import chosen
from bench.harness.command import RESULTS, checking, console, show, start
from bench.harness.errors import NotAvailableError
from bench.harness.isa import FORCED_ISA, checked_isa, said, smaller_processor
from bench.harness.machine import cpu_name, now
from bench.harness.processes import Worker, end_all
from bench.harness.turns import Machine, hold, pick_cores, ratio, seconds, spread
from bench.step.ways import PARTS, SIZES, WAYS

EPILOG = """\
[bold]Examples[/bold]

The record, on a quiet machine:

    python -m bench.step

Does it run here?

    python -m bench.step --size tiny --batch 2 --length 16 --rounds 1
"""


def main(
    ways: Annotated[str, typer.Option(metavar="PATTERNS", help="Names or shell patterns, separated by commas.")] = "*",
    size: Annotated[str, typer.Option(help=f"Of the models: {' or '.join(SIZES)}.")] = "base",
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each way.")] = 5,
    calls: Annotated[int, typer.Option(min=1, help="Steps of a turn.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads, and cores that everything is pinned to.")] = 2,
    isa: Annotated[
        str | None, typer.Option(help=f"Show all ways no more than a processor with {' or '.join(FORCED_ISA)} has.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The JSON.")] = None,
) -> None:
    """Time a step of MLM distillation (teacher, student forward, losses, backward, optimizer), ours and the original's.

    The KL counts masked tokens only, 15% of all; teacher of 12 layers, student of 6, random weights. Every way has a
    process of its own, stopped between its turns.
    """
    with checking():
        names = chosen("--ways", ways, list(WAYS))
        if size not in SIZES:
            raise ValueError(f"--size: expected {' or '.join(SIZES)}, got {size!r}")
        smaller = {} if checked_isa(isa) is None else smaller_processor(isa)
        cores = pick_cores(threads)
    given: dict[str, Any] = {"size": size, "batch": batch, "length": length, "threads": threads, "cores": cores}
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)) | smaller
    contenders: dict[str, Worker] = {}
    missing: dict[str, str] = {}

    def failed(name: str, error: NotAvailableError) -> None:
        missing[name] = str(error)

    logs = Path(tempfile.mkdtemp(prefix="bench-step-"))
    try:
        for name in names:
            try:
                worker = Worker(given | {"way": name}, environment, logs / f"{name}.log", "bench.step.worker")
            except NotAvailableError as error:
                failed(name, error)
            else:
                worker.calls = calls
                contenders[name] = worker
        held = hold(contenders, rounds, Machine(cores, threads), failed)
    finally:
        end_all(list(contenders.values()))

    rows = []
    for name in [name for name in contenders if name not in missing]:
        rival = WAYS[name].rival
        rows.append(
            {
                "way": name,
                "seconds": vars(seconds(held, name)),
                "peak_mib": contenders[name].ready["peak_mib"],
                "parts": {
                    part: spread([turn["parts"][part] for turn in contenders[name].turns]).median for part in PARTS
                },
                "rival": rival if rival in contenders and rival not in missing else None,
                "faster": vars(ratio(held, rival, name)) if rival in contenders and rival not in missing else None,
                "disturbed": sum(turns[name].disturbed is not None for turns in held),
            }
        )
    made = {
        "cpu": cpu_name(),
        "date": now(),
        "python": platform.python_version(),
        **{key: given[key] for key in ("size", "batch", "length", "threads")},
        "isa": None if isa is None else said(isa),
        "rounds": rounds,
        "ways": rows,
        "missing": missing,
    }
    path = out or RESULTS / f"step-{batch}x{length}.json"
    report.write_json(made, path)
    lines = [Text(f"{name} is missing: {why}") for name, why in missing.items()]
    show([table(made), *lines], str(path), console())


def table(made: dict[str, Any]) -> Table:
    title = f"{made['batch']}x{made['length']} tokens, {made['threads']} threads, {made['cpu']}"
    drawn = report.table(title, ("way", "s a step", "range", *PARTS, "peak MiB", "as fast as the original"))
    for row in made["ways"]:
        time, faster = row["seconds"], row["faster"]
        drawn.add_row(
            row["way"],
            f"{time['median']:.3f}",
            f"{time['low']:.3f}-{time['high']:.3f}",
            *(f"{row['parts'][part]:.3f}" for part in PARTS),
            "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            "" if faster is None else f"{faster['median']:.2f}x ({faster['low']:.2f}-{faster['high']:.2f})",
        )
    return drawn


if __name__ == "__main__":
    start(main, EPILOG)

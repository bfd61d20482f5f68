"""python -m bench.peers, from a checkout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

# Of this process, which only probes and waits: its threads sleep as soon as they have nothing to do.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench.harness.choose import chosen
from bench.harness.command import RESULTS, checking, console, show, start
from bench.harness.isa import FORCED_ISA, checked_isa
from bench.peers import contest, report
from bench.peers.engines import ENGINES, PRECISIONS
from bench.peers.models import MODELS, default_cache
from bench.peers.workloads import WORKLOADS

QUICK = {"workloads": "1x16,1x128,8x128", "models": "distilbert-base", "rounds": 3}
FULL = {"workloads": ",".join(WORKLOADS), "models": ",".join(MODELS), "rounds": 9}
EPILOG = f"""\
[bold]Engines[/bold]: {", ".join(ENGINES)}. -pair: two requests in flight, time per request. -cpp: inductor's C++ \
wrapper. int8-fp32 and the like: what is not int8 runs in fp32 (else bf16).

[bold]Workloads[/bold] (batch x tokens): {", ".join(WORKLOADS)}

[bold]Models[/bold]: {", ".join(MODELS)}

[bold]Examples[/bold]

The record, on a quiet machine (what engines are made from is exported and quantized once, then kept in the cache):

    python -m bench.peers

Does every engine run here?

    python -m bench.peers --quick --rounds 1

int8 against OpenVINO and ONNX Runtime, on one workload:

    python -m bench.peers --engines '*int8*,!inductor*,!ctranslate2*' --workloads 8x128

What an AVX2 machine would show:

    python -m bench.peers --isa avx2
"""


def main(
    engines: Annotated[
        str, typer.Option(metavar="PATTERNS", help="Names or shell patterns, separated by commas; !PATTERN leaves out.")
    ] = "*",
    workloads: Annotated[str | None, typer.Option(metavar="PATTERNS", help="The same, of workloads.")] = None,
    models: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Models, or directories of checkpoints, separated by commas.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of each engine. [default: 9]")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads, and cores that everything is pinned to.")] = 2,
    isa: Annotated[
        str | None, typer.Option(help=f"Show all engines no more than a processor with {' or '.join(FORCED_ISA)} has.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{QUICK['workloads']} on {QUICK['models']}, {QUICK['rounds']} rounds.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where exported and quantized models are kept.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The JSON; the plot lies beside it. [default: bench/results/CPU-peers.json]"),
    ] = None,
) -> None:
    """Run the encoder beside other engines, each in its best configuration, and say who is how fast and how exact.

    Every engine has a process of its own, pinned to the same cores and stopped between its turns. The engines of one
    class of precision take turns over rounds; a turn that something else disturbed is run again. An engine that is
    not installed is named with the reason, and the others go on.
    """
    defaults = QUICK if quick else FULL
    with checking():
        settings = contest.Settings(
            engines=chosen("--engines", engines, list(ENGINES)),
            workloads=chosen("--workloads", workloads or defaults["workloads"], list(WORKLOADS)),
            models=checked_models((models or defaults["models"]).split(",")),
            rounds=rounds or defaults["rounds"],
            threads=threads,
            isa=checked_isa(isa),
            cache=(cache or default_cache()).resolve(),
        )
        contest.turns.pick_cores(threads)
    path = out or RESULTS / f"{report.file_stem(contest.cpu_name())}{'-quick' if quick else ''}.json"

    classes = [sum(ENGINES[name].precision == precision for name in settings.engines) for precision in PRECISIONS]
    steps = len(settings.models) * sum(n * (1 + len(settings.workloads) * (1 + settings.rounds)) for n in classes)
    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    # Drawn when something happens and not by a thread, which would run in the middle of a turn.
    with Progress(*columns, TextColumn("{task.description}"), auto_refresh=False, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=steps)

        def progress(what: str) -> None:
            bar.update(task, advance=1, description=what, refresh=True)

        done = contest.run(settings, progress, lambda made: report.write_json(made, path))
    report.write_json(done, path)
    report.write_plot(done, path.with_suffix(".png"))
    show(report.tables(done), f"{path} and {path.with_suffix('.png').name}", console())


def checked_models(names: list[str]) -> list[str]:
    for name in names:
        if name not in MODELS and not (Path(name) / "config.json").is_file():
            raise ValueError(f"--models: expected {', '.join(MODELS)} or the directory of a checkpoint, got {name!r}")
    return names


if __name__ == "__main__":
    start(main, EPILOG)

"""python -m bench.gpu, from a checkout."""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.gpu import report, runner
from bench.gpu.keep import Keeper
from bench.gpu.plan import BUDGET, PARTS, PLANS
from bench.harness.choose import chosen
from bench.harness.command import RESULTS, checking, console, show, start
from bench.harness.machine import now, versions

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "torchao", "flash-attn")
LIST = "\n\n".join(f"    {part.name:14} {part.seconds:3} s   {part.about}" for part in PARTS.values())
RUNS = "\n\n".join(f"    {name:14} {plan.seconds:3} s   {plan.about}" for name, plan in PLANS.items())
EPILOG = f"""\
[bold]Parts[/bold] of "all", in order, with the seconds that each may take; what one leaves over goes to those after it:

{LIST}

[bold]Plans[/bold]:

{RUNS}

[bold]Examples[/bold]

A machine is lent for a quarter of an hour: once to see whether all is well, and, mended, once for the figures:

    python3 -m bench.gpu --plan first --out first

    python3 -m bench.gpu --plan second --out second --wheels wheels

One op, and the peaks that its limits are made of, without anybody else:

    python3 -m bench.gpu --only peaks,attention --ours

Does everything but launching work? On a machine without a GPU, or with it hidden:

    CUDA_VISIBLE_DEVICES= python3 -m bench.gpu
"""


def main(
    plan: Annotated[
        str, typer.Option(metavar="PLAN", help=f"{', '.join(PLANS)}: which parts, and their seconds.")
    ] = "all",
    only: Annotated[
        str, typer.Option(metavar="PARTS", help="Names or shell patterns, separated by commas; !PATTERN leaves out.")
    ] = "*",
    ours: Annotated[bool, typer.Option("--ours", help="Time nobody but us, and the oracle of each case.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Everything that is found (default: bench/results/GPU-DATE; without a GPU a temporary directory).",
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=1, help=f"Budget of all parts together (default: the plan's; all: {BUDGET}).")
    ] = None,
    wheels: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Wheels of rivals in pure Python, to use without installing.")
    ] = None,
) -> None:
    """Build, test, tune and measure on this machine's GPU, and say how near its limits each op comes.

    Every part is a process of its own with an end: one that crashes, hangs or fails is named with the reason, what it
    found until then counts, and the rest goes on. All that is found goes to one directory, every second: record.json,
    the parts' logs in logs.tar.gz, and the tables of tuned configurations. Without a GPU nothing is measured, but
    everything else is done: builds, machine code of the Triton kernels, and every contender that can run on a CPU once,
    on tiny tensors, to see whether their results agree.

    Exit status: 0 if every part is done, 1 otherwise.
    """
    with checking():
        if plan not in PLANS:
            raise ValueError(f"--plan: expected one of {', '.join(PLANS)}, got {plan!r}")
        known = {part.name: part for part in PLANS[plan].parts}
        parts = [known[name] for name in chosen("--only", only, list(known))]
        if wheels is not None:
            unpack(wheels)
    if ours:
        parts = [part._replace(rivals="none") for part in parts]
    gpu = runner.gpu()
    made = report.Report(
        machine={
            "gpu": gpu or report.NO_GPU,
            "date": now(),
            "versions": versions(PACKAGES) | {"CUDA": torch.version.cuda or "none"},
        }
    )
    logs = Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    folder = out or (RESULTS / f"{report.file_stem(gpu)}-{now()[:10]}" if gpu else logs / "out")
    keeper = Keeper(folder, made, logs)
    screen = console(160)
    starting = lambda part, limit: screen.print(f"{part.name}: up to {limit:.0f} s", highlight=False)  # noqa: E731
    budget = PLANS[plan].seconds if seconds is None else seconds
    for outcome in runner.run(parts, budget, logs, starting, keeper.watch):
        keeper.add(outcome)
        if outcome.status != "done":
            screen.print(f"{outcome.name}: {outcome.status}: {outcome.reason}", style="bold", markup=False)
    show(report.tables(made), str(folder), screen)
    raise typer.Exit(0 if all(part["status"] == "done" for part in made.parts) and not made.failures else 1)


def unpack(wheels: Path) -> None:
    """Put what wheels hold on the path of this process and of all that it starts. Raises ValueError without wheels."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise ValueError(f"--wheels: expected a directory with .whl files, got {wheels}")
    target = tempfile.mkdtemp(prefix="bench-gpu-wheels-")
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    sys.path.append(target)
    os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), target])


if __name__ == "__main__":
    start(main, EPILOG)

"""python -m bench.gpu, from a checkout."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.gpu import report, runner
from bench.gpu.plan import BUDGET, PARTS
from bench.harness.choose import chosen
from bench.harness.command import RESULTS, checking, console, show, start
from bench.harness.machine import now, versions

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "torchao", "flash-attn")
LIST = "\n\n".join(f"    {part.name:14} {part.seconds:3} s   {part.about}" for part in PARTS.values())
EPILOG = f"""\
[bold]Parts[/bold], in order, with the seconds that each may take; what one leaves over goes to those behind it:

{LIST}

[bold]Examples[/bold]

Everything, in {BUDGET // 60} minutes at most:

    python -m bench.gpu

One op, and the peaks that its limits are made of:

    python -m bench.gpu --only peaks,attention

Does everything but launching work? On a machine without a GPU, or with it hidden:

    CUDA_VISIBLE_DEVICES= python -m bench.gpu
"""


def main(
    only: Annotated[
        str, typer.Option(metavar="PARTS", help="Names or shell patterns, separated by commas; !PATTERN leaves out.")
    ] = "*",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The JSON (default: bench/results/GPU.json; without a GPU, beside the logs)."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Budget of all parts together.")] = BUDGET,
    logs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the parts' outputs go (default: a temporary directory).")
    ] = None,
) -> None:
    """Build, test, tune and measure on this machine's GPU, and say how near its limits each op comes.

    Every part is a process of its own with an end: one that crashes, hangs or fails is named with the reason, what it
    found until then counts, and the rest goes on. The JSON is written after every part. Without a GPU nothing is
    measured, but everything else is done: builds, machine code of the Triton kernels, and every contender that can run
    on a CPU once, on tiny tensors, to see whether their results agree.

    Exit status: 0 if every part is done, 1 otherwise.
    """
    with checking():
        parts = [PARTS[name] for name in chosen("--only", only, list(PARTS))]
    gpu = _gpu()
    made = report.Report(
        machine={
            "gpu": gpu or report.NO_GPU,
            "date": now(),
            "versions": versions(PACKAGES) | {"CUDA": torch.version.cuda or "none"},
        }
    )
    folder = logs or Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    path = out or (RESULTS / f"{report.file_stem(gpu)}.json" if gpu else folder / "no-gpu.json")
    screen = console(160)
    starting = lambda part, limit: screen.print(f"{part.name}: up to {limit:.0f} s", highlight=False)  # noqa: E731
    for outcome in runner.run(parts, seconds, folder, starting):
        made.add(outcome)
        report.write_json(made, path)
        if outcome.status != "done":
            screen.print(f"{outcome.name}: {outcome.status}: {outcome.reason}", style="bold", markup=False)
    show(report.tables(made), f"{path}; what the parts said: {folder}", screen)
    raise typer.Exit(0 if all(part["status"] == "done" for part in made.parts) and not made.failures else 1)


def _gpu() -> str:
    """Its name, asked for in another process: this one shall hold no memory of the device. Empty without one."""
    program = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    return subprocess.run([sys.executable, "-c", program], text=True, capture_output=True).stdout.strip()


if __name__ == "__main__":
    start(main, EPILOG)

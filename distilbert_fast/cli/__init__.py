"""The command `distilbert-fast`.

Exit status: 0 done; 2 input that cannot be used, with one line on stderr that says why; 3 `compress` missed a goal;
130 interrupted. Anything else is a bug and shows its trace. Heavy libraries load only when a command needs them.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from distilbert_fast.cli import bench, compare, compress, distill, evaluate, finetune, predict, prune, quantize, serve
from distilbert_fast.cli.command import EvalFile, RunCommand, TaskFile, TaskName, add
from distilbert_fast.cli.errors import plain_errors
from distilbert_fast.jobs.settings import DEMO_ROWS, DemoTraining

app = typer.Typer(
    name="distilbert-fast",
    help="Distil, compress and run BERT-family models, fast.",
    epilog="Start with [bold]distilbert-fast demo[/bold]: in minutes, on two cores, it distils, quantizes and times a "
    "real model. [bold]distilbert-fast env[/bold] shows what can run on this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(distill.app, name="distill")
app.add_typer(evaluate.app, name="evaluate")
add(app, "finetune", finetune.EPILOG, output=Path("fine-tuned"), lr=5e-5)(finetune.Finetune)
app.command("predict", epilog=predict.EPILOG)(predict.predict)
app.command("serve", epilog=serve.EPILOG)(serve.serve)
add(app, "compress", compress.EPILOG, compress.HELP, output=Path("compressed"))(compress.Compress)
app.command("compare", epilog=compare.EPILOG)(compare.compare)
app.command("bench", context_settings=bench.SETTINGS)(bench.bench)
app.command("prune", epilog=prune.EPILOG)(prune.prune)
app.command("quantize", epilog=quantize.EPILOG)(quantize.quantize)


def main() -> None:
    """Run the command line."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        import distilbert_fast

        print(f"distilbert-fast {distilbert_fast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON, for a bug report.")] = False,
) -> None:
    """Show what can run here: versions, CPU tier, GPU, and which backend serves each op.

    What cannot run is shown with the reason.
    """
    with plain_errors("nothing was changed"):
        from distilbert_fast import backends

        report = backends.report()
        if as_json:
            import json

            print(json.dumps(report, indent=2))
        else:
            _print_environment(report)


_STEPS = DemoTraining()


@add(
    app,
    "demo",
    """\
[bold]Examples[/bold]

The whole job on text that Python carries with it (pip install 'distilbert-fast\\[demo]'):

    distilbert-fast demo

Your sentences, in files with the columns sentence and label:

    distilbert-fast demo --data train.tsv --eval-data dev.tsv -o runs/mine

Your teacher, which knows the task already:

    distilbert-fast demo --data train.tsv --teacher ./my-bert --teacher-epochs 0

A data set of the Hugging Face hub, trained on a part of its rows:

    distilbert-fast demo --task glue/sst2 --max-train-rows 8000
""",
    help="""\
Distil a model, quantize it, and measure what that brought.

Fine-tunes a teacher on a text classification task, distils it into a DistilBERT of half the depth, quantizes \
that to int8, measures all three beside plain transformers, and writes the models, report.md, report.json and \
a plot.

Interrupt it whenever you like: the same command continues where it was.
""",
    output=Path("demo-output"),
)
@dataclasses.dataclass(kw_only=True)
class Demo(RunCommand):
    """See `help` above."""

    task: TaskName = None
    data: TaskFile = None
    eval_data: EvalFile = None
    max_train_rows: Annotated[
        int | None,
        typer.Option(help=f"Train on this many rows only; by default {DEMO_ROWS} of stdlib-docs, or all."),
    ] = None
    teacher_epochs: Annotated[int, typer.Option(help="Passes of fine-tuning; 0 for a teacher that knows the task.")] = (
        _STEPS.teacher_epochs
    )
    student_epochs: Annotated[int, typer.Option(help="Passes of distillation.")] = _STEPS.student_epochs
    batch_size: Annotated[int, typer.Option(help="Sentences of a training step.")] = _STEPS.batch_size
    max_length: Annotated[int, typer.Option(help="Tokens of a sentence; longer ones are cut.")] = _STEPS.max_length
    teacher_lr: Annotated[float, typer.Option(help="Peak learning rate of the fine-tuning.")] = _STEPS.teacher_lr
    student_lr: Annotated[float, typer.Option(help="Peak learning rate of the distillation.")] = _STEPS.student_lr
    seed: Annotated[int, typer.Option(help="Seed of the new head, the batches and dropout.")] = _STEPS.seed

    def run(self) -> None:
        from distilbert_fast.jobs.demo import demo

        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        steps = {name: settings.pop(name) for name in dataclasses.asdict(_STEPS) if name in settings}
        command = shlex.join(["distilbert-fast", *sys.argv[1:]])
        demo(**settings, training=dataclasses.replace(_STEPS, **steps), command=command)


def _print_environment(report: Mapping[str, Any]) -> None:
    from rich.table import Table

    from distilbert_fast.jobs.flow import console

    say = console()

    def section(title: str, rows: Mapping[str, str]) -> None:
        table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
        table.add_column(style="cyan", no_wrap=True, min_width=16)
        table.add_column(overflow="fold")
        for name, text in rows.items():
            table.add_row(name, text)
        say(table)

    cpu, states = report["cpu"], report["backends"]
    versions = {name: version or "not installed" for name, version in report["versions"].items()}
    section("versions", {"python": f"{report['python']} on {report['platform']}", **versions})
    tier = {"tier in use": cpu["tier"] or "none", "cores": f"{cpu['cores']}; torch uses {cpu['threads']} threads"}
    if cpu.get("left_to_torch"):
        tier["left to torch"] = f"products, attention and the encoder: {cpu['left_to_torch']}"
    section("CPU", tier | {f"no {name}": reason for name, reason in cpu["missing"].items()})
    section("GPU", {"devices": ", ".join(report["cuda_devices"]) or "none that torch can use"})
    section(
        "backends", {name: f"{'yes' if state['ok'] else 'no'}: {state['reason']}" for name, state in states.items()}
    )
    if report["forced_backend"]:
        section("forced by DISTILBERT_FAST_BACKEND", {"backend": report["forced_backend"]})
    serving = {op: [f"{name} on {device}" for device, name in by.items()] for op, by in report["ops"].items()}
    section("who serves each op", {op: ", ".join(places) for op, places in serving.items()})
    build = {
        name: ", ".join(value) if isinstance(value, list | tuple) else str(value)
        for name, value in report["build"].items()
    }
    section("build", build or {"": "not recorded"})

"""A command as a dataclass: its fields are its options, so that commands that share some inherit them."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from distilbert_fast.cli.errors import plain_errors

if TYPE_CHECKING:
    from distilbert_fast.jobs.task import TaskJob

# Options of several commands.
TaskName = Annotated[
    str | None,
    typer.Option(metavar="NAME_OR_ID", help="stdlib-docs (the default), or a hub data set such as glue/sst2."),
]
TaskFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="TSV, CSV, JSONL or Parquet with the columns sentence (or text) and label; for pairs sentence1 and "
        "sentence2, question1 and question2, premise and hypothesis, or question and sentence.",
    ),
]
EvalFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A file like --data to evaluate on; by default a tenth of --data is held out."),
]


@dataclasses.dataclass(kw_only=True)
class OutputCommand(ABC):
    """A command that may be interrupted, and leaves models and a report in a directory."""

    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory for the models and the report.")
    ] = Path("distilled")
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Move what is in the way in the output directory to previous-1/.")
    ] = False

    @abstractmethod
    def run(self) -> None:
        """Do the work. Raises an error of the package's own for what a user can mend."""


@dataclasses.dataclass(kw_only=True)
class RunCommand(OutputCommand):
    """One that starts from a teacher."""

    teacher: Annotated[
        str | None,
        typer.Option(metavar="DIR_OR_ID", help="BERT, RoBERTa or DistilBERT; by default that of the extra 'demo'."),
    ] = None


@dataclasses.dataclass(kw_only=True)
class SentencesCommand(RunCommand):
    """Options of a command that works on labelled sentences."""

    task: TaskName = None
    data: TaskFile = None
    eval_data: EvalFile = None
    regression: Annotated[
        bool,
        typer.Option(
            "--regression", help="Labels are numbers, taken as they are; so are a hub data set's that are floats."
        ),
    ] = False
    max_train_rows: Annotated[int | None, typer.Option(help="Train on this many rows only.")] = None
    max_length: Annotated[
        int, typer.Option(help="Tokens a row; longer sentences are cut, of a pair the longer one first.")
    ] = 128

    def job(self) -> TaskJob:
        from distilbert_fast.data.tasks import load_task
        from distilbert_fast.jobs.task import task_job

        loaded = load_task(self.task, self.data, self.eval_data, self.max_train_rows, self.regression)
        return task_job(loaded, self.max_length)


Command = TypeVar("Command", bound=OutputCommand)


def add(
    app: typer.Typer, name: str, epilog: str, help: str | None = None, **defaults: Any
) -> Callable[[type[Command]], type[Command]]:
    """Add a class as a command; ``defaults`` stand in for those of fields that it inherits.

    Its own options come first in each panel of the help, whose text is the class's docstring unless given.
    """

    def register(command: type[Command]) -> type[Command]:
        def run(**given: Any) -> None:
            with plain_errors("the same command continues"):
                command(**given).run()

        run.__signature__ = inspect.Signature(_parameters(command, defaults))  # type: ignore[attr-defined]
        app.command(name, help=help or command.__doc__, epilog=epilog)(run)
        return command

    return register


def _parameters(command: type[OutputCommand], defaults: dict[str, Any]) -> list[inspect.Parameter]:
    """The options of a command as a function's parameters: panel by panel, in each those of the class itself first."""
    hints = get_type_hints(command, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(command)}  # those of base classes first
    panels = {name: hints[name].__metadata__[0].rich_help_panel for name in fields}
    order = list(dict.fromkeys(panels.values()))
    parameters = []
    for name in dict.fromkeys(name for part in command.__mro__ for name in inspect.get_annotations(part)):
        default = defaults.get(name, fields[name].default)
        default = inspect.Parameter.empty if default is dataclasses.MISSING else default
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
        )
    return sorted(parameters, key=lambda parameter: order.index(panels[parameter.name]))

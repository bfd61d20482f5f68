"""A command as a dataclass: its fields are its options, so that commands that share some inherit them."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from distilbert_fast.cli.errors import plain_errors


@dataclasses.dataclass(kw_only=True)
class RunCommand(ABC):
    """What starts from a teacher, may be interrupted, and leaves models and a report in a directory."""

    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory for the models and the report.")
    ] = Path("distilled")
    teacher: Annotated[
        str | None,
        typer.Option(metavar="DIR_OR_ID", help="BERT, RoBERTa or DistilBERT; by default that of the extra 'demo'."),
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Move what is in the way in the output directory to previous-1/.")
    ] = False

    @abstractmethod
    def run(self) -> None:
        """Do it; what a user can mend is an error of the package's own."""


Command = TypeVar("Command", bound=RunCommand)


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


def _parameters(command: type[RunCommand], defaults: dict[str, Any]) -> list[inspect.Parameter]:
    """Of a function with the options of a command, panel by panel."""
    hints, fields = get_type_hints(command, include_extras=True), {f.name: f for f in dataclasses.fields(command)}
    names = dict.fromkeys(name for part in command.__mro__ for name in inspect.get_annotations(part))
    panels: dict[str, int] = {}
    for part in reversed(command.__mro__):
        for name in inspect.get_annotations(part):
            panels.setdefault(_panel(hints[name]), len(panels))
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
            annotation=hints[name],
        )
        for name in sorted(names, key=lambda name: panels[_panel(hints[name])])
        for default in [defaults.get(name, fields[name].default)]
    ]


def _panel(hint: Any) -> str:
    return hint.__metadata__[0].rich_help_panel or ""

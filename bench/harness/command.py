"""The command line of a bench: what is wrong with it, where its record goes, how its tables are shown."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import typer
from rich.console import Console, RenderableType

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


def start(main: Callable[..., None], epilog: str) -> None:
    app = typer.Typer(rich_markup_mode="rich", add_completion=False)
    app.command(epilog=epilog)(main)
    app()


@contextlib.contextmanager
def checking() -> Iterator[None]:
    """A ValueError inside is a wrong command line: said, and exit status 2."""
    try:
        yield
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def console(width: int = 150) -> Console:
    """As wide as the terminal, or as given where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=width)


def show(tables: Iterable[RenderableType], written: str, to: Console) -> None:
    for table in tables:
        to.print(table)
    to.print(f"\nwritten: {written}", highlight=False)

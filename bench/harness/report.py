"""What records and tables of all benches have in common."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text


def write_json(record: Mapping[str, Any], path: Path) -> None:
    """Whole or not at all: a run that is ended while it writes leaves the last record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{path.name}")
    made.write_text(json.dumps(record, indent=1) + "\n")
    made.replace(path)


def table(title: str, columns: Iterable[str], left: Iterable[int] = (0,)) -> Table:
    """Empty, with its columns; those not named by ``left`` hold figures and are not broken."""
    left, made = set(left), Table(title=Text(title), title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i in left else "right", no_wrap=i not in left)
    return made


def milliseconds(seconds: float, digits: int = 3) -> str:
    return f"{1000 * seconds:.{digits}f}" if seconds < 0.1 else f"{1000 * seconds:.0f}"


def span(spread: Mapping[str, float], digits: int = 3) -> str:
    """ "low-high", in milliseconds."""
    return f"{milliseconds(spread['low'], digits)}-{milliseconds(spread['high'], digits)}"

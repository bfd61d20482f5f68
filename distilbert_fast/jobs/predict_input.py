"""What `distilbert-fast predict` reads: the texts of a file's rows, in windows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from distilbert_fast.data.published import PAIR_COLUMNS
from distilbert_fast.data.rows import Row, Rows
from distilbert_fast.jobs.settings import RecipeError, require
from distilbert_fast.serving.tasks import ServedTask, name_of

JOB = "predict"
WINDOW_ROWS, WINDOW_CHARACTERS = 1024, 2**23  # whichever is reached first
_LOOKED_AT = 100  # rows at the beginning, of which one must be readable
_TEXTS = ("text", "sentence")
_PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "question-answering": (("question", "context"),),
    "reranking": (("query", "text"), ("query", "passage"), ("query", "document"), ("question", "sentence")),
    "text-classification": PAIR_COLUMNS,
    "regression": PAIR_COLUMNS,
}


class TaskTexts:
    """The texts that a task reads of rows.

    Args:
        rows: where they come from.
        task: what is asked of them.
        columns: of the text, or of the two texts; none: those that are named as usual.
        keep: columns that are written beside the answer; None: all.

    Raises:
        RecipeError: no rows, none that can be read among the first, no such columns, or one that is called as one of
            the answer.

    Attributes:
        columns: of the text or texts.
        source: what messages about the rows begin with.
    """

    def __init__(self, rows: Rows, task: ServedTask, columns: Sequence[str], keep: Sequence[str] | None) -> None:
        self.rows, self.task, self.keep, self.source = rows, task, keep, rows.source
        head = list(itertools.islice(rows, _LOOKED_AT))
        self.given: Iterator[Row] = itertools.chain(head, rows)
        self._answer = task.columns()
        if not head:
            raise RecipeError(f"{self.source}: holds no rows")
        readable = [row for row in head if row.fault is None]
        if not readable:
            raise RecipeError(f"{self.source}: {rows.by} {head[0].number}: {head[0].fault}")
        names = rows.names or list(dict.fromkeys(name for row in readable for name in row.columns))
        self.columns = self._chosen(columns, names)
        unknown = [name for name in keep or () if name not in names]
        require(not unknown, f"{JOB}: keep", f"columns of {', '.join(names)}", ", ".join(map(repr, unknown)))
        if same := [name for name in self._answer if name in (names if keep is None else keep)]:
            what = f"has a column {same[0]!r}, as the answer has"
            raise RecipeError(f"{self.source}: {what}; name the columns to write with --keep")

    def _chosen(self, asked: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
        """The columns of the texts, among those that there are."""
        task, pair = name_of(self.task), self.task.pair
        choices: list[tuple[str, ...]] = [*_PAIRS.get(task, ()), *([] if pair else [(name,) for name in _TEXTS])]
        if asked:
            least, most = (2 if pair else 1), (1 if self.task.single else 2)
            expected = f"{least}{'' if least == most else f' or {most}'} for {task}"
            require(least <= len(asked) <= most, f"{JOB}: columns", expected, len(asked))
            choices = [tuple(asked)]
        found = next((choice for choice in choices if set(choice) <= set(names)), None)
        if found is None:
            wanted = "a column" if len(choices) == 1 and len(choices[0]) == 1 else "columns"
            expected = " or ".join(" and ".join(choice) for choice in choices)
            what = f"expected {wanted} {expected}, got {', '.join(names) or 'none'}"
            raise RecipeError(f"{self.source}: {what}{'' if asked else '; name it with --column'}")
        return found

    def of(self, row: Row) -> Any:
        """The text or texts of a row, whatever they are."""
        cells = tuple(row.columns.get(name) for name in self.columns)
        return cells[0] if len(cells) == 1 else cells

    def fault(self, row: Row) -> str | None:
        """Why a row cannot be answered, as far as its text does not matter."""
        if row.fault is not None:
            return row.fault
        absent = next((name for name in self.columns if name not in row.columns), None)
        if absent is not None:
            return f"has no column {absent!r}"
        if self.keep is None and self.rows.names is None:
            twice = next((name for name in self._answer if name in row.columns), None)
            return None if twice is None else f"has a column {twice!r}, as the answer has"
        return None

    def windows(self) -> Iterator[list[Row]]:
        """Rows until there are enough of them, or of their characters."""
        window: list[Row] = []
        size = 0
        for row in self.given:
            window.append(row)
            size += len(row.raw)
            if len(window) == WINDOW_ROWS or size >= WINDOW_CHARACTERS:
                yield window
                window, size = [], 0
        if window:
            yield window


def raw(rows: Sequence[Row]) -> bytes:
    """The text that rows were read from."""
    return "".join([row.raw for row in rows]).encode("utf-8", "surrogateescape")

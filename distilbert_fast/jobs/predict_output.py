"""What `distilbert-fast predict` writes: the rows of a shard, and shards joined to one file."""

from __future__ import annotations

import datetime
import decimal
import itertools
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from distilbert_fast.data.rows import Row, Rows
from distilbert_fast.files.text import lone_surrogate, shortened

REJECTED = "rejected.jsonl"


class Answered(NamedTuple):
    """A row with its answer, by the names of columns; or with the reason why it has none."""

    row: Row
    fields: Mapping[str, Any] | None
    refused: str | None = None
    truncated: bool = False
    tokens: int = 0


class Writer(ABC):
    """Writes shards, and joins them.

    Args:
        rows: where the rows come from.
        columns: those of answers, by name.
        keep: columns of the input that are written too; None: all.
    """

    suffix: str

    def __init__(self, rows: Rows, columns: Mapping[str, pyarrow.DataType], keep: Sequence[str] | None) -> None:
        self.form, self.columns, self.keep = rows.form, columns, keep

    @abstractmethod
    def write(self, windows: Iterable[Sequence[Answered]], path: Path) -> list[Answered]:
        """Write the answered rows of a shard's windows to ``path``; return the rows that cannot be written or were
        refused before."""

    @abstractmethod
    def join(self, shards: Sequence[Path], output: Path) -> None: ...

    def kept(self, row: Row) -> Mapping[str, Any]:
        """The cells of a row that are written."""
        return row.columns if self.keep is None else {name: row.columns.get(name) for name in self.keep}


class JsonLines(Writer):
    """An object a row. A line of JSONL is kept as it was written, and the answer put at its end."""

    suffix = ".jsonl"

    def write(self, windows: Iterable[Sequence[Answered]], path: Path) -> list[Answered]:
        refused = []
        with open(path, "w", encoding="utf-8", newline="") as file:
            for one in itertools.chain.from_iterable(windows):
                if one.fields is None:
                    refused.append(one)
                    continue
                try:
                    line = self._line(one)
                except (TypeError, ValueError) as error:
                    refused.append(one._replace(fields=None, refused=f"cannot be written as JSON: {error}"))
                else:
                    file.write(line)
        return refused

    def _line(self, one: Answered) -> str:
        """Raises TypeError or ValueError for cells that JSON has no form for."""
        answer = json.dumps(one.fields, default=_as_json, ensure_ascii=False)
        if self.form == "jsonl" and self.keep is None:
            given = one.row.raw.strip()[:-1].rstrip()
        else:
            cells = json.dumps(self.kept(one.row), default=_as_json, ensure_ascii=False, allow_nan=False)
            if (half := lone_surrogate(cells)) is not None:
                raise ValueError(half)
            given = cells[:-1]
        return f"{given}{'' if given == '{' else ', '}{answer[1:]}\n"

    def join(self, shards: Sequence[Path], output: Path) -> None:
        join_lines(shards, output)


class Parquet(Writer):
    """A table. Columns of Parquet keep their types, cells of CSV, TSV and text are strings; what types the columns of
    JSONL have, its first window says."""

    suffix = ".parquet"

    def __init__(self, rows: Rows, columns: Mapping[str, pyarrow.DataType], keep: Sequence[str] | None) -> None:
        super().__init__(rows, columns, keep)
        self.schema: pyarrow.Schema | None = None  # of what is kept
        if rows.schema is not None:
            names = rows.schema.names if keep is None else list(keep)
            self.schema = pyarrow.schema([rows.schema.field(name) for name in names])
        elif rows.names is not None:
            names = rows.names if keep is None else list(keep)
            self.schema = pyarrow.schema([(name, pyarrow.string()) for name in names])

    def resume(self, shard: Path) -> None:
        """Take the types that the first shard has."""
        found = pyarrow.parquet.read_schema(shard)
        self.schema = pyarrow.schema([field for field in found if field.name not in self.columns])

    def write(self, windows: Iterable[Sequence[Answered]], path: Path) -> list[Answered]:
        refused: list[Answered] = []
        writer: Any = None
        try:
            for window in windows:
                refused += [one for one in window if one.fields is None]
                answered = [one for one in window if one.fields is not None]
                if self.schema is None and answered:
                    self.schema = self._inferred(answered)
                given, faults = self._cells(answered)
                refused += faults
                table = self._with_answers(*given)
                writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()
        return sorted(refused, key=lambda one: one.row.number)

    def _inferred(self, answered: Sequence[Answered]) -> pyarrow.Schema:
        """Types that the rows agree on, by columns; null ones become strings."""
        rows = [self.kept(one.row) for one in answered]
        fields = []
        for name in dict.fromkeys(name for row in rows for name in row):
            try:
                kind = pyarrow.array([row.get(name) for row in rows]).type
            except (pyarrow.ArrowException, TypeError, OverflowError):
                kind = pyarrow.array([next(row[name] for row in rows if row.get(name) is not None)]).type
            fields.append((name, pyarrow.string() if pyarrow.types.is_null(kind) else kind))
        return pyarrow.schema(fields)

    def _cells(self, answered: Sequence[Answered]) -> tuple[tuple[Any, list[Answered]], list[Answered]]:
        """A table of what is kept with the rows it is of, and the rows that have other columns or types."""
        schema = self.schema if self.schema is not None else pyarrow.schema([])
        try:
            return (self._table([self.kept(one.row) for one in answered], schema), list(answered)), []
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
            fits, faults = [], []
            for one in answered:
                try:
                    self._table([self.kept(one.row)], schema)
                    fits.append(one)
                except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
                    reason = f"other columns than the rows before: {str(error).splitlines()[0]}"
                    faults.append(one._replace(fields=None, refused=reason))
            return (self._table([self.kept(one.row) for one in fits], schema), fits), faults

    def _table(self, rows: Sequence[Mapping[str, Any]], schema: pyarrow.Schema) -> Any:
        known = set(schema.names)
        for row in rows:
            if not known.issuperset(row):
                other = next(name for name in row if name not in known)
                raise ValueError(f"expected columns of {', '.join(schema.names)}, got {other!r}")
        columns = []
        for field in schema:
            cells = [row.get(field.name) for row in rows]
            try:
                columns.append(pyarrow.array(cells, type=field.type))
                if self.form == "jsonl" and not _same(cells, columns[-1].to_pylist()):
                    raise TypeError("a part of it would be lost")
            except (pyarrow.ArrowException, TypeError, OverflowError) as error:
                cell = "" if len(rows) > 1 else f" in {shortened(rows[0].get(field.name))}"
                raise ValueError(f"expected {field.type} as {field.name}{cell}: {error}") from error
        return pyarrow.Table.from_arrays(columns, schema=schema) if columns else None

    def _with_answers(self, cells: Any, answered: Sequence[Answered]) -> Any:
        columns = {} if cells is None else {name: cells[name] for name in cells.column_names}
        for name, kind in self.columns.items():
            found = [one.fields[name] for one in answered if one.fields is not None]
            if found and isinstance(found[0], np.ndarray):
                values = pyarrow.array(np.concatenate(found), type=kind.value_type)
                columns[name] = pyarrow.FixedSizeListArray.from_arrays(values, kind.list_size)
            else:
                columns[name] = pyarrow.array(found, type=kind)
        fields = [] if cells is None else [*cells.schema]
        schema = pyarrow.schema([*fields, *((name, kind) for name, kind in self.columns.items())])
        return pyarrow.Table.from_arrays([*columns.values()], schema=schema)

    def join(self, shards: Sequence[Path], output: Path) -> None:
        with pyarrow.parquet.ParquetWriter(output, pyarrow.parquet.read_schema(shards[0])) as writer:
            for shard in shards:
                writer.write_table(pyarrow.parquet.read_table(shard))


WRITERS: dict[str, type[Writer]] = {kind.suffix: kind for kind in (JsonLines, Parquet)}


def write_refused(refused: Sequence[Answered], by: str, path: Path) -> None:
    """An object for each row that has no answer: its number, the reason, and the row as it was."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        for one in refused:
            content = one.row.raw.rstrip("\r\n") if one.row.raw else one.row.columns
            said = {by: one.row.number, "reason": one.refused, "content": content}
            file.write(json.dumps(said, default=repr) + "\n")


def join_lines(parts: Sequence[Path], output: Path) -> None:
    with open(output, "wb") as whole:
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, whole, 1 << 20)


def _same(given: Any, held: Any) -> bool:
    """Whether Arrow holds what it was given: it drops fractions of int64 and fields that a struct does not have."""
    if given == held:
        return True
    if isinstance(given, dict) and isinstance(held, dict):
        return all(_same(given.get(name), held.get(name)) for name in {**given, **held})
    if isinstance(given, list) and isinstance(held, list):
        return len(given) == len(held) and all(map(_same, given, held))
    return False


def _as_json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"a cell of {type(value).__name__}")

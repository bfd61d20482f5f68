"""The rows of a user's file, one after another, however large it is.

A row that cannot be read keeps its place and says why; what stands after it is read. Lines end with LF, CRLF or CR.
"""

from __future__ import annotations

import contextlib
import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet

from distilbert_fast.data.tables import FORMATS
from distilbert_fast.files.durable import sha256
from distilbert_fast.files.text import check_file, json_object, refuse_encoding, refuse_input, refuse_twice

LINE_FORMATS = {"jsonl": ".jsonl", "csv": ".csv", "tsv": ".tsv", "txt": ".txt"}
STANDARD_INPUT = "-"
_LONGEST = 2**24  # characters of a line, and of a cell
_BATCH = 1024  # rows of Parquet that are read at once


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        number: the line on which it begins; in Parquet, its own number. From 1 on.
        columns: cells by name; cells of CSV, TSV and text are str. Empty where it cannot be read.
        raw: the text it was read from, with its line end; bytes that are not UTF-8 are surrogates. "" in Parquet.
        fault: why it cannot be read; None if it can.
    """

    number: int
    columns: dict[str, Any]
    raw: str
    fault: str | None = None


class Rows:
    """The rows of a file or of standard input, which can be iterated over once.

    Args:
        op: what messages begin with.
        source: .jsonl, .csv, .tsv, .txt or .parquet; "-" for standard input.
        form: one of LINE_FORMATS for standard input, and for a file of lines with another suffix.

    Raises:
        ValueError: a file that is missing, empty, of an unknown form, or of another encoding than UTF-8.

    Attributes:
        form: "jsonl", "csv", "tsv", "txt" or "parquet".
        names: the columns, where the file says so before its rows; None for JSONL.
        schema: of Parquet.
        size: bytes, or rows of Parquet; None for standard input.
        by: what a row is counted by, "line" or "row".
    """

    def __init__(self, op: str, source: str | Path, form: str | None = None) -> None:
        self.source = f"{op}: input: {'standard input' if str(source) == STANDARD_INPUT else repr(str(source))}"
        suffix = Path(source).suffix.lower()
        known = {**{suffix: name for name, suffix in LINE_FORMATS.items()}, ".parquet": "parquet"}
        if form is not None and form not in LINE_FORMATS:
            refuse_input(f"{op}: format", f"one of {', '.join(LINE_FORMATS)}", form)
        if form is None and suffix not in known:
            names = ", ".join(sorted([*FORMATS, ".txt"]))
            refuse_input(self.source, f"a name that ends with one of {names}, or a format", repr(suffix))
        self.form = form or known[suffix]
        self.path = None if str(source) == STANDARD_INPUT else Path(source)
        self.names: list[str] | None = None
        self.schema: Any = None
        self.size: int | None = None
        self.by = "row" if self.form == "parquet" else "line"
        if self.path is not None:
            check_file(op, "input", self.path)
        if self.form == "parquet":
            self._open_parquet()
        else:
            self._open_lines()

    @property
    def identity(self) -> str | None:
        """SHA-256 of a Parquet file. Of lines None: the text of each row tells."""
        return sha256(self.path) if self.form == "parquet" and self.path is not None else None

    def __iter__(self) -> Iterator[Row]:
        return self._rows

    def close(self) -> None:
        if self.form == "parquet":
            self._file.close()
        elif self.path is not None:
            self._stream.close()
        elif (buffer := self._stream.detach()) is not sys.stdin.buffer:
            buffer.detach()

    # Parquet ------------------------------------------------------------------------------------------------------

    def _open_parquet(self) -> None:
        with self._reading():
            self._file = file = pyarrow.parquet.ParquetFile(self.path)
        self.schema, self.size = file.schema_arrow, file.metadata.num_rows
        self.names = [*self.schema.names]
        with self._refusing():
            refuse_twice(self.names)
        self._rows = self._of_parquet(file)

    def _of_parquet(self, file: Any) -> Iterator[Row]:
        number = 0
        with self._reading():
            for batch in file.iter_batches(_BATCH):
                for cells in batch.to_pylist():
                    number += 1
                    yield Row(number, cells, "")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise ValueError(f"{self.source}: cannot be read as Parquet: {str(error).splitlines()[0]}") from error

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{self.source}: {error}") from error

    # Lines --------------------------------------------------------------------------------------------------------

    def _open_lines(self) -> None:
        raw: Any = sys.stdin.buffer if self.path is None else open(self.path, "rb")  # noqa: SIM115, closed by ``close``
        binary = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)
        refuse_encoding(self.source, binary.peek(4)[:4])
        if self.path is not None:
            self.size = self.path.stat().st_size
        self._stream = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self._number = 0  # of the line that was read last
        self._long = False
        if self.form in ("csv", "tsv"):
            self._open_separated()
        else:
            self._rows = self._of_objects() if self.form == "jsonl" else self._of_text()
            self.names = ["text"] if self.form == "txt" else None

    def _lines(self) -> Iterator[str]:
        """Lines with their ends; of one that is too long its beginning, after which ``_long`` is true."""
        while line := self._stream.readline(_LONGEST):
            self._number += 1
            self._long = False
            if len(line) == _LONGEST and line[-1] not in "\r\n":
                self._long = True
                while (rest := self._stream.readline(_LONGEST)) and rest[-1] not in "\r\n":
                    pass
            yield line

    def _fault(self, raw: str) -> str | None:
        if self._long:
            return f"a line of more than {_LONGEST} characters, which is shown in part"
        if raw.isascii():
            return None
        try:
            raw.encode()
        except UnicodeEncodeError as error:
            return f"expected UTF-8, got byte 0x{ord(raw[error.start]) - 0xDC00:02x} at character {error.start}"
        return None

    def _of_text(self) -> Iterator[Row]:
        for raw in self._lines():
            yield Row(self._number, {"text": raw.rstrip("\r\n")}, raw, self._fault(raw))

    def _of_objects(self) -> Iterator[Row]:
        for raw in self._lines():
            if raw.isspace():
                continue
            fault, columns = self._fault(raw), {}
            if fault is None:
                try:
                    columns = json_object(raw.rstrip("\r\n"))
                except ValueError as error:
                    fault = str(error)
            yield Row(self._number, columns, raw, fault)

    def _open_separated(self) -> None:
        dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if self.form == "tsv" else {}
        self._taken: list[str] = []  # lines of the row that is being read
        self._ended = False
        reader = csv.reader(self._taking(), **dialect)
        with self._refusing():
            cells = next((cells for cells in reader if cells and any(cell.strip() for cell in cells)), None)
            if cells is None or self._ended:
                raise ValueError("it holds no line of column names")
            if (why := self._fault("".join(self._taken))) is not None:
                raise ValueError(f"line {self._number}: {why}")
            refuse_twice([name for name in cells if name])
        self.names = [name or f"Unnamed: {at}" for at, name in enumerate(cells)]
        if self.form == "csv" and len(cells) == 1 and "\t" in cells[0]:
            raise ValueError(f"{self.source}: has one column, {cells[0]!r}; if tabs separate its columns, name it .tsv")
        self._rows = self._of_cells(reader)

    def _taking(self) -> Iterator[str]:
        """Lines for the CSV reader, then an empty one, which belongs to no row unless a quote is open."""
        for line in self._lines():
            self._taken.append(line)
            yield line
        self._ended = True
        yield ""

    def _of_cells(self, reader: Any) -> Iterator[Row]:
        names = self.names or []
        before = csv.field_size_limit(_LONGEST)
        try:
            while not self._ended:
                self._taken.clear()
                number = self._number + 1
                fault: str | None = None
                cells: list[str] = []
                try:
                    cells = next(reader, [])
                except csv.Error as error:
                    fault = str(error)
                raw = "".join(self._taken)
                if fault is None and (not cells or not raw.strip()):
                    continue
                fault = fault or self._fault(raw)
                if fault is None and self._ended:
                    fault = "a quote is open at the end of the file"
                if fault is None and len(cells) > len(names):
                    fault = f"expected {len(names)} cells as in the line of names, got {len(cells)}"
                cells += [""] * (len(names) - len(cells))
                yield Row(number, {} if fault else dict(zip(names, cells, strict=True)), raw, fault)
        finally:
            csv.field_size_limit(before)

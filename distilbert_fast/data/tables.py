"""Where the rows of a task come from: files of the user's, or a data set of the Hugging Face hub."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow.parquet

from distilbert_fast.files.text import (
    check_file,
    json_object,
    lines,
    lone_surrogate,
    read_text,
    refuse_input,
    refuse_twice,
    shortened,
)

FORMATS = {".tsv": "TSV", ".csv": "CSV", ".jsonl": "JSONL", ".parquet": "Parquet"}
EVAL_PERCENT = 10  # of a file's rows when no evaluation file is given
EVAL_SPLITS = ("validation", "validation_matched", "test")  # of a hub data set, the best first

_Row = TypeVar("_Row", bound=tuple[Sequence[str], Any])  # the texts of a row, and what they are labelled with


@dataclass(frozen=True)
class Table:
    """The cells of a file, column by column, as they are written. Cells of CSV and TSV, and numbers in JSONL, are str.

    Attributes:
        columns: cells by the name of their column.
        class_names: of columns whose numbers stand for names, as `datasets` writes them to Parquet.
    """

    columns: Mapping[str, Sequence[Any]]
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


def read_table(op: str, argument: str, path: Path) -> Table:
    """A file of one of `FORMATS`; no "NA" becomes a null, no 1 a 1.0, no "2020-01-01" a date.

    Raises ValueError with the reader's reason.
    """
    kind = FORMATS[path.suffix.lower()]
    check_file(op, argument, path)
    text = "" if kind == "Parquet" else read_text(op, argument, path)
    try:
        if kind == "Parquet":
            return _parquet(path)
        return _jsonl(text) if kind == "JSONL" else _separated(kind, text)
    except (OSError, ValueError, RecursionError, csv.Error, pyarrow.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if kind == "CSV" and "\t" in lines(text)[0]:
            reason += "; if tabs separate its columns, name it .tsv"
        raise ValueError(f"{op}: {argument}: cannot read {str(path)!r} as {kind}: {reason}") from error


def _parquet(path: Path) -> Table:
    table = pyarrow.parquet.read_table(path)
    refuse_twice(table.column_names)
    try:
        features = datasets.Features.from_arrow_schema(table.schema)
    except Exception as error:  # `datasets` may raise anything for metadata that it did not write
        if b"huggingface" not in (table.schema.metadata or {}):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"its metadata 'huggingface' are none of `datasets`: {reason}") from error
    names = _named_classes(features)
    for name, found in names.items():
        if not (isinstance(found, list) and all(isinstance(one, str) for one in found)):
            refuse_input("its metadata 'huggingface'", f"names of the classes of {name!r}", repr(found))
    return Table({name: table[name].to_pylist() for name in table.column_names}, names)


def _jsonl(text: str) -> Table:
    """An object a line. `json`, since Arrow's reader makes dates of strings and stops at rows above its block size."""
    rows = []
    for number, line in enumerate(lines(text), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json_object(line, numbers_as_written=True))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    names = dict.fromkeys(name for row in rows for name in row)
    return Table({name: [row.get(name) for row in rows] for name in names})


def cells_by_line(kind: str, text: str) -> list[tuple[int, list[str]]]:
    """The rows of TSV (no quoting) or CSV (quotes), each with its last line's number, without lines of white space.

    Cells are read byte for byte (pandas changes some at the borders of its buffer). Raises ValueError or csv.Error.
    """
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "TSV" else {}
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        # the empty line after the last one belongs to no row, unless a quote is open
        reader = csv.reader(chain(io.StringIO(text, newline=""), [""]), **dialect)
        rows = [(reader.line_num, row) for row in reader]
    finally:
        csv.field_size_limit(limit)
    if rows.pop()[1]:
        raise ValueError("a quote is open at the end of the file")
    return [(line, row) for line, row in rows if row and not (len(row) == 1 and row[0] and not row[0].strip(" \t"))]


def cells_of(source: str, kind: str, text: str) -> list[tuple[int, list[str]]]:
    """``cells_by_line``, whose ValueError names the source."""
    try:
        return cells_by_line(kind, text)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{source}: cannot be read as {kind}: {error}") from error


def _separated(kind: str, text: str) -> Table:
    """A shorter row has empty cells at its end."""
    rows = cells_by_line(kind, text)
    if not rows:
        raise ValueError("it holds no line of column names")
    names = rows.pop(0)[1]
    refuse_twice([name for name in names if name])
    for line, row in rows:
        if len(row) > len(names):
            refuse_input(f"line {line}", f"{len(names)} cells as in the line of names", len(row))
    columns = zip_longest(*(row for _, row in rows), fillvalue="") if rows else ()
    cells = dict(zip_longest(range(len(names)), map(list, columns), fillvalue=[""] * len(rows)))
    return Table({name or f"Unnamed: {at}": cells[at] for at, name in enumerate(names)})


def _named_classes(features: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """The names that the numbers of columns, or of lists in them, stand for; `features` are those of `datasets`."""
    names = {name: getattr(getattr(of, "feature", of), "names", None) for name, of in features.items()}
    return {name: found for name, found in names.items() if found}


def as_written(cell: object) -> str | None:
    """A text or a number as text, "" for a missing one; None for what is neither, such as a list or a date."""
    if cell is None or cell != cell:  # NaN
        return ""
    if isinstance(cell, bool):
        return str(cell).lower()
    return str(cell) if isinstance(cell, (str, int, float, Decimal)) else None


def file_name(path: Path) -> str:
    """Name a task after its file and folder, `sst2/train.tsv`: most data files are called train."""
    return "/".join(path.resolve().parts[-2:])


def hub_splits(op: str, name: str, known: str = "") -> dict[str, Table]:
    """The splits of a hub data set, "owner/set" or "owner/set/config", with one called train.

    `known`: another meaning of the name, for the message of the ValueError if it is not on the hub.
    """
    owner, _, rest = name.partition("/")
    if owner == "glue":
        parts = ["nyu-mll/glue", rest]
    else:
        repository, _, config = rest.partition("/")
        parts = [f"{owner}/{repository}" if repository else owner, *([config] if config else [])]
    try:
        splits = datasets.load_dataset(*parts)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{op}: name: {name!r} is not {known}, and the Hugging Face hub did not give a data set for it: {reason}"
            if known
            else f"{op}: name: the Hugging Face hub did not give the data set {name!r}: {reason}"
        ) from error
    if "train" not in splits:
        raise ValueError(f"{op}: name: {name!r} has no split train; its splits: {', '.join(splits)}")
    return {
        split: Table({column: rows[column] for column in rows.column_names}, _named_classes(rows.features))
        for split, rows in splits.items()
    }


def check_sources(op: str, data: Any, eval_data: Any, max_train_rows: int | None) -> None:
    if max_train_rows is not None and max_train_rows < 2:
        refuse_input(f"{op}: max_train_rows", "at least 2", max_train_rows)
    if data is None and eval_data is not None:
        raise ValueError(f"{op}: eval_data: given without data")


def text_of(row: str, cell: object, expected: str, name: str) -> str:
    """A cell that must hold a text or a number, as text. Raises ValueError, which begins with `row`."""
    text = as_written(cell)
    if text is None or (half := lone_surrogate(text)) is not None:
        refuse_input(row, expected, shortened(cell) if text is None else half)
    if not text.strip():
        raise ValueError(f"{row} has an empty {name}")
    return text


def refuse_unknown(op: str, what: str, unknown: Collection[str], known: Sequence[str]) -> None:
    """Raise ValueError for a label or tag that the evaluation split alone has."""
    if unknown:
        raise ValueError(
            f"{op}: the evaluation split has the {what} {min(unknown)!r}, which the training split has not; its "
            f"{what}s: {', '.join(map(repr, known))}"
        )


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def is_held_out(text: str) -> bool:
    return hashed(text) % 100 < EVAL_PERCENT


def folded(texts: Sequence[str]) -> str:
    """Map texts that differ only in case and spaces to the same string."""
    return "\0".join(" ".join(text.lower().split()) for text in texts)


def hold_out(op: str, rows: Sequence[_Row], what: str) -> tuple[list[_Row], list[_Row]]:
    """Rows to train on and about EVAL_PERCENT % of the distinct ones to evaluate on, chosen by the hash of their texts.

    Raises ValueError where there are too few of them; `what` is what users call them.
    """
    parts: dict[bool, list[_Row]] = {False: [], True: []}
    for row in rows:
        parts[is_held_out(folded(row[0]))].append(row)
    if not all(parts.values()):
        raise ValueError(
            f"{op}: data: expected enough distinct {what} to hold some out for evaluation, got "
            f"{len({folded(texts) for texts, _ in rows})}; give eval_data"
        )
    return parts[False], parts[True]


def limited(rows: list[_Row], most: int | None) -> list[_Row]:
    """So many of the rows, chosen by the hash of texts and place, in their order; all when None."""
    if most is None or most >= len(rows):
        return rows
    chosen = sorted(range(len(rows)), key=lambda i: hashed("\0".join([*rows[i][0], str(i)])))[:most]
    return [rows[i] for i in sorted(chosen)]


def class_order(
    op: str, mine: Sequence[str], theirs: Sequence[str], kept: bool, fewer: bool = False
) -> list[int] | None:
    """Reorder labels to match the teacher: each class's place in its classes, ignoring case; None if it has others.

    Args:
        op: the name with which error messages begin.
        mine: names of the data's classes.
        theirs: the teacher's, in the order of its logits.
        kept: the teacher's head is taken as it is, not trained.
        fewer: the teacher may have more classes than the data.

    Raises:
        ValueError: the head is kept, and it has as many classes with other names. Names without meaning (LABEL_0 in
            the model, numbers in the data) are matched by their order.
    """
    ours, others = ([name.casefold() for name in of] for of in (mine, theirs))
    distinct = len(set(ours)) == len(ours) and len(set(others)) == len(others)
    if distinct and (set(ours) == set(others) or (fewer and set(ours) < set(others))):
        return [others.index(name) for name in ours]
    telling = not all(re.fullmatch(r"-?\d+", name) for name in ours)
    named = not all(re.fullmatch(r"label_\d+", name) for name in others)
    if kept and telling and named and len(ours) == len(others):
        raise ValueError(
            f"{op}: data: expected the teacher's labels {', '.join(map(repr, theirs))}, got "
            f"{', '.join(map(repr, mine))}; rename them, or train the teacher on them (teacher_epochs)"
        )
    return None


def names_in_order(mine: Sequence[str], theirs: Sequence[str], order: Sequence[int]) -> tuple[str, ...]:
    """The classes in the teacher's order; classes that the data has are called as in the data."""
    own = dict(zip(order, mine, strict=True))
    return tuple(own.get(at, name) for at, name in enumerate(theirs))

"""Where the texts of a corpus come from: files, or a data set of the Hugging Face hub, read by `datasets`."""

from __future__ import annotations

import csv
import errno
import glob
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow

from distilbert_fast.files.durable import regular_size, sha256
from distilbert_fast.files.text import column_names, json_object, lone_surrogate, refuse_input, refuse_odd_line_ends
from distilbert_fast.ops._check import refuse

# Where it skips blank lines, pandas loses spaces that begin a line at a border of its buffer.
_SEPARATED: Mapping[str, Any] = {"encoding": "utf-8-sig", "na_filter": False, "skip_blank_lines": False}
# What reads a file, by its suffix. Every cell of CSV and TSV is a text, "NA" and "007" too; TSV has no quoting.
# JSONL is read as lines: the reader for it makes dates of texts.
READERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"encoding": "utf-8-sig"}),
    ".jsonl": ("text", {"encoding": "utf-8-sig"}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {**_SEPARATED, "sep": ","}),
    ".tsv": ("csv", {**_SEPARATED, "sep": "\t", "quoting": csv.QUOTE_NONE}),
}
_LINE = "line"  # the column of JSONL's lines
_HEAD = 1 << 20  # bytes of a file of lines that are looked at for their ends
_LOOKED_AT = 100  # of them, for their names
_COLUMNS = ("text", "sentence")  # what a column of texts is called


class OpenTexts(NamedTuple):
    """Texts that were opened.

    Attributes:
        rows: the texts, in ``column``.
        documents: True if a row is a document; False if it is a line, one without text ending a document.
        added: how many of the rows are not of the source, but there to end a file's last document.
    """

    rows: datasets.Dataset | datasets.IterableDataset
    column: str
    documents: bool
    added: int = 0


class TextSource:
    """A source as ``load_corpus`` describes it; ``across_lines`` says that lines are put together to documents.

    Raises:
        ValueError: there is no such file, it is no regular one, or they are of several kinds.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        column: str | None,
        split: str,
        across_lines: bool,
    ) -> None:
        self.column, self.split, self.across_lines = column, split, across_lines
        given = [os.fspath(one) for one in ([source] if isinstance(source, (str, os.PathLike)) else source)]
        if not all(given):
            refuse("load_corpus", "source", "files or a data set", "an empty name")
        self.name = ", ".join(given)
        self.files: list[Path] = []
        if len(given) == 1 and (Path(given[0]).is_dir() or not _is_file_name(given[0])):
            return  # a data set
        for pattern in given:
            found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            if not found:
                refuse("load_corpus", "source", "files that are there", repr(pattern))
            for file in found:
                regular_size(file)  # to open a FIFO would wait for ever
            self.files += map(Path, found)
        kinds = sorted({file.suffix.lower() for file in self.files})
        if len(kinds) != 1 or kinds[0] not in READERS:
            refuse("load_corpus", "source", f"files of one kind of {', '.join(READERS)}", ", ".join(kinds) or "none")
        if split != "train":
            refuse("load_corpus", "split", "'train' for files", repr(split))
        if column is not None and kinds == [".txt"]:
            refuse("load_corpus", "text_column", "None for .txt files, which have no columns", repr(column))

    def identity(self, threads: int) -> list[Any]:
        """What decides the texts: the SHA-256 of each file, wherever it is, or the commit of a data set of the hub."""
        if not self._is_here():
            return [self._data_set({})._fingerprint, self.split]
        files = self._named_files()
        with ThreadPoolExecutor(threads) as pool:
            sums = list(pool.map(sha256, (file for _, file in files)))
        return [*zip((name for name, _ in files), sums, strict=True), self.split]

    def sizes(self) -> list[Any]:
        """What is known of the texts without reading them: each file's size, or the name of a data set of the hub."""
        known = [(name, file.stat().st_size) for name, file in self._named_files()] if self._is_here() else [self.name]
        return [*known, self.split]

    def _is_here(self) -> bool:
        return bool(self.files) or Path(self.name).is_dir()

    def _named_files(self) -> list[tuple[str, Path]]:
        if self.files:
            return [(file.suffix, file) for file in self.files]
        files = sorted(file for file in Path(self.name).rglob("*") if file.is_file())
        return [(file.relative_to(self.name).as_posix(), file) for file in files]

    def open(self, work: Path | None = None, num_proc: int | None = None, streaming: bool = False) -> OpenTexts:
        """Open the source.

        Args:
            work: where `datasets` may keep what it converts of files.
            num_proc: processes that read, if there are several files.
            streaming: read while iterating.
        """
        how: dict[str, Any] = {"streaming": streaming}
        if work is not None and self._is_here():  # a data set of the hub is kept where it was
            how["cache_dir"] = str(work)
        kind = self.files[0].suffix.lower() if self.files else None
        if kind == ".txt":
            return self._lines(how)
        if kind == ".jsonl":
            return self._objects(num_proc, how)
        rows = self._rows(num_proc, how) if self.files else self._data_set(how)
        column = self._chosen(rows.column_names or list(next(iter(rows), {})))
        return OpenTexts(rows.select_columns(column), column, documents=True)

    def _chosen(self, names: Sequence[str]) -> str:
        """The column of the texts."""
        column = self.column or next((name for name in _COLUMNS if name in names), None)
        if column is None and len(names) == 1:
            column = names[0]
        if column is None or column not in names:
            refuse("load_corpus", "text_column", f"one of {', '.join(names) or 'no column'}", self.column)
        return column

    def _data_set(self, how: dict[str, Any]) -> Any:
        parts = [self.name]
        if not Path(self.name).is_dir():
            owner_and_name = self.name.split("/", 2)
            parts = ["/".join(owner_and_name[:2]), *owner_and_name[2:]]
        return self._read(*parts, split=self.split, **how)

    def _rows(self, num_proc: int | None, how: dict[str, Any]) -> Any:
        reader, options = READERS[self.files[0].suffix.lower()]
        files = self._not_empty()
        if num_proc is not None and not how["streaming"]:
            how = how | {"num_proc": min(num_proc, len(files))}
        if reader == "csv":
            how = how | {"features": self._texts_of(files, options)}
        rows = self._read(reader, data_files=files, split="train", **options, **how)
        return rows.filter(_is_filled, batched=True) if reader == "csv" else rows

    def _texts_of(self, files: Sequence[str], dialect: Mapping[str, Any]) -> Any:
        """The columns of CSV or TSV files, all of text: types that are guessed depend on which rows are looked at."""
        found: list[str] = []
        for file in files:
            try:
                names = column_names(file, **dialect)
            except ValueError as error:
                raise ValueError(f"load_corpus: cannot read {file!r}: {error}") from error
            if found and set(names) != set(found):
                refuse(
                    "load_corpus",
                    "source",
                    f"files with the columns {', '.join(found)}",
                    f"{file!r}: {', '.join(names)}",
                )
            found = found or names
        named = [name or f"Unnamed: {at}" for at, name in enumerate(found)]  # as pandas calls a column without a name
        return datasets.Features({name: datasets.Value("string") for name in named})

    def _objects(self, num_proc: int | None, how: dict[str, Any]) -> OpenTexts:
        _, options = READERS[".jsonl"]
        files = self._not_empty()
        features = datasets.Features({_LINE: datasets.Value("string")})
        several = {} if num_proc is None or how["streaming"] else {"num_proc": num_proc}
        rows = self._read("text", data_files=files, split="train", features=features, **options, **how)
        texts = _TextOf(self.name, self.column)
        first = ((at, row[_LINE]) for at, row in enumerate(rows) if row[_LINE].strip())
        names = dict.fromkeys(name for at, line in islice(first, _LOOKED_AT) for name in texts.row(at, line))
        texts.column = column = self._chosen([*names])
        features = datasets.Features({column: datasets.Value("string")})
        rows = rows.map(texts, batched=True, with_indices=True, remove_columns=[_LINE], features=features, **several)
        return OpenTexts(rows, column, documents=True)

    def _lines(self, how: dict[str, Any]) -> OpenTexts:
        reader, options = READERS[".txt"]
        features = datasets.Features({"text": datasets.Value("string")})
        how = how | options | {"features": features}
        files = self._not_empty()
        if not self.across_lines:
            return OpenTexts(self._read(reader, data_files=files, split="train", **how), "text", documents=False)
        for file in files:  # one that has such ends has them from its beginning on
            with open(file, "rb") as stream:
                head = stream.read(_HEAD).decode("utf-8-sig", "replace")
            refuse_odd_line_ends(f"load_corpus: cannot read {file!r}", head)
        each = self._read(reader, data_files={f"file{i}": file for i, file in enumerate(files)}, **how)
        end = datasets.Dataset.from_dict({"text": [""]}, features=features)
        ended = end.to_iterable_dataset() if how["streaming"] else end
        rows = datasets.concatenate_datasets([part for file in each.values() for part in (file, ended)])
        return OpenTexts(rows, "text", documents=False, added=len(files))

    def _not_empty(self) -> list[str]:
        """The files without the empty ones, which `datasets` refuses; of Parquet an empty file is damaged."""
        files = [str(file.resolve()) for file in self.files if file.suffix.lower() == ".parquet" or file.stat().st_size]
        if not files:
            refuse("load_corpus", "source", "files that hold text", "empty ones")
        return files

    def _read(self, *args: Any, **options: Any) -> Any:
        try:
            return datasets.load_dataset(*args, **options)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):  # of the copy that it writes
                place = options.get("cache_dir") or datasets.config.HF_DATASETS_CACHE
                raise OSError(cause.errno, f"load_corpus: {os.strerror(cause.errno)}", str(place)) from error
            reason = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise ValueError(f"load_corpus: cannot read {self.name!r}: {reason}") from error


class _TextOf:
    """Takes the texts from lines of JSONL; a line of white space has none."""

    def __init__(self, name: str, column: str | None) -> None:
        self.name, self.column = name, column

    def __call__(self, table: Mapping[str, Sequence[str]], indices: Sequence[int]) -> dict[str, list[str | None]]:
        lines = zip(indices, table[_LINE], strict=True)
        return {str(self.column): [self._text(at, line) for at, line in lines if line.strip()]}

    def _text(self, at: int, line: str) -> str | None:
        """Raises TypeError for what is no text, ValueError for what is no object or half a character."""
        text = self.row(at, line).get(str(self.column))
        if text is not None and not isinstance(text, str):
            kind = pyarrow.scalar(text).type
            refuse("load_corpus", "text_column", "a column of text", f"{self.column} of {kind}", TypeError)
        if text is not None and (half := lone_surrogate(text)) is not None:
            refuse_input(f"load_corpus: cannot read {self.name!r}: line {at + 1}", "a text", half)
        return text

    def row(self, at: int, line: str) -> dict[str, Any]:
        try:
            return json_object(line)
        except ValueError as error:
            raise ValueError(f"load_corpus: cannot read {self.name!r}: line {at + 1}: {error}") from error


def _is_filled(rows: Mapping[str, Sequence[str]]) -> list[bool]:
    """For each row of a table, whether it holds more than white space."""
    return [any(cell and cell.strip() for cell in cells) for cells in zip(*rows.values(), strict=True)]


def _is_file_name(source: str) -> bool:
    """Whether a name means files, not a data set: it exists, has a suffix of READERS, or is a glob."""
    return Path(source).exists() or Path(source).suffix.lower() in READERS or glob.has_magic(source)

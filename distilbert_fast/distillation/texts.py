"""Where the texts of a corpus come from: files, or a data set of the Hugging Face hub, read by `datasets`."""

from __future__ import annotations

import csv
import glob
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distilbert_fast.distillation import manifest
from distilbert_fast.ops._check import refuse

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# What reads a file, by its suffix. In CSV and TSV "NA" is a text and no missing value; TSV has no quoting.
READERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"encoding": "utf-8-sig"}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t", "quoting": csv.QUOTE_NONE}),
}
_COLUMNS = ("text", "sentence")  # what a column of texts is called


class Table(NamedTuple):
    """Texts that were opened.

    Attributes:
        rows: the texts, in ``column``.
        documents: True if a row is a document; False if it is a line, one without text ending a document.
        added: how many of the rows are not of the source, but there to end a file's last document.
    """

    rows: Dataset | IterableDataset
    column: str
    documents: bool
    added: int = 0


class Texts:
    """A source as ``load_corpus`` describes it; ``across_lines`` says that lines are put together to documents.

    Raises:
        ValueError: there is no such file, or they are of several kinds.
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
            found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
            if not found:
                refuse("load_corpus", "source", "files that are there", repr(pattern))
            self.files += map(Path, found)
        kinds = sorted({file.suffix.lower() for file in self.files})
        if len(kinds) != 1 or kinds[0] not in READERS:
            refuse("load_corpus", "source", f"files of one kind of {', '.join(READERS)}", ", ".join(kinds) or "none")
        if split != "train":
            refuse("load_corpus", "split", "'train' for files", repr(split))
        if column is not None and kinds == [".txt"]:
            refuse("load_corpus", "text_column", "None for .txt files, which have no columns", repr(column))

    def identity(self, threads: int) -> list[Any]:
        """What the texts depend on, wherever they lie: SHA-256 of every file; of a data set of the hub its commit."""
        if not self._is_here():
            return [self._data_set({})._fingerprint, self.split]
        files = self._named_files()
        with ThreadPoolExecutor(threads) as pool:
            sums = list(pool.map(manifest.sha256, (file for _, file in files)))
        return [*zip((name for name, _ in files), sums, strict=True), self.split]

    def sizes(self) -> list[Any]:
        """What can be told of the texts without reading them: each file's size; of a data set of the hub its name."""
        known = [(name, file.stat().st_size) for name, file in self._named_files()] if self._is_here() else [self.name]
        return [*known, self.split]

    def _is_here(self) -> bool:
        return bool(self.files) or Path(self.name).is_dir()

    def _named_files(self) -> list[tuple[str, Path]]:
        if self.files:
            return [(file.suffix, file) for file in self.files]
        files = sorted(file for file in Path(self.name).rglob("*") if file.is_file())
        return [(file.relative_to(self.name).as_posix(), file) for file in files]

    def open(self, work: Path | None = None, num_proc: int | None = None, streaming: bool = False) -> Table:
        """Open the source.

        Args:
            work: where `datasets` may keep what it converts of files.
            num_proc: processes that read, if there are several files.
            streaming: read while iterating.
        """
        how: dict[str, Any] = {"streaming": streaming}
        if work is not None and self._is_here():  # a data set of the hub is kept where it was
            how["cache_dir"] = str(work)
        if self.files and READERS[self.files[0].suffix.lower()][0] == "text":
            return self._lines(how)
        rows = self._rows(num_proc, how) if self.files else self._data_set(how)
        names = rows.column_names or list(next(iter(rows), {}))
        column = self.column or next((name for name in _COLUMNS if name in names), None)
        if column is None and len(names) == 1:
            column = names[0]
        if column is None or column not in names:
            refuse("load_corpus", "text_column", f"one of {', '.join(names) or 'no column'}", self.column)
        return Table(rows.select_columns(column), column, documents=True)

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
        return self._read(reader, data_files=files, split="train", **options, **how)

    def _lines(self, how: dict[str, Any]) -> Table:
        import datasets

        reader, options = READERS[".txt"]
        features = datasets.Features({"text": datasets.Value("string")})
        how = how | options | {"features": features}
        files = self._not_empty()
        if not self.across_lines:
            return Table(self._read(reader, data_files=files, split="train", **how), "text", documents=False)
        each = self._read(reader, data_files={f"file{i}": file for i, file in enumerate(files)}, **how)
        end = datasets.Dataset.from_dict({"text": [""]}, features=features)
        ended = end.to_iterable_dataset() if how["streaming"] else end
        rows = datasets.concatenate_datasets([part for file in each.values() for part in (file, ended)])
        return Table(rows, "text", documents=False, added=len(files))

    def _not_empty(self) -> list[str]:
        """An empty file holds no text, which `datasets` takes for a fault; of Parquet it is one."""
        files = [str(file.resolve()) for file in self.files if file.suffix.lower() == ".parquet" or file.stat().st_size]
        if not files:
            refuse("load_corpus", "source", "files that hold text", "empty ones")
        return files

    def _read(self, *args: Any, **options: Any) -> Any:
        import datasets

        try:
            return datasets.load_dataset(*args, **options)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error
            reason = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise ValueError(f"load_corpus: cannot read {self.name!r}: {reason}") from error


def _is_file_name(source: str) -> bool:
    """Whether it means files, not a data set: it is there, has a suffix of READERS, or is a glob."""
    return Path(source).exists() or Path(source).suffix.lower() in READERS or glob.has_magic(source)

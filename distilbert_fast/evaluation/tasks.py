"""Text classification tasks: the built-in one, a file of the user's, or a data set of the Hugging Face hub."""

from __future__ import annotations

import csv
import hashlib
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.json
import pyarrow.parquet

if TYPE_CHECKING:
    from datasets import Dataset

BUILT_IN = "stdlib-docs"
FORMATS = {".tsv": "TSV", ".csv": "CSV", ".jsonl": "JSONL", ".parquet": "Parquet"}
EVAL_PERCENT = 10  # of a file's sentences when no evaluation file is given


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        name: what it is called in reports.
        train, eval: data sets with the columns `sentence` (str) and `label` (int, an index into `label_names`).
        label_names: one name per class.
    """

    name: str
    train: Dataset
    eval: Dataset
    label_names: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all sentences, labels and label names: equal for equal tasks on any machine."""
        digest = hashlib.sha256(repr(self.label_names).encode())
        for split in (self.train, self.eval):
            for sentence, label in zip(split["sentence"], split["label"], strict=True):
                digest.update(f"\0{label}\0{sentence}".encode("utf-8", "surrogatepass"))
            digest.update(b"\1")
        return digest.hexdigest()

    def for_classes(self, names: Sequence[str], kept: bool) -> Task:
        """The same task, its classes numbered as a teacher numbers its own.

        Args:
            names: the teacher's, in the order of its logits; compared without case.
            kept: the teacher's head is taken as it is, not trained.

        Raises:
            ValueError: it is kept, and its classes are as many but others. Names that tell nothing, LABEL_0 and the
                like or numbers in the data, are taken in the order they have.
        """
        mine, theirs = ([name.casefold() for name in of] for of in (self.label_names, names))
        if sorted(mine) == sorted(theirs) and len(set(mine)) == len(mine):
            order = [theirs.index(name) for name in mine]
            train, held_out = (
                _dataset([(text, order[at]) for text, at in zip(split["sentence"], split["label"], strict=True)])
                for split in (self.train, self.eval)
            )
            return Task(self.name, train, held_out, tuple(self.label_names[mine.index(name)] for name in theirs))
        telling = not all(re.fullmatch(r"-?\d+", name) for name in mine)
        named = not all(re.fullmatch(r"label_\d+", name) for name in theirs)
        if kept and telling and named and len(mine) == len(theirs):
            raise ValueError(
                f"load_task: data: expected the teacher's labels {', '.join(map(repr, names))}, got "
                f"{', '.join(map(repr, self.label_names))}; rename them, or train the teacher on them (teacher_epochs)"
            )
        return self

    @property
    def overlap(self) -> int:
        """How many evaluation sentences also stand in the training split (after folding case and spaces)."""
        seen = {_folded(sentence) for sentence in self.train["sentence"]}
        return sum(_folded(sentence) in seen for sentence in self.eval["sentence"])


def load_task(
    name: str | None = None,
    data: str | Path | None = None,
    eval_data: str | Path | None = None,
    max_train_rows: int | None = None,
) -> Task:
    """Load a task by name, from files, or from the hub.

    Args:
        name: `"stdlib-docs"` (the default when there is no `data`), or a hub id: `"glue/sst2"`, `"owner/set"`,
            `"owner/set/config"`. With `data` it is only the name that reports show.
        data: a .tsv, .csv, .jsonl or .parquet file with the columns `sentence` and `label`. TSV files have no
            quoting, CSV files quote with `"`; both are UTF-8 and start with a line of column names.
        eval_data: the same for the evaluation split. Without it, about EVAL_PERCENT % of the distinct sentences of
            `data` are held out, chosen by their hash, so that the same sentence never stands on both sides.
        max_train_rows: keep only this many training rows, chosen by hash; all when None.

    Raises:
        ValueError: a file that is missing, empty, unreadable, of an unknown kind or without the columns; a
            label without a sentence or the reverse; a single class; an evaluation label unknown to the training
            split; a name that is neither built in nor on the hub.
    """
    if max_train_rows is not None and max_train_rows < 2:
        raise ValueError(f"load_task: max_train_rows: expected at least 2, got {max_train_rows}")
    if data is not None:
        train = _read_file("data", Path(data))
        held_out = _read_file("eval_data", Path(eval_data)) if eval_data is not None else None
        task = _task(name or _file_name(Path(data)), train, held_out)
    elif eval_data is not None:
        raise ValueError("load_task: eval_data: given without data")
    elif name is None or name == BUILT_IN:
        task = _stdlib_docs()
    elif Path(name).suffix.lower() in FORMATS:
        raise ValueError(f"load_task: name: expected {BUILT_IN!r} or a hub id, got {name!r}; give a file as data")
    else:
        task = _from_hub(name)
    if max_train_rows is not None and max_train_rows < len(task.train):
        sentences = list(task.train["sentence"])
        order = sorted(range(len(sentences)), key=lambda i: _hash(f"{sentences[i]}\0{i}"))
        train = task.train.select(sorted(order[:max_train_rows]))
        task = Task(task.name, train, task.eval, task.label_names)
    return task


def _stdlib_docs() -> Task:
    from distilbert_fast.evaluation import stdlib_docs

    names = tuple(stdlib_docs.LIBRARIES)
    rows: dict[bool, list[tuple[str, int]]] = {False: [], True: []}
    for passage in stdlib_docs.passages():
        rows[stdlib_docs.is_eval(passage.name)].append((passage.text, names.index(passage.library)))
    return Task(BUILT_IN, _dataset(rows[False]), _dataset(rows[True]), names)


def _read_file(argument: str, path: Path) -> list[tuple[str, str]]:
    """The rows (sentence, label) of one file; labels as written."""
    if not path.is_file():
        raise ValueError(f"load_task: {argument}: no such file: {str(path)!r}")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"load_task: {argument}: expected a file ending in {', '.join(FORMATS)}, got {path.name!r}")
    if path.stat().st_size == 0:
        raise ValueError(f"load_task: {argument}: {str(path)!r} is empty")
    kind = FORMATS[path.suffix.lower()]
    try:
        table = _read_table(kind, path)
    except (OSError, ValueError, Warning, pyarrow.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"load_task: {argument}: cannot read {str(path)!r} as {kind}: {reason}") from error
    columns = table.column_names
    missing = [column for column in ("sentence", "label") if column not in columns]
    if missing:
        raise ValueError(
            f"load_task: {argument}: {str(path)!r} has no column {' and no column '.join(missing)}; "
            f"its columns: {', '.join(columns)}"
        )
    if len(table) == 0:
        raise ValueError(f"load_task: {argument}: {str(path)!r} holds no rows")
    return _rows(f"{argument}: {str(path)!r}", table["sentence"].to_pylist(), table["label"].to_pylist())


def _file_name(path: Path) -> str:
    """`sst2/train.tsv`: most data files are called train."""
    return "/".join(path.resolve().parts[-2:])


def _rows(source: str, sentences: Iterable[object], labels: Iterable[object]) -> list[tuple[str, str]]:
    rows = []
    for number, (sentence, label) in enumerate(zip(sentences, labels, strict=True), start=1):
        text = "" if sentence is None else str(sentence).strip()
        name = "" if label is None else str(label).strip()
        if not text or not name:
            raise ValueError(f"load_task: {source}: row {number} has an empty {'label' if text else 'sentence'}")
        rows.append((text, name))
    return rows


def _read_table(kind: str, path: Path) -> pyarrow.Table:
    """The file as an Arrow table. CSV and TSV values stay as written: no "NA" becomes a null, no 1 a 1.0."""
    if kind == "Parquet":
        return pyarrow.parquet.read_table(path)
    if kind == "JSONL":
        return pyarrow.json.read_json(path)
    import pandas

    dialect = {"sep": "\t", "quoting": csv.QUOTE_NONE} if kind == "TSV" else {"sep": ","}
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)  # rows longer than the header, cut silently
        frame = pandas.read_csv(path, dtype=str, na_filter=False, index_col=False, encoding="utf-8-sig", **dialect)
    return pyarrow.Table.from_pandas(frame)


def _from_hub(name: str) -> Task:
    from datasets import load_dataset

    owner, _, rest = name.partition("/")
    if owner == "glue":
        parts = ["nyu-mll/glue", rest]
    else:
        repository, _, config = rest.partition("/")
        parts = [f"{owner}/{repository}" if repository else owner, *([config] if config else [])]
    try:
        splits = load_dataset(*parts)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"load_task: name: {name!r} is not the built-in task {BUILT_IN!r}, and the Hugging Face hub did not "
            f"give a data set for it: {reason}"
        ) from error
    if "train" not in splits:
        raise ValueError(f"load_task: name: {name!r} has no split train; its splits: {', '.join(splits)}")
    train = splits["train"]
    text = next((column for column in ("sentence", "text") if column in train.column_names), None)
    if text is None or "label" not in train.column_names:
        raise ValueError(
            f"load_task: name: {name!r} has no columns sentence (or text) and label; "
            f"its columns: {', '.join(train.column_names)}"
        )
    held_out = next((split for split in ("validation", "test") if split in splits), None)
    rows = _rows(f"name: {name!r}", train[text], train["label"])
    eval_rows = None
    if held_out:
        eval_rows = _rows(f"name: {name!r}", splits[held_out][text], splits[held_out]["label"])
    task = _task(name, rows, eval_rows)
    class_names = getattr(train.features["label"], "names", None)
    if class_names and len(class_names) == len(task.label_names):
        return Task(task.name, task.train, task.eval, tuple(class_names))
    return task


def _task(name: str, train: list[tuple[str, str]], held_out: list[tuple[str, str]] | None) -> Task:
    labels = {label for _, label in train}
    if len(labels) < 2:
        raise ValueError(f"load_task: data: expected at least 2 classes in the column label, got only {labels.pop()!r}")
    if held_out is None:
        chosen = [_hash(_folded(sentence)) % 100 < EVAL_PERCENT for sentence, _ in train]
        held_out = [row for row, out in zip(train, chosen, strict=True) if out]
        train = [row for row, out in zip(train, chosen, strict=True) if not out]
        if not held_out or not train:
            raise ValueError(
                "load_task: data: expected enough distinct sentences to hold some out for evaluation, got "
                f"{len({_folded(sentence) for sentence, _ in [*train, *held_out]})}; give eval_data"
            )
    labels = {label for _, label in train}
    alien = sorted({label for _, label in held_out} - labels)
    if alien:
        raise ValueError(
            f"load_task: the evaluation split has the label {alien[0]!r}, which the training split has not; "
            f"its labels: {', '.join(map(repr, _label_order(labels)))}"
        )
    names = _label_order(labels)
    index = {label: i for i, label in enumerate(names)}
    splits = [_dataset([(sentence, index[label]) for sentence, label in rows]) for rows in (train, held_out)]
    return Task(name, splits[0], splits[1], names)


def _label_order(labels: set[str]) -> tuple[str, ...]:
    """Numbers by value (2 before 10), anything else by its text."""
    if all(re.fullmatch(r"-?\d+", label) for label in labels):
        return tuple(sorted(labels, key=int))
    return tuple(sorted(labels))


def _dataset(rows: list[tuple[str, int]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict({"sentence": [row[0] for row in rows], "label": [row[1] for row in rows]})


def _folded(sentence: str) -> str:
    return " ".join(sentence.lower().split())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")

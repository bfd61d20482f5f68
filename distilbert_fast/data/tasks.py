"""Tasks on sentences and pairs of sentences: the built-in one, a file of the user's, or a data set of the hub."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from distilbert_fast.data.labels import (
    NO_LABEL,
    label_order,
    refuse_lookalikes,
    refuse_no_label,
    refuse_numbers,
    refuse_vectors,
)
from distilbert_fast.data.published import (
    PAIR_COLUMNS,
    PUBLISHED_TASKS,
    LabelledRow,
    Published,
    Split,
    as_number,
    published,
    read_published,
)
from distilbert_fast.data.sentences import Text
from distilbert_fast.data.tables import (
    EVAL_SPLITS,
    FORMATS,
    Table,
    as_written,
    check_sources,
    class_order,
    file_name,
    folded,
    hold_out,
    hub_splits,
    limited,
    names_in_order,
    read_table,
    refuse_unknown,
    text_of,
)
from distilbert_fast.files.text import check_file, refuse_input, shortened

logger = logging.getLogger(__name__)

OP = "load_task"
BUILT_IN = "stdlib-docs"
SENTENCE = ("sentence",)

# a list, a tuple or a set as Python writes it
_LISTED = re.compile(r"""\[\s*(["'\d-].*)?\]|\[.*,.*\]|[({]\s*(["'].*|[\d-].*,.*)[)}]""", re.DOTALL)


@dataclass(frozen=True)
class Task:
    """A classification, multi-label classification or regression task.

    Attributes:
        name: what it is called in reports.
        train, eval: data sets with the columns `columns` (str) and `label` (int, an index into `label_names`; float for
            a regression; for `multi_label` a list of floats, 1 for each label that a row has and 0 for others).
        label_names: one name per class; none for a regression.
        columns: `sentence`, or the two columns of a pair.
        multi_label: a row may have any number of labels.
    """

    name: str
    train: Dataset
    eval: Dataset
    label_names: tuple[str, ...]
    columns: tuple[str, ...] = SENTENCE
    multi_label: bool = False

    @property
    def regression(self) -> bool:
        return not self.label_names

    def texts(self, split: Dataset) -> list[Text]:
        """The sentences, or pairs of sentences, of `train` or `eval`, in their order."""
        columns = [split[column] for column in self.columns]
        return list(columns[0]) if len(columns) == 1 else list(zip(columns[0], columns[1], strict=True))

    def _rows(self, split: Dataset) -> list[LabelledRow]:
        texts = zip(*(split[column] for column in self.columns), strict=True)
        return list(zip(texts, split["label"], strict=True))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all texts, labels and label names: equal for equal tasks on any machine."""
        digest = hashlib.sha256(repr(self.label_names).encode())
        for split in (self.train, self.eval):
            for texts, label in self._rows(split):
                digest.update("\0".join(["", str(label), *texts]).encode("utf-8", "surrogatepass"))
            digest.update(b"\1")
        return digest.hexdigest()

    def for_classes(self, names: Sequence[str], kept: bool) -> Task:
        """The same task, its classes numbered as a teacher numbers its own; see `class_order`."""
        order = class_order(OP, self.label_names, names, kept)
        if order is None:
            return self

        def renumbered(label: Any) -> Any:
            if not self.multi_label:
                return order[label]
            return [label[order.index(at)] for at in range(len(order))]

        train, held_out = (
            _dataset([(texts, renumbered(label)) for texts, label in self._rows(split)], self.columns)
            for split in (self.train, self.eval)
        )
        turned = names_in_order(self.label_names, names, order)
        return dataclasses.replace(self, train=train, eval=held_out, label_names=turned)

    @property
    def overlap(self) -> int:
        """How many evaluation sentences or pairs also stand in the training split (after folding case and spaces)."""
        seen = {folded(texts) for texts, _ in self._rows(self.train)}
        return sum(folded(texts) in seen for texts, _ in self._rows(self.eval))


def load_task(
    name: str | None = None,
    data: str | Path | None = None,
    eval_data: str | Path | None = None,
    max_train_rows: int | None = None,
    regression: bool = False,
) -> Task:
    """Load a task by name, from files, or from the hub.

    Args:
        name: `"stdlib-docs"` (the default when there is no `data`), or a hub id: `"glue/sst2"`, `"owner/set"`,
            `"owner/set/config"`. With `data` it is the name that reports show, and says which form a published file
            has. Of a hub data set the split `validation` is evaluated on (mnli: `validation_matched`), or else `test`;
            rows without label are left out.
        data: a .tsv, .csv, .jsonl or .parquet file with the columns `sentence` (or `text`) and `label`, or with one of
            `PAIR_COLUMNS` and `label`; with the name of a task of `published.PUBLISHED_TASKS`, a file as it is
            published. TSV files have no quoting, CSV files quote with `"`; both start with a line of column names.
            Texts are taken as they are, labels without the spaces around them. A Parquet file that `datasets` wrote
            has the names of its classes, and its rows without label are left out as those of the hub are.
        eval_data: the same for the evaluation split. Without it, about 10 % of the distinct sentences (or
            pairs) of `data` are held out, chosen by their hash, so that the same one never stands on both sides.
        max_train_rows: keep only this many training rows, chosen by hash; all when None.
        regression: labels are numbers to predict, as those of a hub data set of floats are anyhow.

    Where the labels of all rows are lists, in JSONL, Parquet or on the hub, each row has any number of labels; the
    column may be called `labels` too. A 1 or 0 for each label is refused.

    Raises:
        ValueError: a file that is missing, empty, unreadable, of an unknown kind or without the columns; files of
            other columns than each other; a file that is not UTF-8 or holds a NUL byte; a label without a text or the
            reverse; what is no text, half a character among it; lists as labels of some rows; the label -1 for a class
            (see above: on the hub it stands for no label); a single class or number; a label that is no number for a
            regression, or one with a fraction for classes; an evaluation label unknown to the training split; a name
            that is neither built in nor on the hub.
    """
    check_sources(OP, data, eval_data, max_train_rows)
    if data is not None:
        meant = difflib.get_close_matches(name or "", PUBLISHED_TASKS, 1, 0.85)
        if meant and published(name) is None:  # a published form would be read as a plain file
            refuse_input(f"{OP}: name", f"a task, such as {meant[0]!r}, or a name that is like none", repr(name))
        train, columns, names, *_ = read_split(OP, "data", Path(data), name, regression)
        held_out = None
        if eval_data is not None:
            held_out, others, *_ = read_split(OP, "eval_data", Path(eval_data), name, regression)
            if others != columns:
                refuse_input(f"{OP}: eval_data", f"the columns of data, {' and '.join(columns)}", " and ".join(others))
        regression = regression or isinstance(train[0][1], float)
        name = name or file_name(Path(data))
    elif name is None or name == BUILT_IN:
        if regression:
            refuse_input(f"{OP}: regression", "labels that are numbers", f"the classes of {BUILT_IN}")
        name, columns = BUILT_IN, SENTENCE
        train, held_out, names = _stdlib_docs()
    elif Path(name).suffix.lower() in FORMATS:
        refuse_input(f"{OP}: name", f"{BUILT_IN!r} or a hub id", f"{name!r}; give a file as data")
    else:
        train, held_out, columns, names = _from_hub(name, regression)
        regression = regression or isinstance(train[0][1], float)
    return _task(name, train, held_out, columns, regression, names, max_train_rows)


def _stdlib_docs() -> tuple[list[LabelledRow], list[LabelledRow], tuple[str, ...]]:
    from distilbert_fast.data import stdlib_docs

    rows: dict[bool, list[LabelledRow]] = {False: [], True: []}
    for passage in stdlib_docs.passages():
        rows[stdlib_docs.is_eval(passage.name)].append(((passage.text,), passage.library))
    return rows[False], rows[True], tuple(stdlib_docs.LIBRARIES)


def read_split(op: str, argument: str, path: Path, name: str | None = None, regression: bool = False) -> Split:
    """The labelled rows of one file: of the published form of the task of that name, else with our columns.

    `regression`: labels are numbers. Raises ValueError as `load_task` does; messages begin with `op` and `argument`.
    """
    task = published(name)
    if task is not None and path.suffix.lower() != ".parquet":
        return read_published(op, argument, path, task)
    if path.is_file() and path.suffix.lower() not in FORMATS:
        refuse_input(f"{op}: {argument}", f"a file ending in {', '.join(FORMATS)}", repr(path.name))
    check_file(op, argument, path)
    table = read_table(op, argument, path)
    source = f"{op}: {argument}: {str(path)!r}"
    columns = reading = _text_columns([*table.columns])
    if columns == SENTENCE and "sentence" not in table.columns and "text" in table.columns:
        reading = ("text",)
    label = "labels" if "labels" in table.columns and "label" not in table.columns else "label"
    missing = [column for column in (*reading, label) if column not in table.columns]
    if missing:
        found = ", ".join(table.columns)
        raise ValueError(
            f"{source} has no column {' and no column '.join(missing)}; "
            f"its columns: {found if len(found) <= 99 else f'{found[:99]}… (its first line must name them)'}"
        )
    if len(table) == 0:
        raise ValueError(f"{source} holds no rows")
    regression = regression or (task is not None and not task.classes)
    rows = _rows(source, table, reading, regression, label)
    if not rows:
        raise ValueError(f"{source} has no row with a label")
    if task is not None and task.classes:
        rows = [(texts, task.class_of(source, one)) for texts, one in rows]
    names = table.class_names.get(label)
    places = [at for at, given in enumerate(table.columns[label]) if not (names and given == NO_LABEL)]
    named = next((table.columns[name] for name in ("index", "idx") if name in table.columns), None)
    ids = [] if named is None else [(as_written(index) or "").strip() for index in named]
    if not all(ids) or len(set(ids)) < len(table):
        ids = [str(at) for at in range(len(table))]
    if len(places) < len(table):
        logger.warning("%s: %d of %d rows without a label were left out", source, len(table) - len(places), len(table))
    known = task.class_names if task and task.classes else names
    return Split(rows, columns, known, tuple(ids[at] for at in places), tuple(ids))


def read_hub_split(op: str, task: Published) -> Split:
    """The rows of a published task that it is evaluated on, from the hub. Raises ValueError if there are none."""
    if not task.hub:
        refuse_input(f"{op}: data", f"a file, since {task.name} is not read from the hub", "none")
    table = hub_splits(op, task.hub)[task.split]
    source = f"{op}: data: {task.hub}"
    columns = tuple("text" if name not in table.columns and name == "sentence" else name for name in task.columns)
    rows = _rows(source, table, columns, regression=not task.classes)
    if not rows:
        raise ValueError(f"{source}: its split {task.split} has no rows with a label")
    if task.classes:
        rows = [(texts, task.class_of(source, label)) for texts, label in rows]
    ids = tuple(map(str, range(len(rows))))
    return Split(rows, task.columns, task.class_names or None, ids, ids)


def _text_columns(names: Sequence[str]) -> tuple[str, ...]:
    """The columns of a pair, if both are there, else the column of a sentence; and the columns that are missing."""
    whole = (pair for pair in PAIR_COLUMNS if set(pair) <= set(names))
    begun = (pair for pair in PAIR_COLUMNS if set(pair) & set(names))
    return next(whole, SENTENCE if "sentence" in names else next(begun, SENTENCE))


def _rows(
    source: str, table: Table, columns: Sequence[str], regression: bool, label_column: str = "label"
) -> list[LabelledRow]:
    """The texts of these columns as they are, with their labels; for a regression labels are floats, lists are tuples.

    Labels that are numbers of named classes become these names, and rows with NO_LABEL are left out.
    """
    rows: list[LabelledRow] = []
    names = table.class_names.get(label_column)
    texts = [table.columns[column] for column in columns]
    labels = table.columns[label_column]
    several = all(isinstance(given, list) for given in labels) and not regression
    if several:
        refuse_vectors(f"{source}: row 1", labels, names)
    for at, (*cells, given) in enumerate(zip(*texts, labels, strict=True), start=1):
        if names and given == NO_LABEL:
            continue
        row = f"{source}: row {at}"
        found = tuple(text_of(row, cell, f"a text as {name}", name) for name, cell in zip(columns, cells, strict=True))
        if several:
            rows.append((found, _label_list(row, given, names)))
            continue
        label = _label(row, given)
        value = as_number(label)
        if regression:
            if value is None:
                refuse_input(row, "a number as label", repr(label))
            rows.append((found, value))
            continue
        if names:
            label = _class_name(row, given, names)
        else:
            refuse_no_label(row, label)
        rows.append((found, label))
    return rows


def _label_list(row: str, given: list[Any], names: Sequence[str] | None) -> tuple[str, ...]:
    """The labels of a row that may have any number of them."""
    labels = tuple(_class_name(row, one, names) if names else _label(row, one) for one in given)
    if len(set(labels)) < len(labels):
        refuse_input(row, "a list of the labels that the row has, each once", shortened(given))
    if not names:
        for label in labels:
            refuse_no_label(row, label)
    return labels


def _class_name(row: str, number: object, names: Sequence[str]) -> str:
    if not isinstance(number, int) or not 0 <= number < len(names):
        refuse_input(row, f"a label of 0 to {len(names) - 1}", number)
    return names[number]


def _label(row: str, cell: object) -> str:
    """Check that a cell holds one label. A list holds several, also where a CSV file has it as text."""
    if (isinstance(cell, str) and _LISTED.fullmatch(cell.strip())) or as_written(cell) is None:
        refuse_input(row, "one label, a text or a number", shortened(cell))
    return text_of(row, cell, "a text as label", "label").strip()


def _from_hub(
    name: str, regression: bool
) -> tuple[list[LabelledRow], list[LabelledRow] | None, tuple[str, ...], Sequence[str] | None]:
    """Rows to train and to evaluate on; what their columns are to be called; the names of the classes."""
    splits = hub_splits(OP, name, f"the built-in task {BUILT_IN!r}")
    names = [*splits["train"].columns]
    columns = reading = _text_columns(names)
    if columns == SENTENCE and "sentence" not in names:
        reading = ("text",)
    label = "labels" if "labels" in names and "label" not in names else "label"
    if not {*reading, label} <= set(names):
        raise ValueError(
            f"{OP}: name: {name!r} has no columns sentence (or text) and label, nor a pair such as "
            f"{' and '.join(PAIR_COLUMNS[0])}; its columns: {', '.join(names)}"
        )
    regression = regression or any(isinstance(given, float) for given in splits["train"].columns[label])

    def labelled(split: str) -> list[LabelledRow]:  # GLUE keeps the labels of its test splits to itself
        return _rows(f"{OP}: name: {name!r}", splits[split], reading, regression, label)

    train = labelled("train")
    if not train:
        raise ValueError(f"{OP}: name: {name!r} has no row with a label in its split train")
    held_out = next(filter(None, (labelled(split) for split in EVAL_SPLITS if split in splits)), None)
    return train, held_out, columns, splits["train"].class_names.get(label)


def _task(
    name: str,
    train: list[LabelledRow],
    held_out: list[LabelledRow] | None,
    columns: tuple[str, ...],
    regression: bool,
    class_names: Sequence[str] | None,
    max_train_rows: int | None,
) -> Task:
    """Classes are in the order of `class_names`, where there is one."""
    several = {isinstance(label, tuple) for _, label in (*train, *(held_out or ()))}
    if len(several) > 1:
        refuse_input(f"{OP}: eval_data", "lists as labels where data has lists", "single labels in one of the two")
    labels = _used(train)
    if len(labels) < 2:
        what = "numbers" if regression else "classes"
        only = f"only {labels.pop()!r}" if labels else "none"
        refuse_input(f"{OP}: data", f"at least 2 {what} in the column label", only)
    if not regression and not class_names:
        refuse_numbers(OP, labels)
        refuse_lookalikes(OP, labels)
    if held_out is None:
        train, held_out = hold_out(OP, train, "sentences" if len(columns) == 1 else "pairs")
    if regression:
        if len(numbers := {label for _, label in held_out}) < 2:
            refuse_input(OP, "at least 2 numbers as labels of the evaluation split", f"only {numbers.pop()!r}")
        return Task(name, _dataset(limited(train, max_train_rows), columns), _dataset(held_out, columns), (), columns)
    labels = _used(train)
    refuse_unknown(OP, "label", _used(held_out) - labels, label_order(labels))
    names = tuple(name for name in class_names if name in labels) if class_names else label_order(labels)
    index = {label: i for i, label in enumerate(names)}

    def numbered(label: Any) -> Any:
        return [float(one in label) for one in names] if True in several else index[label]

    splits = [
        _dataset([(texts, numbered(label)) for texts, label in rows], columns)
        for rows in (limited(train, max_train_rows), held_out)
    ]
    return Task(name, splits[0], splits[1], names, columns, True in several)


def _used(rows: Sequence[LabelledRow]) -> set[Any]:
    """All labels of rows, which may have one each or several."""
    return {one for _, label in rows for one in (label if isinstance(label, tuple) else (label,))}


def _dataset(rows: Sequence[LabelledRow], columns: Sequence[str]) -> Dataset:
    texts = {column: [row[0][i] for row in rows] for i, column in enumerate(columns)}
    return Dataset.from_dict({**texts, "label": [row[1] for row in rows]})

"""Files of GLUE, SuperGLUE, IMDb and AG News exactly as they are published: their columns, their labels, their quirks.

Wang et al.: GLUE, arXiv:1804.07461; SuperGLUE, arXiv:1905.00537. A file with a tab in its first line is TSV without
quoting, any other CSV with quotes; JSONL goes by its name. Columns are found by their names, or, where a task is
published without a line of names, by their number.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distilbert_fast.data.tables import as_written, cells_of, text_of
from distilbert_fast.files.text import json_object, lines, read_text, refuse_input, refuse_twice, shortened

logger = logging.getLogger(__name__)

LabelledRow = tuple[tuple[str, ...], Any]  # a sentence or two, and a label
# Columns of pairs, as GLUE's data sets have them.
PAIR_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
)
_ENTAILMENT = (("entailment",), ("not_entailment",))
_INFERENCE = (("entailment",), ("neutral",), ("contradiction",))


class Split(NamedTuple):
    """The labelled rows of a file.

    Attributes:
        rows: texts and labels: names of classes, or numbers of a regression.
        columns: what the texts are called.
        class_names: in the order of their numbers; None where the file does not say.
        ids: of each row, by which predictions name it: its column index or idx, or its place among the file's rows.
        file_ids: of all rows of the file, also of those without a label, which are left out.
    """

    rows: list[LabelledRow]
    columns: tuple[str, ...]
    class_names: Sequence[str] | None
    ids: tuple[str, ...]
    file_ids: tuple[str, ...]


class Plain(NamedTuple):
    """Files without a line of names: how many columns they may have, and which hold texts and label."""

    widths: tuple[int, ...]
    texts: tuple[int, ...]
    label: int


@dataclass(frozen=True)
class Published:
    """A task as it is published.

    Attributes:
        name: of the command line.
        columns: what its texts are called here.
        classes: the names of each class, ours first, in the order of their numbers; none for a regression.
        metrics: by which it is judged.
        texts: other names of the columns of texts.
        label: what the column of labels is called, beside "label".
        plain: the form of files without names.
        joined: the texts of `plain` are one text, with a space between.
        first: the number of the first class in its files.
        unlabelled: what stands for no label; such rows are left out, and counted in a warning.
        broken: rows with too few columns, and empty texts, are part of the published files; the former are left out in
            the same way.
        dev: its evaluation file in a directory of the published files.
        hub: its data set of the Hugging Face hub, as `hub_splits` takes it, and the `split` that is evaluated on.
    """

    name: str
    columns: tuple[str, ...]
    classes: tuple[tuple[str, ...], ...]
    metrics: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...] = ()
    label: str = "label"
    plain: Plain | None = None
    joined: bool = False
    first: int = 0
    unlabelled: tuple[str, ...] = ()
    broken: bool = False
    dev: str = ""
    hub: str = ""
    split: str = "validation"

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(names[0] for names in self.classes)

    def class_of(self, place: str, label: str, first: int = 0) -> str:
        """Our name of the class that a label names, by one of its names or by its number, counted from `first`.

        Raises ValueError, which begins with `place`, for another label.
        """
        for names in self.classes:
            if label.casefold() in (name.casefold() for name in names):
                return names[0]
        if label.isdecimal() and 0 <= int(label) - first < len(self.classes):
            return self.classes[int(label) - first][0]
        numbers = f"{first} to {first + len(self.classes) - 1}"
        refuse_input(place, f"a label of {', '.join(self.class_names)} or {numbers}", repr(label))


_SENTENCE, _TWO = ("sentence",), ("sentence1", "sentence2")
_ACCURACY = ("accuracy",)
_WITH_F1 = ("accuracy", "f1")
PUBLISHED_TASKS: Mapping[str, Published] = {
    task.name: task
    for task in (
        Published(
            "cola",
            _SENTENCE,
            (("unacceptable",), ("acceptable",)),
            ("matthews_correlation",),
            plain=Plain((4,), (3,), 1),
            dev="CoLA/dev.tsv",
            hub="glue/cola",
        ),
        Published(
            "sst2",
            _SENTENCE,
            (("negative", "neg"), ("positive", "pos")),
            _ACCURACY,
            dev="SST-2/dev.tsv",
            hub="glue/sst2",
        ),
        Published(
            "mrpc",
            _TWO,
            (("not_equivalent",), ("equivalent",)),
            _WITH_F1,
            texts=(("#1 String", "#2 String"),),
            label="Quality",
            dev="MRPC/dev.tsv",
            hub="glue/mrpc",
        ),
        Published(
            "stsb",
            _TWO,
            (),
            ("pearson", "spearmanr"),
            label="score",
            plain=Plain((7, 8, 9), (5, 6), 4),
            dev="STS-B/dev.tsv",
            hub="glue/stsb",
        ),
        Published(
            "qqp",
            ("question1", "question2"),
            (("not_duplicate",), ("duplicate",)),
            _WITH_F1,
            label="is_duplicate",
            broken=True,
            dev="QQP/dev.tsv",
            hub="glue/qqp",
        ),
        Published(
            "mnli",
            ("premise", "hypothesis"),
            _INFERENCE,
            _ACCURACY,
            label="gold_label",
            unlabelled=("-",),
            dev="MNLI/dev_matched.tsv",
            hub="glue/mnli",
            split="validation_matched",
        ),
        Published(
            "mnli_mismatched",
            ("premise", "hypothesis"),
            _INFERENCE,
            _ACCURACY,
            label="gold_label",
            unlabelled=("-",),
            dev="MNLI/dev_mismatched.tsv",
            hub="glue/mnli",
            split="validation_mismatched",
        ),
        Published("qnli", ("question", "sentence"), _ENTAILMENT, _ACCURACY, dev="QNLI/dev.tsv", hub="glue/qnli"),
        Published("rte", _TWO, _ENTAILMENT, _ACCURACY, dev="RTE/dev.tsv", hub="glue/rte"),
        Published("wnli", _TWO, (("not_entailment",), ("entailment",)), _ACCURACY, dev="WNLI/dev.tsv", hub="glue/wnli"),
        Published(
            "ax",
            ("premise", "hypothesis"),
            _INFERENCE,
            ("matthews_correlation",),
            texts=(("Premise", "Hypothesis"),),
            label="Label",
            dev="diagnostic/diagnostic-full.tsv",
        ),
        Published(
            "cb",
            ("premise", "hypothesis"),
            (_INFERENCE[0], _INFERENCE[2], _INFERENCE[1]),
            ("accuracy", "macro_f1"),
            hub="aps/super_glue/cb",
        ),
        Published(
            "boolq",
            ("question", "passage"),
            (("false",), ("true",)),
            _ACCURACY,
            texts=(("question", "passage"),),
            hub="aps/super_glue/boolq",
        ),
        Published("axb", _TWO, _ENTAILMENT, ("matthews_correlation",)),
        Published("axg", ("premise", "hypothesis"), _ENTAILMENT, _ACCURACY),
        Published(
            "imdb",
            _SENTENCE,
            (("neg", "negative"), ("pos", "positive")),
            _ACCURACY,
            hub="stanfordnlp/imdb",
            split="test",
        ),
        Published(
            "ag_news",
            _SENTENCE,
            (("World",), ("Sports",), ("Business",), ("Sci/Tech", "Science/Technology")),
            _ACCURACY,
            plain=Plain((3,), (1, 2), 0),
            joined=True,
            first=1,
            hub="fancyzhx/ag_news",
            split="test",
        ),
    )
}
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "mnli_mismatched", "qnli", "rte", "wnli", "ax")
_ALSO = {"sts-b": "stsb", "sst-2": "sst2", "mnli_matched": "mnli", "mnli-mm": "mnli_mismatched", "agnews": "ag_news"}
_TEXT_AND_CLASS = Plain((2,), (0,), 1)  # AG News in one column of text


def published(name: str | None) -> Published | None:
    """The task of that name, also with "glue/" or "super_glue/" before; None if there is none."""
    known = (name or "").lower().removeprefix("glue/").removeprefix("super_glue/")
    return PUBLISHED_TASKS.get(_ALSO.get(known, known))


def read_published(op: str, argument: str, path: Path, task: Published) -> Split:
    """The labelled rows of a file of a task.

    Raises ValueError with file and line: a file that is missing, is not UTF-8 or has other columns; a row with too few
    or too many; a text or label that is empty; a label that is no class or, for a regression, no finite number.
    """
    if task.name == "imdb" and path.is_dir():
        return _folders(op, argument, path, task)
    source = f"{op}: {argument}: {str(path)!r}"
    rows: list[LabelledRow] = []
    ids: list[str] = []
    kept: list[int] = []
    left_out = {"without a label": 0, "with too few columns": 0}
    first = task.first
    for at, (number, cells, given, index) in enumerate(_read(op, argument, path, source, task)):
        place = f"{source}: line {number}"
        ids.append(str(at) if index is None else index)
        if cells is None:
            left_out["with too few columns"] += 1
            continue
        label = _label_text(place, given)
        if label in task.unlabelled:
            left_out["without a label"] += 1
            continue
        texts = [
            cell if task.broken and cell == "" else text_of(place, cell, f"a text as {name}", name)
            for cell, name in zip(cells, (*task.columns, "text"), strict=False)
        ]
        if label == "0":
            first = 0
        rows.append(((" ".join(texts),) if len(task.columns) == 1 else tuple(texts), (place, label)))
        kept.append(at)
    rows = [(texts, _value(place, label, task, first)) for texts, (place, label) in rows]
    for what, count in left_out.items():
        if count:
            logger.warning("%s: %d of %d rows %s were left out", source, count, count + len(rows), what)
    if not rows:
        raise ValueError(f"{source} holds no rows with a label")
    if len(set(ids)) < len(ids):
        ids = [str(at) for at in range(len(ids))]
    return Split(rows, task.columns, task.class_names or None, tuple(ids[at] for at in kept), tuple(ids))


def _folders(op: str, argument: str, path: Path, task: Published) -> Split:
    """Of a directory with a folder for each class, and a text in each of its files, as IMDb's test/neg/0_2.txt."""
    rows: list[LabelledRow] = []
    ids: list[str] = []
    for name in task.class_names:
        files = sorted((path / name).glob("*.txt"))
        if not files:
            refuse_input(f"{op}: {argument}: {str(path)!r}", f"a folder {name} of texts (*.txt)", "none")
        for file in files:
            text = text_of(f"{op}: {argument}: {str(file)!r}", read_text(op, argument, file), "a text", "text")
            rows.append(((text,), name))
            ids.append(f"{name}/{file.name}")
    return Split(rows, task.columns, task.class_names, tuple(ids), tuple(ids))


def _read(
    op: str, argument: str, path: Path, source: str, task: Published
) -> Iterator[tuple[int, Sequence[Any] | None, Any, str | None]]:
    """Line, texts (None for a broken row), label and index of each row."""
    text = read_text(op, argument, path)
    if path.suffix.lower() in (".jsonl", ".json"):
        yield from _objects(source, text, task)
        return
    kind = "TSV" if "\t" in lines(text)[0] else "CSV"
    given = cells_of(source, kind, text)
    if not given:
        raise ValueError(f"{source} holds no rows")
    texts: tuple[int, ...]
    widths: tuple[int, ...]
    head = given[0][1]
    if (named := _named(head, task)) is not None:
        given, width, (texts, label) = given[1:], len(head), named
        _refuse_twice(source, head)
        index = next((head.index(name) for name in ("index", "idx") if name in head), None)
        widths = (width,)
    else:
        forms = [form for form in (task.plain, _TEXT_AND_CLASS if task.joined else None) if form is not None]
        form = next((form for form in forms if len(head) in form.widths), None)
        if form is None:
            refuse_input(f"{source}: line 1", _expected(task, forms), shortened("\t".join(head)))
        widths, texts, label, index = form.widths, form.texts, form.label, None
    for number, row in given:
        if len(row) not in widths:
            if task.broken and len(row) < widths[0]:
                yield number, None, None, None
                continue
            expected = " or ".join(map(str, widths))
            refuse_input(f"{source}: line {number}", f"{expected} columns separated by {_SEPARATORS[kind]}", len(row))
        yield number, [row[at] for at in texts], row[label], None if index is None else row[index]


_SEPARATORS = {"TSV": "tabs", "CSV": "commas"}


def _objects(source: str, text: str, task: Published) -> Iterator[tuple[int, Sequence[Any], Any, str | None]]:
    for number, line in enumerate(lines(text), start=1):
        if not line.strip():
            continue
        place = f"{source}: line {number}"
        try:
            row = json_object(line, numbers_as_written=True)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        found = _named([*row], task)
        if found is None:
            refuse_input(place, f"an object with {_expected(task, ())}", shortened(", ".join(row)))
        cells = [*row.values()]
        index = as_written(row["idx"]) if "idx" in row else None
        yield number, [cells[at] for at in found[0]], cells[found[1]], index


def _named(names: Sequence[str], task: Published) -> tuple[tuple[int, ...], int] | None:
    """The places of texts and label among names of columns; None if they are not there."""
    known = (task.columns, *task.texts, *(PAIR_COLUMNS if len(task.columns) == 2 else (("text",),)))
    texts = next((columns for columns in known if set(columns) <= set(names)), None)
    label = next((name for name in (task.label, "label") if name in names), None)
    if texts is None or label is None:
        return None
    return tuple(names.index(name) for name in texts), names.index(label)


def _expected(task: Published, forms: Sequence[Plain]) -> str:
    columns = " and ".join([*(task.texts or (task.columns,))[0], task.label])
    plain = "".join(f", or {' or '.join(map(str, form.widths))} columns without names" for form in forms)
    return f"columns {columns} as {task.name} has{plain}"


def _refuse_twice(source: str, names: Sequence[str]) -> None:
    try:
        refuse_twice([name for name in names if name])
    except ValueError as error:
        raise ValueError(f"{source}: line 1: {error}") from error


def _label_text(place: str, cell: Any) -> str:
    if as_written(cell) is None:
        refuse_input(place, "one label, a text or a number", shortened(cell))
    return text_of(place, cell, "a text as label", "label").strip()


def _value(place: str, label: str, task: Published, first: int) -> Any:
    if task.classes:
        return task.class_of(place, label, first)
    value = as_number(label)
    if value is None:
        refuse_input(place, "a number as label", repr(label))
    return value


def as_number(label: str) -> float | None:
    """Parse a finite number; None for anything else, and for 1_000, which only Python takes for a number."""
    try:
        value = float(label.replace("_", "no number"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None

"""Files of predictions, as the benchmarks' own scripts and submissions have them, read strictly.

SQuAD: a JSON object of answers by the question's id. Labels: GLUE's TSV with the columns index and prediction,
SuperGLUE's JSONL with idx and label, or one prediction a line. Tags: CoNLL's columns, the predicted tag in the last.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from distilbert_fast.data.conll import Tagged, read_conll, read_tags
from distilbert_fast.data.labels import refuse_vectors
from distilbert_fast.data.published import Published, as_number
from distilbert_fast.data.tables import as_written, cells_of
from distilbert_fast.data.tags import refuse_odd_tag, scheme_of
from distilbert_fast.data.tokens import read_tagged_file
from distilbert_fast.files.text import json_object, lines, read_text, refuse_input, refuse_twice, shortened, visible

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


def read_squad_predictions(op: str, path: Path) -> dict[str, str]:
    """Answers by the question's id. Raises ValueError for another file, an id that is there twice, and no text."""
    return _by_question(op, "predictions", path, "answers", "a text", str)


def read_no_answer(op: str, path: Path) -> dict[str, float]:
    """Probabilities that a question has no answer, by its id; log odds and the like will do. NaN is refused."""
    found = _by_question(op, "na_prob", path, "probabilities", "a finite number", (int, float))
    for question, value in found.items():
        if isinstance(value, bool) or not math.isfinite(value):
            refuse_input(f"{op}: na_prob: {str(path)!r}: question {question!r}", "a finite number", value)
    return found


def _by_question(op: str, argument: str, path: Path, what: str, expected: str, kind: Any) -> dict[str, Any]:
    source = f"{op}: {argument}: {str(path)!r}"
    text = read_text(op, argument, path)
    try:
        found = json_object(text, what="question")
    except ValueError as error:
        raise ValueError(f"{source} is not a JSON object of {what} by the questions' ids: {error}") from error
    for question, value in found.items():
        if not isinstance(value, kind):
            refuse_input(f"{source}: question {question!r}", expected, shortened(value))
    return found


def read_labels(
    op: str,
    path: Path,
    ids: Sequence[str],
    task: Published | None,
    classes: Sequence[str],
    file_ids: Sequence[str] | None = None,
) -> list[Any]:
    """The prediction for each row of `ids`: the name of a class, or a number if there are no `classes`.

    Rows are named by their ids or, if those are others, by their places 0, 1, …; without a column index the file has a
    prediction for each row, in their order. With `file_ids`, those of all rows of the data's file, rows that are not in
    `ids` (they have no label) may have predictions too, which do not count; a warning says how many. Raises ValueError
    with file and line: rows that are missing, unknown or there twice; a prediction that is no class or no number.
    """
    source = f"{op}: predictions: {str(path)!r}"
    found = _labels(op, source, path)
    first = _first_number(source, task, {cell for _, _, cell in found})
    cells = [(line, index, (line, cell)) for line, index, cell in found]
    return [
        _value(f"{source}: line {line}", cell, task, classes, first)
        for line, cell in _by_index(source, cells, ids, file_ids or ids)
    ]


def _by_index(
    source: str, found: Sequence[tuple[int, str | None, _T]], ids: Sequence[str], file_ids: Sequence[str]
) -> list[_T]:
    """The predictions in the order of `ids`, of line, index and prediction; without an index they are in order."""
    values = [value for _, _, value in found]
    counted = set(ids)
    without = [line for line, index, _ in found if index is None]
    if 0 < len(without) < len(found):
        refuse_input(f"{source}: line {without[0]}", "an index as other lines have", "none")
    if any(index is None for _, index, _ in found) or not found:
        if len(values) not in (len(ids), len(file_ids)):
            all_rows = f", or of all {len(file_ids)} in its file" if len(file_ids) > len(ids) else ""
            refuse_input(source, f"a prediction for each of the {len(ids)} rows of data{all_rows}", len(values))
        if len(values) > len(ids):
            _count_left_out(source, len(values) - len(ids), len(values))
            return [value for index, value in zip(file_ids, values, strict=True) if index in counted]
        return values
    keys = [str(index) for _, index, _ in found]
    try:
        refuse_twice(keys, "index")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    places = {index: str(at) for at, index in enumerate(file_ids)}
    wanted, unlabelled = list(ids), set(file_ids) - counted
    if (given := set(keys)) != counted and given != set(file_ids):  # perhaps they go by the rows' places in the file
        by_place = {places[index] for index in ids}
        if given in (by_place, set(places.values())):
            wanted, unlabelled = [places[index] for index in ids], set(places.values()) - by_place
    by_index = dict(zip(keys, values, strict=True))
    if missing := [index for index in wanted if index not in by_index]:
        raise ValueError(
            f"{source} lacks {len(missing)} of {len(ids)} rows of data: its indices must be {wanted[0]} to "
            f"{wanted[-1]}, got none for {', '.join(missing[:3])}"
        )
    known = set(wanted)
    for line, index, _ in found:
        if index not in known and index not in unlabelled:
            refuse_input(
                f"{source}: line {line}", f"the index of a row of data, {wanted[0]} to {wanted[-1]}", repr(index)
            )
    if len(keys) > len(wanted):
        _count_left_out(source, len(keys) - len(wanted), len(keys))
    return [by_index[index] for index in wanted]


def _count_left_out(source: str, count: int, of: int) -> None:
    logger.warning("%s: %d of %d predictions are of rows without a label and are left out", source, count, of)


class Chosen(NamedTuple):
    """The labels of a row that may have any number of them, and the probability of each label, if the file has them."""

    labels: tuple[str, ...]
    scores: Mapping[str, float] | None


def read_label_lists(
    op: str, path: Path, ids: Sequence[str], file_ids: Sequence[str] | None = None, known: Set[str] = frozenset()
) -> list[Chosen]:
    """The labels of each row of `ids`: JSONL with "labels", and perhaps "idx" and "scores", an object of probabilities.

    Rows are named as in `read_labels`, which raises the same errors; rows must have scores of the same labels or none.
    Of `known` labels, those of data, others are counted in a warning, and refused if they differ in case or in what
    nobody sees, or if lists hold a 1 or 0 for each label.
    """
    source = f"{op}: predictions: {str(path)!r}"
    found: list[tuple[int, str | None, Chosen]] = []
    for number, line in enumerate(lines(read_text(op, "predictions", path)), start=1):
        if not line.strip():
            continue
        place = f"{source}: line {number}"
        try:
            row = json_object(line)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        labels, scores = row.get("labels"), row.get("scores")
        if not isinstance(labels, list) or (named := [as_written(one) for one in labels]).count(None):
            refuse_input(place, "an object with a list as labels", shortened(line))
        if len(set(named)) < len(named):
            refuse_input(place, "labels that are there once each", shortened(labels))
        if scores is not None and not (isinstance(scores, dict) and all(map(_is_number, scores.values()))):
            refuse_input(place, "an object of numbers as scores", shortened(scores))
        if found and (scores or {}).keys() != (found[0][2].scores or {}).keys():
            refuse_input(place, "scores of the same labels as in the line before", shortened(scores))
        index = as_written(row["idx"]) if "idx" in row else None
        found.append((number, index, Chosen(tuple(str(one) for one in named), scores)))
    if known:
        _check_known(source, found, known)
    return _by_index(source, found, ids, file_ids or ids)


def _check_known(source: str, found: Sequence[tuple[int, str | None, Chosen]], known: Set[str]) -> None:
    seen = {visible(label).casefold(): label for label in sorted(known)}
    others: Counter[str] = Counter()
    for number, _, row in found:
        for label in row.labels:
            if label in known:
                continue
            if (same := seen.get(visible(label).casefold())) is not None:
                refuse_input(f"{source}: line {number}", f"the label {same!r} as in data", ascii(label))
            others[label] += 1
    if others:
        refuse_vectors(f"{source}: line {found[0][0]}", [[*row.labels] for _, _, row in found], None)
        names = ", ".join(map(repr, [*others][:3])) + ", …" * (len(others) > 3)
        logger.warning("%s: %d labels are none of data's and count as wrong: %s", source, others.total(), names)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _labels(op: str, source: str, path: Path) -> list[tuple[int, str | None, str]]:
    """Line, index (None if the file has none) and prediction of each row."""
    text = read_text(op, "predictions", path)
    if path.suffix.lower() == ".jsonl":
        rows: list[tuple[int, str | None, str]] = []
        for number, line in enumerate(lines(text), start=1):
            if line.strip():
                rows.append(_object(f"{source}: line {number}", number, line))
        return rows
    kind = "CSV" if path.suffix.lower() == ".csv" else "TSV"
    given = cells_of(source, kind, text)
    if not given:
        raise ValueError(f"{source} holds no predictions")
    head = [name.strip().casefold() for name in given[0][1]]
    if "prediction" in head:
        at = head.index("prediction")
        by = next((head.index(name) for name in ("index", "id", "idx") if name in head), None)
        given = given[1:]
    elif len(head) == 1:
        at, by, head = 0, None, ["prediction"]
    else:
        expected = "a line of names, index and prediction, or one prediction a line"
        refuse_input(f"{source}: line 1", expected, shortened("\t".join(given[0][1])))
    for number, row in given:
        if len(row) != len(head):
            refuse_input(f"{source}: line {number}", f"{len(head)} columns as in line 1", len(row))
    return [(number, None if by is None else row[by].strip(), row[at].strip()) for number, row in given]


def _object(place: str, number: int, line: str) -> tuple[int, str | None, str]:
    try:
        row = json_object(line, numbers_as_written=True)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    cell = as_written(row.get("label", row.get("prediction")))
    if not cell:
        refuse_input(place, "an object with idx and label", shortened(line))
    return number, as_written(row["idx"]) if "idx" in row else None, cell


def _first_number(source: str, task: Published | None, cells: Set[str]) -> int:
    """The number of the first class: of AG News 1 in its files, 0 of models. Raises ValueError if no cell tells."""
    if task is None or not task.first or "0" in cells or not any(cell.isdecimal() for cell in cells):
        return 0
    last = task.first + len(task.classes) - 1
    if str(last) not in cells:
        refuse_input(source, f"names of classes, or a 0 or {last} that tells which number is the first", "neither")
    return task.first


def _value(place: str, cell: str, task: Published | None, classes: Sequence[str], first: int) -> Any:
    if not classes:
        if (value := as_number(cell)) is None:
            refuse_input(place, "a number as prediction", repr(cell))
        return value
    if task is not None:
        return task.class_of(place, cell, first)
    known = {name.casefold(): name for name in classes}
    if (name := known.get(cell.casefold())) is None:
        refuse_input(place, f"a prediction of {', '.join(classes)}", repr(cell))
    return name


def read_tagged(op: str, gold: Path | None, predictions: Path) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """True and predicted tags of each sentence.

    The last column of each file counts, or the tags of JSONL and Parquet; without `gold` the last two of `predictions`
    are the true and the predicted tag, as conlleval reads them. A file may hold nothing but tags. Raises ValueError
    with file and line where the two files do not have the same words, or as many sentences and words, and for a tag or
    type that data has in another case: scores tell them apart.
    """
    if gold is None:
        found = _tagged(op, "predictions", predictions)
        source = f"{op}: predictions: {str(predictions)!r}"
        alone = any(len(row) < 2 for columns in found.columns for row in columns)
        if alone or found.unit == "row":
            given = "one column" if alone else "tokens and one tag of each"
            refuse_input(source, "the true and the predicted tag in the last two columns, or --data", given)
        for first, columns in zip(found.lines, found.columns, strict=True):
            for at, row in enumerate(columns):
                refuse_odd_tag(f"{source}: line {first + at}", row[-2])
        gold_tags = [tuple(row[-2] for row in columns) for columns in found.columns]
        _refuse_other_case(source, {tag for tags in gold_tags for tag in tags}, found.places)
        return gold_tags, [tags for _, tags in found.rows]
    true, found = _tagged(op, "data", gold), _tagged(op, "predictions", predictions)
    source = f"{op}: predictions: {str(predictions)!r}"
    for at, ((words, tags), (others, theirs)) in enumerate(zip(true.rows, found.rows, strict=False)):
        begin = f"{source}: line {found.lines[at]}"
        if words and others:
            for place, (word, other) in enumerate(zip(words, others, strict=False)):
                if word != other:
                    line = found.lines[at] + place
                    refuse_input(f"{source}: line {line}", f"the word {word!r} as in data", repr(other))
        if len(tags) != len(theirs):
            expected = f"a sentence of {len(tags)} words as at line {true.lines[at]} of data"
            refuse_input(begin, expected, len(theirs))
    if len(true.rows) != len(found.rows):
        refuse_input(source, f"{len(true.rows)} sentences as in data", len(found.rows))
    _refuse_other_case(source, true.places.keys(), found.places)
    return [tags for _, tags in true.rows], [tags for _, tags in found.rows]


def _refuse_other_case(source: str, true: Set[str], places: Mapping[str, str]) -> None:
    """Refuse a predicted tag, of these with their places, that the true ones have in another case, or its type."""
    tags = {tag.casefold(): tag for tag in true}
    scheme = scheme_of({*true, *places})
    types = {} if scheme is None else {kind.casefold(): kind for tag in true if (kind := scheme.split(tag)[1])}
    known = {*types.values()}
    for tag, place in places.items():
        if tag in true:
            continue
        if (same := tags.get(tag.casefold())) is not None:
            refuse_input(f"{source}: {place}", f"the tag {same!r} as in data", repr(tag))
        kind = "" if scheme is None else scheme.split(tag)[1]
        if kind not in known and (same := types.get(kind.casefold())) is not None:
            refuse_input(f"{source}: {place}", f"the type {same!r} as in data", repr(tag))


def _tagged(op: str, argument: str, path: Path) -> Tagged:
    if path.suffix.lower() in (".jsonl", ".parquet"):
        return read_tagged_file(op, argument, path)
    source, text = f"{op}: {argument}: {str(path)!r}", read_text(op, argument, path)
    alone = all(len(line.split()) <= 1 for line in lines(text))
    return read_tags(source, text) if alone else read_conll(source, text)

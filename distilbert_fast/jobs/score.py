"""What `distilbert-fast evaluate --predictions` runs: a file of predictions scored without a model."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distilbert_fast.data.labels import label_order
from distilbert_fast.data.predictions import (
    Chosen,
    read_label_lists,
    read_labels,
    read_no_answer,
    read_squad_predictions,
    read_tagged,
)
from distilbert_fast.data.published import PUBLISHED_TASKS, Split, published
from distilbert_fast.data.squad import read_answers
from distilbert_fast.data.tasks import read_split
from distilbert_fast.evaluation.entity_scores import entity_errors, entity_scores
from distilbert_fast.evaluation.label_scores import (
    Scores,
    class_scores,
    default_metrics,
    multi_label_errors,
    multi_label_scores,
    number_scores,
)
from distilbert_fast.evaluation.squad_scores import squad_errors, squad_scores, squad_v2_errors, squad_v2_scores
from distilbert_fast.jobs.settings import RecipeError, refused

logger = logging.getLogger(__name__)

JOB = "evaluate"
SQUAD, SQUAD_V2, ENTITIES, TAGS = "squad", "squad_v2", "entities", "tags"
OTHERS = (SQUAD, SQUAD_V2, ENTITIES, TAGS)


@dataclass(frozen=True)
class Scored:
    """What predictions are worth.

    Attributes:
        count: of what was judged, and `unit`, what that is.
        metrics: by name; of SQuAD in percent, others as shares.
        errors: the standard errors of some of them, in the same unit.
        kinds: of entities, the metrics of each type.
    """

    count: int
    unit: str
    metrics: Scores
    errors: Scores = field(default_factory=dict)
    kinds: dict[str, Scores] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The metrics of SQuAD by the names of its scripts and nothing else; of others also how many were judged."""
        if self.unit == "questions":
            return dict(self.metrics)
        return {**self.metrics, "n": self.count, **({"types": self.kinds} if self.kinds else {})}


def score(
    task: str | None,
    data: Path | None,
    predictions: Path,
    na_prob: Path | None = None,
    threshold: float = 1.0,
    regression: bool = False,
) -> Scored:
    """Score predictions by what is true.

    Args:
        task: one of `OTHERS` or of `published.PUBLISHED_TASKS`; None for a file with our columns.
        data: the gold file; of "entities" and "tags" None where `predictions` holds the true tags in its last column
            but one.
        predictions: see `data.predictions`.
        na_prob, threshold: of "squad_v2": see `squad_v2_scores`.
        regression: the labels of a file with our columns are numbers.

    Raises RecipeError for input that cannot be used, by file and line.
    """
    known = check_task(task)
    if na_prob is not None and task != SQUAD_V2:
        raise RecipeError(f"{JOB}: na_prob: expected with task {SQUAD_V2} alone, got it with {task}")
    if data is None and task not in (ENTITIES, TAGS):
        raise RecipeError(f"{JOB}: data: expected the file of true answers beside predictions, got none")
    with refused():
        if task in (ENTITIES, TAGS):
            return tag_scores(*read_tagged(JOB, data, predictions), entities=task == ENTITIES)
        if task in (SQUAD, SQUAD_V2):
            return _squad(task, Path(data or ""), predictions, na_prob, threshold)
        split = read_split(JOB, "data", Path(data or ""), task, regression)
        if has_lists(split):
            known_labels = {one for _, labels in split.rows for one in labels}
            return label_list_scores(split, read_label_lists(JOB, predictions, split.ids, split.file_ids, known_labels))
        classes = classes_of(split, known.class_names if known else None)
        found = read_labels(JOB, predictions, split.ids, known, classes, split.file_ids)
        return label_scores(split, found, classes, known.metrics if known else None)


def check_task(task: str | None) -> Any:
    """The published task of that name, None for another one. Raises RecipeError for a name that is none."""
    known = published(task)
    if known is None and task is not None and task not in OTHERS:
        raise RecipeError(f"{JOB}: task: expected one of {', '.join([*PUBLISHED_TASKS, *OTHERS])}, got {task!r}")
    return known


def classes_of(split: Split, known: Sequence[str] | None) -> tuple[str, ...]:
    """The classes of a file in order; none where its labels are numbers of a regression."""
    if isinstance(split.rows[0][1], float):
        return ()
    found = {label for _, label in split.rows}
    return tuple(known or split.class_names or label_order(found))


def label_scores(
    split: Split, predicted: Sequence[Any], classes: Sequence[str], metrics: Sequence[str] | None
) -> Scored:
    """Scores of a prediction for each row: names of classes, or numbers where there are none."""
    true = [label for _, label in split.rows]
    names = [*classes, *sorted({*predicted} - {*classes})] if classes else []  # a model may know more classes
    metrics = metrics or default_metrics(len(names))
    if classes:
        place = {name: at for at, name in enumerate(names)}
        found = class_scores(metrics, [place[name] for name in predicted], [place[name] for name in true])
    else:
        found = number_scores(metrics, predicted, true)
        if undefined := [name for name, value in found[0].items() if math.isnan(value)]:
            what, same = ("labels", true[0]) if len({*true}) == 1 else ("predictions", predicted[0])
            logger.warning("%s: all %s are %g: %s undefined", JOB, what, same, " and ".join(undefined))
    return Scored(len(true), "rows", *found)


def has_lists(split: Split) -> bool:
    """Whether rows may have any number of labels."""
    return isinstance(split.rows[0][1], tuple)


def label_list_scores(split: Split, predicted: Sequence[Chosen]) -> Scored:
    """Scores of rows that may have any number of labels; with probabilities also the mean AP."""
    names = sorted(
        {one for _, labels in split.rows for one in labels} | {one for row in predicted for one in row.labels}
    )
    scored = predicted[0].scores
    if scored is not None and (absent := [name for name in names if name not in scored]):
        raise ValueError(f"{JOB}: predictions: expected scores of all labels, got none for {', '.join(absent[:3])}")
    names = names if scored is None else list(scored)
    true, found = (
        np.array([[name in labels for name in names] for labels in rows], dtype=bool).reshape(len(split.rows), -1)
        for rows in ([labels for _, labels in split.rows], [row.labels for row in predicted])
    )
    probabilities = None
    if scored is not None:
        probabilities = np.array([[(row.scores or {})[name] for name in names] for row in predicted])
    scores = multi_label_scores(found, true, probabilities)
    return Scored(len(split.rows), "rows", scores, multi_label_errors(found, true, probabilities))


def _squad(task: str, data: Path, predictions: Path, na_prob: Path | None, threshold: float) -> Scored:
    gold = read_answers(JOB, "data", data)
    predicted = read_squad_predictions(JOB, predictions)
    no_answer = None if na_prob is None else read_no_answer(JOB, na_prob)
    warn_of_others(str(predictions), [*gold], [*predicted], "are left out" if task == SQUAD_V2 else "count as wrong")
    if task == SQUAD_V2:
        metrics = squad_v2_scores(gold, predicted, no_answer, threshold)
        errors = squad_v2_errors(gold, predicted, no_answer, threshold)
        return Scored(int(metrics["total"]), "questions", metrics, errors)
    return Scored(len(gold), "questions", squad_scores(gold, predicted), squad_errors(gold, predicted))


def warn_of_others(source: str, gold: Sequence[str], predicted: Sequence[str], missing: str) -> None:
    """Count questions that only one of the two has, in a warning each, as SQuAD's scripts name them."""
    has, wanted = set(predicted), set(gold)
    for names, what in (
        ([name for name in gold if name not in has], f"questions have no prediction and {missing}"),
        ([name for name in predicted if name not in wanted], "predictions are of no question of data and do not count"),
    ):
        if names:
            more = ", …" if len(names) > 3 else ""
            logger.warning("%s: %r: %d %s: %s%s", JOB, source, len(names), what, ", ".join(names[:3]), more)


def tag_scores(true: Sequence[Sequence[str]], found: Sequence[Sequence[str]], entities: bool = True) -> Scored:
    """Entities of all sentences, if tags mark any, and the share of words whose tag is right."""
    same = [
        mine == theirs
        for tags, others in zip(found, true, strict=True)
        for mine, theirs in zip(tags, others, strict=True)
    ]
    accuracy = sum(same) / len(same)
    errors = {"accuracy": math.sqrt(accuracy * (1 - accuracy) / len(same))}
    if not entities:
        return Scored(len(true), "sentences", {"accuracy": accuracy}, errors)
    total, kinds = entity_scores(found, true)
    metrics = {name: value for name, value in total.as_dict().items() if name != "support"}
    metrics["accuracy"] = accuracy
    errors = entity_errors(found, true) | errors
    return Scored(len(true), "sentences", metrics, errors, {name: kind.as_dict() for name, kind in kinds.items()})

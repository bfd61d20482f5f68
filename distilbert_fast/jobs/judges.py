"""What `distilbert-fast evaluate` judges models on: labels of texts, tags of words, answers to questions.

A judge knows what is true. It turns a model's outputs into predictions, scores them, and writes them to the file that
`evaluate --predictions` reads.
"""

from __future__ import annotations

import json
import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from distilbert_fast.data.conll import Tagged
from distilbert_fast.data.labels import label_order
from distilbert_fast.data.predictions import Chosen
from distilbert_fast.data.published import Published, Split
from distilbert_fast.data.sentences import Text, tokenized
from distilbert_fast.data.squad import Answer, Questions, Windows, read_answers, read_asked
from distilbert_fast.data.tags import is_outside
from distilbert_fast.data.tasks import read_hub_split, read_split
from distilbert_fast.data.tokens import Pieces, Sentence, TagTask, read_tagged_file, refuse_unseen_words
from distilbert_fast.evaluation import metrics
from distilbert_fast.evaluation.metrics import Watch
from distilbert_fast.evaluation.squad_scores import squad_errors, squad_scores, squad_v2_errors, squad_v2_scores
from distilbert_fast.files.text import refuse_input
from distilbert_fast.jobs.score import (
    ENTITIES,
    JOB,
    SQUAD,
    SQUAD_V2,
    TAGS,
    Scored,
    check_task,
    classes_of,
    has_lists,
    label_list_scores,
    label_scores,
    tag_scores,
)
from distilbert_fast.jobs.settings import RecipeError, refused

logger = logging.getLogger(__name__)

_SEVERAL = "multi_label_classification"
_UNNAMED = re.compile(r"label_\d+", re.IGNORECASE)


class Judge(ABC):
    """Of one data set.

    Attributes:
        head: of the models that it judges, as `load_with_head` calls it.
        unit: what a model reads at a time.
        max_length: tokens of it, unless the model reads fewer.
    """

    head: str
    unit: str
    max_length: int = 512

    @abstractmethod
    def prepare(self, model: Any, tokenizer: Any, max_length: int) -> None:
        """Tokenize for a model. Raises ValueError for one that does not fit the data, and warns of what is cut."""

    @abstractmethod
    def predict(self, model: Any, batch_size: int, in_order: bool, watch: Watch) -> Any:
        """Predictions; with ``in_order`` batches follow the data, as a Trainer's do, else rows of one length meet."""

    @abstractmethod
    def score(self, predicted: Any) -> Scored:
        """What predictions are worth."""

    @abstractmethod
    def files(self, predicted: Any) -> dict[str, str]:
        """The predictions as files: text by suffix."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many of its units there are."""

    def warn(self, message: str) -> None:
        logger.warning("%s: %s", JOB, message)


class Labels(Judge):
    """Classes or numbers of texts.

    Args:
        split: texts and labels.
        task: None for a file with our columns.
    """

    head, unit = "SequenceClassification", "rows"

    def __init__(self, split: Split, task: Published | None) -> None:
        self.split, self.task = split, task
        self.classes = classes_of(split, task.class_names if task else None)
        self.texts = texts_of(split)

    @property
    def size(self) -> int:
        return len(self.texts)

    def prepare(self, model: Any, tokenizer: Any, max_length: int) -> None:
        if self.classes and model.config.problem_type == _SEVERAL:
            refuse_input(f"{JOB}: data", f"lists of labels for a model of problem_type {_SEVERAL}", "single labels")
        self._tokenize(tokenizer, max_length)
        outputs = model.config.num_labels
        if (outputs == 1) is not (not self.classes):
            expected = (
                "numbers as the model gives (regression)"
                if outputs == 1
                else f"classes, of which the model has {outputs}"
            )
            refuse_input(f"{JOB}: data", expected, "classes" if self.classes else "numbers")
        if self.classes:
            names = [str(model.config.id2label[at]) for at in range(outputs)]
            self.names = matched(names, self.classes, self.task)

    def _tokenize(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.length = tokenizer, max_length
        whole = tokenized(tokenizer, self.texts, 10**6, verbose=False)["input_ids"]
        if cut := sum(len(ids) > max_length for ids in whole):
            self.warn(f"{cut} of {len(whole)} texts are longer than {max_length} tokens and are cut")

    def _logits(self, model: Any, batch_size: int, in_order: bool, watch: Watch) -> Tensor:
        logits = metrics.predictions(
            model, self.tokenizer, self.texts, batch_size, self.length, in_order=in_order, watch=watch
        )
        _refuse_nan(logits)
        return logits

    def predict(self, model: Any, batch_size: int, in_order: bool, watch: Watch) -> Any:
        logits = self._logits(model, batch_size, in_order, watch)
        return logits[:, 0].tolist() if not self.classes else [self.names[at] for at in logits.argmax(1).tolist()]

    def score(self, predicted: Any) -> Scored:
        return label_scores(self.split, predicted, self.classes, self.task.metrics if self.task else None)

    def files(self, predicted: Any) -> dict[str, str]:
        rows = zip(self.split.ids, predicted, strict=True)
        return {".tsv": "index\tprediction\n" + "".join(f"{index}\t{value}\n" for index, value in rows)}


def texts_of(split: Split) -> list[Text]:
    """The sentences, or pairs of them, of a file."""
    pairs = len(split.columns) == 2
    return [(texts[0], texts[1]) if pairs else texts[0] for texts, _ in split.rows]


def _refuse_nan(logits: Tensor) -> None:
    """Raise RecipeError for logits [N, labels] of which one is NaN or +inf: the largest of its row means nothing."""
    if wrong := int((~(logits < math.inf)).any(dim=1).sum()):
        raise RecipeError(f"{JOB}: model: expected finite logits, got NaN or infinity for {wrong} of {len(logits)}")


def matched(names: Sequence[str], classes: Sequence[str], task: Published | None) -> list[str]:
    """The data's class for each of a model's, whose names are in the order of its logits.

    Names are compared without case, and with all names that a published task has for a class. Names without meaning
    (LABEL_0; or numbers, in the data or the model) are matched by their order or value. Raises ValueError for others.
    """
    known = {one.casefold(): of[0] for of in (task.classes if task else ()) for one in of}
    known |= {name.casefold(): name for name in classes}
    found = [known.get(name.casefold()) for name in names]
    if set(classes) <= set(found) and (task is None or None not in found):
        # a model's class that the data never has keeps its own name: predicting it is wrong
        return [mine or name for mine, name in zip(found, names, strict=True)]
    if all(map(_UNNAMED.fullmatch, names)) or [*names] == [str(at) for at in range(len(names))]:
        if task is None and all(name.isdecimal() and int(name) < len(names) for name in classes):
            return [str(at) for at in range(len(names))]
        if len(names) == len(classes):
            return [*classes]
    if task is None and all(name.isdecimal() and int(name) < len(names) for name in classes):
        return [str(at) for at in range(len(names))]
    refuse_input(f"{JOB}: data", f"the model's labels {', '.join(map(repr, names))}", ", ".join(map(repr, classes)))


class LabelLists(Labels):
    """Any number of labels of each text."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.classes = tuple(label_order({one for _, labels in split.rows for one in labels}))
        self.texts = texts_of(split)

    def prepare(self, model: Any, tokenizer: Any, max_length: int) -> None:
        if model.config.problem_type != _SEVERAL:
            refuse_input(f"{JOB}: model", f"problem_type {_SEVERAL} for lists of labels", model.config.problem_type)
        self._tokenize(tokenizer, max_length)
        names = [str(model.config.id2label[at]) for at in range(model.config.num_labels)]
        self.names = matched(names, self.classes, None)

    def predict(self, model: Any, batch_size: int, in_order: bool, watch: Watch) -> Any:
        logits = self._logits(model, batch_size, in_order, watch).double()
        rows = zip(logits.tolist(), logits.sigmoid().tolist(), strict=True)
        return [
            Chosen(
                tuple(name for name, logit in zip(self.names, row, strict=True) if logit > 0),
                dict(zip(self.names, probabilities, strict=True)),
            )
            for row, probabilities in rows
        ]

    def score(self, predicted: Any) -> Scored:
        return label_list_scores(self.split, predicted)

    def files(self, predicted: Any) -> dict[str, str]:
        rows = zip(self.split.ids, predicted, strict=True)
        written = (json.dumps({"idx": index, **one._asdict()}, ensure_ascii=False) for index, one in rows)
        return {".jsonl": "".join(f"{line}\n" for line in written)}


class Tags(Judge):
    """Tags of words, which mark entities or not."""

    head, unit = "TokenClassification", "sentences"

    def __init__(self, tagged: Tagged, entities: bool) -> None:
        self.tagged, self.entities = tagged, entities
        self.true = [tags for _, tags in tagged.rows]

    @property
    def size(self) -> int:
        return len(self.true)

    def prepare(self, model: Any, tokenizer: Any, max_length: int) -> None:
        names = [str(model.config.id2label[at]) for at in range(model.config.num_labels)]
        place = {name.casefold(): at for at, name in reversed([*enumerate(names)])}
        used = {tag for tags in self.true for tag in tags}
        unknown = sorted(tag for tag in used if tag.casefold() not in place)
        if all(is_outside(tag) for tag in used.difference(unknown)):
            refuse_input(f"{JOB}: data", f"tags of the model, {_few(names)}", _few(sorted(used)))
        if unknown:
            self.warn(f"the model has no {_few(unknown)}, which data has; such words count as wrong")
        place |= {tag.casefold(): len(names) + at for at, tag in enumerate(unknown)}
        rows = [Sentence(words, tuple(place[tag.casefold()] for tag in tags)) for words, tags in self.tagged.rows]
        self.pieces = Pieces(TagTask("data", (), (), (*names, *unknown)), rows, tokenizer, max_length)

    def predict(self, model: Any, batch_size: int, in_order: bool, watch: Watch) -> Any:
        logits = self.pieces.logits(model, batch_size, in_order, watch)
        _refuse_nan(logits)
        return self.pieces.tags(self.pieces.chosen(logits))

    def score(self, predicted: Any) -> Scored:
        return tag_scores(self.pieces.tags(self.pieces.truth), predicted, self.entities)

    def files(self, predicted: Any) -> dict[str, str]:
        rows = zip(self.tagged.rows, predicted, strict=True)
        blocks = ("\n".join(map("\t".join, zip(words, tags, strict=True))) for (words, _), tags in rows)
        return {".conll": "\n\n".join(blocks) + "\n"}


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:9])) + (", …" if len(names) > 9 else "")


class Answers(Judge):
    """Answers to questions, of SQuAD 1.1 or 2.0.

    Args:
        questions: with contexts.
        gold: the answers by the question's id, in the same order.
        second: of SQuAD 2.0.
        stride: tokens by which windows of one question overlap; None: 128, or a third of a window.
    """

    head, unit, max_length = "QuestionAnswering", "questions", 384

    def __init__(
        self, questions: Questions, gold: Mapping[str, Sequence[str]], second: bool, stride: int | None
    ) -> None:
        self.questions, self.gold, self.second, self.stride = questions, gold, second, stride

    @property
    def size(self) -> int:
        return len(self.gold)

    def prepare(self, model: Any, tokenizer: Any, max_length: int) -> None:
        self.windows = Windows(
            self.questions, tokenizer, max_length, min(128, max_length // 3) if self.stride is None else self.stride
        )

    def predict(self, model: Any, batch_size: int, in_order: bool, watch: Watch) -> Any:
        with refused():
            return self.windows.answers(model, batch_size, in_order, watch)

    def score(self, predicted: Any) -> Scored:
        texts, odds = self._by_id(predicted)
        if not self.second:
            return Scored(self.size, self.unit, squad_scores(self.gold, texts), squad_errors(self.gold, texts))
        scores, errors = (of(self.gold, texts, odds, threshold=0.0) for of in (squad_v2_scores, squad_v2_errors))
        return Scored(self.size, self.unit, scores, errors)

    def files(self, predicted: Any) -> dict[str, str]:
        texts, odds = self._by_id(predicted)
        if not self.second:
            return {".json": json.dumps(texts)}
        final = {name: "" if odds[name] > 0 else text for name, text in texts.items()}
        return {".json": json.dumps(final), ".answers.json": json.dumps(texts), ".na-prob.json": json.dumps(odds)}

    def _by_id(self, predicted: Sequence[Answer]) -> tuple[dict[str, str], dict[str, float]]:
        named = dict(zip(self.gold, predicted, strict=True))
        return {name: one.text for name, one in named.items()}, {name: one.null_odds for name, one in named.items()}


def judge_of(task: str | None, data: Path | None, regression: bool, stride: int | None) -> Judge:
    """The judge of a task on a file, or on a data set of the hub.

    Raises RecipeError for an unknown task, ValueError for data that cannot be read, by file and line.
    """
    known = check_task(task)
    if data is None and known is not None:
        return Labels(read_hub_split(JOB, known), known)
    if data is None:
        raise RecipeError(f"{JOB}: data: expected a file, got none")
    if task in (ENTITIES, TAGS):
        tagged = read_tagged_file(JOB, "data", data)
        refuse_unseen_words(f"{JOB}: data: {str(data)!r}", tagged)
        return Tags(tagged, entities=task == ENTITIES)
    if task in (SQUAD, SQUAD_V2):
        second = task == SQUAD_V2
        gold = read_answers(JOB, "data", data)
        if not second and (without := next((name for name, texts in gold.items() if not texts), None)):
            expected = "an answer to each question (squad_v2 is for others)"
            refuse_input(f"{JOB}: data: {str(data)!r}: question {without!r}", expected, "none")
        return Answers(read_asked(JOB, "data", data), gold, second, stride)
    split = read_split(JOB, "data", data, task, regression)
    return LabelLists(split) if has_lists(split) else Labels(split, known)

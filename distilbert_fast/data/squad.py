"""Extractive question answering on files of SQuAD's form: windows of context to train on, and a model's answers.

A question and as much of its context as fits make a window; longer contexts are cut into windows that overlap by
`stride` tokens (Devlin et al., BERT, section 4.2). Of all windows of a question the span with the largest start + end
logit is its answer, of the `N_BEST` likeliest starts and ends of each; spans are of at most `LONGEST` tokens and lie in
the context. So does transformers' example run_qa choose. Rajpurkar et al.: SQuAD, arXiv:1606.05250.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from distilbert_fast.data.sentences import by_length
from distilbert_fast.data.tables import file_name, is_held_out
from distilbert_fast.files.text import lone_surrogate, read_text, refuse_input, refuse_twice, shortened, visible
from distilbert_fast.ops._check import refuse

logger = logging.getLogger(__name__)

LONGEST = 30  # tokens of an answer
N_BEST = 20  # starts and ends of a window that are tried
_NO_SPAN = -1e9  # the score where a window has no span that may be an answer

_T = TypeVar("_T")
_KINDS: dict[type, str] = {list: "a list", str: "a text", int: "an integer", bool: "true or false"}


class Question(NamedTuple):
    text: str
    context: str
    answers: tuple[tuple[str, int], ...]  # text and where it starts in the context, in characters; none: it has none
    id: str = ""


class Answer(NamedTuple):
    """A model's answer to a question.

    Attributes:
        text: its best span in the context.
        null_odds: how much larger the logits of no answer (start and end on the first token, in the window that is
            surest of one) are than those of `text`. Above 0 there is rather no answer.
    """

    text: str
    null_odds: float


@dataclass(frozen=True)
class Questions:
    name: str
    rows: tuple[Question, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything but the ids."""
        return hashlib.sha256(json.dumps([row[:3] for row in self.rows]).encode()).hexdigest()


def load_squad(
    data: str | Path, eval_data: str | Path | None = None, unanswerable: bool = False
) -> tuple[Questions, Questions]:
    """Questions to train on and to evaluate on.

    Args:
        data: a .json file of SQuAD 1.1's form.
        unanswerable: of 2.0's, where questions may have no answer.
        eval_data: another. Without it, the questions of about 10 % of the contexts of ``data`` are held
            out, chosen by the context's hash.

    Ids may be integers, which are read as texts.

    Raises:
        ValueError: a file that is missing or of another form; with the question's id (its number if it has none) an
            answer that does not stand where it should or is white space, a question without an answer (SQuAD 2.0 has
            such), a question in which nothing is to be seen, what is no text; nothing to train or evaluate on.
    """
    train = read_questions("load_squad", "data", Path(data), unanswerable)
    if eval_data is not None:
        return train, read_questions("load_squad", "eval_data", Path(eval_data), unanswerable)
    parts: dict[bool, list[Question]] = {False: [], True: []}
    for row in train.rows:
        parts[is_held_out(row.context)].append(row)
    if not all(parts.values()):
        refuse_input("load_squad: data", "enough contexts to hold some out", "too few; give eval_data")
    return Questions(train.name, tuple(parts[False])), Questions(train.name, tuple(parts[True]))


def read_answers(op: str, argument: str, path: Path) -> dict[str, list[str]]:
    """The gold answers to each question of a file of SQuAD's form, 1.1 or 2.0, by its id; none if it has no answer.

    Raises ValueError as `load_squad` does, and for questions without an id or with the same one; where answers stand
    is not looked at, as the scripts that score them do not.
    """

    def answers_of(qa: Any) -> tuple[str, list[str]]:
        found = [_field(answer, "text", str) for answer in _field(qa, "answers", list)]
        return _id(qa) or _field(qa, "id", str), found

    source = f"{op}: {argument}: {str(path)!r}"
    rows = _read(op, argument, path, lambda qa, *_: answers_of(qa))
    try:
        refuse_twice([question for question, _ in rows], "question")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return dict(rows)


def _read(op: str, argument: str, path: Path, made: Callable[[Any, str, str], _T]) -> list[_T]:
    """What `made` makes of each question, its context and the words with which messages of it begin."""
    source = f"{op}: {argument}: {str(path)!r}"
    text = read_text(op, argument, path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not of SQuAD's form: {type(error).__name__}: {error}") from error
    rows: list[_T] = []
    where = source
    try:
        for article_number, article in enumerate(_field(content, "data", list), start=1):
            where = f"{source}: article {article_number}"
            for number, paragraph in enumerate(_field(article, "paragraphs", list), start=1):
                where = f"{source}: article {article_number}: paragraph {number}"
                context = _field(paragraph, "context", str)
                for qa in _field(paragraph, "qas", list):
                    where = f"{source}: {_name(qa, len(rows) + 1)}"
                    rows.append(made(qa, context, where))
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
    if not rows:
        raise ValueError(f"{source} holds no questions")
    return rows


def read_questions(op: str, argument: str, path: Path, unanswerable: bool) -> Questions:
    """The questions of a file; ``unanswerable``: some may have no answer. Raises ValueError as `load_squad` does."""

    def made(qa: Any, context: str, where: str) -> Question:
        return _question(where, qa, context, unanswerable)

    return Questions(file_name(path), tuple(_read(op, argument, path, made)))


def read_asked(op: str, argument: str, path: Path) -> Questions:
    """The questions of a file with their contexts and without their answers. Raises ValueError as `load_squad` does."""
    return Questions(file_name(path), tuple(_read(op, argument, path, _asked)))


def _name(qa: Any, number: int) -> str:
    """What messages call a question: its id, or its number where it has none."""
    given = qa.get("id") if isinstance(qa, dict) else None
    named = isinstance(given, (str, int)) and not isinstance(given, bool) and given != ""
    return f"question {given!r}" if named else f"question {number}"


def _id(qa: Any) -> str:
    """The id of a question as text, "" if it has none. Raises TypeError for what is no id."""
    given = qa.get("id")
    if given is None:
        return ""
    if not isinstance(given, (str, int)) or isinstance(given, bool):
        raise TypeError(f"expected a text or an integer as id, got {shortened(given)}")
    if (half := lone_surrogate(str(given))) is not None:
        raise TypeError(f"expected a text as id, got {half}")
    return str(given)


def _asked(qa: Any, context: str, where: str) -> Question:
    """A question without answers."""
    text = _field(qa, "question", str)
    _refuse_halves(where, ("question", text), ("context", context))
    if not visible(text):
        refuse_input(where, "a question of visible characters", ascii(text))
    return Question(text, context, (), _id(qa))


def _refuse_halves(where: str, *texts: tuple[str, str]) -> None:
    for what, text in texts:
        if (half := lone_surrogate(text)) is not None:
            refuse_input(where, f"a text as {what}", half)


def _question(where: str, qa: Any, context: str, unanswerable: bool) -> Question:
    asked = _asked(qa, context, where)
    impossible = _field({"is_impossible": False, **qa}, "is_impossible", bool)
    if impossible and not unanswerable:
        raise ValueError(
            f"{where}: each question must have an answer (SQuAD 1.1), got none for {asked.text!r}, which "
            "is_impossible (SQuAD 2.0)"
        )
    answers = tuple(
        (_field(answer, "text", str), _field(answer, "answer_start", int)) for answer in _field(qa, "answers", list)
    )
    if impossible and answers:
        refuse_input(where, "no answer to a question that is_impossible", repr(answers[0][0]))
    if not answers and not unanswerable:
        raise ValueError(f"{where}: each question must have an answer (SQuAD 1.1), got none for {asked.text!r}")
    _refuse_halves(where, *(("answer", text) for text, _ in answers))
    for text, start in answers:
        if start < 0 or context[start : start + len(text)] != text:
            raise ValueError(f"{where}: no answer {text!r} stands at {start} of its context")
        if not text.strip():
            refuse_input(where, "an answer with more than white space", repr(text))
    return asked._replace(answers=answers)


def _field(of: Any, name: str, kind: type[_T]) -> _T:
    """Return the value of a name in a JSON object. Raises TypeError if it is missing or of another kind."""
    if not isinstance(of, dict) or name not in of:
        raise TypeError(f"expected an object with {name}, got {shortened(of)}")
    value = of[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"expected {_KINDS[kind]} as {name}, got {shortened(value)}")
    return value


class Windows:
    """The windows of questions, tokenized.

    Args:
        questions: Q of them.
        tokenizer: a fast one.
        max_length: tokens of a window.
        stride: tokens by which windows of one question overlap.

    Raises:
        ValueError: beside the longest question there is not room for more than ``stride`` tokens of context; an answer
            of which no token covers any character.

    Attributes:
        rows: a ``datasets.Dataset`` with the tokenizer's columns, answer_mask (1 on the context), and
            start_positions and end_positions: tokens of the first answer, without what no token covers at its ends
            (white space, marks that the tokenizer drops); the first token where the window does not hold it, or there
            is none.
        question: int64 [W], the question of each window.
    """

    def __init__(self, questions: Questions, tokenizer: Any, max_length: int, stride: int) -> None:
        self.questions, self.tokenizer = questions, tokenizer
        asked = [row.text.strip() for row in questions.rows]
        longest = max(map(len, tokenizer(asked, add_special_tokens=False, verbose=False)["input_ids"]))
        room = max_length - longest - tokenizer.num_special_tokens_to_add(pair=True)
        # where it has no room the tokenizer panics, which is no Exception
        if room < 1:
            refuse(
                "Windows",
                "max_length",
                f"above {max_length - room}, the longest question with [CLS] and [SEP]s",
                max_length,
            )
        if not 0 <= stride < room:
            refuse("Windows", "stride", f"0 to {room - 1}, below the context that the longest question leaves", stride)
        encoded = tokenizer(
            asked,
            [row.context for row in questions.rows],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        self.question: list[int] = encoded.pop("overflow_to_sample_mapping")
        self.offsets: list[list[tuple[int, int]]] = encoded.pop("offset_mapping")
        columns: dict[str, list[Any]] = {**encoded, "answer_mask": [], "start_positions": [], "end_positions": []}
        masks = [[int(part == 1) for part in encoded.sequence_ids(window)] for window in range(len(self.question))]
        inside = [  # the tokens of each window that are of its answer
            _overlapping(questions.rows[at], offsets, mask)
            for at, offsets, mask in zip(self.question, self.offsets, masks, strict=True)
        ]
        covered = self._covered(inside)
        for at, offsets, tokens, mask in zip(self.question, self.offsets, inside, masks, strict=True):
            start, end = _places(covered[at], offsets, tokens)
            for name, value in (("answer_mask", mask), ("start_positions", start), ("end_positions", end)):
                columns[name].append(value)
        self.rows: Dataset = Dataset.from_dict(columns)
        held = {at for at, end in zip(self.question, columns["end_positions"], strict=True) if end}
        if lost := sum(bool(row.answers) for row in questions.rows) - len(held):
            logger.warning(
                "%s: %d of %d questions have an answer that no window holds whole: it is longer than max_length %d and "
                "stride %d leave room for",
                *(questions.name, lost, len(questions), max_length, stride),
            )

    def _covered(self, inside: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """For each question's first answer, the first character that a token covers, and the one after the last."""
        spans = [_span(row) for row in self.questions.rows]
        found = [(stop, begin) for begin, stop in spans]  # no character found yet; of no answer (-1, -1) ever
        for at, offsets, tokens in zip(self.question, self.offsets, inside, strict=True):
            if tokens:
                low, high = offsets[tokens[0]][0], offsets[tokens[-1]][1]
                found[at] = min(found[at][0], max(low, spans[at][0])), max(found[at][1], min(high, spans[at][1]))
        for row, (begin, stop) in zip(self.questions.rows, found, strict=True):
            if row.answers and begin >= stop:
                raise ValueError(
                    f"Windows: questions: question {row.id or row.text!r}: no token covers a character of its answer "
                    f"{row.answers[0][0]!r}"
                )
        return found

    def collator(self) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
        """Pads windows to the longest of a batch."""

        def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
            ours = ("answer_mask", "start_positions", "end_positions")
            theirs = [{name: value for name, value in row.items() if name not in ours} for row in rows]
            batch = dict(self.tokenizer.pad(theirs, return_tensors="pt"))
            masks = [torch.tensor(row["answer_mask"]) for row in rows]
            batch["answer_mask"] = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)  # [B, T]
            for name in ours[1:]:
                batch[name] = torch.tensor([row[name] for row in rows])
            return batch

        return collate

    def batches(self, size: int, rows: int) -> list[dict[str, Tensor]]:
        """The columns that a model takes, of the first windows."""
        first = range(min(rows, len(self.question)))
        return [inputs for inputs, _ in self._batches(first[at : at + size] for at in first[::size])]

    @torch.inference_mode()
    def answers(
        self,
        model: Any,
        batch_size: int = 16,
        in_order: bool = False,
        watch: Callable[[Sequence[Any]], Iterable[Any]] = iter,
    ) -> list[Answer]:
        """A model's answer to each question; the model is left in eval mode.

        ``in_order``: batches follow the data, else windows of one length meet. ``watch`` sees the batches go by.
        Raises ValueError for logits of which one is NaN or +inf.
        """
        model.eval()
        device = next(model.parameters()).device
        found: list[tuple[float, str, float]] = [(_NO_SPAN, "", 0.0)] * len(self.question)
        for windows in watch(by_length(list(map(len, self.offsets)), batch_size, in_order)):
            ((inputs, allowed),) = self._batches([windows])
            output = model(**{name: x.to(device) for name, x in inputs.items()})
            starts, ends = (x.float().cpu().numpy() for x in (output.start_logits, output.end_logits))
            for place, window in enumerate(windows):
                given = starts[place], ends[place]
                if not all((logits[: len(self.offsets[window])] < np.inf).all() for logits in given):
                    asked = self.questions.rows[self.question[window]]
                    refuse(
                        "Windows", "model", "one with finite logits", f"NaN or infinity for {asked.id or asked.text!r}"
                    )
                score, first, last = _best_span(starts[place], ends[place], allowed[place].numpy())
                offsets, context = self.offsets[window], self.questions.rows[self.question[window]].context
                text = context[offsets[first][0] : offsets[last][1]] if score > _NO_SPAN else ""
                found[window] = score, text, float(starts[place][0] + ends[place][0])
        best: dict[int, tuple[float, str]] = {}
        null: dict[int, float] = {}
        for at, (score, text, none) in zip(self.question, found, strict=True):
            if at not in best or score > best[at][0]:
                best[at] = score, text
            null[at] = min(none, null.get(at, none))
        return [Answer(best[at][1], null[at] - best[at][0]) for at in range(len(self.questions))]

    def _batches(self, order: Iterable[Sequence[int]]) -> Any:
        collate = self.collator()
        for windows in order:
            batch = collate([self.rows[at] for at in windows])
            allowed = batch.pop("answer_mask").bool()
            yield {name: x for name, x in batch.items() if not name.endswith("_positions")}, allowed


def _span(row: Question) -> tuple[int, int]:
    """The first character of a question's first answer and the one after its last, without white space at its ends.

    A byte-level token may have the space before its word among its characters, and be no token of the answer."""
    if not row.answers:
        return -1, -1
    text, begin = row.answers[0]
    return begin + len(text) - len(text.lstrip()), begin + len(text.rstrip())


def _overlapping(row: Question, offsets: Sequence[tuple[int, int]], mask: Sequence[int]) -> list[int]:
    """The tokens that cover a character of a question's first answer, and not white space alone."""
    begin, stop = _span(row)
    shared = [(max(low, begin), min(high, stop)) for low, high in offsets]
    return [at for at, (low, high) in enumerate(shared) if mask[at] and row.context[low:high].strip()]


def _places(span: tuple[int, int], offsets: Sequence[tuple[int, int]], tokens: Sequence[int]) -> tuple[int, int]:
    """The first and last token of an answer in a window; 0, 0 if the answer is not wholly inside."""
    if not tokens or offsets[tokens[0]][0] > span[0] or offsets[tokens[-1]][1] < span[1]:
        return 0, 0
    return tokens[0], tokens[-1]


def _best_span(start: np.ndarray, end: np.ndarray, allowed: np.ndarray) -> tuple[float, int, int]:
    """Score, first and last token of the best span; logits [T], and which tokens may be in an answer."""
    firsts, lasts = (np.argsort(logits)[-1 : -N_BEST - 1 : -1] for logits in (start, end))
    firsts, lasts = firsts[allowed[firsts]], lasts[allowed[lasts]]
    length = lasts[None, :] - firsts[:, None] + 1
    scores = np.where((length > 0) & (length <= LONGEST), start[firsts][:, None] + end[lasts][None, :], _NO_SPAN)
    if scores.size == 0:
        return _NO_SPAN, 0, 0
    first, last = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[first, last]), int(firsts[first]), int(lasts[last])

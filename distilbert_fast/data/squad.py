"""Extractive question answering on files of SQuAD 1.1's form: windows of context to train on, exact match and F1.

A question and as much of its context as fits make a window; longer contexts are cut into windows that overlap by
`stride` tokens (Devlin et al., BERT, section 4.2). Of all windows of a question the span with the largest start + end
logit is its answer; spans are of at most `LONGEST` tokens and lie in the context.
Rajpurkar et al.: SQuAD, arXiv:1606.05250, whose scores torchmetrics computes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from datasets import Dataset
from torch import Tensor
from torchmetrics.functional.text import squad

from distilbert_fast.data.sentences import by_length
from distilbert_fast.data.tables import file_name, is_held_out
from distilbert_fast.files.text import lone_surrogate, read_text, refuse_input, shortened
from distilbert_fast.ops._check import refuse

logger = logging.getLogger(__name__)

LONGEST = 30  # tokens of an answer

_T = TypeVar("_T")
_KINDS: dict[type, str] = {list: "a list", str: "a text", int: "an integer", bool: "true or false"}


class Question(NamedTuple):
    text: str
    context: str
    answers: tuple[tuple[str, int], ...]  # text and where it starts in the context, in characters
    id: str = ""


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


def load_squad(data: str | Path, eval_data: str | Path | None = None) -> tuple[Questions, Questions]:
    """Questions to train on and to evaluate on.

    Args:
        data: a .json file of SQuAD 1.1's form.
        eval_data: another. Without it, the questions of about 10 % of the contexts of ``data`` are held
            out, chosen by the context's hash.

    Raises:
        ValueError: a file that is missing or of another form; with the question's id an answer that does not stand
            where it should or is white space, a question without an answer (SQuAD 2.0 has such), what is no text;
            nothing to train or evaluate on.
    """
    train = _read("data", Path(data))
    if eval_data is not None:
        return train, _read("eval_data", Path(eval_data))
    parts: dict[bool, list[Question]] = {False: [], True: []}
    for row in train.rows:
        parts[is_held_out(row.context)].append(row)
    if not all(parts.values()):
        refuse_input("load_squad: data", "enough contexts to hold some out", "too few; give eval_data")
    return Questions(train.name, tuple(parts[False])), Questions(train.name, tuple(parts[True]))


def _read(argument: str, path: Path) -> Questions:
    source = f"load_squad: {argument}: {str(path)!r}"
    text = read_text("load_squad", argument, path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not of SQuAD's form: {type(error).__name__}: {error}") from error
    rows: list[Question] = []
    try:
        for article in _field(content, "data", list):
            for paragraph in _field(article, "paragraphs", list):
                context = _field(paragraph, "context", str)
                for qa in _field(paragraph, "qas", list):
                    rows.append(_question(source, qa, context, len(rows) + 1))
    except TypeError as error:
        raise ValueError(f"{source} is not of SQuAD's form: TypeError: {error}") from error
    if not rows:
        raise ValueError(f"{source} holds no questions")
    return Questions(file_name(path), tuple(rows))


def _question(source: str, qa: Any, context: str, number: int) -> Question:
    """A question and its answers; `number` names one without an id in messages."""
    name = f"question {qa['id']!r}" if isinstance(qa, dict) and qa.get("id") else f"question {number}"
    try:
        asked = _field(qa, "question", str)
        if _field({"is_impossible": False, **qa}, "is_impossible", bool):
            raise ValueError(
                f"{source}: {name}: each question must have an answer (SQuAD 1.1), got none for {asked!r}, which "
                "is_impossible (SQuAD 2.0)"
            )
        answers = tuple(
            (_field(answer, "text", str), _field(answer, "answer_start", int)) for answer in _field(qa, "answers", list)
        )
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    if not answers:
        raise ValueError(f"{source}: {name}: each question must have an answer (SQuAD 1.1), got none for {asked!r}")
    for what, text in (("question", asked), ("context", context), *(("answer", text) for text, _ in answers)):
        if (half := lone_surrogate(text)) is not None:
            refuse_input(f"{source}: {name}", f"a text as {what}", half)
    for text, start in answers:
        if start < 0 or context[start : start + len(text)] != text:
            raise ValueError(f"{source}: {name}: no answer {text!r} stands at {start} of its context")
        if not text.strip():
            refuse_input(f"{source}: {name}", "an answer with more than white space", repr(text))
    return Question(asked, context, answers, str(qa.get("id") or ""))


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
            (white space, marks that the tokenizer drops); the first token where the window does not hold it.
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
        if lost := len(questions) - len(held):
            logger.warning(
                "%s: %d of %d questions have an answer that no window holds whole: it is longer than max_length %d and "
                "stride %d leave room for",
                *(questions.name, lost, len(questions), max_length, stride),
            )

    def _covered(self, inside: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """For each question's first answer, the first character that a token covers, and the one after the last."""
        spans = [_span(row) for row in self.questions.rows]
        found = [(stop, begin) for begin, stop in spans]  # no character found yet
        for at, offsets, tokens in zip(self.question, self.offsets, inside, strict=True):
            if tokens:
                low, high = offsets[tokens[0]][0], offsets[tokens[-1]][1]
                found[at] = min(found[at][0], max(low, spans[at][0])), max(found[at][1], min(high, spans[at][1]))
        for row, (begin, stop) in zip(self.questions.rows, found, strict=True):
            if begin >= stop:
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
    def score(self, model: Any, batch_size: int = 16) -> dict[str, float]:
        """Exact match and F1 in percent; the model is left in eval mode."""
        model.eval()
        device = next(model.parameters()).device
        best: dict[int, tuple[float, str]] = {}
        order = by_length(list(map(len, self.offsets)), batch_size)
        for windows, (inputs, allowed) in zip(order, self._batches(order), strict=True):
            output = model(**{name: x.to(device) for name, x in inputs.items()})
            score, first, last = _best_spans(
                output.start_logits.float().cpu(), output.end_logits.float().cpu(), allowed
            )
            for place, window in enumerate(windows):
                at, offsets = self.question[window], self.offsets[window]
                found = float(score[place])
                if at not in best or found > best[at][0]:
                    text = self.questions.rows[at].context[offsets[first[place]][0] : offsets[last[place]][1]]
                    best[at] = found, text
        answers: Any = [
            {"id": str(at), "answers": {"text": [text for text, _ in row.answers], "answer_start": [0]}}
            for at, row in enumerate(self.questions.rows)
        ]
        found_texts: Any = [{"id": str(at), "prediction_text": best[at][1]} for at in range(len(answers))]
        return {name: float(value) for name, value in squad(found_texts, answers).items()}

    def _batches(self, order: Iterable[Sequence[int]]) -> Any:
        collate = self.collator()
        for windows in order:
            batch = collate([self.rows[at] for at in windows])
            allowed = batch.pop("answer_mask").bool()
            yield {name: x for name, x in batch.items() if not name.endswith("_positions")}, allowed


def _span(row: Question) -> tuple[int, int]:
    """The first character of a question's first answer and the one after its last, without white space at its ends.

    A byte-level token may have the space before its word among its characters, and be no token of the answer."""
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


def _best_spans(start: Tensor, end: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Score, first and last token [B] of the best span; start, end [B, T] logits."""
    start, end = (x.masked_fill(~allowed, -1e9) for x in (start, end))
    ones = torch.ones(start.shape[1], start.shape[1], dtype=torch.bool)
    spans = (start[:, :, None] + end[:, None, :]).masked_fill(~(ones.triu() & ones.tril(LONGEST - 1)), -1e18)
    score, at = spans.flatten(1).max(dim=1)  # of [B, T·T]
    return score, at // start.shape[1], at % start.shape[1]

"""Extractive question answering on files of SQuAD 1.1's form: windows of context to train on, exact match and F1.

A question and as much of its context as fits make a window; longer contexts are cut into windows that overlap by
`stride` tokens (Devlin et al., BERT, section 4.2). Of all windows of a question the span with the largest start + end
logit is its answer; spans are of at most `LONGEST` tokens and lie in the context.
Rajpurkar et al.: SQuAD, arXiv:1606.05250, whose scores torchmetrics computes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from distilbert_fast.ops._check import refuse

if TYPE_CHECKING:
    from datasets import Dataset

LONGEST = 30  # tokens of an answer
EVAL_PERCENT = 10  # of a file's contexts when no evaluation file is given


class Question(NamedTuple):
    text: str
    context: str
    answers: tuple[tuple[str, int], ...]  # text and where it starts in the context, in characters


@dataclass(frozen=True)
class Questions:
    name: str
    rows: tuple[Question, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()


def load_squad(data: str | Path, eval_data: str | Path | None = None) -> tuple[Questions, Questions]:
    """Questions to train on and to evaluate on.

    Args:
        data: a .json file of SQuAD 1.1's form.
        eval_data: another. Without it, the questions of about EVAL_PERCENT % of the contexts of ``data`` are held
            out, chosen by the context's hash.

    Raises:
        ValueError: a file that is missing or of another form, an answer that does not stand where it should, a
            question without an answer, nothing to train or evaluate on.
    """
    train = _read("data", Path(data))
    if eval_data is not None:
        return train, _read("eval_data", Path(eval_data))
    parts: dict[bool, list[Question]] = {False: [], True: []}
    for row in train.rows:
        share = int.from_bytes(hashlib.sha256(row.context.encode()).digest()[:8], "big") % 100
        parts[share < EVAL_PERCENT].append(row)
    if not all(parts.values()):
        raise ValueError("load_squad: data: expected enough contexts to hold some out, got too few; give eval_data")
    return Questions(train.name, tuple(parts[False])), Questions(train.name, tuple(parts[True]))


def _read(argument: str, path: Path) -> Questions:
    if not path.is_file():
        raise ValueError(f"load_squad: {argument}: no such file: {str(path)!r}")
    rows = []
    try:
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = tuple((answer["text"], answer["answer_start"]) for answer in qa["answers"])
                    rows.append(Question(qa["question"], paragraph["context"], answers))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"load_squad: {argument}: {str(path)!r} is not of SQuAD's form: {type(error).__name__}: {error}"
        ) from error
    for row in rows:
        if not row.answers:
            raise ValueError(
                f"load_squad: {argument}: {str(path)!r}: each question must have an answer (SQuAD 1.1), got none for "
                f"{row.text!r}"
            )
        for text, start in row.answers:
            if row.context[start : start + len(text)] != text:
                raise ValueError(
                    f"load_squad: {argument}: {str(path)!r}: no answer {text!r} stands at {start} of its context"
                )
    if not rows:
        raise ValueError(f"load_squad: {argument}: {str(path)!r} holds no questions")
    return Questions("/".join(path.resolve().parts[-2:]), tuple(rows))


class Windows:
    """The windows of questions, tokenized.

    Args:
        questions: Q of them.
        tokenizer: a fast one.
        max_length: tokens of a window.
        stride: tokens by which windows of one question overlap.

    Raises:
        ValueError: beside the longest question there is not room for more than ``stride`` tokens of context.

    Attributes:
        rows: a ``datasets.Dataset`` with the tokenizer's columns, answer_mask (1 on the context), and
            start_positions and end_positions: tokens of the first answer; the first token where the window has none.
        question: int64 [W], the question of each window.
    """

    def __init__(self, questions: Questions, tokenizer: Any, max_length: int, stride: int) -> None:
        from datasets import Dataset

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
        for window, at in enumerate(self.question):
            mask = [int(part == 1) for part in encoded.sequence_ids(window)]
            start, end = _places(questions.rows[at].answers[0], self.offsets[window], mask)
            for name, value in (("answer_mask", mask), ("start_positions", start), ("end_positions", end)):
                columns[name].append(value)
        self.rows: Dataset = Dataset.from_dict(columns)

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
        """What a model takes, of the first windows."""
        return [inputs for inputs, _ in self._batches(size, range(min(rows, len(self.question))))]

    @torch.inference_mode()
    def score(self, model: Any, batch_size: int = 16) -> dict[str, float]:
        """Exact match and F1 in percent; the model is left in eval mode."""
        from torchmetrics.functional.text import squad

        model.eval()
        device = next(model.parameters()).device
        best: dict[int, tuple[float, str]] = {}
        order = sorted(range(len(self.question)), key=lambda window: len(self.offsets[window]))
        done = 0
        for inputs, allowed in self._batches(batch_size, order):
            output = model(**{name: x.to(device) for name, x in inputs.items()})
            score, first, last = _best_spans(
                output.start_logits.float().cpu(), output.end_logits.float().cpu(), allowed
            )
            for place, window in enumerate(order[done : done + batch_size]):
                at, offsets = self.question[window], self.offsets[window]
                found = float(score[place])
                if at not in best or found > best[at][0]:
                    text = self.questions.rows[at].context[offsets[first[place]][0] : offsets[last[place]][1]]
                    best[at] = found, text
            done += batch_size
        answers: Any = [
            {"id": str(at), "answers": {"text": [text for text, _ in row.answers], "answer_start": [0]}}
            for at, row in enumerate(self.questions.rows)
        ]
        found_texts: Any = [{"id": str(at), "prediction_text": best[at][1]} for at in range(len(answers))]
        return {name: float(value) for name, value in squad(found_texts, answers).items()}

    def _batches(self, size: int, order: Sequence[int]) -> Any:
        collate = self.collator()
        for start in range(0, len(order), size):
            batch = collate([self.rows[at] for at in order[start : start + size]])
            allowed = batch.pop("answer_mask").bool()
            yield {name: x for name, x in batch.items() if not name.endswith("_positions")}, allowed


def _places(answer: tuple[str, int], offsets: Sequence[tuple[int, int]], mask: Sequence[int]) -> tuple[int, int]:
    """First and last token of an answer in a window; 0, 0 if it is not wholly inside."""
    begin, stop = answer[1], answer[1] + len(answer[0])
    inside = [at for at, (low, high) in enumerate(offsets) if mask[at] and low < stop and high > begin]
    if not inside or offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < stop:
        return 0, 0
    return inside[0], inside[-1]


def _best_spans(start: Tensor, end: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Score, first and last token [B] of the best span; start, end [B, T] logits."""
    start, end = (x.masked_fill(~allowed, -1e9) for x in (start, end))
    ones = torch.ones(start.shape[1], start.shape[1], dtype=torch.bool)
    spans = (start[:, :, None] + end[:, None, :]).masked_fill(~(ones.triu() & ones.tril(LONGEST - 1)), -1e18)
    score, at = spans.flatten(1).max(dim=1)  # of [B, T·T]
    return score, at // start.shape[1], at % start.shape[1]

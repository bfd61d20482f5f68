"""Answers to questions: spans of a context, by what a model gives each token as the first and as the last of one.

p(i, j) = softmax(start)_i · softmax(end)_j over the tokens of the context, [CLS] included, which stands for no answer;
i ≤ j < i + max_answer_len. That is what the pipeline "question-answering" of transformers 4 computes. transformers 5
has only its inner part left, for documents, which is called here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Encoding
from transformers.pipelines.document_question_answering import select_starts_ends

NOT_FINITE = "the model's answer holds NaN or infinity"


def is_finite(answer: Any) -> bool:
    """Whether an answer holds no NaN and no infinity, which JSON has no form for."""
    if isinstance(answer, Mapping):
        return all(map(is_finite, answer.values()))
    if isinstance(answer, (list, tuple)):
        return all(map(is_finite, answer))
    return not isinstance(answer, (float, np.floating, np.ndarray)) or bool(np.isfinite(answer).all())


def best_answers(
    context: str,
    windows: Sequence[Encoding],
    logits: Sequence[tuple[np.ndarray, np.ndarray]],
    cls_id: int | None,
    top_k: int,
    max_answer_len: int,
    handle_impossible_answer: bool,
    align_to_words: bool,
) -> list[dict[str, Any]]:
    """The likeliest answers, {"score", "start", "end", "answer"}, best first; start and end count characters.

    Args:
        windows: of the question and parts of the context.
        logits: of starts and of ends, float32 [T] each, for each window.
        cls_id: of the token that stands for no answer; None: there is none.
        top_k, max_answer_len, handle_impossible_answer, align_to_words: see ``QuestionAnswering``.

    The same text found in several places or windows is one answer, with the sum of their scores.
    """
    found: dict[str, dict[str, Any]] = {}
    no_answer = 1e6
    for window, (start, end) in zip(windows, logits, strict=True):
        outside = np.array([part != 1 for part in window.sequence_ids], dtype=np.int64)
        if cls_id is not None:
            outside[np.array(window.ids) == cls_id] = 0
        starts, ends, scores, no_answer = select_starts_ends(
            start[None],
            end[None],
            outside[None],
            np.ones_like(outside)[None],
            no_answer,
            2 * top_k + 10 if align_to_words else top_k,  # words merge some
            handle_impossible_answer,
            max_answer_len,
        )
        for first, last, score in zip(starts.tolist(), ends.tolist(), scores.tolist(), strict=True):
            low, high = _characters(window, first, last, align_to_words)
            text = context[low:high]
            entry = found.setdefault(text.lower(), {"score": 0.0, "start": low, "end": high, "answer": text})
            entry["score"] += score
    answers = [*found.values()]
    if handle_impossible_answer:
        answers.append({"score": float(no_answer), "start": 0, "end": 0, "answer": ""})
    return sorted(answers, key=lambda answer: answer["score"], reverse=True)[:top_k]


def _characters(window: Encoding, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    """The characters of the context from one token to another, of whole words where the tokenizer knows words."""
    if align_to_words:
        words = window.token_to_word(first), window.token_to_word(last)
        spans = [None if word is None else window.word_to_chars(word, sequence_index=1) for word in words]
        if spans[0] is not None and spans[1] is not None:
            return spans[0][0], spans[1][1]
    return window.offsets[first][0], window.offsets[last][1]

"""A model as a server has it: what may be asked of it, texts as its windows, its outputs as answers.

Requests with other options share a batch, because a batch gives what no option changes: logits, or pooled hidden
states. Options are applied to those, request by request.
"""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from torch import Tensor

from distilbert_fast.ops import _check
from distilbert_fast.serving.answers import NOT_FINITE, is_finite
from distilbert_fast.serving.encoding import EncodedRow, unreadable
from distilbert_fast.serving.http.errors import Refused
from distilbert_fast.serving.predictor import Predictor
from distilbert_fast.serving.tasks import (
    STRATEGIES,
    Embedding,
    TextClassification,
    TokenClassification,
    function_of,
    name_of,
    scores_of,
)

EMBED, CLASSIFY, RERANK, TAG, ANSWER = "embed", "classify", "rerank", "tag", "answer"
ABILITIES = {
    "embedding": EMBED,
    "text-classification": CLASSIFY,
    "regression": CLASSIFY,
    "reranking": CLASSIFY,
    "token-classification": TAG,
    "question-answering": ANSWER,
}
_DUMP = orjson.OPT_SERIALIZE_NUMPY
ToAnswer = Callable[[EncodedRow, Sequence[Any]], Any]  # of a row, from the outputs of its windows


class TokenEmbeddings(Embedding):
    """The hidden states of each token of a text. Answer: float32 [T, C]."""

    def outputs(self, model: Any, batch: Mapping[str, Tensor], lengths: Sequence[int]) -> list[np.ndarray]:
        hidden = model(**batch)[0].float().cpu().numpy()  # [B, T, C]
        return [own[:length] for own, length in zip(hidden, lengths, strict=True)]


class Served:
    """A model that is served.

    Args:
        name: what clients call it.
        source: directory or hub id.
        task: see ``Predictor``; None: what the model has the head for. "reranking" may be served as
            "text-classification" with one label, and gives the scores of pairs too.
        precision, max_length: see ``Predictor``.
        packed: a file for the packed weights, see ``Predictor.load``.

    Raises:
        CheckpointError, TypeError, ValueError: as ``Predictor.load`` does.
    """

    def __init__(
        self,
        name: str,
        source: str | Path,
        task: str | None = None,
        precision: str | None = None,
        max_length: int | None = None,
        packed: str | Path | None = None,
    ) -> None:
        self.name, self.source = name, str(source)
        rerank = task == "reranking"  # logits of pairs: a classifier's
        wanted = "text-classification" if rerank else task
        loaded = Predictor.load(source, wanted, precision, packed=packed, max_length=max_length)
        self.task = "reranking" if rerank else name_of(loaded.task)
        self.model, self.tokenizer, self.max_length = loaded.model, loaded.tokenizer, loaded.max_length
        config = self.model.config
        self.labels: dict[int, str] = config.id2label
        self.kinds = {ABILITIES[self.task]}
        if rerank and config.num_labels != 1:
            _check.refuse("serve", "model", f"one with 1 label for reranking {name!r}", f"{config.num_labels} labels")
        if CLASSIFY in self.kinds:
            self.kinds |= {RERANK} if config.num_labels == 1 else set()
            loaded = loaded.sharing(TextClassification(function_to_apply="none"))
        elif isinstance(loaded.task, Embedding):
            self.pooling = loaded.task.pooling
            loaded = loaded.sharing(Embedding(pooling=self.pooling))
            self.tokens = loaded.sharing(TokenEmbeddings())
        elif TAG in self.kinds:
            tasks = {one: TokenClassification(aggregation_strategy=one) for one in STRATEGIES}
            for entities in tasks.values():
                loaded.sharing(entities)
            self._strategies = tasks
        self.predictor = loaded

    # Texts → windows ----------------------------------------------------------------------------------------------

    def encode(
        self, predictor: Predictor, rows: Sequence[Any], field: Callable[[int], str], truncate: bool
    ) -> list[EncodedRow]:
        """Rows as windows.

        Args:
            predictor: whose windows.
            rows: texts, pairs of texts, or the ids of a text's tokens.
            field: the field of the body that holds a row of this number.
            truncate: rows that are too long are cut, else refused.

        Raises:
            Refused: 422 for a row that is no text, 413 for one that is too long.
        """
        given = [self._decoded(row, field(at)) if _is_ids(row) else row for at, row in enumerate(rows)]
        encoded = predictor.encode(given)
        for at, row in enumerate(encoded):
            if row.refused is not None:
                raise Refused(422, row.refused, field(at))
            if row.truncated and not truncate:
                most = f"expected {self.max_length} tokens at most, which {self.name!r} reads, got more"
                raise Refused(413, f'{most}; "truncate": true cuts texts', field(at))
        return encoded

    def _decoded(self, ids: tuple[int, ...], field: str) -> str:
        most = len(self.tokenizer)
        wrong = next((one for one in ids if not 0 <= one < most), None)
        if wrong is not None:
            raise Refused(422, f"expected ids of tokens from 0 to {most - 1}, got {wrong}", field)
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def tokenize(self, text: str, special: bool, field: str) -> list[dict[str, Any]]:
        """The tokens of a text, start and stop counting characters, as text-embeddings-inference has them."""
        if (why := unreadable(text)) is not None:
            raise Refused(422, why, field)
        found = self.predictor.whole(text, special)
        parts = zip(found.ids, found.tokens, found.special_tokens_mask, found.offsets, strict=True)
        return [
            {
                "id": number,
                "text": token if is_special else text[start:stop],
                "special": bool(is_special),
                "start": None if is_special else start,
                "stop": None if is_special else stop,
            }
            for number, token, is_special, (start, stop) in parts
        ]

    # Outputs → answers --------------------------------------------------------------------------------------------

    def embedding(self, normalize: bool, dimensions: int | None, field: str = "dimensions") -> ToAnswer:
        """The embedding of a text, float32 [D]. Raises Refused for more dimensions than the model has."""
        most = int(self.model.config.hidden_size)
        if dimensions is not None and dimensions > most:
            raise Refused(422, f"expected 1 to {most}, which {self.name!r} has, got {dimensions}", field)

        def answer(row: EncodedRow, outputs: Sequence[Any]) -> np.ndarray:
            kept = outputs[0][:dimensions]
            return kept / max(float(np.linalg.norm(kept)), 1e-12) if normalize else kept

        return answer

    def classes(self, raw_scores: bool) -> ToAnswer:
        """All labels of a text with their scores, the best first."""
        function = "none" if raw_scores else function_of(self.model.config)

        def answer(row: EncodedRow, outputs: Sequence[Any]) -> list[dict[str, Any]]:
            scores = scores_of(outputs[0][None], function)[0]  # [K]
            order = np.argsort(-scores, kind="stable").tolist()
            return [{"score": float(scores[at]), "label": self.labels[at]} for at in order]

        return answer

    def score(self, raw_scores: bool) -> ToAnswer:
        """How well a text answers a query."""
        function = "none" if raw_scores else "sigmoid"
        return lambda row, outputs: float(scores_of(outputs[0][None], function)[0, 0])

    def entities(self, aggregation_strategy: str, ignore_labels: Sequence[str]) -> ToAnswer:
        task = copy.copy(self._strategies[aggregation_strategy])
        task.ignore_labels = tuple(ignore_labels)
        return lambda row, outputs: [
            {name: _plain(value) for name, value in entity.items()} for entity in task.answer(row, outputs)
        ]

    def answers(self, **options: Any) -> ToAnswer:
        """Answers to a question; see ``QuestionAnswering``."""
        task = copy.copy(self.predictor.task)
        for name, value in options.items():
            setattr(task, name, value)
        return lambda row, outputs: task.answer(row, outputs)

    def refuse_kind(self, kind: str) -> None:
        if kind not in self.kinds:
            able = ", ".join(sorted(self.kinds))
            raise Refused(422, f"expected a model that can {kind}, got {self.name!r}, which can {able}", "model")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _is_ids(row: Any) -> bool:
    return isinstance(row, tuple) and isinstance(row[0], int)


def dumped(answer: Any) -> bytes:
    """JSON, float32 with as many digits as tell it from others."""
    return orjson.dumps(answer, option=_DUMP)


def in_base64(embedding: np.ndarray) -> str:
    """float32, the least byte first, as OpenAI has it."""
    return base64.b64encode(np.ascontiguousarray(embedding, dtype="<f4").tobytes()).decode()


def refuse_not_finite(answers: Sequence[Any]) -> None:
    """Raise Refused for an answer that JSON has no form for."""
    for at, one in enumerate(answers):
        if not is_finite(one):
            raise Refused(500, f"row {at}: {NOT_FINITE}")

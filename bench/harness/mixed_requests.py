"""Requests of every route of `serve`, by models of every kind, each with what the engine alone answers.

An answer that is lost, that belongs to another request or that another batch has changed is then seen.
"""

from __future__ import annotations

import base64
import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from distilbert_fast import Predictor

HEADS = {
    "labels": (transformers.BertForSequenceClassification, {"num_labels": 4}),
    "cross": (transformers.BertForSequenceClassification, {"num_labels": 1}),
    "ner": (
        transformers.BertForTokenClassification,
        {"id2label": dict(enumerate("O B-PER I-PER B-LOC I-LOC".split()))},
    ),
    "qa": (transformers.BertForQuestionAnswering, {}),
}
ROUTES = "/v1/embeddings /embed /embed_all /similarity /predict /rerank /tag /qa /tokenize".split()
TOLERANCE = 2e-5  # of numbers up to about 1, whose last bits depend on what else is in a batch


def with_heads(body: Path) -> dict[str, Path]:
    """Directories by name, beside that of an encoder: itself as "embed", and it with each head, of random weights."""
    made = {"embed": body}
    tokenizer = transformers.AutoTokenizer.from_pretrained(body)
    for name, (kind, config) in HEADS.items():
        torch.manual_seed(1)
        model = kind.from_pretrained(body, **config)
        with torch.no_grad():  # so that answers to other texts are others
            getattr(model, "qa_outputs" if name == "qa" else "classifier").weight.mul_(20)
        made[name] = body.with_name(name)
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


class Asked(NamedTuple):
    """A request, and its answer as JSON; numbers of the answer may be arrays."""

    path: str
    body: dict[str, Any]
    answer: Any


class MixedRequests:
    """Requests by their number: the same number is the same request.

    Args:
        places: what ``with_heads`` made.
        texts: that differ; at least 12.
        precision: of the engine.
        most: texts of a request.
    """

    def __init__(
        self, places: Mapping[str, Path], texts: Sequence[str], precision: str | None = None, most: int = 8
    ) -> None:
        self.texts, self.most = list(texts), most

        def predictor(name: str, task: str | None = None, **options: Any) -> Predictor:
            return Predictor.load(places[name], task, precision, **options)

        embedding, raw = predictor("embed", normalize=True), predictor("embed")
        self.unit = np.stack(embedding(self.texts))  # [N, C]
        self.raw = np.stack(raw(self.texts))
        self.counts = [row.tokens for row in raw.encode(self.texts)]
        self.whole = [raw.whole(text) for text in self.texts]
        self.labels = predictor("labels", top_k=None)(self.texts)
        self.logits = predictor("labels", top_k=None, function_to_apply="none")(self.texts)
        self.queries = self.texts[:4]
        ranked = predictor("cross", "reranking")([*itertools.product(self.queries, self.texts)])
        self.ranked = np.array(ranked).reshape(len(self.queries), -1)
        self.tags = {one: predictor("ner", aggregation_strategy=one)(self.texts) for one in ("simple", "none")}
        pairs = zip(self.texts, self.texts[1:] + self.texts[:1], self.texts[2:] + self.texts[:2], strict=True)
        self.pairs = [(one, f"{two} {three}") for one, two, three in pairs]
        self.answers = predictor("qa", top_k=2)(self.pairs)
        with torch.inference_mode():
            self.states = [raw.model(**raw.tokenizer(text, return_tensors="pt"))[0][0].numpy() for text in self.texts]

    def __call__(self, number: int) -> Asked:
        draw = random.Random(number)
        path = ROUTES[number % len(ROUTES)]
        at = draw.sample(range(len(self.texts)), draw.randint(1, self.most))
        return Asked(path, *getattr(self, "_" + path.rpartition("/")[2])(draw, at))

    def _named(self, at: Sequence[int]) -> list[str]:
        return [self.texts[one] for one in at]

    def _embeddings(self, draw: random.Random, at: list[int]) -> tuple[dict[str, Any], Any]:
        form = draw.choice(("float", "base64"))
        data = [{"object": "embedding", "index": place, "embedding": self.unit[one]} for place, one in enumerate(at)]
        tokens = sum(self.counts[one] for one in at)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        body = {"model": "embed", "input": self._named(at), "encoding_format": form}
        return body, {"object": "list", "data": data, "model": "embed", "usage": usage}

    def _embed(self, draw: random.Random, at: list[int]) -> tuple[dict[str, Any], Any]:
        unit = draw.random() < 0.5
        return {"inputs": self._named(at), "normalize": unit}, (self.unit if unit else self.raw)[at]

    def _embed_all(self, draw: random.Random, at: list[int]) -> tuple[dict[str, Any], Any]:
        return {"inputs": self._named(at[:2])}, [self.states[one] for one in at[:2]]

    def _similarity(self, draw: random.Random, at: list[int]) -> tuple[dict[str, Any], Any]:
        source = draw.choice([one for one in range(len(self.texts)) if one not in at])
        inputs = {"source_sentence": self.texts[source], "sentences": self._named(at)}
        return {"inputs": inputs}, self.unit[at] @ self.unit[source]

    def _predict(self, draw: random.Random, at: list[int]) -> tuple[dict[str, Any], Any]:
        raw = draw.random() < 0.5
        found = self.logits if raw else self.labels
        body = {"inputs": [[text] for text in self._named(at)], "model": "labels", "raw_scores": raw}
        return body, [found[one] for one in at]

    def _rerank(self, draw: random.Random, at: list[int]) -> tuple[dict[str, Any], Any]:
        query = draw.randrange(len(self.queries))
        scores = self.ranked[query, at]
        order = np.argsort(-scores, kind="stable").tolist()
        body = {"query": self.queries[query], "texts": self._named(at), "return_text": True}
        return body, [{"index": one, "text": self.texts[at[one]], "score": float(scores[one])} for one in order]

    def _tag(self, draw: random.Random, at: list[int]) -> tuple[dict[str, Any], Any]:
        how = draw.choice(("simple", "none"))
        body = {"inputs": self._named(at), "parameters": {"aggregation_strategy": how}}
        return body, [self.tags[how][one] for one in at]

    def _qa(self, draw: random.Random, at: list[int]) -> tuple[dict[str, Any], Any]:
        asked = [{"question": self.pairs[one][0], "context": self.pairs[one][1]} for one in at]
        return {"inputs": asked, "parameters": {"top_k": 2}}, [self.answers[one] for one in at]

    def _tokenize(self, draw: random.Random, at: list[int]) -> tuple[dict[str, Any], Any]:
        whole = [self.whole[one] for one in at]
        body = {"inputs": self._named(at), "model": draw.choice(("labels", "qa"))}
        return body, [[{"id": number} for number in one.ids] for one in whole]


def differs(found: Any, wanted: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether an answer is another than is wanted, beyond rounding.

    A dict may have more than is wanted of it, an array may come as base64 of float32.
    """
    if isinstance(wanted, np.ndarray):
        try:
            given = np.frombuffer(base64.b64decode(found), "<f4") if isinstance(found, str) else np.array(found, float)
        except ValueError:
            return True
        # Raw scores and states are larger than 1, and so are the errors of their sums.
        return given.shape != wanted.shape or not np.allclose(given, wanted, rtol=tolerance, atol=tolerance)
    if isinstance(wanted, dict):
        return not isinstance(found, dict) or any(
            differs(found.get(name), one, tolerance) for name, one in wanted.items()
        )
    if isinstance(wanted, list):
        both = isinstance(found, list) and len(found) == len(wanted)
        return not both or any(differs(*both_of, tolerance) for both_of in zip(found, wanted, strict=True))
    if isinstance(wanted, float | np.floating):
        return not isinstance(found, float | int) or abs(found - float(wanted)) > tolerance * max(1.0, abs(wanted))
    return bool(found != wanted)


def count_told_apart(mixed: MixedRequests, numbers: Sequence[int]) -> tuple[int, int]:
    """Of pairs of requests of a route that want other answers or texts, how many answers differ, and how many pairs."""
    last: dict[str, Asked] = {}
    apart = pairs = 0
    for asked in map(mixed, numbers):
        before = last.get(asked.path)
        last[asked.path] = asked
        if before is not None and before.body != asked.body:
            pairs += 1
            apart += differs(plain(before.answer), asked.answer)
    return apart, pairs


def plain(answer: Any) -> Any:
    """An answer without arrays."""
    if isinstance(answer, dict):
        return {name: plain(one) for name, one in answer.items()}
    if isinstance(answer, list):
        return [plain(one) for one in answer]
    return answer.tolist() if isinstance(answer, np.ndarray | np.generic) else answer

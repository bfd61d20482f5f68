"""What may be asked of a model about texts: how its outputs become answers. The answers are those of transformers'
pipelines, and of sentence-transformers for embeddings.

A task is a dataclass whose fields are its options. `attach` gives it the model and the tokenizer, `outputs` runs the
model on a batch of windows, `answer` makes of the outputs of a row's windows what a caller gets, and `columns` and
`fields` say how a table holds that.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow
import torch
from torch import Tensor
from transformers import TokenClassificationPipeline
from transformers.pipelines.text_classification import sigmoid, softmax

from distilbert_fast.modeling.architectures import head_of
from distilbert_fast.ops import _check
from distilbert_fast.serving import pooling
from distilbert_fast.serving.answers import best_answers
from distilbert_fast.serving.encoding import EncodedRow

OP = "Predictor"
FUNCTIONS = ("sigmoid", "softmax", "none")
STRATEGIES = ("none", "simple", "first", "average", "max")
ModelOutputs = Sequence[Any] | np.ndarray  # of a model, for each window of a batch
_SCORES = pyarrow.list_(pyarrow.float32())


@dataclass(kw_only=True)
class ServedTask(ABC):
    """A task, see above.

    Attributes:
        head: what the model must have, as ``load_with_head`` calls it; "" for none.
        pair: what the two texts of a row are called, where each is a pair.
        single: rows are single texts.
        longest: tokens of a window unless the caller says otherwise; None: as many as the model reads.
        offsets: the places of tokens in the text are needed.
    """

    head: ClassVar[str]
    pair: ClassVar[tuple[str, str] | None] = None
    single: ClassVar[bool] = False
    longest: ClassVar[int | None] = None
    offsets: ClassVar[bool] = False

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError or TypeError for an option out of range."""

    def attach(self, model: Any, tokenizer: Any) -> None:
        """Take what answers need of the model and its own copy of the tokenizer.

        Raises:
            TypeError: a model without the head.
        """
        found = head_of(type(model))
        if self.head and (found is None or found[1] != f"For{self.head}"):
            _check.refuse(OP, "model", f"a …For{self.head} for {name_of(self)}", type(model).__name__, TypeError)

    def windows(self, max_length: int) -> int | None:
        """Tokens that two windows of a row share; None: a row is one window."""
        return None

    @abstractmethod
    def outputs(self, model: Any, batch: Mapping[str, Tensor], lengths: Sequence[int]) -> ModelOutputs:
        """What the model puts out for each window of a batch [B, T], of so many tokens each."""

    @abstractmethod
    def answer(self, row: EncodedRow, outputs: Sequence[Any]) -> Any:
        """The answer to a row, from the outputs of its windows."""

    @abstractmethod
    def columns(self) -> dict[str, pyarrow.DataType]:
        """The columns in which a table holds answers."""

    @abstractmethod
    def fields(self, answer: Any) -> dict[str, Any]:
        """An answer by the names of ``columns``."""


@dataclass(kw_only=True)
class TextClassification(ServedTask):
    """Labels of texts, or of pairs of texts.

    Answer: [{"label", "score"}, …], the best first.

    Attributes:
        top_k: how many labels; None: all.
        function_to_apply: what makes scores of logits: "softmax", "sigmoid" or "none"; None: softmax, but sigmoid where
            labels do not exclude each other or there is one only, and none for a regression.
    """

    head = "SequenceClassification"
    top_k: int | None = 1
    function_to_apply: str | None = None

    def check(self) -> None:
        if self.top_k is not None:
            _count("top_k", self.top_k)
        if self.function_to_apply is not None:
            _check.choice(OP, "function_to_apply", self.function_to_apply, FUNCTIONS)

    def attach(self, model: Any, tokenizer: Any) -> None:
        super().attach(model, tokenizer)
        self._labels: dict[int, str] = model.config.id2label
        self._function = self.function_to_apply or function_of(model.config)

    def outputs(self, model: Any, batch: Mapping[str, Tensor], lengths: Sequence[int]) -> ModelOutputs:
        return scores_of(_logits(model, batch), self._function)

    def answer(self, row: EncodedRow, outputs: Sequence[Any]) -> list[dict[str, Any]]:
        scores = outputs[0]  # [K]
        order = np.argsort(-scores, kind="stable")[: self.top_k]
        return [{"label": self._labels[at], "score": float(scores[at])} for at in order.tolist()]

    def columns(self) -> dict[str, pyarrow.DataType]:
        if self.top_k == 1:
            return {"label": pyarrow.string(), "score": pyarrow.float32()}
        return {"labels": pyarrow.list_(pyarrow.string()), "scores": _SCORES}

    def fields(self, answer: Any) -> dict[str, Any]:
        if self.top_k == 1:
            return answer[0]
        return {f"{name}s": [one[name] for one in answer] for name in ("label", "score")}


@dataclass(kw_only=True)
class Regression(ServedTask):
    """Numbers of texts, or of pairs of texts: the logits. Answer: a float, or a list where the head has several."""

    head = "SequenceClassification"

    def check(self) -> None:
        pass

    def attach(self, model: Any, tokenizer: Any) -> None:
        super().attach(model, tokenizer)
        self._one = model.config.num_labels == 1

    def outputs(self, model: Any, batch: Mapping[str, Tensor], lengths: Sequence[int]) -> ModelOutputs:
        return _logits(model, batch)

    def answer(self, row: EncodedRow, outputs: Sequence[Any]) -> float | list[float]:
        return float(outputs[0][0]) if self._one else outputs[0].tolist()

    def columns(self) -> dict[str, pyarrow.DataType]:
        return {"score": pyarrow.float32()} if self._one else {"scores": _SCORES}

    def fields(self, answer: Any) -> dict[str, Any]:
        return {"score" if self._one else "scores": answer}


@dataclass(kw_only=True)
class Reranking(ServedTask):
    """How well texts answer queries, by a cross-encoder with one label. Answer: a float, the higher the better.

    Attributes:
        function_to_apply: "sigmoid", or "none" for the logit.
    """

    head = "SequenceClassification"
    pair = ("query", "text")
    function_to_apply: str = "sigmoid"

    def check(self) -> None:
        _check.choice(OP, "function_to_apply", self.function_to_apply, ("sigmoid", "none"))

    def attach(self, model: Any, tokenizer: Any) -> None:
        super().attach(model, tokenizer)
        if model.config.num_labels != 1:
            _check.refuse(OP, "model", "one with 1 label for reranking", f"one with {model.config.num_labels}")

    def outputs(self, model: Any, batch: Mapping[str, Tensor], lengths: Sequence[int]) -> ModelOutputs:
        return scores_of(_logits(model, batch), self.function_to_apply)

    def answer(self, row: EncodedRow, outputs: Sequence[Any]) -> float:
        return float(outputs[0][0])

    def columns(self) -> dict[str, pyarrow.DataType]:
        return {"score": pyarrow.float32()}

    def fields(self, answer: Any) -> dict[str, Any]:
        return {"score": answer}


@dataclass(kw_only=True)
class Embedding(ServedTask):
    """Embeddings of texts. Answer: an array [D], or a ``CodedEmbedding`` for int8.

    Attributes:
        pooling: "mean", "cls" or "max", see pooling.py.
        normalize: divide by the length, after dimensions were cut off.
        dimensions: keep the first; None: all.
        dtype: "float32", "float16", "int8", "binary" or "ubinary", see ``as_dtype``.
    """

    head = ""
    single = True
    pooling: str = "mean"
    normalize: bool = False
    dimensions: int | None = None
    dtype: str = "float32"

    def check(self) -> None:
        _check.choice(OP, "pooling", self.pooling, pooling.POOLINGS)
        _check.choice(OP, "dtype", self.dtype, pooling.EMBEDDING_DTYPES)
        if self.dimensions is not None:
            _count("dimensions", self.dimensions)

    def attach(self, model: Any, tokenizer: Any) -> None:
        hidden = int(model.config.hidden_size)
        if self.dimensions is not None and self.dimensions > hidden:
            _check.refuse(OP, "dimensions", f"1 to {hidden}, what the model has", self.dimensions)
        self._width = pooling.width(hidden, self.dimensions, self.dtype)

    def outputs(self, model: Any, batch: Mapping[str, Tensor], lengths: Sequence[int]) -> ModelOutputs:
        first = {"first_rows": True} if self.pooling == "cls" else {}
        hidden = model(**batch, **first)[0]  # [B, T, C]
        pooled = pooling.pool(hidden, batch["attention_mask"].bool(), self.pooling)
        return pooling.as_dtype(pooling.cut_dimensions(pooled, self.dimensions, self.normalize), self.dtype)

    def answer(self, row: EncodedRow, outputs: Sequence[Any]) -> Any:
        return outputs[0]

    def columns(self) -> dict[str, pyarrow.DataType]:
        kinds = {"float32": pyarrow.float32(), "float16": pyarrow.float16(), "ubinary": pyarrow.uint8()}
        columns = {"embedding": pyarrow.list_(kinds.get(self.dtype, pyarrow.int8()), self._width)}
        return columns | ({"scale": pyarrow.float32()} if self.dtype == "int8" else {})

    def fields(self, answer: Any) -> dict[str, Any]:
        if isinstance(answer, pooling.CodedEmbedding):
            return {"embedding": answer.values, "scale": answer.scale}
        return {"embedding": answer}


@dataclass(kw_only=True)
class TokenClassification(ServedTask):
    """Entities of texts. Answer: [{"entity_group", "score", "word", "start", "end"}, …], as the pipeline has them;
    start and end count characters. With aggregation_strategy "none" a token each, with "entity" and "index".

    Attributes:
        aggregation_strategy: "none", "simple", "first", "average" or "max": how tokens become entities.
        ignore_labels: entities with these labels are left out.
        stride: tokens that the windows of a long text share; None: what is longer than a window is cut off.
    """

    head = "TokenClassification"
    single = True
    offsets = True
    aggregation_strategy: str = "simple"
    ignore_labels: Sequence[str] = ("O",)
    stride: int | None = None

    def check(self) -> None:
        _check.choice(OP, "aggregation_strategy", self.aggregation_strategy, STRATEGIES)
        if self.stride is not None:
            _count("stride", self.stride, 0)
            if self.aggregation_strategy == "none":
                _check.refuse(OP, "stride", "None where aggregation_strategy is 'none'", self.stride)

    def attach(self, model: Any, tokenizer: Any) -> None:
        super().attach(model, tokenizer)
        self._pipeline = TokenClassificationPipeline(
            model=model, tokenizer=tokenizer, device=model.device, aggregation_strategy=self.aggregation_strategy
        )

    def windows(self, max_length: int) -> int | None:
        return self.stride

    def outputs(self, model: Any, batch: Mapping[str, Tensor], lengths: Sequence[int]) -> ModelOutputs:
        logits = model(**batch).logits.float().cpu()  # [B, T, K]
        return [own[:length].clone() for own, length in zip(logits, lengths, strict=True)]

    def answer(self, row: EncodedRow, outputs: Sequence[Any]) -> list[dict[str, Any]]:
        given = [
            {
                "sentence": row.row,
                "logits": logits[None],
                "input_ids": [window.ids],
                "offset_mapping": [window.offsets],
                "special_tokens_mask": torch.tensor([window.special_tokens_mask]),
            }
            for window, logits in zip(row.windows, outputs, strict=True)
        ]
        parameters = self._pipeline._postprocess_params | {"ignore_labels": list(self.ignore_labels)}
        found = self._pipeline.postprocess(given, **parameters)
        return [entity | {"score": float(entity["score"])} for entity in found]

    def columns(self) -> dict[str, pyarrow.DataType]:
        number, text = pyarrow.int64(), pyarrow.string()
        names = {"entity": text, "index": number} if self.aggregation_strategy == "none" else {"entity_group": text}
        entity = names | {"score": pyarrow.float32(), "word": text, "start": number, "end": number}
        return {"entities": pyarrow.list_(pyarrow.struct([*entity.items()]))}

    def fields(self, answer: Any) -> dict[str, Any]:
        return {"entities": answer}


@dataclass(kw_only=True)
class QuestionAnswering(ServedTask):
    """Answers to questions from contexts. Answer: {"score", "start", "end", "answer"}, start and end count characters
    of the context; a list of them where top_k is above 1. A context longer than a window is cut into several.

    Attributes:
        top_k: how many answers at most.
        max_answer_len: tokens of an answer at most.
        handle_impossible_answer: "" may be the answer.
        align_to_words: answers are whole words.
        stride: tokens that the windows of a context share; None: half of a window, 128 at most.
    """

    head = "QuestionAnswering"
    pair = ("question", "context")
    longest = 384
    offsets = True
    top_k: int = 1
    max_answer_len: int = 15
    handle_impossible_answer: bool = False
    align_to_words: bool = True
    stride: int | None = None

    def check(self) -> None:
        _count("top_k", self.top_k)
        _count("max_answer_len", self.max_answer_len)
        if self.stride is not None:
            _count("stride", self.stride, 0)

    def attach(self, model: Any, tokenizer: Any) -> None:
        super().attach(model, tokenizer)
        self._cls_id = tokenizer.cls_token_id

    def windows(self, max_length: int) -> int | None:
        return min(max_length // 2, 128) if self.stride is None else self.stride

    def outputs(self, model: Any, batch: Mapping[str, Tensor], lengths: Sequence[int]) -> ModelOutputs:
        found = model(**batch, keep_padding=False)  # nobody reads it: a third of the time of ragged batches
        start, end = (x.float().cpu().numpy() for x in (found.start_logits, found.end_logits))  # [B, T]
        return [(start[at, :length], end[at, :length]) for at, length in enumerate(lengths)]

    def answer(self, row: EncodedRow, outputs: Sequence[Any]) -> Any:
        options = (self.top_k, self.max_answer_len, self.handle_impossible_answer, self.align_to_words)
        found = best_answers(row.row[1], row.windows, outputs, self._cls_id, *options)
        return found[0] if self.top_k == 1 and found else found

    def columns(self) -> dict[str, pyarrow.DataType]:
        place = {"start": pyarrow.int64(), "end": pyarrow.int64()}
        answer = {"score": pyarrow.float32(), **place, "answer": pyarrow.string()}
        return answer if self.top_k == 1 else {"answers": pyarrow.list_(pyarrow.struct([*answer.items()]))}

    def fields(self, answer: Any) -> dict[str, Any]:
        if self.top_k > 1:
            return {"answers": answer}
        return answer or {"score": 0.0, "start": 0, "end": 0, "answer": ""}


SERVED_TASKS: dict[str, type[ServedTask]] = {
    "text-classification": TextClassification,
    "regression": Regression,
    "embedding": Embedding,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
    "reranking": Reranking,
}


def name_of(task: ServedTask) -> str:
    return next(name for name, kind in SERVED_TASKS.items() if kind is type(task))


def make_task(name: str, options: Mapping[str, Any]) -> ServedTask:
    """A task by its name. Raises ValueError or TypeError for an unknown one, and for options that it has not."""
    _check.choice(OP, "task", name, tuple(SERVED_TASKS))
    kind = SERVED_TASKS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := [option for option in options if option not in known]:
        has = f"one of {', '.join(known)}" if known else "none"
        _check.refuse(OP, f"option of {name}", has, unknown[0], TypeError)
    task = kind(**options)
    task.check()
    return task


def task_of(kind: type, config: Any) -> str:
    """The task that a class of models has the head for. Raises TypeError for one without such a task."""
    head = (head_of(kind) or (None, ""))[1].removeprefix("For")
    if head == "SequenceClassification" and config.problem_type == "regression":
        return "regression"
    name = next((name for name, task in SERVED_TASKS.items() if (task.head or "Model") == head), None)
    if name is None:
        expected = "given for a model whose head tells none"
        _check.refuse(OP, "task", expected, f"None for {kind.__name__}", TypeError)
    return name


def _count(name: str, given: Any, least: int = 1) -> None:
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        _check.refuse(OP, name, f"an integer from {least} on", repr(given))


def _logits(model: Any, batch: Mapping[str, Tensor]) -> np.ndarray:
    """float32 [B, K]"""
    return model(**batch).logits.float().cpu().numpy()


def function_of(config: Any) -> str:
    """What the pipeline makes scores of logits by."""
    if config.problem_type == "regression":
        return "none"
    return "sigmoid" if config.problem_type == "multi_label_classification" or config.num_labels == 1 else "softmax"


def scores_of(logits: np.ndarray, function: str) -> np.ndarray:
    return {"sigmoid": sigmoid, "softmax": softmax}.get(function, lambda x: x)(logits)

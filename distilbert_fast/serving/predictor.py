"""Predictor: texts in, the answers of a model out, computed by the engine."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Encoding
from transformers import PreTrainedModel

from distilbert_fast.data.sentences import Text, by_tokens
from distilbert_fast.modeling.accelerator import explain
from distilbert_fast.modeling.architectures import longest_sequence
from distilbert_fast.modeling.loading import load_tokenizer, load_with_head, locate
from distilbert_fast.modeling.mapped import map_engine, map_parameters, own_parameters
from distilbert_fast.modeling.optimize import optimize
from distilbert_fast.ops import _check
from distilbert_fast.serving.answers import NOT_FINITE, is_finite
from distilbert_fast.serving.encoding import EncodedRow, Encoder
from distilbert_fast.serving.sentence_transformers import embedding_options
from distilbert_fast.serving.tasks import OP, SERVED_TASKS, ServedTask, make_task, task_of

logger = logging.getLogger(__name__)

BATCH_TOKENS = 4096


class Predictor:
    """Answers of a model to texts: labels, numbers, embeddings, entities, answers to questions, scores of pairs.

        predictor = Predictor.load("./my-bert", precision="int8")
        predictor(["a charming journey", "bleak and desperate"])  # [[{"label": …, "score": …}], …]

    The answers are those of transformers' pipelines (of sentence-transformers for embeddings), within rounding. Texts
    are sorted by length and computed in batches of so many real tokens; the order of the answers is that of the texts.

    Args:
        model: of transformers, of a kind that ``optimize`` takes; it is optimized in place, unless it is already and
            ``precision`` is None.
        task: "text-classification", "regression", "embedding", "token-classification", "question-answering" or
            "reranking"; None: what the model has the head for.
        tokenizer: a fast one; it is copied.
        precision: of the engine, see ``optimize``.
        max_length: tokens of a text, or of a window of one; None: as many as model and tokenizer take, for
            question answering 384 at most.
        batch_tokens: real tokens computed at once, padding not counted.
        **options: those of the task; see the classes of serving/tasks.py: TextClassification, …

    Thread-safe. A caller with threads of its own can split a call in two, ``compute(encode(rows))``, or in three, with
    ``start``.

    Raises:
        TypeError, ValueError: a model without the head, a slow tokenizer, an unknown task or option, by name.
    """

    def __init__(
        self,
        model: Any,
        task: str | None = None,
        tokenizer: Any = None,
        precision: str | None = None,
        *,
        max_length: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        **options: Any,
    ) -> None:
        if not issubclass(type(model), PreTrainedModel):
            _check.refuse(OP, "model", "a model of transformers (Predictor.load reads one)", _kind(model), TypeError)
        name = task_of(type(model), model.config) if task is None else task
        self.task = make_task(name, options)
        if tokenizer is None:
            _check.refuse(OP, "tokenizer", "given (Predictor.load reads it with the model)", None, TypeError)
        if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1:
            _check.refuse(OP, "batch_tokens", "an integer from 1 on", repr(batch_tokens))
        self.batch_tokens = batch_tokens
        self.tokenizer = copy.deepcopy(tokenizer)
        self.model: Any = model if self.task.head else model.base_model
        self.task.attach(self.model, self.tokenizer)
        longest = _longest(model, tokenizer)
        if max_length is not None and not 1 <= max_length <= longest:
            _check.refuse(OP, "max_length", f"1 to {longest}, what model and tokenizer take", max_length)
        self.max_length = max_length or min(longest, self.task.longest or longest)
        self._encoder = Encoder(
            self.tokenizer,
            self.max_length,
            self.task.pair,
            self.task.single,
            self.task.windows(self.max_length),
            second_only=self.task.head == "QuestionAnswering",
            offsets=self.task.offsets,
        )
        self._types = "token_type_ids" in self.tokenizer.model_input_names
        self._padding = self.tokenizer.pad_token_id or 0
        self.model.eval()
        if precision is not None or not explain(self.model).optimized:
            optimize(self.model, precision)

    @classmethod
    def load(
        cls,
        source: str | Path,
        task: str | None = None,
        precision: str | None = None,
        *,
        packed: str | Path | None = None,
        **options: Any,
    ) -> Predictor:
        """A predictor of a checkpoint with its tokenizer, on the GPU where there is one.

        Args:
            source: directory or hub id. For embeddings, what a directory of sentence-transformers says of pooling,
                normalization and length is taken, unless ``options`` say otherwise.
            task, precision, **options: as for the class.
            packed: a file for the packed weights, made if it is not there or holds others. It and the checkpoint are
                then mapped, so that processes of one machine share the memory of the weights. None: each has its own.

        Raises:
            CheckpointError: a checkpoint that cannot be used, or that lacks the head.
            OSError: the file of packed weights cannot be written.
            TypeError, ValueError: as the class does.
        """
        directory = locate(source)
        if task is None:
            task = task_of_checkpoint(directory)
        _check.choice(OP, "task", task, tuple(SERVED_TASKS))
        known = embedding_options(directory) if task == "embedding" else {}
        most = known.pop("max_length", None)
        options = known | options
        make_task(task, {name: value for name, value in options.items() if name not in ("max_length", "batch_tokens")})
        head = SERVED_TASKS[task].head
        model, _, _ = load_with_head(directory, head, new_head=not head)  # a pooler that is missing is not used
        tokenizer = load_tokenizer(directory, "")
        if most is not None and options.get("max_length") is None:
            options["max_length"] = min(most, _longest(model, tokenizer))
        if packed is None:
            own_parameters(model)
        else:
            map_parameters(model, directory)
        made = cls(model, task, tokenizer, precision, **options)
        if packed is not None:
            map_engine(made.model, packed)
        return made

    def sharing(self, task: ServedTask) -> Predictor:
        """A predictor for another task, of the same model and the same windows of rows."""
        other = copy.copy(self)
        other.task = task
        task.attach(self.model, self.tokenizer)
        return other

    def __call__(self, rows: Text | Sequence[Text]) -> Any:
        """The answer to a row, or a list with those to several.

        Args:
            rows: a text or a pair of texts (a tuple), or a list of them, or what can be made one, such as a generator
                or a pandas Series.

        Raises:
            TypeError: rows that are None, a dict, a set or bytes.
            ValueError: a row that is no such text, is empty, or has an answer with NaN or infinity, by its number.
        """
        if isinstance(rows, (str, tuple)):
            return self([rows])[0]
        encoded = self.encode(rows)
        for number, row in enumerate(encoded):
            if row.refused is not None:
                raise ValueError(f"{OP}: row {number}: {row.refused}")
        if cut := sum(row.truncated for row in encoded):
            logger.warning("%s: %d of %d texts are longer than max_length %d", OP, cut, len(encoded), self.max_length)
        answers = self.compute(encoded)
        if (wrong := next((number for number, one in enumerate(answers) if not is_finite(one)), None)) is not None:
            raise ValueError(f"{OP}: row {wrong}: {NOT_FINITE}")
        return answers

    def encode(self, rows: Sequence[Text]) -> list[EncodedRow]:
        """Tokenize rows, as a call takes them in a list. One that cannot be read says why in ``refused``.

        Raises TypeError for what is no list of rows.
        """
        if not isinstance(rows, Iterable) or isinstance(rows, (str, bytes, Mapping, Set)):
            _check.refuse(OP, "rows", "a text, a pair of texts or a list of them", _kind(rows), TypeError)
        return self._encoder(list(rows))

    def whole(self, text: str, special: bool = True) -> Encoding:
        """All tokens of a text, however long it is; ``special``: with those that begin and end it."""
        return self._encoder.whole.encode(text, add_special_tokens=special)

    def compute(self, encoded: Sequence[EncodedRow]) -> list[Any]:
        """The answers to rows that were encoded, in their order; None to refused ones."""
        return self.start(encoded)()

    def start(self, encoded: Sequence[EncodedRow], pool: Executor | None = None) -> Callable[[], list[Any]]:
        """Begin to compute; what is returned waits for that and returns the answers, as ``compute`` does.

        Args:
            pool: threads that compute batches, see pool.py; None: the batches are computed when the answers are wanted.
        """
        windows = [window for row in encoded for window in row.windows]
        batches = by_tokens([len(window) for window in windows], self.batch_tokens)
        given = ([windows[number] for number in numbers] for numbers in batches)
        made = (map if pool is None else pool.map)(self.outputs, given)  # a pool begins at once

        def finish() -> list[Any]:
            outputs: list[Any] = [None] * len(windows)
            for numbers, found in zip(batches, made, strict=True):
                for number, output in zip(numbers, found, strict=True):
                    outputs[number] = output
            answers: list[Any] = []
            at = 0
            for row in encoded:
                end = at + len(row.windows)
                answers.append(None if row.refused is not None else self.task.answer(row, outputs[at:end]))
                at = end
            return answers

        return finish

    @torch.inference_mode()
    def outputs(self, windows: Sequence[Any]) -> Sequence[Any]:
        """What the model puts out for each window of a batch, of which ``task.answer`` makes answers."""
        lengths = [len(window) for window in windows]
        return list(self.task.outputs(self.model, self._batch(windows, lengths), lengths))

    def _batch(self, windows: Sequence[Any], lengths: Sequence[int]) -> dict[str, torch.Tensor]:
        """Windows padded to the longest, [B, T]."""
        shape = len(windows), max(1, *lengths)
        ids = np.full(shape, self._padding, dtype=np.int64)
        for row, window, length in zip(ids, windows, lengths, strict=True):
            row[:length] = window.ids
        mask = np.arange(shape[1]) < np.array(lengths)[:, None]
        arrays = {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
        if self._types:
            arrays["token_type_ids"] = types = np.zeros(shape, dtype=np.int64)
            for row, window, length in zip(types, windows, lengths, strict=True):
                row[:length] = window.type_ids
        return {name: torch.from_numpy(array).to(self.model.device) for name, array in arrays.items()}


def _kind(given: object) -> str:
    return "None" if given is None else type(given).__name__


def _longest(model: Any, tokenizer: Any) -> int:
    """Tokens of a text that a model and its tokenizer take."""
    return min(tokenizer.model_max_length, longest_sequence(model.config))


def task_of_checkpoint(directory: Path) -> str:
    """The task that a checkpoint was saved with the head for. Raises TypeError for one without such a task."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    kind = getattr(transformers, str((config.architectures or ["?"])[0]), None)
    if not isinstance(kind, type):
        _check.refuse(OP, "task", "given for a checkpoint whose config names no class", "None", TypeError)
    return task_of(kind, config)

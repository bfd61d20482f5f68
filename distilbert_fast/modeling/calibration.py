"""Calibration data for ``optimize``: batches of token ids, or texts, which are made into batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from distilbert_fast.modeling.architectures import longest_sequence
from distilbert_fast.ops import _check

TEXTS_A_BATCH = 32


def batches(
    calibration: Iterable[Any], model: Any, tokenizer: Any, caller: str, labels: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """input_ids, attention_mask and token_type_ids of each batch.

    Args:
        calibration: texts; or batches, which are mappings with input_ids (and whatever else, as a DataLoader gives
            them) or input_ids themselves.
        tokenizer: for texts; None: the one beside the checkpoint that the model came from.
        labels: whether batches must have ``labels``, which come with them then.

    Raises:
        TypeError, ValueError: something else, by name; texts, and no tokenizer to be found.
    """
    if isinstance(calibration, (str, bytes, Mapping, torch.Tensor)) or not isinstance(calibration, Iterable):
        given = type(calibration).__name__
        _check.refuse(caller, "calibration", "an iterable of texts or batches", given, TypeError)
    items = iter(calibration)
    first = next(items, None)
    if first is None:
        _check.refuse(caller, "calibration", "at least one text or batch", "none")
    items = itertools.chain([first], items)
    if not isinstance(first, str):
        yield from (_batch(item, caller, labels) for item in items)
        return
    if labels:
        _check.refuse(caller, "calibration", "batches with labels", "texts")
    tokenizer = tokenizer or _tokenizer(model, caller)
    longest = min(tokenizer.model_max_length, longest_sequence(model.config))
    while texts := list(itertools.islice(items, TEXTS_A_BATCH)):
        for text in texts:
            if not isinstance(text, str):
                _check.refuse(caller, "calibration", "texts or batches, not both", type(text).__name__, TypeError)
        yield _batch(tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt"), caller)


def _batch(item: Any, caller: str, labels: bool = False) -> dict[str, torch.Tensor]:
    given = {"input_ids": item} if isinstance(item, torch.Tensor) else item
    if not isinstance(given, Mapping) or "input_ids" not in given:
        expected = "of texts, of tensors of ids or of mappings with input_ids"
        _check.refuse(caller, "calibration", expected, type(item).__name__, TypeError)
    if labels and not isinstance(given.get("labels"), torch.Tensor):
        _check.refuse(caller, "calibration", "batches with labels, tensors", f"one with {', '.join(given)}")
    names = ("input_ids", "attention_mask", "token_type_ids", *(["labels"] if labels else []))
    batch = {name: given[name] for name in names if given.get(name) is not None}
    if getattr(batch["input_ids"], "dim", lambda: 0)() != 2:
        _check.refuse(caller, "calibration input_ids", "a tensor [B, T]", type(batch["input_ids"]).__name__, TypeError)
    return batch


def _tokenizer(model: Any, caller: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError) as error:
        expected = f"given to calibrate on texts (there is none beside {model.name_or_path!r}: {error})"
        _check.refuse(caller, "tokenizer", expected, None)

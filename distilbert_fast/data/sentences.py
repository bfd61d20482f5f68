"""What a sequence classifier reads: a sentence, or a pair of sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Text = str | tuple[str, str]


def by_length(lengths: Sequence[int], size: int, in_order: bool = False) -> list[list[int]]:
    """The numbers of rows in batches of so many of similar length, so that little padding is computed.

    ``in_order``: of neighbours instead.
    """
    order = list(range(len(lengths))) if in_order else sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


def by_tokens(lengths: Sequence[int], most: int) -> list[list[int]]:
    """The numbers of rows in batches of similar length with so many tokens at most, or of one longer row."""
    found: list[list[int]] = []
    room = 0
    for at in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not found or lengths[at] > room:
            found.append([])
            room = most
        found[-1].append(at)
        room -= lengths[at]
    return found


def tokenized(tokenizer: Any, texts: Sequence[Text], max_length: int, **how: Any) -> Any:
    """The tokens of N texts, all sentences or all pairs, as the tokenizer returns them.

    A sentence longer than ``max_length`` tokens is cut; of a pair the longer sentence is, until both fit.
    """
    pairs = len(texts) > 0 and not isinstance(texts[0], str)
    columns = map(list, zip(*texts, strict=True)) if pairs else [list(texts)]
    return tokenizer(*columns, truncation="longest_first", max_length=max_length, **how)

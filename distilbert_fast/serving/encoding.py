"""Rows of text as tokens: what a model reads of each, in windows where one does not fit.

A tokenizer of transformers keeps the truncation of its last call, so that two threads disturb each other. Here a copy
of its backend gets the truncation once and is then only read.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding

from distilbert_fast.data.sentences import Text
from distilbert_fast.files.text import lone_surrogate, shortened
from distilbert_fast.ops._check import refuse


@dataclass(frozen=True, slots=True)
class WindowTokens:
    """The tokens of a window, a fraction of the memory of an ``Encoding``."""

    ids: np.ndarray  # int32 [T]
    type_ids: np.ndarray  # int8 [T]

    def __len__(self) -> int:
        return len(self.ids)


class EncodedRow(NamedTuple):
    """A row, tokenized.

    Attributes:
        row: as it was given.
        windows: what the model reads of it; none if it was refused. With the places of tokens an ``Encoding`` each.
        truncated: some of its tokens are in no window.
        refused: why the row cannot be read; None if it can.
    """

    row: Any
    windows: tuple[Any, ...]
    truncated: bool = False
    refused: str | None = None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.windows))


class Encoder:
    """Tokenizes rows. Thread-safe.

    Args:
        tokenizer: a fast one of transformers; it is copied.
        max_length: tokens of a window, special ones included.
        pair: what the two texts of a row are called if each row must be a pair; None: it may be a text or a pair.
        single: rows must be single texts.
        stride: tokens that two windows of a row have in common; None: a row has one window, and the rest is cut off.
        second_only: of a pair, the second text alone is cut into windows.
        offsets: the windows know where in the text each token stands.

    Raises:
        TypeError, ValueError: a slow tokenizer; lengths that leave no room for text.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        pair: tuple[str, str] | None = None,
        single: bool = False,
        stride: int | None = None,
        second_only: bool = False,
        offsets: bool = False,
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            refuse(
                "Predictor", "tokenizer", "a fast one, of the library tokenizers", type(tokenizer).__name__, TypeError
            )
        self.pair, self.single, self.stride, self.offsets = pair, single, stride, offsets
        self.max_length, self.second_only = max_length, second_only
        self._special = tokenizer.num_special_tokens_to_add(pair=pair is not None)
        if max_length <= self._special + (stride or 0):
            least = self._special + (stride or 0) + 1
            refuse("Predictor", "max_length", f"{least} or more, to leave room for text", max_length)
        self.truncating, self.whole = copy.deepcopy(backend), copy.deepcopy(backend)
        for own in (self.truncating, self.whole):
            own.no_padding()
            own.no_truncation()
        strategy = "only_second" if second_only else "longest_first"
        self.truncating.enable_truncation(
            max_length, stride=stride or 0, strategy=strategy, direction=tokenizer.truncation_side
        )

    def __call__(self, rows: Sequence[Text]) -> list[EncodedRow]:
        """Tokenize rows; those that cannot be read say why."""
        faults = [self._fault(row) for row in rows]
        if self.second_only:
            self._refuse_long_questions(rows, faults)
        fits = [at for at, fault in enumerate(faults) if fault is None]
        encode = self.truncating.encode_batch if self.offsets else self.truncating.encode_batch_fast
        found = [EncodedRow(row, (), False, fault) for row, fault in zip(rows, faults, strict=True)]
        for at, encoding in zip(fits, encode([rows[at] for at in fits]) if fits else (), strict=True):
            further = encoding.overflowing
            windows = (encoding,) if self.stride is None else (encoding, *further)
            kept = windows if self.offsets else tuple(map(_tokens, windows))
            found[at] = EncodedRow(rows[at], kept, self.stride is None and bool(further))
        return found

    def _fault(self, row: Any) -> str | None:
        """Why a row cannot be tokenized; None if it can."""
        if self.pair is None and not isinstance(row, (tuple, list)):
            return unreadable(row)
        is_pair = isinstance(row, tuple) and len(row) == 2
        if self.pair is not None and not is_pair:
            return f"expected a pair of texts, {' and '.join(self.pair)}, got {shortened(row)}"
        if not is_pair or self.single:
            return f"expected a text{'' if self.single else ' or a pair of texts'}, got {shortened(row)}"
        names = self.pair or ("the first text", "the second text")
        faults = ((name, unreadable(text)) for name, text in zip(names, row, strict=True))
        return next((f"{name}: {why}" for name, why in faults if why is not None), None)

    def _refuse_long_questions(self, rows: Sequence[Any], faults: list[str | None]) -> None:
        """Refuse pairs that do not fit where the first text leaves no room for more than ``stride`` tokens of the
        second: there the tokenizer panics."""
        fits = [at for at, why in enumerate(faults) if why is None]
        asked = self.whole.encode_batch_fast([rows[at][0] for at in fits], add_special_tokens=False) if fits else ()
        for at, question in zip(fits, asked, strict=True):
            room = self.max_length - self._special - len(question)
            if room <= (self.stride or 0) and len(self.whole.encode(*rows[at])) > self.max_length:
                faults[at] = (
                    f"{(self.pair or ('the first text',))[0]}: its {len(question)} tokens leave no room for more than "
                    f"{self.stride or 0} tokens beside it in a window of {self.max_length}"
                )


def _tokens(encoding: Encoding) -> WindowTokens:
    return WindowTokens(np.array(encoding.ids, dtype=np.int32), np.array(encoding.type_ids, dtype=np.int8))


def unreadable(text: Any) -> str | None:
    """Why something is no text that a tokenizer reads whole; None if it is."""
    if not isinstance(text, str):
        return f"expected a text, got {shortened(text)}"
    if "\0" in text:
        return "a text holds a NUL byte"
    if not text.isascii() and (half := lone_surrogate(text)) is not None:
        return f"expected a text, got {half}"
    return None if text and not text.isspace() else "an empty text"

"""From text to the rows that a model is trained on: pieces of token ids, joined or one by one, and filtered.

Three steps over Arrow columns and flat numpy arrays, so that once tokenized no id is a Python object again:

1. ``LineTokenizer``: texts → pieces of at most max_length − 2 ids; an empty piece ends a document. It looks at each
   text alone, so any number of processes give the same pieces.
2. ``join``: pieces → rows [CLS] … [SEP], in one pass through the corpus; how it is cut into chunks does not show.
3. ``RowFilter``: drops rows that are short or mostly unknown, and counts what it dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from distilbert_fast.ops._check import refuse


class Flat(NamedTuple):
    """Sequences of ids that lie one after another: ``ids`` [ΣL], ``lengths`` [N]."""

    ids: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Flat:
        """Make them from an Arrow column of lists, without a copy if it is one chunk."""
        array = column.combine_chunks()
        return cls(array.flatten().to_numpy(), np.diff(array.offsets.to_numpy()))

    def to_arrow(self) -> pa.ListArray:
        return pa.ListArray.from_arrays(np.append(0, np.cumsum(self.lengths)).astype(np.int32), self.ids)

    def where(self, keep: np.ndarray) -> Flat:
        """The sequences at which ``keep`` [N] is True."""
        return Flat(self.ids[np.repeat(keep, self.lengths)], self.lengths[keep])

    def split(self) -> list[np.ndarray]:
        return np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


@dataclass(frozen=True)
class RowFormat:
    """How rows are made of pieces.

    Attributes:
        cls, sep: ids that open and close a row; ``sep`` also stands between documents.
        max_length: of a row, with ``cls`` and ``sep``.
        packing: "full_sentences" or "lines".
        dtype: of the stored ids.
    """

    cls: int
    sep: int
    max_length: int
    packing: str
    dtype: str


class LineTokenizer:
    """Tokenizes a table of texts into a table of pieces; a line of a text gives one, or several if it is over-long.

    Args:
        tokenizer: a fast one.
        column: of the texts.
        documents: True: each text is a document. False: each is a line, and one without text ends a document.
        form: of the rows to come.
    """

    def __init__(self, tokenizer: Any, column: str, documents: bool, form: RowFormat) -> None:
        self.tokenizer, self.column, self.documents, self.form = tokenizer, column, documents, form

    def __call__(self, table: pa.Table) -> pa.Table:
        kind = table[self.column].type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            refuse("load_corpus", "text_column", "a column of text", f"{self.column} of {kind}", TypeError)
        lines: list[str] = []
        for text in table[self.column].to_pylist():
            of_text = [line for line in map(str.strip, (text or "").split("\n")) if line]
            lines += of_text
            if self.documents or not of_text:
                lines.append("")  # ends a document; it has no tokens
        ids = self.tokenizer(
            lines, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        room = self.form.max_length - 2
        pieces = [
            of_line[at : at + room]
            for line, of_line in zip(lines, ids, strict=True)
            if of_line or not line  # a line of nothing but control characters has no tokens and ends nothing
            for at in range(0, max(len(of_line), 1), room)
        ]
        return pa.table({"input_ids": pa.array(pieces, pa.list_(pa.from_numpy_dtype(self.form.dtype)))})


def join(pieces: Iterable[Flat], form: RowFormat) -> Iterator[Flat]:
    """Rows of pieces, in order.

    "lines": a piece a row. "full_sentences": as many pieces as fit, across documents, with ``sep`` between two
    documents (RoBERTa's FULL-SENTENCES, Liu et al. 2019, section 4.2); no piece is cut.
    """
    if form.packing == "lines":
        for chunk in pieces:
            chunk = chunk.where(chunk.lengths > 0)
            ends = np.cumsum(chunk.lengths)
            yield _wrap(chunk.ids, ends - chunk.lengths, ends, form)
        return
    room = form.max_length - 2
    row = np.empty(0, form.dtype)  # the row that has begun
    ended = True  # whether the last piece ended a document: another end adds nothing then
    for chunk in pieces:
        ends = chunk.lengths == 0
        again = ends & np.append(ended, ends[:-1])
        lengths, ends = chunk.lengths[~again], ends[~again]
        stream = np.concatenate([row, np.insert(chunk.ids, np.cumsum(lengths)[ends], form.sep)])
        starts, stops = [], []
        first, at = 0, len(row)  # in stream: where the row begins and where its next piece would
        for length, end in zip((lengths + ends).tolist(), ends.tolist(), strict=True):
            if at - first + length > room:
                starts.append(first)
                stops.append(at - ended)  # the row's own sep ends the document
                first = at
            at += length
            if end and at - first == 1:
                first = at  # nor does a row open with a document's end
            ended = end
        yield _wrap(stream, np.array(starts, np.int64), np.array(stops, np.int64), form)
        row = stream[first:]
    if len(row):
        yield _wrap(row, np.array([0]), np.array([len(row) - ended]), form)


def _wrap(stream: np.ndarray, starts: np.ndarray, stops: np.ndarray, form: RowFormat) -> Flat:
    """Make the rows [cls, *stream[start:stop], sep]."""
    lengths = stops - starts + 2
    ends = np.cumsum(lengths)
    begins = ends - lengths
    source = np.arange(lengths.sum()) + np.repeat(starts - begins - 1, lengths)  # one before start to stop
    inside = np.ones(len(source), bool)
    inside[begins] = inside[ends - 1] = False
    ids = np.empty(len(source), form.dtype)
    ids[begins], ids[ends - 1] = form.cls, form.sep
    ids[inside] = stream[source[inside]]
    return Flat(ids, lengths)


@dataclass
class CorpusReport:
    """How many texts and rows of a corpus were read, dropped and kept.

    Attributes:
        texts: rows (of a text file: lines) that were read.
        rows: sequences made of them, before the filters.
        too_short, too_many_unknown: dropped, by the first filter that a row fails.
        kept: rows in ``Corpus.train``.
        held_out: rows in ``Corpus.holdout``.
        tokens: in the kept rows, special ones counted.
    """

    texts: int = 0
    rows: int = 0
    too_short: int = 0
    too_many_unknown: int = 0
    kept: int = 0
    held_out: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in asdict(self).items())


@dataclass(frozen=True)
class RowFilter:
    """Which rows are kept, and which are held out.

    Attributes:
        min_length: a row has at least so many tokens, special ones counted.
        max_unknown: the share of unknown tokens in a row is below this.
        unknown: id of the unknown token, None if there is none.
        holdout: share of the rows that is held out, chosen by the hash of their ids and ``seed``.
    """

    min_length: int
    max_unknown: float
    unknown: int | None
    holdout: float
    seed: int

    def __call__(self, rows: Flat, report: CorpusReport) -> tuple[Flat, Flat]:
        """Return the rows to train on and the held-out ones; count them in ``report``."""
        long_enough = rows.lengths >= self.min_length
        known = np.ones(len(rows.lengths), bool)
        if self.unknown is not None and len(known):
            unknown = np.add.reduceat(rows.ids == self.unknown, np.cumsum(rows.lengths) - rows.lengths, dtype=np.int64)
            known = unknown < self.max_unknown * rows.lengths
        kept = rows.where(long_enough & known)
        held = np.zeros(len(kept.lengths), bool)
        if self.holdout > 0:
            held = np.fromiter((self._share(row) < self.holdout for row in kept.split()), bool, len(held))
        train, held_out = kept.where(~held), kept.where(held)
        report.rows += len(rows.lengths)
        report.too_short += int((~long_enough).sum())
        report.too_many_unknown += int((long_enough & ~known).sum())
        report.kept += len(train.lengths)
        report.held_out += len(held_out.lengths)
        report.tokens += len(train.ids)
        return train, held_out

    def _share(self, row: np.ndarray) -> float:
        """A number in [0, 1) computed from the row's ids and the seed."""
        key = self.seed.to_bytes(8, "little")
        digest = hashlib.blake2b(row.astype("<i4").tobytes(), digest_size=8, key=key).digest()
        return int.from_bytes(digest, "little") / 2**64

"""What is run: token ids of given lengths, the same in every process because they are drawn from a fixed seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SEED = 20261122
BUCKETS = 4  # sub-batches of near lengths, for an engine that computes padding
FIRST_TOKEN = 1000  # in BERT's vocabulary words begin near here


@dataclass(frozen=True)
class Batch:
    """Token ids, 0 where padded; row i is row rows[i] of the workload."""

    input_ids: np.ndarray  # int64 [B, T]
    lengths: tuple[int, ...]  # [B]
    rows: tuple[int, ...]  # [B]

    @property
    def attention_mask(self) -> np.ndarray | None:
        """int64 [B, T]; None where nothing is padded: then no engine is made to read a mask."""
        if min(self.lengths) == self.input_ids.shape[1]:
            return None
        return (np.arange(self.input_ids.shape[1]) < np.asarray(self.lengths)[:, None]).astype(np.int64)


@dataclass(frozen=True)
class Workload:
    name: str
    lengths: tuple[int, ...]  # of each sequence

    @property
    def ragged(self) -> bool:
        return len(set(self.lengths)) > 1

    def tokens(self, vocabulary: int) -> list[np.ndarray]:
        """The sequences, without padding."""
        random = np.random.default_rng(SEED)
        first = min(FIRST_TOKEN, vocabulary // 2)
        return [random.integers(first, vocabulary, length) for length in self.lengths]

    def whole(self, vocabulary: int) -> list[Batch]:
        """One batch, padded to its longest sequence."""
        return [self._batch(self.tokens(vocabulary), range(len(self.lengths)))]

    def buckets(self, vocabulary: int) -> list[Batch]:
        """BUCKETS batches of sequences sorted by length, each padded to its own longest."""
        tokens = self.tokens(vocabulary)
        order = np.argsort(self.lengths, kind="stable")
        return [self._batch(tokens, rows.tolist()) for rows in np.array_split(order, BUCKETS)]

    def _batch(self, tokens: Sequence[np.ndarray], rows: Sequence[int]) -> Batch:
        lengths = tuple(self.lengths[row] for row in rows)
        ids = np.zeros((len(lengths), max(lengths)), np.int64)  # [B, T]
        for i, row in enumerate(rows):
            ids[i, : lengths[i]] = tokens[row]
        return Batch(ids, lengths, tuple(rows))

    def operations(self, layers: int, hidden: int, intermediate: int) -> int:
        """Multiplications and additions of the matrix products of the layers, for real tokens only."""
        linear = sum(self.lengths) * (4 * hidden * hidden + 2 * hidden * intermediate)
        attention = sum(length * length for length in self.lengths) * 2 * hidden
        return 2 * layers * (linear + attention)


def _full(batch: int, length: int) -> Workload:
    return Workload(f"{batch}x{length}", (length,) * batch)


def _uniform(batch: int, low: int, high: int) -> Workload:
    lengths = np.random.default_rng(SEED).integers(low, high, batch, endpoint=True)
    return Workload(f"{batch}x{high}-ragged", tuple(lengths.tolist()))


WORKLOADS: Mapping[str, Workload] = {
    workload.name: workload
    for workload in (
        _full(1, 16),
        _full(1, 128),
        _full(8, 128),
        _full(32, 128),
        _uniform(32, 16, 128),
        _full(8, 384),
        _full(1, 512),
    )
}


def calibration(vocabulary: int, longest: int) -> list[np.ndarray]:
    """Token ids [4, T] to find static scales with: the distribution of the workloads, other draws."""
    random = np.random.default_rng(SEED + 1)
    lengths = [length for length in (16, 32, 48, 64, 96, 128, 128, 256, 384, 512) if length <= longest]
    return [random.integers(min(FIRST_TOKEN, vocabulary // 2), vocabulary, (4, length)) for length in lengths]

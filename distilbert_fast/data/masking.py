"""Masked language modelling: which tokens are hidden, drawn again in every epoch and never stored.

Of an example of length L, n = ceil(p·L) tokens are drawn without replacement, token i with weight
w = max(count of its id, 1)^−s, special tokens 0; of those drawn, 80 % become the mask token, 10 % stay and 10 %
become a random token. Labels are the drawn tokens' ids, −100 elsewhere. s smooths towards rare tokens as in XLM
(Lample and Conneau 2019) and DistilBERT's own distiller.

To draw n of L by weight is to take the n smallest of E_i / w_i with E_i exponential (Efraimidis and Spirakis 2006):
one sort of a batch, no loop over draws. The random bits are those of Philox-4x64 under the key (seed, 0), from the
counter (0, epoch, example, 0) on: (seed, epoch, example) alone decides, whatever the batch, worker or process, so a
resumed run masks as the run that was not stopped, and a cache of teacher outputs stays valid. The original draws
over the flattened batch instead, ceil(p·Σ L) of it, so there an example's masks depend on its neighbours.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from distilbert_fast.data import IGNORED
from distilbert_fast.data.packing import Flat
from distilbert_fast.ops._check import refuse

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

MULTIPLE = 8  # batches are padded to a multiple of this: whole tensor core tiles
_STREAM_CHUNK = 64  # rows of a stream that are masked at once


class Masking:
    """Hide tokens of examples: always the same ones for the same (seed, epoch, example).

    Args:
        tokenizer: with a mask token. Its special tokens are never drawn.
        token_counts: [V] how often each id stands in the corpus, V = len(tokenizer), such as
            ``Corpus.token_counts``; a path to such a .npy file; or None, which draws every token alike.
        probability: p, share of an example's tokens (special ones counted) that are drawn; rounded up.
        mask, keep, random: shares of the drawn that become the mask token, stay, and become a token drawn
            evenly from the whole vocabulary; they sum to 1.
        smoothing: s; 0 draws every token alike.
        seed: of the draws, 0 to 2^64 − 1.

    Raises:
        ValueError: an argument is out of range, or the tokenizer has no mask token.
    """

    def __init__(
        self,
        tokenizer: Any,
        token_counts: np.ndarray | Sequence[int] | str | os.PathLike[str] | None,
        probability: float = 0.15,
        mask: float = 0.8,
        keep: float = 0.1,
        random: float = 0.1,
        smoothing: float = 0.7,
        seed: int = 0,
    ) -> None:
        vocabulary = len(tokenizer)
        if tokenizer.mask_token_id is None:
            refuse("Masking", "tokenizer", "one with a mask token", type(tokenizer).__name__)
        if not 0 < probability <= 1:
            refuse("Masking", "probability", "above 0 and at most 1", probability)
        if min(mask, keep, random) < 0 or abs(mask + keep + random - 1) > 1e-9:
            refuse("Masking", "mask, keep and random", "shares that sum to 1", (mask, keep, random))
        if smoothing < 0:
            refuse("Masking", "smoothing", "0 or above", smoothing)
        if not 0 <= seed < 2**64:
            refuse("Masking", "seed", "from 0 to 2^64 - 1", seed)
        if token_counts is None:
            counts = np.ones(vocabulary)
        elif isinstance(token_counts, (str, os.PathLike)):
            counts = np.load(token_counts)
        else:
            counts = np.asarray(token_counts)
        if counts.shape != (vocabulary,) or (counts < 0).any():
            refuse("Masking", "token_counts", f"{vocabulary} counts of 0 or above", f"shape {list(counts.shape)}")
        self.probability, self.mask, self.keep, self.random = probability, mask, keep, random
        self.smoothing, self.seed = smoothing, seed
        self.mask_token, self.vocabulary = int(tokenizer.mask_token_id), vocabulary
        self._inverse_weight = np.maximum(counts.astype(np.float64), 1) ** smoothing  # [V] 1 / w
        self._inverse_weight[[id for id in tokenizer.all_special_ids if id < vocabulary]] = np.inf

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the draws, the weights too: equal for maskings that draw alike."""
        shares = (self.probability, self.mask, self.keep, self.random, self.seed, self.mask_token)
        return hashlib.sha256(repr(shares).encode() + self._inverse_weight.tobytes()).hexdigest()[:16]

    def __call__(self, input_ids: npt.ArrayLike, epoch: int, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Mask one example.

        Args:
            input_ids: [L] ids with their special tokens, no padding.
            epoch: 0 and up.
            example: its number in the corpus.

        Returns:
            Corrupted ids and labels, both int64 [L].
        """
        ids = np.asarray(input_ids)
        return self.batch(ids, np.array([len(ids)]), epoch, [example])

    def batch(
        self, input_ids: np.ndarray, lengths: np.ndarray, epoch: int, examples: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mask B examples that lie one after another. Each gets the result that a call for it alone would give.

        Args:
            input_ids: [ΣL] their ids.
            lengths: [B] their lengths L.
            epoch: 0 and up.
            examples: [B] their numbers in the corpus.

        Returns:
            Corrupted ids and labels, both int64 [ΣL].
        """
        ids = input_ids.astype(np.int64)  # a copy: it becomes the corrupted ids
        bits = self._bits(lengths, epoch, examples)  # [ΣL, 2]
        even = ((bits[:, 0] >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # in (0, 1), exactly
        race = -np.log(even) * self._inverse_weight[ids]  # [ΣL] E / w
        at = np.flatnonzero(self._first(race, lengths))  # [M] where the drawn stand

        labels = np.full(len(ids), IGNORED)
        labels[at] = ids[at]
        share = (bits[at, 1] & np.uint64(0xFFFFFFFF)).astype(np.float64) * 2.0**-32  # [M] in [0, 1)
        token = ((bits[at, 1] >> np.uint64(32)) * np.uint64(self.vocabulary)) >> np.uint64(32)  # [M] in [0, V)
        ids[at] = np.where(
            share < self.mask,
            self.mask_token,
            np.where(share < self.mask + self.random, token.astype(np.int64), ids[at]),
        )
        return ids, labels

    def _bits(self, lengths: np.ndarray, epoch: int, examples: Sequence[int]) -> np.ndarray:
        """[ΣL, 2] random 64-bit words; an example's depend on (seed, epoch, example) and the place alone."""
        philox = np.random.Philox(key=self.seed)
        state: Any = philox.state  # set again for each example: a generator of its own costs seven times as much
        counter = state["state"]["counter"]
        drawn = []
        for length, example in zip(lengths.tolist(), examples, strict=True):
            counter[:] = (0, epoch, example, 0)
            philox.state = state
            drawn.append(philox.random_raw(2 * length))
        return np.concatenate([np.empty(0, np.uint64), *drawn]).reshape(-1, 2)

    def _first(self, race: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """[ΣL] True at each example's ceil(p·L) smallest of ``race``, or at all that are finite if those are fewer."""
        wanted = np.ceil(self.probability * lengths - 1e-9).astype(np.int64)  # 0.07·100 is 7.000000000000001
        inside = np.arange(lengths.max(initial=0)) < lengths[:, None]  # [B, T]
        padded = np.full(inside.shape, np.inf)
        padded[inside] = race
        order = np.sort(padded, axis=1)
        last = np.take_along_axis(order, np.maximum(wanted - 1, 0)[:, None], axis=1) if order.size else order[:, :1]
        return np.isfinite(race) & (padded <= last)[inside]


class MaskedDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The rows of a corpus, masked when they are read.

    A row is {"input_ids": int64 [L], "labels": int64 [L], "length": L, "example": its number}.

    ``set_epoch`` must be called at the start of every epoch, a resumed one too, before its first batch is asked for,
    as DistillationTrainer does; it reaches DataLoader workers that already run. A plain Trainer may not call it:
    accelerate forwards its ``set_epoch`` to the dataset only if no sampler takes it, and the one of the default
    random order does, with several processes and in any resumed epoch.

    Args:
        rows: ``Corpus.train`` or ``Corpus.holdout``: columns input_ids and length.
        masking: hides the tokens.
        epoch: the first.
        cycle: the number of epochs after which the masks repeat. 1 for evaluation, so that every evaluation masks alike
            (accelerate calls ``set_epoch`` there too); more for the epochs of a ``CachedTeacher``. None: never.
    """

    def __init__(self, rows: datasets.Dataset, masking: Masking, epoch: int = 0, cycle: int | None = None) -> None:
        if cycle is not None and cycle < 1:
            refuse("MaskedDataset", "cycle", "1 or more, or None", cycle)
        # to ask again for a format that is there would change the fingerprint
        self._rows = rows if rows.format["type"] == "arrow" else rows.with_format("arrow")
        self.masking, self.first, self.cycle = masking, epoch, cycle
        self._epoch = torch.tensor(epoch).share_memory_()

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, for a sampler that groups by length."""
        return self._rows.select_columns("length")[:]["length"].to_pylist()

    @property
    def fingerprint(self) -> str:
        """Equal if rows and masking are: what a resumed run must find unchanged."""
        cycle = "" if self.cycle is None else f"-{self.first}+{self.cycle}"
        return f"{self.rows_fingerprint}-{self.masking.fingerprint}{cycle}"

    @property
    def rows_fingerprint(self) -> str:
        return self._rows._fingerprint

    def set_epoch(self, epoch: int) -> None:
        """Mask as in this epoch from now on, in workers too."""
        self._epoch.fill_(epoch if self.cycle is None else self.first + epoch % self.cycle)

    def at_epoch(self, epoch: int) -> MaskedDataset:
        """The same rows, masked as in this epoch every time."""
        return MaskedDataset(self._rows, self.masking, epoch, cycle=1)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows at once: what a DataLoader calls."""
        return _masked(self._rows[list(indices)], self.masking, int(self._epoch), indices)


class MaskedStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """``MaskedDataset`` for a corpus that is streamed; a row's number is its place in the stream.

    Every process must read the whole stream and take its share of the batches, as DistillationTrainer has it (a plain
    Trainer: with ``accelerator_config={"dispatch_batches": False}``). In a DataLoader one worker reads; the others have
    nothing to do.

    Args:
        rows: ``train`` of a ``Corpus`` that is streamed. If they are shuffled, they are shuffled again in each epoch.
        masking: hides the tokens.
        epoch: the first.
    """

    def __init__(self, rows: datasets.IterableDataset, masking: Masking, epoch: int = 0) -> None:
        self._rows = rows.with_format("arrow")
        self.masking = masking
        self._epoch = torch.tensor(epoch).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """As in MaskedDataset."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.id > 0:
            return
        epoch, first = int(self._epoch), 0
        self._rows.set_epoch(epoch)
        for table in self._rows.iter(batch_size=_STREAM_CHUNK):
            examples = range(first, first := first + len(table))
            yield from _masked(table, self.masking, epoch, examples)


def pad_collator(tokenizer: Any) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]:
    """A collator for rows of MaskedDataset and MaskedStream; it can be sent to worker processes.

    Returns:
        A function of B rows to {"input_ids": int64 [B, T], "labels": int64 [B, T], "attention_mask": bool [B, T],
        "example": int64 [B]}: T is the longest length rounded up to a multiple of 8, padding has the tokenizer's
        pad id, label −100 and mask False. "example" is there if the rows have it (DistillationTrainer keeps
        it; Trainer drops it, unless ``remove_unused_columns=False``).
    """
    if tokenizer.pad_token_id is None:
        refuse("pad_collator", "tokenizer", "one with a pad token", type(tokenizer).__name__)
    return partial(pad_rows, pad_id=int(tokenizer.pad_token_id))


def pad_rows(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """The batch that ``pad_collator`` makes of rows."""
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    width = -(-int(lengths.max()) // MULTIPLE) * MULTIPLE
    inside = torch.arange(width) < lengths[:, None]  # [B, T]
    batch = {"attention_mask": inside}
    for name, filler in (("input_ids", pad_id), ("labels", IGNORED)):
        batch[name] = torch.full(inside.shape, filler).masked_scatter_(inside, torch.cat([row[name] for row in rows]))
    if "example" in rows[0]:
        batch["example"] = torch.tensor([row["example"] for row in rows])
    return batch


def _masked(table: pa.Table, masking: Masking, epoch: int, examples: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of an Arrow table, masked together."""
    rows = Flat.of(table["input_ids"])
    both = masking.batch(rows.ids, rows.lengths, epoch, examples)
    ids, labels = (torch.from_numpy(flat).split(rows.lengths.tolist()) for flat in both)
    return [
        {"input_ids": of_row, "labels": labels_of_row, "length": len(of_row), "example": example}
        for of_row, labels_of_row, example in zip(ids, labels, examples, strict=True)
    ]

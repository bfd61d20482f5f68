"""Precision, recall and F1 of entities, over all and type by type, as conlleval and seqeval count them.

An entity is right if its type, its first and its last word are. Tags are read leniently, whatever the scheme: see
`Scheme`. Tjong Kim Sang, De Meulder: CoNLL-2003, arXiv:cs/0306050.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from distilbert_fast.data.tags import Scheme, is_outside, scheme_of


class EntityScore(NamedTuple):
    """Counts of entities: in the true tags, in the predicted ones, and in both."""

    true: int
    found: int
    right: int

    @property
    def precision(self) -> float:
        """right / found; 0 where nothing was found."""
        return self.right / self.found if self.found else 0.0

    @property
    def recall(self) -> float:
        """right / true; 0 where there is nothing to find."""
        return self.right / self.true if self.true else 0.0

    @property
    def f1(self) -> float:
        """2 · right / (found + true); 0 for no entities."""
        return 2 * self.right / (self.found + self.true) if self.found + self.true else 0.0

    def as_dict(self) -> dict[str, float]:
        return {"precision": self.precision, "recall": self.recall, "f1": self.f1, "support": self.true}


_RESAMPLES = 200


def entity_errors(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """Standard errors of precision, recall and F1 of all entities, by the bootstrap over sentences."""
    scheme = scheme_of({tag for tags in (*predicted, *true) for tag in tags})
    rows = zip(predicted, true, strict=True)
    counts = np.array([[*entity_scores([mine], [theirs], scheme)[0]] for mine, theirs in rows])  # [S, 3]
    draws = np.random.default_rng(0).integers(len(counts), size=(_RESAMPLES, len(counts)))
    samples = [EntityScore(*map(int, counts[draw].sum(axis=0))) for draw in draws]
    return {name: float(np.std([getattr(one, name) for one in samples])) for name in ("precision", "recall", "f1")}


def entity_scores(
    predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]], scheme: Scheme | None = None
) -> tuple[EntityScore, dict[str, EntityScore]]:
    """Scores of all entities of all sentences, and those of each type, by name in their order.

    `scheme`: the scheme of the tags; None: it is inferred from them. Raises ValueError if they follow none, and for
    sentences of other lengths.
    """
    names = {tag for tags in (*predicted, *true) for tag in tags}
    scheme = scheme or scheme_of(names)
    if scheme is None:
        if all(map(is_outside, names)):
            return EntityScore(0, 0, 0), {}
        raise ValueError(f"entity_scores: expected tags such as B-PER, I-PER and O, got {', '.join(sorted(names)[:9])}")
    counts = [Counter[str]() for _ in range(3)]
    for mine, theirs in zip(predicted, true, strict=True):
        if len(mine) != len(theirs):
            raise ValueError(f"entity_scores: expected as many predicted as true tags, got {len(mine)}, {len(theirs)}")
        found, there = scheme.entities(mine), scheme.entities(theirs)
        for count, entities in zip(counts, (there, found, found & there), strict=True):
            count.update(kind for kind, *_ in entities)
    kinds = sorted(counts[0] | counts[1])
    by_kind = {kind: EntityScore(*(count[kind] for count in counts)) for kind in kinds}
    return EntityScore(*(count.total() for count in counts)), by_kind

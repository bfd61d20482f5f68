"""How much is tried: all of it by ``make test-all``, by ``make test`` a part that fixed seeds choose.

The environment says which, so that the processes that a test starts know it too: DISTILBERT_FAST_TESTS=all.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

ASKED = os.environ.get("DISTILBERT_FAST_TESTS") or "some"
if ASKED not in ("some", "all"):
    raise ValueError(f"DISTILBERT_FAST_TESTS must be some or all, got {ASKED!r}")
WHOLE = ASKED == "all"


def many(small: T, whole: T) -> T:
    """The one or the other, such as how often something is done."""
    return whole if WHOLE else small


def covering(cases: Sequence[Mapping[str, int | str]], seed: int = 0) -> list[int]:
    """Which of the cases, each a {parameter: value}, have every value of every parameter between them."""
    order = random.Random(seed).sample(range(len(cases)), len(cases))
    unseen = {pair for case in cases for pair in case.items()}
    chosen = []
    while unseen:
        best = max(order, key=lambda i: len(unseen & cases[i].items()))
        unseen -= cases[best].items()
        chosen.append(best)
    return sorted(chosen)

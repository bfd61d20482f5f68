"""How much is tried: all of it by ``make test-all``, by ``make test`` a part that fixed seeds choose.

The environment says which, so that the processes that a test starts know it too: DISTILBERT_FAST_TESTS=all.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

ASKED = os.environ.get("DISTILBERT_FAST_TESTS") or "some"
if ASKED not in ("some", "all"):
    raise ValueError(f"DISTILBERT_FAST_TESTS must be some or all, got {ASKED!r}")
WHOLE = ASKED == "all"


def many(small: T, whole: T) -> T:
    """The one or the other, such as how often something is done."""
    return whole if WHOLE else small


def covering(cases: Sequence[Mapping[str, int | str]], together: int = 1, seed: int = 0) -> list[int]:
    """Which of the cases, each a {parameter: value}, have every value of every parameter between them.

    ``together``: so many parameters whose values all meet; 2: every pair of values is in one of the cases.
    """
    order = random.Random(seed).sample(range(len(cases)), len(cases))
    held = [set(itertools.combinations(case.items(), min(together, len(case)))) for case in cases]
    unseen = set().union(*held)
    chosen = []
    while unseen:
        best = max(order, key=lambda i: len(unseen & held[i]))
        unseen -= held[best]
        chosen.append(best)
    return sorted(chosen)


def left_out(items: Iterable[Any]) -> set[Any]:
    """Which of pytest's items ``make test`` does not run: of tests marked ``covering``, what ``covering`` leaves."""
    groups: dict[str, list[Any]] = {}
    for item in items:
        if hasattr(item, "callspec") and item.get_closest_marker("covering"):
            groups.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left = set()
    for group in groups.values():
        given = [{name: repr(value) for name, value in item.callspec.params.items()} for item in group]
        chosen = covering(given, **group[0].get_closest_marker("covering").kwargs)
        left |= {*group} - {group[i] for i in chosen}
    return left

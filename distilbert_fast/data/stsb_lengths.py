"""How long the pairs of STS-B's development set are: numbers alone, no text, so that speeds can be measured without it.

Counted on sts-dev.csv of the STS benchmark (1,500 pairs; Cer et al., SemEval 2017, task 1) by the word pieces of
BERT-base, uncased, [CLS] and two [SEP] included, and by words and punctuation marks of each sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class PairLengths(NamedTuple):
    """The size of a pair of sentences."""

    tokens: int  # word pieces of both, with the special ones
    first: int  # words of the first sentence
    second: int  # and of the second


# Tokens, how many pairs have so many, and the mean words of their first and second sentences, rounded.
_COUNTED = (
    (11, 1, 4, 4),
    (12, 6, 4, 5),
    (13, 17, 5, 5),
    (14, 11, 5, 5),
    (15, 34, 6, 6),
    (16, 60, 6, 6),
    (17, 79, 7, 7),
    (18, 69, 7, 7),
    (19, 67, 8, 8),
    (20, 61, 8, 8),
    (21, 93, 9, 9),
    (22, 63, 9, 9),
    (23, 53, 9, 9),
    (24, 45, 10, 10),
    (25, 39, 10, 10),
    (26, 32, 11, 11),
    (27, 19, 11, 12),
    (28, 31, 12, 11),
    (29, 27, 12, 13),
    (30, 19, 12, 13),
    (31, 22, 13, 14),
    (32, 27, 14, 14),
    (33, 33, 15, 14),
    (34, 30, 16, 14),
    (35, 39, 16, 15),
    (36, 23, 16, 15),
    (37, 28, 16, 17),
    (38, 33, 17, 17),
    (39, 28, 18, 16),
    (40, 30, 18, 18),
    (41, 29, 19, 17),
    (42, 29, 18, 18),
    (43, 26, 19, 19),
    (44, 27, 19, 20),
    (45, 26, 20, 20),
    (46, 22, 21, 20),
    (47, 16, 20, 22),
    (48, 18, 19, 23),
    (49, 21, 23, 19),
    (50, 8, 22, 23),
    (51, 11, 23, 24),
    (52, 9, 22, 22),
    (53, 14, 22, 24),
    (54, 9, 25, 23),
    (55, 7, 24, 24),
    (56, 3, 28, 19),
    (57, 5, 24, 28),
    (58, 9, 27, 25),
    (59, 11, 26, 28),
    (60, 10, 25, 28),
    (61, 4, 28, 24),
    (62, 9, 28, 25),
    (63, 5, 28, 27),
    (64, 10, 28, 29),
    (65, 6, 27, 29),
    (66, 2, 32, 26),
    (67, 2, 27, 32),
    (68, 3, 30, 30),
    (69, 7, 33, 27),
    (70, 5, 32, 29),
    (71, 3, 31, 31),
    (72, 4, 31, 33),
    (73, 3, 33, 28),
    (74, 2, 31, 34),
    (75, 1, 33, 33),
    (76, 1, 25, 41),
    (77, 2, 34, 35),
    (78, 1, 22, 34),
    (87, 1, 40, 40),
)


def stsb_pairs() -> list[PairLengths]:
    """The 1,500 pairs, in the order of their lengths."""
    return [PairLengths(tokens, first, second) for tokens, count, first, second in _COUNTED for _ in range(count)]


def words(text: str) -> int:
    """Words and punctuation marks of a text."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def spread_over(pairs: Iterable[PairLengths], count: int) -> list[PairLengths]:
    """So many of the pairs, evenly spaced in the order of their lengths: their mean is about that of all."""
    ordered = sorted(pairs)
    return [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]

"""Labels that may not be what they seem, and are refused; the order of classes."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from distilbert_fast.data.published import as_number
from distilbert_fast.data.tables import as_written
from distilbert_fast.files.text import refuse_input, shortened, visible

NO_LABEL = -1  # where labels have names: in data sets of the hub, and in Parquet files written of them


def refuse_vectors(place: str, lists: Sequence[list[Any]], names: Sequence[str] | None) -> None:
    """Refuse lists of one length in which every label may be a 1 or 0 that says whether a row has the label.

    Where numbers have names they are labels, but for lists with a number for each name. `place`: of the first list.
    """
    lengths = {len(given) for given in lists}
    if len(lengths) != 1 or lengths == {0} or (names and lengths != {len(names)}):
        return
    if all(map(_is_flag, (one for given in lists for one in given))):
        expected = "the names of the labels that the row has"
        refuse_input(place, expected, f"{shortened(lists[0])}, perhaps a 1 or 0 for each label")


def refuse_no_label(row: str, label: str) -> None:
    if as_number(label) == NO_LABEL:
        raise ValueError(
            f"{row} has the label {label}, which stands for no label in data sets of the hub; leave the row out, "
            "or give its class another name"
        )


def refuse_numbers(op: str, labels: set[str]) -> None:
    """Refuse numbers with fractions as classes: somebody forgot to ask for a regression.

    Nor are two classes of one number: 1 and 1.0, which JSONL may mix. Codes such as 007 and 7 are two.
    """
    written: dict[float, str] = {}
    for label in sorted(labels):
        number = as_number(label)
        other = label if number is None else written.setdefault(number, label)
        if other != label and not (label.isdecimal() and other.isdecimal()):
            refuse_input(f"{op}: data", "one way to write a class", f"{other!r} and {label!r}")
    numbers = [as_number(label) for label in labels]
    if None not in numbers and (fractions := sorted(number for number in numbers if number and number % 1)):
        raise ValueError(
            f"{op}: data: expected names of classes as labels, got numbers such as {fractions[0]:g}; ask for "
            "a regression, or give the classes other names"
        )


def refuse_lookalikes(op: str, labels: set[str]) -> None:
    """Refuse two classes that nobody can tell apart: one has an invisible character, or other white space."""
    seen: dict[str, str] = {}
    for label in sorted(labels):
        if (other := seen.setdefault(visible(label), label)) != label:
            refuse_input(f"{op}: data", "one way to write a class", f"{other!a} and {label!a}")


def label_order(labels: set[str]) -> tuple[str, ...]:
    """Numbers by value (2 before 10, 2.0 before 10.0), anything else by its text."""
    if all(as_number(label) is not None for label in labels):
        return tuple(sorted(labels, key=lambda label: (Decimal(label), label)))
    return tuple(sorted(labels))


def _is_flag(cell: object) -> bool:
    text = (as_written(cell) or "").strip()
    return text.lower() in ("true", "false") or as_number(text) in (0, 1)

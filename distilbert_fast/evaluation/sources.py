"""Where the rows of a task come from: files of the user's, or a data set of the Hugging Face hub."""

from __future__ import annotations

import csv
import hashlib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.json
import pyarrow.parquet

FORMATS = {".tsv": "TSV", ".csv": "CSV", ".jsonl": "JSONL", ".parquet": "Parquet"}
EVAL_PERCENT = 10  # of a file's rows when no evaluation file is given
EVAL_SPLITS = ("validation", "validation_matched", "test")  # of a hub data set, the best first


def check_file(op: str, argument: str, path: Path) -> None:
    """Raise ValueError for a file that is missing or empty."""
    if not path.is_file():
        raise ValueError(f"{op}: {argument}: no such file: {str(path)!r}")
    if path.stat().st_size == 0:
        raise ValueError(f"{op}: {argument}: {str(path)!r} is empty")


def read_table(op: str, argument: str, path: Path) -> pyarrow.Table:
    """A file of one of `FORMATS` as an Arrow table.

    CSV and TSV values stay as written: no "NA" becomes a null, no 1 a 1.0. Raises ValueError with the reader's reason.
    """
    kind = FORMATS[path.suffix.lower()]
    try:
        return _table(kind, path)
    except (OSError, ValueError, Warning, pyarrow.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{op}: {argument}: cannot read {str(path)!r} as {kind}: {reason}") from error


def _table(kind: str, path: Path) -> pyarrow.Table:
    if kind == "Parquet":
        return pyarrow.parquet.read_table(path)
    if kind == "JSONL":
        return pyarrow.json.read_json(path)
    import pandas

    dialect = {"sep": "\t", "quoting": csv.QUOTE_NONE} if kind == "TSV" else {"sep": ","}
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)  # rows longer than the header, cut silently
        frame = pandas.read_csv(path, dtype=str, na_filter=False, index_col=False, encoding="utf-8-sig", **dialect)
    return pyarrow.Table.from_pandas(frame)


def file_name(path: Path) -> str:
    """`sst2/train.tsv`: most data files are called train."""
    return "/".join(path.resolve().parts[-2:])


def hub_splits(op: str, name: str, known: str = "") -> Any:
    """The splits of a hub data set, "owner/set" or "owner/set/config", with one called train.

    `known`: what else the name might have been, for the message of the ValueError if it is not on the hub.
    """
    from datasets import load_dataset

    owner, _, rest = name.partition("/")
    if owner == "glue":
        parts = ["nyu-mll/glue", rest]
    else:
        repository, _, config = rest.partition("/")
        parts = [f"{owner}/{repository}" if repository else owner, *([config] if config else [])]
    try:
        splits = load_dataset(*parts)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{op}: name: {name!r} is not {known}, and the Hugging Face hub did not give a data set for it: {reason}"
            if known
            else f"{op}: name: the Hugging Face hub did not give the data set {name!r}: {reason}"
        ) from error
    if "train" not in splits:
        raise ValueError(f"{op}: name: {name!r} has no split train; its splits: {', '.join(splits)}")
    return splits


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def is_held_out(text: str) -> bool:
    return hashed(text) % 100 < EVAL_PERCENT


def folded(texts: Sequence[str]) -> str:
    """One string for texts that differ in case and spaces alone."""
    return "\0".join(" ".join(text.lower().split()) for text in texts)


def class_order(
    op: str, mine: Sequence[str], theirs: Sequence[str], kept: bool, fewer: bool = False
) -> list[int] | None:
    """The places of classes among those of a teacher, compared without case; None if it has others.

    Args:
        op: what messages begin with.
        mine: names of the data's classes.
        theirs: the teacher's, in the order of its logits.
        kept: the teacher's head is taken as it is, not trained.
        fewer: the teacher may have more classes than the data.

    Raises:
        ValueError: the head is kept, and its classes are as many but others. Names that tell nothing, LABEL_0 and the
            like or numbers in the data, are taken in the order they have.
    """
    ours, others = ([name.casefold() for name in of] for of in (mine, theirs))
    distinct = len(set(ours)) == len(ours) and len(set(others)) == len(others)
    if distinct and (set(ours) == set(others) or (fewer and set(ours) < set(others))):
        return [others.index(name) for name in ours]
    telling = not all(re.fullmatch(r"-?\d+", name) for name in ours)
    named = not all(re.fullmatch(r"label_\d+", name) for name in others)
    if kept and telling and named and len(ours) == len(others):
        raise ValueError(
            f"{op}: data: expected the teacher's labels {', '.join(map(repr, theirs))}, got "
            f"{', '.join(map(repr, mine))}; rename them, or train the teacher on them (teacher_epochs)"
        )
    return None


def names_in_order(mine: Sequence[str], theirs: Sequence[str], order: Sequence[int]) -> tuple[str, ...]:
    """The teacher's classes in its order; those that the data has under the data's names."""
    own = dict(zip(order, mine, strict=True))
    return tuple(own.get(at, name) for at, name in enumerate(theirs))

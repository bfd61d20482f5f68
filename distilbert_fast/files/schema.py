"""Schemas of the JSON that we write and read again, put together of checks for each kind of value.

    entry = record({"size": integer(0), "sha256": text("[0-9a-f]{64}")})
    files = read_json(path, record({"format": one_of(1), "files": mapping(entry)}))["files"]

A check takes a value and where it stands, and returns nothing. Every size that a file gives is bounded by its schema
before memory is made of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distilbert_fast.files.durable import refuse_file, regular_size

Check = Callable[[Any, str], None]

CHECKSUM = "checksum"  # the key under which a sealed object keeps the SHA-256 of all others
_MOST_BYTES = 2**28  # of a file
_LARGEST = sys.float_info.max
_DEPTH = 100  # of values that no schema describes


class _MismatchError(Exception):
    def __init__(self, where: str, expected: str, shown: str) -> None:
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        super().__init__(f"{where + ' must be' if where else 'expected'} {expected}, got {shown}")


def _require(fits: bool, where: str, expected: str, given: Any) -> None:
    if not fits:
        raise _MismatchError(where, expected, repr(given))


def _simple(fits: Callable[[Any], bool], expected: str) -> Check:
    def check(value: Any, where: str) -> None:
        _require(fits(value), where, expected, value)

    return check


def integer(least: int = -(2**63), most: int = 2**63 - 1) -> Check:
    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return _simple(fits, f"an integer from {least} to {most}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(least: float = -math.inf) -> Check:
    """A finite number."""
    expected = "a finite number" + ("" if least == -math.inf else f" from {least:g} on")
    return _simple(lambda value: _is_number(value) and max(least, -_LARGEST) <= value <= _LARGEST, expected)


real = _simple(_is_number, "a number")  # one that was measured, which may be NaN or infinite
boolean = _simple(lambda value: isinstance(value, bool), "true or false")


def text(pattern: str = "", called: str = "a text") -> Check:
    """A string, all of which matches ``pattern`` if one is given; messages call that ``called``."""
    return _simple(lambda value: isinstance(value, str) and (not pattern or bool(re.fullmatch(pattern, value))), called)


def one_of(*values: Any) -> Check:
    expected = f"one of {', '.join(map(repr, values))}" if len(values) > 1 else repr(values[0])
    return _simple(lambda value: any(type(value) is type(one) and value == one for one in values), expected)


def nullable(inner: Check) -> Check:
    def check(value: Any, where: str) -> None:
        if value is not None:
            inner(value, where)

    return check


def array(entry: Check, least: int = 0, most: int = 2**20) -> Check:
    def check(value: Any, where: str) -> None:
        length = f"{least}" if least == most else f"{least} to {most}"
        _require(isinstance(value, list) and least <= len(value) <= most, where, f"a list of {length} values", value)
        for i, one in enumerate(value):
            entry(one, f"{where}[{i}]")

    return check


def mapping(entry: Check, key: Check | None = None) -> Check:
    """An object with any keys, or any that pass ``key``."""

    def check(value: Any, where: str) -> None:
        _require(isinstance(value, dict), where, "an object", value)
        for name, one in value.items():
            if key is not None:
                key(name, f"a key of {where}" if where else "a key")
            entry(one, _inside(where, name))

    return check


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None, others: bool = False) -> Check:
    """An object with these keys; ``others`` may be there too, unchecked."""
    optional = optional or {}

    def check(value: Any, where: str) -> None:
        _require(isinstance(value, dict), where, "an object", value)
        for name, entry in required.items():
            if name not in value:
                raise _MismatchError(_inside(where, name), "given", "nothing")
            entry(value[name], _inside(where, name))
        for name, one in value.items():
            if name in optional:
                optional[name](one, _inside(where, name))
            elif name not in required:
                _require(others, where, f"an object of {', '.join([*required, *optional])} alone", name)

    return check


FILE = record({"size": integer(0), "sha256": text("[0-9a-f]{64}", "a SHA-256")})  # an entry of ``durable.flush``


def anything(value: Any, where: str) -> None:
    """Any value that is not nested too deep."""
    level = [value]
    for _ in range(_DEPTH):
        level = [
            one for v in level for one in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())
        ]
        if not level:
            return
    raise _MismatchError(where, f"nested at most {_DEPTH} deep", "more")


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


# Reading and writing --------------------------------------------------------------------------------------------------


def read_json(path: str | os.PathLike[str], check: Check = anything) -> Any:
    """The value in a JSON file, in UTF-8.

    Raises:
        FileError: no regular file, no JSON, a key that comes twice, or not what ``check`` takes, by path.
        OSError: there is no such file, or it may not be read.
    """
    if regular_size(path) > _MOST_BYTES:
        refuse_file(path, f"expected JSON of at most {_MOST_BYTES} bytes, got {regular_size(path)}")
    return parse_json(Path(path).read_bytes(), path, check)


def parse_json(content: bytes | str, path: str | os.PathLike[str], check: Check = anything, called: str = "") -> Any:
    """The value of JSON that was read from ``path``, where it is ``called`` so. Raises FileError, as ``read_json``."""
    before = f"{called}: " if called else ""
    try:
        value = json.loads(content.decode() if isinstance(content, bytes) else content, object_pairs_hook=_once)
    except RecursionError:
        refuse_file(path, f"{before}JSON that is nested too deep")
    except ValueError as error:
        refuse_file(path, f"{before}{error}")
    validate(value, path, check, called)
    return value


def validate(value: Any, path: str | os.PathLike[str], check: Check, called: str = "") -> None:
    """Check a value that came from ``path``. Raises FileError."""
    try:
        check(value, "")
    except _MismatchError as error:
        refuse_file(path, f"{called}: {error}" if called else str(error))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return found


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """An object with a checksum of itself, which ``open_sealed`` checks and takes away."""
    return {**value, CHECKSUM: _checksum(value)}


def open_sealed(value: Any, path: str | os.PathLike[str]) -> Any:
    """What ``sealed`` was given; an object without a checksum, or no object, as it is.

    Raises:
        FileError: the checksum is another one.
    """
    if not isinstance(value, dict):
        return value
    validate(value, path, anything)
    if CHECKSUM not in value:
        likely = [name for name, one in value.items() if isinstance(one, str) and len(one) == 64]
        if any(value[name] == _checksum(_without(value, name)) for name in likely):
            refuse_file(path, "the name of its checksum is damaged")
        return value
    inside = _without(value, CHECKSUM)
    if value[CHECKSUM] != _checksum(inside):
        refuse_file(path, "its contents do not fit their checksum")
    return inside


def _without(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: one for name, one in value.items() if name != key}


def _checksum(value: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(value))  # tuples become lists, keys texts
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

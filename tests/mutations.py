"""Damage to files, the same for a seed: bits flipped, ends cut off, JSON edited."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distilbert_fast.files.durable import FileError

ODD: tuple[Any, ...] = (None, True, -1, 0, 2**40, 1.5, float("nan"), "", "x", [], [[]], {}, {"x": 1})


def flipped(content: bytes, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """One bit each; a third of them in the first 512 bytes, where a header is."""
    draw = random.Random(seed)
    for i in range(count):
        place = draw.randrange(len(content) if i % 3 else min(512, len(content)))
        bit = draw.randrange(8)
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        yield f"bit {bit} of byte {place}", bytes(changed)


def cut(content: bytes, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    draw = random.Random(seed)
    for kept in (0, 1, len(content) - 1, *(draw.randrange(len(content)) for _ in range(count))):
        yield f"cut to {kept} bytes", content[:kept]
    yield "a byte more", content + b"\0"


def edited(value: Any, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """JSON of a value, a part of which was removed, renamed or replaced by something odd."""
    draw = random.Random(seed)
    for _ in range(count):
        changed = copy.deepcopy(value)
        parts = list(_parts(changed))
        holder, key = parts[draw.randrange(len(parts))]
        how = draw.choice(["remove", "rename", "replace", "replace"])
        label = f"{how} {key!r}"
        if how == "remove":
            del holder[key]
        elif how == "rename" and isinstance(holder, dict):
            holder[f"{key}x"] = holder.pop(key)
        else:
            holder[key] = draw.choice(ODD)
            label += f" by {holder[key]!r}"
        yield label, json.dumps(changed).encode()
    yield "deep", b"[" * 100_000
    yield "no UTF-8", b'{"a": "\xff"}'
    yield "twice", b"{" + json.dumps(value).encode()[1:-1] + b"," + json.dumps(value).encode()[1:]


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested lists and objects, by what holds it and its key there."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _parts(value[key])


def assert_refused_or_same(
    path: Path, damages: Iterator[tuple[str, bytes]], load: Callable[[], Any], same: Callable[[Any], bool]
) -> int:
    """Damage a file in each way. It loads as ever, or the one error names it. Returns how often it was refused.

    Args:
        path: the file, which is put back.
        load: reads it.
        same: whether what was read is what the whole file holds.
    """
    whole, refused = path.read_bytes(), 0
    try:
        for label, content in damages:
            path.unlink()  # what is mapped of the last one stays
            path.write_bytes(content)
            try:
                found = load()
            except FileError as error:
                assert str(path) in str(error), f"{label}: {error}"
                refused += 1
            else:
                assert same(found), label
    finally:
        path.unlink()
        path.write_bytes(whole)
    return refused

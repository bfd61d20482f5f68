"""Schemas of JSON: what each check takes, and the message where it takes it not."""

from __future__ import annotations

import json

import pytest

from distilbert_fast.files.durable import FileError
from distilbert_fast.files.schema import (
    anything,
    array,
    boolean,
    integer,
    mapping,
    nullable,
    number,
    one_of,
    open_sealed,
    read_json,
    record,
    sealed,
    text,
)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (integer(1, 5), 5, None),
        (integer(1, 5), 6, "expected an integer from 1 to 5, got 6"),
        (integer(1, 5), True, "expected an integer from 1 to 5, got True"),
        (integer(1, 5), 2.0, "expected an integer from 1 to 5, got 2.0"),
        (number(), -1, None),
        (number(0), 1e-12, None),
        (number(0), -1e-12, "expected a finite number from 0 on, got -1e-12"),
        (number(), float("nan"), "expected a finite number, got nan"),
        (number(), float("-inf"), "expected a finite number, got -inf"),
        (number(), 10**400, f"expected a finite number, got 1{'0' * 56}..."),
        (number(), "1", "expected a finite number, got '1'"),
        (boolean, 1, "expected true or false, got 1"),
        (text("[a-z]+", "a word"), "ab1", "expected a word, got 'ab1'"),
        (text(), None, "expected a text, got None"),
        (one_of(1), True, "expected 1, got True"),
        (one_of("a", "b"), "c", "expected one of 'a', 'b', got 'c'"),
        (nullable(integer()), None, None),
        (nullable(integer()), "x" * 99, f"expected an integer from {-(2**63)} to {2**63 - 1}, got '{'x' * 56}..."),
        (array(array(integer(0, 9), 2, 2)), [[1, 2], [3, 10]], "[1][1] must be an integer from 0 to 9, got 10"),
        (array(array(integer(0, 9), 2, 2)), [[1]], "[0] must be a list of 2 values, got [1]"),
        (mapping(boolean), {"a": {}}, "a must be true or false, got {}"),
        (mapping(boolean, text("[a-z]", "a letter")), {"ab": True}, "a key must be a letter, got 'ab'"),
        (record({"a": record({"b": boolean})}), {"a": {}}, "a.b must be given, got nothing"),
        (record({"a": boolean}, {"b": boolean}), {"a": True}, None),
        (record({"a": boolean}, {"b": boolean}), {"a": True, "b": 0}, "b must be true or false, got 0"),
        (record({"a": boolean}, {"b": boolean}), {"a": True, "c": 0}, "expected an object of a, b alone, got 'c'"),
        (record({"a": boolean}, others=True), {"a": True, "c": 0}, None),
        (record({"a": boolean}), [], "expected an object, got []"),
        (mapping(anything), {"a": nested(90)}, None),
        (mapping(anything), {"a": nested(110)}, "a must be nested at most 100 deep, got more"),
    ],
)
def test_what_a_check_takes(check, value, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value))
    if message is None:
        assert read_json(path, check) == value
        return
    with pytest.raises(FileError) as error:
        read_json(path, check)
    assert str(error.value) == f"{str(path)!r}: {message}" and error.value.reason == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b"[" * 100_000, "JSON that is nested too deep"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' comes twice"),
        (b'"\xff"', "'utf-8' codec can't decode byte 0xff in position 1: invalid start byte"),
        (b"1" * 5000, "Exceeds the limit"),
    ],
)
def test_what_is_no_json(content, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(FileError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{str(path)!r}: {message}")


def test_a_file_that_is_far_too_large(tmp_path):
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(FileError, match="expected JSON of at most 268435456 bytes, got 1099511627776"):
        read_json(path)


def test_seals():
    value = {"a": [1, 2.5, None], "b": {"c": "é", "d": float("inf")}}
    made = json.loads(json.dumps(sealed(value)))
    assert open_sealed(made, "x") == value
    assert open_sealed(value, "x") == value and open_sealed([1], "x") == [1]
    checksum = made.pop("checksum")
    for damaged, reason in (
        ({**made, "a": [1, 2.25, None], "checksum": checksum}, "its contents do not fit their checksum"),
        ({**made, "checksum": None}, "its contents do not fit their checksum"),
        ({**made, "checksul": checksum}, "the name of its checksum is damaged"),
    ):
        with pytest.raises(FileError) as error:
            open_sealed(damaged, "x")
        assert str(error.value) == f"'x': {reason}"

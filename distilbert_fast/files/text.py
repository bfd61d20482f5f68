"""How the text files of a user are read, all in one way: UTF-8, with its mark (BOM) or without, and no NUL bytes.

Lines end with LF, CRLF or CR, and nothing else ends one. Every refusal names the file and the line.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from distilbert_fast.files.durable import FileError, regular_size

# of other encodings; UTF-32's begins as UTF-16's does
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_LINE_END = re.compile("\r\n|\r|\n")
_ODD_LINE_END = re.compile("\r\r\n|\n\r(?!\n)")
# controls, and Unicode's Default_Ignorable_Code_Point (zero-width marks, fillers, variation selectors); no white space
_INVISIBLE = re.compile(
    "[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # in a str the two of a pair are one character


def refuse_input(where: str, expected: str, given: object) -> NoReturn:
    """Raise ValueError for input that is not as expected; ``where`` names the file and the line, or the argument."""
    raise ValueError(f"{where}: expected {expected}, got {given}")


def check_file(op: str, argument: str, path: Path) -> None:
    """Raise ValueError for a file that is missing or empty, and for what is no regular file, such as a FIFO."""
    try:
        size = regular_size(path)
    except FileError as error:
        raise ValueError(f"{op}: {argument}: {str(path)!r}: {error.reason}") from error
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a name with a NUL
        raise ValueError(f"{op}: {argument}: no such file: {str(path)!r}") from error
    except OSError as error:
        raise ValueError(f"{op}: {argument}: cannot read {str(path)!r}: {error.strerror}") from error
    if size == 0:
        raise ValueError(f"{op}: {argument}: {str(path)!r} is empty")


def read_text(op: str, argument: str, path: Path) -> str:
    """The text of a file without its mark, line ends as they are.

    Raises ValueError for a file that is missing or empty, that is not UTF-8, or that holds a NUL byte.
    """
    check_file(op, argument, path)
    content = path.read_bytes()
    source = f"{op}: {argument}: {str(path)!r}"
    refuse_encoding(source, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(lines(content[: error.start].decode("utf-8", "replace")))
        got = f"byte 0x{content[error.start]:02x} ({error.reason})"
        raise ValueError(f"{source}: line {line}: expected UTF-8, got {got}") from error
    if not text:
        raise ValueError(f"{source} is empty")
    if "\0" in text:
        raise ValueError(f"{source}: line {len(lines(text[: text.index(chr(0))]))} holds a NUL byte, which no text has")
    return text


def refuse_encoding(source: str, head: bytes) -> None:
    """Raise ValueError for a file that begins with the mark of another encoding than UTF-8."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            refuse_input(source, "UTF-8", encoding)


def lines(text: str) -> list[str]:
    """The lines of a text; one more, empty, if its last one is ended."""
    return _LINE_END.split(text)


def refuse_odd_line_ends(source: str, text: str) -> None:
    """Raise ValueError for a CR beside a line end, CR CR LF or LF CR, as damaged files have them.

    Each would be a blank line, since CR ends one. The message begins with `source`.
    """
    if found := _ODD_LINE_END.search(text):
        line = len(lines(text[: found.start()]))
        refuse_input(f"{source}: line {line}", "lines that end with LF, CRLF or CR", "a CR beside a line end")


def column_names(table: Any, **dialect: Any) -> list[str]:
    """The names in the first line of CSV or TSV, "" for one that is not there; of a path, or a stream of text.

    Raises ValueError for a name that is there twice, for none, and for a first row that is longer.
    """
    import pandas

    head = pandas.read_csv(table, header=None, nrows=2, dtype=str, **{"na_filter": False, **dialect})
    names = [*head.iloc[0]]
    if not any(name.strip() for name in names):
        refuse_input("line 1", "the names of columns", "a blank line")
    refuse_twice([name for name in names if name])
    return names


def json_object(text: str, numbers_as_written: bool = False, what: str = "column") -> dict[str, Any]:
    """An object, such as a line of JSONL; with `numbers_as_written` these are str.

    Raises ValueError for no object, and for a name that is there twice; `what` is what users call names.
    """
    numbers: dict[str, Any] = {"parse_int": str, "parse_float": str} if numbers_as_written else {}

    def of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        refuse_twice([name for name, _ in pairs], what)
        return dict(pairs)

    try:
        row = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=of_pairs, **numbers)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {shortened(row)}")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def refuse_twice(names: Sequence[str], what: str = "column") -> None:
    """Raise ValueError for a column, or something else, that is there twice."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"the {what} {twice[0]!r} is there more than once")


def shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def visible(text: str) -> str:
    """What a reader sees of a text: no invisible characters, a space for white space between others."""
    return " ".join(_INVISIBLE.sub("", text).split())


def lone_surrogate(text: str) -> str | None:
    """Half of a character, which JSON can write ("\\ud83d") and no tokenizer reads, if the text holds one."""
    found = _LONE_SURROGATE.search(text)
    return None if found is None else f"the lone surrogate {found[0]!r} at character {found.start()}"

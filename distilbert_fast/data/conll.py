"""Tagged sentences in files of CoNLL's form: a word a line, its tag in the last column, blank lines between them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from distilbert_fast.data.tags import refuse_odd_tag
from distilbert_fast.files.text import lines, refuse_input, refuse_odd_line_ends

_KEY_AND_VALUE = re.compile(r"# +[\w.:-]+ *=|#[\w.:-]+ += ")  # `# sent_id = 1`
_DOCUMENT = re.compile(r"#(begin|end) document\b")  # of CoNLL-2012
_TAG = re.compile(r"[BIES][-_]..*|\W+", re.IGNORECASE)


@dataclass
class Tagged:
    """Words and tags of sentences, and the place where each tag occurs first: "line 7", "row 3".

    Also the line (or row) where each sentence begins, and all its columns. ``unit``: "line", one for each word, or
    "row", one for each sentence.
    """

    unit: str = "line"

    rows: list[tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    lines: list[int] = field(default_factory=list)
    columns: list[list[tuple[str, ...]]] = field(default_factory=list)

    def add(self, line: int, sentence: list[tuple[str, ...]]) -> None:
        """A sentence that begins in that line: the columns of each word."""
        words = tuple(cells[0] for cells in sentence if len(cells) > 1)
        self.rows.append((words, tuple(cells[-1] for cells in sentence)))
        self.lines.append(line)
        self.columns.append(sentence)

    def met(self, source: str, tag: str, number: int) -> None:
        """A tag in that line or row. Raises ValueError if it is odd; see `refuse_odd_tag`."""
        if tag not in self.places:
            place = f"{self.unit} {number}"
            refuse_odd_tag(f"{source}: {place}", tag)
            self.places[tag] = place


def read_conll(source: str, text: str) -> Tagged:
    """The sentences of a file, without those that have no words.

    Columns are separated by a tab if there is one in the line, else by spaces; where most lines have tabs, all must. A
    line of spaces and tabs alone ends a sentence; so does one that begins with -DOCSTART-, in any case, which is
    skipped. Comments before a sentence are skipped: lines that begin with # and are no row of the file. Raises
    ValueError, which begins with `source`, with the line's number.
    """
    refuse_odd_line_ends(source, text)
    if (at := re.search("[\r\n]\ufeff", text)) is not None:
        number = len(lines(text[: at.end()]))
        refuse_input(f"{source}: line {number}", "a mark (BOM) at the file's beginning alone", "one here")
    given = [line.strip(" \t") for line in lines(text)]
    rows = [_columns(line) for line in given]
    plain = [row for row in rows if row and not row[0].startswith("#")]  # comments have no columns
    widths = Counter(len(row) for row in plain if len(row) > 1)
    width = widths.most_common(1)[0][0] if widths else 0
    known = {row[-1] for row in plain if len(row) == width}
    tabbed = [("\t" in line) for line, row in zip(given, rows, strict=True) if row and not row[0].startswith("#")]
    tabs = sum(tabbed) * 2 >= max(1, len(tabbed))
    tagged = Tagged()
    sentence: list[tuple[str, ...]] = []
    for number, (line, row) in enumerate(zip([*given, ""], [*rows, ()], strict=True), start=1):
        place = f"{source}: line {number}"
        if not row:
            if sentence:
                tagged.add(number - len(sentence), sentence)
            sentence = []
            continue
        without = tabs and "\t" not in line
        if _is_comment(line, row, width, known) or (without and row[0] == "#"):
            if sentence:
                refuse_input(place, "comments before a sentence", f"{line!r} inside one")
            continue
        width = width or len(row)
        if without and len(row) > 1:
            refuse_input(place, "tabs between columns as in other lines", repr(line))
        if (
            row[0] == "#"
            and "\t" not in line
            and not sentence
            and known
            and not (row[-1] in known or _TAG.fullmatch(row[-1]))
        ):
            refuse_input(place, "a word and its tag, or a comment such as '# text = a'", repr(line))
        if len(row) < 2 or len(row) != width or not (row[0] and row[-1]):
            others = "the lines before" if sentence or tagged.rows else "other lines"
            expected = "a word and its tag" if width < 2 else f"{width} columns as in {others}"
            refuse_input(place, expected, repr(line))
        sentence.append(row)
        tagged.met(source, row[-1], number)
    if not tagged.rows:
        raise ValueError(f"{source} holds no sentences")
    if _are_numbers([words for words, _ in tagged.rows]):
        number = next(at for at, row in enumerate(rows, start=1) if row in plain)
        refuse_input(f"{source}: line {number}", "words in the first column", "their numbers")
    return tagged


def read_tags(source: str, text: str) -> Tagged:
    """The sentences of a file with a tag a line and nothing else; blank lines end them. Words are none."""
    refuse_odd_line_ends(source, text)
    tagged, sentence = Tagged(), list[tuple[str, ...]]()
    for number, line in enumerate([*lines(text), ""], start=1):
        if tag := line.strip(" \t"):
            sentence.append((tag,))
            tagged.met(source, tag, number)
        elif sentence:
            tagged.add(number - len(sentence), sentence)
            sentence = []
    if not tagged.rows:
        raise ValueError(f"{source} holds no tags")
    return tagged


def _columns(line: str) -> tuple[str, ...]:
    """The columns of a line; an empty list for a line that ends a sentence."""
    columns = tuple(cell.strip(" ") for cell in re.split("\t" if "\t" in line else " +", line))
    return () if columns == ("",) or columns[0].upper() == "-DOCSTART-" else columns


def _is_comment(line: str, row: Sequence[str], width: int, known: Collection[str]) -> bool:
    """Whether a line is a comment, and not the word # with its tag; `known` are the tags of all other words."""
    if _KEY_AND_VALUE.match(line) or _DOCUMENT.match(line):
        return True
    if row[0] != "#" and not row[0].startswith("# "):  # as a hashtag does
        return False
    if len(row) != (width or len(row)):
        return True
    if row[-1] in known or _TAG.fullmatch(row[-1]):
        return False
    return row[0] != "#" or "=" in row[-1] or row[-1].isdecimal() or row[-1] in ("newdoc", "newpar")


def _are_numbers(sentences: Sequence[Sequence[str]]) -> bool:
    """Whether words are the numbers 1, 2, 3 of words in their sentence, as the first column of CoNLL-U has them."""
    return any(len(words) > 1 for words in sentences) and all(
        words[0].partition("-")[0] in ("0", "1") and all(re.fullmatch(r"\d+([-.]\d+)?", word) for word in words)
        for words in sentences
    )

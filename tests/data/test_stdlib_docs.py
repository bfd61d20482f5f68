"""The built-in task's text: real, the same everywhere, not given away, and not on both sides of the split."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter

import pytest

from distilbert_fast.data import stdlib_docs

DIGEST = """
import hashlib, sys
{before}
from distilbert_fast.data import stdlib_docs
loaded = set(sys.modules)
text = repr([(*p, stdlib_docs.is_eval(p.name)) for p in stdlib_docs.passages()])
imported = set(sys.modules) - loaded
read = {{module for names in stdlib_docs.LIBRARIES.values() for module in names}}
print(hashlib.sha256(text.encode()).hexdigest(), len(imported & read))
"""


@pytest.fixture(scope="module")
def passages():
    return stdlib_docs.passages()


def test_a_few_thousand_passages_in_balanced_classes(passages):
    counts = Counter(passage.library for passage in passages)
    assert 2000 < len(passages) < 5000
    assert set(counts) == set(stdlib_docs.LIBRARIES)
    assert max(counts.values()) <= stdlib_docs.LIBRARY_LIMIT
    assert min(counts.values()) >= 50
    held_out = Counter(passage.library for passage in passages if stdlib_docs.is_eval(passage.name))
    assert min(held_out.values()) >= 10
    assert 0.15 < held_out.total() / len(passages) < 0.25


def test_passages_are_prose_of_their_object(passages):
    """The words of a passage stand in this order in the docstring that it names, names masked."""
    by_name = {passage.name: passage for passage in passages}
    import bisect  # a module whose docstring is plain, and where reading `__doc__` is a second way to it

    assert by_name["bisect.bisect_left"].library == "numbers"
    assert by_name["bisect.bisect_left"].text.split()[:4] == bisect.bisect_left.__doc__.split()[:4]
    for passage in passages:
        assert stdlib_docs.MIN_WORDS <= len(passage.text.split()) <= stdlib_docs.MAX_WORDS
        assert ">>>" not in passage.text
        assert "::=" not in passage.text


def test_no_object_and_no_wording_on_both_sides(passages):
    train = [passage for passage in passages if not stdlib_docs.is_eval(passage.name)]
    held_out = [passage for passage in passages if stdlib_docs.is_eval(passage.name)]
    assert not {p.name for p in train} & {p.name for p in held_out}

    def runs(passage, length=8):
        words = re.findall(r"\w+", passage.text.lower())
        return {" ".join(words[i : i + length]) for i in range(len(words) - length + 1)}

    seen = set().union(*map(runs, train))
    assert not [passage for passage in held_out if runs(passage) & seen]


def test_no_passage_names_its_module(passages):
    for passage in passages:
        module = re.sub("^_(py)?", "", passage.name.partition(".")[0])
        if module.startswith("topic:"):
            continue
        words = re.findall(r"\w+", passage.text.lower())
        assert module not in words, passage
        if len(module) >= 5:
            assert not [word for word in words if module in word], passage


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("the asyncio module", "the … module"),
        ("an email.message.Message object", "an … object"),
        ("Return a DecimalTuple, not a Decimal", "Return a …, not a …"),
        ("closed or opened; the coded text", "closed or opened; the coded text"),  # os, code: whole words only
        ("the os module's code", "the … module's …"),
        ("see logging.Handler.", "see …."),
        ("self.socket.recv(4)", "…(4)"),
    ],
)
def test_mask_names(text, masked):
    assert stdlib_docs.mask_names(text) == masked


def test_prose_leaves_out_code_and_keeps_paragraphs():
    words = " ".join(f"word{chr(97 + i % 26)}" for i in range(50))
    doc = f"{words}\n\n>>> f(x)\n1\n\n{words}\n\nassert_stmt ::= 'assert' expression\n\n{words} {words}"
    assert stdlib_docs.prose(doc) == [
        words,
        words,
        f"{words} {' '.join(words.split()[:30])}",
        " ".join(words.split()[30:]),
    ]
    assert stdlib_docs.prose("Too short to tell.") == []


def test_drop_repeated_keeps_the_first_of_a_shared_run():
    shared = "one two three four five six seven eight"
    first, second, third = (
        stdlib_docs.Passage(name, text, "xml")
        for name, text in (
            ("a", f"first {shared} end"),
            ("b", f"Second, {shared.title()} other"),
            ("c", f"third {shared.removesuffix(' eight')} nine"),
        )
    )
    assert stdlib_docs.drop_repeated([first, second, third]) == [first, third]


@pytest.mark.parametrize(
    ("flags", "before", "environment"),
    [
        ([], "", {"PYTHONHASHSEED": "0"}),
        (["-OO"], "import email, asyncio, unittest", {"PYTHONHASHSEED": "7", "LC_ALL": "C", "PYTHONUTF8": "0"}),
    ],
)
def test_same_text_in_every_process(passages, flags, before, environment, tmp_path):
    """Whatever was imported before, with any hash seed, without docstrings (-OO), in any locale and directory.

    And it imports none of the modules that it reads.
    """
    expected = repr([(*p, stdlib_docs.is_eval(p.name)) for p in passages])
    package = os.path.dirname(os.path.dirname(os.path.dirname(stdlib_docs.__file__)))
    done = subprocess.run(
        [sys.executable, *flags, "-c", DIGEST.format(before=before)],
        env={**os.environ, "PYTHONPATH": package, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [hashlib.sha256(expected.encode()).hexdigest(), "0"]


def test_says_that_the_source_files_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        stdlib_docs.passages()
    assert str(error.value) == (
        f"stdlib-docs: expected the standard library's source files under {str(tmp_path)!r}, got none; "
        "this Python carries compiled modules only: give another task (--task with --data)"
    )

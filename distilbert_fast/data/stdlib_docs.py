"""The text of the built-in task "stdlib-docs": the documentation that every CPython carries with it.

A passage is a stretch of prose of one documented object of the standard library (a docstring) or of one topic of
`help()` (`pydoc_data.topics`). Its label is the library that the object belongs to, one of `LIBRARIES`.

Source files are parsed, never imported, so no code of theirs runs, and the result depends on nothing but their bytes:
not on import order, the hash seed, -OO or the locale. What could give the label away without reading is masked
(`mask_names`), code and tables are left out, and of passages that repeat each other's wording only the first stays
(`drop_repeated`), so that an inherited docstring cannot stand on both sides of the split.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from distilbert_fast.data.tables import hashed

# Libraries after the chapters of the library reference; a module that this CPython lacks adds nothing.
LIBRARIES: dict[str, tuple[str, ...]] = {
    library: tuple(modules.split())
    for library, modules in {
        "command line": "argparse cmd configparser getopt logging optparse",
        "concurrency": "_threading_local asyncio concurrent multiprocessing queue sched subprocess threading",
        "development": "ast bdb code codeop dis doctest inspect pdb pickletools profile pstats pyclbr pydoc symtable "
        "tokenize trace traceback tracemalloc unittest",
        "email": "email mailbox",
        "files": "_pyio bz2 filecmp fileinput fnmatch genericpath glob gzip lzma ntpath os pathlib posixpath shutil "
        "tarfile tempfile zipfile",
        "language": "importlib modulefinder pkgutil pydoc_data runpy zipimport",
        "networking": "ftplib http imaplib ipaddress poplib selectors smtplib socket socketserver ssl urllib wsgiref "
        "xmlrpc",
        "numbers": "_pydatetime _pydecimal _strptime bisect calendar colorsys datetime fractions heapq numbers random "
        "statistics",
        "xml": "html xml",
    }.items()
}

MASK = "\N{HORIZONTAL ELLIPSIS}"
MIN_WORDS, MAX_WORDS = 14, 80  # about 20 to 120 word pieces
SHARED_RUN = 8  # words in a row that no two passages have in common
LIBRARY_LIMIT = 400  # passages per library at most, so that no class dominates
_EVAL_PERCENT = 20


_Definition: TypeAlias = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Passage(NamedTuple):
    """One example: `text` documents the object `name` ("module.Class.method" or "topic:assert") of `library`."""

    name: str
    text: str
    library: str


def passages() -> list[Passage]:
    """All passages of this CPython, in the order of their objects' names.

    Raises FileNotFoundError when this Python was installed without the standard library's source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = [
        Passage(name, text, library)
        for library in LIBRARIES
        for name, doc in _library_docs(root, library)
        for text in prose(mask_names(doc))
    ]
    if not found:
        raise FileNotFoundError(
            f"stdlib-docs: expected the standard library's source files under {str(root)!r}, got none; "
            "this Python carries compiled modules only: give another task (--task with --data)"
        )
    kept = drop_repeated(sorted(found))
    chosen = [
        passage
        for library in LIBRARIES
        for passage in sorted((p for p in kept if p.library == library), key=lambda p: hashed(p.text))[:LIBRARY_LIMIT]
    ]
    return sorted(chosen)


def is_eval(name: str) -> bool:
    """Whether the object `name` belongs to the evaluation split: fixed by the name alone."""
    return hashed(name) % 100 < _EVAL_PERCENT


def prose(doc: str) -> list[str]:
    """The running text of a docstring as passages of MIN_WORDS to MAX_WORDS words; whole paragraphs where they fit."""
    passages: list[list[str]] = []
    words: list[str] = []
    for paragraph in re.split(r"\n\s*\n", doc):
        more = _sentence_words(paragraph)
        if len(words) + len(more) > MAX_WORDS:
            passages.append(words)
            words = []
        while len(more) > MAX_WORDS:
            passages.append(more[:MAX_WORDS])
            more = more[MAX_WORDS:]
        words = words + more
    return [" ".join(words) for words in [*passages, words] if len(words) >= MIN_WORDS]


def mask_names(text: str) -> str:
    """Replace every name that tells a library: a module's name, a dotted name below it, a word that contains it.

    `email.message.Message`, `asyncio`, "Decimal" and `DecimalTuple` become an ellipsis wherever they stand. A short
    or everyday module name (`os`, `code`) is masked only as a whole word.
    """
    return _IDENTIFIER.sub(lambda match: MASK if _tells_library(match[0]) else match[0], text)


def drop_repeated(passages: Sequence[Passage]) -> list[Passage]:
    """Leave out each passage that shares SHARED_RUN words in a row with one before it."""
    kept: list[Passage] = []
    seen: set[tuple[str, ...]] = set()
    for passage in passages:
        words = re.findall(r"\w+", passage.text.lower())
        runs = {tuple(words[i : i + SHARED_RUN]) for i in range(max(1, len(words) - SHARED_RUN + 1))}
        if seen.isdisjoint(runs):
            seen |= runs
            kept.append(passage)
    return kept


_NOT_LETTERS = re.compile(r"[^\w\s]|[\d_]")
_IDENTIFIER = re.compile(r"\w+(?:\.\w+)*")
# `_pydecimal` is the source of what users call `decimal`.
_MODULES = frozenset(re.sub("^_(py)?", "", name) for names in LIBRARIES.values() for name in names)
# Names this long are also masked inside a longer word: `smtplib` in "test_smtplib", "decimal" in "DecimalTuple".
_LONG_MODULES = re.compile("|".join(sorted(name for name in _MODULES if len(name) >= 5)))


@functools.cache
def _tells_library(identifier: str) -> bool:
    lowered = identifier.lower()
    return any(part in _MODULES for part in lowered.split(".")) or _LONG_MODULES.search(lowered) is not None


def _library_docs(root: Path, library: str) -> Iterator[tuple[str, str]]:
    for module in LIBRARIES[library]:
        if module == "pydoc_data":
            yield from _topics(root)
            continue
        package, single = root / module, root / f"{module}.py"
        files = [single] if single.is_file() else sorted(package.rglob("*.py")) if package.is_dir() else []
        for path in files:
            parts = path.relative_to(root).with_suffix("").parts
            if not {"test", "tests"} & set(parts):
                tree = ast.parse(path.read_bytes(), filename=str(path))
                yield from _docstrings(tree, ".".join(part for part in parts if part != "__init__"))


def _docstrings(node: ast.Module | _Definition, name: str) -> Iterator[tuple[str, str]]:
    doc = ast.get_docstring(node)
    if doc:
        yield name, doc
    for child in _definitions(node):
        yield from _docstrings(child, f"{name}.{child.name}")


def _definitions(node: ast.AST) -> Iterator[_Definition]:
    """The classes and functions right below a node, also those inside an `if` or `try`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Definition):
            yield child
        elif not isinstance(child, ast.expr):
            yield from _definitions(child)


def _topics(root: Path) -> Iterator[tuple[str, str]]:
    path = root / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in ast.parse(path.read_bytes(), filename=str(path)).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                yield f"topic:{topic}", inspect.cleandoc(text)


def _sentence_words(paragraph: str) -> list[str]:
    """The words of a paragraph of prose; none for code, doctests, grammar, tables and headings."""
    lines = paragraph.splitlines()
    text = " ".join(lines)
    code = any(re.match(r"\s*(>>>|\.\.\. |[+|=*~^-]{3,}|#|\$ )", line) for line in lines)
    if code or "::=" in text or len(_NOT_LETTERS.findall(text)) > 0.15 * len(text):
        return []
    return text.split()
